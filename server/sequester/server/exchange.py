"""The exchange: which studies there are, who decided what, and the streams of those that run.

It relays and adds; it holds no key that signs a study or vouches for a hospital, and nothing in it can open one hospital's
numbers. Each running study is one `StudyRun` behind one stream per hospital. Services (`services.py`) bring calls in,
`serve.py` runs the process, Flower (`flower/`) only tells hospitals that a study wants them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sequester.protocols import exchange_pb2 as pb
from sequester.protocols import privacy
from sequester.protocols.errors import PeerError, RoundAbandoned, SequesterError, StudyError
from sequester.protocols.release import Release, judge
from sequester.protocols.secagg import keys
from sequester.protocols.secagg.messages import KeyAdvertisement, Message, Resume
from sequester.protocols.secagg.records import adv_json
from sequester.protocols.signing import open_document, sha256
from sequester.protocols.states import FINAL, StudyState
from sequester.protocols.study import Study, parse_study
from sequester.protocols.wire import MAX_FRAME_BYTES, Limits, Reader, check_hello, frames, hello
from sequester.server import decisions, enrolment
from sequester.server.release import words
from sequester.server.rounds import SessionLost, StudyRun, results_bytes
from sequester.server.store import Store, StoreFault

log = logging.getLogger("sequester.exchange")

DISK_S = 2.0  # how often a full disk is tried again
RECEIPTS_S = 10.0  # how long the end of a study waits for receipts of hospitals whose streams stand
QUEUED = 4096  # messages that wait for one hospital; an honest one has a few
STREAMS = 64  # of one hospital at once; an honest one has one for each study that runs
FAREWELL_S = 60.0  # how long a stream may stand whose study is over
_HELLO_S = 30.0
Read = Callable[[], Awaitable[pb.Frame | None]]
Write = Callable[[pb.Frame], Awaitable[None]]


class Stream:
    """One hospital's standing stream: what is said to it goes out in order, by one writer."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._queue: asyncio.Queue[Message | pb.Frame] = asyncio.Queue()
        self.closed = asyncio.Event()

    def say(self, message: Message | pb.Frame) -> None:
        """Queue a message; a stream that ended drops it, the hospital is told again when it is back."""
        if self._queue.qsize() >= QUEUED:  # it asks and does not listen: what waits for it costs memory here
            self.closed.set()
            return
        self._queue.put_nowait(message)

    async def drain(self) -> None:
        """Write what is queued until the stream ends."""
        while True:
            message = await self._queue.get()
            for frame in [message] if isinstance(message, pb.Frame) else frames(message):
                await self._write(frame)
            self._queue.task_done()

    async def drained(self) -> None:
        """Return when all that was queued is written."""
        await self._queue.join()


@dataclass(slots=True)
class Running:
    """A study that runs: its rounds, its streams, what Flower reported."""

    run: StudyRun
    streams: dict[str, Stream] = field(default_factory=dict)
    reports: dict[str, str] = field(default_factory=dict)
    receipts: asyncio.Event = field(default_factory=asyncio.Event)
    is_over: bool = False
    task: asyncio.Task[None] | None = None
    began: float = field(default_factory=time.monotonic)


