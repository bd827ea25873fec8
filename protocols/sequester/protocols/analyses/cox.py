"""Cox regression across hospitals: partial likelihoods by hospital (Efron), or one on a shared grid of times (Breslow)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sequester.protocols.analyses.analysis import Broadcast, Finished, Layout, Next, State, Sums
from sequester.protocols.analyses.cohort import Block, Cohort, Result, chosen, designs
from sequester.protocols.analyses.newton import (
    Estimates,
    advance,
    beginning,
    estimable,
    inverse,
    resolution,
    runaway,
    symmetric,
)
from sequester.protocols.analyses.weights import model, predictor

if TYPE_CHECKING:
    from sequester.protocols.analyses.survival import SurvivalPlan
    from sequester.protocols.study import Study

Vector = NDArray[np.float64]
TOLERANCE, STEP_CAP = 1e-10, 5.0
RISK = 30.0  # log relative risk beyond which a broadcast is no fit
FLAT = 1e-12  # information an event gives on a column that does not vary


def bin_of(time: Vector, upper: float, bins: int) -> NDArray[np.int64]:
    """The interval a time falls into, its upper end included, 0..bins-1; time 0 falls into the first."""
    return np.clip(np.ceil(time * (bins / upper) - 1e-9).astype(np.int64) - 1, 0, bins - 1)


def by_site_layout(p: int) -> Layout:
    return Layout((("information", (p * (p + 1) // 2,)), ("score", (p,)), ("log_likelihood", (1,)), ("people", (2,))))


def grid_layout(p: int, bins: int) -> Layout:
    return Layout((
        ("s0", (bins,)), ("s1", (bins, p)), ("s2", (bins, p * (p + 1) // 2)), ("events", (bins,)), ("event_x", (p,)),
        ("people", (2,)),
    ))  # fmt: skip


def start(p: int) -> Next:
    state = beginning(np.zeros(p)) | {"why": np.zeros(p, dtype=np.int64), "people": np.zeros(2)}
    return Next(state, {"beta": state["beta"]})


def _everybody(plan: SurvivalPlan, study: Study, cohort: Cohort) -> Block:
    blocks = list(designs(study, cohort, plan.part, plan.features))
    events = [b.event for b in blocks if b.event is not None]
    return Block(
        np.vstack([b.x for b in blocks]) if blocks else np.zeros((0, len(chosen(study, plan.features)))),
        np.concatenate([b.y for b in blocks]) if blocks else np.zeros(0),
        np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64),
        np.concatenate(events) if events else np.zeros(0),
    )  # fmt: skip


def by_site(plan: SurvivalPlan, study: Study, cohort: Cohort, broadcast: Broadcast) -> Sums:
    """Score, information and log partial likelihood of this hospital's own risk sets, ties by Efron."""
    all_ = _everybody(plan, study, cohort)
    assert all_.event is not None
    beta = np.asarray(broadcast["beta"], dtype=np.float64)
    p = len(beta)
    information, score, value = np.zeros((p, p)), np.zeros(p), 0.0
    # a partial likelihood does not change when columns are shifted: centred, a constant column gives exactly nothing
    x = all_.x - all_.x.mean(axis=0) if len(all_.x) else all_.x
    eta = np.clip(predictor(x, beta, 0.0), -RISK, RISK)
    order = np.argsort(-all_.y, kind="stable")
    x, eta, time, event = x[order], eta[order], all_.y[order], all_.event[order] > 0.5
    risk = np.exp(eta)
    s0, s1, s2 = 0.0, np.zeros(p), np.zeros((p, p))
    ends = np.flatnonzero(np.diff(time, append=-1.0) != 0) + 1 if len(time) else np.zeros(0, dtype=np.int64)
    first = 0
    for last in map(int, ends):
        rows = slice(first, last)
        first = last
        xg, wg = x[rows], risk[rows]
        weighted = xg * wg[:, None]
        s0, s1, s2 = s0 + float(wg.sum()), s1 + weighted.sum(axis=0), s2 + xg.T @ weighted
        died = event[rows]
        d = int(died.sum())
        if not d:
            continue
        xd, wd = xg[died], wg[died]
        t0, t1, t2 = float(wd.sum()), (xd * wd[:, None]).sum(axis=0), xd.T @ (xd * wd[:, None])
        share = np.arange(d) / d
        p0 = s0 - share * t0  # (d,)
        p1 = s1 - share[:, None] * t1  # (d, p)
        mean = p1 / p0[:, None]
        value += float(eta[rows][died].sum() - np.log(p0).sum())
        score += xd.sum(axis=0) - mean.sum(axis=0)
        information += (1 / p0).sum() * s2 - (share / p0).sum() * t2 - mean.T @ mean
    return {
        "information": information[np.triu_indices(p)], "score": score, "log_likelihood": np.array([value]),
        "people": np.array([float(len(time)), float(event.sum())]),
    }  # fmt: skip


