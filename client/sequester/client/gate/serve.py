"""Starts everything a site runs and stops it again: gate, door, forwarder, SuperNode, executor, control socket.

One process (this one) holds the keys; the SuperNode and the executor are children with their own Flower homes, or
separate units of the operating system where a hospital runs them under other accounts (`deploy/systemd`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sequester.client import isolation
from sequester.client.config import Home, SiteConfig
from sequester.client.gate import control, tls
from sequester.client.gate.flower.door import is_digest, serve_door
from sequester.client.gate.flower.forwarder import serve_forwarder
from sequester.client.gate.gate import Consortium
from sequester.client.gate.ledger import Ledger
from sequester.client.gate.units import free_port, meeting
from sequester.protocols.errors import SequesterError, SiteError

log = logging.getLogger("sequester.gate")

CONTROL_BYTES_S = 60.0  # what the SuperNode's connections carried goes into the ledger so often, and at the end
_BACKOFF_S = {"supernode": (5.0, 70.0), "executor": (1.0, 10.0)}  # a killed SuperNode may not return for 60 s
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
_PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


class _JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, text. Texts are ours and hold no data of a person."""

    def format(self, record: logging.LogRecord) -> str:
        row: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "from": record.name,
            "text": record.getMessage(),
        }
        return json.dumps(row)


def log_to_stderr() -> None:
    """JSON lines on standard error for everything this process logs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


async def serve(home: Home, units: bool = False) -> None:
    """Run the site until SIGTERM or SIGINT. With `units` SuperNode and executor are somebody else's to start (`units.py`)."""
    log_to_stderr()
    isolation.no_core_dumps()
    config = home.config()
    names = home.consortia()
    if not names:
        asked = "`sequester-client enrol --resume` goes on with the one under way"
        raise SiteError(
            "this site belongs to no consortium yet",
            hint=asked if home.enrolling() else "`sequester-client enrol` joins one",
        )
    if faults := [fault for name in names for fault in tls.key_faults(home.consortium(name))]:
        more = f" ({len(faults) - 1} more)" if len(faults) > 1 else ""
        raise SiteError(
            f"{faults[0]}{more}: a key is there and its owner's alone",
            hint="`chmod 600` for keys, 640 for superexec.secret; enrol again where one is missing",
        )
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    ledger = Ledger(home.dataset(config.data.id))
    branches = [Branch(home, name, config, ledger, units) for name in names]
    try:
        desk = await control.serve(home.run / "gate.sock", Desk(branches).answer)
        for branch in branches:
            await branch.open()
        log.info("site %s runs for %s", config.site.id, ", ".join(names))
        work = [asyncio.create_task(branch.look_after()) for branch in branches]
        waiting = asyncio.create_task(stopping.wait())
        done, _ = await asyncio.wait([waiting, *work], return_when=asyncio.FIRST_COMPLETED)
        for task in [*work, waiting]:
            task.cancel()
        desk.close()
        for task in done:
            if not task.cancelled():
                task.result()  # a fault of the code ends the process: a supervisor starts it again
    finally:
        for branch in branches:
            await branch.close()
        (home.run / "gate.sock").unlink(missing_ok=True)
        ledger.close()
        log.info("site %s has stopped", config.site.id)


