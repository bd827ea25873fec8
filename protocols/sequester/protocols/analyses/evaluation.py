"""How good a model is on patients that did not train it: histograms and error sums, opened once.

Binary outcome: one histogram of scores by outcome (and by subgroup, disjoint), edges at public normal quantiles; AUC,
ROC, precision, deciles and calibration are post-processing of it; exact mode adds eight sums. A time: one histogram of
follow-up by score by event, for the C-index. One patient is one cell: sensitivity 1. Quantitative outcome: patients,
absolute and squared error on the outcome's own scale, how many predictions lie within 20 % and how many above, each
bounded by a public error bound. With `folds` each patient is judged by the model that left their fold out; of heads, by
that of their own group.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from sequester.protocols.analyses import auc
from sequester.protocols.analyses.analysis import Broadcast, Finished, Layout, Next, State, Sums
from sequester.protocols.analyses.auc import edges
from sequester.protocols.analyses.cohort import Block, Cohort, Part, Result
from sequester.protocols.analyses.counts import noise_sd as noise_of_a_cell
from sequester.protocols.analyses.cox import bin_of as time_bin
from sequester.protocols.analyses.metrics import (
    SUMS,
    accuracy,
    average_precision,
    binned_sums,
    by_group,
    concordance,
    deciles,
    outcome_sums,
)
from sequester.protocols.analyses.plan import AnalysisPlan, Number
from sequester.protocols.analyses.training import TrainingPlan, bounded, network_score, records
from sequester.protocols.analyses.weights import judged, mean_of, predictor, public_scale, score_sd, sent, sigmoid

if TYPE_CHECKING:
    from sequester.protocols.study import Column, Study

Vector = NDArray[np.float64]

LEAST_COUNTED = 100  # cases and controls, in exact mode: the interval was verified from here on


class EvaluationPlan(AnalysisPlan):
    """`of` names an earlier analysis that leaves a model; `error_bound` is public, in the outcome's unit.

    `times` intervals of follow-up by `bins` of the score give the C-index; `population_prevalence` R2 of liability.
    Of a quantity, `bands` of the actual value between rising edges are judged apart, and `fixed`, in the outcome's unit, is
    one prediction for everybody in place of the model's: what a model has to beat. `cases`: public share of cases among
    them, by default the prevalence that the model's own analysis declares.
    """

    kind: Literal["evaluation"] = "evaluation"
    of: str
    part: Part = "test"
    bins: int = Field(default=20, ge=5, le=1000)
    folds: bool = False
    error_bound: Number = Decimal("100")
    times: int = Field(default=24, ge=5, le=500, exclude_if=lambda times: times == 24)
    bands: tuple[Number, ...] = Field(default=(), max_length=10, exclude_if=lambda edges: not edges)
    fixed: Number | None = Field(default=None, exclude_if=lambda value: value is None)
    population_prevalence: Number | None = Field(default=None, exclude_if=lambda value: value is None)
    cases: Number | None = Field(default=None, exclude_if=lambda value: value is None)


def outcome_value(column: Column, standardised: Vector) -> Vector:
    """The outcome on its own scale from the standardised, transformed one."""
    from sequester.protocols.study import standardisation  # the study knows analyses, not the other way at import

    centre, scale = standardisation(column)
    value = standardised * scale + centre
    match column.transform:
        case "sqrt":
            return np.maximum(value, 0.0) ** 2
        case "log":
            return np.exp(value)
        case "none":
            return value


class Evaluation:
    """See the module."""

    kind = "evaluation"

    def rounds(self, plan: EvaluationPlan, study: Study) -> int:
        return 1

    def layout(self, plan: EvaluationPlan, study: Study, step: int) -> Layout:
        g, exact = len(subgroups(study)), plan.mode == "exact"
        if study.phenotype.kind == "binary":
            fields = (("cells", (g, 2, plan.bins)),)
            return Layout((*fields, ("sums", (g, len(SUMS)))) if exact else fields)
        if study.phenotype.kind == "time":
            return Layout((("cells", (g, plan.times, plan.bins, 2)),))
        errors = (("errors", (g, 10 if exact else 5)),)
        return Layout((*errors, ("bands", (len(plan.bands) + 1, 4))) if plan.bands else errors)

    def sensitivity(self, plan: EvaluationPlan, study: Study) -> float:
        if plan.mode == "exact":
            return 2500.0  # head-room only: the largest entry of a patient's sums, a squared score
        if study.phenotype.kind != "quantitative":
            return 1.0
        return float(np.sqrt(6.0)) if plan.bands else 2.0  # errors of 2 at most, and two cells of a band

    def is_iterative(self, plan: EvaluationPlan, study: Study) -> bool:
        return True

    def start(self, plan: EvaluationPlan, study: Study, earlier: Mapping[str, Finished]) -> Next:
        model = earlier[plan.of].state
        if "hidden.weight" in model:
            broadcast: Broadcast = dict(model)
        elif plan.folds:
            broadcast = {"w": model["fold_w"], "b": model["fold_b"]}
        else:
            found = sent(model)
            broadcast = {"w": np.atleast_2d(found["w"]), "b": found["b"]}
        return Next(dict(broadcast), broadcast)

    def contribution(self, plan: EvaluationPlan, study: Study, cohort: Cohort, broadcast: Broadcast, step: int) -> Sums:
        if study.phenotype.kind == "quantitative":
            return self._errors(plan, study, cohort, broadcast)
        timed = study.phenotype.kind == "time"
        cells = np.zeros(self.layout(plan, study, step).fields[0][1])
        sums = np.zeros((len(cells), len(SUMS)))
        sd, centre = _spread(plan, broadcast)
        inner = edges(plan.bins)[1:-1]  # a weight that is not finite puts patients into a bin, never into a refusal
        for block in cohort.blocks(plan.part):
            score = _score(plan, study, broadcast, block)
            bin_of = np.searchsorted(inner, (score - centre) / sd, side="right")
            if timed:
                assert block.event is not None  # the study was validated
                at = time_bin(block.y, float(study.phenotype.upper or 1), plan.times)
                np.add.at(cells, (block.strata, at, bin_of, (block.event > 0.5).astype(np.int64)), 1.0)
                continue
            np.add.at(cells, (block.strata, (block.y > 0.5).astype(np.int64), bin_of), 1.0)
            for g in np.unique(block.strata) if plan.mode == "exact" else ():
                rows = block.strata == g
                sums[g] += outcome_sums(block.y[rows], score[rows], sigmoid(score[rows]))
        return {"cells": cells, "sums": sums} if plan.mode == "exact" and not timed else {"cells": cells}

    def _errors(self, plan: EvaluationPlan, study: Study, cohort: Cohort, broadcast: Broadcast) -> Sums:
        bound = float(plan.error_bound)
        sums = {name: np.zeros(shape) for name, shape in self.layout(plan, study, 0).fields}
        errors, edges_of_bands = sums["errors"], np.array([float(edge) for edge in plan.bands])
        for block in cohort.blocks(plan.part):
            fitted = _score(plan, study, broadcast, block)
            if getattr(study.analysis(plan.of), "family", "") == "poisson":
                fitted = mean_of("poisson", fitted)  # what is predicted is a count, not its logarithm
            predicted, actual = outcome_value(study.phenotype, fitted), outcome_value(study.phenotype, block.y)
            if plan.fixed is not None:
                predicted = np.full(len(actual), float(plan.fixed))
            e = np.minimum(np.abs(predicted - actual), bound) / bound
            within = (np.abs(predicted - actual) <= 0.2 * actual).astype(np.float64)
            # never within as well, whatever the last bits say: the bound of 2 holds
            over = ((predicted > actual) & (within == 0)).astype(np.float64)
            rows = [np.ones(len(e)), e, e * e, within, over]
            if plan.mode == "exact":
                a, p = actual / bound, np.clip(predicted / bound, -10.0, 10.0)
                rows += [a, a * a, p, p * p, a * p]
            group = block.strata if len(errors) > 1 else np.zeros(len(e), dtype=np.int64)
            np.add.at(errors, group, np.column_stack(rows))
            if plan.bands:
                under = (predicted < actual) & (within == 0)
                cells = np.column_stack([np.ones(len(e)), within, under, (within == 0) & ~under])
                np.add.at(sums["bands"], np.searchsorted(edges_of_bands, actual, side="right"), cells)
        return sums

    def combine(self, plan: EvaluationPlan, study: Study, state: State, sums: Sums, step: int) -> Next | Finished:
        noise_sd, floor, names = noise_of_a_cell(plan, study), study.publication_floor, subgroups(study)
        of = sums["errors"] if study.phenotype.kind == "quantitative" else sums["cells"]
        place = {name: g for g, name in enumerate(names)}

        def measure(cells: Vector, exact: Vector | None, groups: int, name: str | None = None) -> Result:
            match study.phenotype.kind:
                case "binary":
                    return self._binary(plan, study, state, cells, exact, noise_sd * float(np.sqrt(groups)), name)
                case "time":
                    return self._timed(cells, noise_sd * np.sqrt(groups), floor)
                case _:
                    return self._quantitative(plan, study, cells)

        exact = sums.get("sums")
        result = measure(of.sum(axis=0), None if exact is None else exact.sum(axis=0), len(of))
        if plan.bands:
            result["bands"] = _bands(plan, sums["bands"], floor + 2 * noise_sd)
        if study.phenotype.kind == "binary":
            result["calibration"] = _calibration(of.sum(axis=0), *_spread(plan, state), floor)
        if len(of) > 1:
            size = {
                n: float(of[g, 0] if study.phenotype.kind == "quantitative" else of[g].sum()) for n, g in place.items()
            }
            result["groups"] = by_group(
                size, lambda n: measure(of[place[n]], None if exact is None else exact[place[n]], 1, n)
            )
        return Finished(result, {})

    def _binary(
        self, plan: EvaluationPlan, study: Study, state: State, cells: Vector, exact: Vector | None, noise_sd: float,
        group: str | None,
    ) -> Result:  # fmt: skip
        if plan.mode == "private":
            silent = verified(plan, study, group).why or None
        else:  # counts are opened as they are, and what they are says nothing of the AUC
            silent = (
                None if cells.sum(axis=1).min() >= LEAST_COUNTED else f"fewer than {LEAST_COUNTED} cases or controls"
            )
        found = discrimination(cells, noise_sd, study.publication_floor, silent)
        if "suppressed" in found:
            return found
        sd, centre = _spread(plan, state)
        if exact is None:
            z = bin_centres(cells.shape[1]) * sd + centre
            exact = binned_sums(cells, z, sigmoid(z))
        population = None if plan.population_prevalence is None else float(plan.population_prevalence)
        found["average_precision"] = average_precision(cells)
        return found | accuracy(exact, population) | deciles(cells, study.publication_floor)

    def _timed(self, cells: Vector, noise_sd: float, floor: int) -> Result:
        events, noise = float(cells[:, :, 1].sum()), noise_sd * np.sqrt(cells[:, :, 1].size)
        if events < floor + 2 * noise or float(cells.sum()) - events < 0:
            return {"suppressed": f"<{floor}"}
        index, _ = concordance(cells)
        return {"c_index": float(np.clip(index, 0.0, 1.0))}

    def _quantitative(self, plan: EvaluationPlan, study: Study, errors: Vector) -> Result:
        n, e, squared, within, over = (float(v) for v in errors[:5])
        bound = float(plan.error_bound)
        if n < study.publication_floor:
            return {"suppressed": f"<{study.publication_floor}"}
        result: Result = {
            "mean_absolute_error": e * bound / n,
            "root_mean_squared_error": float(np.sqrt(max(squared, 0.0) / n)) * bound,
            "within_20_percent": within / n,
            "over_by_20_percent": over / n,
            "under_by_20_percent": 1 - (within + over) / n,
            "unit": study.phenotype.unit,
        }
        if plan.mode == "exact":
            result["n"] = int(round(n))
            a, aa, p, pp, ap = (float(v) for v in errors[5:])
            total, spread = aa - a * a / n, pp - p * p / n
            if total > 0 and spread > 0:
                slope = (ap - a * p / n) / spread
                result["r2"] = 1 - (aa - 2 * ap + pp) / total
                result["correlation"] = (ap - a * p / n) / float(np.sqrt(total * spread))
                result["calibration_slope"], result["calibration_intercept"] = slope, (a - slope * p) / n * bound
        return result


def _bands(plan: EvaluationPlan, cells: Vector, least: float) -> list[Result]:
    """Shares within 20 %, more than 20 % under, and over, by band of the actual value; one hidden band takes another."""
    edges_of_bands = [f"{edge.normalize():f}" for edge in plan.bands]
    names = [f"<{edges_of_bands[0]}", *(f"{a} to <{b}" for a, b in pairwise(edges_of_bands)), f">={edges_of_bands[-1]}"]

    def measure(name: str) -> Result:
        n, within, under, over = (float(v) for v in cells[names.index(name)])
        if n < least:
            return {"suppressed": "too few"}
        return {"within_20_percent": within / n, "under": under / n, "over": over / n}

    found = by_group({name: float(row[0]) for name, row in zip(names, cells, strict=True)}, measure)
    return [{"band": name, **row} for name, row in found.items()]


def _score(plan: EvaluationPlan, study: Study, model: Broadcast, block: Block) -> Vector:
    """The model's linear predictor, or a network's output, for each patient of a block; always finite."""
    if "hidden.weight" in model:
        trained = study.analysis(plan.of)
        assert isinstance(trained, TrainingPlan)
        return network_score(bounded(model), records(trained, study, block.x))
    w, b = np.asarray(model["w"], dtype=np.float64), np.asarray(model["b"], dtype=np.float64)
    if plan.folds:
        return predictor(block.x, w[block.fold], b[block.fold])
    return judged(block, w if len(w) > 1 else w[0], b)


def _spread(plan: EvaluationPlan, model: Broadcast) -> tuple[float, float]:
    """(scale, centre) of the histogram's edges, from the weights alone: public."""
    if "hidden.weight" in model:
        safe = bounded(model)
        return score_sd(safe["head.weight"][0]), float(safe["head.bias"][0])
    w, b = np.asarray(model["w"], dtype=np.float64), np.asarray(model["b"], dtype=np.float64)
    heads = len(w) > 1 and not plan.folds
    return public_scale(w if heads else w[0], b)


