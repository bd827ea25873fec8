"""What the records of a frozen cohort are whatever the weights are: squared norms, and where no genotype was called.

Both follow from the frozen dosages and the study's public centres and scales, so `data freeze` works them out once and keeps
them beside the dosages, under the same manifest; a store that was frozen before has them made when a study first asks.
Each is a number of one patient: it stays where the dosages stay.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequester.protocols.analyses.training import TrainingPlan, shares
from sequester.protocols.errors import SiteError
from sequester.protocols.study import Feature, Study

MISSING = -9  # what the store holds where nothing was called
_AT_ONCE = 1 << 18  # float64 numbers of one block: two megabytes


@dataclass(frozen=True, slots=True)
class Constants:
    """The arrays, each `<name>.npy` of the store."""

    scales: NDArray[np.float64]  # (2, variants): centre of each, and what a copy beyond it is multiplied by
    squares: NDArray[np.float64]  # (patients,): squared norm of the variants' part of the record, under those
    absent: NDArray[np.int32]  # variants that were called in nobody, ascending
    uncalled: NDArray[np.int32]  # other variants that were not called in a patient, one patient after another
    uncalled_from: NDArray[np.int64]  # (patients + 1,): where each patient's begin in `uncalled`

    @classmethod
    def load(cls, folder: Path, checked: Collection[str], features: Sequence[Feature]) -> Constants | None:
        """Those frozen with a store for these features; None where there are none, or other scales made them.

        `checked` are the file names whose hashes the caller has compared with the manifest: no other is looked at.
        """
        names = [field.name for field in fields(cls)]
        if not all(f"{name}.npy" in checked for name in names):
            return None
        found = cls(**{name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in names})
        return found if np.array_equal(found.scales, scales(features, found.scales.shape[1])) else None

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays by name, as the store keeps them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def are_used_by(study: Study) -> bool:
    """True where an analysis of the study takes closed-form gradients over variants."""
    plans = [plan for plan in study.analyses if isinstance(plan, TrainingPlan)]
    return bool(study.variants) and any(plan.gradients == "closed" for plan in plans)


def scales(features: Sequence[Feature], n_variants: int) -> NDArray[np.float64]:
    """float64 (2, variants), of the last features: centre, and the record's share of the norm over the public scale."""
    first = len(features) - n_variants
    share = shares(len(features))[first:]
    return np.array([[f.centre for f in features[first:]], share / np.array([f.scale for f in features[first:]])])


def constants(features: Sequence[Feature], dosage: NDArray[Any]) -> Constants:
    """Those of a store. features: all of the study's, variants last; dosage: int8 or float32 (patients, variants)."""
    patients, n_variants = dosage.shape
    centre, per_copy = public = scales(features, n_variants)
    called = np.zeros(n_variants, dtype=bool)
    squares = np.empty(patients)
    places: list[NDArray[np.int32]] = []
    counts = np.zeros(patients, dtype=np.int64)
    rows = max(1, _AT_ONCE // max(1, n_variants))
    for start in range(0, patients, rows):
        block = np.asarray(dosage[start : start + rows])
        missing = block < 0
        if (block[missing] != MISSING).any():
            raise SiteError(
                f"the frozen cohort holds numbers of copies below 0 that are not {MISSING}", hint="freeze it again"
            )
        called |= ~missing.all(axis=0)
        x = (block - centre) * per_copy  # (rows, variants)
        x[missing] = 0.0  # the public centre
        squares[start : start + rows] = np.einsum("ij,ij->i", x, x)
        places.append(np.nonzero(missing)[1].astype(np.int32))
        counts[start : start + rows] = missing.sum(axis=1)
    uncalled = np.concatenate([*places, np.zeros(0, dtype=np.int32)])
    keep = called[uncalled]
    counts = np.bincount(np.repeat(np.arange(patients), counts)[keep], minlength=patients)
    uncalled_from = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Constants(public, squares, np.flatnonzero(~called).astype(np.int32), uncalled[keep], uncalled_from)
