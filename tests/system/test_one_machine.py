"""The harness of demo, examples and system tests: everything it starts ends, and what goes wrong is said with its log."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import psutil
import pytest

from sequester.one_machine import memory
from sequester.one_machine.consortium import Site
from sequester.one_machine.memory import kind_of
from sequester.one_machine.processes import Failed, Processes, environment, python

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]
SLEEPS = "import time; time.sleep(600)"
# starts a grandchild in a session of its own, says its id, and goes away without it
LEAVES_A_CHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_at_the_end_nothing_that_was_started_is_alive(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        started = [processes.start(f"one-{i}", "sleeper", python("-c", SLEEPS)) for i in range(3)]
        assert all(one.is_alive for one in started)
    assert not any(is_running(one.pid) for one in started)
    assert processes.left_behind == []


def test_an_exception_ends_them_as_well(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Processes(tmp_path) as processes:
        started = processes.start("one", "sleeper", python("-c", SLEEPS))
        raise KeyboardInterrupt
    assert not is_running(started.pid)


def test_a_process_that_is_deaf_to_sigterm_is_killed_and_said(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    with Processes(tmp_path, term_s=0.5) as processes:
        started = processes.start("deaf", "sleeper", python("-c", deaf))
        processes.wait_until("it is up", lambda: "up" in started.said(), 120)
    assert not is_running(started.pid)
    assert processes.left_behind == ["deaf did not end within 0 s of SIGTERM"]


def test_a_grandchild_that_outlives_its_parent_is_ended_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "GRACE_S", 1.0)
    with Processes(tmp_path) as processes:
        started = processes.start("parent", "sleeper", python("-c", LEAVES_A_CHILD))
        processes.wait_until("it has a child", lambda: started.said().strip() != "", 120)
        grandchild = int(started.said())
        assert is_running(grandchild)
    assert not is_running(grandchild)
    assert len(processes.left_behind) == 1 and f"process {grandchild} outlived" in processes.left_behind[0]


def test_what_it_started_ends_when_this_program_is_killed(tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from sequester.one_machine.processes import Processes, python
import time
with Processes(Path({str(tmp_path / "log")!r})) as processes:
    print(processes.start("one", "sleeper", python("-c", "import time; time.sleep(600)")).pid, flush=True)
    time.sleep(600)
"""
    killed = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment())
    assert killed.stdout is not None
    pid = int(killed.stdout.readline())
    killed.kill()
    killed.wait()
    killed.stdout.close()
    deadline = time.monotonic() + 120
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def test_a_command_that_fails_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        with pytest.raises(Failed, match="asks ended with status 3") as failed:
            processes.run(
                "asks", python("-c", "import sys; print('error: no such study', file=sys.stderr); sys.exit(3)")
            )
        assert "error: no such study" in failed.value.tail()
        assert processes.run("asks", python("-c", "import sys; print('yes'); sys.exit(3)"), statuses=(3,)) == "yes\n"


def test_a_command_that_waits_hears_of_the_death_of_what_it_waits_for(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        processes.start("exchange", "exchange", python("-c", "import sys; sys.exit('error: the disk is full')"))
        began = time.monotonic()
        with pytest.raises(Failed, match="exchange ended by itself, status 1") as failed:
            processes.run("waits", python("-c", SLEEPS))
        assert time.monotonic() - began < 120 and "the disk is full" in failed.value.tail()


def test_a_command_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes, pytest.raises(Failed, match="did not end within 1 s"):
        processes.run("slow", python("-c", SLEEPS), timeout_s=1)


def test_a_secret_goes_in_by_standard_input_and_into_no_log(tmp_path: Path) -> None:
    reads = python("-c", "import sys; print(len(sys.stdin.readline()))")
    with Processes(tmp_path) as processes:
        assert processes.run("enrol", reads, stdin="one-time-token\n") == "15\n"
    assert all(b"one-time-token" not in path.read_bytes() for path in tmp_path.iterdir())


def test_the_peak_of_a_process_is_seen_though_it_passed_between_two_samples(tmp_path: Path) -> None:
    grows = "import time; x = bytearray(b'x') * 80_000_000; del x; print('down', flush=True); time.sleep(600)"
    with Processes(tmp_path) as processes:
        started = processes.start("grows", "balloon", python("-c", grows))
        processes.wait_until("it let go", lambda: "down" in started.said(), 120)
        processes.watch.sample()
    assert 80 < processes.watch.peaks()["balloon"] < 200


def test_memory_is_told_by_what_a_process_is_not_by_who_started_it() -> None:
    worker = ["python", "-m", "sequester.client.compute.worker", "--fd", "7"]
    assert kind_of(worker, "gate") == "compute"
    node = [
        "python",
        "-m",
        "sequester.client.gate.flower.supernode",
        "--superexec-auth-secret-file",
        "superexec.secret",
    ]
    assert kind_of(node, "gate") == "SuperNode"
    assert kind_of(["python", "-m", "sequester.client.cli.app", "run"], "gate") == "gate"


def test_no_process_of_ours_lets_flower_call_home() -> None:
    said = environment()
    assert (said["FLWR_TELEMETRY_ENABLED"], said["FLWR_DISABLE_UPDATE_CHECK"]) == ("0", "1")
    assert said["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"


def test_a_hospitals_settings_are_toml_that_its_client_reads(tmp_path: Path) -> None:
    from sequester.client.config import Home

    site = Site("north", tmp_path / 'a "b".csv', tmp_path / "g", policy={"exact": ["linear"], "minimum_cohort": 60})
    (tmp_path / "site.toml").write_text(site.toml(), "utf-8")
    assert tomllib.loads(site.toml())["data"]["phenotypes"] == str(tmp_path / 'a "b".csv')
    config = Home(tmp_path).config()
    assert config.policy.exact == ("linear",) and config.policy.minimum_cohort == 60 and config.site.id == "north"


def test_the_demo_ends_with_one_error_and_stops_everything_when_it_is_told_to(tmp_path: Path) -> None:
    demo = Path(__file__).resolve().parents[2] / "deploy/demo/demo.py"
    said = subprocess.Popen(
        [sys.executable, str(demo), "--out", str(tmp_path / "out"), "--people", "400"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**environment(), "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (family := psutil.Process(said.pid).children(recursive=True)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert family
    os.kill(said.pid, signal.SIGTERM)
    text, _ = said.communicate(timeout=180)
    assert said.returncode == 130 and "interrupted" in text and "Traceback" not in text, text
    assert not any(is_running(process.pid) for process in family)
    assert list(tmp_path.glob("sequester-demo-*")) == []
