"""What the oracle tests measured: each comparison is checked against its tolerance here and kept for the table.

`PYTHONPATH=tests python -m oracles.table` runs the oracle tests and writes `tests/oracles/README.md`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

KEPT = "SEQUESTER_ORACLE_TABLE"  # names the file that collects lines while the table is made


def record(
    analysis: str, oracle: str, quantity: str, ours: Any, theirs: Any, *, rtol: float = 0.0, atol: float = 0.0
) -> None:
    """Fail where `ours` is further from `theirs` than one of the two tolerances; keep the largest difference."""
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    assert a.shape == b.shape and a.size, f"{a.shape} against {b.shape}"
    assert np.isfinite(a).all() and np.isfinite(b).all()
    difference = float(np.max(np.abs(a - b) / (np.abs(b) if rtol else 1.0)))
    within(analysis, oracle, quantity, difference, rtol or atol)


def within(analysis: str, oracle: str, quantity: str, difference: float, tolerance: float) -> None:
    """Keep a measured difference, which must not exceed the tolerance."""
    if kept := os.environ.get(KEPT):
        with Path(kept).open("a", encoding="utf-8") as file:
            file.write(
                json.dumps([analysis, f"{oracle} {version(oracle)}".strip(), quantity, difference, tolerance]) + "\n"
            )
    assert difference <= tolerance, f"{analysis}, {quantity}: {difference:.3g} beyond {tolerance:g}"


def figure(title: str, row: str, values: dict[str, float]) -> None:
    """Keep a row of figures that are told, not compared."""
    if kept := os.environ.get(KEPT):
        with Path(kept).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"title": title, "row": row, "values": values}) + "\n")


def version(oracle: str) -> str:
    """The version of an oracle that is a package or PLINK."""
    if oracle == "PLINK 2":
        said = subprocess.run(["plink2", "--version"], capture_output=True, text=True, check=False).stdout
        return said.split()[1].removeprefix("v") if said else ""
    package = {"scipy.optimize": "scipy", "scipy.linalg": "scipy", "sklearn": "scikit-learn"}.get(oracle, oracle)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def main() -> None:
    """Run the oracle tests, write the table; fail where a test fails."""
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here)]
        done = subprocess.run(command, env={**os.environ, KEPT: str(lines)}, cwd=here.parents[1], check=False)
        rows = [json.loads(line) for line in lines.read_text("utf-8").splitlines()]
    told = [row for row in rows if isinstance(row, dict)]
    rows = [row for row in rows if isinstance(row, list)]
    worst: dict[tuple[str, str, str], list[float]] = {}
    for analysis, oracle, quantity, difference, tolerance in rows:
        seen = worst.setdefault((analysis, oracle, quantity), [0.0, tolerance])
        seen[0], seen[1] = max(seen[0], difference), min(seen[1], tolerance)
    text = [
        "# Oracles",
        "",
        "Written by `PYTHONPATH=tests python -m oracles.table`, which runs every test of this folder. Each row is the largest",
        "difference over all cases of a test between the federated result and another program, or another method, on",
        "the pooled data. A row beyond its tolerance fails the test that measured it.",
        "",
        "| analysis | oracle | quantity | largest difference | tolerance |",
        "|---|---|---|---|---|",
    ]
    for (analysis, oracle, quantity), (difference, tolerance) in sorted(worst.items()):
        text.append(f"| {analysis} | {oracle} | {quantity} | {difference:.1e} | {tolerance:g} |")
    for title in dict.fromkeys(row["title"] for row in told):
        mine = [row for row in told if row["title"] == title]
        columns = list(mine[0]["values"])
        text += ["", f"{title}:", "", f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
        for row in mine:
            cells = " | ".join(f"{row['values'][column]:.3f}" for column in columns)
            text.append(f"| {row['row']} | {cells} |")
    if shutil.which("plink2") is None:
        text += ["", "PLINK 2 was not installed: its rows are missing."]
    (here / "README.md").write_text("\n".join(text) + "\n", "utf-8")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
