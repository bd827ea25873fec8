"""The gate's handle on compute where a question is given up, or compute is killed in the middle of one."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys

import pytest

from sequester.client.gate.custodian import Custodian
from sequester.client.socket import Channel
from sequester.protocols.errors import SiteError

# answers each question after a second with the step that was asked for
SLOW = """
import socket, sys, time
import numpy as np
from sequester.client.socket import Channel
from sequester.protocols import arrays
channel = Channel(socket.socket(fileno=int(sys.argv[1])))
while True:
    letter = channel.receive()
    time.sleep(1.0)
    channel.send("contribution", payload=arrays.encode({"step": np.array([float(letter.header["step"])])}))
"""


def slow() -> Custodian:
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-c", SLOW, str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
    return Custodian(process, Channel(ours), False)


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
