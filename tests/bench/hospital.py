"""One hospital's gate as a process that imports what a gate imports and no more; its phases and its peak memory at the end."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

from sequester.client.config import Home
from sequester.client.gate.contribution import Outgoing
from sequester.client.gate.custodian import Custodian
from sequester.client.gate.gate import Consortium
from sequester.client.gate.ledger import Ledger
from sequester.protocols.secagg.member import Member
from sequester.protocols.signing import sha256

BUNDLE = b"a bundle without a line of program"  # loopback's


class Phases:
    """Seconds inside named functions of this process, by phase; awaiting counts, so that waits for a process are seen."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def add(self, phase: str, seconds: float) -> None:
        """One call's seconds."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def watch(self, owner: Any, name: str, phase: str) -> Any:
        """A patch of `owner.name` that counts its seconds."""
        inner = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*arguments, **named)
            finally:
                self.add(phase, time.perf_counter() - start)

        async def awaited(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return await inner(*arguments, **named)
            finally:
                self.add(phase, time.perf_counter() - start)

        return mock.patch.object(owner, name, awaited if asyncio.iscoroutinefunction(inner) else timed)


def gate(home: Path, digest: str, out: Path) -> None:
    """One hospital's gate process: joins and works until the study is over."""
    phases = Phases()
    watched = [
        (Outgoing, "draw", "noise"), (Outgoing, "take", "masks"), (Member, "contribute", "masks"),
        (Custodian, "contribution_to", "compute"),
    ]  # fmt: skip
    compute_peak = 0.0

    async def main() -> None:
        nonlocal compute_peak
        place = Home(home)
        config = place.config()
        ledger = Ledger(place.dataset(config.data.id))
        consortium = Consortium(place, "alps", config, ledger)
        start = time.perf_counter()
        await consortium.join(digest, sha256(BUNDLE))
        phases.add("dispatch", time.perf_counter() - start)
        while consortium.outcome(digest) is None:
            compute_peak = max(compute_peak, _children_peak())
            await asyncio.sleep(0.2)
        await consortium.stop()
        ledger.close()

    for owner, name, phase in watched:
        phases.watch(owner, name, phase).start()
    asyncio.run(main())
    out.write_text(json.dumps({"phases": phases.seconds, "gate_mb": peak_mb(os.getpid()), "compute_mb": compute_peak}))


def peak_mb(pid: int) -> float:
    """The peak resident set of a process, MB; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def _children_peak() -> float:
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    return max((peak_mb(int(pid)) for pid in children.read_text().split()), default=0.0) if children.exists() else 0.0
