"""How many patients there are in each cell of an agreed grid, before anybody asks for a model.

One patient is one cell: sensitivity 1 in private mode. Broadcast-free. What is printed keeps a floor, and no cell below
it can be solved for from the printed cells, the margins and the total: a linear program over the printed table is solved
for every hidden cell, and cells join it until each is uncertain by at least the floor (spec/genomics.md, section 5).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise, product
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from sequester.protocols.analyses.analysis import Broadcast, Finished, Layout, Next, State, Sums
from sequester.protocols.analyses.cohort import Cohort, Columns, Part, Result
from sequester.protocols.analyses.plan import AnalysisPlan, Number

if TYPE_CHECKING:
    from sequester.protocols.study import Study

Vector = NDArray[np.float64]
MAX_CELLS = 2000
MAX_HIDDEN = 150  # beyond it margins are left out, not solved for


class Axis(BaseModel):
    """One column of the grid: its values; of a quantity or a time the bands between public `edges`, lower end included."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    column: Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,63}$")]
    edges: tuple[Number, ...] = ()


class CountsPlan(AnalysisPlan):
    """`axes` are the phenotype, covariates, or the study's subgroup column; a missing value is a level of its own."""

    kind: Literal["counts"] = "counts"
    axes: tuple[Axis, ...] = Field(min_length=1, max_length=4)
    part: Part = "all"


class Counts:
    """See the module."""

    kind = "counts"

    def rounds(self, plan: CountsPlan, study: Study) -> int:
        return 1

    def layout(self, plan: CountsPlan, study: Study, step: int) -> Layout:
        return Layout((("cells", tuple(len(levels(study, axis)) for axis in plan.axes)),))

    def sensitivity(self, plan: CountsPlan, study: Study) -> float:
        return 1.0

    def is_iterative(self, plan: CountsPlan, study: Study) -> bool:
        return False

    def start(self, plan: CountsPlan, study: Study, earlier: Mapping[str, Finished]) -> Next:
        return Next({}, {})

    def contribution(self, plan: CountsPlan, study: Study, cohort: Cohort, broadcast: Broadcast, step: int) -> Sums:
        columns = cohort.columns(plan.part)
        cells = np.zeros(self.layout(plan, study, step).fields[0][1])
        np.add.at(cells, tuple(_level(study, axis, columns) for axis in plan.axes), 1.0)
        return {"cells": cells}

    def combine(self, plan: CountsPlan, study: Study, state: State, sums: Sums, step: int) -> Next | Finished:
        names = [levels(study, axis) for axis in plan.axes]
        cells = np.rint(sums["cells"])
        table = suppressed(cells, study.publication_floor)
        result: Result = {"axes": [{"column": a.column, "levels": n} for a, n in zip(plan.axes, names, strict=True)]}
        below = f"<{study.publication_floor}"
        result["cells"] = [
            {"levels": list(at), "people": int(cells[i]) if table.shown[i] else below}
            for at, i in zip(product(*names), np.ndindex(cells.shape), strict=True)
        ]
        result["margins"] = [
            {
                "column": plan.axes[a].column,
                "people": [int(round(v)) if ok else below for v, ok in zip(*rows, strict=True)],
            }
            for a, rows in enumerate(table.margins)
        ]
        result["people"] = int(round(float(cells.sum()))) if table.total else below
        if plan.mode == "private":
            result["noise_sd"] = noise_sd(plan, study)
        return Finished(result, {})


def noise_sd(plan: Any, study: Study) -> float:
    """Standard deviation of the noise in one opened number, all sites live; 0 in exact mode."""
    if plan.mode == "exact":
        return 0.0
    from sequester.protocols import privacy  # privacy knows analyses, not the other way at import

    share = privacy.sigma_int(study, plan, privacy.layout(study, plan, 0))
    return share * float(np.sqrt(len(study.sites))) / float(2**study.aggregation.fraction_bits)


def levels(study: Study, axis: Axis) -> list[str]:
    """Names of an axis' levels, `missing` last; a phenotype and the subgroup have none missing."""
    if axis.column == study.cohort.subgroup:
        return [*study.cohort.subgroup_values, "other"]
    column = next(c for c in (study.phenotype, *study.covariates) if c.name == axis.column)
    if column.kind in ("quantitative", "time"):
        e = [f"{edge.normalize():f}" for edge in axis.edges]
        found = [f"<{e[0]}", *(f"{a} to <{b}" for a, b in pairwise(e)), f">={e[-1]}"]
    else:
        found = list(column.values) or ["0", "1"]
    return found if column is study.phenotype else [*found, "missing"]


def _level(study: Study, axis: Axis, columns: Columns) -> NDArray[np.int64]:
    """int64 (patients,): the level each patient is in."""
    from sequester.protocols.study import standardisation, transformed  # the study knows analyses at import

    if axis.column == study.cohort.subgroup:
        return columns.strata
    if axis.column == study.phenotype.name:
        centre, scale = standardisation(study.phenotype)
        column = study.phenotype
        values = columns.y * scale + centre if column.kind == "quantitative" else columns.y
    else:
        column = next(c for c in study.covariates if c.name == axis.column)
        places = [j for j, f in enumerate(study.features()) if f.source == column.name and f.kind == "covariate"]
        values = columns.raw[:, places[0]]
        if column.kind == "category":
            level = columns.raw[:, places] @ np.arange(1.0, len(places) + 1)  # NaN where the category is missing
            return np.where(np.isnan(level), len(places) + 1, np.nan_to_num(level)).astype(np.int64)
    if column.kind == "binary":
        return np.where(np.isnan(values), 2, np.nan_to_num(values)).astype(np.int64)
    edges = [transformed(column, float(edge)) for edge in axis.edges]
    # a value that went through its standardisation may have lost its last digit: an edge takes it all the same
    level = np.searchsorted(np.array(edges) - 1e-9 * max(map(abs, edges)), values, side="right")
    return np.where(np.isnan(values), len(edges) + 1, level).astype(np.int64)


