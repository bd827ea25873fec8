"""What the oracle tests measured: each comparison is checked against its tolerance here and kept for the table.

`PYTHONPATH=tests python -m oracles.table` runs the oracle tests and the examples through real processes, and writes
`tests/oracles/README.md`; with paths of tests after it, those alone, and every other row stays as it is.
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


HERE = Path(__file__).parent
REAL = "real processes, "  # what the analysis of a row begins with that was measured through all processes
HEADER = """# Oracles

Written by `PYTHONPATH=tests python -m oracles.table`, which runs every test of this folder and the examples of
`deploy/examples` (an hour); with paths of tests it measures their rows again. Each row is the largest difference over all
cases of a test between the federated result and another program, or another method, on the pooled data. A row beyond its
tolerance fails the test that measured it.
"""
REAL_HEADER = """
The same through the real processes (SuperLink, SuperNodes, gates and compute over mutual TLS, five hospitals), by
`python deploy/examples/run.py`: studies that run every analysis in order.
"""
COLUMNS = "| analysis | oracle | quantity | largest difference | tolerance |\n|---|---|---|---|---|"
Rows = dict[tuple[str, str, str], tuple[str, str]]


def main(paths: list[str]) -> None:
    """Run the tests, write the table; fail where a test fails."""
    tests = paths or [str(HERE), str(HERE.parent / "system/test_real_studies.py")]
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(command, env={**os.environ, KEPT: str(lines)}, cwd=HERE.parents[1], check=False)
        measured = [json.loads(line) for line in lines.read_text("utf-8").splitlines()] if lines.exists() else []
    rows, figures = kept(HERE / "README.md") if paths else ({}, {})
    worst: dict[tuple[str, str, str], list[float]] = {}
    for analysis, oracle, quantity, difference, tolerance in (row for row in measured if isinstance(row, list)):
        seen = worst.setdefault((analysis, oracle, quantity), [0.0, tolerance])
        seen[0], seen[1] = max(seen[0], difference), min(seen[1], tolerance)
    rows |= {key: (f"{difference:.1e}", f"{tolerance:g}") for key, (difference, tolerance) in worst.items()}
    told = [row for row in measured if isinstance(row, dict)]
    for title in dict.fromkeys(row["title"] for row in told):
        mine = [row for row in told if row["title"] == title]
        columns = list(mine[0]["values"])
        text = [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
        for row in mine:
            text.append(f"| {row['row']} | " + " | ".join(f"{row['values'][c]:.3f}" for c in columns) + " |")
        figures[title] = text
    (HERE / "README.md").write_text("\n".join(written(rows, figures)) + "\n", "utf-8")
    sys.exit(done.returncode)


def written(rows: Rows, figures: dict[str, list[str]]) -> list[str]:
    """The page, line by line."""
    printed = {
        key: f"| {' | '.join(key)} | {difference} | {tolerance} |"
        for key, (difference, tolerance) in sorted(rows.items())
    }
    text = [HEADER, COLUMNS, *(line for key, line in printed.items() if not key[0].startswith(REAL))]
    real = [line.replace(REAL, "", 1) for key, line in printed.items() if key[0].startswith(REAL)]
    if real:
        text += [REAL_HEADER, COLUMNS, *real]
    for title, lines in figures.items():
        text += ["", f"{title}:", "", *lines]
    if shutil.which("plink2") is None:
        text += ["", "PLINK 2 was not installed: its rows are missing."]
    return text


def kept(page: Path) -> tuple[Rows, dict[str, list[str]]]:
    """Rows and figures of a page that `written` wrote."""
    rows: Rows = {}
    figures: dict[str, list[str]] = {}
    title, prefix = "", ""
    for line in page.read_text("utf-8").splitlines():
        if line == REAL_HEADER.strip().splitlines()[0]:
            prefix = REAL
        elif line.startswith("|") and title:
            figures.setdefault(title, []).append(line)
        elif line.startswith("| ") and line not in COLUMNS:
            analysis, oracle, quantity, difference, tolerance = line.strip("| ").split(" | ")
            rows[prefix + analysis, oracle, quantity] = (difference, tolerance)
        elif line.endswith(":"):
            title = line[:-1]
    return rows, figures


if __name__ == "__main__":
    main(sys.argv[1:])
