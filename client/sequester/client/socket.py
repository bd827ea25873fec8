"""Frames between gate and compute over an inherited unix socket pair; both sides import this and nothing of each other.

u32 header length, JSON header {"kind": ...}, u64 payload length, payload as named arrays (`protocols/arrays.py`). No
pickle. Headers carry names and counts, never a value of a patient.
"""

from __future__ import annotations

import json
import socket as sockets
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from sequester.protocols import arrays
from sequester.protocols.errors import PeerError

MAX_HEADER = 16 * 1024 * 1024  # a study with thousands of variants travels in a header
MAX_PAYLOAD = 4 * 1024**3


@dataclass(frozen=True, slots=True)
class Letter:
    """One message: what it is, its JSON header, its payload."""

    kind: str
    header: dict[str, Any] = field(default_factory=dict)
    payload: bytes | memoryview = b""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The payload as named arrays, empty where there is none."""
        return arrays.decode(self.payload) if self.payload else {}


class Channel:
    """One end of the pair; blocking."""

    def __init__(self, connection: sockets.socket) -> None:
        self._socket = connection

    def send(self, kind: str, header: dict[str, Any] | None = None, payload: bytes = b"") -> None:
        """Send one letter."""
        head = json.dumps({"kind": kind, **(header or {})}).encode()
        self._socket.sendall(struct.pack(">I", len(head)) + head + struct.pack(">Q", len(payload)))
        if payload:
            self._socket.sendall(payload)

    def receive(self, kind: str = "", take: Callable[[arrays.Part], None] | None = None) -> Letter:
        """The next letter; `PeerError` where the other end closed or broke the framing.

        A letter of this kind has its payload given to `take`, part by part as it arrives, and carries none. Where that raises,
        the rest of the payload is read and dropped first: the next letter begins where it should.
        """
        (head_size,) = struct.unpack(">I", self._take(4))
        if head_size > MAX_HEADER:
            raise PeerError("an overlong header on the compute socket")
        try:
            header = json.loads(bytes(self._take(head_size)))
            found = str(header.pop("kind"))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise PeerError("a header on the compute socket that makes no sense") from None
        (size,) = struct.unpack(">Q", self._take(8))
        if size > MAX_PAYLOAD:
            raise PeerError("an overlong payload on the compute socket")
        if take is None or found != kind or not size:
            return Letter(found, header, self._take(size).toreadonly() if size else b"")
        left = size

        def fill(view: memoryview) -> None:
            nonlocal left
            self._fill(view)
            left -= len(view)

        try:
            for part in arrays.parts(size, fill):
                take(part)
        except BaseException:
            while left:
                fill(memoryview(bytearray(min(left, 1 << 20))))
            raise
        return Letter(found, header)

    def _take(self, size: int) -> memoryview:
        data = memoryview(bytearray(size))
        self._fill(data)
        return data

    def _fill(self, view: memoryview) -> None:
        while view:
            try:
                n = self._socket.recv_into(view)
            except OSError:
                n = 0
            if n == 0:
                raise PeerError("the other end of the compute socket closed")
            view = view[n:]

    def close(self) -> None:
        """Close this end."""
        self._socket.close()
