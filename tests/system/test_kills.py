"""`kill -9` of everything, through the real processes: exchange, SuperLink, SuperExec, gates, SuperNodes, executors."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from killing import Alps, founded, is_running
from one_machine.consortium import Published

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
    exchange_dies(alps, study)
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
    gone = alps.until("what it started is gone", lambda: not any(is_running(pid) for pid in family), 10)
    assert len(family) >= 3 and len(alps.steps(study)) == at
    alps.release()
    alps.consortium.run_site(site)
    goes_on(alps, study, at)
    alps.told(f"gate of {site}", "in a round", f"children gone in {gone:.1f} s, goes on", time.monotonic() - began)
    alps.brake(study)


def exchange_dies(alps: Alps, study: Published) -> None:
    """The exchange is killed in the middle of a round, stays away until hospitals notice, and is started again."""
    at = len(alps.steps(study))
    family = alps.kill_exchange()
    gone = alps.until("what it started is gone", lambda: not any(is_running(pid) for pid in family), 15)
    alps.release()  # the round's last contribution is made while nobody is there to take it
    time.sleep(3.0)
    assert len(alps.steps(study)) == at
    alps.consortium.serve()
    took = goes_on(alps, study, at, 1)
    alps.told("exchange", "in a round", f"children gone in {gone:.1f} s, first round after listening", took)
    assert took < RESUMES_S
    alps.brake(study)
