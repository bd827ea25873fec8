"""`make bench`: every benchmark of this folder in one run, written to bench-out/bench.json with the machine it ran on."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

from bench import rounds

OUT = Path("bench-out")


def main() -> None:
    """Run them one after another; a figure is printed as soon as it is known."""
    figures = []
    for values in (1_000, 1_000_000):
        for noise in (True, False):
            figure = {"name": "round_seconds", **rounds.measure(3, values, noise)}
            print(json.dumps(figure), flush=True)
            figures.append(figure)
    OUT.mkdir(exist_ok=True)
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    (OUT / "bench.json").write_text(json.dumps({"format": 1, "machine": machine, "figures": figures}, indent=2) + "\n")
    print(f"{OUT / 'bench.json'}: {len(figures)} figures")


if __name__ == "__main__":
    main()
