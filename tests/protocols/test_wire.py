"""Messages survive the wire; nothing malformed or oversized survives the reader."""

from __future__ import annotations

import contextlib
import tracemalloc
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from sequester.protocols import exchange_pb2 as pb
from sequester.protocols.errors import PeerError, RefusalCode
from sequester.protocols.packets import packed, unpacked
from sequester.protocols.secagg import messages as m
from sequester.protocols.wire import (
    CHUNK_BYTES,
    MAX_FRAME_BYTES,
    Limits,
    Reader,
    check_hello,
    frames,
    hello,
)

LIMITS = Limits(payload_bytes=4 << 20, ring_bits=32)
STUDY = bytes(range(32))


def sized(n: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=n, max_size=n)


b16, b32, b48, b64 = sized(16), sized(32), sized(48), sized(64)
index = st.integers(0, 1023)
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
name = st.text(max_size=32)
ascending = st.sets(index, max_size=6).map(lambda s: tuple(sorted(s)))
payload = st.binary(max_size=300) | st.just(bytes(CHUNK_BYTES + 5))


def boxes(value: st.SearchStrategy[bytes]) -> st.SearchStrategy[dict[int, bytes]]:
    return st.dictionaries(index, value, max_size=5)


counter = st.integers(0, 2**63 - 1)
advertisement = st.builds(m.KeyAdvertisement, index, b32, b32, name, counter, b32, b64)
ratification = st.builds(
    m.Ratification, index, b32, b32, st.lists(st.just(b"") | b32, max_size=4).map(tuple), b64,
    st.lists(advertisement, max_size=1).map(tuple),
)  # fmt: skip
cancel = st.builds(m.CancelAck, index, b32, b64)
ack = st.builds(m.Ack, index, b64)
acks = st.lists(ack, max_size=4, unique_by=lambda a: a.index).map(tuple)
task = st.builds(m.Task, b32, name, u32, u32, b32, b32, name, name, name, name)
round_start = st.builds(
    m.RoundStart, b32, u32, ascending, u64, u64, task, payload, st.lists(ratification, max_size=3).map(tuple),
    st.dictionaries(b32, st.lists(cancel, max_size=3).map(tuple), max_size=2),
)  # fmt: skip
vector = st.integers(1, 400).map(lambda n: m.MaskedVector(np.arange(n, dtype="<u4") * np.uint32(2654435761)))
survivors = ascending.flatmap(
    lambda s: st.tuples(st.just(s), st.lists(b16, min_size=len(s), max_size=len(s)).map(tuple))
)
params = st.builds(
    m.SessionParams, b32, u64, st.lists(b32, max_size=5).map(tuple), u32, u32, u32, st.sampled_from([32, 64]),
    st.sampled_from(["strict", "double"]), name,
)  # fmt: skip
MESSAGES: dict[str, st.SearchStrategy[m.Message]] = {
    "Resume": st.builds(m.Resume, b32, u32, st.text(max_size=16)),
    "SessionProposal": st.builds(m.SessionProposal, params),
    "KeyAdvertisement": advertisement,
    "Roster": st.builds(m.Roster, st.lists(advertisement, max_size=4).map(tuple)),
    "Ratification": ratification,
    "RoundStart": round_start,
    "MaskedInput": st.builds(m.MaskedInput, index, b32, st.just(b"") | b16, st.just(b"") | b32, boxes(b48), b64, vector),
    "SurvivorProposal": st.builds(lambda c, v, s: m.SurvivorProposal(c, v, *s), b32, u32, survivors),
    "SurvivorAck": st.builds(m.SurvivorAck, index, u32, b32, b64),
    "UnmaskRequest": st.builds(
        lambda c, v, s, x, a: m.UnmaskRequest(c, v, *s, x, a), b32, u32, survivors, boxes(b48), acks
    ),
    "UnmaskShares": st.builds(m.UnmaskShares, index, b32, u32, boxes(b32), boxes(b32)),
    "SeedRequest": st.builds(
        lambda c, v, s, a, w, r: m.SeedRequest(c, v, *s, a, w, r),
        b32, u32, survivors, acks, ascending, st.none() | round_start,
    ),
    "PairSeeds": st.builds(m.PairSeeds, index, b32, boxes(b32)),
    "RoundCancel": st.builds(m.RoundCancel, b32),
    "CancelAck": cancel,
    "Hold": st.builds(m.Hold, u32, st.integers(0, 2**62)),
    "Withdraw": st.builds(m.Withdraw, b32, st.just(b"") | b32),
    "StudyRefusal": st.builds(m.StudyRefusal, st.sampled_from([c.value for c in RefusalCode])),
    "Refusal": st.builds(m.Refusal, st.none() | index),
}  # fmt: skip


