"""The frame of every benchmark: equal interleaved repeats, one row a figure, the machine it ran on.

A row is {name, cell, unit, ours, peer, ratio: {median, min, max}, at_least, met, note}. `ours` and `peer` are medians over
the repeats. A ratio belongs to one pair of neighbouring repeats, so that a machine that slows down slows both sides; it is
peer / ours for seconds and bytes, ours / peer for rates. `met` is None where nothing is promised or nothing could be
compared; the note then says why. Lines go to a file as soon as they are known.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Seconds = Callable[[], float]


def timed(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved(tasks: Mapping[str, Seconds], turns: int, turn_s: float = 0.5) -> dict[str, list[float]]:
    """Seconds of each task in each turn; one unmeasured pass first.

    A turn is the same number of calls for every task, one after another (as many as fit `turn_s`, 20 at most); the best
    call of a task counts, so that what else the machine does weighs on neither side.
    """
    once = sum([task() for task in tasks.values()])
    calls = max(1, min(20, int(turn_s / max(once, 1e-9))))
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(turns):
        passes = [[task() for task in tasks.values()] for _ in range(calls)]
        for name, seconds in zip(tasks, zip(*passes, strict=True), strict=True):
            taken[name].append(min(seconds))
    return taken


@dataclass(slots=True)
class Bench:
    """Where a group puts its rows. `quick`: small cells, few repeats."""

    quick: bool
    out: Path
    peers: Path
    group: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)

    def say(self, text: str) -> None:
        """A line of progress."""
        print(f"  {text}", file=sys.stderr, flush=True)

    def compared(
        self, name: str, cell: str, ours: Sequence[float], peer: Sequence[float], *, unit: str = "s",
        at_least: float | None = None, higher: bool = False, note: str = "",
    ) -> None:  # fmt: skip
        """A row of two sides measured in turn; `higher`: more is better, the ratio is ours / peer."""
        ratios = [a / b if higher else b / a for a, b in zip(ours, peer, strict=True)]
        ratio = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        met = None if at_least is None else ratio["median"] >= at_least
        self._row(name, cell, unit, statistics.median(ours), statistics.median(peer), ratio, at_least, met, note)

    def bounded(self, name: str, cell: str, ours: float, at_most: float, *, unit: str, note: str = "") -> None:
        """A row with an upper bound instead of a peer: the ratio is bound / ours, at least 1."""
        ratio = dict.fromkeys(("median", "min", "max"), at_most / ours)
        self._row(name, cell, unit, ours, at_most, ratio, 1.0, ours <= at_most, note or "peer: the bound")

    def reached(
        self, name: str, cell: str, ours: Sequence[float], at_least: float, *, unit: str, note: str = ""
    ) -> None:
        """A row with a lower bound instead of a peer: the ratio is ours / bound, at least 1."""
        ratios = [value / at_least for value in ours]
        ratio = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        met = ratio["median"] >= 1
        self._row(name, cell, unit, statistics.median(ours), at_least, ratio, 1.0, met, note or "peer: the bound")

    def reported(self, name: str, cell: str, ours: float, *, unit: str, note: str = "") -> None:
        """A row with nothing to compare with."""
        self._row(name, cell, unit, ours, None, None, None, None, note or "reported")

    def absent(self, name: str, cell: str, why: str) -> None:
        """A row whose peer could not be had, by name."""
        self._row(name, cell, "", None, None, None, None, None, why)

    def _row(
        self, name: str, cell: str, unit: str, ours: Any, peer: Any, ratio: Any, at_least: Any, met: Any, note: str
    ) -> None:
        row = {
            "name": name, "cell": cell, "unit": unit, "ours": ours, "peer": peer, "ratio": ratio, "at_least": at_least,
            "met": met, "note": note, "group": self.group,
        }  # fmt: skip
        self.rows.append(row)
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.say(sentence(row))


def sentence(row: Mapping[str, Any]) -> str:
    """One row in one line of text."""
    text = f"{row['name']:<24} {row['cell']:<40}"
    if row["ours"] is None:
        return f"{text} not measured: {row['note']}"
    text += f" {row['ours']:>10.4g} {row['unit']}"
    if row["ratio"] is not None:
        r = row["ratio"]
        text += f"  ratio {r['median']:.3g} ({r['min']:.3g}-{r['max']:.3g})"
    if row["at_least"] is not None:
        text += f"  at least {row['at_least']:g}: {'met' if row['met'] else 'NOT MET'}"
    return text


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    import cryptography
    import numpy

    cpu = platform.processor()
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    memory = next(
        (int(line.split()[1]) // 1024 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), None
    )
    return {
        "cpu": cpu, "cores": os.cpu_count(), "memory_mb": memory, "machine": platform.machine(),
        "system": platform.system(), "python": platform.python_version(), "numpy": numpy.__version__,
        "cryptography": cryptography.__version__,
    }  # fmt: skip


def load() -> float:
    """The load average of the last minute: what else the machine was doing."""
    return round(os.getloadavg()[0], 2)


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []
