"""A hospital that hangs up while the exchange adds its vector in a thread spoils no sum and stops no study."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attacks.adversary import Allow
from contracts import SITES, study
from sequester.protocols import privacy
from sequester.protocols.quantise import RingVector
from sequester.protocols.secagg.member import Member
from sequester.protocols.secagg.messages import Contribute, Effect, MaskedInput, Message, Send
from sequester.server import rounds
from sequester.server.store import Store


class Rounds:
    """A study's run over real members that contribute nothing but zeros; what is said to a site is answered at once."""

    def __init__(self, folder: Path, mode: str) -> None:
        self.study = study(analyses=study().model_dump(mode="json")["analyses"][:1], aggregation={"mode": mode})
        digest = privacy.study_digest(self.study)
        params = privacy.session_params(self.study)
        self.members = [
            Member(params, i, SITES[name].sign, Allow(self.study.roster), os.urandom)
            for i, name in enumerate(self.study.site_ids)
        ]
        self.store = Store(folder)
        self.store.publish(digest, b"", b"")
        self.run = rounds.StudyRun(self.study, digest, self.store, self.say, 0)
        self.waiting: asyncio.Queue[tuple[int, Message]] = asyncio.Queue()

    async def say(self, to: int, message: Message) -> None:
        self.waiting.put_nowait((to, message))

    async def answers(self) -> tuple[int, Message]:
        """The next thing a site says, in the order in which they were asked."""
        while True:
            to, message = await self.waiting.get()
            for effect in self._done(to, self.members[to].handle(message)):
                if isinstance(effect, Send):
                    return to, effect.message

    def _done(self, i: int, effects: list[Effect]) -> list[Effect]:
        for effect in effects:
            if isinstance(effect, Contribute):
                return self.members[i].contribute(RingVector(np.zeros(effect.length, dtype=np.uint32)))
        return effects


@pytest.mark.parametrize("mode", ["strict", "double"])
def test_a_hospital_that_hangs_up_while_its_vector_is_added_neither_stops_the_study_nor_spoils_the_sum(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "LONG_WORDS", 0)  # vectors of this study go to a thread as long ones do

    async def main() -> None:
        made = Rounds(tmp_path, mode)
        going_on, inside, most = threading.Event(), 0, 0
        handle = made.run._machine.handle

        def slow(index: int, message: Any) -> list[Effect]:
            nonlocal inside, most
            if not isinstance(message, MaskedInput):
                return handle(index, message)
            inside += 1
            most = max(most, inside)
            going_on.wait(10)
            effects = handle(index, message)
            inside -= 1
            return effects

        monkeypatch.setattr(made.run._machine, "handle", slow)
        results = asyncio.create_task(made.run.run())
        inputs = []
        while len(inputs) < 3:
            index, message = await made.answers()
            if isinstance(message, MaskedInput):
                inputs.append(asyncio.create_task(made.run.handle(index, message)))
            else:
                await made.run.handle(index, message)
        await asyncio.sleep(0.05)
        for listening in inputs[:-1]:
            listening.cancel()  # their streams are gone, while the first one is being added
        await asyncio.sleep(0.05)
        going_on.set()
        await asyncio.gather(*inputs, return_exceptions=True)
        assert most == 1, "two threads were in the machine at once"
        # the first was begun and counts; the second never was, and its site says it again on its next stream
        sent = made.members[1].resume()[-1]
        assert isinstance(sent, Send) and isinstance(sent.message, MaskedInput)
        await made.run.handle(1, sent.message)
        answering = asyncio.create_task(answer_all(made))
        found = await asyncio.wait_for(results, 20)
        answering.cancel()
        opened = [facts["padding_sd"] for facts in made.store.facts(made.run.digest)]
        assert found["rounds"] == len(opened) == 5
        assert all(squares == 0.0 and count > 0 for squares, count, _ in opened), "the sum of zeros is not zero"
        made.store.close()

    asyncio.run(main())


def test_a_round_that_closes_while_its_last_hospital_hangs_up_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the round was lost with the stream, and its deadline with it: the study stood until it expired."""
    monkeypatch.setattr(rounds, "LONG_WORDS", 0)

    async def main() -> None:
        made = Rounds(tmp_path, "strict")
        results = asyncio.create_task(made.run.run())
        given = 0
        while given < 3:
            index, message = await made.answers()
            listening = asyncio.create_task(made.run.handle(index, message))
            given += isinstance(message, MaskedInput)
            if given == 3:
                while made.run._machine.state == "COLLECTING":  # the thread has not come to its end
                    await asyncio.sleep(0)
                listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
        answering = asyncio.create_task(answer_all(made))
        assert (await asyncio.wait_for(results, 20))["rounds"] == 5
        answering.cancel()
        made.store.close()

    asyncio.run(main())


async def answer_all(made: Rounds) -> None:
    while True:
        await made.run.handle(*await made.answers())
