"""How good a model is, by scikit-learn, lifelines, statsmodels and pandas: one function a kind of analysis, named as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from examples.compared import Compared, absolute, relative
from examples.ran import SAME, TIGHT, Matrix, Ran, Result
from sequester.protocols.analyses.evaluation import outcome_value

IN_A_GROUP = 5e-3  # of an AUC or a C-index: one pair of people in one bin weighs more in a group of a hundred


def evaluation(ran: Ran, plan: Any, result: Result) -> Iterator[Compared]:
    """Overall and by group, by scikit-learn, lifelines, statsmodels or numpy."""
    people = ran.people(plan.part)
    w, b = ran.model(plan.of)
    z = people.x @ w + b
    groups = (*ran.study.cohort.subgroup_values, "other")
    judged: list[tuple[str, Result, NDArray[np.bool_]]] = [("", result, np.ones(len(z), dtype=bool))]
    for name, found in result.get("groups", {}).items():
        judged.append((f" of {name}", found, people.strata == groups.index(name)))
    for of, found, rows in judged:
        if "suppressed" in found:
            continue
        if ran.study.phenotype.kind == "binary":
            yield from _discrimination(plan, of, found, z[rows], people.y[rows])
        elif ran.study.phenotype.kind == "time":
            assert people.event is not None
            yield _concordance(plan, of, found, z[rows], people.y[rows], people.event[rows])
        elif not plan.folds and plan.fixed is None:
            counts = getattr(ran.study.analysis(plan.of), "family", "") == "poisson"
            yield from _errors(ran, plan, of, found, np.exp(z[rows]) if counts else z[rows], people.y[rows])


def _discrimination(plan: Any, of: str, found: Result, z: Matrix, y: Matrix) -> Iterator[Compared]:
    import statsmodels.api as sm
    from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

    p = 1 / (1 + np.exp(-z))
    bound = IN_A_GROUP if of else 5e-4
    yield absolute(plan.name, "sklearn", f"AUC{of}", found["auc"]["value"], roc_auc_score(y, z), bound)
    if not of:
        yield absolute(plan.name, "sklearn", "average precision", found["average_precision"],
                       average_precision_score(y, z), 1e-3)  # fmt: skip
    yield absolute(plan.name, "sklearn", f"Brier score{of}", found["brier"], brier_score_loss(y, p), SAME)
    null = sm.Logit(y, np.ones(len(y))).fit(disp=0).llf
    value = float((y * np.log(p) + (1 - y) * np.log1p(-p)).sum())
    theirs = (1 - np.exp(2 * (null - value) / len(y))) / (1 - np.exp(2 * null / len(y)))
    yield absolute(plan.name, "statsmodels", f"Nagelkerke R2{of}", found["nagelkerke_r2"], theirs, SAME)


def _concordance(plan: Any, of: str, found: Result, z: Matrix, years: Matrix, event: Matrix) -> Compared:
    from lifelines.utils import concordance_index

    theirs = concordance_index(years, -z, event)
    return absolute(plan.name, "lifelines", f"C-index{of}", found["c_index"], theirs, IN_A_GROUP if of else 1e-3)


def _errors(ran: Ran, plan: Any, of: str, found: Result, z: Matrix, y: Matrix) -> Iterator[Compared]:
    import statsmodels.api as sm

    predicted, actual = outcome_value(ran.study.phenotype, z), outcome_value(ran.study.phenotype, y)
    r = float(np.corrcoef(predicted, actual)[0, 1])
    r2 = 1 - ((actual - predicted) ** 2).sum() / ((actual - actual.mean()) ** 2).sum()
    line = sm.OLS(actual, sm.add_constant(predicted)).fit()
    error = float(np.abs(actual - predicted).mean())
    yield absolute(plan.name, "numpy", f"correlation{of}", found["correlation"], r, SAME)
    yield absolute(plan.name, "numpy", f"R2{of}", found["r2"], r2, SAME)
    yield absolute(plan.name, "statsmodels", f"calibration slope{of}", found["calibration_slope"], line.params[1], SAME)
    yield relative(plan.name, "numpy", f"mean absolute error{of}", found["mean_absolute_error"], error, SAME)


def calibration(ran: Ran, plan: Any, result: Result) -> Iterator[Compared]:
    """Intercept and slope, by statsmodels."""
    import statsmodels.api as sm

    if "slope" not in result:
        return
    people = ran.people(plan.part)
    w, b = ran.model(plan.of)
    fit = sm.Logit(people.y, sm.add_constant(people.x @ w + b)).fit(**TIGHT)
    ours = [[result[name][key] for name in ("intercept", "slope")] for key in ("value", "se")]
    yield relative(plan.name, "statsmodels", "intercept and slope", ours[0], fit.params, SAME)
    yield relative(plan.name, "statsmodels", "their standard errors", ours[1], fit.bse, SAME)


def reclassification(ran: Ran, plan: Any, result: Result) -> Iterator[Compared]:
    """Net reclassification and net benefit, by pandas."""
    if "suppressed" in result:
        return
    people = ran.people(plan.part)
    thresholds = [float(t) for t in plan.thresholds]
    edges, risk = [-np.inf, *thresholds, np.inf], {}
    for name in (plan.against, plan.of):
        w, b = ran.model(name)
        risk[name] = 1 / (1 + np.exp(-(people.x @ w + b)))
    old, new = (pd.cut(risk[name], edges, right=False, labels=False) for name in (plan.against, plan.of))
    case = people.y > 0.5
    net = np.mean(np.sign(new - old)[case]) - np.mean(np.sign(new - old)[~case])
    yield absolute(plan.name, "pandas", "net reclassification", result["net_reclassification"], net, SAME)
    ours, theirs = [], []
    for row, t in zip(result["net_benefit"], thresholds, strict=True):
        for name, of in (("old", plan.against), ("new", plan.of)):
            flagged = risk[of] >= t
            theirs.append((flagged & case).mean() - (flagged & ~case).mean() * t / (1 - t))
            ours.append(row[name])
    yield absolute(plan.name, "pandas", "net benefit", ours, theirs, SAME)
