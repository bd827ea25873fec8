"""What an exchange or a coordinator may ask without end costs a hospital little: few entries, few log lines, no scans."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import NoReturn

import pytest

from consortium import enrolled
from sequester.client.config import Home
from sequester.client.gate.egress import ANSWERS, Egress
from sequester.client.gate.gate import Consortium
from sequester.client.gate.ledger import Ledger
from sequester.client.gate.rules import MAX_EPOCHS, Witnesses
from sequester.client.policy import Policy
from sequester.protocols import exchange_pb2 as pb
from sequester.protocols.accounting import Event
from sequester.protocols.errors import PeerError, SiteError, StudyError
from sequester.protocols.secagg.messages import KeyAdvertisement, SessionProposal
from sequester.protocols.session import SUITE
from sequester.protocols.wire import Limits, Reader

STUDY = "ab" * 32


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    Ledger.found(tmp_path / "main", Policy())
    return Ledger(tmp_path / "main")


def test_the_same_answer_ten_thousand_times_is_fifteen_entries_that_stand_for_all_of_them(ledger: Ledger) -> None:
    egress = Egress(ledger, STUDY)
    for asked in range(10_000):
        egress.leaves("Refusal", [b"no"], 3)
        if asked in (0, 1, 2, 6, 77, 9_999):  # at any moment nothing has left that no entry stands for
            rows = [row.body for row in ledger.rows("egress")]
            assert asked + 1 <= sum(row.get("times", 1) for row in rows) <= 2 * (asked + 1)
    assert len(rows) == 15 and all(row["bytes"] == 2 for row in rows)
    assert egress.repeats == 9_999


def test_different_answers_in_one_round_have_an_end_and_a_later_round_has_its_own(ledger: Ledger) -> None:
    egress = Egress(ledger, STUDY)
    for wanted in range(ANSWERS):
        egress.leaves("PairSeeds", [wanted.to_bytes(4)], 3)
    before = ledger.head()
    with pytest.raises(PeerError, match="256 different answers `PairSeeds` in round 3"):
        egress.leaves("PairSeeds", [b"one more"], 3)
    assert ledger.head() == before
    egress.leaves("PairSeeds", [bytes(4)], 3)  # what was said may be said again
    egress.leaves("PairSeeds", [b"one more"], 4)


def test_what_is_asked_in_every_round_is_not_looked_up_on_the_disk(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.reserve(STUDY, [Event("fit", 4.5, 3)], ["table"])
    ledger.spend(STUDY, "fit", 1, 0)
    ledger.append("rolled-back", {"counter": 9, "head": "00" * 32})
    folder = ledger._folder
    ledger.close()
    again = Ledger(folder)

    def scan(*_: object) -> NoReturn:
        raise AssertionError("the whole ledger was read")

    monkeypatch.setattr(Ledger, "rows", scan)
    assert again.has_spent(STUDY, "fit", 1) and not again.has_spent(STUDY, "fit", 0)
    assert not again.has_spent(STUDY, "table", 1) and not again.has_spent("cd" * 32, "fit", 1)
    assert [body["counter"] for body in again.recorded("rolled-back")] == [9] and again.recorded("cohort") == []
    again.close()


def test_key_epochs_are_counted_by_study_whatever_their_numbers(ledger: Ledger) -> None:
    for number in (3, 3, 2**40, 2**40 + 1):
        ledger.egress(STUDY, 0, "KeyAdvertisement", 10, "00" * 32, number)
    assert ledger.epochs(STUDY) == 3 < MAX_EPOCHS and ledger.epoch(STUDY) == 2**40 + 1


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return enrolled(tmp_path)


def test_a_key_epoch_that_no_entry_of_the_ledger_holds_is_refused_before_anything_is_advertised(ledger: Ledger) -> None:
    """The site would have advertised, failed to write it down on every stream, and never been able to leave."""
    reader = Reader(Limits(1 << 20, 32))

    def proposed(epoch: int) -> SessionProposal:
        params = pb.SessionProposal(
            study_digest=bytes.fromhex(STUDY), epoch=epoch, roster=[bytes([i]) * 32 for i in range(3)], max_corrupt=1,
            min_active=3, ring_bits=32, mode="strict", suite=SUITE,
        )  # fmt: skip
        found: SessionProposal = reader.take(pb.Frame(session_proposal=params))
        return found

    for epoch in (2**53, 2**64 - 1):
        with pytest.raises(PeerError, match="key epoch"):
            proposed(epoch)
    highest = proposed(2**53 - 1).params.epoch
    Egress(ledger, STUDY).leaves("KeyAdvertisement", [b"a key"], 0, highest)
    assert ledger.epoch(STUDY) == highest


def test_joins_that_are_refused_are_counted_and_not_written_down_one_by_one(
    home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger(home.dataset("main"))
    gate = Consortium(home, "alps", home.config(), ledger)

    def known(digest: str) -> NoReturn:
        raise StudyError("this site refused the study", hint="")

    async def main() -> None:
        for number in range(1_000):  # studies that nobody published
            assert await gate.join(f"{number:064x}", "00" * 32) == ("refused", "NOT_READY")
        monkeypatch.setattr(gate, "_approved", known)
        for _ in range(1_000):
            await gate.join(STUDY, "00" * 32)

    asyncio.run(main())
    notes = [row.body for row in ledger.rows("note")]
    assert len(notes) == len([r for r in caplog.records if "refused" in r.getMessage()]) <= 64 + 2 * 11
    assert notes[0] == {**notes[0], "study": f"{0:064x}", "refused": "NOT_READY", "times": 1}
    assert notes[-1]["times"] >= 512
    ledger.close()


def advertised(counter: int) -> KeyAdvertisement:
    return KeyAdvertisement(0, bytes(32), bytes(32), "main", counter, bytes(32), bytes(64))


def test_what_a_peer_signed_is_remembered_with_its_name_or_one_error_says_that_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Witnesses(tmp_path / "advertisements.json")
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    seen.saw(bytes(32), advertised(1))
    assert str(tmp_path) in synced and len(synced) == 2  # the file, and the folder that has its name

    def full(descriptor: int) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SiteError, match=r"advertisements\.json cannot be written: No space left on device"):
        seen.saw(bytes(32), advertised(2))
    held = seen.highest(bytes(32), "main")
    assert held is not None and held.counter == 1  # what is not on the disk is not vouched for
    monkeypatch.setattr(os, "fsync", real)
    seen.saw(bytes(32), advertised(2))
    again = Witnesses(tmp_path / "advertisements.json").highest(bytes(32), "main")
    assert again is not None and again.counter == 2
