"""Messages as frames and frames as messages: bounded before anything is allocated.

A broadcast or a masked vector follows its header frame in chunks of at most 1 MiB, in order, nothing between. Whatever
is malformed, oversized, out of order or unknown is a `PeerError`; the driver closes that stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from sequester.protocols import exchange_pb2 as pb
from sequester.protocols.errors import PeerError, RefusalCode
from sequester.protocols.memory import Room
from sequester.protocols.packets import Chunk, Frame
from sequester.protocols.secagg import messages as m
from sequester.protocols.session import SessionParams, Task
from sequester.protocols.study import Study

WIRE_VERSION = 1
STUDY_FORMAT = 1
PRODUCT = "sequester/0.1.0"
CHUNK_BYTES = 1 << 20
MAX_FRAME_BYTES = 2 << 20
MAX_SITES = 1024
MAX_EPOCH = 2**53 - 1  # the largest number of a ledger's entry: canonical JSON has no larger ones


@dataclass(frozen=True, slots=True)
class Limits:
    """What one peer may make this side hold: payload bytes, and the ring's word size in bits."""

    payload_bytes: int
    ring_bits: int

    @classmethod
    def for_study(cls, study: Study) -> Limits:
        """Bounds from the signed study: its longest vector, and a broadcast of at most four times that."""
        from sequester.protocols import privacy  # privacy builds on messages, not on the wire

        longest = max(privacy.layout(study, plan, 0).length for plan in study.analyses)
        return cls(max(4 * 8 * longest, CHUNK_BYTES), study.aggregation.ring_bits)


# ---- out ------------------------------------------------------------------------------------------------------------


def hello(study_digest: bytes) -> pb.Frame:
    """The first frame of every stream."""
    return pb.Frame(
        hello=pb.Hello(
            product=PRODUCT, wire_min=1, wire_max=WIRE_VERSION, study_formats=[STUDY_FORMAT], study_digest=study_digest
        )
    )


def check_hello(message: object, study_digest: bytes | None = None) -> pb.Hello:
    """The peer's Hello; no common wire version or study format is refused (C30)."""
    if not isinstance(message, pb.Hello):
        raise PeerError("the stream does not begin with Hello")
    if not message.wire_min <= WIRE_VERSION <= message.wire_max or STUDY_FORMAT not in message.study_formats:  # C30
        raise PeerError(
            f"the peer speaks wire {message.wire_min}..{message.wire_max}, this side {WIRE_VERSION}",
            hint="update the older of the two",
            code=RefusalCode.VERSION,
        )
    if study_digest is not None and message.study_digest != study_digest:
        raise PeerError("the peer greets for another study", code=RefusalCode.STUDY)
    return message


def frames(message: m.Message) -> Iterator[Frame]:
    """The frames of one message; vectors and broadcasts as chunks that are views of them."""
    match message:
        case m.RoundStart():
            yield pb.Frame(round_start=_round_start(message, len(message.broadcast)))
            yield from _chunks(memoryview(message.broadcast))
        case m.MaskedInput():
            data = np.ascontiguousarray(message.y).data.cast("B")  # no copy: it is contiguous
            header = pb.MaskedInput(
                index=message.index, ctx=message.ctx, salt=message.salt, commit=message.commit,
                seals=[pb.Sealed(to=j, box=box) for j, box in sorted(message.seals.items())],
                signature=message.signature, payload_bytes=len(data),
            )  # fmt: skip
            yield pb.Frame(masked_input=header)
            yield from _chunks(data)
        case m.SeedRequest(round_start=start) if start is not None:
            request = _seed_request(message)
            request.round_start.CopyFrom(_round_start(start, len(start.broadcast)))
            yield pb.Frame(seed_request=request)
            yield from _chunks(memoryview(start.broadcast))
        case _:
            yield _plain(message)


def _chunks(data: memoryview) -> Iterator[Frame]:
    for offset in range(0, len(data), CHUNK_BYTES):
        yield Chunk(offset, data[offset : offset + CHUNK_BYTES])


