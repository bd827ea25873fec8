"""The discrete-time hazard: a logistic model of the event in each public interval in which a patient is at risk.

Exact: Newton on one intercept an interval and the features. Private: a patient's gradient over all of their intervals is
clipped once, norm sqrt((sum r)^2 |x|^2 + kappa^2 sum r^2), so one patient moves the sum by at most the clip
(spec/privacy.md, 3.6). Who is censored inside an interval is at risk in the intervals before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sequester.protocols.analyses import exact_glm
from sequester.protocols.analyses.analysis import Broadcast, Finished, Layout, Next, State, Sums
from sequester.protocols.analyses.cohort import Block, Cohort, Result, chosen, designs
from sequester.protocols.analyses.cox import bin_of
from sequester.protocols.analyses.newton import RUNAWAY, Estimates, advance, beginning, inverse, resolution, symmetric
from sequester.protocols.analyses.newton import estimable as estimable_columns
from sequester.protocols.analyses.weights import model, predictor, private_rows, sigmoid

if TYPE_CHECKING:
    from sequester.protocols.analyses.survival import SurvivalPlan
    from sequester.protocols.study import Study

Vector = NDArray[np.float64]


def layout(plan: SurvivalPlan, p: int) -> Layout:
    if plan.mode == "private":
        return Layout((("gradient", (p,)), ("intercepts", (plan.bins,))))
    d = plan.bins + p
    return Layout((("information", (d * (d + 1) // 2,)), ("score", (d,)), ("log_likelihood", (1,)), ("people", (2,))))


def start(plan: SurvivalPlan, study: Study) -> Next:
    p = len(chosen(study, plan.features))
    if plan.mode == "private":
        state: State = {"w": np.zeros(p), "b": np.full(plan.bins, float(plan.intercept))}
    else:
        state = beginning(np.zeros(plan.bins + p)) | {
            "why": np.zeros(plan.bins + p, dtype=np.int64),
            "people": np.zeros(2),
        }
    return Next(state, _to_all(plan, state))


def _to_all(plan: SurvivalPlan, state: State) -> Broadcast:
    if plan.mode == "private":
        return {"w": state["w"], "b": state["b"]}
    return {"w": state["beta"][plan.bins :], "b": state["beta"][: plan.bins]}


def at_risk(plan: SurvivalPlan, study: Study, block: Block) -> tuple[Vector, Vector]:
    """(risk, event), each (patients, bins) of 0 and 1."""
    assert block.event is not None
    upper = float(study.phenotype.upper or 1)
    last, died = bin_of(block.y, upper, plan.bins), block.event > 0.5
    # follow-up to the very end of an interval completes it
    whole = np.abs(block.y * (plan.bins / upper) - (last + 1)) <= 1e-9
    risk = np.arange(plan.bins) < (last + (died | whole))[:, None]
    event = (np.arange(plan.bins) == last[:, None]) & died[:, None]
    return risk.astype(np.float64), event.astype(np.float64)


def contribution(plan: SurvivalPlan, study: Study, cohort: Cohort, broadcast: Broadcast) -> Sums:
    w, b = np.asarray(broadcast["w"], dtype=np.float64), np.asarray(broadcast["b"], dtype=np.float64)
    return (_gradient if plan.mode == "private" else _moments)(plan, study, cohort, w, b)


def _gradient(plan: SurvivalPlan, study: Study, cohort: Cohort, w: Vector, b: Vector) -> Sums:
    total, intercepts = np.zeros_like(w), np.zeros(plan.bins)
    kappa, clip = float(plan.kappa), float(plan.clip)
    for block in designs(study, cohort, plan.part, plan.features):
        x, _ = private_rows(block.x, plan.over_sqrt_p, float(plan.record_norm))
        risk, event = at_risk(plan, study, block)
        z = np.clip(np.nan_to_num(predictor(x, w, 0.0)[:, None] + b), -1e6, 1e6)
        r = (sigmoid(z) - event) * risk  # (patients, bins)
        whole = r.sum(axis=1)
        norms = np.sqrt(whole**2 * np.einsum("ij,ij->i", x, x) + kappa**2 * (r * r).sum(axis=1))
        c = np.minimum(1.0, clip / np.maximum(norms, 1e-300))
        total += x.T @ (whole * c)
        intercepts += kappa * (c @ r)
    return {"gradient": total, "intercepts": intercepts}


def _moments(plan: SurvivalPlan, study: Study, cohort: Cohort, w: Vector, b: Vector) -> Sums:
    d = plan.bins + len(w)
    information, score, value, people = np.zeros((d, d)), np.zeros(d), 0.0, np.zeros(2)
    for block in designs(study, cohort, plan.part, plan.features):
        risk, event = at_risk(plan, study, block)
        z = np.clip(np.nan_to_num(predictor(block.x, w, 0.0)[:, None] + b), -1e6, 1e6)
        mu = sigmoid(z)
        weight, r = mu * (1 - mu) * risk, (event - mu) * risk
        cross = weight.T @ block.x  # (bins, features)
        information[: plan.bins, : plan.bins] += np.diag(weight.sum(axis=0))
        information[: plan.bins, plan.bins :] += cross
        information[plan.bins :, plan.bins :] += block.x.T @ (block.x * weight.sum(axis=1)[:, None])
        score[: plan.bins] += r.sum(axis=0)
        score[plan.bins :] += block.x.T @ r.sum(axis=1)
        value += float(((event * z - np.logaddexp(0.0, z)) * risk).sum())
        people += [len(block.y), event.sum()]
    return {
        "information": information[np.triu_indices(d)], "score": score, "log_likelihood": np.array([value]),
        "people": people,
    }  # fmt: skip


def combine(plan: SurvivalPlan, study: Study, state: State, sums: Sums, step: int) -> Next | Finished:
    last = step + 1 >= plan.rounds
    if plan.mode == "private":
        p = len(state["w"])
        spread = p if plan.over_sqrt_p else 1
        w = state["w"] - float(plan.step_w) * spread / plan.rounds * sums["gradient"] / study.n0
        b = state["b"] - float(plan.step_b) / plan.rounds * sums["intercepts"] / study.n0
        if not last:
            return Next({"w": w, "b": b}, {"w": w, "b": b})
        scale = p**-0.5 if plan.over_sqrt_p and p else 1.0
        return _finished(study, w * scale, b, None)
    information = symmetric(sums["information"], len(state["beta"]))
    if step == 0:
        kept, why = _estimable(information, plan.bins)
        state = {**state, "people": sums["people"], "first": information, "kept": kept.astype(np.uint8)}
        state["why"] = np.array([exact_glm.REASONS.index(reason) for reason in why])
        if float(sums["people"][1]) < 0.5:
            return model(study, state["beta"][plan.bins :], np.zeros(1), converged=False, not_fitted="no events")
    kept = np.asarray(state["kept"], dtype=bool)
    rounding = resolution(information, kept, len(study.sites), study.aggregation.fraction_bits)
    tolerance = max(exact_glm.TOLERANCE, rounding)
    new = advance(state, information, sums["score"], float(sums["log_likelihood"][0]), tolerance, exact_glm.STEP_CAP)
    if not (last or new["converged"][0]):
        return Next(new, _to_all(plan, new))
    return _exact_result(plan, study, new)


def _estimable(information: Vector, bins: int) -> tuple[NDArray[np.bool_], list[str]]:
    """As in `newton.py`, with the intervals in place of one intercept: their sum is the constant."""
    d = len(information)
    shift = np.vstack([np.append(np.ones(bins), np.zeros(d - bins)), np.eye(d)[bins:]])
    kept, why = estimable_columns(shift @ information @ shift.T)
    alive = np.diag(information)[:bins] > 0
    return np.append(alive, kept[1:]), [*("" if a else "constant" for a in alive), *why[1:]]


def _exact_result(plan: SurvivalPlan, study: Study, state: State) -> Finished:
    beta, kept = np.asarray(state["beta"], dtype=np.float64), np.asarray(state["kept"], dtype=bool)
    errors = np.sqrt(np.maximum(np.diag(inverse(state["information"], kept)), 0.0))
    why = [exact_glm.REASONS[int(code)] for code in state["why"]]
    # an interval without events has no finite intercept; it takes nothing from the other columns
    runaway = np.abs(beta) > RUNAWAY
    why = ["separated" if gone and not reason else reason for gone, reason in zip(runaway, why, strict=True)]
    w, b = beta[plan.bins :], beta[: plan.bins]
    own = Estimates(np.append(0.0, w), np.append(0.0, errors[plan.bins :]), ["absorbed", *why[plan.bins :]])
    n, events = (float(v) for v in state["people"])
    separated = [f.name for f, gone in zip(chosen(study, plan.features), runaway[plan.bins :], strict=True) if gone]
    # an interval without events keeps the intercepts moving, not the weights
    settled = bool(state["converged"][0]) or (bool(runaway[: plan.bins].any()) and not separated)
    more: Result = {"n": int(round(n)), "events": int(round(events)), "converged": settled}
    more["log_likelihood"] = float(state["best"][0])
    return _finished(study, w, b, own, **more, **({"separated": separated} if separated else {}))


def _finished(study: Study, w: Vector, b: Vector, estimates: Estimates | None, **more: Any) -> Finished:
    upper = float(study.phenotype.upper or 1)
    done = model(study, w, np.array([float(b.mean())]), estimates, **more)
    rates = [float(v) for v in sigmoid(np.asarray(b, dtype=np.float64))]
    intervals = {"baseline_hazard": rates, "interval": upper / len(b), "unit": study.phenotype.unit}
    return Finished(done.result | intervals, {**done.state, "intercepts": np.asarray(b, dtype=np.float64)})
