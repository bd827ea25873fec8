"""A real Flower stack for tests: SuperLink, SuperExec and ServerApp on one side, one or more sites on the other.

Every process is the one that is shipped. Stand-ins are only what lies behind our own sockets: the exchange's answers at
the dispatch socket and the gate's answers at the door.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from sequester.client.gate.flower.door import serve_door
from sequester.client.gate.flower.forwarder import serve_forwarder
from sequester.protocols import exchange_pb2 as pb
from sequester.server import authority
from sequester.server.config import Home
from sequester.server.flower.bundle import bundle_sha256, standard_bundle
from sequester.server.flower.control import Control, SuperLinkError
from sequester.server.flower.superlink import superexec_command


def until(what: str, true: Callable[[], Any], seconds: float = 90.0) -> Any:
    """The first true value; an assertion that names what did not happen."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := true():
            return value
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds:.0f} s: {what}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(flower_home: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "FLWR_HOME": str(flower_home), **more}


def end(process: subprocess.Popen[bytes], number: int = signal.SIGTERM, seconds: float = 15.0) -> int:
    """Signal the process and wait for it; killed where it does not end."""
    process.send_signal(number)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait(5)


def children(pid: int) -> list[int]:
    """The children of a process."""
    text = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in text.read_text().split()] if text.exists() else []


class Loop:
    """An event loop in its own thread, for the gate's half."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def close(self) -> None:
        async def cancel() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self.run(cancel())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


class Exchange:
    """Answers the ServerApp at the dispatch socket and keeps what it reports."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.joins: dict[str, dict[str, pb.Join]] = {}  # by study, by site
        self.bundle = b""
        self.over: set[str] = set()
        self.unknown: set[str] = set()
        self.reports: list[tuple[str, str, str]] = []
        self._server: grpc.Server | None = None

    def start(self) -> None:
        def joins(request: pb.StudyRequest, context: Any) -> pb.JoinList:
            digest = request.study_digest.hex()
            if digest in self.unknown:
                context.abort(grpc.StatusCode.NOT_FOUND, "no such study")
            listed = self.joins.get(digest, {}).values()
            return pb.JoinList(joins=listed, over=digest in self.over, bundle_sha256=self.bundle)

        def report(request: pb.JoinReport, context: Any) -> pb.Empty:
            self.reports.append((request.study_digest.hex(), request.site, request.status))
            return pb.Empty()

        def unary(act: Any, request: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(
                act, request.FromString, lambda answer: answer.SerializeToString()
            )

        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    "sequester.v1.Dispatch",
                    {"Joins": unary(joins, pb.StudyRequest), "Report": unary(report, pb.JoinReport)},
                ),
            )
        )
        assert self._server.add_insecure_port(f"unix:{self.path}")
        self._server.start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop(None).wait()

    def heard(self, study: str, site: str) -> list[str]:
        return [status for digest, name, status in self.reports if (digest, name) == (study, site)]


@dataclass
class Gate:
    """Answers at the door."""

    approved: set[str] = field(default_factory=set)
    answers: dict[str, tuple[str, str]] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    slow_s: float = 0.0

    async def bundle_approved(self, sha256: str) -> bool:
        return sha256 in self.approved

    async def join(self, digest: str, bundle: str) -> tuple[str, str]:
        self.asked.append((digest, bundle))
        await asyncio.sleep(self.slow_s)
        return self.answers.get(digest, ("joined", ""))


