"""One study at the exchange: drives the `aggregator` and the study's analyses, sans socket.

    for each analysis: start -> (for each step: round -> secure sum -> combine) -> result

State and broadcast are journalled after each closed round; after a restart the study goes on from the last one. A step
whose round was abandoned is tried again as the next attempt, as long as spare attempts are left.
"""

from __future__ import annotations

import asyncio
import json
import logging
import statistics
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequester.protocols import arrays, privacy
from sequester.protocols.analyses.analysis import Finished, Layout, Next
from sequester.protocols.analyses.registry import Plan, analysis_of
from sequester.protocols.errors import RoundAbandoned
from sequester.protocols.memory import Room
from sequester.protocols.secagg.aggregator import Aggregator
from sequester.protocols.secagg.messages import (
    Abandoned,
    Deadline,
    Effect,
    KeyAdvertisement,
    MaskedInput,
    Message,
    Outcome,
    Persist,
    Resume,
    Send,
    UnmaskShares,
    Withdraw,
)
from sequester.protocols.secagg.records import adv_from_json, adv_json
from sequester.protocols.study import Study
from sequester.server.store import Store, StoreFault

log = logging.getLogger("sequester.exchange")

SET_UP = "set-up"
LONG_WORDS = 65_536  # vectors beyond it are added and opened in a thread, so that other studies' streams go on
Say = Callable[[int, Message], Awaitable[None]]


class SessionLost(RoundAbandoned):
    """The protocol session cannot go on; the study can, in a new epoch with fresh keys."""


