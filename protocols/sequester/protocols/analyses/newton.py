"""Newton's method across hospitals: what the exchange does with an opened score, information and log-likelihood.

One step a round. Columns that carry nothing of their own (constant, or a combination of earlier ones: 1 - R2 < 1e-6) are
left out by name at the first step; a step is capped, and halved where the log-likelihood fell; coefficients that run
away are named as separated. Tests and intervals follow from the information at the maximum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sequester.protocols.analyses.analysis import State
from sequester.protocols.analyses.cohort import Result

Vector = NDArray[np.float64]
COLLINEAR = 1e-6  # of a column's variance is left by the earlier ones: spec/genomics.md, section 4
CONSTANT = 1e-10  # of a column's second moment is variance
RUNAWAY = 15.0  # log odds moved by one root mean square of a column
LOST = 1e4  # times the information on a column shrank against that on the intercept
HALVINGS = 20


def symmetric(packed: Vector, size: int) -> Vector:
    """The full matrix of a packed upper triangle."""
    full = np.zeros((size, size))
    full[np.triu_indices(size)] = packed
    return full + np.triu(full, 1).T


def estimable(information: Vector, intercept: bool = True) -> tuple[NDArray[np.bool_], list[str]]:
    """Which columns can be estimated, bool (d,), and of each why not: ``, `constant` or `collinear`.

    `information` (d, d) is X'WX at weights that are equal for all patients; column 0 is the intercept where there is one.
    """
    d = len(information)
    kept, why = np.zeros(d, dtype=bool), [""] * d
    centre = (
        np.outer(information[0], information[0]) / information[0, 0] if intercept and information[0, 0] > 0 else 0.0
    )
    own = np.diag(information - centre)
    for j in range(d):
        if information[j, j] <= 0 or (j > 0 and own[j] <= CONSTANT * information[j, j]):
            why[j] = "constant"
            continue
        before = np.flatnonzero(kept)
        left = information[j, j]
        if len(before):
            cross = information[before, j]
            left -= float(cross @ np.linalg.lstsq(information[np.ix_(before, before)], cross, rcond=None)[0])
        if j > 0 and left <= COLLINEAR * own[j]:
            why[j] = "collinear"
            continue
        kept[j] = True
    return kept, why


def solved(matrix: Vector, vector: Vector, kept: NDArray[np.bool_]) -> Vector:
    """The solution on the kept columns, 0 elsewhere; columns are scaled first, so units do not matter."""
    out = np.zeros(len(vector))
    rows = np.flatnonzero(kept)
    if not len(rows):
        return out
    scale = 1.0 / np.sqrt(np.maximum(np.diag(matrix)[rows], 1e-300))
    inner = matrix[np.ix_(rows, rows)] * np.outer(scale, scale)
    out[rows] = scale * np.linalg.lstsq(inner, scale * vector[rows], rcond=1e-15)[0]
    return out


def inverse(matrix: Vector, kept: NDArray[np.bool_]) -> Vector:
    """The inverse on the kept columns, 0 elsewhere."""
    out = np.zeros_like(matrix)
    rows = np.flatnonzero(kept)
    scale = 1.0 / np.sqrt(np.maximum(np.diag(matrix)[rows], 1e-300))
    inner = matrix[np.ix_(rows, rows)] * np.outer(scale, scale)
    out[np.ix_(rows, rows)] = np.linalg.pinv(inner, rcond=1e-15, hermitian=True) * np.outer(scale, scale)
    return out


def beginning(beta: Vector) -> State:
    """The state of a fit before its first step."""
    d = len(beta)
    return {
        "beta": beta, "held": beta.copy(), "best": np.array([-np.inf]), "halved": np.zeros(1),
        "information": np.zeros((d, d)), "first": np.zeros((d, d)), "kept": np.ones(d, dtype=np.uint8),
        "converged": np.zeros(1, dtype=np.int64), "moved": np.zeros(d),
    }  # fmt: skip


def advance(
    state: State, information: Vector, score: Vector, log_likelihood: float, tolerance: float, cap: float = np.inf
) -> State:
    """One step from `state["beta"]`, where the three were evaluated; back half-way to `held` where the value fell."""
    best, beta = float(state["best"][0]), np.asarray(state["beta"], dtype=np.float64)
    if log_likelihood < best - 1e-9 * (1 + abs(best)) and float(state["halved"][0]) < HALVINGS:
        return {**state, "beta": (beta + state["held"]) / 2, "halved": state["halved"] + 1}
    kept = np.asarray(state["kept"], dtype=bool)
    move = solved(information, score, kept)
    longest = float(np.abs(move).max(initial=0.0))
    if longest > cap:
        move *= cap / longest
    done = longest < tolerance * max(1.0, float(np.abs(beta).max(initial=0.0)))
    return {
        **state, "beta": beta + move, "held": beta, "best": np.array([log_likelihood]), "halved": np.zeros(1),
        "information": information, "converged": np.array([int(done)]), "moved": move,
    }  # fmt: skip


def resolution(information: Vector, kept: NDArray[np.bool_], sites: int, fraction_bits: int) -> float:
    """How far fixed point alone may move a coefficient: half a step at every site in every number of the score."""
    return float(np.abs(inverse(information, kept)).sum(axis=1).max(initial=0.0)) * sites * 2.0 ** -(fraction_bits + 1)


def separated(state: State, log_likelihood: float, people: float) -> NDArray[np.bool_]:
    """bool (d,): coefficients without a maximum, by the signs of spec/genomics.md, section 7."""
    first, now = np.asarray(state["first"]), np.asarray(state["information"])
    kept = np.asarray(state["kept"], dtype=bool)
    beta = np.asarray(state["beta"], dtype=np.float64)
    d = len(beta)
    if first[0, 0] <= 0 or not now.any():
        return np.zeros(d, dtype=bool)
    rms = np.sqrt(np.maximum(np.diag(first), 0) / first[0, 0])
    runaway = np.abs(beta) * rms > RUNAWAY
    if not runaway.any() and -log_likelihood < 1e-4 * people:  # everybody is fitted by 0 or 1
        runaway = kept & (np.abs(beta) * rms > 5)
    shrunk = np.zeros(d)
    before, after = np.diag(inverse(first, kept)), np.diag(inverse(now, kept))
    use = kept & (before > 0)
    shrunk[use] = after[use] / before[use] * now[0, 0] / first[0, 0]
    gone: NDArray[np.bool_] = (runaway | (shrunk > LOST)) & kept
    return gone


def runaway(state: State, events: float) -> NDArray[np.bool_]:
    """bool (d,): coefficients without a maximum in a model without intercept, where each event gives information."""
    first, kept = np.asarray(state["first"]), np.asarray(state["kept"], dtype=bool)
    rms = np.sqrt(np.maximum(np.diag(first), 0) / max(events, 1.0))
    before, after = np.diag(inverse(first, kept)), np.diag(inverse(state["information"], kept))
    shrunk = np.divide(after, before, out=np.zeros(len(rms)), where=kept & (before > 0))
    gone: NDArray[np.bool_] = ((np.abs(state["beta"]) * rms > RUNAWAY) | (shrunk > LOST)) & kept
    return gone


@dataclass(frozen=True, slots=True)
class Estimates:
    """Coefficients with what is known about them; `errors` is 0 where there is none, `why` says why not."""

    beta: Vector
    errors: Vector
    why: Sequence[str]
    residual_df: float = np.inf

    def row(self, j: int) -> Result:
        """`se`, test `statistic`, two-sided `p`, 95 % interval `low`..`high`; or `not_estimated` and the reason."""
        from scipy.special import ndtr, ndtri, stdtr, stdtrit

        if self.why[j]:
            return {"not_estimated": self.why[j]}
        se = float(self.errors[j])
        if not np.isfinite(se) or se <= 0:
            return {"not_estimated": "no information"}
        value = float(self.beta[j])
        exact = np.isfinite(self.residual_df)
        if exact and self.residual_df <= 0:
            return {"not_estimated": "as many columns as people"}
        statistic = value / se
        p = 2 * (stdtr(self.residual_df, -abs(statistic)) if exact else ndtr(-abs(statistic)))
        half = float(stdtrit(self.residual_df, 0.975) if exact else ndtri(0.975)) * se
        return {"se": se, "statistic": statistic, "p": float(p), "low": value - half, "high": value + half}
