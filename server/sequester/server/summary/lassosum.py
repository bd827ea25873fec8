"""Joint weights from marginal correlations and a public reference of linkage: lassosum (Mak et al. 2017).

Minimises b'((1 - s) R + s I) b - 2 b'r + 2 lambda |b|_1 block by block of linkage, r the correlations of variants with the
outcome from released sums, R those of variants with each other in the reference. s and lambda are chosen without another
patient by the authors' pseudo-validation: the b with the largest b'r~ / sqrt(b'R b), r~ being r shrunk by the local false
discovery rate, here of a spike and a slab.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sequester.protocols.analyses.penalised import descend
from sequester.protocols.analyses.shrinkage import spike_slab
from sequester.protocols.study import Variant
from sequester.server.summary.reference import Reference

Vector = NDArray[np.float64]
SHRINKAGE = (0.2, 0.5, 0.9, 1.0)
LAMBDAS = 20
SMALLEST = 0.01  # lambda, of the one that leaves nothing
SPAN = 3_000_000  # base pairs of a block, about two of the blocks that linkage falls into in people
MOST = 2000  # variants of a block: R of more does not pay


@dataclass(frozen=True, slots=True)
class Fit:
    """`b` (variants,) on the scale of standardised variants and outcome; `value` is what pseudo-validation gave it."""

    b: Vector
    s: float
    strength: float
    value: float
    blocks: int


def blocks(variants: Sequence[Variant], use: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """Places of the used variants in windows of `SPAN` base pairs of one chromosome, at most `MOST` in each."""
    windows: dict[tuple[str, int, int], list[int]] = {}
    filled: dict[tuple[str, int], int] = {}
    used = [int(j) for j in np.flatnonzero(use)]
    for j in sorted(used, key=lambda j: (variants[j].chromosome, variants[j].position)):
        window = variants[j].chromosome, variants[j].position // SPAN
        windows.setdefault((*window, filled.get(window, 0) // MOST), []).append(j)
        filled[window] = filled.get(window, 0) + 1
    return [np.array(rows, dtype=np.int64) for rows in windows.values()]


def solve(r: Vector, linkage: Vector, s: float, strength: float, start: Vector) -> Vector:
    """The minimiser in one block, from `start`."""
    matrix = (1 - s) * linkage + s * np.eye(len(r))
    return descend(matrix, r - matrix @ start, start, np.full(len(r), strength), 1.0)


def fit(
    r: Vector, noise_sd: float, variants: Sequence[Variant], reference: Reference,
    told: Callable[[int, int], None] = lambda done, of: None,
) -> Fit:  # fmt: skip
    """Weights of `variants` from their correlations `r`, 0 for those not matched or NaN; `told` hears of each block."""
    use = reference.matched & np.isfinite(r)
    parts = blocks(variants, use)
    largest = float(np.abs(r[use]).max(initial=0.0))
    grid = largest * np.geomspace(1.0, SMALLEST, LAMBDAS + 1)[1:]
    believed = np.zeros(len(r))
    believed[use] = spike_slab(r[use], noise_sd**2).mean
    b = np.zeros((len(SHRINKAGE), LAMBDAS, len(r)))
    gain, square = np.zeros(b.shape[:2]), np.zeros(b.shape[:2])
    for number, places in enumerate(parts):
        x = reference.standardised(places)
        linkage = x.T @ x
        varies = np.diag(linkage) > 0.5
        mine = np.where(varies, r[places], 0.0)
        for i, s in enumerate(SHRINKAGE):
            at = np.zeros(len(places))
            for k, strength in enumerate(grid):
                at = solve(mine, linkage, s, float(strength), at)
                b[i, k, places] = at
                gain[i, k] += float(at @ (believed[places] * varies))
                square[i, k] += float(at @ linkage @ at)
        told(number + 1, len(parts))
    value = np.where(square > 0, gain / np.sqrt(np.where(square > 0, square, 1.0)), 0.0)
    i, k = (int(index) for index in np.unravel_index(int(value.argmax()), value.shape))
    return Fit(b[i, k], SHRINKAGE[i], float(grid[k]), float(value[i, k]), len(parts))