def on_grid(plan: SurvivalPlan, study: Study, cohort: Cohort, broadcast: Broadcast) -> Sums:
    """For each interval the patients whose follow-up ends in it: sums of risk, risk x, risk x x; events, sum of their x."""
    beta = np.asarray(broadcast["beta"], dtype=np.float64)
    p = len(beta)
    upper = np.triu_indices(p)
    s0, s1, s2 = np.zeros(plan.bins), np.zeros((plan.bins, p)), np.zeros((plan.bins, len(upper[0])))
    events, event_x, people = np.zeros(plan.bins), np.zeros(p), np.zeros(2)
    for block in designs(study, cohort, plan.part, plan.features):
        assert block.event is not None
        risk = np.exp(np.clip(predictor(block.x, beta, 0.0), -RISK, RISK))
        at, died = bin_of(block.y, float(study.phenotype.upper or 1), plan.bins), block.event > 0.5
        for b in np.unique(at):
            rows = at == b
            x, w = block.x[rows], risk[rows]
            s0[b] += w.sum()
            s1[b] += w @ x
            s2[b] += (x.T @ (x * w[:, None]))[upper]
        np.add.at(events, at[died], 1.0)
        event_x += block.x[died].sum(axis=0)
        people += [len(at), died.sum()]
    return {"s0": s0, "s1": s1, "s2": s2, "events": events, "event_x": event_x, "people": people}


def _at_risk(sums: Sums, beta: Vector) -> tuple[Vector, Vector, float]:
    """Information, score and log partial likelihood (Breslow) from sums over those at risk in each interval."""
    p = len(beta)
    s0, s1, s2 = (np.cumsum(sums[name][::-1], axis=0)[::-1] for name in ("s0", "s1", "s2"))
    information, score = np.zeros((p, p)), sums["event_x"].copy()
    value = float(sums["event_x"] @ beta)
    for b in np.flatnonzero(sums["events"] > 0.5):
        d, mean = float(sums["events"][b]), s1[b] / s0[b]
        score -= d * mean
        information += d * (symmetric(s2[b], p) / s0[b] - np.outer(mean, mean))
        value -= d * float(np.log(s0[b]))
    return information, score, value


def combine(plan: SurvivalPlan, study: Study, state: State, sums: Sums, step: int) -> Next | Finished:
    beta = np.asarray(state["beta"], dtype=np.float64)
    if plan.model == "cox":
        information, score, value = _at_risk(sums, beta)
    else:
        information, score = symmetric(sums["information"], len(beta)), sums["score"]
        value = float(sums["log_likelihood"][0])
    n, events = (float(v) for v in sums["people"])
    if step == 0:
        varies = np.diag(information) > FLAT * max(events, 1.0)
        clean = information * np.outer(varies, varies)
        kept, why = estimable(clean, intercept=False)
        reasons = np.array([REASONS.index(reason) for reason in why])
        state = {**state, "people": sums["people"], "first": clean, "kept": kept.astype(np.uint8), "why": reasons}
        if events < 0.5:
            return model(study, beta, np.zeros(1), converged=False, not_fitted="no events", n=int(round(n)))
    kept = np.asarray(state["kept"], dtype=bool)
    rounding = resolution(information, kept, len(study.sites), study.aggregation.fraction_bits)
    new = advance(state, information, score, value, max(TOLERANCE, rounding), STEP_CAP)
    gone = runaway(new, events)
    if gone.any() or new["converged"][0] or step + 1 >= plan.rounds:
        return _result(plan, study, new, gone)
    return Next(new, {"beta": new["beta"]})


REASONS = ["", "constant", "collinear", "separated"]


def _result(plan: SurvivalPlan, study: Study, state: State, gone: NDArray[np.bool_]) -> Finished:
    beta, kept = np.asarray(state["beta"], dtype=np.float64), np.asarray(state["kept"], dtype=bool)
    n, events = (float(v) for v in state["people"])
    errors = np.sqrt(np.maximum(np.diag(inverse(state["information"], kept)), 0.0))
    why = ["separated" if gone[j] else REASONS[int(code)] for j, code in enumerate(state["why"])]
    # a Cox model has no intercept: its place in the estimates is empty
    estimates = Estimates(np.append(0.0, beta), np.append(0.0, errors), ["absorbed", *why])
    more: Result = {
        "n": int(round(n)), "events": int(round(events)), "converged": bool(state["converged"][0]),
        "log_partial_likelihood": float(state["best"][0]), "ties": "breslow" if plan.model == "cox" else "efron",
    }  # fmt: skip
    if gone.any():
        more["separated"] = [f.name for f, g in zip(chosen(study, plan.features), gone, strict=True) if g]
    return model(study, beta, np.zeros(1), estimates, **more)
