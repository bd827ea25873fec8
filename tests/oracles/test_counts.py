"""Counts over a grid against a group-by, and what a reader can work out about a cell that is not printed."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import linprog

import contracts
import plain_loop
from oracles import table
from sequester.protocols import noise, privacy
from sequester.protocols.analyses.counts import COUNTS, suppressed
from sequester.protocols.errors import StudyError
from sequester.protocols.study import Study

AXES = [{"column": "case"}, {"column": "sex"}, {"column": "age", "edges": ["40", "60"]}, {"column": "ancestry"}]


def study_of(mode: str = "exact", axes: list[dict[str, Any]] = AXES, **changed: Any) -> Study:
    return contracts.study(**{
        "phenotype": {"name": "case", "kind": "binary", "values": ["0", "1"]}, "variants": [],
        "covariates": [
            {"name": "age", "kind": "quantitative", "lower": "20", "upper": "90", "transform": "sqrt"},
            {"name": "sex", "kind": "binary", "values": ["f", "m"]},
            {"name": "smoke", "kind": "category", "values": ["never", "former", "now"]},
        ],
        "cohort": {"subgroup": "ancestry", "subgroup_values": ["AFR", "EUR"]},
        "analyses": [{"kind": "counts", "name": "grid", "mode": mode, "axes": axes}],
        "aggregation": {"mode": "strict", "ring_bits": 64, "fraction_bits": 28} if mode == "exact" else {"mode": "strict"},
        **changed,
    })  # fmt: skip


def people(study: Study, n: int, seed: int) -> tuple[pd.DataFrame, plain_loop.Patients]:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({
        "case": rng.random(n) < 0.1, "age": rng.integers(20, 91, n).astype(float), "sex": rng.integers(0, 2, n).astype(float),
        "smoke": rng.integers(0, 3, n).astype(float), "ancestry": rng.choice(3, n, p=[0.25, 0.65, 0.1]),
    })  # fmt: skip
    for name in ("age", "sex", "smoke"):
        frame.loc[rng.random(n) < 0.02, name] = np.nan
    smoke = np.column_stack([np.where(frame.smoke.isna(), np.nan, frame.smoke == level) for level in (1, 2)])
    raw = np.column_stack([np.sqrt(frame.age), frame.sex, smoke])
    y, strata = frame.case.to_numpy(float), frame.ancestry.to_numpy(np.int64)
    return frame, plain_loop.patients(study, y, table=raw, strata=strata)


def test_every_cell_equals_a_group_by() -> None:
    study = study_of()
    frame, whole = people(study, 20_000, 1)
    opened = sum(
        COUNTS.contribution(study.analyses[0], study, c, {}, 0)["cells"]
        for c in plain_loop.split(whole, [12_000, 7_000, 1_000])
    )
    band = np.digitize(frame.age, [40, 60]) + frame.age.isna() * (3 - np.digitize(frame.age, [40, 60]))
    theirs = np.zeros(opened.shape)
    for (case, sex, age, ancestry), n in frame.assign(band=band, sex=frame.sex.fillna(2)).groupby(
        ["case", "sex", "band", "ancestry"]
    ).size().items():  # fmt: skip
        theirs[int(case), int(sex), int(age), int(ancestry)] = n
    table.within("counts", "pandas", "cells", float(np.abs(opened - theirs).max()), 0.0)
    smoke = COUNTS.contribution(study_of(axes=[{"column": "smoke"}]).analyses[0], study, whole, {}, 0)["cells"]
    assert smoke.tolist() == frame.smoke.fillna(3).value_counts().sort_index().tolist()


def test_a_cell_below_the_floor_prints_the_floor_never_0_and_the_rest_are_exact() -> None:
    study = study_of()
    _, whole = people(study, 20_000, 1)
    result = plain_loop.run(study, plain_loop.split(whole, [12_000, 7_000, 1_000]))["grid"].result
    people_of = [cell["people"] for cell in result["cells"]]
    assert "<10" in people_of and 0 not in people_of
    assert all(n == "<10" or n >= 10 for n in people_of)
    assert result["people"] == 20_000


def ranges(shown: np.ndarray, cells: np.ndarray, margins: list[Any], total: bool) -> list[float]:
    """Width of what a reader knows about each hidden cell, by a linear program over all that is printed."""
    hidden = [tuple(i) for i in np.argwhere(~shown)]
    rows, right = [], []
    for axis, (values, printed) in enumerate(margins):
        for level in np.flatnonzero(printed):
            rows.append([float(i[axis] == level) for i in hidden])
            known = sum(cells[i] for i in np.ndindex(cells.shape) if shown[i] and i[axis] == level)
            right.append(values[level] - known)
    if total:
        rows.append([1.0] * len(hidden))
        right.append(cells.sum() - cells[shown].sum())
    widths = []
    for j in range(len(hidden)):
        ends = []
        for sign in (1, -1):
            found = linprog(sign * np.eye(len(hidden))[j], A_eq=rows or None, b_eq=right or None, bounds=(0, None))
            ends.append(np.inf if found.status == 3 else found.fun * sign)
        widths.append(np.inf if np.inf in ends else ends[1] - ends[0])
    return widths


@pytest.mark.parametrize("seed", range(12))
def test_no_hidden_cell_can_be_solved_for_from_cells_margins_and_total(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = [(2, 4), (2, 2, 3), (6,), (3, 3), (2, 2, 2, 2)][seed % 5]
    cells = rng.poisson(rng.choice([3.0, 15.0, 80.0], shape, p=[0.25, 0.25, 0.5])).astype(float)
    found = suppressed(cells, 10)
    assert not found.shown[cells < 10].any()
    assert all(width >= 10 - 1e-6 for width in ranges(found.shown, cells, found.margins, found.total))


def test_one_group_of_three_people_takes_another_cell_with_it() -> None:
    found = suppressed(np.array([500.0, 3.0, 40.0]), 10)
    assert found.shown.tolist() == [True, False, False] and found.total


def test_one_patient_is_one_cell_and_the_noise_of_a_cell_has_the_planned_size() -> None:
    study = study_of("private", n0=20_000, n_max=24_000)
    _, whole = people(study, 60, 2)
    plan = study.analyses[0]
    one, two = (COUNTS.contribution(plan, study, c, {}, 0)["cells"] for c in (whole, whole.only(np.arange(1, 60))))
    assert np.abs(one - two).sum() == 1 == COUNTS.sensitivity(plan, study)
    share = privacy.sigma_int(study, plan, privacy.layout(study, plan, 0))
    drawn = noise.discrete_gaussian(share, 10_000, noise.aes_stream(bytes(32), bytes(16)))
    table.within(
        "counts", "the planned noise", "sd of 10,000 draws, relative", abs(float(drawn.std()) / share - 1), 0.05
    )


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ([{"column": "height"}], "not the phenotype, a covariate or the subgroup"),
        ([{"column": "age"}], "needs rising `edges`"),
        ([{"column": "sex", "edges": ["1"]}], "has values, no edges"),
        ([{"column": "sex"}, {"column": "sex"}], "an axis twice"),
        ([{"column": "age", "edges": [str(20 + i / 2) for i in range(1, 140)]}, *AXES[:2], AXES[3]], "at most 2000"),
    ],
)  # fmt: skip
def test_a_grid_that_is_not_of_the_study_is_refused(axes: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(StudyError, match=said):
        study_of(axes=axes)


def test_levels_are_named_in_order_with_missing_last() -> None:
    study = study_of()
    _, whole = people(study, 500, 3)
    result = plain_loop.run(study, plain_loop.split(whole, [300, 100, 100]))["grid"].result
    assert [a["levels"] for a in result["axes"]] == [
        ["0", "1"], ["f", "m", "missing"], ["<40", "40 to <60", ">=60", "missing"], ["AFR", "EUR", "other"]
    ]  # fmt: skip
    assert len(result["cells"]) == len(list(product(range(2), range(3), range(4), range(3))))
