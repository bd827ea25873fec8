"""Whole studies between a real exchange and real gates: gRPC, mutual TLS, compute processes, journals; without Flower."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import time
from pathlib import Path

import psutil
import pytest

import loopback
from loopback import BUNDLE, Loopback, enrolled
from sequester.client.gate import approval
from sequester.client.gate import contributor as gate_contributor
from sequester.client.gate.audit import verify, witnesses
from sequester.protocols.errors import RefusalCode, StudyError
from sequester.protocols.packets import Frame, packed
from sequester.protocols.signing import sha256, sign_document
from sequester.protocols.wire import hello
from sequester.server import exchange as module
from sequester.server.store import StoreFault
from sequester.simulate.hospitals import Hospital, hospitals

pytestmark = pytest.mark.system

SITES = (
    Hospital("harbor", (50, 150, 650), 1.0, 0.9, 0.01, "chr"),
    Hospital("lake", (300, 700, 100), 1.0, 0.9, 0.01, "swapped"),
    Hospital("metro", (550, 500, 150), 2.0, 0.9, 0.01, "flipped"),
)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> hospitals:  # type: ignore[valid-type]
    return hospitals(7, tmp_path_factory.mktemp("data"), SITES, 900, chromosomes=2, length_bp=100_000, published=6)


SMALL = {"privacy": {"epsilon": "1", "delta": "0.000001", "order": "22"}}  # several fit on one data set


def risk(simulated: object, **changed: object) -> dict[str, object]:
    """The fields of a private risk study on the simulated hospitals."""
    part = dict(simulated.study)  # type: ignore[attr-defined]
    prevalence = part.pop("prevalence")
    cohort = {"subgroup": part.pop("subgroup"), "subgroup_values": part.pop("subgroup_values")}
    analyses = [
        {"kind": "glm", "name": "score", "rounds": 5, "prevalence": prevalence, "budget": "0.9"},
        {"kind": "evaluation", "name": "held_out", "of": "score", "budget": "0.1"},
    ]
    return {
        **part, "cohort": cohort, "analyses": analyses, "privacy": {"epsilon": "3", "delta": "0.000001", "order": "8.9"},
        "aggregation": {"mode": "strict", "round_deadline_s": 20}, **changed,
    }  # fmt: skip


@pytest.fixture
def alps(tmp_path: Path, simulated: object) -> Loopback:
    return enrolled(tmp_path, {site.name: simulated.site(site.name) for site in SITES})  # type: ignore[attr-defined]


def test_a_study_runs_to_its_results_and_every_site_has_a_receipt(alps: Loopback, simulated: object) -> None:
    async def main() -> None:
        async with alps.serving() as exchange:
            digest = await alps.publish_and_approve(alps.study(risk(simulated)))
            exchange.start(digest)
            assert set((await alps.call(digest)).values()) == {("joined", "")}
            status = await alps.ended(digest)
            assert status["state"] == "done", status
            assert status["receipts"] == ["harbor", "lake", "metro"]
            results = alps.results(digest)
            assert results["rounds"] == 6
            print(results["round_seconds"], results["wall_seconds"], results["bytes_up"])

    loopback.run(main)


async def begin(alps: Loopback, fields: dict[str, object]) -> str:
    """The digest of a study that runs, every hospital joined."""
    assert alps.exchange is not None
    digest = await alps.publish_and_approve(alps.study(fields))
    alps.exchange.start(digest)
    assert set((await alps.call(digest)).values()) == {("joined", "")}
    return digest


def long(simulated: object, **changed: object) -> dict[str, object]:
    """A study of forty rounds: long enough to do something to it."""
    analyses = [{"kind": "glm", "name": "score", "rounds": 40, "prevalence": "0.15"}]
    return risk(simulated, analyses=analyses, **changed)


async def closed(alps: Loopback, digest: str, rounds: int) -> None:
    """Wait for so many closed rounds."""
    assert alps.exchange is not None
    store = alps.exchange.store
    await alps.until(lambda: len(store.facts(digest)) >= rounds)


def steps(alps: Loopback, digest: str) -> list[int]:
    assert alps.exchange is not None
    return [f["step"] for f in alps.exchange.store.facts(digest)]


def test_an_exchange_that_dies_takes_up_from_the_last_closed_round(alps: Loopback, simulated: object) -> None:
    async def main() -> None:
        async with alps.serving():
            digest = await begin(alps, long(simulated))
            took = []
            for rounds in (3, 10, 20):
                await closed(alps, digest, rounds)
                await alps.close_exchange()
                began = time.monotonic()
                await alps.open_exchange()
                await closed(alps, digest, rounds + 2)
                took.append(time.monotonic() - began)
            assert min(took) < 10, took  # what else runs on this machine only adds to it
            assert (await alps.ended(digest))["state"] == "done"
            assert steps(alps, digest) == list(range(40))  # none twice, none left out

    loopback.run(main)


def test_a_gate_that_dies_comes_back_to_the_round_it_was_in(alps: Loopback, simulated: object) -> None:
    async def main() -> None:
        async with alps.serving():
            digest = await begin(alps, long(simulated, aggregation={"mode": "strict", "round_deadline_s": 5}))
            for name, rounds in (("lake", 4), ("metro", 12)):
                await closed(alps, digest, rounds)
                await alps.hospitals[name].close()
                await alps.hospitals[name].open().resume()
            status = await alps.ended(digest)
            assert status["state"] == "done", status
            assert status["receipts"] == ["harbor", "lake", "metro"]

    loopback.run(main)


def test_a_killed_compute_is_started_again_on_the_same_cohort(alps: Loopback, simulated: object) -> None:
    async def main() -> None:
        async with alps.serving():
            digest = await begin(alps, long(simulated))
            gate = alps.hospitals["lake"].gate
            assert gate is not None
            for rounds in (3, 9, 15):
                await closed(alps, digest, rounds)
                compute = gate.sessions[digest]._contributor._compute
                assert compute is not None
                os.kill(compute.pid, signal.SIGKILL)
            assert (await alps.ended(digest))["state"] == "done"

    loopback.run(main)


def test_a_withdrawn_study_ends_all_local_work_within_seconds(alps: Loopback, simulated: object) -> None:
    async def main() -> None:
        async with alps.serving() as exchange:
            took: list[float] = []
            while len(took) < 3 and min(took, default=5) >= 5:  # what else runs on this machine only adds to it
                digest = await begin(alps, long(simulated, lineage=f"try-{len(took)}", **SMALL))
                await closed(alps, digest, 3)
                gates = [h.gate for h in alps.hospitals.values() if h.gate is not None]
                computes = [s._contributor._compute for g in gates for s in g.sessions.values()]
                pids = [compute.pid for compute in computes if compute is not None]
                assert len(pids) == 3
                began = time.monotonic()
                await exchange.control(digest, "withdraw")
                await alps.until(lambda pids=pids: not any(psutil.pid_exists(pid) for pid in pids))  # type: ignore[misc]
                took.append(time.monotonic() - began)
                assert {g.outcome(digest) for g in gates} == {"withdrawn"}
                assert exchange.status(digest)["state"] == "withdrawn"
                assert set(exchange.store.receipts(digest)) == set(alps.hospitals)
                assert await gates[0].join(digest, sha256(BUNDLE)) == ("refused", "STUDY")
            assert min(took) < 5, took

    loopback.run(main)


def test_a_hospital_that_leaves_ends_a_strict_study_with_its_name(alps: Loopback, simulated: object) -> None:
    async def main() -> None:
        async with alps.serving():
            digest = await begin(alps, long(simulated))
            await closed(alps, digest, 3)
            gate = alps.hospitals["metro"].gate
            assert gate is not None
            await gate.sessions[digest].withdraw()
            status = await alps.ended(digest)
            assert status["state"] == "abandoned" and "metro" in status["reason"], status
            assert gate.outcome(digest) == "withdrawn"

    loopback.run(main)


def test_a_struck_hospital_loses_its_stream_and_no_study_starts_with_it(alps: Loopback, simulated: object) -> None:
    async def main() -> None:
        async with alps.serving() as exchange:
            digest = await begin(
                alps, long(simulated, aggregation={"mode": "strict", "round_deadline_s": 300}, **SMALL)
            )
            later = await alps.publish_and_approve(alps.study(risk(simulated, lineage="later", **SMALL)))
            await closed(alps, digest, 3)
            gate = alps.hospitals["metro"].gate
            assert gate is not None
            said = await asyncio.to_thread(alps.founded.verb, "refuse", "metro")
            assert said.exit_code == 0, said.output
            status = await alps.ended(digest)  # long before the round's own deadline
            assert status["state"] == "abandoned" and "left: metro" in status["reason"], status
            await alps.until(lambda: not gate.sessions[digest].stands.is_set())
            with pytest.raises(StudyError, match="metro: no longer among the hospitals admitted here"):
                exchange.start(later)
            assert exchange.status(later)["state"] == "approved"

    loopback.run(main)


def test_what_one_hospital_may_keep_open_or_have_kept_is_bounded(
    alps: Loopback, simulated: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent() -> None:
        await asyncio.Event().wait()

    async def stream(digest: str) -> None:
        """A stream of lake's that says Hello and nothing else."""
        frames = [packed(hello(bytes.fromhex(digest)))]

        async def read() -> bytes | None:
            return frames.pop() if frames else await silent()

        async def write(frame: Frame) -> None:
            return

        assert alps.exchange is not None
        await alps.exchange.session("lake", read, write)

    async def main() -> None:
        async with alps.serving() as exchange:
            digest = exchange.publish(alps.signed(alps.study(risk(simulated))), BUNDLE)
            identity = approval.identity(alps.hospitals["lake"].home, "alps")
            for number in range(40):  # forty sets of people whom the hospital asks
                body = {
                    "study": digest,
                    "site": "lake",
                    "approvers": [f"a{number}", f"b{number}"],
                    "role": f"a{number}",
                }
                exchange.decide("lake", sign_document("approval", body, identity))
            assert set(exchange.store.decisions(digest)["lake"]) == {"a39"}
            with pytest.raises(StudyError, match=r"a decision of \d+ bytes"):
                exchange.decide("lake", sign_document("approval", body | {"person": "x" * 20_000}, identity))
            await exchange.control(digest, "withdraw")
            monkeypatch.setattr(module, "FAREWELL_S", 1.0)
            three = [asyncio.create_task(stream(digest)) for _ in range(3)]
            ended = await asyncio.gather(*three, return_exceptions=True)
            assert ended[:2] == [None, None] and "takes no leave" in str(ended[2])  # one stands, for a while
            many = [asyncio.create_task(exchange.session("lake", silent, silent)) for _ in range(module.STREAMS)]
            await asyncio.sleep(0)
            with pytest.raises(StudyError, match="64 streams of `lake` stand"):
                await stream(digest)
            for task in many:
                task.cancel()
            await asyncio.gather(*many, return_exceptions=True)
            assert exchange._farewells == {} and not +exchange._open

    loopback.run(main)


