"""The exact half of `glm.py`: maximum likelihood by Newton, and Firth's penalty where the data separate.

Summed each round: X'WX, X'(y - mu), the log-likelihood, and people, sum of y, sum of y^2. Firth adds half the log
determinant of the information to the log-likelihood; its score gains sum x h (1/2 - mu) with leverages h of the *global*
information, which the exchange broadcasts: two rounds an iteration (Heinze and Schemper 2002; spec/genomics.md, section 7).
A round of the second kind fills `score` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sequester.protocols.analyses.analysis import Broadcast, Finished, Layout, Next, State, Sums
from sequester.protocols.analyses.cohort import Cohort, Result, chosen, designs
from sequester.protocols.analyses.newton import (
    HALVINGS,
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
    d = len(chosen(study, plan.features, plan.leave_out)) + 1
    return Layout((("information", (d * (d + 1) // 2,)), ("score", (d,)), ("log_likelihood", (1,)), ("people", (3,))))


def reach(plan: GlmPlan, study: Study) -> float:
    """The largest entry one patient adds, for head-room only: nothing is clipped."""
    outcome = max(1.0, float(study.phenotype.upper or 1)) if plan.family == "poisson" else 1.0
    return 64.0 * max(1, len(chosen(study, plan.features, plan.leave_out))) * outcome**2


def start(plan: GlmPlan, study: Study) -> Next:
    beta = np.zeros(len(chosen(study, plan.features, plan.leave_out)) + 1)
    if plan.family == "poisson":
        beta[0] = np.log(float(plan.prevalence))  # a start far from the mean would overshoot
    state = fresh(beta, plan.firth == "always")
    return Next(state, _broadcast(state))


def fresh(beta: Vector, firth: bool) -> State:
    """The state of a fit before its first sum."""
    d = len(beta)
    return beginning(beta) | {
        "firth": np.array([int(firth)]), "people": np.zeros(3), "score": np.zeros(0), "value": np.zeros(1),
        "why": np.zeros(d, dtype=np.int64), "gone": np.zeros(d, dtype=np.uint8), "done": np.zeros(1),
    }  # fmt: skip


def packed(fits: Sequence[State]) -> State:
    """Several fits as one state, each array stacked under `f.` and its name."""
    return {f"f.{name}": np.array([fit[name] for fit in fits]) for name in fits[0]}


def unpacked(state: State) -> list[State]:
    """The fits that `packed` put together."""
    names = [name for name in state if name.startswith("f.")]
    return [{name[2:]: state[name][g] for name in names} for g in range(len(state["f.beta"]))]


def _broadcast(state: State) -> Broadcast:
    sent: Broadcast = {"w": state["beta"][1:], "b": state["beta"][:1]}
    if len(state["score"]):  # the second round of a Firth iteration
        sent["inverse"] = inverse(state["information"], np.asarray(state["kept"], dtype=bool))
    return sent


def later(plan: GlmPlan, study: Study) -> list[Broadcast]:
    """Zeros as every later step has them: the weights, in Firth's second rounds with the inverse information."""
    d = len(chosen(study, plan.features, plan.leave_out)) + 1
    weights: Broadcast = {"w": np.zeros(d - 1), "b": np.zeros(1)}
    return [weights, {**weights, "inverse": np.zeros((d, d))}]


def contribution(plan: GlmPlan, study: Study, cohort: Cohort, broadcast: Broadcast) -> Sums:
    w, b = np.asarray(broadcast["w"], dtype=np.float64), float(broadcast["b"][0])

    d = len(w) + 1
    information, score, log_likelihood, people = np.zeros((d, d)), np.zeros(d), 0.0, np.zeros(3)
    for block in designs(study, cohort, plan.part, plan.features, plan.leave_out):
        x = np.column_stack([np.ones(len(block.y)), block.x])  # (rows, 1 + features)
        z = predictor(block.x, w, b)
        if "inverse" in broadcast:
            score += adjustment(x, mean_of("logistic", z), np.asarray(broadcast["inverse"], dtype=np.float64))
            continue
        more_information, more_score, more_value = moments(plan.family, x, block.y, z)
        information += more_information
        score += more_score
        log_likelihood += more_value
        people += [len(block.y), block.y.sum(), block.y @ block.y]
    return {
        "information": information[np.triu_indices(d)], "score": score,
        "log_likelihood": np.array([log_likelihood]), "people": people,
    }  # fmt: skip


