"""Keeps Flower running beside the exchange and lets it call hospitals to studies.

SuperLink and SuperExec are children with their own logs; one that ends is started again. A study has one Flower run, which
lives until every hospital's stream stands and the study is over; a run that failed is replaced, for joins are idempotent.
Of Flower's states only `finished:stopped` means anything here: somebody stopped the run, so the study is withdrawn.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sequester.protocols.errors import SequesterError, StudyError
from sequester.server.config import Home
from sequester.server.exchange import Exchange
from sequester.server.ports import Ports, bind_address

if TYPE_CHECKING:
    from sequester.server.flower.control import Control

log = logging.getLogger("sequester.exchange")

POLL_S = 2.0
AGAIN_S = 5.0  # between two starts of the same thing
_START_S = 60.0
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


@dataclass(slots=True)
class Child:
    """A child process and when it was last started."""

    name: str
    process: subprocess.Popen[bytes] | None = None
    started: float = -AGAIN_S

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self, command: list[str], env: dict[str, str], log_file: Path) -> None:
        """Start it; its output goes to its own log."""
        log_file.parent.mkdir(mode=0o700, exist_ok=True)
        with log_file.open("ab") as out:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env)
        self.started = time.monotonic()

    def stop(self, grace_s: float = 5.0) -> None:
        """SIGTERM, then SIGKILL."""
        if self.process is None:
            return
        if self.is_alive:
            self.process.terminate()
            try:
                self.process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


class Dispatcher:
    """SuperLink, SuperExec and the Flower runs of the studies that run."""

    def __init__(self, home: Home, host: str, exchange: Exchange, ports: Ports) -> None:
        self._home = home
        self._host = host
        self._exchange = exchange
        self._ports = ports
        self._superlink = Child("superlink")
        self._superexec = Child("superexec")
        self._control: Control | None = None
        self._called: dict[str, float] = {}  # digest -> when its run was last started
        self._ours: set[str] = set()  # runs that this exchange stopped itself
        self.ready = asyncio.Event()

    async def run(self) -> None:
        """Look after everything every two seconds, and at once when a study starts or ends."""
        while True:
            try:
                await self._look()
            except SequesterError as error:
                log.warning("flower: %s", error.message)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._exchange.changed.wait(), POLL_S)
            self._exchange.changed.clear()

    async def stop(self) -> None:
        """End both children."""
        for child in (self._superexec, self._superlink):
            await asyncio.to_thread(child.stop)

    async def node_key(self, site: str, key: bytes | None) -> None:
        """Register a hospital's SuperNode key, or strike the hospital; a dead SuperLink is told when it is back."""
        if self._control is None:
            return
        try:
            if key is None:
                await asyncio.to_thread(self._control.unregister, site)
            else:
                await asyncio.to_thread(self._control.register, key, site)
        except SequesterError as error:
            log.warning("flower: %s", error.message)

    async def stop_run(self, digest: str) -> None:
        """End a study's Flower run, after its streams were told."""
        run_id, _ = self._exchange.store.run(digest)
        if run_id and self._control is not None:
            self._ours.add(run_id)
            try:
                await asyncio.to_thread(self._control.stop, run_id)
            except SequesterError as error:
                log.warning("flower: %s", error.message)

    # ---- children -----------------------------------------------------------------------------------------------

    async def _look(self) -> None:
        now = time.monotonic()
        if not self._superlink.is_alive and now - self._superlink.started >= AGAIN_S:
            self._start_superlink()
        if self._control is None:
            await self._reach_superlink()
        if self._control is None:
            return
        if not self._superexec.is_alive and now - self._superexec.started >= AGAIN_S:
            self._start_superexec()
        for digest in self._exchange.running():
            await self._call(digest)

    @property
    def _place(self) -> Path:
        """Where the SuperLink says on which ports it listens, once it does."""
        return self._home.exchange / "run" / "superlink.json"

    def _start_superlink(self) -> None:
        folder = self._home.exchange
        self._place.unlink(missing_ok=True)
        self._control = None
        command = [
            sys.executable, "-m", "sequester.server.flower.superlink", "--folder", str(folder),
            "--host", bind_address(self._host), "--public-port", str(self._ports["superlink_port"]),
            "--private-port", str(self._ports["control_port"]),
        ]  # fmt: skip
        self._superlink.start(command, self._env("superlink"), folder / "log" / "superlink.log")

    async def _reach_superlink(self) -> None:
        """Tell a SuperLink that listens of every hospital; where it answers too late, the next look tries again."""
        until = time.monotonic() + _START_S
        while not self._place.exists():
            if not self._superlink.is_alive or time.monotonic() > until:
                log.error(
                    "the SuperLink did not start on ports %d and %d: is one of them taken? see log/superlink.log",
                    self._ports["superlink_port"],
                    self._ports["control_port"],
                )
                return
            await asyncio.sleep(0.1)
        from sequester.server.flower.control import Control

        chosen = json.loads(self._place.read_text("utf-8"))
        self._ports.choose(superlink_port=chosen["public_port"], control_port=chosen["private_port"])
        control = Control(chosen["private_port"])
        for body in self._exchange.members():
            try:
                await asyncio.to_thread(control.register, body["supernode_key"].encode(), body["site"])
            except StudyError as error:  # one hospital's key is no reason to leave the others out
                log.warning("flower: %s; %s", error.message, error.hint)
        self._control = control
        self.ready.set()
        log.info("SuperLink listens on port %s", chosen["public_port"])

    def _start_superexec(self) -> None:
        from sequester.server.flower.superlink import superexec_command

        folder = self._home.exchange
        command = superexec_command(self._ports["control_port"], folder / "superexec.secret")
        env = self._env("superexec") | {"SEQUESTER_DISPATCH_SOCKET": str(self._home.dispatch_socket)}
        self._superexec.start(command, env, folder / "log" / "superexec.log")

    def _env(self, role: str) -> dict[str, str]:
        home = self._home.exchange / "run" / f"flower-{role}"
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        return {**os.environ, **_QUIET, "FLWR_HOME": str(home)}

    # ---- runs ---------------------------------------------------------------------------------------------------

    async def _call(self, digest: str) -> None:
        """See to it that a study that still misses hospitals has a living Flower run."""
        assert self._control is not None
        store = self._exchange.store
        run_id, epoch = store.run(digest)
        if run_id:
            status = await asyncio.to_thread(self._control.status, run_id)
            if status == "finished:stopped" and run_id not in self._ours:
                await self._exchange.stopped_by_flower(digest)
                return
            if status and not status.startswith("finished"):
                return
        if digest not in self._exchange.running() or self._exchange.all_stand(digest):
            return
        if time.monotonic() - self._called.get(digest, -AGAIN_S) < AGAIN_S:
            return
        self._called[digest] = time.monotonic()
        _, bundle = store.study(digest)
        started = await asyncio.to_thread(self._control.start, bundle, digest)
        store.set_run(digest, started, epoch)
        log.info("study %s: Flower run %s calls its hospitals", digest[:12], started)
