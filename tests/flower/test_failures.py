"""What flwr 1.41.0 does when a process dies or an answer is wrong, and that ours live through it (spec/flower.md, 7).

The kills take a minute each, for Flower declares nobody gone earlier; they run in the nightly suite.
"""

from __future__ import annotations

import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from flower.stack import Site, Stack, children, end, stack, until


@pytest.fixture(scope="module")
def flower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with stack(tmp_path_factory.mktemp("failures")) as running:
        yield running


@pytest.fixture
def site(flower: Stack, request: pytest.FixtureRequest) -> Iterator[Site]:
    """A site of the test's own, with a SuperNode nobody else has upset."""
    own = flower.site(f"site-{len(flower.sites)}")
    yield own
    assert own.unpacked() == []
    with flower.control() as control:
        control.unregister(own.name)


def under_way(flower: Stack, site: Site) -> tuple[str, str, int]:
    """A join that a child of the site's executor has brought to the gate and waits for: study, run, child."""
    site.gate.slow_s = 3600.0
    digest = flower.study(len(flower.exchange.joins) + 1, site)
    run = flower.run(digest)
    until("the gate is asked", lambda: digest in [study for study, _ in site.gate.asked])
    (child,) = children(site.processes["executor"].pid)
    site.gate.slow_s = 0.0
    return digest, run, child


def finish(flower: Stack, digest: str, run: str) -> None:
    flower.exchange.over.add(digest)
    until("the run ends", lambda: flower.status(run) == "finished:completed")


@pytest.mark.nightly
def test_a_killed_child_is_noticed_and_the_site_asked_again(flower: Stack, site: Site) -> None:
    digest, run, child = under_way(flower, site)
    subprocess.run(["kill", "-9", str(child)], check=True)
    until("the site joins", lambda: "joined" in flower.exchange.heard(digest, site.name), 100)
    assert flower.exchange.heard(digest, site.name) == ["error:8", "joined"]
    finish(flower, digest, run)


@pytest.mark.nightly
def test_a_killed_executor_takes_its_child_along_and_another_serves(flower: Stack, site: Site) -> None:
    digest, run, child = under_way(flower, site)
    end(site.processes["executor"], signal.SIGKILL)
    until("the child is gone", lambda: not Path(f"/proc/{child}").exists(), 5)
    site.executor()
    until("the site joins", lambda: "joined" in flower.exchange.heard(digest, site.name), 100)
    assert flower.exchange.heard(digest, site.name) == ["error:8", "joined"]
    finish(flower, digest, run)


@pytest.mark.nightly
def test_a_killed_supernode_may_not_return_for_a_minute_and_is_asked_again_then(flower: Stack, site: Site) -> None:
    digest, run, child = under_way(flower, site)
    end(site.processes["supernode"], signal.SIGKILL)
    subprocess.run(["kill", "-9", str(child)], check=True)
    site.supernode()
    assert site.processes["supernode"].wait(30) == 1  # "Failed to activate": the supervisor's pauses reach 70 s
    time.sleep(66)
    site.supernode()
    until("the site joins", lambda: "joined" in flower.exchange.heard(digest, site.name), 60)
    assert flower.exchange.heard(digest, site.name)[0] == "error:5"
    finish(flower, digest, run)


@pytest.mark.nightly
def test_canary_a_child_that_ends_by_sigterm_still_hangs_its_supernode(flower: Stack, site: Site) -> None:
    """Fact 6. The day this fails upstream has mended it, and the executor can be simpler."""
    digest, run, child = under_way(flower, site)
    subprocess.run(["kill", "-TERM", str(child)], check=True)
    time.sleep(90)
    assert flower.exchange.heard(digest, site.name) == []
    assert end(site.processes["supernode"]) == 0  # the remedy: it ends, comes back and is asked again
    site.supernode()
    until("the site joins", lambda: "joined" in flower.exchange.heard(digest, site.name), 60)
    finish(flower, digest, run)


# ---- wrong answers on the way ----------------------------------------------------------------------------------------


