"""How a person's ancestry is shared among the panel's populations, from public frequencies alone.

Maximum likelihood of the admixture model with fixed frequencies, by EM (Tang et al. 2005). Nothing leaves; groups serve
reporting and expected heterozygosity, never admission.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequester.client.compute.genome.plink import MISSING

LEAST_VARIANTS, MOST_VARIANTS = 500, 2000
CERTAIN = 0.8  # share from which a person is counted to one population
_START = 0.9
_EDGE = 1e-3  # no frequency is taken as exactly 0 or 1


def populations(frequency: NDArray[np.float32]) -> NDArray[np.int64]:
    """Columns of a table of frequencies that hold any."""
    return np.flatnonzero(~np.isnan(frequency).all(axis=0))


def informative(frequency: NDArray[np.float32]) -> NDArray[np.int64]:
    """At most 2,000 rows whose frequencies differ most between populations, in row order; frequency: (rows, populations)."""
    held = frequency[:, populations(frequency)]
    if held.shape[1] < 2:
        return np.zeros(0, dtype=np.int64)
    known = np.flatnonzero(~np.isnan(held).any(axis=1))
    spread = held[known].var(axis=1)
    return np.sort(known[np.argsort(-spread, kind="stable")[:MOST_VARIANTS]])


def shares(genotypes: NDArray[np.int8], frequency: NDArray[np.float32], steps: int = 40) -> NDArray[np.float64]:
    """float64 (people, populations), rows sum to 1; genotypes: int8 (variants, people), frequency: (variants, populations)."""
    f = np.clip(frequency.astype(np.float32), _EDGE, 1 - _EDGE)
    called = genotypes != MISSING
    copies = np.where(called, genotypes, 0).astype(np.float32)  # (variants, people)
    others = np.where(called, 2 - genotypes, 0).astype(np.float32)
    likelihood = copies.T @ np.log(f) + others.T @ np.log(1 - f)  # (people, populations), of one population alone
    q: NDArray[Any] = np.full(likelihood.shape, (1 - _START) / (f.shape[1] - 1), dtype=np.float32)
    q[np.arange(len(q)), likelihood.argmax(axis=1)] = _START  # EM is slow from a mixture that is nobody's
    for _ in range(steps):
        mean = f @ q.T  # (variants, people)
        q = q * ((copies / mean).T @ f + (others / (1 - mean)).T @ (1 - f))
        q /= np.maximum(q.sum(axis=1, keepdims=True), 1e-12)
    return q.astype(np.float64)