def moments(family: str, x: Vector, y: Vector, z: Vector) -> tuple[Vector, Vector, float]:
    """X'WX, X'(y - mu) and the log-likelihood of some patients at the linear predictor z."""
    mu = mean_of(family, z)
    match family:
        case "logistic":
            weight, value = mu * (1 - mu), float((y * z - np.logaddexp(0.0, z)).sum())
        case "poisson":
            from scipy.special import gammaln  # heavy: loaded where it is used

            weight, value = mu, float((y * z - mu - gammaln(np.maximum(y, 0.0) + 1)).sum())
        case _:
            weight, value = np.ones_like(mu), -0.5 * float(((y - mu) ** 2).sum())
    return x.T @ (x * weight[:, None]), x.T @ (y - mu), value


def adjustment(x: Vector, mu: Vector, of: Vector) -> Vector:
    """What Firth's penalty adds to the score of some patients; `of` is the inverse of the global information."""
    leverage = mu * (1 - mu) * np.einsum("ij,jk,ik->i", x, of, x)
    added: Vector = x.T @ (leverage * (0.5 - mu))
    return added


def combine(plan: GlmPlan, study: Study, state: State, sums: Sums, step: int) -> Next | Finished:
    if not state["people"].any():
        state = {**state, "people": sums["people"]}
    new = progressed(state, sums, plan.family, plan.firth, study, last=step + 1 >= plan.rounds)
    if plan.family == "logistic" and _one_outcome(new):
        of = chosen(study, plan.features, plan.leave_out)
        return model(
            study, np.zeros(len(new["beta"]) - 1), np.zeros(1), of=of, converged=False, not_fitted="one outcome only"
        )
    return _result(plan, study, new) if step + 1 >= plan.rounds or new["done"][0] else Next(new, _broadcast(new))


def progressed(
    state: State, sums: Mapping[str, Vector], family: str, firth: str, study: Study, last: bool,
    prior: Vector | None = None,
) -> State:  # fmt: skip
    """The fit after one more opened sum; `done` is 1 where it is at an end, `gone` marks separated columns.

    `prior` (d,) is the precision of a normal prior around 0: with it every column has a maximum, and none is separated.
    """
    if len(state["score"]):  # the second round of a Firth iteration
        move = {**state, "score": np.zeros(0)}
        total, value = state["score"] + sums["score"], float(state["value"][0])
        new = advance(move, state["information"], total, value, FIRTH_TOLERANCE, STEP_CAP)
        return {**new, "done": new["converged"]}
    information = symmetric(sums["information"], len(state["beta"]))
    score, value = sums["score"], float(sums["log_likelihood"][0])
    if prior is not None:
        beta = np.asarray(state["beta"], dtype=np.float64)
        information = information + np.diag(prior)
        score, value = score - prior * beta, value - 0.5 * float(prior @ beta**2)
    if not state["first"].any():
        kept, why = estimable(information)
        reasons = np.array([REASONS.index(reason) for reason in why])
        state = {**state, "first": information, "kept": kept.astype(np.uint8), "why": reasons}
    kept = np.asarray(state["kept"], dtype=bool)
    penalised = bool(state["firth"][0])
    if penalised:
        value += 0.5 * float(np.linalg.slogdet(information[np.ix_(kept, kept)])[1])
        best = float(state["best"][0])
        if value >= best - 1e-9 * (1 + abs(best)) or float(state["halved"][0]) >= HALVINGS:
            held = {"information": information, "score": score, "value": np.array([value])}
            return {**state, **held, "best": held["value"]}
    tolerance = max(TOLERANCE, resolution(information, kept, len(study.sites), study.aggregation.fraction_bits))
    new = advance(state, information, score, value, tolerance, np.inf if family == "linear" else STEP_CAP)
    if family == "logistic" and not penalised and prior is None and float(new["halved"][0]) == 0:
        gone = separated(new, value, float(new["people"][0]))
        if gone.any() and firth == "if_separated" and not last:
            stays = {name: new[name] for name in ("people", "first", "kept", "why")}
            return {**fresh(np.zeros(len(gone)), True), **stays}
        if gone.any():
            return {**new, "gone": gone.astype(np.uint8), "done": np.ones(1)}
    return {**new, "done": new["converged"]}


REASONS = ["", "constant", "collinear", "separated"]


def _one_outcome(state: State) -> bool:
    n, cases, _ = (float(v) for v in state["people"])
    return cases < 0.5 or cases > n - 0.5


def _result(plan: GlmPlan, study: Study, state: State) -> Finished:
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
    gone = np.asarray(state["gone"], dtype=bool)
    if gone.any():
        columns = ["intercept", *(f.name for f in chosen(study, plan.features, plan.leave_out))]
        more["separated"] = [columns[j] for j in np.flatnonzero(gone)]
        why = ["separated" if gone[j] else reason for j, reason in enumerate(why)]
    estimates = Estimates(beta, np.sqrt(np.maximum(variances, 0.0)), why, df)
    of = chosen(study, plan.features, plan.leave_out)
    return model(study, beta[1:], beta[:1], estimates, of=of, **more)
