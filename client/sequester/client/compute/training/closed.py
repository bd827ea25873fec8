"""The closed-form clipped sum of a linear head, straight from a store's dosages, in float64 and in one read.

A record is u (raw - centre) share / scale with the constant kappa behind it; centre, scale and share are public, so they
are folded into the weights and out of the sum, and a dosage is turned into float64 once, in a block that stays in cache,
for the forward and the transposed product (spec/privacy.md, 3.2). The same numbers as `protocols/analyses/training.py`'s
`records` and `closed_form`, which hold every standardised record at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
AT_ONCE = 1 << 18  # float64 numbers of one block: two megabytes


class Linear:
    """A store's patients as records of linear heads.

    dosage: int8 or float32 (patients, variants), below 0 missing. table: (patients, scores and covariates), NaN missing.
    """

    def __init__(self, features: Sequence[Feature], dosage: NDArray[Any], table: Vector, outcome: Vector) -> None:
        self._dosage, self._table, self._outcome = dosage, table, outcome
        self._columns = features[: table.shape[1]]
        self._centre = np.array([f.centre for f in features[table.shape[1] :]])  # (variants,)
        share = shares(len(features))
        self._share = share[: table.shape[1]]
        self._per_copy = share[table.shape[1] :] / np.array([f.scale for f in features[table.shape[1] :]])
        # squared norms of the variants' part of each record, the same in every round; NaN where not known yet
        self._squares = np.full(len(outcome), np.nan)

    def clipped_sum(
        self, plan: TrainingPlan, rows: NDArray[np.int64], weights: Mapping[str, Vector]
    ) -> dict[str, Vector]:
        """`head.weight`, float64 (1, features + 1): the sum over the patients at `rows` of gradients of norm at most C."""
        n_table, n_variants = len(self._columns), len(self._centre)
        kappa, w = float(plan.kappa), bounded(weights)["head.weight"][0]
        forward = self._per_copy * w[n_table:-1]
        total, sum_a = np.zeros(len(w)), 0.0
        size = max(8, min(4096, AT_ONCE // max(1, n_variants)))
        buffer = np.empty((min(size, len(rows)), n_variants))
        for start in range(0, len(rows), size):
            chosen = rows[start : start + size]
            # neighbours are looked at where they lie, others are gathered
            together = slice(chosen[0], chosen[-1] + 1) if chosen[-1] - chosen[0] == len(chosen) - 1 else chosen
            x = _copies(self._dosage[together], self._centre, buffer[: len(chosen)])  # (rows, variants)
            table = standardised(self._table[chosen], self._columns)
            table = kept_scores(plan, self._columns, table) * self._share
            z = table @ w[:n_table]
            if forward.any():  # not in a first round: public weights decide
                z = z + (x @ forward - self._centre @ forward)
            norms = np.sqrt(np.einsum("ij,ij->i", table, table) + self._squared(chosen, x))
            u = record_factors(plan, norms)
            z = np.minimum(
                np.maximum(u * z + kappa * w[-1], -1e6), 1e6
            )  # as `predictor` does; finite, since weights are
            residuals = clipped_residuals(plan, z, outcomes(plan, self._outcome[chosen]), np.hypot(u * norms, kappa))
            a = residuals * u
            total[:n_table] += a @ table
            total[n_table:-1] += a @ x
            total[-1] += kappa * residuals.sum()
            sum_a += float(a.sum())
        total[n_table:-1] = (total[n_table:-1] - self._centre * sum_a) * self._per_copy
        return {"head.weight": total[None, :]}

    def _squared(self, chosen: NDArray[np.int64], x: Vector) -> Vector:
        """sum_j ((x_j - centre_j) per_copy_j)^2 for each row, without a second array of the records."""
        if np.isnan(self._squares[chosen]).any():
            weight = self._per_copy * self._per_copy
            cross = x @ (self._centre * weight)
            constant = float(self._centre @ (self._centre * weight))
            self._squares[chosen] = np.maximum(np.square(x) @ weight - 2 * cross + constant, 0.0)
        squares: Vector = self._squares[chosen]
        return squares


def _copies(block: NDArray[Any], centre: Vector, out: Vector) -> Vector:
    """Dosages as float64, the centre where one is missing: a standardised 0."""
    out[...] = block
    missing = np.flatnonzero(np.less(block, 0).reshape(-1))
    if len(missing):
        out.reshape(-1)[missing] = centre[missing % len(centre)]
    return out