class Shown:
    """What of a grid is printed: `shown` bool (cells' shape), `margins` of each axis (values, printed), `total`."""

    def __init__(self, cells: Vector, shown: NDArray[np.bool_], margins: bool, total: bool, floor: int) -> None:
        self.shown = shown
        self.total = total
        self.margins: list[tuple[Vector, NDArray[np.bool_]]] = []
        for axis in range(cells.ndim if margins else 0):
            values = cells.sum(axis=tuple(a for a in range(cells.ndim) if a != axis))
            # one level alone below the floor would be the total minus the others: then the axis prints none
            self.margins.append((values, np.full(len(values), bool((values >= floor).all()))))


def suppressed(cells: Vector, floor: int) -> Shown:
    """The grid with every cell below the floor hidden, and as few more as keep each of those uncertain by the floor.

    Margins go where they would give a cell away whatever is hidden beside it, the total last.
    """
    shown = cells >= floor
    if (~shown).sum() > MAX_HIDDEN:
        return Shown(cells, shown, False, False, floor)
    for margins, total in ((True, True), (False, True)):
        table = Shown(cells, shown.copy(), margins and cells.ndim > 1, total, floor)
        while (exposed := _exposed(cells, table, floor)) is not None:
            line = [i for i in _beside(exposed, table) if table.shown[i]]
            if not line or (~table.shown).sum() >= MAX_HIDDEN:
                break
            table.shown[min(line, key=lambda i: cells[i])] = False
        else:
            return table
    return Shown(cells, shown, False, False, floor)


def _constraints(table: Shown) -> Iterator[tuple[float, NDArray[np.bool_]]]:
    """(printed sum, the cells it is the sum of): what a reader can write down."""
    shape = table.shown.shape
    for axis, (values, printed) in enumerate(table.margins):
        for level in np.flatnonzero(printed):
            member = np.zeros(shape, dtype=bool)
            member[(slice(None),) * axis + (level,)] = True
            yield float(values[level]), member
    if table.total:
        yield np.nan, np.ones(shape, dtype=bool)


def _exposed(cells: Vector, table: Shown, floor: int) -> tuple[int, ...] | None:
    """A hidden cell that a reader knows to within less than the floor; None where there is none."""
    hidden = [tuple(int(v) for v in i) for i in np.argwhere(~table.shown)]
    if not hidden:
        return None
    from scipy.optimize import linprog

    rows, sums = [], []
    for total, member in _constraints(table):
        row = [1.0 if member[i] else 0.0 for i in hidden]
        if any(row):
            rows.append(row)
            sums.append(float(cells.sum() if np.isnan(total) else total) - float(cells[member & table.shown].sum()))
    if not rows:
        return None
    for j, i in enumerate(hidden):
        aim = np.zeros(len(hidden))
        ends = []
        for sign in (1.0, -1.0):
            aim[j] = sign
            found = linprog(aim, A_eq=np.array(rows), b_eq=np.array(sums), bounds=(0, None), method="highs")
            ends.append(sign * found.fun if found.status == 0 else np.inf * -sign)
        if abs(ends[1] - ends[0]) < floor:
            return i
    return None


def _beside(cell: tuple[int, ...], table: Shown) -> list[tuple[int, ...]]:
    """Cells that share a printed margin with `cell`, else all: hiding one of them makes it less certain."""
    found = set()
    for axis, (_, printed) in enumerate(table.margins):
        if printed[cell[axis]]:
            found |= {i for i in np.ndindex(table.shown.shape) if i[axis] == cell[axis]}
    return sorted(found) if found else list(np.ndindex(table.shown.shape))


def faults(study: Study, plan: CountsPlan, earlier: Mapping[str, Any]) -> Iterator[str]:
    """What a plan says against its study."""
    columns = {c.name: c for c in (study.phenotype, *study.covariates)}
    known = {*columns, *([study.cohort.subgroup] if study.cohort.subgroup else [])}
    if len({axis.column for axis in plan.axes}) < len(plan.axes):
        yield f"analysis {plan.name}: a column is an axis twice"
    size = 1
    for axis in plan.axes:
        if axis.column not in known:
            yield f"analysis {plan.name}: `{axis.column}` is not the phenotype, a covariate or the subgroup"
            return
        banded = axis.column in columns and columns[axis.column].kind in ("quantitative", "time")
        if axis.column == study.cohort.subgroup:
            banded = False
        if banded != bool(axis.edges) or any(b <= a for a, b in pairwise(axis.edges)):
            yield (
                f"analysis {plan.name}: {axis.column} needs rising `edges`"
                if banded
                else (f"analysis {plan.name}: {axis.column} has values, no edges")
            )
            return
        size *= len(levels(study, axis))
    if size > MAX_CELLS:
        yield f"analysis {plan.name}: a grid of {size} cells; at most {MAX_CELLS} were expected"


COUNTS = Counts()
