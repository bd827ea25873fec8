"""A founded consortium whose exchange really listens: enrolment and coordinator services on free loopback ports.

The exchange's program has more services; here are those by which hospitals join, over the same TLS, from one thread.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import typer
from typer.testing import CliRunner, Result

from sequester.client.config import Home as SiteHome
from sequester.protocols import exchange_pb2 as pb
from sequester.protocols.errors import StudyError
from sequester.server import authority, enrolment, tls
from sequester.server.cli.identity import register
from sequester.server.config import Home
from sequester.server.store import Store

VERBS = typer.Typer()
register(VERBS)


class Exchange:
    """The enrolment side of an exchange. `ahead_s` moves its clock."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.ahead_s = 0.0
        self.store: Store | None = None

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
        servers = asyncio.run_coroutine_threadsafe(self._serve(), loop).result(10)
        try:
            yield
        finally:
            asyncio.run_coroutine_threadsafe(self._stop(servers), loop).result(10)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)
            loop.close()
            self.store.close()

    async def _serve(self) -> list[grpc.aio.Server]:
        folder, store = self.home.exchange, self.store
        assert store is not None
        path = folder / "ports.json"
        ports = json.loads(path.read_text()) if path.exists() else {"enrolment_port": 0, "exchange_port": 0}
        key = bytes.fromhex((folder / "coordinator.pub").read_text().strip())
        service = enrolment.EnrolmentService(store, "alps", (folder / "authority.pem").read_bytes(), key, self.now)
        handlers = {
            "enrolment_port": service.handler(),
            "exchange_port": grpc.method_handlers_generic_handler("sequester.v1.Coordinator", self._coordinator(key)),
        }
        servers = []
        for name, handler in handlers.items():
            server = grpc.aio.server(options=tls.SERVER_OPTIONS)
            peers = grpc.method_handlers_generic_handler("sequester.v1.Site", {"Peers": self._peers()})
            server.add_generic_rpc_handlers((handler, peers) if name == "exchange_port" else (handler,))
            credentials = tls.server_credentials(folder, require_client=name == "exchange_port")
            ports[name] = server.add_secure_port(f"127.0.0.1:{ports[name]}", credentials)
            await server.start()
            servers.append(server)
        path.write_text(json.dumps(ports | {"superlink_port": ports["enrolment_port"], "control_port": 1}))
        return servers

    async def _stop(self, servers: list[grpc.aio.Server]) -> None:
        for server in servers:
            await server.stop(None)

    def _coordinator(self, key: bytes) -> dict[str, Any]:
        store = self.store
        assert store is not None

        def invite(request: pb.Invitation) -> pb.Empty:
            enrolment.invite(store, request)
            return pb.Empty()

        def admit(request: pb.Admission) -> pb.Empty:
            enrolment.admit(store, request, key)
            return pb.Empty()

        return {
            "Invite": _unary(invite, pb.Invitation, tls.is_coordinator),
            "Enrolments": _unary(lambda request: enrolment.rows(store), pb.Empty, tls.is_coordinator),
            "Admit": _unary(admit, pb.Admission, tls.is_coordinator),
        }

    def _peers(self) -> Any:
        store = self.store
        assert store is not None
        return _unary(
            lambda request: pb.Documents(documents=[pb.Document(json=m) for m in enrolment.members(store)]),
            pb.Empty,
            lambda context: enrolment.is_member(store, tls.peer_site(context) or ""),
        )


def _unary(act: Callable[[Any], Any], request: Any, allowed: Callable[[Any], bool]) -> Any:
    async def handler(message: Any, context: Any) -> Any:
        if not allowed(context):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, tls.peer_uri(context))
        try:
            return act(message)
        except StudyError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{error.message}\n{error.hint}")

    return grpc.unary_unary_rpc_method_handler(handler, request.FromString, lambda answer: answer.SerializeToString())


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


def heard(lines: list[str]) -> str:
    """The fingerprint that an enrolling hospital reads out."""
    (line,) = [line for line in lines if re.search(r"fingerprint: ", line)]
    return line.split(": ")[1]


def closed_port() -> int:
    """A loopback port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
