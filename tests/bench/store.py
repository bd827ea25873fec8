"""Studies over many variants and the frozen stores of their patients, drawn at random, as `ingest` would write them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import training_cases
from sequester.client.compute.training.constants import constants
from sequester.protocols.study import Study

MISSING = 0.005
FREQUENCY = 0.3


def study(variants: int, plan: dict[str, Any], **changed: Any) -> Study:
    """A study of that many variants, each of frequency 0.3, without covariates."""
    return training_cases.study(variants, plan, **changed)


def genotypes(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.int8]:
    """Copies of the effect allele, int8, 0.5 % missing (-9)."""
    draw = rng.integers(0, 10_000, shape, dtype=np.int16)
    edges = [(1 - FREQUENCY) ** 2, 1 - FREQUENCY**2, 1 - MISSING]  # 0, 1, 2, missing: 2 gives way to the last
    copies = (draw >= edges[0] * 10_000).astype(np.int8) + (draw >= edges[1] * 10_000)
    copies[draw >= edges[2] * 10_000] = -9
    return copies


def frozen(folder: Path, patients: int, variants: int, seed: int = 1) -> Path:
    """A store of random patients; rows are written as they are drawn, so that memory does not grow with them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    dosage = np.lib.format.open_memmap(folder / "dosage.npy", "w+", np.int8, (patients, variants))
    rows = max(1, 4_000_000 // variants)
    for at in range(0, patients, rows):
        dosage[at : at + rows] = genotypes(rng, (min(rows, patients - at), variants))
    dosage.flush()
    return _finished(folder, np.zeros((patients, 0)), (rng.random(patients) < 0.4).astype(np.float64))


def written(folder: Path, dosage: NDArray[np.int8], table: NDArray[np.float64], outcome: NDArray[np.float64]) -> Path:
    """A store of these patients."""
    folder.mkdir(parents=True)
    np.save(folder / "dosage.npy", dosage)
    return _finished(folder, table, outcome)


def with_constants(folder: Path, of: Study) -> None:
    """Add what `data freeze` keeps of the records beside the dosages of a study with closed-form gradients."""
    found = constants(of.features(), np.load(folder / "dosage.npy", mmap_mode="r"))
    for name, array in found.arrays().items():
        np.save(folder / f"{name}.npy", array)
    _manifest(folder)


def _finished(folder: Path, table: NDArray[np.float64], outcome: NDArray[np.float64]) -> Path:
    np.save(folder / "table.npy", table)
    np.save(folder / "outcome.npy", outcome)
    np.save(folder / "split.npy", np.zeros((len(outcome), 3), dtype=np.int64))
    _manifest(folder)
    return folder


def _manifest(folder: Path) -> None:
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.npy"))}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
