"""A figure of a study beside the same figure from another program on everybody's data, and how far apart they may lie."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Compared:
    """The largest difference of a quantity, and the tolerance that it must not exceed."""

    analysis: str
    oracle: str
    quantity: str
    difference: float
    tolerance: float

    @property
    def is_within(self) -> bool:
        """False for a difference that is not a number, too."""
        return self.difference <= self.tolerance


def relative(analysis: str, oracle: str, quantity: str, ours: Any, theirs: Any, tolerance: float) -> Compared:
    """The largest |ours - theirs| / |theirs|."""
    a, b = _pair(ours, theirs)
    return Compared(analysis, oracle, f"{quantity}, relative", float(np.max(np.abs(a - b) / np.abs(b))), tolerance)


def absolute(analysis: str, oracle: str, quantity: str, ours: Any, theirs: Any, tolerance: float) -> Compared:
    """The largest |ours - theirs|."""
    a, b = _pair(ours, theirs)
    return Compared(analysis, oracle, quantity, float(np.max(np.abs(a - b))), tolerance)


def _pair(ours: Any, theirs: Any) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if a.shape != b.shape or not a.size:
        raise ValueError(f"{a.shape} figures beside {b.shape}")
    return a, b


def lines(rows: Sequence[Compared]) -> Iterable[str]:
    """A table for people."""
    cells = [("analysis", "oracle", "quantity", "difference", "tolerance", "")]
    for row in rows:
        verdict = "within" if row.is_within else "OUTSIDE"
        oracle = f"{row.oracle} {version(row.oracle)}".strip()
        cells.append((row.analysis, oracle, row.quantity, f"{row.difference:.1e}", f"{row.tolerance:g}", verdict))
    widths = [max(len(row[c]) for row in cells) for c in range(6)]
    for row in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def write(path: Path, rows: Sequence[Compared], told: Sequence[str]) -> None:
    """The rows and what was told beside them, as JSON."""
    of = [asdict(row) | {"within": row.is_within} for row in rows]
    path.write_text(json.dumps({"compared": of, "told": list(told)}, indent=2), "utf-8")


def version(oracle: str) -> str:
    """The version of an oracle that is a package or PLINK; "" of anything else."""
    if oracle == "PLINK 2":
        said = subprocess.run(["plink2", "--version"], capture_output=True, text=True, check=False).stdout
        return said.split()[1].removeprefix("v") if said else ""
    try:
        return importlib.metadata.version({"scipy.optimize": "scipy", "sklearn": "scikit-learn"}.get(oracle, oracle))
    except importlib.metadata.PackageNotFoundError:
        return ""