def _plain(message: m.Message) -> pb.Frame:
    match message:
        case m.Resume():
            return pb.Frame(
                resume=pb.Resume(session_id=message.session_id, last_round=message.last_round, state=message.state)
            )
        case m.SessionProposal(params=p):
            proposal = pb.SessionProposal(
                study_digest=p.study_digest, epoch=p.epoch, roster=p.roster, max_corrupt=p.max_corrupt,
                min_active=p.min_active, max_absent=p.max_absent, ring_bits=p.ring_bits, mode=p.mode, suite=p.suite,
            )  # fmt: skip
            return pb.Frame(session_proposal=proposal)
        case m.KeyAdvertisement():
            return pb.Frame(key_advertisement=_advertisement(message))
        case m.Roster():
            return pb.Frame(roster=pb.Roster(advertisements=map(_advertisement, message.advertisements)))
        case m.Ratification():
            return pb.Frame(ratification=_ratification(message))
        case m.SurvivorProposal():
            return pb.Frame(
                survivor_proposal=pb.SurvivorProposal(
                    ctx=message.ctx, version=message.version, survivors=message.survivors, salts=message.salts
                )
            )
        case m.SurvivorAck():
            return pb.Frame(
                survivor_ack=pb.SurvivorAck(
                    index=message.index, version=message.version, digest=message.digest, signature=message.signature
                )
            )
        case m.UnmaskRequest():
            request = pb.UnmaskRequest(
                ctx=message.ctx, version=message.version, survivors=message.survivors, salts=message.salts,
                seals=[pb.Sealed(to=j, box=box) for j, box in sorted(message.seals.items())], acks=_acks(message.acks),
            )  # fmt: skip
            return pb.Frame(unmask_request=request)
        case m.UnmaskShares():
            shares = pb.UnmaskShares(
                index=message.index, ctx=message.ctx, version=message.version, shares=_indexed(message.shares),
                pair_seeds=_indexed(message.pair_seeds),
            )  # fmt: skip
            return pb.Frame(unmask_shares=shares)
        case m.SeedRequest():
            return pb.Frame(seed_request=_seed_request(message))
        case m.PairSeeds():
            return pb.Frame(
                pair_seeds=pb.PairSeeds(index=message.index, ctx=message.ctx, pair_seeds=_indexed(message.pair_seeds))
            )
        case m.RoundCancel():
            return pb.Frame(round_cancel=pb.RoundCancel(ctx=message.ctx))
        case m.CancelAck():
            return pb.Frame(cancel_ack=_cancel_ack(message))
        case m.Hold():
            return pb.Frame(hold=pb.Hold(round=message.round, until_unix=message.until_unix))
        case m.Withdraw():
            return pb.Frame(withdraw=pb.Withdraw(study_digest=message.study_digest, session_id=message.session_id))
        case m.StudyRefusal():
            return pb.Frame(study_refusal=pb.StudyRefusal(code=message.code))
        case m.Refusal():
            return pb.Frame(
                refusal=pb.Refusal(box_failed=message.box_failed or 0, has_box_failed=message.box_failed is not None)
            )
        case _:
            raise TypeError(f"{type(message).__name__} has chunks")


def _advertisement(a: m.KeyAdvertisement) -> pb.KeyAdvertisement:
    return pb.KeyAdvertisement(
        index=a.index, kx=a.kx, data_set=a.data_set, counter=a.counter, head=a.head, signature=a.signature,
        session_id=a.session_id,
    )  # fmt: skip


def _ratification(r: m.Ratification) -> pb.Ratification:
    return pb.Ratification(
        index=r.index, session_id=r.session_id, roster_hash=r.roster_hash, seen=r.seen, signature=r.signature,
        seen_advertisements=map(_advertisement, r.seen_advertisements),
    )  # fmt: skip