def subgroups(study: Study) -> tuple[str, ...]:
    """Names of the disjoint groups a histogram is split by; one, "all", where the study names none."""
    return (*study.cohort.subgroup_values, "other") if study.cohort.subgroup is not None else ("all",)


def bin_centres(bins: int) -> Vector:
    """Where a patient of each bin stands, in public standard deviations."""
    from scipy.special import ndtri

    return np.asarray(ndtri((np.arange(bins) + 0.5) / bins), dtype=np.float64)


def discrimination(cells: Vector, noise_sd: float, floor: int, silent: str | None = None) -> Result:
    """AUC, its 95 % interval and ROC points of (2, bins) controls and cases, noisy; below the floor only that.

    `silent` says why no interval is printed; None prints it. Nothing that was opened decides: see `auc.py`.
    """
    if not auc.is_shown(cells, noise_sd, floor):
        return {"suppressed": f"<{floor}"}
    controls, cases = cells[0], cells[1]
    value, low, high = (float(v) for v in auc.interval(cells, noise_sd))
    found: Result = {"value": value}
    found |= {"low": low, "high": high} if silent is None else {"no_interval": silent}
    roc = [
        [
            float(np.clip(controls[i:].sum() / controls.sum(), 0, 1)),
            float(np.clip(cases[i:].sum() / cases.sum(), 0, 1)),
        ]
        for i in range(len(cases), -1, -1)
    ]
    return {"auc": found, "roc": roc}


