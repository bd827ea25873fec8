"""Which analyses a study may ask for: one line each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field

from sequester.protocols.analyses import (
    association,
    burden,
    calibration,
    counts,
    evaluation,
    glm,
    heads,
    heterogeneity,
    linear,
    penalised,
    prs,
    quality,
    reclassification,
    structure,
    survival,
    training,
)
from sequester.protocols.analyses.analysis import Analysis

Plan = Annotated[
    glm.GlmPlan
    | linear.LinearPlan
    | evaluation.EvaluationPlan
    | counts.CountsPlan
    | quality.QualityPlan
    | structure.StructurePlan
    | association.AssociationPlan
    | penalised.PenalisedPlan
    | prs.PrsPlan
    | calibration.CalibrationPlan
    | reclassification.ReclassificationPlan
    | burden.BurdenPlan
    | heterogeneity.HeterogeneityPlan
    | heads.HeadsPlan
    | survival.SurvivalPlan
    | training.TrainingPlan,
    Field(discriminator="kind"),
]

ANALYSES: dict[str, Analysis] = {
    "glm": glm.GLM,
    "linear": linear.LINEAR,
    "evaluation": evaluation.EVALUATION,
    "counts": counts.COUNTS,
    "quality": quality.QUALITY,
    "structure": structure.STRUCTURE,
    "association": association.ASSOCIATION,
    "penalised": penalised.PENALISED,
    "prs": prs.PRS,
    "calibration": calibration.CALIBRATION,
    "reclassification": reclassification.RECLASSIFICATION,
    "burden": burden.BURDEN,
    "heterogeneity": heterogeneity.HETEROGENEITY,
    "heads": heads.HEADS,
    "survival": survival.SURVIVAL,
    "training": training.TRAINING,
}

# What a plan says against its study: one sentence a fault. The first three kinds are checked in `faults.py` itself.
CHECKS: dict[str, Callable[[Any, Any, Mapping[str, Any]], Iterator[str]]] = {
    "counts": counts.faults,
    "quality": quality.faults,
    "structure": structure.faults,
    "association": association.faults,
    "penalised": penalised.faults,
    "prs": prs.faults,
    "calibration": calibration.faults,
    "reclassification": reclassification.faults,
    "burden": burden.faults,
    "heterogeneity": heterogeneity.faults,
    "heads": heads.faults,
    "survival": survival.faults,
    "training": training.faults,
}


# What an approver reads beside the lines every analysis has: what a kind opens that the others do not.
CONSENT: dict[str, Callable[[Any, Any], str]] = {"heterogeneity": heterogeneity.consent, "heads": heads.consent}


def analysis_of(plan: Any) -> Analysis:
    """The pair of functions behind a plan."""
    return ANALYSES[plan.kind]


def leaves_a_model(plan: Any) -> bool:
    """True where a later evaluation can be of this analysis."""
    if plan.kind == "survival":
        return bool(plan.model != "kaplan_meier")
    return plan.kind in ("glm", "linear", "training", "penalised", "prs", "heads")
