"""The studies that run: from `start` to their end, held, suspended or paused while the disk is full, and whom they call."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from sequester.protocols import exchange_pb2 as pb
from sequester.protocols.errors import RoundAbandoned, SequesterError, StudyError
from sequester.protocols.packets import Frame
from sequester.protocols.secagg.messages import Message
from sequester.protocols.signing import sha256
from sequester.protocols.states import FINAL, StudyState
from sequester.protocols.wire import frames
from sequester.server import decisions
from sequester.server.catalogue import Catalogue
from sequester.server.rounds import SessionLost, StudyRun, results_bytes
from sequester.server.store import Store, StoreFault

log = logging.getLogger("sequester.exchange")

DISK_S = 2.0  # how often a full disk is tried again
RECEIPTS_S = (
    30.0  # how long the end of a study waits for receipts of hospitals whose streams stand: seconds of CPU each
)
QUEUED = 4096  # messages that wait for one hospital; an honest one has a few
Write = Callable[[Frame], Awaitable[None]]


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


class Runs(Catalogue):
    """Running studies. `changed` is set whenever one starts or ends, for whoever dispatches."""

    def __init__(self, store: Store, consortium: str, coordinator: bytes) -> None:
        super().__init__(store, consortium, coordinator)
        self.changed = asyncio.Event()
        self._running: dict[str, Running] = {}
        self._paused: dict[str, asyncio.Task[None]] = {}

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

    # ---- dispatch -----------------------------------------------------------------------------------------------------

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