def _cancel_ack(c: m.CancelAck) -> pb.CancelAck:
    return pb.CancelAck(index=c.index, ctx=c.ctx, signature=c.signature)


def _acks(acks: Iterable[m.Ack]) -> list[pb.Ack]:
    return [pb.Ack(index=a.index, signature=a.signature) for a in acks]


def _indexed(values: Any) -> list[pb.Indexed]:
    return [pb.Indexed(index=j, value=value) for j, value in sorted(values.items())]


def _round_start(s: m.RoundStart, payload: int) -> pb.RoundStart:
    t = s.task
    task = pb.Task(
        study_digest=t.study_digest, analysis=t.analysis, step=t.step, attempt=t.attempt, broadcast=t.broadcast,
        layout=t.layout, codec=t.codec, clip=t.clip, noise=t.noise, event=t.event,
    )  # fmt: skip
    return pb.RoundStart(
        session_id=s.session_id, round=s.round, active=s.active, length=s.length, coordinates=s.coordinates, task=task,
        ratifications=map(_ratification, s.ratifications),
        cancels=[pb.CancelSet(ctx=c, cancels=map(_cancel_ack, acks)) for c, acks in s.cancels.items()],
        payload_bytes=payload,
    )  # fmt: skip


def _seed_request(s: m.SeedRequest) -> pb.SeedRequest:
    return pb.SeedRequest(
        ctx=s.ctx, version=s.version, survivors=s.survivors, salts=s.salts, acks=_acks(s.acks), wanted=s.wanted
    )


# ---- in -------------------------------------------------------------------------------------------------------------


