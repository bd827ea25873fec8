"""An exchange that takes no more bytes: it holds up its own study, and nobody who wants to leave it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from attacks.adversary import Adversary
from contracts import study
from sequester.client.gate import session as module
from sequester.client.gate.custodian import Custodian
from sequester.client.gate.journal import Journal
from sequester.client.gate.ledger import Ledger
from sequester.client.gate.session import Progress, Session
from sequester.client.policy import Policy
from sequester.protocols import privacy
from sequester.protocols.packets import packed
from sequester.protocols.secagg.member import Member
from sequester.protocols.wire import Limits, hello

WORDS = 1 << 22  # sixteen megabytes: more than a connection takes on before it is read


@asynccontextmanager
async def deaf(digest: str) -> AsyncIterator[int]:
    """The port of an exchange that says Hello on every stream and reads nothing after the other's."""

    async def session(_: Any, context: Any) -> None:
        await context.read()
        await context.write(packed(hello(bytes.fromhex(digest))))
        await asyncio.Event().wait()

    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(session)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("sequester.v1.Site", {"Session": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


def test_a_hospital_leaves_a_study_whose_exchange_takes_no_more_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_GOODBYE_S", 0.5)
    sites = Adversary(3, 1, mode="strict")
    sites.play(sites.begin(1, length=WORDS), [0])
    of, limits = study(), Limits(4 * WORDS, 32)
    digest = privacy.study_digest(of)
    Ledger.found(tmp_path / "main", Policy())
    ledger = Ledger(tmp_path / "main")

    def keep(after_epoch: int | None) -> tuple[Member, Journal]:
        member = Member.restore(
            sites.journals[0], sites.outboxes[0], sites.params, 0, sites.signs[0], sites.rules[0], os.urandom
        )
        return member, Journal(tmp_path / "journal" / "0", bytes(32), limits)

    async def no_compute() -> Custodian:
        raise AssertionError("nothing is computed here")

    async def receipt(progress: Progress, state: str) -> bytes:
        return b"{}"

    async def main() -> None:
        async with deaf(digest) as port:

            def channel() -> grpc.aio.Channel:
                return grpc.aio.insecure_channel(f"127.0.0.1:{port}")

            session = Session(of, digest, keep, ledger, no_compute, channel, receipt, limits)
            assert session._member.state == "MASKED"
            running = asyncio.create_task(session.run())
            await asyncio.wait_for(session.stands.wait(), 20)
            await asyncio.sleep(0.5)
            assert session._turn.locked(), "the stored vector is on its way and gets nowhere"
            await asyncio.wait_for(session.withdraw(), 20)
            assert session._member.state == "WITHDRAWN" and not session._member._pairs
            assert await asyncio.wait_for(running, 20) == "withdrawn"

    asyncio.run(main())
    ledger.close()
