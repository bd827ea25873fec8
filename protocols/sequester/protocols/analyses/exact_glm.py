"""The exact half of `glm.py`: maximum likelihood by Newton, and Firth's penalty where the data separate.

Summed each round: X'WX, X'(y - mu), the log-likelihood, and people, sum of y, sum of y^2. Firth adds half the log
determinant of the information to the log-likelihood; its score gains sum x h (1/2 - mu) with leverages h of the *global*
information, which the exchange broadcasts: two rounds an iteration (Heinze and Schemper 2002; spec/genomics.md, section 7).
A round of the second kind fills `score` alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sequester.protocols.analyses.analysis import Broadcast, Finished, Layout, Next, State, Sums
from sequester.protocols.analyses.cohort import Cohort, Result, chosen, designs
from sequester.protocols.analyses.newton import (
    Estimates,
    advance,
    beginning,
    estimable,
    inverse,
    resolution,
    separated,
    symmetric,
)
from sequester.protocols.analyses.weights import mean_of, model, predictor

if TYPE_CHECKING:
    from sequester.protocols.analyses.glm import GlmPlan
    from sequester.protocols.study import Study

Vector = NDArray[np.float64]
STEP_CAP = 5.0
TOLERANCE = 1e-10
FIRTH_TOLERANCE = 1e-8  # its steps use the information alone and converge linearly
LN_2PI = float(np.log(2 * np.pi))


def layout(plan: GlmPlan, study: Study) -> Layout:
    d = len(chosen(study, plan.features)) + 1
    return Layout((("information", (d * (d + 1) // 2,)), ("score", (d,)), ("log_likelihood", (1,)), ("people", (3,))))


def reach(plan: GlmPlan, study: Study) -> float:
    """The largest entry one patient adds, for head-room only: nothing is clipped."""
    outcome = max(1.0, float(study.phenotype.upper or 1)) if plan.family == "poisson" else 1.0
    return 64.0 * max(1, len(chosen(study, plan.features))) * outcome**2


def start(plan: GlmPlan, study: Study) -> Next:
    beta = np.zeros(len(chosen(study, plan.features)) + 1)
    if plan.family == "poisson":
        beta[0] = np.log(float(plan.prevalence))  # a start far from the mean would overshoot
    state = beginning(beta)
    state |= {"firth": np.array([int(plan.firth == "always")]), "people": np.zeros(3), "score": np.zeros(0)}
    return Next(state, _broadcast(state))


def _broadcast(state: State) -> Broadcast:
    sent: Broadcast = {"w": state["beta"][1:], "b": state["beta"][:1]}
    if len(state["score"]):  # the second round of a Firth iteration
        sent["inverse"] = inverse(state["information"], np.asarray(state["kept"], dtype=bool))
    return sent


def contribution(plan: GlmPlan, study: Study, cohort: Cohort, broadcast: Broadcast) -> Sums:
    w, b = np.asarray(broadcast["w"], dtype=np.float64), float(broadcast["b"][0])
    from scipy.special import gammaln

    d = len(w) + 1
    information, score, log_likelihood, people = np.zeros((d, d)), np.zeros(d), 0.0, np.zeros(3)
    for block in designs(study, cohort, plan.part, plan.features):
        x, y = np.column_stack([np.ones(len(block.y)), block.x]), block.y  # (rows, 1 + features)
        z = predictor(block.x, w, b)
        mu = mean_of(plan.family, z)
        weight = mu * (1 - mu) if plan.family == "logistic" else mu if plan.family == "poisson" else np.ones_like(mu)
        if "inverse" in broadcast:
            leverage = weight * np.einsum("ij,jk,ik->i", x, np.asarray(broadcast["inverse"]), x)
            score += x.T @ (leverage * (0.5 - mu))
            continue
        information += x.T @ (x * weight[:, None])
        score += x.T @ (y - mu)
        people += [len(y), y.sum(), y @ y]
        match plan.family:
            case "logistic":
                log_likelihood += float((y * z - np.logaddexp(0.0, z)).sum())
            case "poisson":
                log_likelihood += float((y * z - mu - gammaln(np.maximum(y, 0.0) + 1)).sum())
            case "linear":
                log_likelihood -= 0.5 * float(((y - mu) ** 2).sum())
    return {
        "information": information[np.triu_indices(d)], "score": score,
        "log_likelihood": np.array([log_likelihood]), "people": people,
    }  # fmt: skip


def combine(plan: GlmPlan, study: Study, state: State, sums: Sums, step: int) -> Next | Finished:
    last = step + 1 >= plan.rounds
    penalised = bool(state["firth"][0])
    if len(state["score"]):
        move = {**state, "score": np.zeros(0)}
        new = advance(
            move,
            state["information"],
            state["score"] + sums["score"],
            float(state["value"][0]),
            FIRTH_TOLERANCE,
            STEP_CAP,
        )
        return _result(plan, study, new) if last or new["converged"][0] else Next(new, _broadcast(new))
    information = symmetric(sums["information"], len(state["beta"]))
    value = float(sums["log_likelihood"][0])
    if step == 0:
        kept, why = estimable(information)
        state = {
            **state, "people": sums["people"], "first": information, "kept": kept.astype(np.uint8),
            "why": np.array([REASONS.index(reason) for reason in why]),
        }  # fmt: skip
        if plan.family == "logistic" and _one_outcome(state):
            return model(study, np.zeros(len(why) - 1), np.zeros(1), converged=False, not_fitted="one outcome only")
    kept = np.asarray(state["kept"], dtype=bool)
    if penalised:
        value += 0.5 * float(np.linalg.slogdet(information[np.ix_(kept, kept)])[1])
        best = float(state["best"][0])
        if value >= best - 1e-9 * (1 + abs(best)) or float(state["halved"][0]) >= 20:
            new = {**state, "information": information, "score": sums["score"], "value": np.array([value])}
            new["best"] = new["value"]
            return _result(plan, study, new) if last else Next(new, _broadcast(new))
    sites, bits = len(study.sites), study.aggregation.fraction_bits
    tolerance = max(TOLERANCE, resolution(information, kept, sites, bits))
    cap = np.inf if plan.family == "linear" else STEP_CAP
    new = advance(state, information, sums["score"], value, tolerance, cap)
    if plan.family == "logistic" and not penalised and float(new["halved"][0]) == 0:
        gone = separated(new, value, float(new["people"][0]))
        if gone.any() and plan.firth == "if_separated" and not last:
            fresh = start(plan, study).state
            again = {**fresh, **{name: new[name] for name in ("people", "first", "kept", "why")}, "firth": np.ones(1)}
            return Next(again, _broadcast(again))
        if gone.any():
            return _result(plan, study, new, gone)
    if last or new["converged"][0]:
        return _result(plan, study, new)
    return Next(new, _broadcast(new))


REASONS = ["", "constant", "collinear", "separated"]


def _one_outcome(state: State) -> bool:
    n, cases, _ = (float(v) for v in state["people"])
    return cases < 0.5 or cases > n - 0.5


def _result(plan: GlmPlan, study: Study, state: State, gone: NDArray[np.bool_] | None = None) -> Finished:
    beta, kept = np.asarray(state["beta"], dtype=np.float64), np.asarray(state["kept"], dtype=bool)
    n, total, squares = (float(v) for v in state["people"])
    variances, df = np.diag(inverse(state["information"], kept)), np.inf
    value = float(state["best"][0])
    null = n * (np.log(max(total, 1e-300) / n) * total / n + np.log(max(1 - total / n, 1e-300)) * (1 - total / n))
    more: Result = {"n": int(round(n)), "converged": bool(state["converged"][0])}
    if plan.family == "linear":
        rss, df = max(-2.0 * value, 0.0), n - float(kept.sum())
        variances = variances * rss / max(df, 1.0)
        value = -0.5 * n * (LN_2PI + np.log(max(rss, 1e-300) / n) + 1)
        centred = squares - total**2 / n
        more["r2"] = 1.0 - rss / centred if centred > 0 else 0.0
    elif plan.family == "logistic":
        more |= {"cases": int(round(total)), "null_log_likelihood": float(null), "firth": bool(state["firth"][0])}
    more["penalised_log_likelihood" if state["firth"][0] else "log_likelihood"] = value
    why = [REASONS[int(code)] for code in state["why"]]
    if gone is not None:
        columns = ["intercept", *(f.name for f in chosen(study, plan.features))]
        more["separated"] = [columns[j] for j in np.flatnonzero(gone)]
        why = ["separated" if gone[j] else reason for j, reason in enumerate(why)]
    estimates = Estimates(beta, np.sqrt(np.maximum(variances, 0.0)), why, df)
    return model(study, beta[1:], beta[:1], estimates, **more)
