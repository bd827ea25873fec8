"""The closed-form clipped sum of a linear head, straight from a store's dosages, in float64 and in one read.

A record is u (raw - centre) share / scale with the constant kappa behind it; centre, scale and share are public, so they
are folded into the weights and out of the sum. A block of patients is turned into float64 once, as it lies, missing calls
and all, and stays in cache for the forward and the transposed product; what a missing call should have been, the public
centre, is put right from the list of `constants`, a group of blocks at a time (spec/privacy.md, 3.2). The same numbers as
`protocols/analyses/training.py`'s `records` and `closed_form`, which hold every standardised record at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
GROUP = 1 << 26  # dosages of the patients whose missing calls are put right together
BLOCK = 1 << 20  # float64 numbers of one block of patients: eight megabytes


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
        self._lacking = self._centre - MISSING  # (variants,): what the stored number of a missing call is short of it

    def clipped_sum(
        self, plan: TrainingPlan, rows: NDArray[np.int64], weights: Mapping[str, Vector]
    ) -> dict[str, Vector]:
        """`head.weight`, float64 (1, features + 1): the sum over the patients at `rows` of gradients of norm at most C."""
        n_table, n_variants = self._table.shape[1], len(self._centre)
        w = bounded(weights)["head.weight"][0]
        total, sum_a = np.zeros(len(w)), 0.0
        block = max(1, BLOCK // max(1, n_variants))
        buffer = np.empty((min(block, len(rows)), n_variants))
        group = max(block, GROUP // max(1, n_variants))
        for start in range(0, len(rows), group):
            sum_a += self._add(total, plan, w, rows[start : start + group], buffer)
        total[n_table:-1] = (total[n_table:-1] - self._centre * sum_a) * self._per_copy
        return {"head.weight": total[None, :]}

    def _add(self, total: Vector, plan: TrainingPlan, w: Vector, chosen: NDArray[np.int64], buffer: Vector) -> float:
        """Add the records of a group, times its residuals, to `total`, variants as raw copies; the sum of the factors."""
        n_table, kappa = self._table.shape[1], float(plan.kappa)
        forward = self._per_copy * w[n_table:-1]
        is_first = not forward.any()  # public weights decide
        counts, uncalled = self._uncalled(chosen)
        table = standardised(self._table[chosen], self._columns)
        table = kept_scores(plan, self._columns, table) * self._share  # (patients, scores and covariates)
        norms = np.sqrt(np.einsum("ij,ij->i", table, table) + self._constants.squares[chosen])
        u = record_factors(plan, norms)
        lengths, y = np.hypot(u * norms, kappa), outcomes(plan, self._outcome[chosen])
        z = table @ w[:n_table]
        if not is_first:
            patient = np.repeat(np.arange(len(chosen)), counts)
            z = z + np.bincount(patient, (self._lacking * forward)[uncalled], len(z)) - self._centre @ forward
        residuals, copies, part = np.empty(len(chosen)), np.zeros(len(forward)), np.empty(len(forward))
        for at in range(0, len(chosen), len(buffer)):
            rows = slice(at, at + len(buffer))
            x = buffer[: len(chosen[rows])]
            x[...] = self._dosage[_together(chosen[rows])]  # (rows, variants)
            raw = z[rows] if is_first else z[rows] + x @ forward
            # as `predictor` does; finite, since weights are
            bound = np.minimum(np.maximum(u[rows] * raw + kappa * w[-1], -1e6), 1e6)
            residuals[rows] = clipped_residuals(plan, bound, y[rows], lengths[rows])
            copies += np.dot(residuals[rows] * u[rows], x, out=part)
        a = residuals * u
        copies += self._lacking * np.bincount(uncalled, np.repeat(a, counts), len(copies))
        total[:n_table] += a @ table
        total[n_table:-1] += copies
        total[-1] += kappa * residuals.sum()
        return float(a.sum())

    def _uncalled(self, chosen: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """How many calls each of these patients lacks, (patients,), and the variants of all of them, (calls,)."""
        first, after = self._constants.uncalled_from[chosen], self._constants.uncalled_from[chosen + 1]
        counts = after - first
        if counts.sum() == after[-1] - first[0]:  # they lie together
            return counts, self._constants.uncalled[first[0] : after[-1]]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return counts, self._constants.uncalled[np.repeat(first, counts) + within]


def _together(chosen: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    """Neighbours are looked at where they lie, others are gathered."""
    is_run = chosen[-1] - chosen[0] == len(chosen) - 1
    return slice(int(chosen[0]), int(chosen[-1]) + 1) if is_run else chosen
