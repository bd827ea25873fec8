"""The forwarder against real TLS ends and proxies, judged by flwr's own client: does it try again, or give up for good?"""

from __future__ import annotations

import asyncio
import base64
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.supercore.retry import make_simple_http_retry_invoker

from flower.stack import Loop, free_port, until
from sequester.client.gate.flower import forwarder
from sequester.client.gate.flower.forwarder import serve_forwarder
from sequester.server import authority
from sequester.server.config import Home

ANSWER = b"x" * 300_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = Home(tmp_path_factory.mktemp("home"))
    authority.found(home, "alps", "superlink.example", (0, 0, 0, 0))
    return home.exchange


class Far:
    """A TCP server whose connections are given to `serve`, each in a thread."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self.port = 0
        self.asked: list[bytes] = []
        self._serve = serve
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(10)
            try:
                self._serve(connection)
            except (OSError, ssl.SSLError):
                return

    def close(self) -> None:
        self._listener.close()


def tls(folder: Path, then: Callable[[ssl.SSLSocket], None]) -> Callable[[socket.socket], None]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "tls.pem", folder / "tls.key")

    def serve(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secure:
            then(secure)

    return serve


def answer_once(secure: ssl.SSLSocket) -> None:
    while b"\r\n\r\n" not in secure.recv(65536):
        pass
    secure.sendall(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(ANSWER) + ANSWER)
    with suppress(ssl.SSLError):
        secure.unwrap()


class Way:
    """A running forwarder."""

    def __init__(self, loop: Loop, port: int, https_proxy: str = "", host: str = "127.0.0.1") -> None:
        self.told: list[tuple[int, int]] = []
        self.server, self.port = loop.run(
            serve_forwarder(host, port, https_proxy, lambda up, down: self.told.append((up, down)))
        )


@pytest.fixture
def loop() -> Iterator[Loop]:
    running = Loop()
    yield running
    running.close()


def ask(folder: Path, port: int) -> httpx.Response:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(folder / "authority.pem")
    with httpx.Client(verify=context, timeout=10, trust_env=False) as client:
        return client.post(f"https://127.0.0.1:{port}/v1/fleet/pull-messages", content=b"q" * 1000)


def tries_again(folder: Path, port: int) -> httpx.TransportError:
    """What the client sees, after asserting that flwr's retry rule would try again."""
    retry: Any = make_simple_http_retry_invoker()
    with pytest.raises(httpx.TransportError) as caught:
        ask(folder, port)
    assert isinstance(caught.value, retry.recoverable_exceptions), repr(caught.value)
    assert not retry.should_giveup(caught.value), repr(caught.value)
    return caught.value


@contextmanager
def far(serve: Callable[[socket.socket], None]) -> Iterator[Far]:
    there = Far(serve)
    try:
        yield there
    finally:
        there.close()


# ---- carrying --------------------------------------------------------------------------------------------------------


def test_it_carries_both_ways_and_tells_the_bytes(folder: Path, loop: Loop) -> None:
    with far(tls(folder, answer_once)) as there:
        way = Way(loop, there.port)
        assert ask(folder, way.port).content == ANSWER
        until("the bytes are told", lambda: way.told, 5)
        ((up, down),) = way.told
        assert 1000 < up < 4000 and len(ANSWER) < down < len(ANSWER) + 8000


def test_a_connection_that_lives_on_is_told_of_meanwhile(
    folder: Path, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarder, "_TOLD_S", 0.2)
    with far(lambda connection: [connection.sendall(connection.recv(9)) for _ in range(3)]) as there:
        way = Way(loop, there.port)
        with socket.create_connection(("127.0.0.1", way.port), 5) as near:
            for _ in range(2):
                near.sendall(b"123456789")
                assert near.recv(9) == b"123456789"
                time.sleep(0.5)
            assert way.told == [(9, 9), (9, 9)]


def test_a_second_connection_does_not_wait_for_the_first(folder: Path, loop: Loop) -> None:
    with far(tls(folder, answer_once)) as there:
        way = Way(loop, there.port)
        with socket.create_connection(("127.0.0.1", way.port)):
            assert ask(folder, way.port).status_code == 200


def test_a_clean_end_after_the_handshake_is_passed_on_clean(folder: Path, loop: Loop) -> None:
    with far(tls(folder, lambda secure: secure.unwrap().close())) as there:
        assert "ssl" not in str(tries_again(folder, Way(loop, there.port).port)).lower()


# ---- failing ---------------------------------------------------------------------------------------------------------


def ends_cleanly(after: int) -> Callable[[socket.socket], None]:
    """A server that reads so many bytes, closes its side without another word and goes a little later."""

    def serve(connection: socket.socket) -> None:
        if after:
            connection.recv(after)
        connection.shutdown(socket.SHUT_WR)
        time.sleep(0.3)

    return serve


def test_what_it_guards_against_flwr_gives_up_on_a_clean_end_within_the_handshake(folder: Path) -> None:
    """Without the forwarder. The day this fails, flwr has learnt to try again."""
    retry: Any = make_simple_http_retry_invoker()
    with far(ends_cleanly(65536)) as there:
        with pytest.raises(httpx.TransportError) as caught:
            ask(folder, there.port)
        assert retry.should_giveup(caught.value), repr(caught.value)


def test_nobody_at_the_other_end_is_a_reset(folder: Path, loop: Loop) -> None:
    way = Way(loop, free_port())
    tries_again(folder, way.port)
    assert way.told == []


