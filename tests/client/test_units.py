"""A gate whose SuperNode and executor are units of the operating system: it starts neither, and keeps where they meet."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path

import psutil
import pytest

from consortium import enrolled
from sequester.client.config import Home
from sequester.client.gate.ledger import Ledger
from sequester.client.gate.serve import Branch
from sequester.client.gate.units import Meeting, meeting
from sequester.protocols.errors import SiteError


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return enrolled(tmp_path)


async def _opened(home: Home) -> tuple[int, int]:
    """(port of the forwarder, children) of a gate that was open for a moment."""
    ledger = Ledger(home.dataset("main"))
    branch = Branch(home, "alps", home.config(), ledger, units=True)
    before = len(psutil.Process().children())
    try:
        await branch.open()
        looking = asyncio.create_task(branch.look_after())
        await asyncio.sleep(0.7)
        looking.cancel()
        kept = meeting(home.run / "alps.env")
        _, writer = await asyncio.open_connection("127.0.0.1", kept.forwarder_port)
        writer.close()
        return kept.forwarder_port, len(psutil.Process().children()) - before
    finally:
        await branch.close()
        ledger.close()


def test_the_gate_starts_neither_and_listens_where_the_file_says(home: Home) -> None:
    port, children = asyncio.run(_opened(home))
    assert children == 0
    path = home.run / "alps.env"
    assert path.read_text().startswith(f"SUPERLINK=127.0.0.1:{port}\nRUNTIME_PORT=")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_gate_that_is_started_again_is_where_it_was(home: Home) -> None:
    assert asyncio.run(_opened(home))[0] == asyncio.run(_opened(home))[0]


def test_a_damaged_file_is_named_and_not_guessed_from(tmp_path: Path) -> None:
    path = tmp_path / "alps.env"
    path.write_text("SUPERLINK=127.0.0.1:x\nRUNTIME_PORT=9\n")
    with pytest.raises(SiteError, match=r"alps\.env is damaged"):
        meeting(path)
    path.write_text(Meeting(7001, 7002).text())
    assert meeting(path) == Meeting(7001, 7002)
