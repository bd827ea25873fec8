"""A study in one process without masks: the same contributions and combinations, added in a plain loop.

The second opinion for the federation, and what oracles compare with other people's statistics. `Rows` is a cohort of
arrays. Noise, where asked for, is the ideal Gaussian of the design's size, from a seeded generator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sequester.protocols import privacy
from sequester.protocols.analyses.analysis import Finished
from sequester.protocols.analyses.cohort import Block, Cohort, Part
from sequester.protocols.analyses.registry import analysis_of
from sequester.protocols.study import Study


@dataclass(frozen=True, slots=True)
class Rows:
    """A cohort in memory: standardised features, outcome, held-out flag, fold, subgroup."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    test: NDArray[np.bool_]
    fold: NDArray[np.int64]
    strata: NDArray[np.int64]

    def blocks(self, part: Part) -> Iterator[Block]:
        keep = np.ones(len(self.y), bool) if part == "all" else self.test if part == "test" else ~self.test
        for rows in np.array_split(np.flatnonzero(keep), 3):  # several blocks: sums must not depend on their number
            yield Block(self.x[rows], self.y[rows], self.fold[rows], self.strata[rows])


def rows(x: NDArray[np.float64], y: NDArray[np.float64], seed: int = 0, test: float = 0.2, folds: int = 5) -> Rows:
    """A cohort with split and folds drawn by a seed."""
    rng = np.random.default_rng(seed)
    n = len(y)
    return Rows(x, y, rng.random(n) < test, rng.integers(0, folds, n), np.zeros(n, dtype=np.int64))


def run(study: Study, cohorts: Sequence[Cohort], rng: np.random.Generator | None = None) -> dict[str, Finished]:
    """Every analysis of the study in order; `rng` adds noise of sigma times sensitivity to private sums."""
    finished: dict[str, Finished] = {}
    for plan in study.analyses:
        analysis = analysis_of(plan)
        following = analysis.start(plan, study, finished)
        for step in range(analysis.rounds(plan, study)):
            layout = analysis.layout(plan, study, step)
            total = np.zeros(layout.length)
            for cohort in cohorts:
                sums = analysis.contribution(plan, study, cohort, following.broadcast, step)
                total += layout.flatten(sums)
            if plan.mode == "private" and rng is not None:
                sd = privacy.multiplier(plan) * analysis.sensitivity(plan, study)
                total += rng.normal(0.0, sd, layout.length)
            outcome = analysis.combine(plan, study, following.state, layout.split(total), step)
            if isinstance(outcome, Finished):
                finished[plan.name] = outcome
                break
            following = outcome
    return finished
