"""The ledger holds the budget: refused before anything changes, kept through a kill, never spent beyond what it holds."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from contracts import exact_study, study
from sequester.client.gate.differencing import join
from sequester.client.gate.ledger import Ledger
from sequester.client.gate.rules import StudyRules, Witnesses
from sequester.client.policy import Policy
from sequester.protocols import privacy
from sequester.protocols.accounting import Event, epsilon_rdp
from sequester.protocols.errors import PrivacyError, RefusalCode, SiteError
from sequester.protocols.signing import sha256
from sequester.protocols.study import study_json, validated

ANNEX = {"id": "annex", "key": "5a" * 32}
ONE = Event("fit", 4.531, 1)  # epsilon 1 by the filter at order 22 (spec/privacy.md, 2.2)


def policy(epsilon: str = "8", order: str = "4.4") -> Policy:
    return Policy.model_validate({"epsilon_life": epsilon, "order_life": order, "delta": "0.000001"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Ledger.found(tmp_path / "main", policy())
    return tmp_path / "main"


@pytest.fixture
def ledger(folder: Path) -> Iterator[Ledger]:
    held = Ledger(folder)
    yield held
    held.close()


def name(i: int) -> str:
    return f"{i:064x}"


def test_ten_studies_of_epsilon_one_cost_at_most_3_6_and_the_filter_says_at_most_3_8(tmp_path: Path) -> None:
    Ledger.found(tmp_path / "main", policy("3.8", "8.9"))
    ledger = Ledger(tmp_path / "main")
    for i in range(10):
        ledger.reserve(name(i), [ONE], [])
    now = ledger.balance()
    assert now.epsilon_pld == pytest.approx(3.26, abs=0.02)  # privacy.md 7, measured with dp-accounting
    assert epsilon_rdp(now.reserved, now.delta, now.order) <= 3.8
    ledger.close()


def test_a_study_beyond_the_limit_is_refused_with_figures_and_changes_nothing(ledger: Ledger) -> None:
    large = Event("fit", 0.8, 1)  # fits once
    ledger.reserve(name(1), [large], [])
    before = ledger.head()
    with pytest.raises(PrivacyError, match=r"costs 3\.4375 at order 4\.4; .* of .* are left") as refused:
        ledger.reserve(name(2), [large], ["table"])
    assert refused.value.code is RefusalCode.BUDGET
    assert ledger.head() == before and ledger.balance().exact == ()


def test_a_study_calibrated_to_epsilon_3_is_admitted_by_a_life_cap_of_3(tmp_path: Path) -> None:
    Ledger.found(tmp_path / "main", policy("3", "8.9"))
    ledger = Ledger(tmp_path / "main")
    ledger.reserve(name(1), privacy.events(study()), [])
    assert 0 <= ledger.balance().left < 1e-3
    ledger.close()


def test_charges_stop_at_the_reservation_and_after_the_end(ledger: Ledger) -> None:
    ledger.reserve(name(1), [replace(ONE, count=2)], [])
    for step in range(2):
        ledger.spend(name(1), "fit", step, 0)
    with pytest.raises(PrivacyError, match="spent its 2 reserved"):
        ledger.spend(name(1), "fit", 2, 0)
    with pytest.raises(PrivacyError, match="nothing is reserved"):
        ledger.spend(name(1), "other", 0, 0)
    ledger.settle(name(1))
    with pytest.raises(PrivacyError, match="nothing is reserved"):
        ledger.spend(name(1), "fit", 2, 0)


def test_what_was_never_spent_is_free_again_and_is_reserved_again_when_the_study_returns(ledger: Ledger) -> None:
    full = [replace(ONE, count=10)]
    ledger.reserve(name(1), full, [])
    reserved = ledger.balance().reserved
    ledger.spend(name(1), "fit", 0, 0)
    ledger.settle(name(1))
    assert ledger.balance().spent == pytest.approx(reserved / 10) and ledger.balance().reserved == 0
    ledger.reserve(name(1), full, [])
    assert ledger.balance().reserved == pytest.approx(reserved) and ledger.balance().spent == 0
    assert ledger.charges_spent(name(1)) == {"fit": 1}


def test_the_exact_flag_is_never_cleared(folder: Path, ledger: Ledger) -> None:
    ledger.reserve(name(1), [], ["table"])
    ledger.spend(name(1), "table", 0, 0)
    ledger.settle(name(1))
    ledger.close()
    again = Ledger(folder, read_only=True)
    assert again.balance().exact == ("000000000000/table",)
    again.close()


def test_epsilon_recomputed_from_the_json_alone_is_the_ledgers_own(ledger: Ledger) -> None:
    ledger.reserve(name(1), [replace(ONE, count=3), Event("held_out", 9.25, 1)], [])
    ledger.spend(name(1), "fit", 0, 0)
    ledger.settle(name(1))
    ledger.reserve(name(2), [replace(ONE, count=2)], [])
    rows = [json.loads(row.raw) for row in ledger.rows()]
    settled = {row["study"] for row in rows if row["kind"] == "settle"}
    accountant = PLDAccountant()
    for row in rows:
        if row["kind"] == "settle" or (row["kind"] == "reserve" and row["study"] not in settled):
            for event in row["events"]:
                for _ in range(event["count"]):
                    accountant.compose(dp_accounting.GaussianDpEvent(float(event["sigma"])))
    assert ledger.balance().epsilon_pld == pytest.approx(accountant.get_epsilon(1e-6), abs=1e-6)


def test_rows_are_neither_changed_nor_deleted_through_sqlite(folder: Path, ledger: Ledger) -> None:
    ledger.append("note", {"study": name(1)})
    db = sqlite3.connect(folder / "ledger.db")
    for statement in ("DELETE FROM rows", "UPDATE rows SET body = ''"):
        with pytest.raises(sqlite3.IntegrityError, match="append only"):
            db.execute(statement)
    db.close()


def test_a_second_client_is_refused_and_a_reader_is_not(folder: Path, ledger: Ledger) -> None:
    with pytest.raises(SiteError, match=f"in use by process {os.getpid()}"):
        Ledger(folder)
    reader = Ledger(folder, read_only=True)
    ledger.reserve(name(1), [ONE], [])
    assert reader.balance().reserved == ledger.balance().reserved > 0
    reader.close()


def test_a_key_without_its_ledger_founds_no_second_budget(folder: Path) -> None:
    (folder / "ledger.db").unlink()
    with pytest.raises(SiteError, match="key and no ledger"):
        Ledger.found(folder, policy())


def test_founding_that_was_cut_short_is_done_again(tmp_path: Path) -> None:
    folder = tmp_path / "main"
    folder.mkdir()
    (folder / "ledger.db.new").write_bytes(b"half")
    (folder / "ledger.key").write_bytes(b"half")
    Ledger.found(folder, policy())
    held = Ledger(folder)
    assert held.head()[0] == 1
    held.close()


def test_a_full_disk_is_said_and_loses_nothing(ledger: Ledger) -> None:
    ledger.reserve(name(1), [ONE], [])
    before, held = ledger.head(), ledger.balance()
    ledger._db.execute("PRAGMA max_page_count = 1")  # SQLite takes the present size as the limit
    with pytest.raises(SiteError, match="cannot be written"):
        ledger.append("note", {"study": name(1), "text": "x" * 1_000_000})
    assert ledger.head() == before and ledger.balance() == held
    ledger._db.execute("PRAGMA max_page_count = 1000000")
    ledger.append("note", {"study": name(1)})
    assert [row.seq for row in ledger.rows()] == list(range(1, before[0] + 2))


_KILLED = """
import os, signal, sys
from pathlib import Path
from sequester.client.gate.ledger import Ledger
from sequester.protocols.accounting import Event
ledger, study, calls = Ledger(Path(sys.argv[1])), "ab" * 32, int(sys.argv[2])
steps = [lambda: ledger.reserve(study, [Event("fit", 4.531, 3)], []), lambda: ledger.spend(study, "fit", 0, 0),
         lambda: ledger.egress(study, 0, "MaskedInput", 10, "00" * 32), lambda: ledger.spend(study, "fit", 1, 0)]
