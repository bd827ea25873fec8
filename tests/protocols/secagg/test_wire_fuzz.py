"""Real frames of a real session, damaged: the reader says PeerError or gives a message that no machine chokes on."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError

from attacks.adversary import Adversary
from sequester.protocols import arrays
from sequester.protocols import exchange_pb2 as pb
from sequester.protocols.errors import PeerError, RefusalCode
from sequester.protocols.packets import packed, unpacked
from sequester.protocols.secagg.aggregator import Aggregator
from sequester.protocols.secagg.messages import Effect, Message, Persist, RoundCancel, Send
from sequester.protocols.wire import WIRE_VERSION, Limits, Reader, check_hello, frames, hello

LIMITS = Limits(payload_bytes=1 << 16, ring_bits=32)
STUDY = bytes(range(32))


class Remembering(Adversary):
    """Keeps the last message that was said to a site."""

    def tell(self, i: int, message: Message) -> list[Effect]:
        self.last = message
        return super().tell(i, message)


class Recorded:
    """A session of four with an absence, a cancel and seeds: what was said both ways, and machines to say it to."""

    def __init__(self) -> None:
        self.sites = Remembering(4, 1, corrupt=(), joined=False)
        self.exchange = Aggregator(self.sites.params, 1.0)
        self.ledger: list[bytes] = []
        self.to_site: list[Message] = []
        self.to_exchange: list[tuple[int, Message]] = []
        self._run(self.exchange.start(), cut=())
        self.sites.advs = [self.exchange._advs[i] for i in range(4)]
        self._round(1, 0, cut=(2,))
        self._round(2, 1, cut=(0, 1))
        self.open = list(self.ledger)
        for i in range(4):
            self.to_site.append(RoundCancel(self.sites.outboxes[i].ctx if self.sites.outboxes[i] else bytes(32)))
        ctx = self.sites.ctx(self.start)
        acks = self.sites.agree(ctx, 1, (0, 1, 3))
        self.sites.ask_seeds(2, ctx, 1, (0, 1, 3), acks, start=self.start)
        self.to_site.append(self.sites.last)

    def _round(self, number: int, step: int, cut: tuple[int, ...]) -> None:
        self.start = self.sites.begin(number, step=step)
        self._run(self.exchange.start_round(number, (0, 1, 2, 3), self.start.length, 6, self.start.task, b"model"), cut)
        for _ in range(4):
            self._run(self.exchange.deadline(self.exchange._token), cut)

    def _run(self, effects: list[Any], cut: tuple[int, ...]) -> None:
        queue = list(effects)
        while queue:
            effect = queue.pop(0)
            if isinstance(effect, Persist):
                self.ledger.append(effect.record)
            if isinstance(effect, Send):
                self.to_site.append(effect.message)
                for answer in self.sites.tell(effect.to, effect.message):
                    if isinstance(answer, Send):
                        self.to_exchange.append((effect.to, answer.message))
                        if effect.to not in cut:
                            queue += self.exchange.handle(effect.to, answer.message)


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return Recorded()


def damaged(data: bytes, source: random.Random) -> bytes:
    """The bytes with one to four random wounds."""
    out = bytearray(data)
    for _ in range(source.randint(1, 4)):
        at = source.randrange(len(out) + 1)
        match source.randrange(6):
            case 0 if at < len(out):
                out[at] ^= 1 << source.randrange(8)
            case 1:
                out[at:at] = source.randbytes(source.randint(1, 9))
            case 2:
                del out[at : at + source.randint(1, 9)]
            case 3:
                out = out[:at]
            case 4:
                some = out[at : at + source.randint(1, 64)]
                out[at:at] = some  # a field twice
            case 5:
                out[at : at + 1] = b"\xff\xff\xff\xff\x7f"  # a large varint
    return bytes(out)


def misfilled(data: bytes, source: random.Random) -> bytes:
    """The frame with one field of another length, size or number; it still parses."""
    frame = pb.Frame.FromString(data)
    found: list[tuple[Any, Any]] = []

    def walk(message: Any) -> None:
        for field, value in message.ListFields():
            found.append((message, field))
            if field.type == field.TYPE_MESSAGE:
                for inner in value if field.is_repeated else [value]:
                    walk(inner)

    walk(frame)
    message, field = source.choice(found)
    if field.type == field.TYPE_MESSAGE:
        if field.is_repeated:
            rows = list(getattr(message, field.name))
            message.ClearField(field.name)
            rows = source.choice([rows + rows[:1], rows[1:], rows[::-1], rows * 300])
            getattr(message, field.name).extend(rows)
        else:
            message.ClearField(field.name)
        return bytes(frame.SerializeToString())
    kinds = {field.TYPE_BYTES: bytes, field.TYPE_STRING: str, field.TYPE_BOOL: bool}
    kind = kinds.get(field.type, int)
    old = getattr(message, field.name)
    values = list(old) if field.is_repeated else [old]
    at = source.randrange(len(values))
    if kind is bytes:
        values[at] = source.choice([b"", values[at][:-1], values[at] + b"x", source.randbytes(len(values[at]))])
    elif kind is str:
        values[at] = source.choice(["", "x" * 257, values[at] + "\0", "double", "NOT_READY"])
    elif kind is int:
        top = 2**63 - 1 if field.type in (field.TYPE_UINT64, field.TYPE_INT64) else 2**32 - 1
        values[at] = source.choice([0, 1, values[at] + 1, 1023, 1024, 10**9, top])
    else:
        values[at] = not values[at]
    if field.is_repeated:
        message.ClearField(field.name)
        getattr(message, field.name).extend(source.choice([values, [*values, values[0]], values[::-1]]))
    else:
        setattr(message, field.name, values[0])
    return bytes(frame.SerializeToString())


def corpus(recorded: Recorded) -> Iterator[tuple[int, list[bytes]]]:
    """(the site that says it or -1, serialised frames) of every message."""
    for message in recorded.to_site:
        yield -1, [packed(f) for f in frames(message)]
    for sender, message in recorded.to_exchange:
        yield sender, [packed(f) for f in frames(message)]


def fuzz(recorded: Recorded, rounds: int, seed: int) -> Counter[str]:
    """Damage, parse, read, and hand over what is still a message; anything but PeerError escapes."""
    source, outcomes = random.Random(seed), Counter[str]()
    said = list(corpus(recorded))
    everybody = [recorded.sites.restart(i) for i in range(4)]
    exchange = Aggregator.restore(recorded.open, recorded.sites.params, 1.0)
    for _ in range(rounds):
        sender, data = source.choice(said)
        hurt, wound = source.randrange(len(data)), source.choice([damaged, misfilled, misfilled])
        reader = Reader(LIMITS)
        try:
            message = None
            for at, frame in enumerate(data):
                message = reader.take(unpacked(wound(frame, source) if at == hurt else frame))
        except (PeerError, DecodeError) as error:  # what does not parse, grpc itself closes
            outcomes[type(error).__name__] += 1
            continue
        if message is None or type(message).__module__.endswith("_pb2"):
            outcomes["unfinished"] += 1
        elif sender >= 0:
            try:
                exchange.handle(sender, message)
                outcomes["the exchange took it"] += 1
            except PeerError:
                outcomes["the exchange refused it"] += 1
            if exchange.state != "COLLECTING":
                exchange = Aggregator.restore(recorded.open, recorded.sites.params, 1.0)
        else:
            i = source.randrange(4)
            before = everybody[i].last_round
            assert everybody[i].handle(message) != []
            assert everybody[i].last_round >= before
            outcomes["a site answered"] += 1
            if everybody[i].state == "HALTED":
                everybody[i] = recorded.sites.restart(i)
    return outcomes


def test_damaged_frames_are_peer_errors_in_bounded_memory(recorded: Recorded) -> None:
    tracemalloc.start()
    try:
        outcomes = fuzz(recorded, 4000, 7)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20
    assert min(outcomes[kind] for kind in ("PeerError", "DecodeError", "a site answered")) > 100, outcomes


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_damaged_frames_for_a_whole_night(recorded: Recorded) -> None:
    for seed in range(100):
        fuzz(recorded, 10_000, seed)


def blob(shape: tuple[int, ...], data: bytes = b"", dtype: bytes = b"f8", name: bytes = b"a", count: int = 1) -> bytes:
    dims = struct.pack(">B", len(shape)) + struct.pack(f">{len(shape)}Q", *shape)
    return struct.pack(">I", count) + bytes([len(name)]) + name + dtype + dims + data


@pytest.mark.parametrize(
    "data",
    [
        b"", blob((1,)), blob((10**9,)), blob((2**64 - 1,)), blob((0, 2**63)), blob((0, 2**62, 8)), blob((1,) * 5),
        blob((1,), bytes(8), b"f4"), blob((1,), bytes(8), b"O8"), blob((1,), bytes(9)), blob((1,), bytes(8), count=2),
        blob((1,), bytes(8), name=b""), blob((1,), bytes(8), count=2**32 - 1),
        blob((1,), bytes(8), count=2) + blob((1,), bytes(8))[4:],
    ],
    ids=["empty", "no data", "a thousand million", "2^64 - 1", "empty and too wide", "empty and too large",
         "five dimensions", "float32", "objects", "a byte too many", "a name missing", "no name", "count", "name twice"],
)  # fmt: skip
def test_malformed_broadcasts_are_peer_errors_that_cost_nothing(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(PeerError):
            arrays.decode(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_damaged_broadcasts_are_arrays_or_peer_errors() -> None:
    good = arrays.encode({"b": np.zeros(1), "n": np.arange(3), "w": np.ones((2, 4))})
    source, outcomes = random.Random(5), Counter[str]()
    for _ in range(3000):
        try:
            arrays.decode(damaged(good, source))
            outcomes["arrays"] += 1
        except PeerError:
            outcomes["PeerError"] += 1
    assert outcomes["PeerError"] > 1000 and outcomes["arrays"] > 10


# ---- mixed versions -------------------------------------------------------------------------------------------------


def travelled(frame: pb.Frame, extra: bytes = b"") -> object:
    return Reader(LIMITS).take(pb.Frame.FromString(frame.SerializeToString() + extra))


@pytest.mark.parametrize("versions", [(1, 1), (0, 1), (1, 9), (0, 9)])
def test_a_peer_that_shares_a_version_is_understood(versions: tuple[int, int]) -> None:
    theirs = pb.Hello(
        product="sequester/9.9", wire_min=versions[0], wire_max=versions[1], study_formats=[1, 2], study_digest=STUDY
    )
    assert check_hello(travelled(pb.Frame(hello=theirs)), STUDY).wire_max == versions[1]


@pytest.mark.parametrize(
    "theirs",
    [
        pb.Hello(wire_min=WIRE_VERSION + 1, wire_max=WIRE_VERSION + 4, study_formats=[1], study_digest=STUDY),
        pb.Hello(product="sequester/0.0.1", study_formats=[1], study_digest=STUDY),  # before wire versions: 0..0
        pb.Hello(wire_min=1, wire_max=1, study_formats=[2, 3], study_digest=STUDY),
        pb.Hello(wire_min=1, wire_max=1, study_digest=STUDY),
        pb.Hello(wire_min=5, wire_max=1, study_formats=[1], study_digest=STUDY),
    ],
    ids=["newer", "oldest", "newer studies", "no study format", "empty range"],
)
def test_a_peer_that_shares_none_is_refused_with_the_version(theirs: pb.Hello) -> None:
    with pytest.raises(PeerError) as refused:
        check_hello(travelled(pb.Frame(hello=theirs)), STUDY)
    assert refused.value.code is RefusalCode.VERSION
    assert refused.value.hint


def test_fields_and_frames_of_a_newer_version_are_skipped_or_refused_and_never_guessed_at() -> None:
    unknown_field = b"\xf2\x3f\x03new"  # field 1022, three bytes: skipped as protobuf does
    assert check_hello(travelled(hello(STUDY), unknown_field), STUDY)
    with pytest.raises(PeerError, match="unknown frame"):
        travelled(pb.Frame(), unknown_field)


def test_states_modes_and_codes_outside_the_closed_lists_are_refused() -> None:
    for frame in (
        pb.Frame(study_refusal=pb.StudyRefusal(code="NOT_READY because of patient 7")),
        pb.Frame(study_refusal=pb.StudyRefusal()),
        pb.Frame(session_proposal=pb.SessionProposal(study_digest=STUDY, mode="DOUBLE")),
        pb.Frame(session_proposal=pb.SessionProposal(study_digest=STUDY)),
    ):
        with pytest.raises(PeerError):
            travelled(frame)
