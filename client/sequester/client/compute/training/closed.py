"""The closed-form clipped sum of a linear head, straight from a store's dosages, in float64 and in one read.

A record is u (raw - centre) share / scale with the constant kappa behind it; centre, scale and share are public, so they
are folded into the weights and out of the sum. Patients are taken in groups that stay in cache between the forward and the
transposed product; a tile of a group is turned into float64 as it lies, missing calls and all, and what a missing call
should have been, the public centre, is put right from the list of `constants` (spec/privacy.md, 3.2). The same numbers as
`protocols/analyses/training.py`'s `records` and `closed_form`, which hold every standardised record at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequester.client.compute.training.constants import MISSING, Constants
from sequester.protocols.analyses.cohort import standardised
from sequester.protocols.analyses.training import (
    TrainingPlan,
    bounded,
    clipped_residuals,
    kept_scores,
    outcomes,
    record_factors,
    shares,
)
from sequester.protocols.study import Feature

Vector = NDArray[np.float64]
GROUP = 1 << 23  # dosages of one group of patients: eight megabytes of int8
TILE_ROWS, TILE_VARIANTS = 32, 2048  # half a megabyte of float64


class Linear:
    """A store's patients as records of linear heads.

    dosage: int8 or float32 (patients, variants), MISSING where not called. table: (patients, scores and covariates), NaN
    missing. `constants` are those of this dosage under these features.
    """

    def __init__(
        self, features: Sequence[Feature], dosage: NDArray[Any], table: Vector, outcome: Vector, constants: Constants
    ) -> None:
        self._dosage = np.asarray(dosage)  # no memmap: each of its slices costs microseconds
        self._table, self._outcome, self._constants = table, outcome, constants
        self._columns = features[: table.shape[1]]
        self._share = shares(len(features))[: table.shape[1]]
        self._centre, self._per_copy = constants.scales.copy()  # (variants,) each
        self._per_copy[constants.absent] = 0.0  # called in nobody: the centre for everybody, a standardised 0

    def clipped_sum(
        self, plan: TrainingPlan, rows: NDArray[np.int64], weights: Mapping[str, Vector]
    ) -> dict[str, Vector]:
        """`head.weight`, float64 (1, features + 1): the sum over the patients at `rows` of gradients of norm at most C."""
        n_table, n_variants = len(self._columns), len(self._centre)
        kappa, w = float(plan.kappa), bounded(weights)["head.weight"][0]
        forward = self._per_copy * w[n_table:-1]
        total, sum_a = np.zeros(len(w)), 0.0
        size = max(TILE_ROWS, GROUP // max(1, n_variants))
        for start in range(0, len(rows), size):
            chosen = rows[start : start + size]
            # neighbours are looked at where they lie, others are gathered
            together = slice(chosen[0], chosen[-1] + 1) if chosen[-1] - chosen[0] == len(chosen) - 1 else chosen
            group = _Group(self._dosage[together], self._centre, *self._uncalled(chosen))
            table = standardised(self._table[chosen], self._columns)
            table = kept_scores(plan, self._columns, table) * self._share
            z = table @ w[:n_table]
            if forward.any():  # not in a first round: public weights decide
                z = z + (group.times(forward) - self._centre @ forward)
            norms = np.sqrt(np.einsum("ij,ij->i", table, table) + self._constants.squares[chosen])
            u = record_factors(plan, norms)
            z = np.minimum(
                np.maximum(u * z + kappa * w[-1], -1e6), 1e6
            )  # as `predictor` does; finite, since weights are
            residuals = clipped_residuals(plan, z, outcomes(plan, self._outcome[chosen]), np.hypot(u * norms, kappa))
            a = residuals * u
            total[:n_table] += a @ table
            total[n_table:-1] += group.weighted(a)
            total[-1] += kappa * residuals.sum()
            sum_a += float(a.sum())
        total[n_table:-1] = (total[n_table:-1] - self._centre * sum_a) * self._per_copy
        return {"head.weight": total[None, :]}

    def _uncalled(self, chosen: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """How many calls each of these patients lacks, (patients,), and the variants of all of them, (calls,)."""
        first, after = self._constants.uncalled_from[chosen], self._constants.uncalled_from[chosen + 1]
        counts = after - first
        if counts.sum() == after[-1] - first[0]:  # they lie together
            return counts, self._constants.uncalled[first[0] : after[-1]]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return counts, self._constants.uncalled[np.repeat(first, counts) + within]


class _Group:
    """Patients' dosages, (patients, variants), as a matrix with the centre where nothing was called."""

    def __init__(
        self, dosage: NDArray[Any], centre: Vector, counts: NDArray[np.int64], uncalled: NDArray[np.int32]
    ) -> None:
        self._dosage, self._counts, self._uncalled = dosage, counts, uncalled
        self._lacking = centre - MISSING  # (variants,): what the stored number of a missing call is short of the centre
        self._buffer = np.empty(TILE_ROWS * TILE_VARIANTS)

    def times(self, forward: Vector) -> Vector:
        """The matrix times `forward`, (patients,)."""
        z = np.zeros(len(self._dosage))
        patient = np.repeat(np.arange(len(z)), self._counts)  # (calls,)
        z += np.bincount(patient, (self._lacking * forward)[self._uncalled], len(z))  # of no calls: integers
        for rows, variants, tile in self._tiles():
            z[rows] += tile @ forward[variants]
        return z

    def weighted(self, a: Vector) -> Vector:
        """The matrix' rows summed with the weights `a`, (variants,)."""
        total: Vector = self._lacking * np.bincount(self._uncalled, np.repeat(a, self._counts), self._dosage.shape[1])
        for rows, variants, tile in self._tiles():
            total[variants] += a[rows] @ tile
        return total

    def _tiles(self) -> Iterator[tuple[slice, slice, Vector]]:
        """Rows, variants and the stored numbers there as float64, in a buffer that the next tile overwrites."""
        patients, n_variants = self._dosage.shape
        for start in range(0, patients, TILE_ROWS):
            rows = slice(start, min(start + TILE_ROWS, patients))
            block = self._dosage[rows]
            # a byte of each cache line, in the order of memory: tiles alone are read a fifth slower
            np.bitwise_or.reduce(block.reshape(-1).view(np.int8)[::64])
            for first in range(0, n_variants, TILE_VARIANTS):
                variants = slice(first, min(first + TILE_VARIANTS, n_variants))
                tile = self._buffer[: len(block) * (variants.stop - first)].reshape(len(block), -1)
                tile[...] = block[:, variants]
                yield rows, variants, tile