def verified(plan: EvaluationPlan, study: Study, group: str | None = None) -> auc.Coverage:
    """What the interval of the AUC of everybody, or of a group, does over simulated studies of the declared sizes."""
    noise_sd = noise_of_a_cell(plan, study) * (1.0 if group else float(np.sqrt(len(subgroups(study)))))
    sizes = declared(plan, study, group)
    if sizes is None:
        return auc.Coverage(
            0.0,
            0.0,
            0.0,
            "the study declares no share of cases" if group is None else "the study declares no `subgroup_shares`",
        )
    return auc.coverage(*sizes, plan.bins, noise_sd, study.publication_floor)


def declared(plan: EvaluationPlan, study: Study, group: str | None) -> tuple[tuple[float, float], float] | None:
    """Public sizes of an evaluation: people, from and to, and their share of cases; None where the study does not say.

    n0 is a public divisor of those that train, or of everybody: the two ends allow for both. The share of cases is the
    evaluation's own or that of the model it judges. A group has its declared share of the people, and as many cases.
    """
    of = study.analysis(plan.of)
    of = study.analysis(of.of) if of.kind == "heads" else of
    cases = plan.cases if plan.cases is not None else getattr(of, "prevalence", None)
    shares = group_shares(study)
    if cases is None or not 0 < cases < 1 or (group is not None and not shares.get(group)):
        return None
    held = float(study.cohort.test_fraction)
    part = {"test": held, "train": 1 - held, "all": 1.0}[plan.part]
    people = study.n0 * part * (1.0 if group is None else shares[group])
    return (people, people / (1 - held)), float(cases)


def group_shares(study: Study) -> dict[str, float]:
    """Public share of the patients in each group of `subgroups`; empty where the study declares none."""
    given = [float(share) for share in study.cohort.subgroup_shares]
    return dict(zip(subgroups(study), [*given, max(1 - sum(given), 0.0)], strict=True)) if given else {}


def _calibration(cells: Vector, sd: float, intercept: float, floor: int) -> list[list[float]]:
    """[mean predicted, observed] of quarters of the bins whose noisy count reaches the floor."""
    predicted = sigmoid(bin_centres(cells.shape[1]) * sd + intercept)
    rows = []
    for group in np.array_split(np.arange(cells.shape[1]), 10):
        total, cases = float(cells[:, group].sum()), float(cells[1, group].sum())
        if total >= 10 * floor:
            weight = np.maximum(cells[:, group].sum(axis=0), 0)
            mean = float((weight * predicted[group]).sum() / max(float(weight.sum()), 1e-9))
            rows.append([mean, float(np.clip(cases / total, 0, 1))])
    return rows


EVALUATION = Evaluation()
