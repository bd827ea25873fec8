"""The gate's handle on compute: starts it without a network, proves that, asks it for contributions.

Compute is one process per study. It is started with one end of a socket pair and nothing else; before it is told
where any patient data lies, the gate looks from outside (`isolation.probe`) whether it has a network. If it does, it
is ended and the study is refused, unless this site's policy says `allow_unisolated`, which the approval and the
receipt then print.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequester.client import isolation
from sequester.client.socket import Channel, Letter
from sequester.protocols.arrays import Part
from sequester.protocols.errors import PeerError, RefusalCode, SiteError

_REAPED_S = 5.0
Take = Callable[[Part], None]


class Custodian:
    """A compute process with a loaded cohort. `unisolated` is true where the policy let it run with a network."""

    def __init__(self, process: subprocess.Popen[bytes], channel: Channel, unisolated: bool) -> None:
        self._process = process
        self._channel = channel
        self._turn = asyncio.Lock()
        self.unisolated = unisolated
        self.verdict = ""

    @classmethod
    async def start(
        cls, study_json: str, cohort: Path, allow_unisolated: bool, log: Path, device: str = "cpu"
    ) -> Custodian:
        """A compute process that has loaded the frozen cohort at `cohort`; a `SiteError` where it cannot or must not."""
        ours, theirs = socket.socketpair()
        with theirs, log.open("ab") as errors:
            command = [sys.executable, "-m", "sequester.client.compute.worker", "--fd", str(theirs.fileno())]
            if allow_unisolated:
                command.append("--unisolated")
            process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                start_new_session=True,
                env={
                    key: value for key, value in os.environ.items() if key.startswith(("PATH", "LANG", "LC_", "PYTHON"))
                },
            )
        custodian = cls(process, Channel(ours), False)
        try:
            await custodian._ask("started")
            verdict = isolation.probe(process.pid)
            custodian.verdict = verdict.sentence
            if not verdict.isolated:
                if not allow_unisolated:
                    raise SiteError(
                        f"compute is not isolated: {verdict.sentence}",
                        hint="let this host create network namespaces (`sequester-client doctor` shows how), "
                        "or let the policy say allow_unisolated, which every approval and receipt will print",
                        code=RefusalCode.NOT_READY,
                    )
                custodian.unisolated = True
            await custodian._ask("loaded", "load", {"study": study_json, "cohort": str(cohort), "device": device})
        except BaseException:
            custodian.kill()
            raise
        return custodian

    @property
    def pid(self) -> int:
        """The compute process."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """False once the process has ended."""
        return self._process.poll() is None

    async def contribution(self, analysis: str, step: int, broadcast: bytes) -> dict[str, NDArray[np.float64]]:
        """This site's named arrays for one step, float64."""
        answer = await self._ask("contribution", "contribute", {"analysis": analysis, "step": step}, broadcast)
        return answer.arrays()

    async def contribution_to(self, take: Take, analysis: str, step: int, broadcast: bytes) -> None:
        """The same, given to `take` in another thread, part by part as compute says it: it stands nowhere whole."""
        await self._ask("contribution", "contribute", {"analysis": analysis, "step": step}, broadcast, take)

    async def _ask(
        self,
        expected: str,
        kind: str | None = None,
        header: dict[str, Any] | None = None,
        payload: bytes = b"",
        take: Take | None = None,
    ) -> Letter:
        await self._turn.acquire()
        asked = asyncio.ensure_future(asyncio.to_thread(self._exchange, expected, kind, header or {}, payload, take))
        asked.add_done_callback(self._answered)
        # Whoever no longer waits leaves a thread behind that still reads: the next question waits for its end, or it
        # would be given the answer to this one.
        return await asyncio.shield(asked)

    def _answered(self, asked: asyncio.Future[Any]) -> None:
        self._turn.release()
        if not asked.cancelled():
            asked.exception()  # nobody may be there to hear it

    def _exchange(
        self, expected: str, kind: str | None, header: dict[str, Any], payload: bytes, take: Take | None
    ) -> Letter:
        try:
            if kind is not None:
                self._channel.send(kind, header, payload)
            answer = self._channel.receive(expected, take)
        except (OSError, PeerError) as error:
            # a socket closes a moment before its process can be seen to have ended
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_REAPED_S)
            raise SiteError(
                f"compute ended in the middle of its work ({error})",
                hint="the site's compute log may say why; the gate starts it again",
                code=RefusalCode.NOT_READY,
            ) from None
        if answer.kind != expected:
            fault = answer.header.get("fault", answer.kind)
            raise SiteError(
                f"compute answered `{fault}` where `{expected}` was expected",
                hint="the site's compute log says more; nothing was sent",
                code=RefusalCode.NOT_READY,
            )
        return answer

    def kill(self) -> None:
        """End the process and everything it started, at once."""
        if self.is_alive:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._channel.close()