def test_a_name_that_does_not_resolve_is_a_reset(folder: Path, loop: Loop) -> None:
    tries_again(folder, Way(loop, 443, host="superlink.invalid").port)


@pytest.mark.parametrize("after", [0, 1, 100, 65536])
def test_a_clean_end_within_the_handshake_becomes_a_reset(folder: Path, loop: Loop, after: int) -> None:
    with far(ends_cleanly(after)) as there:
        tries_again(folder, Way(loop, there.port).port)


def test_an_end_in_the_middle_of_the_servers_handshake_becomes_a_reset(folder: Path, loop: Loop) -> None:
    """The server's first flight is cut after 200 of its bytes."""

    def serve(connection: socket.socket) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "tls.pem", folder / "tls.key")
        engine = context.wrap_bio(incoming, outgoing, server_side=True)
        incoming.write(connection.recv(65536))
        with pytest.raises(ssl.SSLWantReadError):
            engine.do_handshake()
        connection.sendall(outgoing.read()[:200])
        connection.shutdown(socket.SHUT_WR)
        time.sleep(0.3)

    with far(serve) as there:
        tries_again(folder, Way(loop, there.port).port)


def test_a_reset_after_the_handshake_stays_a_reset(folder: Path, loop: Loop) -> None:
    def serve(secure: ssl.SSLSocket) -> None:
        secure.recv(10)
        secure.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.socket.close(secure)  # without TLS's own goodbye

    with far(tls(folder, serve)) as there:
        tries_again(folder, Way(loop, there.port).port)


# ---- through a proxy -------------------------------------------------------------------------------------------------


def proxy(answer: bytes, asked: list[bytes], then: Callable[[socket.socket], None] = lambda c: None) -> Any:
    def serve(connection: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(65536)
        asked.append(head)
        connection.sendall(answer)
        then(connection)

    return serve


@pytest.mark.parametrize("status", [b"302 Found", b"403 Forbidden", b"407 Authenticate", b"502 Bad", b"503 Busy"])
def test_a_proxys_no_is_a_reset_and_is_never_shown(folder: Path, loop: Loop, status: bytes) -> None:
    said = b"HTTP/1.1 " + status + b"\r\ncontent-length: 4\r\n\r\nnope"
    with far(proxy(said, [])) as there:
        tries_again(folder, Way(loop, 443, f"http://127.0.0.1:{there.port}").port)


@pytest.mark.parametrize("said", [b"", b"garbage\r\n\r\n", b"HTTP/1.1 200"])
def test_a_proxy_that_makes_no_sense_is_a_reset(folder: Path, loop: Loop, said: bytes) -> None:
    with far(proxy(said, [])) as there:
        tries_again(folder, Way(loop, 443, f"http://127.0.0.1:{there.port}").port)


def test_a_proxy_that_is_gone_is_a_reset(folder: Path, loop: Loop) -> None:
    tries_again(folder, Way(loop, 443, f"http://127.0.0.1:{free_port()}").port)


def test_through_a_proxy_tls_stays_end_to_end_and_the_password_stays_with_the_proxy(folder: Path, loop: Loop) -> None:
    asked: list[bytes] = []
    serve_tls = tls(folder, answer_once)
    with far(proxy(b"HTTP/1.1 200 Connection established\r\n\r\n", asked, serve_tls)) as there:
        way = Way(loop, 7443, f"http://gate:se%20cret@127.0.0.1:{there.port}", host="superlink.example")
        assert ask(folder, way.port).content == ANSWER
    (head,) = asked
    assert head.startswith(b"CONNECT superlink.example:7443 HTTP/1.1\r\n")
    assert base64.b64encode(b"gate:se cret") in head


def test_the_way_is_open_again_when_the_other_end_is_back(folder: Path, loop: Loop) -> None:
    port = free_port()
    way = Way(loop, port)
    tries_again(folder, way.port)
    listener = socket.create_server(("127.0.0.1", port))
    serve = tls(folder, answer_once)
    threading.Thread(target=lambda: serve(listener.accept()[0]), daemon=True).start()
    assert ask(folder, way.port).status_code == 200
    listener.close()


# ---- when the handshake is through -----------------------------------------------------------------------------------


def record(kind: int, size: int) -> bytes:
    return bytes([kind, 3, 3]) + size.to_bytes(2, "big") + bytes([23]) * size


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7, 1000])
def test_the_handshake_is_through_with_the_first_application_data_however_it_is_cut(step: int) -> None:
    before = record(22, 512) + record(20, 1)
    seen = forwarder._Handshake()
    for start in range(0, len(before), step):
        seen.seen(before[start : start + step])
    assert not seen.through
    for byte in record(23, 40):
        seen.seen(bytes([byte]))
    assert seen.through and seen.taken() == len(before) + 45 and seen.taken() == 0


def test_a_stopped_forwarder_leaves_nothing_open(folder: Path) -> None:
    async def scenario() -> None:
        told: list[Any] = []
        server, port = await serve_forwarder("127.0.0.1", there.port, "", lambda up, down: told.append((up, down)))
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"hello")
        await asyncio.sleep(0.3)
        writer.close()
        await asyncio.sleep(0.3)
        server.close()
        assert told == [(5, 0)]

    with far(lambda connection: connection.recv(5) and time.sleep(2)) as there:
        asyncio.run(scenario())
