"""Weights from one noisy score vector: a spike and a slab, fitted to the vector itself.

Post-processing of one release, free to repeat (spec/privacy.md, section 5). A score z_j is noise alone with probability
1 - pi, and noise around a true effect else: z_j ~ pi N(0, v + tau2) + (1 - pi) N(0, v).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
EM_STEPS = 60


@dataclass(frozen=True, slots=True)
class SpikeSlab:
    """The fitted mixture: share of slabs pi, their variance tau2, the noise v, and the mean of each true score."""

    pi: float
    tau2: float
    v: float
    mean: Vector


def spike_slab(z: Vector, v_dp: float) -> SpikeSlab:
    """Posterior means of scores `z` (scores,); `v_dp` is the known variance of the privacy noise in each."""
    v = max((float(np.median(np.abs(z))) / 0.6745) ** 2, v_dp)
    pi, tau2 = 0.02, max(float(z.var()) - v, 0.05 * v) / 0.02
    slab = np.zeros_like(z)
    for _ in range(EM_STEPS):
        slab = _slab_probability(z, pi, tau2, v)
        pi = float(np.clip(slab.mean(), 1e-4, 0.9))
        weighted = float((slab * z**2).sum()) / max(float(slab.sum()), 1e-300)
        tau2 = max(weighted - v, 0.02 * v)
    return SpikeSlab(pi, tau2, v, slab * z * tau2 / (v + tau2))


def _slab_probability(z: Vector, pi: float, tau2: float, v: float) -> Vector:
    log_odds = np.log(pi / (1 - pi)) - 0.5 * np.log1p(tau2 / v) + 0.5 * z**2 * (1 / v - 1 / (v + tau2))
    probability: Vector = 1 / (1 + np.exp(-np.clip(log_odds, -700, 700)))
    return probability
