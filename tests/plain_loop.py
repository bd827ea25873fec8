"""A study in one process without masks: the same contributions and combinations, added in a plain loop.

The second opinion for the federation, and what oracles compare with other people's statistics. `Rows` is a cohort of
standardised arrays, `Patients` one of raw columns and dosages. With `fixed_point` every contribution is rounded as in a
real round. Noise, where asked for, is the ideal Gaussian of the design's size, from a seeded generator.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequester.protocols import privacy
from sequester.protocols.analyses.analysis import Broadcast, Finished, Sums
from sequester.protocols.analyses.cohort import Block, Cohort, Columns, Dosages, Part, standardised
from sequester.protocols.analyses.loop import analyses
from sequester.protocols.analyses.registry import Plan, analysis_of
from sequester.protocols.analyses.training import TrainingPlan, local_round
from sequester.protocols.study import Study


@dataclass(frozen=True, slots=True)
class Rows:
    """A cohort in memory: standardised features, outcome, held-out flag, fold, subgroup."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    test: NDArray[np.bool_]
    fold: NDArray[np.int64]
    strata: NDArray[np.int64]
    study: Study | None = None

    def blocks(self, part: Part) -> Iterator[Block]:
        keep = np.ones(len(self.y), bool) if part == "all" else self.test if part == "test" else ~self.test
        for rows in np.array_split(np.flatnonzero(keep), 3):  # several blocks: sums must not depend on their number
            yield Block(self.x[rows], self.y[rows], self.fold[rows], self.strata[rows])

    def gradient(self, plan: TrainingPlan, weights: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
        from sequester.client.compute.training.gradient import clipped_sum

        assert self.study is not None, "rows(..., study=...) where torch models are trained"
        return clipped_sum(plan, self.study, self.blocks(plan.part), weights, os.urandom)


@dataclass(frozen=True, slots=True)
class Patients:
    """A cohort in memory as a site stores it: raw table columns and dosages, NaN missing."""

    study: Study
    table: NDArray[np.float64]
    dosage: NDArray[np.float64]
    y: NDArray[np.float64]
    test: NDArray[np.bool_]
    fold: NDArray[np.int64]
    strata: NDArray[np.int64]
    event: NDArray[np.float64] | None = None

    def _rows(self, part: Part) -> NDArray[np.int64]:
        keep = np.ones(len(self.y), bool) if part == "all" else self.test if part == "test" else ~self.test
        return np.flatnonzero(keep)

    def blocks(self, part: Part) -> Iterator[Block]:
        x = standardised(np.hstack([self.table, self.dosage]), self.study.features())
        for rows in np.array_split(self._rows(part), 3):
            event = None if self.event is None else self.event[rows]
            yield Block(x[rows], self.y[rows], self.fold[rows], self.strata[rows], event)

    def columns(self, part: Part) -> Columns:
        rows = self._rows(part)
        event = None if self.event is None else self.event[rows]
        return Columns(self.table[rows].copy(), self.y[rows], self.fold[rows], self.strata[rows], event)

    def dosages(self, part: Part) -> Iterator[Dosages]:
        rows = self._rows(part)
        for first in range(0, self.dosage.shape[1], 257):
            yield Dosages(first, self.dosage[rows, first : first + 257])  # rows are an index: a copy

    def some(self, part: Part, variants: Sequence[int]) -> NDArray[np.float64]:
        return self.dosage[np.ix_(self._rows(part), list(variants))]

    def gradient(self, plan: TrainingPlan, weights: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
        from sequester.client.compute.training.gradient import clipped_sum

        return clipped_sum(plan, self.study, self.blocks(plan.part), weights, os.urandom)

    def only(self, rows: NDArray[np.int64]) -> Patients:
        """The same cohort with these patients alone."""
        event = None if self.event is None else self.event[rows]
        parts = (self.table, self.dosage, self.y, self.test, self.fold, self.strata)
        return Patients(self.study, *(part[rows] for part in parts), event)


def patients(
    study: Study, y: NDArray[np.float64], table: NDArray[np.float64] | None = None,
    dosage: NDArray[np.float64] | None = None, event: NDArray[np.float64] | None = None,
    strata: NDArray[np.int64] | None = None, seed: int = 0, test: float = 0.0,
) -> Patients:  # fmt: skip
    """A cohort of raw columns, split and folds drawn by a seed."""
    rng = np.random.default_rng(seed)
    n = len(y)
    return Patients(
        study, np.zeros((n, 0)) if table is None else table, np.zeros((n, 0)) if dosage is None else dosage, y,
        rng.random(n) < test, rng.integers(0, study.cohort.folds, n),
        np.zeros(n, dtype=np.int64) if strata is None else strata, event,
    )  # fmt: skip


def split(whole: Patients, sizes: Sequence[int]) -> list[Patients]:
    """Hospitals of these sizes, in order."""
    assert sum(sizes) == len(whole.y)
    return [whole.only(rows) for rows in np.split(np.arange(len(whole.y)), np.cumsum(sizes)[:-1])]


def rows(
    x: NDArray[np.float64], y: NDArray[np.float64], seed: int = 0, test: float = 0.2, folds: int = 5,
    study: Study | None = None,
) -> Rows:  # fmt: skip
    """A cohort with split and folds drawn by a seed."""
    rng = np.random.default_rng(seed)
    n = len(y)
    return Rows(x, y, rng.random(n) < test, rng.integers(0, folds, n), np.zeros(n, dtype=np.int64), study)


def _local(
    plan: Any, study: Study, cohort: Cohort, broadcast: Broadcast, rng: np.random.Generator | None
) -> NDArray[np.float64]:
    analysis = analysis_of(plan)
    layout = analysis.layout(plan, study, 0)
    sd = privacy.multiplier(plan) * analysis.sensitivity(plan, study) * plan.local_steps**0.5
    walk = local_round(plan, study, layout, broadcast)
    weights = next(walk)
    while True:
        noised = layout.flatten(analysis.contribution(plan, study, cohort, weights, 0))
        if rng is not None:
            noised += rng.normal(0.0, sd, layout.length)
        try:
            weights = walk.send(noised)
        except StopIteration as over:
            return over.value


def run(
    study: Study, cohorts: Sequence[Cohort], rng: np.random.Generator | None = None, fixed_point: bool = False
) -> dict[str, Finished]:
    """Every analysis of the study in order; `rng` adds noise of sigma times sensitivity to private sums."""
    codec = privacy.codec(study)

    def plain_sum(plan: Plan, step: int, broadcast: Broadcast) -> Sums:
        analysis = analysis_of(plan)
        layout = analysis.layout(plan, study, step)
        total = np.zeros(layout.length)
        if privacy.local_steps(plan) > 1:
            return layout.split(total + sum(_local(plan, study, cohort, broadcast, rng) for cohort in cohorts))
        for cohort in cohorts:
            vector = layout.flatten(analysis.contribution(plan, study, cohort, broadcast, step))
            total += codec.decode(codec.encode(vector)) if fixed_point else vector
        if plan.mode == "private" and rng is not None:
            sd = privacy.multiplier(plan) * analysis.sensitivity(plan, study)
            if study.privacy.mechanism == "local":
                sd *= len(cohorts) ** 0.5  # the whole noise at each hospital
            total += rng.normal(0.0, sd, layout.length)
        return layout.split(total)

    return analyses(study, plain_sum)
