"""Scores made comparable across ancestry, fitted on a public reference alone: nothing of the hospital enters the fit.

As pgsc_calc: components standardised and the score centred on the reference, reference SD with ddof 0.
Z_norm1 = (S - E[S | PC]) / SD(residual). Z_norm2 = (S - mu(PC)) / sqrt(v(PC)), mu linear, v = exp(linear), by the joint
Gaussian likelihood, from Z_norm1 and a gamma regression of the squared residual (Khera et al. 2019; Ge et al. 2022).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sequester.protocols.errors import SiteError

Vector = NDArray[np.float64]
STEPS, STILL = 500, 1e-11


@dataclass(frozen=True, slots=True)
class Normalisation:
    """A fit on the reference. `mean1`, `mean2`, `spread2`: intercept and slope per standardised component."""

    centre: float
    pc_mean: Vector
    pc_sd: Vector
    mean1: Vector
    sd1: float
    mean2: Vector
    spread2: Vector

    def z1(self, score: Vector, pcs: Vector) -> Vector:
        """Adjusted for the mean; score: (people,), pcs: (people, components)."""
        return (score - self.centre - self._design(pcs) @ self.mean1) / self.sd1

    def z2(self, score: Vector, pcs: Vector) -> Vector:
        """Adjusted for mean and variance."""
        x = self._design(pcs)
        return (score - self.centre - x @ self.mean2) / np.exp(0.5 * (x @ self.spread2))

    def sd2(self, pcs: Vector) -> Vector:
        """The SD of the score among people of these components."""
        return np.asarray(np.exp(0.5 * (self._design(pcs) @ self.spread2)))

    def _design(self, pcs: Vector) -> Vector:
        return np.column_stack([np.ones(len(pcs)), (pcs - self.pc_mean) / self.pc_sd])


def fit(score: Vector, pcs: Vector) -> Normalisation:
    """The fit on a reference; score: (people,), pcs: (people, components)."""
    if score.std() == 0:
        raise SiteError(
            "the score is the same for everybody of the reference", hint="another reference, or more variants"
        )
    pc_mean, pc_sd = pcs.mean(axis=0), pcs.std(axis=0)
    if (pc_sd == 0).any():
        raise SiteError(
            "a component is the same for everybody of the reference", hint="the reference has one ancestry only"
        )
    centre = float(score.mean())
    x = np.column_stack([np.ones(len(pcs)), (pcs - pc_mean) / pc_sd])
    y = score - centre
    mean1 = np.linalg.lstsq(x, y, rcond=None)[0]
    residual = y - x @ mean1
    mean2, spread2 = _mean_and_spread(x, y, mean1)
    return Normalisation(centre, pc_mean, pc_sd, mean1, float(residual.std()), mean2, spread2)


def _mean_and_spread(x: Vector, y: Vector, mean: Vector) -> tuple[Vector, Vector]:
    """The maximum of sum -(x g)/2 - (y - x b)^2 exp(-x g)/2 over b and g.

    b and g by turns: weighted least squares, and Fisher's scoring of a gamma regression with log link, whose likelihood
    in g is the same; the information is block-diagonal, so turns converge fast.
    """
    scale = float((y - x @ mean).std())
    spread = np.zeros(x.shape[1])
    spread[0] = 2 * np.log(scale)
    inverse = np.linalg.pinv(x)
    for _ in range(STEPS):
        before = np.concatenate([mean / scale, spread])
        for _ in range(STEPS):
            ratio = (y - x @ mean) ** 2 * np.exp(-(x @ spread))
            step: Vector = np.asarray(inverse @ (ratio - 1), dtype=np.float64)
            step *= min(1.0, 1.0 / max(1e-300, float(np.abs(step).max())))  # at most a factor e at once
            spread += step
            if np.abs(step).max() < STILL:
                break
        weight = np.exp(-0.5 * (x @ spread))
        mean = np.asarray(np.linalg.lstsq(x * weight[:, None], y * weight, rcond=None)[0], dtype=np.float64)
        if np.abs(np.concatenate([mean / scale, spread]) - before).max() < STILL:
            return mean, spread
    raise SiteError("the variance of the score along the components did not settle", hint="use fewer components")


def percentile(score: float, reference: Vector) -> float:
    """0..100: mean of the shares below and at or below, as scipy's percentileofscore of kind rank counts ties."""
    below, at = float((reference < score).sum()), float((reference <= score).sum())
    return 50.0 * (below + at + (1.0 if at > below else 0.0)) / len(reference)


def percentile_interval(score: float, sd: float, reference: Vector) -> tuple[float, float]:
    """95 %: the score moved by 1.96 of its own SD, and the chance in a reference of finite size (Wilson 1927)."""
    low, high = percentile(score - 1.96 * sd, reference) / 100, percentile(score + 1.96 * sd, reference) / 100
    return 100 * _wilson(min(low, 1.0), len(reference))[0], 100 * _wilson(min(high, 1.0), len(reference))[1]


def _wilson(p: float, n: int, z: float = 1.96) -> tuple[float, float]:
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))