def test_three_hospitals_with_one_away_end_as_abandoned_and_say_so(alps: Loopback, simulated: object) -> None:
    async def main() -> None:
        async with alps.serving():
            quick = {"mode": "strict", "round_deadline_s": 3}
            digest = await begin(alps, long(simulated, aggregation=quick, spare_attempts=1))
            await closed(alps, digest, 3)
            await alps.hospitals["harbor"].close()
            status = await alps.ended(digest)
            assert status["state"] == "abandoned" and "harbor" in status["reason"], status
            assert "2 of 3 sites delivered" in status["reason"]

    loopback.run(main)


def test_a_held_study_opens_no_round_until_it_is_released(alps: Loopback, simulated: object) -> None:
    async def main() -> None:
        async with alps.serving() as exchange:
            digest = await begin(alps, long(simulated))
            await closed(alps, digest, 3)
            await exchange.control(digest, "hold")
            held = -1
            while held < (held := len(exchange.store.facts(digest))):  # a round that was open closes
                await asyncio.sleep(1.0)
            assert held < 40
            assert exchange.status(digest)["state"] == "held"
            await exchange.control(digest, "release")
            assert (await alps.ended(digest))["state"] == "done"

    loopback.run(main)


def test_two_studies_run_at_once_on_one_budget(alps: Loopback, simulated: object) -> None:
    async def main() -> None:
        async with alps.serving() as exchange:
            one = await begin(alps, long(simulated, **SMALL))
            fields = risk(simulated, lineage="other", **SMALL)
            two = await begin(alps, fields)
            assert set(exchange.running()) == {one, two}
            assert (await alps.ended(two))["state"] == "done"
            assert (await alps.ended(one))["state"] == "done"
            ledger = alps.hospitals["lake"].ledger
            assert ledger is not None
            assert ledger.charges_spent(one) == {"score": 40} and ledger.charges_spent(two) == {
                "score": 5,
                "held_out": 1,
            }
            assert ledger.balance().reserved == 0

    loopback.run(main)


