"""A study in one process with the gate's own noise: contributions, shares and ring words of the product, added in a ring.

No masks and no network; `plain_loop` is the same without integers. The noise is the operating system's, so what is
asserted on it leaves room for chance, and says how much.
"""

from __future__ import annotations

from collections.abc import Sequence

from sequester.client.gate.contribution import moved_words, noise_share, noised_sum, ring_vector
from sequester.protocols import privacy
from sequester.protocols.analyses.analysis import Finished
from sequester.protocols.analyses.cohort import Cohort
from sequester.protocols.analyses.registry import analysis_of
from sequester.protocols.analyses.training import TrainingPlan, local_round
from sequester.protocols.study import Study


def run(study: Study, cohorts: Sequence[Cohort]) -> dict[str, Finished]:
    """Every private analysis of the study in order, every site there in every round."""
    finished: dict[str, Finished] = {}
    codec, adders = privacy.codec(study), privacy.noise_adders(study)
    assert len(cohorts) == len(study.sites)
    for plan in study.analyses:
        analysis = analysis_of(plan)
        following = analysis.start(plan, study, finished)
        for step in range(privacy.rounds(study, plan)):
            layout = privacy.layout(study, plan, step)
            words = None
            for cohort in cohorts:
                if isinstance(plan, TrainingPlan) and plan.local_steps > 1:
                    mine = _stepped(study, plan, step, cohort, following.broadcast)
                else:
                    sums = analysis.contribution(plan, study, cohort, following.broadcast, step)
                    mine = ring_vector(study, plan, layout, sums, noise_share(study, plan, step, adders))
                words = mine.copy() if words is None else words + mine
            opened = layout.split(codec.decode(codec.from_sum(words, layout.length)))
            outcome = analysis.combine(plan, study, following.state, opened, step)
            if isinstance(outcome, Finished):
                finished[plan.name] = outcome
                break
            following = outcome
    return finished


def _stepped(study: Study, plan: TrainingPlan, step: int, cohort: Cohort, broadcast: object) -> object:
    layout = privacy.layout(study, plan, step)
    walk = local_round(plan, study, layout, broadcast)
    weights = next(walk)
    while True:
        sums = analysis_of(plan).contribution(plan, study, cohort, weights, step)
        share = noise_share(study, plan, step, privacy.noise_adders(study))
        try:
            weights = walk.send(noised_sum(study, plan, layout, sums, share))
        except StopIteration as over:
            return moved_words(study, plan, layout, over.value)
