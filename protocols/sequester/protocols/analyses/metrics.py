"""What a histogram of scores by outcome says, and the measures that follow from a few sums. No patient is seen here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sequester.protocols.analyses.cohort import Result

Vector = NDArray[np.float64]
LEAST = 1e-4  # a probability is clipped to LEAST..1 - LEAST before its logarithm (spec/genomics.md, section 7)


def average_precision(cells: Vector) -> float:
    """Mean precision over the cases, highest scores first, expected over every order inside a bin. cells (2, bins).

    Of a bin of s people, a of them cases, below m people and c cases: the k-th is a case with probability a/s, then with
    (k - 1)(a - 1)/(s - 1) cases of the bin before it. The sum over k has harmonic numbers, which noisy counts have too.
    Everybody in one bin is a score that ranks nobody: the share of cases.
    """
    from scipy.special import digamma  # heavy: loaded where it is used

    controls, a = np.maximum(cells[0, ::-1], 0.0), np.maximum(cells[1, ::-1], 0.0)
    s = a + controls
    if s.max() >= s.sum():
        return float(a.sum() / s.sum())
    c, m = np.cumsum(a) - a, np.cumsum(s) - s
    harmonic = digamma(m + s + 1) - digamma(m + 1)  # sum of 1/(m + k)
    share = np.divide(a, s, out=np.zeros(len(a)), where=s > 0)
    before = np.divide(np.maximum(a - 1, 0.0), s - 1, out=np.zeros(len(a)), where=s > 1)
    value = share * ((c + 1) * harmonic + before * (s - (m + 1) * harmonic))
    return float(np.clip(value.sum() / a.sum(), 0.0, 1.0))


def deciles(cells: Vector, floor: int) -> Result:
    """Share of cases in each tenth of the patients by score, lowest first, and the odds of the highest against the lowest.

    A bin that a tenth ends in is divided in proportion. Below the floor in a tenth, or of fewer bins than ten: nothing.
    """
    controls, cases = np.maximum(cells[0], 0.0), np.maximum(cells[1], 0.0)
    total = np.append(0.0, np.cumsum(controls + cases))
    if len(controls) < 10 or total[-1] < 10 * floor or not np.all(np.diff(total) >= 0):
        return {}
    at = np.linspace(0.0, total[-1], 11)
    tenth_cases = np.diff(np.interp(at, total, np.append(0.0, np.cumsum(cases))))
    tenth_controls = np.diff(np.interp(at, total, np.append(0.0, np.cumsum(controls))))
    found: Result = {"deciles": [float(c / (c + h)) for c, h in zip(tenth_cases, tenth_controls, strict=True)]}
    if min(tenth_cases[0], tenth_controls[-1]) >= 1:
        found["top_against_bottom_odds"] = float(
            tenth_cases[-1] / tenth_controls[-1] / (tenth_cases[0] / tenth_controls[0])
        )
    return found


def nagelkerke(log_likelihood: float, people: float, cases: float) -> float:
    """1 - (L0/L)^(2/n) over its largest value; L0 is the likelihood of the share of cases."""
    rate = cases / people
    null = people * (rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    return float((1 - np.exp(2 * (null - log_likelihood) / people)) / (1 - np.exp(2 * null / people)))


def liability(r2: float, population: float, sample: float) -> float:
    """R2 on the liability scale from the observed scale (Lee et al. 2012): prevalence in the population, share here."""
    from scipy.special import ndtri  # heavy: loaded where it is used

    k, p = population, sample
    t = float(-ndtri(k))
    z = float(np.exp(-t * t / 2) / np.sqrt(2 * np.pi))
    m = z / k
    a = m * (p - k) / (1 - k)
    theta = a * (a - t)
    c = k * k * (1 - k) ** 2 / (z * z * p * (1 - p))
    return r2 * c / (1 + r2 * theta * c)


SUMS = ("n", "cases", "expected", "squared", "log_likelihood", "score", "score2", "score_y")


def outcome_sums(y: Vector, z: Vector, p: Vector) -> Vector:
    """`SUMS` of some patients: outcome y, linear predictor z, probability p."""
    safe = np.clip(p, LEAST, 1 - LEAST)
    value = y * np.log(safe) + (1 - y) * np.log1p(-safe)
    z = np.clip(z, -50.0, 50.0)
    return np.array([len(y), y.sum(), p.sum(), ((y - p) ** 2).sum(), value.sum(), z.sum(), z @ z, z @ y])


def binned_sums(cells: Vector, z: Vector, p: Vector) -> Vector:
    """`SUMS` of a histogram (2, bins) whose patients stand at z and p of their bin."""
    both, cases = cells.sum(axis=0), cells[1]
    safe = np.clip(p, LEAST, 1 - LEAST)
    value = cells[1] @ np.log(safe) + cells[0] @ np.log1p(-safe)
    squared = cells[1] @ (1 - p) ** 2 + cells[0] @ p**2
    z = np.clip(z, -50.0, 50.0)
    return np.array([both.sum(), cases.sum(), both @ p, squared, value, both @ z, both @ z**2, cases @ z])


def accuracy(sums: Vector, population: float | None) -> Result:
    """Brier score, Nagelkerke R2, R2 on the observed and liability scales, observed over expected cases."""
    n, cases, expected, squared, value, z, z2, zy = (float(v) for v in sums)
    rate = cases / n
    covariance, spread = zy / n - z / n * rate, z2 / n - (z / n) ** 2
    r2 = covariance**2 / (spread * rate * (1 - rate)) if spread > 1e-12 else 0.0
    found: Result = {
        "brier": squared / n, "nagelkerke_r2": nagelkerke(value, n, cases), "observed_r2": r2,
        "observed_over_expected": cases / expected if expected > 0 else None,
    }  # fmt: skip
    if population is not None:
        found["liability_r2"] = liability(r2, population, rate)
    return found


def concordance(cells: Vector) -> tuple[float, float]:
    """(C-index, comparable pairs) of (times, scores, 2) patients, censored and with the event.

    A patient with the event is compared with everybody in a later interval and with those censored in the same one;
    equal score bins count half.
    """
    censored, events = cells[:, :, 0], cells[:, :, 1]
    both = censored + events
    later = both[::-1].cumsum(axis=0)[::-1] - both + censored  # (times, scores)
    lower = np.cumsum(later, axis=1) - later / 2
    pairs = float((events * later.sum(axis=1, keepdims=True)).sum())
    return (float((events * lower).sum()) / pairs if pairs > 0 else 0.5), pairs


def by_group(groups: dict[str, float], measure: Callable[[str], Result]) -> dict[str, Result]:
    """A measure of each group; one suppressed group takes the smallest shown one with it.

    Otherwise the total minus the groups that are shown is the group that is not (spec/genomics.md, section 5). `groups`
    maps each name to its size.
    """
    found = {name: measure(name) for name in groups}
    hidden = [name for name in groups if "suppressed" in found[name]]
    if len(hidden) == 1 and len(groups) > 1:
        shown = [name for name in groups if name != hidden[0]]
        found[min(shown, key=lambda name: groups[name])] = {"suppressed": "complement"}
    return found