class Exchange:
    """Everything but sockets. `changed` is set whenever a study starts or ends, for whoever dispatches."""

    def __init__(self, store: Store, consortium: str, coordinator: bytes) -> None:
        self.store = store
        self.changed = asyncio.Event()
        self._consortium = consortium
        self._coordinator = coordinator
        self._running: dict[str, Running] = {}
        self._paused: dict[str, asyncio.Task[None]] = {}
        self._studies: dict[str, Study] = {}
        self._farewells: dict[tuple[str, str], Stream] = {}  # (study that is over, hospital) -> its stream
        self._open: Counter[str] = Counter()  # hospital -> its streams, those without a Hello included

    # ---- documents ----------------------------------------------------------------------------------------------

    def study(self, digest: str) -> Study:
        """The published study of that digest."""
        if digest not in self._studies:
            document, _ = self.store.study(digest)
            body = open_document(document, "study", self._coordinator).body_bytes
            self._studies[digest] = parse_study(body)
        return self._studies[digest]

    def publish(self, document: bytes, bundle: bytes) -> str:
        """Keep a study that the coordinator signed, with its bundle; its digest."""
        signed = open_document(document, "study", self._coordinator)
        study = parse_study(signed.body_bytes)
        if study.consortium != self._consortium:
            raise StudyError(f"the study is of `{study.consortium}`, this is `{self._consortium}`", hint="correct it")
        if sha256(bundle) != study.bundle:
            raise StudyError(
                f"the bundle has SHA-256 {sha256(bundle)[:12]}, the study names {study.bundle[:12]}",
                hint="publish the very file that `study sign --bundle` was given",
            )
        if struck := self._struck(study):
            raise StudyError(
                f"{', '.join(struck)}: not among the hospitals admitted here, or there with another identity key",
                hint="`sequester-server enrolments` lists them",
            )
        if study.expires_at <= datetime.now(UTC):
            raise StudyError(f"the study expired at {study.expires}", hint="sign it again with a later date")
        self.store.publish(signed.digest, document, bundle)
        if study.supersedes is not None and study.supersedes in self.store.digests():
            self._supersede(study.supersedes)
        return signed.digest

    def _supersede(self, digest: str) -> None:
        if self.store.state(digest) in (StudyState.PUBLISHED, StudyState.APPROVED, StudyState.DONE):
            self.store.move(digest, "supersede", "an amendment was published")

    def members(self) -> list[dict[str, Any]]:
        """The bodies of the coordinator's member documents."""
        return [open_document(raw, "member", self._coordinator).body for raw in enrolment.members(self.store)]

    def _struck(self, study: Study) -> list[str]:
        """Hospitals of a study whose membership has ended, or stands for another identity key."""
        admitted = {body["site"]: body["identity_key"] for body in self.members()}
        return [site.id for site in study.sites if admitted.get(site.id) != site.key]

    def addressed(self, site: str, digest: str) -> Study:
        """The study, if it is addressed to this hospital."""
        study = self.study(digest)
        if site not in study.site_ids:
            raise StudyError(f"study {digest[:12]} is not addressed to `{site}`", hint="ask the coordinator")
        return study

    def studies_for(self, site: str) -> list[bytes]:
        """The signed documents of every study that is addressed to a hospital."""
        return [self.store.study(d)[0] for d in self.store.digests() if site in self.study(d).site_ids]

    def decide(self, site: str, document: bytes) -> None:
        """Keep a hospital's signed approval or refusal, and move the study where that decides it."""
        digest, role, approvers = decisions.read(document, site, self.study)
        state = self.store.state(digest)
        if state in FINAL:
            raise StudyError(f"study {digest[:12]} is {state} already", hint="nothing is left to decide")
        self.store.decide(digest, site, role, document, approvers)
        standing = decisions.standing(self.store.decisions(digest), self.study(digest))
        if state in (StudyState.PUBLISHED, StudyState.APPROVED) and any(
            w.startswith("refused") for w in standing.values()
        ):
            refusals = ", ".join(f"{name} {word}" for name, word in standing.items() if word.startswith("refused"))
            self.store.move(digest, "too-many-refusals", refusals)
        elif state is StudyState.PUBLISHED and all(word == "approved" for word in standing.values()):
            self.store.move(digest, "enough-approvals")

    # ---- running ------------------------------------------------------------------------------------------------

    def start(self, digest: str) -> None:
        """Run an approved study; one that was suspended goes on in a new key epoch."""
        state = self.store.state(digest)
        if state is StudyState.PUBLISHED:
            standing = decisions.standing(self.store.decisions(digest), self.study(digest))
            waiting = ", ".join(f"{name} ({word})" for name, word in standing.items() if word != "approved")
            raise StudyError(f"not every hospital has approved: {waiting}", hint="`study status` shows who has")
        if struck := self._struck(self.study(digest)):
            raise StudyError(
                f"{', '.join(struck)}: no longer among the hospitals admitted here",
                hint="a study runs with every hospital that it names: publish an amendment without the struck ones",
            )
        run_id, epoch = self.store.run(digest)
        if state is StudyState.SUSPENDED:
            self.store.set_run(digest, run_id, epoch + 1)
            self.store.move(digest, "resume")
        else:
            self.store.move(digest, "start")
        self._begin(digest)

    def resume_all(self) -> None:
        """Take up every study that was running when the exchange ended."""
        for digest in self.store.digests():
            self._resume(digest)

    def _resume(self, digest: str) -> None:
        if self.store.state(digest) in (StudyState.RUNNING, StudyState.HELD):
            self._begin(digest)
            if self.store.state(digest) is StudyState.HELD:
                self._running[digest].run.released.clear()

    def _begin(self, digest: str) -> None:
        study = self.study(digest)

        async def say(index: int, message: Message) -> None:
            stream = running.streams.get(study.site_ids[index])
            if stream is not None:
                stream.say(message)

        running = Running(StudyRun(study, digest, self.store, say, self.store.run(digest)[1]))
        self._running[digest] = running
        running.task = asyncio.create_task(self._run(digest, running))
        self.changed.set()

    async def _run(self, digest: str, running: Running) -> None:
        try:
            await self._to_its_end(digest, running)
        except StoreFault as error:
            await self._pause(digest, running, error)

    async def _pause(self, digest: str, running: Running, error: StoreFault) -> None:
        """The machine in memory is ahead of the disk: forget it, wait for room, take up what is written."""
        log.error("study %s stands still: %s; %s", digest[:12], error.message, error.hint)
        task = asyncio.current_task()
        assert task is not None
        self._paused[digest] = task
        if self._running.get(digest) is running:
            del self._running[digest]
        running.run.stop()
        for stream in running.streams.values():
            stream.closed.set()
        while not self.store.is_writable():
            await asyncio.sleep(DISK_S)
        del self._paused[digest]
        log.info("study %s: the store can be written again", digest[:12])
        self._resume(digest)

    async def _to_its_end(self, digest: str, running: Running) -> None:
        left = (running.run.study.expires_at - datetime.now(UTC)).total_seconds()
        await self._cut_struck(digest, running)  # who was struck while the exchange did not run
        try:
            async with asyncio.timeout(max(left, 0.0)):
                results = results_bytes(await running.run.run())
        except TimeoutError:
            await self._end(digest, "expire", "its date has passed")
        except SessionLost as error:
            if running.run.withdrawn:
                await self._end(digest, "abandon", f"{error.message}; left: {', '.join(running.run.withdrawn)}")
            else:
                await self._suspend(digest, error.message)
        except RoundAbandoned as error:
            await self._end(digest, "abandon", error.message + (f"; {error.hint}" if error.hint else ""))
        except StoreFault:
            raise
        except SequesterError as error:
            await self._end(digest, "abandon", error.message)
        else:
            self.store.set_results(digest, results)
            await running.run.released.wait()  # a held study does not end either
            await self._end(digest, "finish", "")

    async def _suspend(self, digest: str, reason: str) -> None:
        """Streams close without a farewell: hospitals wait, and hear of the next epoch when it begins."""
        log.warning("study %s suspended: %s", digest[:12], reason)
        self.store.move(digest, "suspend", reason)
        running = self._running.pop(digest)
        running.run.stop()
        for stream in running.streams.values():
            stream.closed.set()
        self.changed.set()

    async def _end(self, digest: str, event: str, reason: str) -> None:
        """Move the study to its end and tell every hospital whose stream stands."""
        state = self.store.move(digest, event, reason)
        log.info("study %s is %s%s", digest[:12], state, f": {reason}" if reason else "")
        running = self._running.get(digest)
        if running is None:
            return
        running.run.stop()
        if running.task is not None and running.task is not asyncio.current_task():
            running.task.cancel()
        running.is_over = True
        for stream in running.streams.values():
            stream.say(self._farewell(digest, state))
        if running.streams:
            try:
                await asyncio.wait_for(running.receipts.wait(), RECEIPTS_S)
            except TimeoutError:
                log.warning("study %s: not every hospital sent a receipt", digest[:12])
        for site in set(running.streams) - set(self.store.receipts(digest)):
            running.streams[site].closed.set()  # on its next stream it hears the end, and has its time for a receipt
        del self._running[digest]
        self.changed.set()

    def _farewell(self, digest: str, state: StudyState) -> pb.Frame:
        if state is StudyState.DONE:
            data = self.store.results(digest) or b""
            return pb.Frame(done=pb.Done(results_sha256=bytes.fromhex(sha256(data))))
        return pb.Frame(stop=pb.Stop(state=state.value))

    async def control(self, digest: str, act: str) -> None:
        """The coordinator's `hold`, `release` or `withdraw`."""
        running = self._running.get(digest)
        match act:
            case "hold" | "release":
                self.store.move(digest, act)
                if running is not None:
                    (running.run.released.clear if act == "hold" else running.run.released.set)()
            case "withdraw":
                await self._end(digest, "withdraw", "the coordinator withdrew it")
            case _:
                raise StudyError(f"no such act: `{act[:20]}`", hint="hold, release or withdraw")

    async def stopped_by_flower(self, digest: str) -> None:
        """`flwr stop` counts as the coordinator's withdrawal (spec/flower.md, section 10)."""
        if digest in self._running:
            await self._end(digest, "withdraw", "the run was stopped through Flower")

    async def roster_changed(self) -> None:
        """A membership began or ended: who is struck loses its streams, and has left every study that runs."""
        for digest, running in list(self._running.items()):
            await self._cut_struck(digest, running)

    async def _cut_struck(self, digest: str, running: Running) -> None:
        study = running.run.study
        for site in self._struck(study):
            if site not in running.run.withdrawn:
                log.warning("study %s goes on without %s, whose membership has ended", digest[:12], site)
                await running.run.leaves(study.site_ids.index(site))
            if site in running.streams:
                running.streams[site].closed.set()

    async def expire(self) -> None:
        """Studies that were never started and whose date has passed."""
        now = datetime.now(UTC)
        for digest in self.store.digests():
            if (
                self.store.state(digest) not in FINAL
                and digest not in self._running
                and self.study(digest).expires_at < now
            ):
                self.store.move(digest, "expire", "its date has passed")

    async def close(self) -> None:
        """End every run here; the store keeps what is needed to go on."""
        tasks = [r.task for r in self._running.values() if r.task is not None] + list(self._paused.values())
        for running in self._running.values():
            running.run.stop()
            for stream in running.streams.values():
                stream.closed.set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- dispatch -----------------------------------------------------------------------------------------------

    def running(self) -> list[str]:
        """Studies that run here now."""
        return sorted(self._running)

    def all_stand(self, digest: str) -> bool:
        """True where every hospital of a running study has a stream."""
        running = self._running[digest]
        return set(running.streams) == set(running.run.study.site_ids)

    def joins(self, digest: str) -> pb.JoinList:
        """Whom the ServerApp still has to call, and whether the study is over."""
        running = self._running.get(digest)
        if running is None:
            return pb.JoinList(over=True)
        keys = {body["site"]: body["supernode_key"].encode() for body in self.members()}
        study = running.run.study
        return pb.JoinList(
            joins=[
                pb.Join(site=name, supernode_key=keys.get(name, b""), stands=name in running.streams)
                for name in study.site_ids
            ],
            bundle_sha256=bytes.fromhex(study.bundle),
        )

    def report(self, digest: str, site: str, status: str) -> None:
        """What became of one `join`."""
        running = self._running.get(digest)
        if running is not None and site in running.run.study.site_ids:
            if running.reports.get(site) != status:
                log.info("study %s: %s answered `%s`", digest[:12], site, status)
            running.reports[site] = status

    # ---- streams ------------------------------------------------------------------------------------------------

    async def session(self, site: str, read: Read, write: Write) -> None:
        """One hospital's stream for one study, from Hello to its end; `PeerError` where it breaks the protocol."""
        if self._open[site] >= STREAMS:
            raise StudyError(f"{STREAMS} streams of `{site}` stand", hint="the gate tries again when one has ended")
        self._open[site] += 1
        try:
            await self._session(site, read, write)
        finally:
            self._open[site] -= 1

    async def _session(self, site: str, read: Read, write: Write) -> None:
        first = await asyncio.wait_for(read(), _HELLO_S)
        if first is None:
            return
        greeting = check_hello(Reader(Limits(0, 32)).take(first))
        digest = greeting.study_digest.hex()
        study = self.addressed(site, digest)
        if site in self._struck(study):
            raise StudyError(
                f"`{site}` is enrolled with another identity than study {digest[:12]} names",
                hint="ask for an amendment",
            )
        self._require_running(digest)
        await write(hello(greeting.study_digest))
        running = self._require_running(digest)  # it may have ended meanwhile
        stream = Stream(write)
        if running is None or running.is_over:
            stream.say(self._farewell(digest, self.store.state(digest)))
        older = running.streams.get(site) if running is not None else self._farewells.get((digest, site))
        if older is not None:
            older.closed.set()
        if running is not None:
            running.streams[site] = stream
        else:
            self._farewells[digest, site] = stream
        writer, closed = asyncio.create_task(stream.drain()), asyncio.create_task(stream.closed.wait())
        listening = asyncio.create_task(self._listen(site, study, digest, running, stream, read))
        try:
            limit = None if running is not None else FAREWELL_S
            done, _ = await asyncio.wait(
                {writer, closed, listening}, timeout=limit, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                raise PeerError(f"`{site}` takes no leave of a study that is over")
            for task in done:
                task.result()
            if listening in done:  # what it is still to hear goes out before this stream closes
                await asyncio.wait_for(stream.drained(), RECEIPTS_S)
        finally:
            for task in (writer, closed, listening):
                task.cancel()
            await asyncio.gather(writer, closed, listening, return_exceptions=True)
            if running is not None and running.streams.get(site) is stream:
                del running.streams[site]
                self._all_receipts(digest, running)
            if self._farewells.get((digest, site)) is stream:
                del self._farewells[digest, site]

    def _require_running(self, digest: str) -> Running | None:
        """The study as it runs, None where it has ended; refused where it does neither."""
        running, state = self._running.get(digest), self.store.state(digest)
        if running is None and state not in FINAL:
            raise StudyError(f"study {digest[:12]} does not run now: it is {state}", hint="the gate tries again")
        return running

    async def _listen(
        self, site: str, study: Study, digest: str, running: Running | None, stream: Stream, read: Read
    ) -> None:
        index = study.site_ids.index(site)
        reader = Reader(Limits.for_study(study))
        while True:
            frame = await read()
            if frame is None:
                if running is not None and self._running.get(digest) is running and running.is_over:
                    # what its peers still say goes out before this stream closes
                    await asyncio.wait_for(running.receipts.wait(), RECEIPTS_S)
                return
            size = frame.ByteSize()
            if size > MAX_FRAME_BYTES:
                raise PeerError(f"a frame of {size} bytes, at most {MAX_FRAME_BYTES} are allowed")
            message = reader.take(frame)
            if running is not None:
                running.run.bytes_up[site] += size
            match message:
                case None:
                    continue
                case pb.Receipt():
                    self._receipt(site, study, digest, message.receipt.json)
                    stream.say(frame)  # kept: the hospital need not send it again
                    if running is not None:
                        self._all_receipts(digest, running)
                case pb.Hello() | pb.Stop() | pb.Done():
                    raise PeerError(f"{type(message).__name__} in the middle of a stream")
                case KeyAdvertisement() if running is None:
                    self._closing(study, digest, index, message)
                case _ if running is None or self._running.get(digest) is not running:
                    continue  # the study ended while this was on its way
                case Resume():
                    await running.run.stands(index, None if message.state == "IDLE" else message)
                case _:
                    await running.run.handle(index, message)

    def _closing(self, study: Study, digest: str, index: int, adv: KeyAdvertisement) -> None:
        """The last head that a hospital signed, from one that comes when the study is over: kept for later studies."""
        key = study.roster[index]
        epochs = range(self.store.run(digest)[1] + 1)
        if adv.session_id not in {keys.session_id(privacy.session_params(study, epoch)) for epoch in epochs}:
            raise PeerError(f"site {index} closes a session that never was")  # each name of one may take some rows
        if adv.index != index or not keys.is_signed(key, adv.signature, keys.advertisement_bytes(adv)):
            raise PeerError(f"the advertisement of site {index} is not signed by it")
        self.store.witness(key, adv.data_set, adv.counter, adv_json(adv))

    def _receipt(self, site: str, study: Study, digest: str, raw: bytes) -> None:
        body = open_document(raw, "receipt", study.roster[study.site_ids.index(site)]).body
        if (body.get("study"), body.get("site")) != (digest, site):
            raise PeerError(f"`{site}` sent a receipt of another study or site")
        self.store.set_receipt(digest, site, raw)

    def _all_receipts(self, digest: str, running: Running) -> None:
        if set(running.streams) <= set(self.store.receipts(digest)):
            running.receipts.set()

    # ---- what people ask ----------------------------------------------------------------------------------------

    def status(self, digest: str) -> dict[str, Any]:
        """Where a study stands, for the coordinator: no number of one hospital but bytes."""
        study, state = self.study(digest), self.store.state(digest)
        row: dict[str, Any] = {
            "digest": digest,
            "lineage": study.lineage,
            "title": study.title.get("en") or next(iter(study.title.values())),
            "state": state.value,
            "reason": self.store.reason(digest),
            "expires": study.expires,
            "rounds_closed": len(self.store.facts(digest)),
            "sites": decisions.standing(self.store.decisions(digest), study),
            "receipts": sorted(self.store.receipts(digest)),
            "release": words(self.release(digest)),
        }
        running = self._running.get(digest)
        if running is not None:
            row |= running.run.progress | {"seconds": round(time.monotonic() - running.began, 1)}
            row["sites"] = {
                name: "standing" if name in running.streams else running.reports.get(name, "called")
                for name in study.site_ids
            }
        return row

    def release(self, digest: str) -> Release:
        """Where the export of a study's models stands."""
        return judge(self.study(digest), digest, self._coordinator, self.store.release(digest))

    def results(self, digest: str) -> bytes:
        """What `study results` writes out: results.json, the study and the receipts, as one JSON object of texts.

        `PrivacyError` while the release gate holds a private model back.
        """
        data = self.store.results(digest)
        if data is None:
            state = self.store.state(digest)
            raise StudyError(f"study {digest[:12]} has no results: it is {state}", hint=self.store.reason(digest))
        self.release(digest).require()
        texts = {
            "results": data.decode(),
            "study": self.store.study(digest)[0].decode(),
            "receipts": {site: raw.decode() for site, raw in self.store.receipts(digest).items()},
        }
        return json.dumps(texts).encode()
