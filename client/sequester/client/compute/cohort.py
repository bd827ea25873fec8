"""A frozen cohort store as the analyses see it: standardised features by public constants, in blocks of patients.

The store was written by `ingest`; its manifest names the SHA-256 of every file, and a store whose bytes changed is
refused. Dosages stay int8 or float32 on disk and in memory; a block is converted to float64 once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequester.client.compute.training import closed
from sequester.client.compute.training.constants import Constants, constants
from sequester.client.compute.training.gradient import clipped_sum
from sequester.client.compute.training.sampling import poisson_mask
from sequester.protocols.analyses.cohort import ROWS, Block, Columns, Dosages, Part, standardised
from sequester.protocols.analyses.training import TrainingPlan
from sequester.protocols.errors import SiteError
from sequester.protocols.study import Study

DOSAGES_AT_ONCE = 4_000_000  # float64 numbers of one block of variants


class StoredCohort:
    """`Cohort` over the files of one store."""

    def __init__(self, folder: Path, study: Study, device: str = "cpu") -> None:
        manifest = _manifest(folder)
        for name, expected in manifest["files"].items():
            if _sha256(folder / name) != expected:
                raise SiteError(
                    f"{name} of the frozen cohort changed since it was frozen",
                    hint="freeze it again and approve again: `sequester-client data freeze`",
                )
        self._study = study
        self._folder, self._checked = folder, frozenset(manifest["files"])
        self._device = device
        self._features = study.features()
        self._dosage: NDArray[Any] = np.load(folder / "dosage.npy", mmap_mode="r")  # (patients, variants), -9 missing
        self._table: NDArray[np.float64] = np.load(
            folder / "table.npy"
        )  # (patients, scores and covariates), NaN missing
        self._outcome: NDArray[np.float64] = np.load(folder / "outcome.npy")
        self._split: NDArray[np.int64] = np.load(folder / "split.npy")  # (patients, 3): held out, fold, stratum
        self._event: NDArray[np.float64] | None = None
        if study.phenotype.kind == "time":
            self._event = np.load(folder / "event.npy")
        self._linear: closed.Linear | None = None
        n_variants = sum(f.kind == "variant" for f in self._features)
        if self._dosage.shape[1] != n_variants or self._table.shape[1] != len(self._features) - n_variants:
            raise SiteError("the frozen cohort holds other columns than the study names", hint="freeze it again")

    def blocks(self, part: Part) -> Iterator[Block]:
        """Blocks of at most 4,096 patients of one part, in the order they were frozen; fewer where variants are many."""
        chosen = self._rows(part)
        n_table = self._table.shape[1]
        size = max(16, min(ROWS, DOSAGES_AT_ONCE // max(1, len(self._features))))
        for start in range(0, len(chosen), size):
            rows = chosen[start : start + size]
            x = np.empty((len(rows), len(self._features)))  # (rows, features)
            x[:, :n_table] = self._table[rows]
            x[:, n_table:] = _copies(self._dosage[rows])
            event = None if self._event is None else self._event[rows]
            yield Block(
                standardised(x, self._features), self._outcome[rows].copy(), self._split[rows, 1], self._split[rows, 2], event
            )  # fmt: skip

    def columns(self, part: Part) -> Columns:
        """Table and outcome of one part."""
        rows = self._rows(part)
        event = None if self._event is None else self._event[rows]
        return Columns(self._table[rows], self._outcome[rows], self._split[rows, 1], self._split[rows, 2], event)

    def dosages(self, part: Part) -> Iterator[Dosages]:
        """Blocks of variants of all patients of one part; each is read from disk when it is asked for."""
        rows = self._rows(part)
        whole = len(rows) == len(self._outcome)
        width = max(16, DOSAGES_AT_ONCE // max(len(rows), 1))
        for first in range(0, self._dosage.shape[1], width):
            block = self._dosage[:, first : first + width]
            yield Dosages(first, _copies(block if whole else block[rows]))

    def gradient(
        self, plan: TrainingPlan, weights: Mapping[str, NDArray[np.float64]]
    ) -> dict[str, NDArray[np.float64]]:
        """The clipped sum of one round; the sample, where the plan has a rate, is drawn anew."""
        if plan.gradients == "closed":
            rows = self._rows(plan.part)
            rows = rows[poisson_mask(len(rows), Decimal(plan.rate), os.urandom)]
            if self._linear is None:
                known = Constants.load(self._folder, self._checked, self._features)
                known = known or constants(self._features, self._dosage)
                self._linear = closed.Linear(self._features, self._dosage, self._table, self._outcome, known)
            return self._linear.clipped_sum(plan, rows, weights)
        return clipped_sum(plan, self._study, self.blocks(plan.part), weights, os.urandom, self._device)

    def some(self, part: Part, variants: Sequence[int]) -> NDArray[np.float64]:
        """A few variants of all patients of one part, by their places in the study's list."""
        return _copies(self._dosage[:, list(variants)][self._rows(part)])

    def _rows(self, part: Part) -> NDArray[np.int64]:
        if part == "all":
            return np.arange(len(self._outcome))
        return np.flatnonzero(self._split[:, 0] == (1 if part == "test" else 0))


def _copies(stored: NDArray[Any]) -> NDArray[np.float64]:
    stored = np.asarray(stored)
    copies = stored.astype(np.float64)
    missing = stored < 0
    if missing.any():
        copies[missing] = np.nan
    return copies


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError):
        raise SiteError(
            "there is no frozen cohort for this study", hint="`sequester-client data freeze STUDY` makes it"
        ) from None
    if not isinstance(manifest, dict) or manifest.get("format") != 1:
        raise SiteError("the frozen cohort's manifest is of an unknown format", hint="freeze it again")
    return manifest


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError:
        return ""
    return digest.hexdigest()
