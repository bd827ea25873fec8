"""`kill -9` of everything, through the real processes: exchange, SuperLink, SuperExec, gates, SuperNodes, executors."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from killing import Alps, below, below_bound, founded, is_running, small_disk
from sequester.one_machine.consortium import Published

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

RESUMES_S = 10.0  # from the moment the exchange listens again to the first round that it closes


@pytest.fixture(scope="module")
def alps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alps]:
    made = founded(tmp_path_factory.mktemp("kills"))
    with made.consortium:
        yield made
    made.require_nothing_left()


def test_one_study_outlives_a_kill_of_every_process_in_the_middle_of_a_round(alps: Alps) -> None:
    study = alps.publish()
    alps.begin(study)
    alps.brake(study)
    for kind, site in (
        ("compute", "lake"), ("compute", "metro"), ("executor", "lake"), ("SuperNode", "lake"),
        ("ServerApp", ""), ("SuperExec", ""), ("SuperLink", ""),
    ):  # fmt: skip
        at = len(alps.steps(study))
        dead = alps.kill(kind, site)
        assert len(alps.steps(study)) == at  # the round was open
        alps.release()
        alps.told(f"{kind} {site}", "in a round", "goes on", goes_on(alps, study, at))
        alps.brake(study)
        if kind in ("compute", "executor", "SuperExec", "SuperLink"):
            alps.replaced(kind, site, dead)
    assert alps.attempts(study) == {}  # none of these costs a round, and so no charge
    gate_dies(alps, study, "lake")
    gate_dies(alps, study, "metro")  # whose compute is the stopped one
    below_bound(RESUMES_S, lambda: exchange_dies(alps, study))
    assert all(held > 0 for held in alps.reservations(study).values())
    alps.release()
    assert alps.ended(study) == ("done", "")
    assert {body["state"] for body in alps.receipts(study).values()} == {"done"}
    alps.require_whole(study)
    alps.require_quiet()


def goes_on(alps: Alps, study: Published, at: int, more: int = 2) -> float:
    """Seconds until so many more rounds have closed than `at`."""
    began = time.monotonic()
    alps.closed(study, at + more)
    return time.monotonic() - began


def gate_dies(alps: Alps, study: Published, site: str) -> None:
    """A gate is killed in the middle of a round, and started by hand as systemd would."""
    at = len(alps.steps(study))
    family = alps.kill_gate(site)
    began = time.monotonic()
    gone = alps.until("what it started is gone", lambda: not any(is_running(pid) for pid in family))
    # compute and executor at least: its SuperNode may be waiting to be started again
    assert len(family) >= 2 and len(alps.steps(study)) == at
    alps.release()
    alps.consortium.run_site(site)
    goes_on(alps, study, at)
    alps.told(f"gate of {site}", "in a round", f"children gone in {gone:.1f} s, goes on", time.monotonic() - began)
    alps.brake(study)


def exchange_dies(alps: Alps, study: Published) -> float:
    """The exchange is killed in the middle of a round, stays away until hospitals notice, and is started again.

    Seconds from when it listens to the first round that it closes.
    """
    at = len(alps.steps(study))
    family = alps.kill_exchange()
    gone = alps.until("what it started is gone", lambda: not any(is_running(pid) for pid in family))
    alps.release()  # the round's last contribution is made while nobody is there to take it
    time.sleep(3.0)
    assert len(alps.steps(study)) == at
    alps.consortium.serve()
    took = goes_on(alps, study, at, 1)
    alps.told("exchange", "in a round", f"children gone in {gone:.1f} s, first round after listening", took)
    alps.brake(study)
    return took


def all_local_work_ends(alps: Alps, study: Published, state: str, began: float) -> float:
    """Seconds from `began` until no hospital has a compute process; then receipts and outcomes say the state."""
    gates = [gate.pid for gate in alps.consortium.gates.values()]
    alps.until("no compute is left", lambda: not any(below(pid, "compute") for pid in gates))
    took = time.monotonic() - began
    assert alps.ended(study)[0] == state
    assert {body["state"] for body in alps.receipts(study).values()} == {state}
    assert {alps.outcome(site, study) for site in alps.consortium.sites} == {state}
    alps.require_quiet()
    return took


@pytest.mark.nightly
def test_a_withdrawal_and_a_stop_through_flower_end_all_local_work(alps: Alps) -> None:
    def withdrawn() -> float:
        study = alps.publish()
        alps.begin(study)
        alps.brake(study)
        began = time.monotonic()
        alps.consortium.coordinate("study", "withdraw", study.digest)  # in a round that nobody ends
        took = all_local_work_ends(alps, study, "withdrawn", began)
        alps.told("`study withdraw`", "in a round", "withdrawn, receipts and outcomes written", took)
        return took

    def stopped() -> float:
        study = alps.publish()
        alps.begin(study)
        alps.brake(study)
        began = time.monotonic()
        with alps.control() as control:
            control.stop(alps.run_id(study))
        took = all_local_work_ends(alps, study, "withdrawn", began)
        assert alps.state(study)[1] == "the run was stopped through Flower"
        alps.told("`flwr stop`", "in a round", "withdrawn, receipts and outcomes written", took)
        return took

    below_bound(15, withdrawn)
    below_bound(20, stopped)  # Flower is asked every two seconds


@pytest.mark.nightly
def test_a_second_study_is_joined_while_the_first_one_runs(alps: Alps) -> None:
    one, two = alps.publish(), alps.publish(20)
    alps.begin(one)
    alps.brake(one)
    at, began = len(alps.steps(one)), time.monotonic()
    alps.start(two)
    assert alps.ended(two) == ("done", "")
    assert alps.state(one)[0] == "running" and len(alps.steps(one)) == at
    alps.told("a second study", "while a round of the first is open", "joined and done", time.monotonic() - began)
    alps.release()
    assert alps.ended(one) == ("done", "")
    alps.require_whole(one)
    alps.require_whole(two, 20)
    alps.require_quiet()


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["executor", "SuperNode", "SuperLink"])
def test_a_kill_before_the_hospitals_joined_delays_the_study_and_does_not_end_it(alps: Alps, kind: str) -> None:
    study = alps.publish(10)
    executor = alps.one("executor", "lake")
    os.kill(executor, signal.SIGSTOP)  # so that lake's join cannot be answered before the kill
    began = time.monotonic()
    alps.start(study)
    alps.until("a ServerApp runs", lambda: bool(below(alps.one("exchange"), "ServerApp")))
    time.sleep(5.0)
    assert alps.steps(study) == []
    alps.kill(kind, "" if kind == "SuperLink" else "lake")
    if is_running(executor):
        os.kill(executor, signal.SIGCONT)
    alps.until("the study has begun", lambda: len(alps.steps(study)) > 0, 300)
    took = time.monotonic() - began
    assert alps.ended(study) == ("done", "")
    alps.told(f"{kind} of lake" if kind != "SuperLink" else kind, "before the join", "joined later, done", took)
    alps.require_whole(study, 10)
    alps.require_quiet()


@pytest.mark.nightly
@pytest.mark.parametrize("where", ["lake", "exchange"])
def test_a_full_disk_stops_rounds_with_one_error_and_they_go_on_when_there_is_room(alps: Alps, where: str) -> None:
    study = alps.publish()
    folder = alps.consortium.server / "exchange" if where == "exchange" else alps.consortium.home(where)
    alps.stop_one(where)
    with small_disk(folder) as fill:
        alps.start_one(where)
        try:
            alps.begin(study)
            alps.brake(study)
            full = fill()
            alps.release()
            log = alps.log_of(where)
            alps.until("the error is said", lambda: b"free disk space" in log.read_bytes())
            alps.still(study)
            at = len(alps.steps(study))
            time.sleep(10.0)
            assert len(alps.steps(study)) == at
            said = [
                line
                for line in log.read_bytes().splitlines()
                if b'"error"' in line and study.digest[:12].encode() in line
            ]
            assert 1 <= len(said) <= 3, said  # not one a try
            full.unlink()
            took = goes_on(alps, study, at)
            alps.told(
                f"disk of {where} full", "in a round", f"{len(said)} error lines, goes on when there is room", took
            )
            assert alps.ended(study) == ("done", "")
            alps.require_whole(study)
            alps.require_quiet()
        finally:
            alps.stop_one(where)
    alps.start_one(where)
