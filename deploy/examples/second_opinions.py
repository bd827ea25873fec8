"""Each exact analysis of a study beside other programs on everybody's data, at the tolerances of spec/genomics.md, 7.

What they share with this program is who belongs, who is held out, and the public constants of the study; everything else is
read and computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from examples import of_models, of_predictions, of_variants
from examples.compared import Compared
from examples.ran import Ran, Result

OPINIONS: dict[str, Callable[[Ran, Any, Result], Iterator[Compared]]] = {
    opinion.__name__: opinion
    for opinion in (
        of_variants.counts, of_variants.quality, of_variants.structure, of_variants.association, of_variants.burden,
        of_variants.heterogeneity, of_models.linear, of_models.glm, of_models.penalised, of_models.prs, of_models.survival,
        of_models.heads,
        of_predictions.evaluation, of_predictions.calibration, of_predictions.reclassification,
    )
}  # fmt: skip


def of_study(ran: Ran) -> Iterator[Compared]:
    """Every exact analysis of a study, in its order."""
    for plan in ran.study.analyses:
        if plan.mode == "exact":
            yield from OPINIONS[plan.kind](ran, plan, ran.result(plan.name))
