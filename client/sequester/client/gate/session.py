"""One study at one site: drives the `member` state machine over the study's stream.

The loop is small on purpose. A frame comes in, the member returns effects, and they are performed in order: records
become durable before anything that follows them is said, and every frame that leaves is in the ledger before it leaves,
but Hello, which says versions and the study's digest. A broken stream is opened again by this loop alone, without
Flower; the member resumes where its journal says. Compute works in a task of its own, so that a stop is heard while it
does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import TypeVar

import grpc
import grpc.aio

from sequester.client.gate.contributor import Contributor
from sequester.client.gate.custodian import Custodian
from sequester.client.gate.delivery import METHOD, is_kept, receipt_frame
from sequester.client.gate.egress import Egress, Seldom
from sequester.client.gate.journal import Journal
from sequester.client.gate.ledger import Ledger
from sequester.client.gate.rules import MAX_EPOCHS
from sequester.protocols import exchange_pb2 as pb
from sequester.protocols.errors import PeerError, SequesterError, SiteError
from sequester.protocols.packets import Frame, packed, pieces, unpacked
from sequester.protocols.secagg.member import Member
from sequester.protocols.secagg.messages import (
    Contribute,
    Effect,
    Evidence,
    KeyAdvertisement,
    MaskedInput,
    Message,
    Persist,
    Refusal,
    Send,
    SessionProposal,
    StoreOutbox,
    StudyRefusal,
)
from sequester.protocols.states import FINAL, StudyState
from sequester.protocols.study import Study
from sequester.protocols.wire import Limits, Reader, check_hello, frames, hello

log = logging.getLogger("sequester.gate")

T = TypeVar("T")

RECONNECT_S = (0.2, 0.5, 1.0, 2.0, 5.0)  # the last one for ever: the exchange is back within ten seconds of a restart
DISK_S = 3.0  # how often a full disk is tried again
_HELLO_S = 30.0
_GOODBYE_S = 5.0
_LOST = (grpc.aio.AioRpcError, asyncio.InvalidStateError, PeerError)  # how a stream ends under whoever writes


@dataclass(slots=True)
class Progress:
    """What `sequester-client run` and the receipt show: counts and bytes."""

    state: str = "joining"
    analysis: str = ""
    rounds: int = 0
    bytes_up: int = 0
    frames_up: int = 0


class Session:
    """Runs one approved study to its end; `stands` is set while its stream stands."""

    def __init__(
        self,
        study: Study,
        digest: str,
        keep: Callable[[int | None], tuple[Member, Journal]],
        ledger: Ledger,
        start_compute: Callable[[], Awaitable[Custodian]],
        open_channel: Callable[[], grpc.aio.Channel],
        receipt: Callable[[Progress, str], Awaitable[bytes]],
        limits: Limits,
    ) -> None:
        self.study = study
        self.digest = digest
        self.progress = Progress()
        self.stands = asyncio.Event()
        self.final: str | None = None
        self.is_receipt_kept = False  # the exchange has said so
        self._keep = keep
        self._member, self._journal = keep(None)
        self._ledger = ledger
        self.egress = Egress(ledger, digest)
        self._contributor = Contributor(study, digest, start_compute)
        self._open_channel = open_channel
        self._receipt = receipt
        self._limits = limits
        self._call: grpc.aio.StreamStreamCall[bytes, Frame] | None = None
        self._closed: grpc.aio.StreamStreamCall[bytes, Frame] | None = None  # the last call that was closed here
        self._is_writing = False
        self._turn = asyncio.Lock()
        self._round: Contribute | None = None
        self._working: asyncio.Task[None] | None = None
        self._fault: SequesterError | None = None  # what stopped a contribution on its way to the disk
        self._said = ""  # the last fault in the log: one that lasts is said once
        self._seldom = Seldom()
        self._sent_receipt = b""
        self._is_leaving = False
        self._is_settled = False

    async def run(self) -> str:
        """The study's final state at this site; ends compute whatever happens."""
        tries = 0
        try:
            while self.final is None:
                left = (self.study.expires_at - datetime.now(UTC)).total_seconds()
                try:
                    async with asyncio.timeout(max(left, 0.0)):
                        await self._stream()
                except (grpc.aio.AioRpcError, PeerError, TimeoutError, asyncio.InvalidStateError) as error:
                    reason = error.code().name if isinstance(error, grpc.aio.AioRpcError) else str(error)
                    if times := self._seldom.times(reason):
                        log.warning("study %s: stream lost (%s), %d times so far", self.digest[:12], reason, times)
                except SequesterError as error:
                    await self._recover(error)
                except Exception as error:  # the outermost loop of a study: it must live on, from what is on disk
                    await self._recover(unforeseen(error))
                was_up = self.stands.is_set()
                self.stands.clear()
                self._call = None
                if self.final is None and datetime.now(UTC) > self.study.expires_at:
                    try:
                        await self._leave("expired")
                    except SequesterError as error:
                        await self._recover(error)
                if self.final is None:
                    tries = 0 if was_up else tries + 1
                    self.progress.state = "reconnecting"
                    await asyncio.sleep(RECONNECT_S[min(tries, len(RECONNECT_S) - 1)])
        finally:
            await self.discard()
        return self.final

    async def discard(self) -> None:
        """End compute and give the journal back."""
        await self._stop_work()
        self._journal.close()

    @property
    def isolation(self) -> str:
        """What the kernel said of compute's network, for the receipt."""
        return self._contributor.isolation

    async def ready_compute(self) -> None:
        """Start compute and load the cohort; a `SiteError` where isolation or the cohort says no."""
        await self._contributor.ready()

    async def withdraw(self) -> None:
        """Leave the study for good: tell the exchange if it listens, erase the session's keys."""
        hanging_up = asyncio.create_task(self._hang_up())
        try:
            async with self._turn:
                with contextlib.suppress(*_LOST):  # a stream that broke stops nobody
                    await self._perform(self._member.withdraw())
            await self._leave("withdrawn")
        finally:
            hanging_up.cancel()
        asyncio.get_running_loop().call_later(_GOODBYE_S, self._close)  # if the exchange does not hang up

    async def _hang_up(self) -> None:
        """Close a stream on which nothing moves: an exchange that takes no bytes keeps nobody in its study."""
        while True:
            await asyncio.sleep(_GOODBYE_S)
            if self._is_writing:
                self._close()

    def _close(self) -> None:
        """Close the stream: whoever reads or writes there is told as of any other that is lost."""
        self._closed = self._call
        if self._call is not None:
            self._call.cancel()

    async def _recover(self, error: SequesterError) -> None:
        """A disk or a budget said no between two effects: what is on disk is what counts, once it can be opened."""
        self._fault = None
        while True:
            if error.message != self._said:
                log.error("study %s: %s; %s", self.digest[:12], error.message, error.hint)
            self._said = error.message
            self.progress.state = "waiting for the disk"
            await asyncio.sleep(DISK_S)
            try:
                await self._reload()
                return
            except SiteError as again:
                error = again

    async def _reload(self) -> None:
        """Forget what is in memory and stand where the journal says."""
        async with self._turn:
            if self._working is not None:
                self._working.cancel()
            self._round = None
            self._journal.close()
            self._member, self._journal = self._keep(None)

    def _renew(self) -> None:
        """Fresh keys for a new epoch; the ledger goes on, so nothing that was spent comes back."""
        log.info("study %s: a new key epoch begins", self.digest[:12])
        if self._working is not None:
            self._working.cancel()
        self._round = None
        self._journal.close()
        self._member, self._journal = self._keep(self._member.epoch)

    async def answer_hold(self, yes: bool) -> None:
        """A person's answer to a held round."""
        async with self._turn:
            await self._perform(self._member.answer_hold(yes))

    @property
    def holds(self) -> bool:
        """True while a round waits for a person."""
        return self._member.state == "HELD"

    # ---- the stream ---------------------------------------------------------------------------------------------

    async def _stream(self) -> None:
        async with self._open_channel() as channel:
            method = channel.stream_stream(METHOD, request_serializer=lambda data: data, response_deserializer=unpacked)
            call = method()  # type: ignore[call-arg]  # the stub knows only calls with an iterator
            await call.write(hello(bytes.fromhex(self.digest)).SerializeToString())
            reader = Reader(self._limits)
            check_hello(reader.take(await asyncio.wait_for(self._read(call), _HELLO_S)), bytes.fromhex(self.digest))
            self._call = call
            self.stands.set()
            self.progress.state = "joined"
            async with self._turn:
                await self._perform(self._member.resume())
            while self.final is None:
                frame = await self._read(call)
                if self.final is not None:  # this site left while it waited
                    self._hear_last(frame, reader)
                    break
                await self._take(reader.take(frame))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._until_closed(call, reader), _HELLO_S)  # the receipt is on its way

    async def _until_closed(self, call: grpc.aio.StreamStreamCall[bytes, Frame], reader: Reader) -> None:
        """Hear the others' closing advertisements until the exchange hangs up."""
        while isinstance(frame := await self._frame(call), Frame):
            self._hear_last(frame, reader)

    def _hear_last(self, frame: Frame, reader: Reader) -> None:
        """After this site's own last word: that its receipt is kept, and what others close with."""
        if is_kept(frame, self._sent_receipt):
            self.is_receipt_kept = True
        elif isinstance(message := reader.take(frame), KeyAdvertisement):
            self._member.handle(message)

    async def _read(self, call: grpc.aio.StreamStreamCall[bytes, Frame]) -> Frame:
        frame = await self._frame(call)
        if frame is grpc.aio.EOF:  # type: ignore[attr-defined]  # missing in the stubs
            raise PeerError("the exchange closed the stream")
        assert isinstance(frame, Frame)
        return frame

    async def _frame(self, call: grpc.aio.StreamStreamCall[bytes, Frame]) -> object:
        with self._closed_here(call):
            return await call.read()

    @contextlib.contextmanager
    def _closed_here(self, call: grpc.aio.StreamStreamCall[bytes, Frame]) -> Iterator[None]:
        """A stream that `_close` ended is an error of the stream and no end of the session.

        gRPC cancels whoever waits there; of a write it does not even say that the call was cancelled.
        """
        try:
            yield
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if call is not self._closed or (task is not None and task.cancelling()):
                raise  # this session is being stopped
            raise self._fault or PeerError("the stream was closed here") from None

    async def _take(self, message: object) -> None:
        match message:
            case None:
                return
            case pb.Stop():
                if message.state not in {state.value for state in FINAL if state is not StudyState.DONE}:
                    raise PeerError("a stop without an end")
                await self._leave(message.state)
            case pb.Done():
                await self._leave("done")
            case pb.Hello() | pb.Receipt():
                raise PeerError(f"{type(message).__name__} in the middle of a stream")
            case _:
                async with self._turn:
                    if self._is_leaving:  # nothing is said after the last word
                        return
                    # who withdrew is not brought back by the exchange
                    if isinstance(message, SessionProposal) and self._member.state not in ("IDLE", "WITHDRAWN"):
                        if message.params.epoch > self._member.epoch and self._ledger.epochs(self.digest) < MAX_EPOCHS:
                            self._renew()
                    await self._perform(self._member.handle(message))  # type: ignore[arg-type]  # Reader yields messages

    async def _leave(self, state: str) -> None:
        """The study is over here: settle, then the receipt, whose ledger head vouches for all of that.

        Final only when both are written: a disk that refuses one has the end told again on the next stream.
        """
        self._is_leaving = True  # not by cancelling the contribution: a write that is cancelled takes its stream along
        async with self._turn:  # two writers at once would lose the receipt
            if self.final is not None:
                return
            self._settle(state)
            lost = contextlib.suppress(*_LOST)
            if self._call is not None:
                with lost:
                    await self._perform(self._member.closing(*self._ledger.head()))
            self._sent_receipt = await self._receipt(
                self.progress, state
            )  # where it does not arrive, `delivery` takes it
            if self._call is not None:
                with lost:
                    await self._write("Receipt", [receipt_frame(self._sent_receipt)])
                    await self._call.done_writing()
            self.final = state

    # ---- effects ------------------------------------------------------------------------------------------------

    async def _perform(self, effects: Sequence[Effect]) -> None:
        pending = deque(effects)
        while pending:
            match pending.popleft():
                case Persist(record=record, charge=charge):
                    # the charge precedes the record, the record precedes the bytes: a crash in between costs budget,
                    # never privacy
                    if charge is not None:
                        self._ledger.spend(self.digest, charge.analysis, charge.step, charge.attempt)
                    self._journal.append(record)
                case StoreOutbox(message=message):
                    self._journal.store_outbox(message)
                case Contribute() as asked:
                    self._begin(asked)
                case Evidence(what=what, record=record):
                    log.error("study %s: %s; the proof is in the ledger", self.digest[:12], what)
                    self._ledger.append("note", {"study": self.digest, "evidence": what, "record": record.hex()})
                    proof = json.loads(record)
                    if "counter" in proof:  # stands until the ledger that was signed is back: `StudyRules.reserve`
                        self._ledger.append("rolled-back", {"counter": proof["counter"], "head": proof["head"]})
                case Send(message=message):
                    await self._send(message)

    async def _send(self, message: Message) -> None:
        if isinstance(message, StudyRefusal | Refusal):
            refusal = self._member.last_refusal
            reason = refusal.message if refusal else "no reason kept"
            if times := self._seldom.times(reason):
                log.warning("study %s refused here: %s (%d times so far)", self.digest[:12], reason, times)
        await self._write(type(message).__name__, list(frames(message)))
        if isinstance(message, MaskedInput):
            self.progress.rounds += 1

    async def _write(self, kind: str, sent: list[Frame]) -> None:
        round_number = self._round.round if self._round is not None else 0
        epoch = self._member.epoch if kind == "KeyAdvertisement" else None
        self.progress.bytes_up += self.egress.leaves(kind, chain.from_iterable(map(pieces, sent)), round_number, epoch)
        self.progress.frames_up += len(sent)
        if (call := self._call) is None:
            return  # said again on the next stream: the member resumes
        self._is_writing = True
        try:
            with self._closed_here(call):
                for frame in sent:
                    await call.write(packed(frame))
        finally:
            self._is_writing = False

    # ---- compute ------------------------------------------------------------------------------------------------

    def _begin(self, asked: Contribute) -> None:
        if self._working is not None and not self._working.done():
            self._working.cancel()
        self._round = asked
        self.progress.state = "computing"
        self.progress.analysis = f"{asked.task.analysis}, step {asked.task.step + 1}"
        self._working = asyncio.create_task(self._contribute(asked))

    async def _contribute(self, asked: Contribute) -> None:
        try:
            words = await self._contributor.words(asked)
        except (
            Exception
        ) as error:  # whatever it was, nothing left: one reason in the log, and nobody waits for this round
            fault = error if isinstance(error, SequesterError) else unforeseen(error)
            log.error("study %s, %s: %s", self.digest[:12], self.progress.analysis, fault.message)
            await self._speak(asked, self._member.give_up)
            return
        if await self._speak(asked, lambda: self._member.contribute(words)):
            self.progress.state = "waiting"
            self._said = ""

    async def _speak(self, asked: Contribute, act: Callable[[], Sequence[Effect]]) -> bool:
        """Whether what the member says to the round that asked, and to no later one, was said."""
        try:
            async with self._turn:
                if self._round is not asked or self._is_leaving:
                    return False
                await self._perform(await asyncio.to_thread(act))
                return True
        except _LOST:
            log.warning("study %s: stream lost while speaking; the stored bytes go out again", self.digest[:12])
        except Exception as error:  # the member may be ahead of the disk: what is written is what counts
            self._break(error if isinstance(error, SequesterError) else unforeseen(error))
        return False

    def _break(self, error: SequesterError) -> None:
        """The member is ahead of the disk: have the stream's own loop end it and stand where the journal says."""
        self._fault = error
        self._close()

    async def _stop_work(self) -> None:
        if self._working is not None:
            self._working.cancel()
        await self._contributor.end()

    def _settle(self, state: str) -> None:
        if not self._is_settled:
            self._ledger.settle(self.digest)
            self._ledger.append("note", {"study": self.digest, "ended": state, "said_again": self.egress.repeats})
            self._is_settled = True
        self.progress.state = state


def unforeseen(error: Exception) -> SiteError:
    """A fault of the code as the one reason that is logged: its kind and place, for its words may hold a patient's numbers."""
    at = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" at {Path(at[0].filename).name}:{at[0].lineno}" if at else ""
    return SiteError(
        f"an unforeseen {type(error).__name__}{place}",
        hint="nothing left after it; tell the maintainers kind and place",
    )
