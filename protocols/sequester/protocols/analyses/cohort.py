"""What an analysis may see of a site's patients. Compute implements it; nothing else ever holds one.

Values are public-scale: each feature is already imputed, clamped and standardised by the study's public constants
(`Study.features()`), so that no number here was derived from the patients as a group (spec/privacy.md, 3.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sequester.protocols.analyses.training import TrainingPlan
    from sequester.protocols.study import Feature, Study

Part = Literal["train", "test", "all"]
Which = Literal["all", "table"]
ROWS = 4096


@dataclass(frozen=True, slots=True)
class Block:
    """Some patients: `x` float64 (rows, features) standardised, `y` float64 (rows,), `fold` int64 (rows,),

    `strata` int64 (rows,) index into the study's subgroups, 0 where it names none; `event` float64 (rows,) 1 where the
    time in `y` is that of the event, 0 where follow-up ended first, None unless the phenotype is a time.
    """

    x: NDArray[np.float64]  # (rows, features)
    y: NDArray[np.float64]  # (rows,)
    fold: NDArray[np.int64]  # (rows,), 0..folds-1 by keyed hash of the patient
    strata: NDArray[np.int64]  # (rows,)
    event: NDArray[np.float64] | None = None  # (rows,)


@dataclass(frozen=True, slots=True)
class Columns:
    """All patients of a part without their variants: `raw` on the (transformed) scale of the table, NaN missing."""

    raw: NDArray[np.float64]  # (patients, scores and covariates), in the order of `Study.features()`
    y: NDArray[np.float64]  # (patients,)
    fold: NDArray[np.int64]  # (patients,)
    strata: NDArray[np.int64]  # (patients,)
    event: NDArray[np.float64] | None = None  # (patients,)


@dataclass(frozen=True, slots=True)
class Dosages:
    """Some variants of all patients of a part: copies of the effect allele, 0..2, NaN missing."""

    first: int  # the place of the first of them in the study's list
    copies: NDArray[np.float64]  # (patients, variants)


class Cohort(Protocol):
    """A frozen cohort. Iterating twice gives the same patients in the same order, whatever they are asked for."""

    def blocks(self, part: Part) -> Iterator[Block]:
        """The patients of one part, in blocks of rows; parts are fixed at ingest by keyed hash of the patient."""
        ...

    def columns(self, part: Part) -> Columns:
        """Table and outcome of one part at once; the variants, which may be many, are left on disk."""
        ...

    def dosages(self, part: Part) -> Iterator[Dosages]:
        """The variants of one part, in blocks of variants, so that memory does not grow with their number.

        The arrays are the caller's to change.
        """
        ...

    def gradient(
        self, plan: TrainingPlan, weights: Mapping[str, NDArray[np.float64]]
    ) -> dict[str, NDArray[np.float64]]:
        """The sum of the clipped per-patient gradients of the plan's model at `weights`, named as the weights are.

        With a rate below 1 the patients are sampled anew at each call. Compute answers by closed form or Opacus.
        """
        ...

    def some(self, part: Part, variants: Sequence[int]) -> NDArray[np.float64]:
        """Copies of a few variants by their places in the study's list, (patients, variants), NaN missing."""
        ...


def standardised(raw: NDArray[np.float64], features: Sequence[Feature]) -> NDArray[np.float64]:
    """(raw - centre) / scale by the features' public constants; missing becomes 0, the public centre."""
    centre, scale = np.array([f.centre for f in features]), np.array([f.scale for f in features])
    x: NDArray[np.float64] = (raw - centre) / scale
    x[np.isnan(x)] = 0.0
    return x


def chosen(study: Study, which: Which, leave_out: Sequence[str] = ()) -> tuple[Feature, ...]:
    """The features an analysis works on: all, or those of the table (scores and covariates), but for those left out."""
    features = study.features() if which == "all" else study.table_features()
    return tuple(f for f in features if f.source not in leave_out) if leave_out else features


def designs(study: Study, cohort: Cohort, part: Part, which: Which, leave_out: Sequence[str] = ()) -> Iterator[Block]:
    """The patients of one part in blocks, with the chosen features only; `table` reads no genotype."""
    every = chosen(study, which)
    kept = [j for j, f in enumerate(every) if f.source not in leave_out]
    if which == "all":
        for block in cohort.blocks(part):
            yield replace(block, x=block.x[:, kept]) if leave_out else block
        return
    c = cohort.columns(part)
    x = standardised(c.raw, every)[:, kept]
    for at in range(0, len(c.y), ROWS):
        rows = slice(at, at + ROWS)
        yield Block(x[rows], c.y[rows], c.fold[rows], c.strata[rows], None if c.event is None else c.event[rows])


Result = dict[str, Any]