class Reader:
    """Assembles the messages of one stream. `take` returns None while a payload is under way."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._header: Any = None
        self._payload = memoryview(b"")
        self._filled = 0
        self._room = Room()

    def take(self, frame: Frame) -> Any:
        """The message that this frame completes, None where more chunks are due."""
        kind = "chunk" if isinstance(frame, Chunk) else frame.WhichOneof("kind")
        if self._header is not None:
            if kind != "chunk":
                raise PeerError(f"{kind} in the middle of a payload")
            return self._fill(frame if isinstance(frame, Chunk) else frame.chunk)
        if isinstance(frame, Chunk):
            raise PeerError("a chunk of nothing")
        match kind:
            case None | "chunk":
                raise PeerError("an empty or unknown frame, or a chunk of nothing")
            case "hello" | "stop" | "done" | "receipt":
                return getattr(frame, kind)
            case "round_start":
                return self._begin(frame.round_start, frame.round_start.payload_bytes)
            case "masked_input":
                return self._begin(frame.masked_input, frame.masked_input.payload_bytes)
            case "seed_request" if frame.seed_request.HasField("round_start"):
                return self._begin(frame.seed_request, frame.seed_request.round_start.payload_bytes)
            case _:
                return _message(getattr(frame, kind), b"", self._limits)

    def _begin(self, header: Any, payload_bytes: int) -> Any:
        if payload_bytes > self._limits.payload_bytes:  # C24: before anything is allocated
            raise PeerError(f"a payload of {payload_bytes} bytes, at most {self._limits.payload_bytes} are allowed")
        if payload_bytes == 0:
            return _message(header, b"", self._limits)
        self._header, self._payload, self._filled = header, memoryview(b""), 0
        self._expected = payload_bytes
        return None

    def _fill(self, chunk: Chunk | pb.Chunk) -> Any:
        data = chunk.data  # once: protobuf makes a copy each time
        size = len(data)
        if chunk.offset != self._filled or not 0 < size <= CHUNK_BYTES or self._filled + size > self._expected:
            raise PeerError("a chunk out of order, empty or beyond its payload")
        if not self._payload:
            self._payload = self._room.array(self._expected, np.uint8).data  # nobody sees it before all was written
        self._payload[self._filled : self._filled + size] = data
        self._filled += size
        if self._filled < self._expected:
            return None
        header, payload = self._header, self._payload
        self._header, self._payload = None, memoryview(b"")
        return _message(header, payload, self._limits)


def _sized(value: bytes, *sizes: int) -> bytes:
    if len(value) not in sizes:
        raise PeerError(f"{len(value)} bytes where {' or '.join(map(str, sizes))} were expected")
    return value


def _index(value: int) -> int:
    if value >= MAX_SITES:
        raise PeerError(f"site index {value}")
    return value


def _ascending(values: Sequence[int]) -> tuple[int, ...]:
    if len(values) > MAX_SITES or any(a >= b for a, b in pairwise(values)):
        raise PeerError("site indices are not ascending and distinct")
    return tuple(_index(v) for v in values)


def _unique(rows: Sequence[Any], key: str, value: str, *sizes: int) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    if len(rows) > MAX_SITES:
        raise PeerError(f"{len(rows)} entries")
    for row in rows:
        index = _index(getattr(row, key))
        if index in found:
            raise PeerError(f"site {index} stands twice")
        found[index] = _sized(getattr(row, value), *sizes)
    return found


def _salts(values: Sequence[bytes]) -> tuple[bytes, ...]:
    return tuple(_sized(v, 16) for v in values[: MAX_SITES + 1])


def _read_acks(rows: Sequence[pb.Ack]) -> tuple[m.Ack, ...]:
    return tuple(m.Ack(i, s) for i, s in _unique(rows, "index", "signature", 64).items())


def _read_advertisement(a: pb.KeyAdvertisement) -> m.KeyAdvertisement:
    if len(a.data_set) > 64:
        raise PeerError("a data set's name of more than 64 letters")
    if a.counter >= 2**63:  # what a database's integer holds
        raise PeerError("a ledger counter that no ledger reaches")
    return m.KeyAdvertisement(
        _index(a.index), _sized(a.session_id, 32), _sized(a.kx, 32), a.data_set, a.counter, _sized(a.head, 32),
        _sized(a.signature, 64),
    )  # fmt: skip


def _read_ratification(r: pb.Ratification, behind: int = 1) -> m.Ratification:
    if len(r.seen) > MAX_SITES or len(r.seen_advertisements) > behind:
        raise PeerError("a ratification with too many entries")
    return m.Ratification(
        _index(r.index), _sized(r.session_id, 32), _sized(r.roster_hash, 32), tuple(_sized(s, 0, 32) for s in r.seen),
        _sized(r.signature, 64), tuple(map(_read_advertisement, r.seen_advertisements)),
    )  # fmt: skip


def _read_cancel(c: pb.CancelAck) -> m.CancelAck:
    return m.CancelAck(_index(c.index), _sized(c.ctx, 32), _sized(c.signature, 64))


def _read_start(s: pb.RoundStart, broadcast: bytes) -> m.RoundStart:
    if len(s.ratifications) > MAX_SITES or len(s.cancels) > MAX_SITES:
        raise PeerError("a round's start with too many entries")
    t = s.task
    if any(len(text) > 256 for text in (t.analysis, t.codec, t.clip, t.noise, t.event)):
        raise PeerError("a task with overlong names")
    task = Task(
        _sized(t.study_digest, 32), t.analysis, t.step, t.attempt, _sized(t.broadcast, 32), _sized(t.layout, 32),
        t.codec, t.clip, t.noise, t.event,
    )  # fmt: skip
    cancels = {_sized(c.ctx, 32): tuple(map(_read_cancel, c.cancels[: MAX_SITES + 1])) for c in s.cancels}
    return m.RoundStart(
        _sized(s.session_id, 32), s.round, _ascending(s.active), s.length, s.coordinates, task, broadcast,
        tuple(map(_read_ratification, s.ratifications)), cancels,
    )  # fmt: skip


def _message(x: Any, payload: bytes | memoryview, limits: Limits) -> Any:
    match x:
        case pb.RoundStart():
            return _read_start(x, bytes(payload))
        case pb.MaskedInput():
            dtype = np.dtype("<u4") if limits.ring_bits == 32 else np.dtype("<u8")
            if not payload or len(payload) % dtype.itemsize:
                raise PeerError(f"a masked vector of {len(payload)} bytes in words of {dtype.itemsize}")
            y = m.MaskedVector(np.frombuffer(payload, dtype=dtype))
            return m.MaskedInput(
                _index(x.index), _sized(x.ctx, 32), _sized(x.salt, 0, 16), _sized(x.commit, 0, 32),
                _unique(x.seals, "to", "box", 48), _sized(x.signature, 64), y,
            )  # fmt: skip
        case pb.Resume():
            if len(x.state) > 16:
                raise PeerError("a state's name of more than 16 letters")
            return m.Resume(_sized(x.session_id, 32), x.last_round, x.state)
        case pb.SessionProposal():
            if len(x.roster) > MAX_SITES or x.mode not in ("strict", "double") or len(x.suite) > 64:
                raise PeerError("a session proposal that makes no sense")
            if x.epoch > MAX_EPOCH:  # a site that advertised could write neither that nor that it left
                raise PeerError("a key epoch that no ledger holds")
            return m.SessionProposal(
                SessionParams(
                    _sized(x.study_digest, 32), x.epoch, tuple(_sized(k, 32) for k in x.roster), x.max_corrupt,
                    x.min_active, x.max_absent, x.ring_bits, "strict" if x.mode == "strict" else "double", x.suite,
                )
            )  # fmt: skip
        case pb.KeyAdvertisement():
            return _read_advertisement(x)
        case pb.Roster():
            if len(x.advertisements) > MAX_SITES:
                raise PeerError("a roster of too many sites")
            return m.Roster(tuple(map(_read_advertisement, x.advertisements)))
        case pb.Ratification():
            return _read_ratification(x, MAX_SITES)  # a site's own, to the exchange: all that it names
        case pb.SurvivorProposal():
            return m.SurvivorProposal(_sized(x.ctx, 32), x.version, _ascending(x.survivors), _salts(x.salts))
        case pb.SurvivorAck():
            return m.SurvivorAck(_index(x.index), x.version, _sized(x.digest, 32), _sized(x.signature, 64))
        case pb.UnmaskRequest():
            return m.UnmaskRequest(
                _sized(x.ctx, 32), x.version, _ascending(x.survivors), _salts(x.salts),
                _unique(x.seals, "to", "box", 48), _read_acks(x.acks),
            )  # fmt: skip
        case pb.UnmaskShares():
            return m.UnmaskShares(
                _index(x.index), _sized(x.ctx, 32), x.version, _unique(x.shares, "index", "value", 32),
                _unique(x.pair_seeds, "index", "value", 32),
            )  # fmt: skip
        case pb.SeedRequest():
            start = _read_start(x.round_start, bytes(payload)) if x.HasField("round_start") else None
            return m.SeedRequest(
                _sized(x.ctx, 32), x.version, _ascending(x.survivors), _salts(x.salts), _read_acks(x.acks),
                _ascending(x.wanted), start,
            )  # fmt: skip
        case pb.PairSeeds():
            return m.PairSeeds(_index(x.index), _sized(x.ctx, 32), _unique(x.pair_seeds, "index", "value", 32))
        case pb.RoundCancel():
            return m.RoundCancel(_sized(x.ctx, 32))
        case pb.CancelAck():
            return _read_cancel(x)
        case pb.Hold():
            return m.Hold(x.round, x.until_unix)
        case pb.Withdraw():
            return m.Withdraw(_sized(x.study_digest, 32), _sized(x.session_id, 0, 32))
        case pb.StudyRefusal():
            if x.code not in RefusalCode.__members__:
                raise PeerError("an unknown refusal code")
            return m.StudyRefusal(x.code)
        case pb.Refusal():
            return m.Refusal(_index(x.box_failed) if x.has_box_failed else None)
        case _:
            raise PeerError(f"an unknown frame {type(x).__name__}")
