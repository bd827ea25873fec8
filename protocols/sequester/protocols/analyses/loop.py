"""A study from its first analysis to its last, over whatever says what the sums are: masks, a ring, or plain addition.

The same pairs of functions as in a real round. `without_noise` is for people who are made up or public, whose sums may be
looked at: nothing here clips less, but nothing here protects anybody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from sequester.protocols import arrays, privacy
from sequester.protocols.analyses.analysis import Broadcast, Finished, Layout, Sums
from sequester.protocols.analyses.registry import Plan, analysis_of
from sequester.protocols.analyses.training import TrainingPlan, local_round

if TYPE_CHECKING:
    from sequester.protocols.analyses.cohort import Cohort
    from sequester.protocols.study import Study

OpenSum = Callable[[Plan, int, Broadcast], Sums]


def analyses(study: Study, open_sum: OpenSum) -> dict[str, Finished]:
    """Every analysis of the study in order, over whatever `open_sum(plan, step, broadcast)` says the sums are."""
    finished: dict[str, Finished] = {}
    for plan in study.analyses:
        analysis = analysis_of(plan)
        following = analysis.start(plan, study, finished)
        for step in range(analysis.rounds(plan, study)):
            privacy.check_broadcast(study, plan, step, arrays.encode(following.broadcast))  # as every site does
            sums = open_sum(plan, step, following.broadcast)
            outcome = analysis.combine(plan, study, following.state, sums, step)
            if isinstance(outcome, Finished):
                finished[plan.name] = outcome
                break
            following = outcome
    return finished


def without_noise(study: Study, cohorts: Sequence[Cohort]) -> dict[str, Finished]:
    """The study over plain sums of its contributions: what it would find if it protected nobody. Clips as it would."""

    def plain_sum(plan: Plan, step: int, broadcast: Broadcast) -> Sums:
        layout = analysis_of(plan).layout(plan, study, step)
        total = np.zeros(layout.length)
        for cohort in cohorts:
            if isinstance(plan, TrainingPlan) and plan.local_steps > 1:
                total += _stepped(plan, study, layout, cohort, broadcast)
            else:
                total += layout.flatten(analysis_of(plan).contribution(plan, study, cohort, broadcast, step))
        return layout.split(total)

    return analyses(study, plain_sum)


def _stepped(plan: TrainingPlan, study: Study, layout: Layout, cohort: Cohort, broadcast: Broadcast) -> np.ndarray:
    """How far one hospital's weights move in its local steps, (length,)."""
    walk = local_round(plan, study, layout, broadcast)
    weights = next(walk)
    while True:
        try:
            weights = walk.send(layout.flatten(analysis_of(plan).contribution(plan, study, cohort, weights, 0)))
        except StopIteration as over:
            return np.asarray(over.value)