class StudyRun:
    """One running study. `say(index, message)` queues a message for a site; it may drop it where no stream stands."""

    def __init__(self, study: Study, digest: str, store: Store, say: Say, epoch: int) -> None:
        self.study = study
        self.digest = digest
        self._room = Room()  # of an opened sum, until the analysis has let go of it
        self.progress: dict[str, Any] = {"phase": SET_UP, "analysis": "", "step": 0, "of": 0, "round": 0}
        self.bytes_up: dict[str, int] = dict.fromkeys(study.site_ids, 0)  # since the last closed round
        self.released = asyncio.Event()
        self.released.set()
        self._store = store
        self._say = say
        self._params = privacy.session_params(study, epoch)
        self._lock = asyncio.Lock()
        self._fault: StoreFault | None = None
        self._faulted = asyncio.Event()
        self._ready = asyncio.Event()
        self._ended: asyncio.Future[Outcome | Abandoned] | None = None
        self._session_over: Abandoned | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._deadline_task: asyncio.Task[None] | None = None
        self._restored = bool(records := store.records(digest, epoch))
        self._is_long = max(privacy.layout(study, plan, 0).length for plan in study.analyses) > LONG_WORDS
        deadline = float(study.aggregation.round_deadline_s)
        left = max(1.0, (study.expires_at - datetime.now(UTC)).total_seconds())
        self._machine = Aggregator.restore(records, self._params, deadline, set_up_s=left)
        self._machine.knows(adv_from_json(row) for row in store.witnessed())
        if self._machine.state == "COLLECTING":
            # sites may deliver the round that was open before `run` gets there
            self._ended = asyncio.get_running_loop().create_future()

    # ---- what the exchange tells it -----------------------------------------------------------------------------

    async def handle(self, index: int, message: Message) -> None:
        """One message of site `index`; `PeerError` where it breaks the protocol.

        What is begun is brought to its end although the site's stream closes meanwhile.
        """
        async with self._turn():
            await _to_its_end(self._handled(index, message))

    async def _handled(self, index: int, message: Message) -> None:
        if isinstance(message, MaskedInput | UnmaskShares) and self._is_long:
            effects = await asyncio.to_thread(self._machine.handle, index, message)
        else:
            effects = self._machine.handle(index, message)
        if isinstance(message, KeyAdvertisement):
            self._store.witness(self.study.roster[index], message.data_set, message.counter, adv_json(message))
        await self._perform(effects)

    async def leaves(self, index: int) -> None:
        """Site `index` is out of the study for good, whether it says so or not."""
        await self.handle(index, Withdraw(bytes.fromhex(self.digest), self._machine.session_id))

    async def stands(self, index: int, resume: Resume | None) -> None:
        """A site's stream stands (again)."""
        async with self._turn():
            await self._perform(self._machine.returned(index, resume))

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """One at a time with the machine; none after the store failed, for the machine is ahead of it then."""
        async with self._lock:
            if self._fault is not None:
                raise self._fault
            try:
                yield
            except StoreFault as error:
                self._fault = error
                self._faulted.set()
                raise

    @property
    def withdrawn(self) -> tuple[str, ...]:
        """Hospitals that left the study for good."""
        return tuple(self.study.site_ids[i] for i in sorted(self._machine.withdrawn))

    @property
    def is_set_up(self) -> bool:
        """True once every site has ratified the roster."""
        return self._ready.is_set()

    # ---- the study ----------------------------------------------------------------------------------------------

    async def run(self) -> dict[str, Any]:
        """The study's results; `RoundAbandoned` where it cannot go on, with the one reason.

        `StoreFault` where a record could not be written, by whomever: a new run takes up what was.
        """
        work = asyncio.create_task(self._work())
        fault = asyncio.create_task(self._faulted.wait())
        try:
            await asyncio.wait({work, fault}, return_when=asyncio.FIRST_COMPLETED)
            if self._fault is not None:
                raise self._fault
            return await work
        finally:
            for task in (work, fault):
                task.cancel()
            await asyncio.gather(work, fault, return_exceptions=True)

    async def _work(self) -> dict[str, Any]:
        began = time.monotonic()
        async with self._turn():
            await self._perform(self._machine.again() if self._restored else self._machine.start())
        if self._machine.state in ("READY", "COLLECTING"):
            self._ready.set()
        await self._ready.wait()
        if self._machine.state == "FAILED":
            raise SessionLost(self._why(self._session_over))
        set_up = time.monotonic() - began
        done = {
            name: Finished(result, arrays.decode(state))
            for name, (result, state) in self._store.finished(self.digest).items()
        }
        for plan in self.study.analyses:
            if plan.name not in done:
                done[plan.name] = await self._analysis(plan, done)
        return self._results(done, set_up)

    async def _analysis(self, plan: Plan, earlier: dict[str, Finished]) -> Finished:
        analysis = analysis_of(plan)
        following: Next | Finished = analysis.start(plan, self.study, earlier)
        step = 0
        last = self._store.last_closed(self.digest)
        if last is not None and last[1] == plan.name:
            saved = arrays.decode(last[3])
            state = {k[2:]: v for k, v in saved.items() if k.startswith("s.")}
            following = Next(state, {k[2:]: v for k, v in saved.items() if k.startswith("b.")})
            step = last[2] + 1
        total = privacy.rounds(self.study, plan)
        while isinstance(following, Next):
            await self.released.wait()
            self.progress |= {"phase": "rounds", "analysis": plan.name, "step": step + 1, "of": total}
            layout = privacy.layout(self.study, plan, step)
            attempt, outcome, facts = await self._step(plan, step, layout, arrays.encode(following.broadcast))
            combining = time.monotonic()
            vector = await asyncio.to_thread(self._opened, outcome, layout.length)
            facts["padding_sd"] = self._padding(plan, layout, vector, len(outcome.survivors))
            following = analysis.combine(plan, self.study, following.state, layout.split(vector), step)
            facts["combine_s"] = time.monotonic() - combining
            if isinstance(following, Next):
                saved = {f"s.{k}": v for k, v in following.state.items()}
                saved |= {f"b.{k}": v for k, v in following.broadcast.items()}
                state_bytes = arrays.encode(saved)
            else:
                state_bytes = b""
            facts["total_s"] += facts["combine_s"]
            facts["bytes_up"], self.bytes_up = self.bytes_up, dict.fromkeys(self.study.site_ids, 0)
            done = following if isinstance(following, Finished) else None
            result = (done.result, arrays.encode(done.state)) if done is not None else None
            self._store.close_round(
                self.digest, self._params.epoch, outcome.round, plan.name, step, attempt, state_bytes, facts, result
            )  # fmt: skip
            self.progress["closed"] = step + 1
            step += 1
        return following

    async def _step(
        self, plan: Plan, step: int, layout: Layout, broadcast: bytes
    ) -> tuple[int, Outcome, dict[str, Any]]:
        """The opened sum of one step; later attempts where a round is abandoned."""
        spares = privacy.spares(self.study, plan)
        resumed = self._open_attempt(plan, step)
        first = resumed if resumed is not None else self._machine.attempts(plan.name, step)
        for attempt in range(first, first + spares + 1):
            active = tuple(i for i in range(len(self.study.sites)) if i not in self._machine.withdrawn)
            began = time.monotonic()
            words = privacy.codec(self.study).words(layout.length)
            async with self._turn():
                if resumed is None or attempt > first:
                    self._ended = asyncio.get_running_loop().create_future()
                    task = privacy.task_for(self.study, plan, step, attempt, broadcast)
                    number = self._machine.last_round + 1
                    self.progress["round"] = number
                    await self._perform(
                        self._machine.start_round(number, active, words, layout.length, task, broadcast)
                    )
            assert self._ended is not None
            ended = await self._ended
            if isinstance(ended, Outcome):
                took = time.monotonic() - began
                return attempt, ended, {
                    "total_s": took, "survivors": [self.study.site_ids[i] for i in ended.survivors],
                    "coordinates": layout.coordinates,
                }  # fmt: skip
            reason = self._why(ended)
            log.warning("study %s: %s", self.digest[:12], reason)
            if ended.session_over:
                raise SessionLost(f"{plan.name}, step {step + 1}: {reason}")
            if attempt == first + spares:
                raise RoundAbandoned(f"{plan.name}, step {step + 1}: {reason}", hint="no spare attempt is left")
            await asyncio.sleep(0.5)  # cancels of the abandoned round come in, so that the retry may be free
        raise AssertionError("unreachable")

    def _why(self, ended: Abandoned | None) -> str:
        """The reason with the hospitals' names."""
        if ended is None:
            return "the session had failed before the exchange was restarted"
        names = ", ".join(self.study.site_ids[i] for i in ended.suspects)
        return ended.reason + (f" ({names})" if names else "")

    def _opened(self, outcome: Outcome, length: int) -> NDArray[np.float64]:
        codec = privacy.codec(self.study)
        return codec.values_of(outcome.total, length, self._room)

    def _open_attempt(self, plan: Plan, step: int) -> int | None:
        """The attempt of a round that was open when the exchange was stopped, None where none was."""
        if self._machine.state != "COLLECTING":
            return None
        task = self._machine.open_task
        return task.attempt if task is not None and (task.analysis, task.step) == (plan.name, step) else None

    def _padding(self, plan: Plan, layout: Layout, vector: np.ndarray[Any, Any], live: int) -> list[float] | None:
        """[sum of squares, count, expected variance] of the padding: the noise check of spec/privacy.md, section 8."""
        if not layout.padding:
            return None
        expected = privacy.padding_sd(self.study, plan, live) ** 2
        tail = vector[layout.coordinates :]
        return [float(tail @ tail), float(len(tail)), expected]

    # ---- effects ------------------------------------------------------------------------------------------------

    async def _perform(self, effects: Sequence[Effect]) -> None:
        pending = deque(effects)
        while pending:
            match pending.popleft():
                case Persist(record=record):
                    self._store.append(self.digest, self._params.epoch, record)
                case Send(message=message, to=to):
                    await self._say(to, message)
                case Deadline(token=token, after_s=after):
                    self._set_timer(token, after)
                case Outcome() as outcome:
                    self._end(outcome)
                case Abandoned() as abandoned:
                    if abandoned.session_over:
                        self._session_over = abandoned
                        self._ready.set()
                    self._end(abandoned)
        if self._machine.state == "READY":
            self._ready.set()

    def _end(self, how: Outcome | Abandoned) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(how)

    def _set_timer(self, token: int, after: float) -> None:
        if self._timer is not None:
            self._timer.cancel()

        async def expired() -> None:
            with suppress(StoreFault):  # `run` says it
                async with self._turn():
                    await self._perform(self._machine.deadline(token))

        def fire() -> None:
            self._deadline_task = asyncio.get_running_loop().create_task(expired())

        self._timer = asyncio.get_running_loop().call_later(after, fire)

    def stop(self) -> None:
        """No more deadlines."""
        if self._timer is not None:
            self._timer.cancel()

    # ---- results ------------------------------------------------------------------------------------------------

    def _results(self, done: dict[str, Finished], set_up: float) -> dict[str, Any]:
        from sequester.protocols.evidence import pooled_ratio, short_rounds  # it brings scipy

        facts = self._store.facts(self.digest)
        seconds = sorted(f["total_s"] for f in facts)
        sent = {name: sum(f["bytes_up"][name] for f in facts) + self.bytes_up[name] for name in self.study.site_ids}
        measured = [f for f in facts if f["padding_sd"]]
        promise = privacy.promise(self.study)
        attempts = {f["analysis"]: 0 for f in facts}
        for f in facts:
            attempts[f["analysis"]] += 1
        return {
            "format": 1,
            "study": self.digest,
            "consortium": self.study.consortium,
            "title": dict(self.study.title),
            "rehearsal": self.study.rehearsal,
            "sites": list(self.study.site_ids),
            "rounds": len(facts),
            "round_seconds": {
                "median": statistics.median(seconds),
                "p95": seconds[min(len(seconds) - 1, int(0.95 * len(seconds)))],
            },
            "wall_seconds": {"set_up": set_up, "rounds": sum(seconds)},
            "bytes_up": sent,
            "epsilon": None if promise is None else promise.pld,
            "delta": str(self.study.privacy.delta),
            "promise": None if promise is None else asdict(promise),
            "exact": [plan.name for plan in self.study.analyses if plan.mode == "exact"],
            "noise_on_padding": pooled_ratio([f["padding_sd"] for f in measured]) if measured else None,
            "noise_short_rounds": [
                f"{measured[i]['analysis']}, step {measured[i]['step']}"
                for i in short_rounds([f["padding_sd"] for f in measured])
            ],
            "attempts": attempts,
            "analyses": {
                plan.name: {"kind": plan.kind, "mode": plan.mode, "result": done[plan.name].result}
                for plan in self.study.analyses
            },
        }


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await `work`; whoever is cancelled meanwhile ends after it.

    A thread cannot be called back. Left behind, it would change the machine beside the next turn, and what the machine
    wanted said, the end of the round perhaps, would be lost: one hospital that hangs up at that moment would spoil the sum
    or stop the study.
    """
    task, stopped = asyncio.ensure_future(work), None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            stopped = error
    task.result()
    if stopped is not None:
        raise stopped


def results_bytes(results: dict[str, Any]) -> bytes:
    """results.json: two-space indent, keys in order."""
    return json.dumps(results, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n"