class Site:
    """One hospital's Flower half: forwarder and door here, SuperNode and executor as processes."""

    def __init__(self, root: Path, home: Home, name: str) -> None:
        self.name = name
        self.folder = root / name
        self.folder.mkdir()
        self.gate = Gate()
        self.loop = Loop()
        self.closed: list[tuple[int, int]] = []
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        tls_key = ec.generate_private_key(ec.SECP256R1())
        request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(tls_key, SHA256())
        pem = authority.issue_site_certificate(home, request.public_bytes(Encoding.PEM), name)
        (self.folder / "tls.pem").write_bytes(pem)
        authority.write_private(
            self.folder / "tls.key", tls_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
        (self.folder / "authority.pem").write_bytes((home.exchange / "authority.pem").read_bytes())
        node_key = ec.generate_private_key(ec.SECP384R1())
        authority.write_private(
            self.folder / "supernode.key", node_key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        )
        self.supernode_key = node_key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        authority.write_private(self.folder / "superexec.secret", os.urandom(32))
        self.door = self.folder / "door.sock"
        self.loop.run(serve_door(self.door, self.gate))

    def forward(self, port: int, https_proxy: str = "") -> None:
        """Open the SuperNode's way to the SuperLink's public port."""
        _, self.way = self.loop.run(
            serve_forwarder("127.0.0.1", port, https_proxy, lambda up, down: self.closed.append((up, down)))
        )

    def supernode(self) -> None:
        self._start(
            "supernode", "--superlink", f"127.0.0.1:{self.way}", "--folder", self.folder, "--port", self.port,
            "--secret-file", self.folder / "superexec.secret",
        )  # fmt: skip

    def executor(self) -> None:
        self._start(
            "executor", "--runtime", f"127.0.0.1:{self.port}", "--secret-file", self.folder / "superexec.secret",
            "--door", self.door,
        )  # fmt: skip

    def _start(self, module: str, *words: object) -> None:
        with (self.folder / f"{module}.log").open("ab") as out:
            self.processes[module] = subprocess.Popen(
                [sys.executable, "-m", f"sequester.client.gate.flower.{module}", *map(str, words)],
                env=environment(self.folder / "flower"),
                stdout=out,
                stderr=out,
            )

    def said(self, module: str) -> str:
        return (self.folder / f"{module}.log").read_text("utf-8", "replace")

    def unpacked(self) -> list[Path]:
        """Whatever Flower would have unpacked at this site."""
        return list((self.folder / "flower").glob("apps/*"))

    def close(self) -> None:
        for process in self.processes.values():
            end(process, seconds=5)
        self.loop.close()


class Stack:
    """The consortium's half. `home` is founded; nothing runs until `start`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = Home(root / "server")
        authority.found(self.home, "alps", "127.0.0.1", (0, 0, 0, 0))
        self.folder = self.home.exchange
        self.exchange = Exchange(root / "dispatch.sock")
        self.bundle = standard_bundle()
        self.exchange.bundle = bytes.fromhex(bundle_sha256(self.bundle))
        self.ports = {"public_port": 0, "private_port": 0}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.sites: list[Site] = []

    def start(self) -> None:
        self.exchange.start()
        self.superlink()
        self.superexec()

    def superlink(self) -> None:
        announced = self.folder / "run" / "superlink.json"
        announced.unlink(missing_ok=True)
        command = [sys.executable, "-m", "sequester.server.flower.superlink", "--folder", str(self.folder)]
        command += ["--host", "127.0.0.1", "--public-port", str(self.ports["public_port"])]
        command += ["--private-port", str(self.ports["private_port"])]
        self._start("superlink", command)
        until("the SuperLink listens", announced.exists)
        self.ports = json.loads(announced.read_text())

    def superexec(self) -> None:
        command = superexec_command(self.ports["private_port"], self.folder / "superexec.secret")
        self._start("superexec", command)

    def _start(self, name: str, command: list[str]) -> None:
        more = {"SEQUESTER_DISPATCH_SOCKET": str(self.exchange.path)}
        with (self.root / f"{name}.log").open("ab") as out:
            self.processes[name] = subprocess.Popen(
                command, env=environment(self.root / "server-flower", **more), stdout=out, stderr=out
            )

    def said(self, name: str) -> str:
        return (self.root / f"{name}.log").read_text("utf-8", "replace")

    def control(self) -> Control:
        return Control(self.ports["private_port"])

    def site(self, name: str, *, online: bool = True) -> Site:
        """A registered site that approves of the standard bundle, with its SuperNode online and an executor."""
        site = Site(self.root, self.home, name)
        self.sites.append(site)
        site.gate.approved.add(self.exchange.bundle.hex())
        site.forward(self.ports["public_port"])
        with self.control() as control:
            control.register(site.supernode_key, name)
        if online:
            site.supernode()
            site.executor()
            self.online(site)
        return site

    def online(self, site: Site, seconds: float = 90.0) -> None:
        def is_online() -> bool:
            try:
                with self.control() as control:
                    return control.nodes().get(site.name) == "online"
            except SuperLinkError:
                return False

        until(f"{site.name} is online", is_online, seconds)

    def study(self, number: int, *sites: Site) -> str:
        """List a study for the sites at the exchange; its digest."""
        digest = f"{number:064x}"
        self.exchange.joins[digest] = {
            site.name: pb.Join(site=site.name, supernode_key=site.supernode_key) for site in sites
        }
        return digest

    def run(self, digest: str, bundle: bytes | None = None) -> str:
        with self.control() as control:
            return control.start(bundle or self.bundle, digest)

    def status(self, run_id: str) -> str:
        with self.control() as control:
            return control.status(run_id)

    def heard(self, digest: str, site: Site, seconds: float = 150.0) -> str:
        """The first thing the exchange hears of a site."""
        return str(until(f"{site.name} answers", lambda: self.exchange.heard(digest, site.name), seconds)[0])

    def close(self) -> None:
        for site in self.sites:
            site.close()
        for process in reversed(self.processes.values()):
            end(process, seconds=10)
        self.exchange.stop()


@contextmanager
def stack(root: Path) -> Iterator[Stack]:
    """A running consortium half; logs are printed where the block fails."""
    here = Stack(root)
    try:
        here.start()
        yield here
    except BaseException:
        for log in sorted(root.rglob("*.log")):
            print(f"==== {log.relative_to(root)}\n{log.read_text('utf-8', 'replace')[-6000:]}")
        raise
    finally:
        here.close()
