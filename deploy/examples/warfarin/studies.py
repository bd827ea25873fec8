"""A dose from genotypes and clinic, private at epsilon 3 and exact: the paper's table 3 from a federated fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from examples.compared import Compared, absolute
from examples.example import EXACT_SUM, PRIVATE_SUM, Studies
from examples.people import People
from examples.ran import Ran
from examples.warfarin import table3
from sequester.protocols.analyses.evaluation import outcome_value

ALL_HOSPITALS = 16
COST = 0.3  # mg a week that privacy at epsilon 3 may cost


def studies(skeleton: Mapping[str, Any], folder: Path, people: int) -> Studies:
    """The private study of the skeleton and exact ones beside it, sized for these hospitals."""
    told = {**skeleton, "variants": [], "n0": round(0.8 * people), "n_max": round(1.2 * people)}
    left_out = {"kind": "evaluation", "name": "left_out", "of": "genetic", "mode": "exact", "part": "all", "folds": True,
                "error_bound": 400}  # fmt: skip
    return {
        "private": {**told, "lineage": "warfarin-private", "aggregation": PRIVATE_SUM},
        "exact": {
            **told,
            "lineage": "warfarin-exact",
            "aggregation": EXACT_SUM,
            "analyses": [*table3.plans(), left_out],
        },
    }


def findings(name: str, ran: Ran) -> Iterator[Compared | str]:
    """Errors in mg a week, and doses within 20 % by group."""
    everybody = ran.people("all")
    cross, by_fold = cross_validated(everybody)
    if name == "private":
        w, b = ran.model("dose")
        error = mean_absolute_error(everybody, w, b)
        yield Compared("dose", "statsmodels", "MAE above pooled least squares, mg/week", error - cross, COST)
        told = ran.result("held_out").get("mean_absolute_error")
        yield f"MAE {error:.2f} mg a week at epsilon {ran.results['epsilon']:.2f}, pooled {cross:.2f}; " + (
            "too few held out for the study's own" if told is None else f"the study's own noisy held-out MAE {told:.2f}"
        )
        return
    found = ran.result("left_out")["mean_absolute_error"]
    # each patient has the same folds in both: rounding of the secure sum alone
    yield absolute("left_out", "statsmodels", "cross-validated MAE, mg/week", found, cross, 1e-6)
    yield absolute("left_out", "statsmodels", "within 20 % when left out", ran.result("left_out")["within_20_percent"],
                   by_fold, 1e-9)  # fmt: skip
    results = {evaluation: ran.result(evaluation) for evaluation in table3.NAMES.values()}
    yield from _bands(ran, everybody, results)
    if len(ran.stores) == ALL_HOSPITALS:
        yield from against_the_paper(results, doses(everybody))
    yield from table3.lines(results)


def doses(people: People) -> np.ndarray:
    """mg a week (people,)."""
    return outcome_value(people.study.phenotype, people.y)


def against_the_paper(results: Mapping[str, Mapping[str, Any]], actual: np.ndarray) -> Iterator[Compared]:
    """Shares within 20 % by group; all sixteen hospitals' patients are needed for it."""
    sizes = [int((actual <= 21).sum()), int(((actual > 21) & (actual < 49)).sum()), int((actual >= 49).sum())]
    for approach in table3.APPROACHES:
        ours = table3.shares(results[table3.NAMES[approach]])
        for g, group in enumerate(table3.GROUPS):
            theirs = table3.PAPER[approach][g][0]
            bound = table3.tolerance(theirs, sizes[g])
            yield absolute(f"{approach}, {group}", "the paper", "per cent within 20 %", ours[g][0], theirs, bound)


def _bands(ran: Ran, people: People, results: Mapping[str, Mapping[str, Any]]) -> Iterator[Compared]:
    actual = doses(people)
    groups = [actual <= 21, (actual > 21) & (actual < 49), actual >= 49]
    for approach, name in table3.NAMES.items():
        fitted = np.full(len(actual), 35.0)
        if name != "fixed_dose":
            w, b = ran.model({"with_genotypes": "genetic", "without": "clinical"}[name])
            fitted = outcome_value(people.study.phenotype, people.x @ w + b)
        hit = np.abs(fitted - actual) <= 0.2 * actual
        theirs = [100 * float(hit[rows].mean()) for rows in groups]
        ours = [share[0] for share in table3.shares(results[name])]
        yield absolute(name, "numpy", f"per cent within 20 % by dose, {approach}", ours, theirs, 0.1)


def mean_absolute_error(people: People, w: np.ndarray, b: float) -> float:
    """Of one model, mg a week."""
    return float(np.abs(outcome_value(people.study.phenotype, people.x @ w + b) - doses(people)).mean())


def cross_validated(people: People) -> tuple[float, float]:
    """MAE, and the share within 20 %, of least squares when each patient is judged by the fit that left their fold out."""
    import statsmodels.api as sm

    design, fitted = sm.add_constant(people.x, has_constant="add"), np.empty(len(people.y))
    for fold in np.unique(people.fold):
        out = people.fold == fold
        fitted[out] = design[out] @ sm.OLS(people.y[~out], design[~out]).fit().params
    actual, predicted = doses(people), outcome_value(people.study.phenotype, fitted)
    return float(np.abs(predicted - actual).mean()), float((np.abs(predicted - actual) <= 0.2 * actual).mean())
