"""Models by statsmodels, lifelines and scipy: one function a kind of analysis, named as the kind is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import minimize, root

from examples.compared import Compared, absolute, relative
from examples.people import People
from examples.ran import SAME, TIGHT, Matrix, Ran, Result


def linear(ran: Ran, plan: Any, result: Result) -> Iterator[Compared]:
    """Least squares, by statsmodels."""
    people = ran.people(plan.part)
    yield from _regression(plan, result, "linear", people.features(plan), people.y)


def glm(ran: Ran, plan: Any, result: Result) -> Iterator[Compared]:
    """Linear, logistic and Poisson regression by statsmodels; Firth by a direct maximum."""
    people = ran.people(plan.part)
    x = people.features(plan)
    if not result.get("firth"):
        yield from _regression(plan, result, plan.family, x, people.y)
        return
    beta = penalised_maximum(np.column_stack([np.ones(len(x)), x]), people.y)
    yield absolute(plan.name, "scipy.optimize", "coefficient by Firth", _coefficients(result), beta, 1e-5)


def _regression(plan: Any, result: Result, family: str, x: Matrix, y: Matrix) -> Iterator[Compared]:
    import statsmodels.api as sm

    design = np.column_stack([np.ones(len(x)), x])
    model = {"linear": sm.OLS, "logistic": sm.Logit, "poisson": sm.Poisson}[family](y, design)
    fit = model.fit() if family == "linear" else model.fit(**TIGHT)
    yield relative(plan.name, "statsmodels", f"{x.shape[1] + 1} coefficients", _coefficients(result), fit.params, SAME)
    rows = result["weights"]
    for key, theirs in (("se", fit.bse), ("statistic", fit.tvalues)):
        yield relative(plan.name, "statsmodels", NAMES[key], [row[key] for row in rows], theirs[1:], SAME)
    ends = [[row["low"], row["high"]] for row in rows]
    yield absolute(plan.name, "statsmodels", "95 % interval", ends, fit.conf_int()[1:], SAME)


def heads(ran: Ran, plan: Any, result: Result) -> Iterator[Compared]:
    """Each group's penalised maximum beside the pooled predictor as offset: the root of its score, by scipy."""
    people, (w, b) = ran.people(plan.part), ran.model(plan.of)
    table = ran.study.table_features()
    own = [j for j, f in enumerate(table) if plan.columns == "table" or f.kind == "score"]
    spread = float(np.sqrt(w @ w))
    design = np.column_stack([np.ones(len(people.y)), people.x[:, own], people.x @ w / spread])
    wider = np.array([5.0, *np.ones(len(own)), 5.0])
    precision = (float(plan.prior_sd) * wider) ** -2
    for g, (group, found) in enumerate(result["groups"].items()):
        if "suppressed" in found:
            continue
        rows = people.strata == g
        delta = _root_of_score(design[rows], people.y[rows], people.x[rows] @ w + b, precision)
        times = 1 + delta[-1] / spread
        theirs = times * w[: len(table)]
        theirs[own] += delta[1:-1]
        ours = [row["standardised"] for row in found["weights"]]
        yield relative(plan.name, "scipy.optimize", f"weights of the head of {group}", ours, theirs, SAME)
        ends = [found["intercept"], found["pooled_times"]]
        yield relative(
            plan.name, "scipy.optimize", f"its intercept and multiplier, {group}", ends, [b + delta[0], times], SAME
        )


def _root_of_score(design: Matrix, y: Matrix, offset: Matrix, precision: Matrix) -> Matrix:
    def mean(delta: Matrix) -> Matrix:
        return np.asarray(1 / (1 + np.exp(-(offset + design @ delta))))

    def score(delta: Matrix) -> Matrix:
        return np.asarray(design.T @ (y - mean(delta)) - precision * delta)

    def slope(delta: Matrix) -> Matrix:
        mu = mean(delta)
        return np.asarray(-design.T @ (design * (mu * (1 - mu))[:, None]) - np.diag(precision))

    return np.asarray(root(score, np.zeros(len(precision)), jac=slope, tol=1e-14).x)


NAMES = {"se": "standard error", "statistic": "test statistic"}


def _coefficients(result: Result) -> list[float]:
    return [result["intercept"], *(row["standardised"] for row in result["weights"])]


def penalised_maximum(design: Matrix, y: Matrix) -> Matrix:
    """Firth's estimate by a general optimiser of the penalised likelihood."""

    def value(beta: Matrix) -> float:
        z = design @ beta
        mu = 1 / (1 + np.exp(-z))
        information = design.T @ (design * (mu * (1 - mu))[:, None])
        return -float((y * z - np.logaddexp(0, z)).sum() + 0.5 * np.linalg.slogdet(information)[1])

    rough = minimize(value, np.zeros(design.shape[1]), method="BFGS", options={"gtol": 1e-9}).x
    fine = {"xatol": 1e-9, "fatol": 1e-14, "maxiter": 20_000}
    found: Matrix = minimize(value, rough, method="Nelder-Mead", options=fine).x
    return found


