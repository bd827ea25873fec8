"""Peak memory by kind of process, sampled twice a second over everything that was started and all it started in turn.

Linux keeps the peak of each process itself (`VmHWM`), so a peak between two samples is not missed. Processes are known by
id and start time: an id that was given again is another process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

EVERY_S = 0.5
GRACE_S = 20.0
# What a command line holds -> what kind of process it is; the first that fits. Others are of the kind that started them.
KINDS = (
    ("sequester.client.compute.worker", "compute"),
    ("sequester.client.release_worker", "release gate"),
    ("sequester.client.gate.flower.executor", "executor"),
    ("sequester.client.gate.flower.supernode", "SuperNode"),
    ("flower-supernode", "SuperNode"),
    ("sequester.server.flower.superlink", "SuperLink"),
    ("flwr-serverapp", "ServerApp"),
    ("sequester.server.flower.superexec", "SuperExec"),
    ("flower-superexec", "SuperExec"),
)


@dataclass(slots=True)
class Watch:
    """Follows processes from a thread of its own."""

    peak_mb: dict[str, float] = field(default_factory=dict)  # of one process of that kind
    together_mb: float = 0.0  # of all of them at one moment; shared pages count once for each
    _roots: dict[int, str] = field(default_factory=dict)
    _seen: dict[tuple[int, float], int] = field(default_factory=dict)  # (id, start) -> the root it came from
    _turn: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def follow(self, pid: int, kind: str) -> None:
        """Count this process, under this kind, and its descendants."""
        with self._turn:
            self._roots[pid] = kind

    def start(self) -> None:
        """Sample until `stop`."""
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No more samples."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(10)

    def peaks(self) -> dict[str, int]:
        """Kind -> MB, rounded; `all at once` is the largest sum of one moment."""
        with self._turn:
            found = {kind: round(mb) for kind, mb in sorted(self.peak_mb.items())}
            return found | {"all at once": round(self.together_mb)}

    def sample(self) -> None:
        """One look at every process."""
        with self._turn:
            roots = dict(self._roots)
        together = 0.0
        for pid, kind in roots.items():
            try:
                root = psutil.Process(pid)
                family = [root, *root.children(recursive=True)]
            except psutil.Error:
                with self._turn:
                    self._roots.pop(pid, None)
                continue
            for process in family:
                try:
                    words = process.cmdline()
                    now, born = process.memory_info().rss / 2**20, process.create_time()
                except psutil.Error:
                    continue
                peak = max(now, _high_water_mb(process.pid))
                what = kind_of(words, kind)
                together += now
                with self._turn:
                    self._seen[process.pid, born] = pid
                    self.peak_mb[what] = max(self.peak_mb.get(what, 0.0), peak)
        with self._turn:
            self.together_mb = max(self.together_mb, together)

    def end_orphans(self, root: int | None = None) -> list[str]:
        """Ends what outlived those that started it (all, or one root's); a sentence for each.

        They get a few seconds first: a child may notice its parent's end by itself.
        """
        with self._turn:
            seen = [key for key, of in self._seen.items() if root is None or of == root]
        alive = _living(seen)
        deadline = time.monotonic() + GRACE_S
        while alive and time.monotonic() < deadline:
            time.sleep(0.1)
            alive = _living(seen)
        said = []
        for process in alive:
            try:
                words = " ".join(process.cmdline())[:120]
                process.kill()
                process.wait(5)
            except psutil.Error:
                continue
            said.append(f"process {process.pid} outlived what started it: {words}")
        return said

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            self.sample()


def kind_of(words: Sequence[str], inherited: str) -> str:
    """The kind of a process by its command line."""
    line = " ".join(words)
    return next((kind for mark, kind in KINDS if mark in line), inherited)


def _high_water_mb(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text("ascii", "replace")
    except OSError:
        return 0.0
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), "VmHWM: 0 kB")
    return int(line.split()[1]) / 1024


def _living(seen: Sequence[tuple[int, float]]) -> list[psutil.Process]:
    found = []
    for pid, born in seen:
        try:
            process = psutil.Process(pid)
            if process.create_time() == born and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found