@dataclass(slots=True)
class Child:
    """One child process, started again with growing pauses when it ends."""

    kind: str
    command: list[str]
    env: dict[str, str]
    log_file: Path
    process: subprocess.Popen[bytes] | None = None
    again_at: float = 0.0
    pause_s: float = field(default=0.0)

    def look(self) -> None:
        """Start it where it does not run and its pause is over."""
        now = time.monotonic()
        if self.process is not None and self.process.poll() is None:
            return
        least, most = _BACKOFF_S[self.kind]
        if self.process is not None:
            log.warning("the %s ended with status %s", self.kind, self.process.returncode)
            self.pause_s = min(most, max(least, 2 * self.pause_s))
            self.again_at, self.process = now + self.pause_s, None
        if now >= self.again_at:
            with self.log_file.open("ab") as out:
                self.process = subprocess.Popen(
                    self.command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self.env
                )

    def stop(self, grace_s: float = 5.0) -> None:
        """SIGTERM, then SIGKILL."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Branch:
    """Everything that runs for one consortium: its sessions, its door, its forwarder, its two Flower processes."""

    def __init__(self, home: Home, name: str, config: SiteConfig, ledger: Ledger, units: bool = False) -> None:
        self.name = name
        self._units = units
        self.consortium = Consortium(home, name, config, ledger)
        self._home = home
        self._https_proxy = config.network.https_proxy
        self._ledger = ledger
        self._servers: list[asyncio.Server] = []
        self._children: list[Child] = []
        self._control = [0, 0]  # bytes up and down of closed control connections, not yet in the ledger

    async def open(self) -> None:
        """Door and forwarder first, then what needs them; studies that were under way are taken up again."""
        place = tls.membership(self._home.consortium(self.name))
        door = self._home.run / f"{self.name}.door"
        self._servers.append(await serve_door(door, self.consortium))
        kept = meeting(self._home.run / f"{self.name}.env") if self._units else None
        forwarder, port = await serve_forwarder(
            place.host, place.superlink_port, self._https_proxy, self._carried, kept.forwarder_port if kept else 0
        )
        self._servers.append(forwarder)
        if kept is None:
            self._children = self._flower(port, door)
        await self.consortium.resume()

    async def look_after(self) -> None:
        """Keep the children running, and the ledger told of what the control connection carried."""
        written = time.monotonic()
        while True:
            for child in self._children:
                child.look()
            if time.monotonic() - written >= CONTROL_BYTES_S:
                self._write_control_bytes()
                await self.consortium.release.send_all()
                written = time.monotonic()
            await asyncio.sleep(0.5)

    async def close(self) -> None:
        """Stop everything of this consortium."""
        for child in self._children:
            await asyncio.to_thread(child.stop)
        await self.consortium.stop()
        for server in self._servers:
            server.close()
        (self._home.run / f"{self.name}.door").unlink(missing_ok=True)
        self._write_control_bytes()

    def _carried(self, up: int, down: int) -> None:
        self._control[0] += up
        self._control[1] += down

    def _write_control_bytes(self) -> None:
        up, down = self._control
        if up or down:
            try:
                self._ledger.append("control", {"consortium": self.name, "bytes": up, "bytes_down": down})
            except SiteError as error:
                log.error("%s; %s", error.message, error.hint)  # written when there is room: nothing was taken away
                return
            self._control = [self._control[0] - up, self._control[1] - down]

    def _flower(self, forwarder_port: int, door: Path) -> list[Child]:
        folder = self._home.consortium(self.name)
        secret = folder / "superexec.secret"
        port = free_port()
        python = [sys.executable, "-m"]
        supernode = [
            *python, "sequester.client.gate.flower.supernode", "--superlink", f"127.0.0.1:{forwarder_port}",
            "--folder", str(folder), "--port", str(port), "--secret-file", str(secret),
        ]  # fmt: skip
        executor = [
            *python, "sequester.client.gate.flower.executor", "--runtime", f"127.0.0.1:{port}",
            "--secret-file", str(secret), "--door", str(door),
        ]  # fmt: skip
        self._home.log.mkdir(mode=0o700, exist_ok=True)
        return [
            Child(kind, command, self._env(kind), self._home.log / f"{kind}-{self.name}.log")
            for kind, command in (("supernode", supernode), ("executor", executor))
        ]

    def _env(self, kind: str) -> dict[str, str]:
        place = self._home.run / f"flower-{kind}-{self.name}"
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        kept = {key: value for key, value in os.environ.items() if key not in _PROXIES}
        return {**kept, **_QUIET, "FLWR_HOME": str(place)}


class Desk:
    """What `sequester-client status`, `stop` and `answer` ask of the running gate."""

    def __init__(self, branches: list[Branch]) -> None:
        self._branches = branches

    async def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """One answer; what cannot be done is said as `error` and `hint`."""
        try:
            match request.get("ask"):
                case "status":
                    return {"studies": [row for b in self._branches for row in b.consortium.rows()]}
                case "withdraw":
                    consortium, digest = self._find(str(request.get("study", "")))
                    await consortium.sessions[digest].withdraw()
                    return {"said": f"study {digest[:12]}: this hospital has left it."}
                case "answer":
                    consortium, digest = self._find(str(request.get("study", "")))
                    session = consortium.sessions[digest]
                    if not session.holds:
                        raise SiteError(f"no round of study {digest[:12]} waits for an answer", hint="nothing was done")
                    yes = request.get("yes") is True
                    await session.answer_hold(yes)
                    return {"said": f"study {digest[:12]}: the round {'goes out' if yes else 'was refused'}."}
                case "try" | "trial" | "send" as what:
                    return await self._release(what, self._of(request), str(request["study"]), request.get("form"))
                case _:
                    raise SiteError("the gate does not know that question", hint="update the older of the two programs")
        except SequesterError as error:
            return {"error": error.message, "hint": error.hint}

    async def _release(self, what: str, consortium: Consortium, digest: str, form: Any) -> dict[str, Any]:
        """Of the release gate: start a trial, say how far it is, hand over what was signed."""
        study, gate = consortium.stored(digest), consortium.release
        if what == "send":
            return {"sent": await gate.send(digest)}
        if what == "try" and form is None:
            consortium.try_out(digest)
        elif what == "try":
            gate.start(study, digest, "full" if form == "full" else "short")
        trial = gate.trial(digest)
        if trial is None or trial.task is None:
            raise SiteError(
                f"no trial of study {digest[:12]} has run here", hint="`sequester-client audit release` starts one"
            )
        if trial.error is not None:
            raise trial.error
        return {"running": not trial.task.done(), "said": trial.said, "part": trial.part}

    def _of(self, request: dict[str, Any]) -> Consortium:
        found = [b.consortium for b in self._branches if b.consortium.name == request.get("consortium")]
        if len(found) != 1 or not is_digest(str(request.get("study"))):
            raise SiteError(
                "this gate does not run for that consortium", hint="start it again with `sequester-client run`"
            )
        return found[0]

    def _find(self, prefix: str) -> tuple[Consortium, str]:
        found = [
            (b.consortium, digest)
            for b in self._branches
            for digest in b.consortium.sessions
            if digest.startswith(prefix)
        ]
        if len(found) != 1 or len(prefix) < 4:
            raise SiteError(
                f"{len(found)} running studies start with `{prefix[:64]}`, one was expected",
                hint="`sequester-client status` lists them; give at least four letters",
            )
        return found[0]