# ---- scores ----------------------------------------------------------------------------------------------------------


def penalised(ran: Ran, plan: Any, result: Result) -> Iterator[Compared]:
    """The objective at another optimiser's weights; wide ridge by one dual solve."""
    people = ran.people(plan.part)
    w, b = ran.model(plan.name)
    if plan.scheme == "conjugate_gradient":
        theirs = dual_ridge(people, float(result["strength"]))[0]
        gap = float(np.linalg.norm(w - theirs) / np.linalg.norm(theirs))
        yield Compared(plan.name, "numpy", f"{len(w)} weights of the dual solve, relative in norm", gap, 1e-6)
        return
    value = _objective(ran, plan, people, float(result["strength"]))
    beta = other_optimum(ran, plan, people, float(result["strength"]))
    ours, theirs_value = value(np.append(b, w)), value(beta)
    gap = max(ours - theirs_value, 0.0) / theirs_value
    yield Compared(plan.name, "scipy.optimize", "objective above theirs, relative", gap, 1e-6)
    far = 1 - float(np.corrcoef(w, beta[1:])[0, 1])
    yield Compared(plan.name, "scipy.optimize", "1 - correlation of weights", far, 1e-4)


def _objective(ran: Ran, plan: Any, people: People, strength: float) -> Callable[[Matrix], float]:
    x, y = np.column_stack([np.ones(len(people.y)), people.x]), people.y
    first, l1 = 1 + people.table.shape[1], float(plan.l1)

    def value(beta: Matrix) -> float:
        z, v = x @ beta, beta[first:]
        if ran.study.phenotype.kind == "binary":
            loss = np.logaddexp(0, z) - y * z
        else:
            loss = 0.5 * (y - z) ** 2
        return float(loss.mean() + strength * (l1 * np.abs(v).sum() + (1 - l1) / 2 * (v @ v)))

    return value


