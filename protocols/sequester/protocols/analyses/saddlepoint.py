"""Tail probabilities of a score statistic by the saddle-point, where few cases or few carriers make a normal one wrong.

S = sum g (y - mu) with g adjusted for the covariates, y independent Bernoulli(mu). Its cumulant generating function K and
two derivatives are sums over patients, so the root of K'(t) = s is found in common, one evaluation a round, for both tails
of many statistics at once (Dey et al. 2017; Barndorff-Nielsen 1990).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
NORMAL_BELOW = 2.0  # standard deviations from the mean within which the normal is used
SOLVED = 1e-8  # of a standard deviation of S
# columns of the state, (statistics, tails, 9): aim, variance, t, low, high; K, K', K'' at that t; the most extreme S
AIM, VARIANCE, T, LOW, HIGH, K0, K1, K2, EXTREME = range(9)


def start(score: Vector, variance: Vector) -> Vector:
    """State for statistics (m,) of these variances; tail 0 is that of |s|, tail 1 that of -|s|."""
    state = np.zeros((len(score), 2, 9))
    size = np.abs(score)
    state[:, 0, AIM], state[:, 1, AIM] = size, -size
    state[:, :, VARIANCE] = variance[:, None]
    state[:, :, T] = state[:, :, AIM] / variance[:, None]
    state[:, 0, HIGH], state[:, 1, LOW] = 1e300, -1e300
    state[:, :, K1] = np.inf
    state[:, 0, EXTREME], state[:, 1, EXTREME] = np.inf, -np.inf
    return state


def points(state: Vector) -> Vector:
    """Where the sums are wanted, (m, 2); 0 where they are known."""
    t = np.ascontiguousarray(state[:, :, T])
    for k, tail in np.ndindex(t.shape):
        if _solved(state[k, tail]):
            t[k, tail] = 0.0
    return t


def contribution(g: Vector, mu: Vector, t: Vector) -> Vector:
    """K, K', K'' of these patients at t, and the largest or smallest S they can reach, (m, 2, 4).

    g (patients, m), mu (patients,), t (m, 2).
    """
    out = np.zeros((g.shape[1], 2, 4))
    for k in range(g.shape[1]):
        column = g[:, k]
        centre = float(column @ mu)
        for tail in range(2) if t[k].any() else ():
            at = column * np.clip(np.nan_to_num(t[k, tail]), -1e6, 1e6)
            # log(1 - mu + mu e^at) without overflow, and the tilted probability
            log = np.logaddexp(np.log1p(-mu), np.log(np.maximum(mu, 1e-300)) + at)
            tilted = np.exp(np.minimum(np.log(np.maximum(mu, 1e-300)) + at - log, 0.0))
            out[k, tail] = [
                float(log.sum()) - t[k, tail] * centre,
                float(column @ tilted) - centre,
                float((column * column) @ (tilted * (1 - tilted))),
                float((np.maximum if tail == 0 else np.minimum)(column, 0.0).sum()) - centre,
            ]
    return np.nan_to_num(out, nan=0.0, posinf=1e300, neginf=-1e300)


def advanced(state: Vector, sums: Vector) -> Vector:
    """One step of Newton in a bracket for every root that is not found yet."""
    new = state.copy()
    for k, tail in np.ndindex(state.shape[:2]):
        row = new[k, tail]
        if _solved(row):
            continue
        row[K0:] = sums[k, tail]
        if _solved(row):
            continue
        row[LOW if row[K1] < row[AIM] else HIGH] = row[T]
        step = row[T] - (row[K1] - row[AIM]) / max(row[K2], 1e-300)
        if not row[LOW] < step < row[HIGH]:
            open_ended = max(abs(row[LOW]), abs(row[HIGH])) >= 1e299
            step = 2 * row[T] if open_ended else (row[LOW] + row[HIGH]) / 2
        row[T] = step
    return new


def _solved(row: Vector) -> bool:
    return _out_of_reach(row) or bool(abs(row[K1] - row[AIM]) <= SOLVED * np.sqrt(row[VARIANCE]))


def _out_of_reach(row: Vector) -> bool:
    """True where no outcome gives an S as extreme: that tail has probability 0."""
    return bool(abs(row[AIM]) >= abs(row[EXTREME]) or np.sign(row[AIM]) * np.sign(row[EXTREME]) < 0)


def is_done(state: Vector) -> bool:
    """True where every root is found."""
    return all(_solved(state[k, tail]) for k, tail in np.ndindex(state.shape[:2]))


def p_values(state: Vector) -> Vector:
    """Two-sided p (m,); NaN where a root was not found."""
    from scipy.special import ndtr  # heavy: loaded where it is used

    out = np.full(len(state), np.nan)
    for k, rows in enumerate(state):
        z = abs(rows[0, AIM]) / np.sqrt(rows[0, VARIANCE])
        if z < NORMAL_BELOW:
            out[k] = 2 * ndtr(-z)
            continue
        tails = [_tail(row) for row in rows]
        out[k] = min(1.0, sum(tails)) if np.isfinite(tails).all() else np.nan
    return out


def _tail(row: Vector) -> float:
    if _out_of_reach(row):
        return 0.0
    if not _solved(row):
        return float("nan")
    from scipy.special import ndtr

    t = float(row[T])
    w = np.sign(t) * np.sqrt(max(2 * (t * row[AIM] - row[K0]), 0.0))
    v = t * np.sqrt(max(row[K2], 0.0))
    if w == 0 or v == 0 or w * v < 0:
        return float("nan")
    return float(ndtr(-abs(w + np.log(v / w) / w)))
