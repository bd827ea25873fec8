"""What goes under the mask in a round: asked of compute, which is kept alive, with this site's noise on it.

The way of every number out is `contribution.py`; here is who asks compute for it, and when.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sequester.client.gate.contribution import Outgoing, moved_words, noise_share, noised_sum
from sequester.client.gate.custodian import Custodian
from sequester.protocols import arrays as named
from sequester.protocols import privacy
from sequester.protocols.analyses.analysis import Layout, Sums
from sequester.protocols.analyses.training import TrainingPlan, local_round
from sequester.protocols.errors import SiteError
from sequester.protocols.memory import Room
from sequester.protocols.quantise import RingVector
from sequester.protocols.secagg.messages import Contribute
from sequester.protocols.study import Study

log = logging.getLogger("sequester.gate")

T = TypeVar("T")


class Contributor:
    """Compute of one study and what it is asked for. `isolation` is what the kernel said of compute's network."""

    def __init__(self, study: Study, digest: str, start_compute: Callable[[], Awaitable[Custodian]]) -> None:
        self._study, self._digest = study, digest
        self._start_compute = start_compute
        self._compute: Custodian | None = None
        self._room = Room()  # the vector of one round: its words are stored and sent before the next one needs it
        self.isolation = ""

    async def ready(self) -> None:
        """Start compute and load the cohort, unless it runs; a `SiteError` where isolation or the cohort says no."""
        if self._compute is None or not self._compute.is_alive:
            self._compute = await self._start_compute()
            self.isolation = self._compute.verdict

    async def end(self) -> None:
        """End compute."""
        if self._compute is not None:
            await asyncio.to_thread(self._compute.kill)

    async def words(self, asked: Contribute) -> RingVector:
        """What goes under the mask in the round that asked."""
        plan = self._study.analysis(asked.task.analysis)
        began = asyncio.get_running_loop().time()
        if isinstance(plan, TrainingPlan) and plan.local_steps > 1:
            words = await self._stepped(asked, plan, privacy.layout(self._study, plan, asked.task.step))
        else:
            words = await self._computed(partial(self._summed, asked))
        if isinstance(plan, TrainingPlan) and plan.send_slot_s is not None:
            # how long the sample took says how large it was: bytes leave at the plan's time, or at a multiple of it
            spent = asyncio.get_running_loop().time() - began
            await asyncio.sleep(-spent % plan.send_slot_s)
        return words

    async def _stepped(self, asked: Contribute, plan: TrainingPlan, layout: Layout) -> RingVector:
        """The move of local steps: each step's sum gets noise here before the next step begins."""
        walk = local_round(plan, self._study, layout, named.decode(asked.broadcast))
        weights = next(walk)
        while True:
            share = await self._share(asked)
            sums = await self._computed(partial(self._sums, asked, named.encode(weights)))
            noised = await asyncio.to_thread(noised_sum, self._study, plan, layout, sums, share)
            try:
                weights = walk.send(noised)
            except StopIteration as over:
                return moved_words(self._study, plan, layout, over.value)

    async def _share(self, asked: Contribute) -> NDArray[np.int64] | None:
        plan = self._study.analysis(asked.task.analysis)
        return await asyncio.to_thread(noise_share, self._study, plan, asked.task.step, asked.noise_adders)

    async def _sums(self, asked: Contribute, broadcast: bytes, compute: Custodian) -> Sums:
        return await compute.contribution(asked.task.analysis, asked.task.step, broadcast)

    async def _summed(self, asked: Contribute, compute: Custodian) -> RingVector:
        """Noise and contribution as ring words: the one is drawn while compute works on the other."""
        task = asked.task
        plan = self._study.analysis(task.analysis)
        outgoing = Outgoing(self._study, plan, task.step, asked.noise_adders, self._room)
        drawing = asyncio.get_running_loop().run_in_executor(None, outgoing.draw)  # before a thread can wait for it
        try:
            await compute.contribution_to(outgoing.take, task.analysis, task.step, asked.broadcast)
            await drawing
            return outgoing.words()
        finally:
            outgoing.erase()
            drawing.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _computed(self, ask: Callable[[Custodian], Awaitable[T]]) -> T:
        """What compute is asked for; a process that was killed is started again once, on the same frozen cohort."""
        for last in (False, True):
            try:
                await self.ready()
                assert self._compute is not None
                return await ask(self._compute)
            except SiteError:
                if last or (self._compute is not None and self._compute.is_alive):
                    raise
                log.warning("study %s: compute ended, starting it again", self._digest[:12])
        raise AssertionError("unreachable")
