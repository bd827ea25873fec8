"""Frames as bytes: what we write and read by hand is what protobuf writes and reads, for every input; and memory used again."""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sequester.protocols import exchange_pb2 as pb
from sequester.protocols import memory
from sequester.protocols.memory import Room
from sequester.protocols.packets import Chunk, packed, pieces, unpacked

OFFSETS = st.integers(0, 2**63 - 1) | st.sampled_from([0, 1, 127, 128, 2**20, 2**32])


def by_protobuf(offset: int, data: bytes) -> bytes:
    return pb.Frame(chunk=pb.Chunk(offset=offset, data=data)).SerializeToString()


@settings(deadline=None, database=None)
@given(OFFSETS, st.binary(min_size=1, max_size=300))
def test_a_chunk_has_the_bytes_that_protobuf_gives_it_and_comes_back_as_it_was(offset: int, data: bytes) -> None:
    chunk = Chunk(offset, memoryview(data))
    assert packed(chunk) == b"".join(pieces(chunk)) == by_protobuf(offset, data)
    back = unpacked(packed(chunk))
    assert isinstance(back, Chunk)
    assert (back.offset, bytes(back.data)) == (offset, data)


def seen(data: bytes) -> object:
    """What protobuf reads: offset and data of a chunk, another frame's bytes, or nothing."""
    try:
        frame = pb.Frame.FromString(data)
    except DecodeError:
        return None
    if frame.WhichOneof("kind") == "chunk" and frame.ByteSize() == len(data):
        return frame.chunk.offset, frame.chunk.data
    return frame.SerializeToString()


def read(data: bytes) -> object:
    """What we read, in the same terms."""
    try:
        frame = unpacked(data)
    except DecodeError:
        return None
    if isinstance(frame, Chunk):
        return frame.offset, bytes(frame.data)
    if frame.WhichOneof("kind") == "chunk" and frame.ByteSize() == len(data):
        return frame.chunk.offset, frame.chunk.data
    return frame.SerializeToString()


@settings(max_examples=2000, deadline=None, database=None)
@given(OFFSETS, st.binary(max_size=40), st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=4))
@example(0, b"", [])
@example(5, b"abc", [(3, 0x88)])
def test_damaged_chunks_are_read_as_protobuf_reads_them(
    offset: int, data: bytes, wounds: list[tuple[int, int]]
) -> None:
    spoiled = bytearray(by_protobuf(offset, data))
    for place, byte in wounds:
        spoiled[place % len(spoiled)] = byte
    found, expected = read(bytes(spoiled)), seen(bytes(spoiled))
    if isinstance(found, tuple) and not isinstance(expected, tuple):
        # a number in more bytes than it needs: protobuf says the same frame in fewer
        assert expected == by_protobuf(*found)
    else:
        assert found == expected


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_chunk_that_is_cut_short_is_no_frame(cut: int) -> None:
    with pytest.raises(DecodeError):
        unpacked(by_protobuf(300, b"genomes!")[:-cut])


def test_a_vector_travels_without_a_copy_until_it_is_packed() -> None:
    vector = np.arange(1000, dtype=np.uint32)
    chunk = Chunk(0, vector.data.cast("B"))
    vector[0] = 7
    assert np.shares_memory(np.frombuffer(pieces(chunk)[1], dtype=np.uint32), vector)
    data = packed(chunk)
    got = unpacked(data)
    assert isinstance(got, Chunk)
    assert np.shares_memory(np.frombuffer(got.data, dtype=np.uint8), np.frombuffer(data, dtype=np.uint8))


def test_memory_is_given_out_again_only_when_nobody_sees_it() -> None:
    room = Room()
    first = room.array(100, np.uint32)
    first.fill(1)
    view = first[3:5]
    address = first.ctypes.data
    del first
    second = room.array(100, np.uint32)  # `view` still looks at the first
    second.fill(2)
    assert view.tolist() == [1, 1]
    assert second.ctypes.data != address
    address = second.ctypes.data
    raw = second.data
    del second
    third = room.array(100, np.uint32)
    assert third.ctypes.data != address, "a memoryview still looks at the second"
    address = third.ctypes.data
    del third, raw
    assert room.array(100, np.uint32).ctypes.data == address
    assert room.array(101, np.uint32).shape == (101,)
    assert room.array(101, np.uint64).dtype == np.uint64


def test_two_threads_that_ask_at_once_are_not_given_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round that the exchange gave up still works in its thread: its words would stand among the next round's."""
    room, both = Room(), threading.Barrier(2)
    room.array(4, np.uint32)

    def counted(array: np.ndarray) -> int:
        count = sys.getrefcount(array) - 1  # this function's own reference
        del array
        with suppress(threading.BrokenBarrierError):
            both.wait(0.2)  # the interpreter turns to the other thread
        return count

    monkeypatch.setattr(memory, "sys", SimpleNamespace(getrefcount=counted))
    given: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: given.append(room.array(4, np.uint32))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not np.shares_memory(*given)
