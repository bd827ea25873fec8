"""The reporting items of a risk score (PRS-RS, Wand et al., Nature 2021;591:211-219), filled from the signed study.

Every item has an answer or "Not done, because"; `done` says which. Nothing is invented: what the study does not say is
said not to be known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sequester.protocols.analyses.penalised import PenalisedPlan
from sequester.protocols.study import Column, Study


@dataclass(frozen=True, slots=True)
class Item:
    """One reporting item."""

    name: str
    answer: str
    done: bool = True


def items(study: Study, results: Mapping[str, Any]) -> tuple[Item, ...]:
    """The items in the order of the statement."""
    analyses: Mapping[str, Any] = results["analyses"]
    evaluated = [plan.name for plan in study.analyses if plan.kind == "evaluation" and plan.name in analyses]
    found = [analyses[name]["result"] for name in evaluated]
    rule = "; ".join(study.cohort.where) or "every patient of each hospital's table"
    ends = f"{len(study.sites)} hospitals; declared size {study.n0} (from outside the cohorts; the true one is not published)"
    return (
        Item("Cohort", f"{ends}. Included: {rule}."),
        _not_done("Recruitment and dates", "the study names no recruitment period"),
        _ancestry(study),
        Item("Sampling", f"{_percent(study)} of the patients held out by keyed hash, fixed before the study was approved."),
        Item("Outcome", column_words(study.phenotype) + "."),
        Item("Covariates", "; ".join(map(column_words, study.covariates)) + ".") if study.covariates
        else _not_done("Covariates", "the study uses none"),
        Item("Method", "; ".join(f"{plan.name}: {method(study, plan.name)}" for plan in study.analyses) + "."),
        Item("Variants", f"{len(study.variants)}, {study.genome_build}, in the scoring file with their alleles.")
        if study.variants else _not_done("Variants", "the study uses no genotypes of its own"),
        Item("Weights", "in this report and in results.json, as released."),
        Item("Discrimination", "in this report, on " + part_words(study, evaluated[0]) + ".") if evaluated
        else _not_done("Discrimination", "the study evaluates no model"),
        Item("Calibration", "in this report.") if any(r.get("calibration") for r in found)
        else _not_done("Calibration", "the outcome is not yes or no, or too few patients reached the publication floor"),
        Item("Subgroups", f"by {study.cohort.subgroup}, in this report.") if any(r.get("groups") for r in found)
        else _not_done("Subgroups", "the study names no subgroup to report by"),
        _not_done("External validation", "no data set outside the consortium took part"),
        Item("Intended use", f"Research: {study.question}"),
        Item("Limits", "Not for diagnosis. See the section on limits."),
        Item("Availability", f"Study {results['study']}; contact {study.contact}."),
    )  # fmt: skip


def column_words(column: Column) -> str:
    """A column in words: name, unit, kind, public bounds, transform."""
    unit = f" ({column.unit})" if column.unit else ""
    how = f"{column.name}{unit}"
    match column.kind:
        case "quantitative":
            how = f"{column.name}{unit}, clamped to {column.lower} to {column.upper}"
        case "time":
            how = f"time to {column.event or column.name}{unit}"
        case "binary":
            how = f"{column.name}, yes or no"
        case "category":
            how = f"{column.name}, one of {', '.join(column.values)}"
    return how + (f", as its {_TRANSFORM[column.transform]}" if column.transform != "none" else "")


_TRANSFORM = {"sqrt": "square root", "log": "logarithm"}


def method(study: Study, name: str) -> str:
    """One analysis in words, without name and full stop."""
    plan = study.analysis(name)
    noise = "with differential privacy" if plan.mode == "private" else "exact, without noise"
    match plan.kind:
        case "glm":
            how = "clipped full-batch gradients" if plan.solver == "gradient" else "Newton's method"
            how += {"always": " with Firth's penalty", "if_separated": ", with Firth's penalty if it separates"}.get(
                plan.firth, ""
            )
            return f"{_FAMILY.get(plan.family, plan.family)} regression by {how}, {plan.rounds} rounds, {noise}"
        case "training":
            model = f"a network of {plan.hidden} hidden units" if plan.hidden else f"{plan.family} regression"
            how = "closed-form" if plan.gradients == "closed" else f"Opacus ({plan.gradients})"
            sampled = "full batch" if plan.rate == 1 else f"Poisson samples at rate {plan.rate}"
            how = f"{how} gradients clipped a patient, {sampled}"
            how += (
                f", {plan.local_steps} steps at a hospital in each round ({plan.strategy})"
                if plan.local_steps > 1
                else ""
            )
            return f"{model}, recipe {plan.recipe}, by {how}, {_rounds(plan.rounds)}, {noise}"
        case "linear":
            return f"least squares in one round, {noise}"
        case "evaluation":
            return f"evaluation of {plan.of} on {part_words(study, name)}, {noise}"
        case "counts":
            return f"people in an agreed grid of {', '.join(axis.column for axis in plan.axes)}, {noise}"
        case "quality":
            return f"genotype quality over all hospitals together, {noise}"
        case "survival":
            how = {
                "cox_by_site": "Cox regression stratified by hospital (Efron)",
                "cox": "Cox regression with risk sets of all hospitals (Breslow)",
                "hazard": f"logistic regression of the event in {plan.bins} intervals of time",
                "kaplan_meier": "survival curves after Kaplan and Meier",
            }[plan.model]
            return f"{how}, {noise}"
        case "association":
            how = "t test of each variant" if study.phenotype.kind == "quantitative" else (
                "score test of each variant, exact fits of the strongest"
            )  # fmt: skip
            return f"{how}, beside the covariates, {noise}"
        case "burden":
            how = f"burden and variance tests (SKAT), and both combined, of {len(plan.genes)} genes"
            return f"{how}, beside the covariates, {noise}"
        case "penalised":
            return f"{_penalised(plan, study)}, {noise}"
        case "prs":
            how = {"spike_and_slab": "shrunken afterwards by a spike and a slab", "none": "not shrunken"}[
                plan.shrinkage
            ]
            return f"one sum of each feature with the outcome in one round, weights {how}, {noise}"
        case "calibration":
            return f"calibration of {plan.of} on {part_words(study, name)}, {noise}"
        case "reclassification":
            return f"risk categories by {plan.of} against {plan.against} on {part_words(study, name)}, {noise}"
        case "structure":
            return (
                f"{plan.components} principal components by orthogonal iteration over all hospitals together, {noise}"
            )
        case "heads":
            what = "scores" if plan.columns == "scores" else "scores and covariates"
            how = "penalised Newton" if plan.mode == "exact" else "posterior means of noisy sums"
            return (
                f"a head of {plan.of} for each group of {study.cohort.subgroup}: intercept, multiplier and {what}, held near "
                f"the pooled model (prior standard deviation {plan.prior_sd}), by {how}, {noise}"
            )
        case "heterogeneity":
            return f"Cochran's Q of hospitals' own estimates, {noise}"
    return f"{plan.kind}, {noise}"


_FAMILY = {"poisson": "Poisson"}


def _penalised(plan: PenalisedPlan, study: Study) -> str:
    """Which penalty, how strong, and how it was solved."""
    what = "ridge regression" if plan.l1 == 0 else "lasso" if plan.l1 == 1 else f"elastic net (l1 {plan.l1:f})"
    how = {
        "newton": "by Newton's method",
        "gram": "by coordinate descent",
        "conjugate_gradient": "by conjugate gradients",
        "folds": "in one round",
    }[plan.scheme]
    if plan.grid:
        chosen = f"chosen from {len(plan.grid)} declared ones by cross-validation in {study.cohort.folds} folds"
    elif plan.fraction is not None:
        chosen = f"{plan.fraction:f} of the smallest that leaves no variant"
    else:
        chosen = f"{plan.strength:f}"
    return f"{what} {how}, strength {chosen}"


def _rounds(count: int) -> str:
    return "one round" if count == 1 else f"{count} rounds"


def part_words(study: Study, name: str) -> str:
    """On whom an evaluation looked."""
    plan = study.analysis(name)
    if getattr(plan, "folds", False):
        return "patients left out in turn (cross-validation)"
    match getattr(plan, "part", "test"):
        case "test":
            return "held-out patients that did not train the model"
        case "train":
            return "the patients that trained the model"
    return "all patients, those that trained the model among them"


def _percent(study: Study) -> str:
    return f"{float(study.cohort.test_fraction):.0%}"


def _ancestry(study: Study) -> Item:
    if study.cohort.subgroup is not None and "ancestr" in study.cohort.subgroup.lower():
        groups = ", ".join(study.cohort.subgroup_values)
        return Item("Ancestry", f"by {study.cohort.subgroup} ({groups}); numbers of people are not published.")
    return _not_done("Ancestry by stage", "the study declares no ancestry groups, and counts are not published")


def _not_done(name: str, because: str) -> Item:
    return Item(name, f"Not done, because {because}.", done=False)
