"""The gate's handle on compute where a question is given up, or compute is killed in the middle of one."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from answering import slow
from sequester.protocols.errors import SiteError


def test_the_answer_to_a_question_that_was_given_up_is_not_taken_for_the_next_ones() -> None:
    async def main() -> None:
        compute = slow()
        try:
            assert (await compute.contribution("score", 0, b""))["step"] == 0.0  # it runs
            for step in (1, 3):
                given_up = asyncio.create_task(compute.contribution("score", step, b""))
                await asyncio.sleep(0.1)
                given_up.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await given_up
                assert (await compute.contribution("score", step + 1, b""))["step"] == step + 1
        finally:
            compute.kill()

    asyncio.run(main())


def test_compute_that_is_killed_in_the_middle_is_seen_as_dead_when_the_question_fails() -> None:
    async def main() -> None:
        for _ in range(5):
            compute = slow()
            asked = asyncio.create_task(compute.contribution("score", 0, b""))
            await asyncio.sleep(0.1)
            os.kill(compute.pid, signal.SIGKILL)
            with pytest.raises(SiteError, match="compute ended in the middle of its work"):
                await asked
            assert not compute.is_alive
            with pytest.raises(SiteError, match="compute ended"):  # neither does asking a dead one hang
                await compute.contribution("score", 1, b"")
            compute.kill()

    asyncio.run(main())
