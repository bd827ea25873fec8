"""Where SuperNode, executor and gate meet on loopback when the first two are units of the operating system.

With `sequester-client run --units` the gate starts neither: they run under accounts of their own (`deploy/systemd`), which
cannot read a key or a ledger. The gate chooses both ports once and keeps them in `run/<consortium>.env`, which systemd
reads; a unit that is started before the gate is back still knows where it will be.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from sequester.protocols.errors import SiteError


@dataclass(frozen=True, slots=True)
class Meeting:
    """Ports on 127.0.0.1: the gate's forwarder, and the SuperNode's Runtime API."""

    forwarder_port: int
    runtime_port: int

    def text(self) -> str:
        """The environment file."""
        return f"SUPERLINK=127.0.0.1:{self.forwarder_port}\nRUNTIME_PORT={self.runtime_port}\n"


def meeting(path: Path) -> Meeting:
    """The ports of last time, new ones where there was none; the file says so when this returns."""
    if path.exists():
        rows = dict(line.split("=", 1) for line in path.read_text("utf-8").splitlines() if "=" in line)
        try:
            return Meeting(int(rows["SUPERLINK"].rpartition(":")[2]), int(rows["RUNTIME_PORT"]))
        except (KeyError, ValueError):
            raise SiteError(
                f"{path} is damaged", hint="remove it, start the gate again, then the SuperNode and executor units"
            ) from None
    found = Meeting(free_port(), free_port())
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    unfinished = path.with_suffix(".new")
    unfinished.write_text(found.text(), "utf-8")
    unfinished.chmod(0o600)
    unfinished.replace(path)
    return found


def free_port() -> int:
    """A port of 127.0.0.1 where nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
