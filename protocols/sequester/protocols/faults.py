"""What a study says against itself, though each of its fields is valid: one sentence a fault, found before it is signed.

Both sides run these checks: the coordinator when the study is written, every hospital again when it arrives.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from itertools import pairwise
from typing import TYPE_CHECKING

from sequester.protocols.analyses.cohort import chosen
from sequester.protocols.analyses.evaluation import EvaluationPlan
from sequester.protocols.analyses.glm import MAX_NEWTON_COLUMNS, GlmPlan
from sequester.protocols.analyses.linear import LinearPlan
from sequester.protocols.analyses.registry import CHECKS, Plan, leaves_a_model

if TYPE_CHECKING:
    from sequester.protocols.study import Column, Study

CONDITION = re.compile(r"([A-Za-z][A-Za-z0-9_.-]{0,63})\s*(==|!=|>=|<=|>|<)\s*(\S.*)\Z")
INSTANT = "%Y-%m-%dT%H:%M:%SZ"
MAX_PRIVATE_LINEAR_FEATURES = 20
MAX_EXACT_COLUMNS = 1000  # of a model without penalty: 4 MB a round at each hospital
_COMPLEMENT = {"A": "T", "T": "A", "C": "G", "G": "C"}


def faults(study: Study) -> Iterator[str]:
    """Every fault, the first one being enough to refuse."""
    yield from _words(study)
    yield from _roster(study)
    yield from _columns(study)
    yield from _variants(study)
    yield from _cohort(study)
    yield from _promise(study)
    yield from _analyses(study)


def is_plain(text: str, *, lines: bool = False) -> bool:
    """True where a person sees what is written: no control, escape, or direction-changing characters.

    An approval is read in a terminal; an escape sequence or a line break in a study's field could draw a line of it.
    """
    if lines:
        text = text.replace("\n", " ")
    return all(c in "\u200c\u200d" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in text)


def _words(study: Study) -> Iterator[str]:
    if not study.title:
        yield "a study has a title in at least one language"
    if set(study.summary) - set(study.title):
        yield "the summary has a language that the title has not"
    single = [("question", study.question), ("contact", study.contact), ("consortium", study.consortium)]
    single += [("lineage", study.lineage), *((f"title.{k}", v) for k, v in study.title.items())]
    single += [("a reference", r.reference) for r in (*study.ethics, *study.agreement)]
    single += [("licence", study.licence)] if study.licence is not None else []
    single += [("a condition", c) for c in study.cohort.where]
    for column in (study.phenotype, *study.covariates):
        single += [(f"column {column.name}", v) for v in (column.unit, *column.values)]
    for where, text in single:
        if not is_plain(text):
            yield f"{where} holds a control character: plain text in one line was expected"
    for where, text in single[:4]:
        if not text.strip():
            yield f"{where} is empty"
    if not all(is_plain(text, lines=True) for text in study.summary.values()):
        yield "the summary holds a control character: plain text was expected"
    for code in study.purpose:
        if not re.fullmatch(r"DUO:\d{7}", code):
            yield f"purpose `{code}` is not a DUO code (DUO:0000007)"
    for name, instant in [
        ("expires", study.expires),
        *((r.reference, r.expires) for r in study.ethics + study.agreement),
    ]:
        try:
            datetime.strptime(instant, INSTANT)
        except ValueError:
            yield f"{name}: `{instant}` is no moment of the calendar; UTC as 2027-06-30T00:00:00Z was expected"


def _roster(study: Study) -> Iterator[str]:
    names = [site.id for site in study.sites]
    if len(names) < 3:
        yield f"{len(names)} sites: a secure sum needs at least 3"
    if len(set(names)) < len(names) or len({site.key for site in study.sites}) < len(names):
        yield "a site or a key is named twice"


def _columns(study: Study) -> Iterator[str]:
    columns = [study.phenotype, *study.covariates]
    if len({c.name for c in columns}) < len(columns):
        yield "a column is named twice"
    if study.phenotype.kind == "category":
        yield "a phenotype is binary or quantitative, or a time"
    if any(c.kind == "time" for c in study.covariates):
        yield "a covariate is no time: kind time is the phenotype's"
    for column in columns:
        yield from _column(column)
    names = [*(s.name for s in study.scores), *(c.name for c in study.covariates), *(v.id for v in study.variants)]
    if len(set(names)) < len(names):
        yield "two features have the same name"


def _column(column: Column) -> Iterator[str]:
    if (column.kind == "time") != (column.event is not None):
        yield f"column {column.name}: a time names the column of its `event`, and only a time does"
    if column.kind == "time" and (
        column.transform != "none" or column.lower != 0 or not column.upper or column.upper <= 0
    ):
        yield f"column {column.name} is a time: lower 0, an upper bound above it and no transform were expected"
    if column.kind == "quantitative":
        if column.lower is None or column.upper is None or column.lower >= column.upper:
            yield f"column {column.name} is quantitative and declares no bounds lower < upper"
        elif column.transform == "log" and column.lower <= 0:
            yield f"column {column.name}: a logarithm needs a lower bound above 0, found {column.lower}"
        elif column.transform == "sqrt" and column.lower < 0:
            yield f"column {column.name}: a square root needs a lower bound of at least 0, found {column.lower}"
    if column.scale is not None and column.scale <= 0:
        yield f"column {column.name}: scale {column.scale} is not above 0"
    if len(set(column.values)) < len(column.values):
        yield f"column {column.name} names a value twice"
    if column.kind == "binary" and len(column.values) not in (0, 2):
        yield f"column {column.name} is binary: `values` are the two codings, other then one"
    if column.kind == "category" and len(column.values) < 2:
        yield f"column {column.name} is a category with fewer than two values"


def _variants(study: Study) -> Iterator[str]:
    for v in study.variants:
        if not 0 < v.frequency < 1:
            yield f"variant {v.id}: public frequency {v.frequency} is not between 0 and 1"
        # A/T and C/G read the same on both strands: without a frequency test at each site the effect allele is a guess.
        if v.effect == v.other or _COMPLEMENT.get(v.effect) == v.other:
            yield f"variant {v.id}: {v.effect}/{v.other} is palindromic or one allele; such variants are not used"
    for score in study.scores:
        if score.sd <= 0:
            yield f"score {score.name}: sd {score.sd} is not above 0"


def _cohort(study: Study) -> Iterator[str]:
    for condition in study.cohort.where:
        found = CONDITION.match(condition)
        if found is None:
            yield f"cohort condition `{condition}` is not `column operator value`"
        elif found[2] not in ("==", "!=") and not re.fullmatch(r"[+-]?\d+(\.\d+)?", found[3]):
            yield f"cohort condition `{condition}` compares sizes: a number was expected after `{found[2]}`"
    if not 0 <= study.cohort.test_fraction < 1:
        yield f"test_fraction {study.cohort.test_fraction} is not in 0..1"
    if (study.cohort.subgroup is None) != (not study.cohort.subgroup_values):
        yield "subgroup and subgroup_values come together: the column, and the closed list of its values"
    if len(set(study.cohort.subgroup_values)) < len(study.cohort.subgroup_values):
        yield "a subgroup value is named twice"
    shares = study.cohort.subgroup_shares
    if shares and (len(shares) != len(study.cohort.subgroup_values) or min(shares) <= 0 or sum(shares) > 1):
        yield "subgroup_shares are one public fraction for each of subgroup_values, above 0 and at most 1 together"


def _promise(study: Study) -> Iterator[str]:
    asked = study.privacy
    if asked.epsilon <= 0 or not 0 < asked.delta < 1 or asked.order <= 1:
        yield f"privacy: epsilon {asked.epsilon} > 0, 0 < delta {asked.delta} < 1 and order {asked.order} > 1 were expected"
    elif asked.delta * study.n_max >= 1:
        yield f"privacy: delta {asked.delta} is not below 1/n_max; with n_max {study.n_max} one patient could be published"
    if study.n_max < study.n0:
        yield f"n_max {study.n_max} is below n0 {study.n0}"
    exact = [plan.name for plan in study.analyses if plan.mode == "exact"]
    sum_ = study.aggregation
    if exact and (sum_.mode != "strict" or sum_.max_absent or sum_.min_active not in (None, len(study.sites))):
        yield f"analysis {exact[0]} is exact: aggregation.mode strict, no absence and the full roster were expected"
    shares = sum((plan.budget for plan in study.analyses if plan.budget is not None), Decimal(0))
    if shares > 1:
        yield f"the analyses' budget shares add up to {shares}: at most 1 was expected"


def _analyses(study: Study) -> Iterator[str]:
    if not study.analyses or not study.features():
        yield "a study needs at least one analysis and one feature"
    earlier: dict[str, Plan] = {}
    for plan in study.analyses:
        if plan.name in earlier:
            yield f"analysis {plan.name} is named twice"
        if plan.mode == "exact" and (plan.budget is not None or plan.noise_multiplier is not None):
            yield f"analysis {plan.name} is exact: it has no budget and no noise"
        if plan.budget is not None and plan.budget <= 0:
            yield f"analysis {plan.name}: budget {plan.budget} is not above 0"
        if plan.noise_multiplier is not None and plan.noise_multiplier <= 0:
            yield f"analysis {plan.name}: noise multiplier {plan.noise_multiplier} is not above 0"
        match plan:
            case GlmPlan():
                yield from _glm(study, plan)
            case LinearPlan():
                yield from _linear(study, plan)
            case EvaluationPlan():
                yield from _evaluation(study, plan, earlier)
            case _:
                yield from CHECKS[plan.kind](study, plan, earlier)
        earlier[plan.name] = plan


def _glm(study: Study, plan: GlmPlan) -> Iterator[str]:
    from sequester.protocols.study import standardisation  # the study knows its faults, not the other way at import

    numbers = {"clip": plan.clip, "record_norm": plan.record_norm, "kappa": plan.kappa, "step_scale": plan.step_scale}
    if plan.step is not None:
        numbers["step"] = plan.step
    for name, value in numbers.items():
        if value <= 0:
            yield f"analysis {plan.name}: {name} {value} is not above 0"
    counts = plan.family == "poisson"
    if not 0 < plan.average_last <= 1 or plan.prevalence <= 0 or (plan.prevalence >= 1 and not counts):
        yield f"analysis {plan.name}: prevalence and average_last are fractions (prevalence of counts: their mean)"
    if study.phenotype.kind != ("binary" if plan.family == "logistic" else "quantitative"):
        yield f"analysis {plan.name}: {plan.family} regression of a {study.phenotype.kind} phenotype"
    elif counts and (study.phenotype.lower != 0 or standardisation(study.phenotype) != (0.0, 1.0)):
        yield f"analysis {plan.name}: counts are modelled as they are: lower 0, centre 0, scale 1 were expected"
    if plan.mode == "exact" and plan.solver != "newton":
        yield f"analysis {plan.name}: an exact model is fitted by solver newton, its gradient steps are for private mode"
    p = len(chosen(study, plan.features, plan.leave_out))
    yield from _left_out(study, plan)
    if plan.mode == "private" and plan.solver == "newton" and p >= MAX_NEWTON_COLUMNS:
        yield (
            f"analysis {plan.name}: private newton pays noise for every pair of columns; fewer than "
            f"{MAX_NEWTON_COLUMNS} features were expected, found {p}"
        )


def _linear(study: Study, plan: LinearPlan) -> Iterator[str]:
    if study.phenotype.kind != "quantitative":
        yield f"analysis {plan.name}: least squares of a {study.phenotype.kind} phenotype; use glm, family logistic"
    if plan.record_norm <= 0:
        yield f"analysis {plan.name}: record_norm {plan.record_norm} is not above 0"
    p = len(chosen(study, plan.features, plan.leave_out))
    yield from _left_out(study, plan)
    if plan.mode == "private" and p > MAX_PRIVATE_LINEAR_FEATURES:
        yield (
            f"analysis {plan.name}: private least squares takes at most {MAX_PRIVATE_LINEAR_FEATURES} features, "
            f"found {p}; use glm, family linear"
        )


def _left_out(study: Study, plan: GlmPlan | LinearPlan) -> Iterator[str]:
    p = len(chosen(study, plan.features, plan.leave_out))
    if not p:
        yield f"analysis {plan.name}: no feature is left: a score or a covariate was expected"
    if plan.mode == "exact" and p > MAX_EXACT_COLUMNS:
        yield (
            f"analysis {plan.name}: every pair of {p} columns would be summed in each round; at most {MAX_EXACT_COLUMNS} "
            "were expected: `features: table`, or kind penalised"
        )
    unknown = set(plan.leave_out) - {*(s.name for s in study.scores), *(c.name for c in study.covariates)}
    for name in sorted(unknown):
        yield f"analysis {plan.name} leaves out `{name}`, which is no score or covariate"


def _evaluation(study: Study, plan: EvaluationPlan, earlier: dict[str, Plan]) -> Iterator[str]:
    if plan.error_bound <= 0:
        yield f"analysis {plan.name}: error_bound {plan.error_bound} is not above 0"
    if plan.population_prevalence is not None and not 0 < plan.population_prevalence < 1:
        yield f"analysis {plan.name}: population_prevalence {plan.population_prevalence} is not between 0 and 1"
    if plan.cases is not None and not 0 < plan.cases < 1:
        yield f"analysis {plan.name}: cases {plan.cases} is a share between 0 and 1"
    if plan.bands and (study.phenotype.kind != "quantitative" or any(b <= a for a, b in pairwise(plan.bands))):
        yield f"analysis {plan.name}: bands are rising edges of a quantitative phenotype"
    if plan.fixed is not None and study.phenotype.kind != "quantitative":
        yield f"analysis {plan.name}: a fixed prediction is of a quantitative phenotype"
    of = earlier.get(plan.of)
    if of is None:
        yield f"analysis {plan.name} is of `{plan.of}`, which does not come before it"
    elif isinstance(of, EvaluationPlan):
        yield f"analysis {plan.name} is of `{plan.of}`, which is itself an evaluation"
    elif not leaves_a_model(of):
        yield f"analysis {plan.name} is of `{plan.of}`, which leaves no model"
    elif plan.folds and not (isinstance(of, LinearPlan) and of.mode == "exact"):
        yield f"analysis {plan.name}: only an exact linear analysis leaves one model a fold; set folds to false"
