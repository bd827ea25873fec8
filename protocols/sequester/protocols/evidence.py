"""What measurements say about a privacy claim: noise on padding, moments of the noise, lower bounds on epsilon.

All of it is arithmetic on numbers that were opened or simulated; a pass is evidence against gross faults, never a proof
of epsilon (spec/privacy.md, section 8).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binom, chi2, norm

Vector = NDArray[np.float64]
PADDING_LEVEL = 1e-4  # a side: the low side blocks, the high side warns
GUESSES = (10, 25, 50, 100, 200, 300)  # canaries guessed "in", and as many guessed "out"
ONE_RUN_LEVEL, GDP_LEVEL = 0.05, 0.01


@dataclass(frozen=True, slots=True)
class Measured:
    """One check: whether it passed, its figures, and a sentence for the report."""

    name: str
    passed: bool
    figures: dict[str, float | list[float]]
    sentence: str


# ---- noise ----------------------------------------------------------------------------------------------------------


def padding_limits(count: int, level: float = PADDING_LEVEL) -> tuple[float, float]:
    """Limits of measured over promised standard deviation of `count` padding coordinates, chi-square, `level` a side."""
    low, high = (math.sqrt(float(chi2.ppf(p, count)) / count) for p in (level, 1 - level))
    return low, high


def padding_ratio(padding: Vector, sd: float) -> float:
    """Measured over promised: the root mean square of coordinates whose mean is 0 by design."""
    return math.sqrt(float((padding**2).mean())) / sd


def check_padding(rounds: Sequence[Vector], sd: float) -> Measured:
    """The padding of every opened sum of one analysis against `sd`: pooled, and each round at level 1e-4 / T.

    Too little noise anywhere fails; too much is said and passes.
    """
    pooled = padding_ratio(np.concatenate(rounds), sd)
    low, high = padding_limits(sum(map(len, rounds)))
    each = [padding_ratio(padding, sd) for padding in rounds]
    each_low = [padding_limits(len(padding), PADDING_LEVEL / len(rounds))[0] for padding in rounds]
    short = [i for i, (ratio, limit) in enumerate(zip(each, each_low, strict=True)) if ratio < limit]
    passed = pooled >= low and not short
    if passed and pooled > high:
        sentence = f"more noise than promised: {pooled:.3f} of the design"
    elif passed:
        sentence = f"noise as promised: {pooled:.3f} of the design, limits {low:.3f} to {high:.3f}"
    elif pooled < low:
        sentence = f"too little noise: {pooled:.3f} of the design, at least {low:.3f} was expected"
    else:
        sentence = f"too little noise in round {short[0] + 1}: {each[short[0]]:.3f} of the design"
    return Measured("padding", passed, {"pooled": pooled, "limits": [low, high], "rounds": each}, sentence)


def pooled_ratio(measured: Sequence[Sequence[float]]) -> float:
    """Measured over promised of [sum of squares, count, expected variance] of many sums, each on its own scale first."""
    return math.sqrt(sum(squares / variance for squares, _, variance in measured) / sum(n for _, n, _ in measured))


def short_rounds(measured: Sequence[Sequence[float]]) -> list[int]:
    """Which of [sum of squares, count, expected variance] show too little noise, at level 1e-4 over their number."""
    short = []
    for i, (squares, count, variance) in enumerate(measured):
        low, _ = padding_limits(int(count), PADDING_LEVEL / len(measured))
        if math.sqrt(squares / count / variance) < low:
            short.append(i)
    return short


def check_moments(draws: NDArray[np.int64], sigma_int: int) -> Measured:
    """Mean and standard deviation of draws of one noise share: both within six standard errors."""
    n = len(draws)
    values = draws.astype(np.float64)
    spread, mean = float(values.std()) / sigma_int, float(values.mean()) / sigma_int
    passed = abs(spread - 1) <= 6 / math.sqrt(2 * n) and abs(mean) <= 6 / math.sqrt(n)
    figures: dict[str, float | list[float]] = {"sigma_int": sigma_int, "draws": n, "spread": spread, "mean": mean}
    return Measured("noise_moments", passed, figures, f"noise share: {spread:.4f} of sigma over {n} draws")


# ---- lower bounds on epsilon ----------------------------------------------------------------------------------------


def one_run_bound(scores: Vector, is_in: NDArray[np.bool_], delta: float, level: float = ONE_RUN_LEVEL) -> float:
    """A lower bound on epsilon from one run, 1 - `level` confidence (Steinke, Nasr, Jagielski 2023, theorem 5.2).

    `scores` (canaries,) are high for canaries thought to be in; each was in with probability 1/2. The k highest are
    guessed in and the k lowest out, the best of several k with Bonferroni's correction.
    """
    m = len(scores)
    order = np.argsort(scores, kind="stable")
    tried = [k for k in GUESSES if 2 * k <= m]
    best = 0.0
    for k in tried:
        right = int(is_in[order[-k:]].sum() + (~is_in[order[:k]]).sum())
        if _tail(0.0, 2 * k, right, m, delta) > level / len(tried):
            continue
        best = max(best, _least_epsilon(2 * k, right, m, delta, level / len(tried)))
    return best


def _least_epsilon(guesses: int, right: int, canaries: int, delta: float, level: float) -> float:
    low, high = 0.0, 50.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        if _tail(middle, guesses, right, canaries, delta) > level:
            high = middle
        else:
            low = middle
    return low


def _tail(epsilon: float, guesses: int, right: int, canaries: int, delta: float) -> float:
    """The probability of so many right guesses under (epsilon, delta), at most."""
    p = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(right - 1, guesses, p))
    i = np.arange(1, right + 1)
    sums = np.cumsum(binom.pmf(right - i, guesses, p))  # P[Q = right - 1] + ... + P[Q = right - i]
    return tail + 2 * canaries * delta * float((sums / i).max(initial=0.0))


def gdp_auc_bound(scores: Vector, is_in: NDArray[np.bool_], delta: float, level: float = GDP_LEVEL) -> float:
    """A lower bound on epsilon from how well scores tell canaries in from out, for Gaussian noise, 1 - `level`.

    The AUC's lower limit after Hanley and McNeil 1982 gives mu of the Gaussian trade-off, mu gives epsilon at `delta`.
    """
    inside, outside = scores[is_in], scores[~is_in]
    n1, n0 = len(inside), len(outside)
    ranks = np.searchsorted(np.sort(outside), inside, side="left") + np.searchsorted(
        np.sort(outside), inside, side="right"
    )
    auc = float(ranks.sum()) / 2 / (n1 * n0)
    if auc >= 1:
        low = 1 - 3 / (n1 + n0)
    else:
        q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
        variance = (auc * (1 - auc) + (n1 - 1) * (q1 - auc**2) + (n0 - 1) * (q2 - auc**2)) / (n1 * n0)
        low = min(auc - float(norm.isf(level)) * math.sqrt(max(variance, 0.0)), 1 - 1 / (n1 * n0))
    return gaussian_epsilon(math.sqrt(2) * float(norm.ppf(low)), delta) if low > 0.5 else 0.0


def gaussian_epsilon(mu: float, delta: float) -> float:
    """epsilon at `delta` of one Gaussian release whose neighbours lie mu standard deviations apart (Balle, Wang 2018)."""

    def excess(epsilon: float) -> float:
        # exp(epsilon) times a tail: in logarithms, as the tail is 1e-300 where epsilon is large
        second = math.exp(min(epsilon + float(norm.logcdf(-mu / 2 - epsilon / mu)), 700.0))
        return float(norm.cdf(mu / 2 - epsilon / mu)) - second - delta

    if mu <= 0 or excess(0.0) <= 0:
        return 0.0
    return float(brentq(excess, 0.0, mu * mu / 2 + mu * 40 + 10, xtol=1e-9))