def travelled(message: m.Message, limits: Limits = LIMITS) -> m.Message:
    """The message after real bytes; exactly the last frame completes it."""
    reader = Reader(limits)
    encoded = [packed(frame) for frame in frames(message)]
    assert all(len(data) < MAX_FRAME_BYTES for data in encoded)
    taken = [reader.take(unpacked(data)) for data in encoded]
    assert all(early is None for early in taken[:-1])
    return taken[-1]


def equal(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if is_dataclass(a) and not isinstance(a, type):
        return type(a) is type(b) and all(equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return a == b


def test_every_message_of_the_protocol_has_a_strategy_here() -> None:
    assert set(MESSAGES) == {kind.__name__ for kind in m.Message.__args__}


@pytest.mark.parametrize("kind", sorted(MESSAGES))
def test_a_message_arrives_as_it_was_sent(kind: str) -> None:
    @settings(max_examples=15, deadline=None, database=None)
    @given(MESSAGES[kind])
    def arrives(message: m.Message) -> None:
        assert equal(travelled(message), message)

    arrives()


def masked(words: int) -> m.MaskedInput:
    y = np.arange(words, dtype=np.uint32)
    return m.MaskedInput(0, STUDY, b"", b"", {}, bytes(64), m.MaskedVector(y))


def test_a_vector_of_40_mb_arrives_with_one_extra_copy_of_itself() -> None:
    message = masked(10_000_000)
    reader = Reader(Limits(40_000_000, 32))
    tracemalloc.start()
    try:
        got = None
        for frame in frames(message):
            got = reader.take(unpacked(packed(frame)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(got, m.MaskedInput)
    assert np.array_equal(got.y, message.y)
    assert peak < 40_000_000 + 8 * CHUNK_BYTES  # the assembled vector and a few chunks


def test_an_oversized_payload_is_refused_before_anything_is_allocated() -> None:
    reader = Reader(Limits(1000, 32))
    header = next(frames(masked(251)))
    tracemalloc.start()
    try:
        with pytest.raises(PeerError, match="1004 bytes, at most 1000"):
            reader.take(header)
        header.masked_input.payload_bytes = 2**62
        with pytest.raises(PeerError, match="at most 1000"):
            reader.take(header)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def chunk(offset: int, data: bytes) -> pb.Frame:
    return pb.Frame(chunk=pb.Chunk(offset=offset, data=data))


@pytest.mark.parametrize(
    "second",
    [
        chunk(4, bytes(4)),
        chunk(0, b""),
        chunk(0, bytes(12)),
        chunk(0, bytes(CHUNK_BYTES + 1)),
        pb.Frame(refusal=pb.Refusal()),
        pb.Frame(),
    ],
    ids=["gap", "empty", "beyond", "too large", "another frame", "nothing"],
)
def test_a_payload_that_is_not_its_chunks_in_order_is_refused(second: pb.Frame) -> None:
    reader = Reader(LIMITS)
    assert reader.take(next(frames(masked(2)))) is None
    with pytest.raises(PeerError):
        reader.take(second)


def sealed(to: int, size: int = 48) -> pb.Sealed:
    return pb.Sealed(to=to, box=bytes(size))


h, s = bytes(32), bytes(64)
BAD = {
    "no kind": pb.Frame(),
    "a chunk of nothing": chunk(0, b"x"),
    "short session": pb.Frame(resume=pb.Resume(session_id=bytes(31))),
    "long state": pb.Frame(resume=pb.Resume(session_id=h, state="X" * 17)),
    "mode": pb.Frame(session_proposal=pb.SessionProposal(study_digest=h, mode="plain")),
    "roster too large": pb.Frame(roster=pb.Roster(advertisements=[pb.KeyAdvertisement()] * 1025)),
    "counter beyond any ledger": pb.Frame(
        key_advertisement=pb.KeyAdvertisement(session_id=h, kx=h, head=h, signature=s, counter=2**63)
    ),
    "short key": pb.Frame(key_advertisement=pb.KeyAdvertisement(session_id=h, kx=bytes(31), head=h, signature=s)),
    "long data set": pb.Frame(
        key_advertisement=pb.KeyAdvertisement(session_id=h, kx=h, head=h, signature=s, data_set="d" * 65)
    ),
    "index": pb.Frame(cancel_ack=pb.CancelAck(index=1024, ctx=h, signature=s)),
    "unsorted": pb.Frame(survivor_proposal=pb.SurvivorProposal(ctx=h, survivors=[2, 1])),
    "twice": pb.Frame(survivor_proposal=pb.SurvivorProposal(ctx=h, survivors=[1, 1])),
    "salt": pb.Frame(survivor_proposal=pb.SurvivorProposal(ctx=h, survivors=[1], salts=[bytes(15)])),
    "box twice": pb.Frame(unmask_request=pb.UnmaskRequest(ctx=h, seals=[sealed(1), sealed(1)])),
    "box size": pb.Frame(unmask_request=pb.UnmaskRequest(ctx=h, seals=[sealed(1, 49)])),
    "ack twice": pb.Frame(
        unmask_request=pb.UnmaskRequest(ctx=h, acks=[pb.Ack(index=1, signature=s), pb.Ack(index=1, signature=s)])
    ),
    "share size": pb.Frame(unmask_shares=pb.UnmaskShares(ctx=h, shares=[pb.Indexed(index=0, value=bytes(31))])),
    "seeds": pb.Frame(pair_seeds=pb.PairSeeds(ctx=h, pair_seeds=[pb.Indexed(index=i, value=h) for i in range(1025)])),
    "refusal code": pb.Frame(study_refusal=pb.StudyRefusal(code="HbA1c of patient 7")),
    "no vector": pb.Frame(masked_input=pb.MaskedInput(ctx=h, signature=s)),
    "task name": pb.Frame(
        round_start=pb.RoundStart(session_id=h, task=pb.Task(study_digest=h, broadcast=h, layout=h, analysis="a" * 257))
    ),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_a_malformed_frame_is_a_fault_of_the_peer(case: str) -> None:
    with pytest.raises(PeerError):
        Reader(LIMITS).take(pb.Frame.FromString(BAD[case].SerializeToString()))


def test_a_vector_of_half_a_word_is_refused() -> None:
    reader = Reader(Limits(100, 64))
    frame = next(frames(masked(3)))
    assert reader.take(frame) is None
    with pytest.raises(PeerError, match="words of 8"):
        reader.take(chunk(0, bytes(12)))


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None, database=None)
def test_random_bytes_are_a_message_or_a_fault_of_the_peer_and_nothing_else(data: bytes) -> None:
    with contextlib.suppress(PeerError, DecodeError):  # grpc itself closes a stream of undecodable bytes
        Reader(LIMITS).take(pb.Frame.FromString(data))


def test_hello_settles_the_versions_and_the_study() -> None:
    theirs = Reader(LIMITS).take(hello(STUDY))
    assert check_hello(theirs, STUDY).study_digest == STUDY
    with pytest.raises(PeerError, match="another study"):
        check_hello(theirs, bytes(32))
    with pytest.raises(PeerError, match="begin with Hello"):
        check_hello(m.Refusal(), STUDY)
    for changed in (
        pb.Hello(wire_min=2, wire_max=3, study_formats=[1], study_digest=STUDY),
        pb.Hello(wire_min=1, wire_max=1, study_formats=[2], study_digest=STUDY),
    ):
        with pytest.raises(PeerError) as refused:
            check_hello(changed, STUDY)
        assert refused.value.code is RefusalCode.VERSION