def test_a_gate_whose_journal_is_gone_suspends_the_study_and_a_new_epoch_ends_it(
    alps: Loopback, simulated: object
) -> None:
    async def main() -> None:
        async with alps.serving() as exchange:
            digest = await begin(alps, long(simulated, aggregation={"mode": "strict", "round_deadline_s": 5}))
            await closed(alps, digest, 5)
            lake = alps.hospitals["lake"]
            await lake.close()
            shutil.rmtree(lake.home.consortium("alps") / "journal" / digest)
            gate = lake.open()
            assert await gate.join(digest, sha256(BUNDLE)) == ("joined", "")
            await alps.until(lambda: digest not in exchange.running())
            status = exchange.status(digest)
            assert status["state"] == "suspended" and "site 1 lost its journal" in status["reason"], status
            before = len(exchange.store.facts(digest))
            exchange.start(digest)
            status = await alps.ended(digest)
            assert status["state"] == "done", status
            assert steps(alps, digest) == list(range(40)) and before >= 5
            assert lake.ledger is not None and 40 <= lake.ledger.charges_spent(digest)["score"] <= 48

    loopback.run(main)


def test_a_ledger_put_back_from_yesterday_is_noticed_by_its_own_command_and_by_its_peers(
    alps: Loopback, simulated: object
) -> None:
    async def main() -> None:
        lake = alps.hospitals["lake"]
        folder = lake.home.dataset("main")
        async with alps.serving() as exchange:
            first = await begin(alps, risk(simulated, **SMALL))
            assert (await alps.ended(first))["state"] == "done"
            await lake.close()
            assert verify(folder, witnesses([lake.home.consortium("alps")], "main")).bad == 0
            cut = sqlite3.connect(folder / "ledger.db")
            cut.execute("DROP TRIGGER no_delete")
            cut.execute("DELETE FROM rows WHERE seq > (SELECT MAX(seq) FROM rows) - 3")
            cut.commit()
            cut.close()
            assert verify(folder, witnesses([lake.home.consortium("alps")], "main")).bad > 0  # its own command
            for name in ("receipts", "advertisements.json"):  # even where the site's own witnesses are gone as well
                path = lake.home.consortium("alps") / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            lake.open()
            second = await alps.publish_and_approve(alps.study(risk(simulated, lineage="second", **SMALL)))
            exchange.start(second)
            await alps.call(second)
            await alps.until(lambda: second not in exchange.running())
            status = exchange.status(second)
            assert status["state"] != "done", status
            gate = lake.gate
            assert gate is not None and lake.ledger is not None and list(lake.ledger.rows("rolled-back"))
            assert exchange.store.facts(second) == []  # nothing was opened on a budget that came back
            third = await alps.publish_and_approve(alps.study(risk(simulated, lineage="third", **SMALL)))
            exchange.start(third)
            await alps.call(third)
            session = gate.sessions[third]
            await alps.until(lambda: session._member.last_refusal is not None)  # it does not pass by trying again
            refusal = session._member.last_refusal
            assert refusal is not None and refusal.code is RefusalCode.BUDGET and "restored or cut" in refusal.message
            await exchange.control(third, "withdraw")

    loopback.run(main)


