"""The SuperNode's only way out: loopback TCP to one fixed destination, directly or through the hospital's proxy.

TLS stays end to end between SuperNode and SuperLink; the gate sees ciphertext and sizes, and counts them. Flower's
client tries again after a reset and gives up for good after a clean end within the handshake or a proxy's error
(spec/flower.md, section 3): so whatever fails here, before the handshake is through, is a reset.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Callable

from sequester.client.gate import reach
from sequester.protocols.errors import SiteError

log = logging.getLogger("sequester.forwarder")

_CHUNK = 65536
_TOLD_S = 30.0
_APPLICATION_DATA = 23  # the TLS record type that a client sends once it has accepted the server's handshake
OnClosed = Callable[[int, int], None]


async def serve_forwarder(
    host: str, port: int, https_proxy: str, on_closed: OnClosed, own_port: int = 0
) -> tuple[asyncio.Server, int]:
    """A listening forwarder and its port on 127.0.0.1: `own_port`, or a free one.

    `on_closed` gets the bytes that left and the bytes that came since it was last told: when a connection ends, and
    every half minute of one that lives on, for a SuperNode may keep one open for days.
    """
    state = _Way()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            out = await asyncio.to_thread(reach.dial, host, port, https_proxy)
        except SiteError as error:
            state.closed(error.message)
            _reset(writer)
            return
        except asyncio.CancelledError:
            _reset(writer)
            raise
        state.open()
        _watch(out)
        far_reader, far_writer = await asyncio.open_connection(sock=out)
        up, down = _Handshake(), _Count()
        telling = asyncio.create_task(_tell(up, down, on_closed))
        try:
            clean = await _both(reader, far_writer, far_reader, writer, up, down)
            if not (clean and up.through):
                _reset(writer)
        except asyncio.CancelledError:
            _reset(writer)
            raise
        finally:
            telling.cancel()
            far_writer.close()
            writer.close()
            on_closed(up.taken(), down.taken())

    server = await asyncio.start_server(connected, "127.0.0.1", own_port)
    return server, int(server.sockets[0].getsockname()[1])


class _Way:
    """Says once that the way out is closed and once that it is open again, however often the SuperNode tries."""

    def __init__(self) -> None:
        self._said = ""

    def closed(self, sentence: str) -> None:
        if sentence != self._said:
            log.warning("the SuperNode cannot reach the SuperLink: %s", sentence)
        self._said = sentence

    def open(self) -> None:
        if self._said:
            log.info("the SuperNode's way to the SuperLink is open again")
        self._said = ""


async def _tell(up: _Count, down: _Count, on_closed: OnClosed) -> None:
    while True:
        await asyncio.sleep(_TOLD_S)
        if up.untold or down.untold:
            on_closed(up.taken(), down.taken())


class _Count:
    """Bytes one way that nobody was told of yet."""

    def __init__(self) -> None:
        self.untold = 0

    def seen(self, data: bytes) -> None:
        self.untold += len(data)

    def taken(self) -> int:
        """What was not told yet; from now on it was."""
        taken, self.untold = self.untold, 0
        return taken


class _Handshake(_Count):
    """Bytes of a TLS client, and whether one of its records was application data: its handshake is through."""

    def __init__(self) -> None:
        super().__init__()
        self.through = False
        self._header = b""
        self._skip = 0

    def seen(self, data: bytes) -> None:
        super().seen(data)
        while data and not self.through:
            if self._skip:
                data, self._skip = data[self._skip :], max(0, self._skip - len(data))
                continue
            take = 5 - len(self._header)
            self._header, data = self._header + data[:take], data[take:]
            if len(self._header) == 5:
                self.through = self._header[0] == _APPLICATION_DATA
                self._skip = int.from_bytes(self._header[3:5], "big")
                self._header = b""


async def _both(
    reader: asyncio.StreamReader,
    far_writer: asyncio.StreamWriter,
    far_reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    up: _Count,
    down: _Count,
) -> bool:
    """Carry both ways until one end closes; True where it was a clean end and all that came has been handed on."""
    ways = [
        asyncio.create_task(_carry(reader, far_writer, up)),
        asyncio.create_task(_carry(far_reader, writer, down)),
    ]
    try:
        done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        return all(way.exception() is None for way in done)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: _Count) -> None:
    while data := await reader.read(_CHUNK):
        count.seen(data)
        writer.write(data)
        await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """End with RST: unread and unsent data are thrown away, and Flower's client tries again."""
    connection = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _watch(connection: socket.socket) -> None:
    """Have the kernel notice within a minute that the other end is gone without a word."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 50_000)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
