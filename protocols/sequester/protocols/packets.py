"""Frames as bytes and bytes as frames: a payload's chunk is copied once on its way out, and not at all on its way in.

What stands on the wire is `exchange.proto` and nothing else. protobuf copies a chunk's bytes into the message and again
out of it; here a chunk is a view of the vector, or of the bytes that came. Bytes that are a chunk in any other spelling
than ours go through protobuf, as all other frames do.
"""

from __future__ import annotations

from dataclasses import dataclass

from sequester.protocols import exchange_pb2 as pb

_CHUNK = bytes([0xAA, 0x01])  # field 21 of Frame, with a length
_OFFSET = 0x08  # field 1 of Chunk, a number
_DATA = 0x12  # field 2 of Chunk, with a length


@dataclass(frozen=True, slots=True)
class Chunk:
    """Part of a payload: a view of memory that is somebody else's."""

    offset: int
    data: memoryview


Frame = pb.Frame | Chunk


def pieces(frame: Frame) -> tuple[bytes | memoryview, ...]:
    """The frame's bytes on the wire, one after the other; a chunk's data is still the view that it was."""
    if isinstance(frame, pb.Frame):
        return (frame.SerializeToString(),)
    offset = bytes([_OFFSET]) + _varint(frame.offset) if frame.offset else b""
    head = offset + bytes([_DATA]) + _varint(len(frame.data))
    return _CHUNK + _varint(len(head) + len(frame.data)) + head, frame.data


def packed(frame: Frame) -> bytes:
    """The frame's bytes on the wire."""
    return b"".join(pieces(frame))


def unpacked(data: bytes) -> Frame:
    """The frame in these bytes; a chunk's data is a view of them. What is no frame is protobuf's `DecodeError`."""
    chunk = _chunk(data) if data[:2] == _CHUNK else None
    return pb.Frame.FromString(data) if chunk is None else chunk


def _chunk(data: bytes) -> Chunk | None:
    """The one chunk that these bytes are in our own spelling, else None."""
    try:
        size, at = _number(data, 2)
        if at + size != len(data):
            return None
        offset = 0
        if data[at] == _OFFSET:
            offset, at = _number(data, at + 1)
        if data[at] != _DATA:
            return None
        size, at = _number(data, at + 1)
    except IndexError:
        return None
    return Chunk(offset, memoryview(data)[at:]) if at + size == len(data) else None


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _number(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins there, below 2^63, and where it ends; `IndexError` where it is longer."""
    number = 0
    for shift in range(0, 63, 7):
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
    raise IndexError
