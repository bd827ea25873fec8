"""A founded consortium whose exchange really listens on free loopback ports, in a thread of the test, without Flower."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc.aio
import typer
from typer.testing import CliRunner, Result

from sequester.client.config import Home as SiteHome
from sequester.client.gate.enrolment import enrol
from sequester.server import authority, enrolment, exchange, serve, services
from sequester.server.cli.identity import register
from sequester.server.config import Home
from sequester.server.ports import Ports
from sequester.server.store import Store

VERBS = typer.Typer()
register(VERBS)


class Exchange:
    """The enrolment side of an exchange. `ahead_s` moves its clock."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.ahead_s = 0.0
        self.store: Store | None = None
        self.exchange: exchange.Exchange | None = None

    def now(self) -> float:
        return time.time() + self.ahead_s

    def verb(self, *words: object) -> Result:
        """One of the coordinator's commands, as typed."""
        return CliRunner().invoke(VERBS, [*map(str, words), "--home", str(self.home.root)])

    def token(self, site: str, *words: object) -> str:
        said = self.verb("invite", site, "--json", *words)
        assert said.exit_code == 0, said.exception or said.output
        return str(json.loads(said.output)["token"])

    def admit(self, site: str, fingerprint: str) -> None:
        said = self.verb("admit", site, "--fingerprint", fingerprint)
        assert said.exit_code == 0, said.exception or said.output

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Serve until the block ends, on the ports of last time where there was one."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        self.store = Store(self.home.exchange)
        servers = asyncio.run_coroutine_threadsafe(self._serve(), loop).result(120)
        try:
            yield
        finally:
            asyncio.run_coroutine_threadsafe(self._stop(servers), loop).result(120)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(120)
            loop.close()
            self.store.close()

    async def _serve(self) -> list[grpc.aio.Server]:
        folder, store = self.home.exchange, self.store
        assert store is not None
        key = bytes.fromhex((folder / "coordinator.pub").read_text().strip())
        ports = Ports(folder, self.home.config(folder))
        self.exchange = exchange.Exchange(store, "alps", key)
        self.exchange.resume_all()
        service = enrolment.EnrolmentService(store, "alps", (folder / "authority.pem").read_bytes(), key, self.now)
        rest = [services.site_service(self.exchange), services.coordinator_service(self.exchange, key, *NO_FLOWER)]
        servers = [
            await serve.listen(self.home, "127.0.0.1", ports, "enrolment_port", [service.handler()], False),
            await serve.listen(self.home, "127.0.0.1", ports, "exchange_port", rest, True),
        ]
        ports.choose(superlink_port=ports["enrolment_port"], control_port=1)
        return servers

    async def _stop(self, servers: list[grpc.aio.Server]) -> None:
        assert self.exchange is not None
        await self.exchange.close()
        for server in servers:
            await server.stop(None)


async def _nothing(*told: object) -> None:
    """Flower's part in these tests: none."""


NO_FLOWER = (_nothing, _nothing)


def founded(root: Path) -> Exchange:
    """A new consortium `alps` on 127.0.0.1."""
    home = Home(root)
    authority.found(home, "alps", "127.0.0.1", (0, 0, 0, 0))
    return Exchange(home)


def hospital(root: Path, site: str) -> SiteHome:
    """A hospital that has written site.toml and nothing else."""
    home = SiteHome(root)
    root.mkdir(parents=True)
    home.site_toml.write_text(f'[site]\nid = "{site}"\n', "utf-8")
    return home


def enrolled(root: Path) -> SiteHome:
    """Hospital `north`, enrolled at a new consortium below `root` that nobody serves any more."""
    alps, home = founded(root / "server"), hospital(root / "north", "north")
    with alps.listening():
        asked = enrol(home, alps.token("north"), wait=False)
        alps.admit("north", asked.fingerprint)
        enrol(home, None)
    return home


def heard(lines: list[str]) -> str:
    """The fingerprint that an enrolling hospital reads out."""
    (line,) = [line for line in lines if re.search(r"fingerprint: ", line)]
    return line.split(": ")[1]


def closed_port() -> int:
    """A loopback port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