class Between:
    """A TLS end between forwarder and SuperLink that passes requests on, or answers them with a status of its own."""

    def __init__(self, flower: Stack, site: Site) -> None:
        self.status = 0
        self.of = ""  # the calls that get the status: those whose path ends so
        self.refused = 0
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(flower.folder / "authority.pem")
        context.load_cert_chain(site.folder / "tls.pem", site.folder / "tls.key")
        far = httpx.Client(verify=context, trust_env=False, timeout=10)
        url = f"https://127.0.0.1:{flower.ports['public_port']}"
        between = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                status, content, kind = between.status, b"", "application/json"
                if status and self.path.endswith(between.of):
                    between.refused += 1
                else:
                    passed = {name: value for name, value in self.headers.items() if name.lower() != "host"}
                    answer = far.post(url + self.path, content=body, headers=passed)
                    status, content, kind = answer.status_code, answer.content, answer.headers["content-type"]
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.send_header("content-type", kind)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                pass  # a killed SuperNode's half-open connections

        self._server = Server(("127.0.0.1", 0), Handler)
        mine = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        mine.load_cert_chain(flower.folder / "tls.pem", flower.folder / "tls.key")
        self._server.socket = mine.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def between(flower: Stack) -> Iterator[tuple[Between, Site]]:
    """A site whose way leads through the switch."""
    site = flower.site(f"site-{len(flower.sites)}", online=False)
    switch = Between(flower, site)
    site.forward(switch.port)
    site.supernode()
    site.executor()
    flower.online(site)
    yield switch, site
    end(site.processes["supernode"])
    switch.close()
    with flower.control() as control:
        control.unregister(site.name)


@pytest.mark.system
@pytest.mark.parametrize("status", [413, 500])
def test_a_fatal_answer_ends_the_launcher_and_the_next_one_is_online(
    flower: Stack, between: tuple[Between, Site], status: int
) -> None:
    switch, site = between
    switch.of, switch.status = "/pull-messages", status
    assert site.processes["supernode"].wait(30) == 75
    switch.status = 0
    site.supernode()
    digest = flower.study(len(flower.exchange.joins) + 1, site)
    run = flower.run(digest)
    # It could sign off, so it may return at once; otherwise Flower holds it online and refuses it for a minute.
    assert flower.heard(digest, site, 30) == "joined"
    finish(flower, digest, run)


@pytest.mark.system
def test_an_overloaded_superlink_is_waited_for(flower: Stack, between: tuple[Between, Site]) -> None:
    switch, site = between
    switch.status = 503
    until("the node meets it", lambda: switch.refused >= 2)
    time.sleep(5)
    switch.status = 0
    digest = flower.study(len(flower.exchange.joins) + 1, site)
    run = flower.run(digest)
    assert flower.heard(digest, site) == "joined"
    assert site.processes["supernode"].poll() is None
    finish(flower, digest, run)


@pytest.mark.system
def test_a_way_out_that_was_closed_is_open_again_without_a_new_supernode(flower: Stack) -> None:
    """The hospital's proxy answers 502 for a while, then connects."""
    site = flower.site(f"site-{len(flower.sites)}", online=False)
    proxy = Proxy(flower.ports["public_port"])
    site.forward(flower.ports["public_port"], f"http://127.0.0.1:{proxy.port}")
    site.supernode()
    site.executor()
    flower.online(site)
    asked = proxy.asked  # a SuperNode whose activation is not yet answered would ask twice and be refused for good
    until("the SuperNode has asked again", lambda: proxy.asked > asked)
    proxy.open = False
    proxy.cut()
    until("the proxy has said no", lambda: proxy.refused >= 2)
    proxy.open = True
    digest = flower.study(len(flower.exchange.joins) + 1, site)
    run = flower.run(digest)
    assert flower.heard(digest, site) == "joined"
    assert site.processes["supernode"].poll() is None
    finish(flower, digest, run)
    proxy.close()


class Proxy:
    """A CONNECT proxy that can say 502."""

    def __init__(self, port: int) -> None:
        self.open = True
        self.refused = 0
        self.asked = 0  # how often bytes came from the near side
        self._far = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._one, args=(near,), daemon=True).start()

    def _one(self, near: Any) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            if not (data := near.recv(4096)):
                return
            head += data
        if not self.open:
            self.refused += 1
            near.sendall(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n")
            near.close()
            return
        far = socket.create_connection(self._far)
        near.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        self._sockets += [near, far]
        for a, b in ((near, far), (far, near)):
            threading.Thread(target=self._carry, args=(a, b, a is near), daemon=True).start()

    def _carry(self, a: Any, b: Any, up: bool) -> None:
        with suppress(OSError):
            while data := a.recv(65536):
                self.asked += up
                b.sendall(data)
            b.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """End every connection that stands, cleanly, as proxies do."""
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._sockets.clear()

    def close(self) -> None:
        self._listener.close()
        self.cut()
