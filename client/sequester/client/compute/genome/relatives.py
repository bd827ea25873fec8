"""Pairs of relatives inside one site, by KING-robust kinship (Manichaikul et al. 2010, equation 11).

The estimate needs no frequencies and holds in mixed ancestry. It wants many loosely linked variants: on short simulated
genomes it finds relatives that are none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sequester.client.compute.genome.plink import MISSING

_TILE = 1024  # people on a side of one tile of pairs


@dataclass(frozen=True, slots=True)
class Pair:
    """Two people by their row, first < second, and their kinship: 0.5 the same person, 0.25 first degree."""

    first: int
    second: int
    kinship: float


def relatives(genotypes: NDArray[np.int8], threshold: float) -> list[Pair]:
    """Pairs above a kinship; genotypes: int8 (variants, people), -9 missing."""
    people = genotypes.shape[1]
    found: list[Pair] = []
    for i in range(0, people, _TILE):
        for j in range(i, people, _TILE):
            kinship = _kinship(genotypes[:, i : i + _TILE], genotypes[:, j : j + _TILE])
            a, b = np.nonzero(kinship > threshold)
            upper = a + i < b + j
            found += [
                Pair(int(x) + i, int(y) + j, float(kinship[x, y])) for x, y in zip(a[upper], b[upper], strict=True)
            ]
    return found


def _kinship(left: NDArray[np.int8], right: NDArray[np.int8]) -> NDArray[np.float64]:
    """float64 (people, people) between two sets of columns; over variants called in both of a pair."""
    # float32 holds every count exactly: a product sums fewer than 2**24 ones
    hets = [(g == 1).astype(np.float32) for g in (left, right)]  # (variants, people)
    called = [(g != MISSING).astype(np.float32) for g in (left, right)]
    nones, twos = ([(g == value).astype(np.float32) for g in (left, right)] for value in (0, 2))
    both_het = hets[0].T @ hets[1]
    opposite = nones[0].T @ twos[1] + twos[0].T @ nones[1]
    of_left, of_right = hets[0].T @ called[1], called[0].T @ hets[1]
    fewer = np.minimum(of_left, of_right).astype(np.float64)
    more = np.maximum(of_left, of_right).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        kinship = (both_het - 2 * opposite) / (2 * fewer) + 0.5 - 0.25 * (fewer + more) / fewer
    return np.where(fewer > 0, kinship, -np.inf)


def to_drop(pairs: list[Pair], missing: NDArray[np.int64]) -> dict[int, float]:
    """Who leaves so that no pair is left, with the kinship that made them: fewer calls first, then the later row."""
    out: dict[int, float] = {}
    for pair in sorted(pairs, key=lambda p: (-p.kinship, p.first, p.second)):
        if pair.first in out or pair.second in out:
            continue
        worse = pair.first if missing[pair.first] > missing[pair.second] else pair.second
        out[worse] = pair.kinship
    return out