def other_optimum(ran: Ran, plan: Any, people: People, strength: float) -> Matrix:
    """Intercept and weights by L-BFGS-B over positive and negative parts: smooth, and the same minimum."""
    x, y = np.column_stack([np.ones(len(people.y)), people.x]), people.y
    first, d, l1 = 1 + people.table.shape[1], x.shape[1], float(plan.l1)
    binary = ran.study.phenotype.kind == "binary"

    def value(parts: Matrix) -> tuple[float, Matrix]:
        beta = parts[:d].copy()
        beta[first:] -= parts[d:]
        z, v = x @ beta, beta[first:]
        loss = (np.logaddexp(0, z) - y * z) if binary else 0.5 * (y - z) ** 2
        mean = 1 / (1 + np.exp(-z)) if binary else z
        slope = x.T @ (mean - y) / len(y)
        slope[first:] += strength * (1 - l1) * v
        total = loss.mean() + strength * (l1 * (parts[first:d].sum() + parts[d:].sum()) + (1 - l1) / 2 * (v @ v))
        both = np.concatenate([slope, -slope[first:]])
        both[first:] += strength * l1
        return float(total), both

    bounds = [(None, None)] * first + [(0, None)] * (2 * (d - first))
    done = minimize(value, np.zeros(2 * d - first), jac=True, method="L-BFGS-B", bounds=bounds,
                    options={"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-15, "gtol": 1e-9})  # fmt: skip
    beta: Matrix = done.x[:d].copy()
    beta[first:] -= done.x[d:]
    return beta


def dual_ridge(people: People, strength: float) -> tuple[Matrix, float]:
    """Weights of all features and the intercept by one dense solve over people; table features are not penalised."""
    n, x = len(people.y), people.variants
    free = np.column_stack([np.ones(n), people.table])
    kernel = x @ x.T / (strength * n) + np.eye(n)
    solved = np.linalg.solve(kernel, np.column_stack([free, people.y]))
    a = np.linalg.lstsq(free.T @ solved[:, :-1], free.T @ solved[:, -1], rcond=None)[0]
    w = x.T @ (solved[:, -1] - solved[:, :-1] @ a) / (strength * n)
    return np.concatenate([a[1:], w]), float(a[0])


def prs(ran: Ran, plan: Any, result: Result) -> Iterator[Compared]:
    """The one sum, by numpy."""
    people = ran.people(plan.part)
    score = people.x.T @ (people.y - float(plan.prevalence))
    ours = np.array([row["score"] for row in result["weights"]])
    far = float(np.abs(ours - score).max() / np.abs(score).max())
    yield Compared(plan.name, "numpy", "sum, relative to the largest", far, 1e-10)


# ---- time to an event -----------------------------------------------------------------------------------------------


def survival(ran: Ran, plan: Any, result: Result) -> Iterator[Compared]:
    """Cox models and the hazard by statsmodels and lifelines, curves by lifelines."""
    people = ran.people(plan.part)
    assert people.event is not None
    width = float(ran.study.phenotype.upper or 1) / plan.bins
    x, on_grid = people.features(plan), np.maximum(np.ceil(people.y / width - 1e-9), 1)
    match plan.model:
        case "cox_by_site":
            yield from _cox(plan, result, people.y, x, people.event, people.site, "efron")
            yield from _lifelines(plan, result, people, x)
        case "cox":
            yield from _cox(plan, result, on_grid, x, people.event, None, "breslow")
        case "kaplan_meier":
            yield from _curves(ran, plan, result, people, on_grid, width)
        case "hazard":
            yield from _hazard(plan, result, x, on_grid.astype(int) - 1, people)


def _cox(
    plan: Any, result: Result, years: Matrix, x: Matrix, event: Matrix, strata: Any, ties: str
) -> Iterator[Compared]:
    import statsmodels.api as sm

    fit = sm.PHReg(years, x, status=event, strata=strata, ties=ties).fit(disp=0, method="newton", tol=1e-14)
    rows = result["weights"]
    yield relative(plan.name, "statsmodels", "coefficient", [r["standardised"] for r in rows], fit.params, SAME)
    yield relative(plan.name, "statsmodels", "standard error", [r["se"] for r in rows], fit.bse, SAME)
    yield relative(plan.name, "statsmodels", "log-likelihood", result["log_partial_likelihood"], fit.llf, SAME)


def _lifelines(plan: Any, result: Result, people: People, x: Matrix) -> Iterator[Compared]:
    from lifelines import CoxPHFitter

    frame = pd.DataFrame(x, columns=[f"x{j}" for j in range(x.shape[1])])
    frame = frame.assign(years=people.y, event=people.event, site=people.site)
    fit = CoxPHFitter().fit(
        frame, "years", "event", strata=["site"], fit_options={"precision": 1e-12, "r_precision": 1e-14}
    )
    rows = result["weights"]
    yield relative(plan.name, "lifelines", "coefficient", [r["standardised"] for r in rows], fit.params_, SAME)
    yield relative(plan.name, "lifelines", "standard error", [r["se"] for r in rows], fit.standard_errors_, SAME)


def _curves(ran: Ran, plan: Any, result: Result, people: People, on_grid: Matrix, width: float) -> Iterator[Compared]:
    from lifelines import KaplanMeierFitter

    groups = (*ran.study.cohort.subgroup_values, "other") if plan.by_subgroup else ("all",)
    ours, theirs, ends, their_ends = [], [], [], []
    for name, found in result["curves"].items():
        rows = people.strata == groups.index(name) if plan.by_subgroup else np.ones(len(people.y), dtype=bool)
        if "points" not in found:
            continue
        assert people.event is not None
        life = KaplanMeierFitter().fit(on_grid[rows], people.event[rows], timeline=range(plan.bins + 1))
        for point in found["points"]:
            at = round(point["time"] / width)
            ours.append(point["survival"])
            theirs.append(life.survival_function_.to_numpy()[at, 0])
            if "low" in point:
                ends.append([point["low"], point["high"]])
                their_ends.append(life.confidence_interval_.to_numpy()[at])
    yield absolute(plan.name, "lifelines", f"survival at {len(ours)} times", ours, theirs, SAME)
    yield absolute(plan.name, "lifelines", "95 % interval", ends, their_ends, SAME)


def _hazard(plan: Any, result: Result, x: Matrix, last: NDArray[np.int64], people: People) -> Iterator[Compared]:
    """A pooled logit with one row for each interval a person is at risk in."""
    import statsmodels.api as sm

    assert people.event is not None
    rows, y = [], []
    width = float(people.study.phenotype.upper or 1) / plan.bins
    for i, end in enumerate(last):
        # who is censored inside an interval was not at risk for the whole of it
        whole = people.event[i] > 0.5 or people.y[i] >= (end + 1) * width - 1e-9
        for j in range(end + 1 if whole else end):
            rows.append(np.concatenate([np.eye(plan.bins)[j], x[i]]))
            y.append(float(people.event[i] > 0.5 and j == end))
    fit = sm.Logit(np.array(y), np.array(rows)).fit(**TIGHT)
    ours = result["weights"]
    theirs = fit.params[plan.bins :]
    yield relative(plan.name, "statsmodels", "coefficient", [r["standardised"] for r in ours], theirs, SAME)
    yield relative(plan.name, "statsmodels", "standard error", [r["se"] for r in ours], fit.bse[plan.bins :], SAME)
    base = 1 / (1 + np.exp(-fit.params[: plan.bins]))
    # who is held out is drawn anew each time: an interval in which nobody of the rest had the event has no maximum
    events = np.bincount(last[people.event > 0.5], minlength=plan.bins)[: plan.bins]
    ours_base = np.array(result["baseline_hazard"])[events > 0]
    yield relative(plan.name, "statsmodels", "baseline hazard", ours_base, base[events > 0], SAME)