for step in steps[:calls]:
    step()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("calls", [1, 4])
def test_a_killed_client_keeps_its_reservation_and_its_charges(folder: Path, calls: int) -> None:
    done = subprocess.run([sys.executable, "-c", _KILLED, str(folder), str(calls)], timeout=180, check=False)
    assert done.returncode == -signal.SIGKILL
    held = Ledger(folder)
    assert held.balance().reserved == pytest.approx(3 * 4.4 / (2 * 4.531**2))
    assert held.charges_spent("ab" * 32) == ({} if calls == 1 else {"fit": 2})
    held.close()


def test_a_charge_stays_cheap_in_a_long_ledger(ledger: Ledger) -> None:
    ledger.reserve(name(1), [replace(ONE, sigma=453.1, count=4000)], [])
    ledger._db.execute("PRAGMA synchronous=OFF")  # the disk's own time is not what is measured
    ledger.append_many([("spend", {"study": name(1), "analysis": "fit", "step": i, "attempt": 0}) for i in range(3000)])
    start = time.perf_counter()
    for i in range(200):
        ledger.spend(name(1), "fit", 3000 + i, 0)
    assert (time.perf_counter() - start) / 200 < 0.005  # 0.2 ms alone; the rest is room for a busy machine


def _cohort(folder: Path, study_name: str, patients: range) -> None:
    data = b"".join(sorted(bytes.fromhex(sha256(str(i).encode())) for i in patients))
    place = folder / "cohorts" / study_name
    place.mkdir(parents=True)
    (place / "patients.bin").write_bytes(data)
    manifest = {"patients_hash": sha256(b"key" + data), "bitmap_sha256": sha256(data)}
    (place / "manifest.json").write_text(json.dumps(manifest), "utf-8")