def test_a_study_that_one_hospital_has_not_approved_does_not_start(alps: Loopback, simulated: object) -> None:
    async def main() -> None:
        async with alps.serving() as exchange:
            digest = await alps.publish_and_approve(alps.study(risk(simulated)), but=["metro"])
            with pytest.raises(StudyError, match=r"metro \(not decided\)"):
                exchange.start(digest)
            gate = alps.hospitals["metro"].gate
            assert gate is not None
            assert await gate.join(digest, sha256(BUNDLE)) == ("refused", "NOT_READY")

    loopback.run(main)


def test_another_bundle_or_another_study_under_an_old_approval_is_refused(alps: Loopback, simulated: object) -> None:
    async def main() -> None:
        async with alps.serving() as exchange:
            approved = await alps.publish_and_approve(alps.study(risk(simulated)))
            other = exchange.publish(alps.signed(alps.study(risk(simulated, lineage="other"))), BUNDLE)
            gate = alps.hospitals["lake"].gate
            assert gate is not None
            assert await gate.join(approved, sha256(b"a program")) == ("refused", "STUDY")
            assert not await gate.bundle_approved(sha256(b"a program"))
            assert (await gate.join(other, sha256(BUNDLE)))[0] == "refused"
            assert gate.sessions == {}

    loopback.run(main)


