"""The compute process as the gate meets it: no network, no torch, contributions, faults without data; and its socket."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sequester.client import isolation
from sequester.client.ingest import freeze as ingest
from sequester.client.socket import Channel, Letter
from sequester.protocols import arrays, privacy
from sequester.protocols.analyses.registry import analysis_of
from sequester.protocols.errors import PeerError
from sequester.protocols.signing import canonical
from sequester.protocols.study import study_json
from small_hospital import hospital, study


def pair() -> tuple[Channel, socket.socket]:
    a, b = socket.socketpair()
    a.settimeout(20)
    return Channel(a), b


@pytest.fixture
def worker(tmp_path: Path) -> object:
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    process = subprocess.Popen(
        [sys.executable, "-m", "sequester.client.compute.worker", "--fd", str(theirs.fileno())],
        pass_fds=[theirs.fileno()], stderr=(tmp_path / "log").open("wb"),
    )  # fmt: skip
    theirs.close()
    channel = Channel(ours)
    try:
        assert channel.receive().kind == "started"
        yield process, channel
    finally:
        channel.close()
        process.kill()
        process.wait()


def ask(channel: Channel, kind: str, header: dict[str, object], payload: bytes = b"") -> Letter:
    channel.send(kind, header, payload)
    return channel.receive()


def test_a_loaded_cohort_answers_with_the_contribution_of_the_analysis(worker: object, tmp_path: Path) -> None:
    process, channel = worker  # type: ignore[misc]
    home, of = hospital(tmp_path / "site"), study()
    ingest.freeze(home, home.config(), of, "cd" * 32)
    folder = home.dataset("main") / "cohorts" / ("cd" * 32)
    loaded = ask(channel, "load", {"study": canonical(study_json(of)).decode(), "cohort": str(folder)})
    assert loaded.kind == "loaded"
    plan = of.analyses[0]
    first = analysis_of(plan).start(plan, of, {}).broadcast
    answer = ask(channel, "contribute", {"analysis": plan.name, "step": 0}, arrays.encode(first))
    assert answer.kind == "contribution"
    vector = privacy.layout(of, plan, 0).flatten(answer.arrays())
    assert np.isfinite(vector).all() and np.abs(vector).sum() > 0
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    assert "torch" not in maps and "pgenlib" not in maps and "_ssl" not in maps


def test_faults_leave_as_names_and_never_as_text(worker: object, tmp_path: Path) -> None:
    _, channel = worker  # type: ignore[misc]
    assert ask(channel, "contribute", {"analysis": "score", "step": 0}).header == {"fault": "ORDER"}
    of = canonical(study_json(study())).decode()
    assert ask(channel, "load", {"study": of, "cohort": str(tmp_path / "none")}).header == {"fault": "SiteError"}
    assert ask(channel, "load", {"study": "{}", "cohort": "x"}).header == {"fault": "StudyError"}
    assert ask(channel, "load", {}).header == {"fault": "CODE"}
    assert ask(channel, "dance", {}).header == {"fault": "ORDER"}


def test_compute_has_a_network_namespace_of_its_own_or_the_probe_says_so(worker: object) -> None:
    process, _ = worker  # type: ignore[misc]
    verdict = isolation.probe(process.pid)
    separate = Path(f"/proc/{process.pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()
    assert verdict.isolated == separate
    assert ("shares this host's network" in verdict.sentence) == (not separate)


def test_compute_ends_when_the_gate_closes_the_socket(worker: object) -> None:
    process, channel = worker  # type: ignore[misc]
    channel.close()
    assert process.wait(120) == 0


# ---- isolation ------------------------------------------------------------------------------------------------------


def test_a_gate_that_crashes_leaves_no_copy_of_its_memory(tmp_path: Path) -> None:
    code = (
        "import asyncio, resource, sys; from pathlib import Path\n"
        "from sequester.client.config import Home; from sequester.client.gate.serve import serve\n"
        "from sequester.protocols.errors import SiteError\n"
        "_, most = resource.getrlimit(resource.RLIMIT_CORE); resource.setrlimit(resource.RLIMIT_CORE, (most, most))\n"
        "try: asyncio.run(serve(Home(Path(sys.argv[1]))))\n"
        "except SiteError: print(resource.getrlimit(resource.RLIMIT_CORE))\n"
    )
    (tmp_path / "site.toml").write_text('[site]\nid = "north"\n', "utf-8")
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert ran.stdout == "(0, 0)\n"


def test_a_process_that_left_the_network_cannot_reach_a_listener_on_loopback() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        code = (
            "import socket, sys; from sequester.client import isolation\n"
            "left = isolation.leave_network()\n"
            f"s = socket.socket(); s.settimeout(3)\n"
            f"try: s.connect(('127.0.0.1', {listener.getsockname()[1]})); reached = True\n"
            "except OSError: reached = False\n"
            "print(int(left), int(reached))"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    left, reached = out.stdout.split()
    if left == "0":
        pytest.skip("this host allows no network namespaces")
    assert reached == "0"


TAKES_IT_BACK = """
import ctypes, os, sys
from sequester.client import isolation
host = os.open(f"/proc/{os.getppid()}/ns/net", os.O_RDONLY)
print(int(LEAVE), flush=True)
sys.stdin.readline()
print(ctypes.CDLL(None).setns(host, isolation.CLONE_NEWNET), flush=True)
"""


@pytest.mark.parametrize(
    "leave",
    ["isolation.leave_network()", "ctypes.CDLL(None).unshare(isolation.CLONE_NEWNET) == 0"],
    ids=["as compute does", "root without a user namespace"],
)
def test_a_process_that_can_take_the_network_back_is_not_called_isolated(leave: str) -> None:
    """The gate looks once, and what compute could do afterwards counts."""
    code = [sys.executable, "-c", TAKES_IT_BACK.replace("LEAVE", leave)]
    with subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        left = process.stdout.readline().strip() == "1"
        verdict = isolation.probe(process.pid)
        process.stdin.write("now\n")
        process.stdin.flush()
        is_back = process.stdout.readline().strip() == "0"
    if not left:
        pytest.skip("this host allows this account no such namespace")
    assert verdict.isolated is not is_back
    assert is_back is ("take this host's network back" in verdict.sentence)
    assert not (is_back and "leave_network" in leave)


def test_a_process_in_our_own_namespace_is_not_called_isolated() -> None:
    assert not isolation.probe(os.getpid()).isolated


def test_a_namespace_with_an_interface_or_a_route_is_not_called_isolated(tmp_path: Path) -> None:
    header = "Inter-|\n face |\n"
    for number, (dev, route, isolated) in enumerate(
        [("  lo: 0\n", "", True), ("  lo: 0\n eth0: 0\n", "", False), ("  lo: 0\n", "eth0 0\n", False)]
    ):
        proc = tmp_path / str(number)
        for name, space in (("self", "net:[1]"), ("7", "net:[2]")):
            (proc / name / "ns").mkdir(parents=True)
            (proc / name / "ns/net").symlink_to(space)
            (proc / name / "ns/user").symlink_to(space)
        (proc / "7/status").write_text("Name:\tpython\nCapPrm:\t000001ffffffffff\n")
        (proc / "7/net").mkdir()
        (proc / "7/net/dev").write_text(header + dev)
        (proc / "7/net/route").write_text("Iface\n" + route)
        assert isolation.probe(7, proc).isolated is isolated


def test_what_the_kernel_does_not_say_is_not_called_isolated(tmp_path: Path) -> None:
    assert not isolation.probe(7, tmp_path).isolated


# ---- socket ---------------------------------------------------------------------------------------------------------


def test_a_letter_arrives_as_it_was_sent() -> None:
    a, b = pair()
    other = Channel(b)
    payload = arrays.encode({"w": np.arange(5.0)})
    a.send("contribute", {"step": 3}, payload)
    letter = other.receive()
    assert (letter.kind, letter.header, letter.payload) == ("contribute", {"step": 3}, payload)
    assert letter.arrays()["w"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x00\x00",
        struct.pack(">I", 2**31),
        struct.pack(">I", 4) + b"nope",
        struct.pack(">I", 2) + b"{}",
        struct.pack(">I", 2) + b"[]",
        struct.pack(">I", 12) + b'{"kind":"a"}' + struct.pack(">Q", 2**63),
        struct.pack(">I", 12) + b'{"kind":"a"}' + struct.pack(">Q", 9) + b"short",
    ],
)
def test_broken_framing_is_a_peer_error_and_nothing_else(raw: bytes) -> None:
    channel, b = pair()
    b.sendall(raw)
    b.close()
    with pytest.raises(PeerError):
        channel.receive()