def test_exact_cohorts_that_differ_by_few_patients_are_not_joined(folder: Path, ledger: Ledger) -> None:
    for i, patients in enumerate((range(100), range(100), range(99), range(80))):
        _cohort(folder, name(i), patients)
    join(ledger, folder, name(0), exact=True, floor=10)
    join(ledger, folder, name(1), exact=True, floor=10)  # the same patients tell nothing new
    join(ledger, folder, name(3), exact=True, floor=10)
    with pytest.raises(SiteError, match="fewer than 10") as refused:
        join(ledger, folder, name(2), exact=True, floor=10)
    assert refused.value.code is RefusalCode.NOT_READY
    join(ledger, folder, name(2), exact=False, floor=10)
    (folder / "cohorts" / name(3) / "patients.bin").unlink()
    _cohort(folder, name(4), range(500, 600))
    with pytest.raises(SiteError):
        join(ledger, folder, name(4), exact=True, floor=10)  # what cannot be compared counts as too close


def test_an_exact_study_less_one_hospital_is_not_joined_where_the_first_was_opened(
    folder: Path, ledger: Ledger
) -> None:
    four = [bytes([i]) * 32 for i in range(4)]
    for i in range(4):
        _cohort(folder, name(i), range(100))
    join(ledger, folder, name(0), exact=True, floor=10, roster=four)
    join(ledger, folder, name(1), exact=True, floor=10, roster=four[:3])  # nothing of the first was opened
    ledger.reserve(name(0), [], ["fit"])
    ledger.spend(name(0), "fit", 0, 0)
    with pytest.raises(PrivacyError, match="differ by one hospital") as refused:
        join(ledger, folder, name(2), exact=True, floor=10, roster=four[1:])
    assert refused.value.code is RefusalCode.ROSTER  # names of hospitals are public
    join(ledger, folder, name(3), exact=True, floor=10, roster=four)  # the very same hospitals tell nothing new


def test_an_exact_study_in_which_a_possible_colluder_takes_the_place_of_a_hospital_is_not_joined(
    folder: Path, ledger: Ledger
) -> None:
    """The colluder tells its numbers: the difference of the two sums and they are the hospital's that left."""
    keys = [bytes([i]) * 32 for i in range(8)]
    for i in range(3):
        _cohort(folder, name(i), range(100))
    join(ledger, folder, name(0), exact=True, floor=10, roster=keys[:5])
    ledger.reserve(name(0), [], ["fit"])
    with pytest.raises(PrivacyError, match="differ by 2 hospitals, of whom 1 may collude") as refused:
        join(ledger, folder, name(1), exact=True, floor=10, roster=[*keys[:4], keys[5]])
    assert refused.value.code is RefusalCode.ROSTER
    with pytest.raises(PrivacyError, match="differ by 3 hospitals, of whom 2 may collude"):
        join(ledger, folder, name(1), exact=True, floor=10, roster=[*keys[:4], *keys[5:7]], max_corrupt=2)
    join(
        ledger, folder, name(1), exact=True, floor=10, roster=[*keys[:4], *keys[5:7]]
    )  # two honest ones hide each other
    join(ledger, folder, name(2), exact=False, floor=10, roster=keys[:4])


def test_two_exact_studies_that_differ_by_one_hospital_and_were_joined_before_either_began_do_not_both_open(
    folder: Path, ledger: Ledger
) -> None:
    """A coordinator has both joined first, when nothing was spent; the exchange then runs one after the other."""
    fields = study_json(exact_study())
    three = fields["sites"]
    less = validated(fields | {"sites": [*three[:2], ANNEX]})
    more = validated(fields | {"sites": [*three, ANNEX]})
    assert len(set(less.roster) ^ set(more.roster)) == 1
    first, second = privacy.study_digest(less), privacy.study_digest(more)
    witnesses = Witnesses(folder / "witnesses.json")
    rules = {}
    for digest, of in ((first, less), (second, more)):
        _cohort(folder, digest, range(100))
        join(ledger, folder, digest, exact=True, floor=10, roster=of.roster)
        rules[digest] = StudyRules(of, digest, policy(), ledger, frozenset(), witnesses, epoch_floor=-1)
    rules[first].reserve(privacy.session_params(less))
    before = ledger.head()
    with pytest.raises(PrivacyError, match="differ by one hospital") as refused:
        rules[second].reserve(privacy.session_params(more))
    assert refused.value.code is RefusalCode.ROSTER and "has ended here" in refused.value.hint
    rules[first].reserve(privacy.session_params(less, 1))  # a new key epoch of its own is no other study
    assert ledger.head() == before
    ledger.settle(first)  # it ended and had opened nothing
    rules[second].reserve(privacy.session_params(more))
    with pytest.raises(PrivacyError, match="differ by one hospital"):
        rules[first].reserve(privacy.session_params(less, 2))


def test_the_highest_key_epoch_that_was_advertised_outlives_the_journal(folder: Path) -> None:
    first = Ledger(folder)
    assert first.epoch(name(1)) == -1
    first.egress(name(1), 0, "KeyAdvertisement", 10, name(9), 4)
    first.egress(name(1), 0, "KeyAdvertisement", 10, name(9), 2)
    first.egress(name(1), 0, "Resume", 10, name(9))
    first.close()
    again = Ledger(folder)
    assert (again.epoch(name(1)), again.epoch(name(2))) == (4, -1)
    again.close()