def test_a_hospital_that_comes_back_while_a_study_ends_hears_of_the_end(
    alps: Loopback, simulated: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with alps.serving() as exchange:
            digest = await begin(alps, long(simulated))
            await closed(alps, digest, 3)
            await alps.hospitals["metro"].close()
            monkeypatch.setattr(exchange, "_all_receipts", lambda *_: None)  # a receipt is long on its way
            ending = asyncio.create_task(exchange.control(digest, "withdraw"))
            await asyncio.sleep(0.2)
            gate = alps.hospitals["metro"].open()
            await gate.resume()
            await alps.until(lambda: gate.outcome(digest) == "withdrawn")
            await ending
            assert set(exchange.store.receipts(digest)) == set(alps.hospitals)

    loopback.run(main)


def test_a_receipt_that_the_exchange_could_not_keep_is_sent_until_it_is_kept(
    alps: Loopback, simulated: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with alps.serving() as exchange:
            digest = await begin(alps, long(simulated))
            await closed(alps, digest, 3)
            keep, refused = exchange.store.set_receipt, []

            def full(study: str, site: str, document: bytes) -> None:
                if site != "harbor" and len(refused) < 5:
                    refused.append(site)
                    raise StoreFault("store.db cannot be written: database or disk is full", hint="free disk space")
                keep(study, site, document)

            monkeypatch.setattr(exchange.store, "set_receipt", full)
            metro = alps.hospitals["metro"]
            folder = metro.home.consortium("alps") / "receipts"
            await exchange.control(digest, "withdraw")
            await alps.until(lambda: all(h.gate.outcome(digest) is not None for h in alps.hospitals.values() if h.gate))
            if not (folder / f"{digest}.kept").exists():
                await metro.close()  # nor does it die with the gate
                await metro.open().resume()
            await alps.until(lambda: set(exchange.store.receipts(digest)) == set(alps.hospitals))
            await alps.until(lambda: (folder / f"{digest}.kept").exists())
            assert set(refused) == {"lake", "metro"}
            assert exchange.store.receipts(digest)["metro"] == (folder / f"{digest}.json").read_bytes()

    loopback.run(main)


def test_an_unforeseen_fault_in_a_contribution_is_one_reason_and_the_round_is_made_again(
    alps: Loopback, simulated: object, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: list[int] = []
    real = gate_contributor.Outgoing.words

    def words(outgoing: gate_contributor.Outgoing) -> object:
        if len(broken) < 1:
            broken.append(1)
            raise ValueError("patient 4711 has dosage 1.5")
        return real(outgoing)

    async def main() -> None:
        async with alps.serving():
            monkeypatch.setattr(gate_contributor.Outgoing, "words", words)
            digest = await begin(alps, long(simulated))
            status = await alps.ended(digest)
            assert status["state"] == "done", status
            assert steps(alps, digest) == list(range(40))
            (said,) = errors_of(caplog, "sequester.gate")
            assert "an unforeseen ValueError at " in said and "4711" not in caplog.text
            spent = [h.ledger.charges_spent(digest)["score"] for h in alps.hospitals.values() if h.ledger is not None]
            assert spent == [41, 41, 41]  # the round that failed is paid for, by everybody

    loopback.run(main)


def errors_of(caplog: pytest.LogCaptureFixture, logger: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == logger and r.levelname == "ERROR"]


def test_a_full_disk_at_the_exchange_is_one_error_and_the_study_goes_on_when_there_is_room(
    alps: Loopback, simulated: object, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with alps.serving() as exchange:
            digest = await begin(alps, long(simulated))
            await closed(alps, digest, 3)
            exchange.store.db.execute("PRAGMA max_page_count = 1")  # SQLite's own word for: no page more than there are
            await alps.until(lambda: bool(errors_of(caplog, "sequester.exchange")))
            at = len(exchange.store.facts(digest))
            await asyncio.sleep(3.0)
            assert len(exchange.store.facts(digest)) == at < 40
            (said,) = errors_of(caplog, "sequester.exchange")
            assert "store.db cannot be written: database or disk is full; free disk space" in said
            exchange.store.db.execute("PRAGMA max_page_count = 1073741823")
            await alps.until(lambda: exchange.status(digest)["state"] == "done", 120)
            assert steps(alps, digest) == list(range(40))

    loopback.run(main)


def test_a_full_disk_at_a_hospital_is_one_error_and_nothing_leaves_without_its_record(
    alps: Loopback, simulated: object, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with alps.serving() as exchange:
            digest = await begin(alps, long(simulated, aggregation={"mode": "strict", "round_deadline_s": 5}))
            await closed(alps, digest, 3)
            ledger, gate = alps.hospitals["lake"].ledger, alps.hospitals["lake"].gate
            assert ledger is not None and gate is not None
            ledger._db.execute("PRAGMA max_page_count = 1")
            await alps.until(lambda: bool(errors_of(caplog, "sequester.gate")))
            at, counter = len(exchange.store.facts(digest)), ledger.head()[0]
            await asyncio.sleep(7.0)
            assert len(exchange.store.facts(digest)) <= at + 1 and ledger.head()[0] <= counter + 1
            (said,) = errors_of(caplog, "sequester.gate")
            assert "the ledger cannot be written: database or disk is full; free disk space" in said
            ledger._db.execute("PRAGMA max_page_count = 1073741823")
            status = await alps.ended(digest)
            assert status["state"] == "done", status
            assert steps(alps, digest) == list(range(40))
            await alps.until(lambda: gate.outcome(digest) == "done")
            assert ledger.balance().reserved == 0

    loopback.run(main)
