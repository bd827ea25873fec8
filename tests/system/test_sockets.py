"""What /proc says of a study while it runs: who has a network, who listens, who talks to whom, who has loaded what.

`drenthe` runs on a host that gives no network namespaces: its kernel refuses them (`max_net_namespaces` is 0 in a user
namespace of its own). It must not start the study before its policy says `allow_unisolated`; then it is the counterexample
by which the audit of the other two shows that it can fail.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from lowlands import CAN_ISOLATE, NAMES, POLICY, Lowlands, client, client_line, server
from sequester.client.gate import control
from sequester.client.gate.flower import door
from sequester.one_machine.consortium import Published, Site
from sequester.one_machine.memory import kind_of
from sequester.protocols.errors import SiteError
from sequester.protocols.signing import open_document

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not CAN_ISOLATE, reason="this host gives no network namespaces"),
]

BARE = "drenthe"  # its host gives no network namespaces
ISOLATED = ("gouda", "zeeland")
SAMPLES, EVERY_S = 25, 0.2
NO_NAMESPACES = 'echo 0 > /proc/sys/user/max_net_namespaces && exec "$@"'
LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")


@dataclass
class Held:
    """A study held open in its first round, and what was seen on the way there."""

    lowlands: Lowlands
    study: Published
    ports: dict[str, int]
    family: dict[tuple[str, str], list[int]]  # (site, kind) -> ids
    listening: dict[tuple[str, str], set[int]] = field(default_factory=dict)  # TCP ports on loopback
    elsewhere: list[str] = field(default_factory=list)  # listeners and connections beyond loopback
    reached: dict[tuple[str, str], set[int]] = field(default_factory=dict)  # TCP ports that were connected to
    refused: dict[str, Any] = field(default_factory=dict)
    shown: str = ""

    def sample(self) -> None:
        """One look at every socket of every process of every hospital."""
        seen = []
        for who in self.family:
            for pid in self.family[who]:
                try:
                    seen += [(who, c) for c in psutil.Process(pid).net_connections("inet")]
                except psutil.Error:
                    continue
        for who, c in seen:
            if c.status == psutil.CONN_LISTEN:
                self.listening.setdefault(who, set()).add(c.laddr.port)
        for who, c in seen:
            ends = [end.ip for end in (c.laddr, c.raddr) if end]
            if c.type != 1 or any(ip not in LOOPBACK for ip in ends):
                self.elsewhere.append(f"{who}: {c}")
            elif c.raddr and c.laddr.port not in self.listening.get(who, set()):
                self.reached.setdefault(who, set()).add(c.raddr.port)


def _family(lowlands: Lowlands) -> dict[tuple[str, str], list[int]]:
    found: dict[tuple[str, str], list[int]] = {}
    for name in NAMES:
        gate = psutil.Process(lowlands.consortium.gates[name].pid)
        found[name, "gate"] = [gate.pid]
        for process in gate.children(recursive=True):
            found.setdefault((name, kind_of(process.cmdline(), "gate")), []).append(process.pid)
    return found


def _run_without_namespaces(lowlands: Lowlands) -> None:
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", NO_NAMESPACES, "sh"]
    gate = lowlands.consortium.processes.start(
        f"{BARE}-gate-bare", "gate", [*command, *client_line(lowlands.home(BARE), "run")]
    )
    lowlands.consortium.gates[BARE] = gate


def _compute(lowlands: Lowlands, name: str) -> list[int]:
    return _family(lowlands).get((name, "compute"), [])


@pytest.fixture(scope="module")
def held(lowlands: Lowlands, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Held]:
    """The study runs at all three hospitals, with the compute process of one of them stopped in the first round."""
    consortium = lowlands.consortium
    toml = lowlands.home(BARE) / "site.toml"
    strict = toml.read_text("utf-8")
    with lowlands.exchange():
        study = lowlands.publish()
        for name in ISOLATED:
            consortium.run_site(name)
        _run_without_namespaces(lowlands)
        consortium.coordinate("study", "start", study.digest)
        lowlands.until(
            "two stand and one refuses",
            lambda: (
                sorted(consortium.status(study.digest)["sites"].values())
                == ["refused:NOT_READY", "standing", "standing"]
            ),
        )
        refused = {
            "status": consortium.status(study.digest), "log": consortium.gates[BARE].log.read_text("utf-8"),
            "compute": _compute(lowlands, BARE),
        }  # fmt: skip
        stopped = _compute(lowlands, "zeeland")[0]
        os.kill(stopped, signal.SIGSTOP)
        try:
            consortium.processes.stop(consortium.gates[BARE])
            data = lowlands.data(BARE)
            policy = {**POLICY, "allow_unisolated": True}
            toml.write_text(Site(BARE, data / "phenotypes.csv", data / "genotypes", policy=policy).toml(), "utf-8")
            shown = consortium.hospital(BARE, "approve", study.digest, "--person", "The data keeper", "--yes")
            _run_without_namespaces(lowlands)
            at = lowlands.home(BARE) / "run" / "lowlands.door"
            lowlands.until("its door is open", lambda: _is_open(at))
            bundle = open_document(study.signed.read_bytes(), "study", None).body["bundle"]
            # as the ClientApp asks; Flower asks a hospital that refused again after a minute only
            lowlands.until("it joins", lambda: door.join(at, study.digest, bundle) == ("joined", ""))
            lowlands.until("its compute is there", lambda: len(_compute(lowlands, BARE)) == 1)
            seen = Held(lowlands, study, consortium_ports(lowlands), _family(lowlands), refused=refused, shown=shown)
            for _ in range(SAMPLES):
                seen.sample()
                time.sleep(EVERY_S)
            yield seen
        finally:
            if psutil.pid_exists(stopped):
                os.kill(stopped, signal.SIGCONT)
            consortium.stop_sites()
            toml.write_text(strict, "utf-8")


def _is_open(at: Path) -> bool:
    try:
        control.ask(at, {"ask": "nothing"}, 5)
    except SiteError:
        return False
    return True


def consortium_ports(lowlands: Lowlands) -> dict[str, int]:
    found: dict[str, int] = json.loads((lowlands.consortium.server / "exchange" / "ports.json").read_text("utf-8"))
    return found


# ---- a host without namespaces --------------------------------------------------------------------------------------


def test_a_host_without_namespaces_does_not_start_the_study_and_says_why_at_home_only(held: Held) -> None:
    status, log = held.refused["status"], held.refused["log"]
    assert status["sites"][BARE] == "refused:NOT_READY" and status["state"] == "running"
    assert "compute is not isolated: compute shares this host's network" in log
    assert held.refused["compute"] == []  # it was ended before it was told where any patient's data lies
    assert "isolated" not in str(status)


def test_the_policy_line_that_goes_without_isolation_is_printed_in_the_approval(held: Held) -> None:
    assert "allow_unisolated: this site lets the process that reads DNA keep its network." in held.shown
    assert not _has_own_network(held.family[BARE, "compute"][0])


# ---- compute --------------------------------------------------------------------------------------------------------


def _link(path: Path | str) -> str:
    return str(Path(path).readlink())


def _has_own_network(pid: int) -> bool:
    return _link(f"/proc/{pid}/ns/net") != _link("/proc/self/ns/net")


@pytest.mark.parametrize("name", ISOLATED)
def test_compute_lives_in_a_network_namespace_of_its_own_with_no_usable_interface(held: Held, name: str) -> None:
    (pid,) = held.family[name, "compute"]
    own = _link(f"/proc/{pid}/ns/net")
    others = {_link(f"/proc/{p}/ns/net") for who, pids in held.family.items() for p in pids if who[1] != "compute"}
    assert _has_own_network(pid) and own not in others
    proc = Path(f"/proc/{pid}/net")
    interfaces = [line.split(":")[0].strip() for line in (proc / "dev").read_text().splitlines()[2:]]
    assert interfaces == ["lo"] and len((proc / "route").read_text().splitlines()) <= 1
    for table in ("tcp", "tcp6", "udp", "udp6", "raw"):
        assert len((proc / table).read_text().splitlines()) <= 1, table
    sockets = [fd for fd in Path(f"/proc/{pid}/fd").iterdir() if _link(fd).startswith("socket:")]
    assert len(sockets) == 1  # its end of the pair that joins it to the gate
    # from inside: even loopback is down
    where = [f"--target={pid}", "--net", *([] if os.geteuid() == 0 else ["--user", "--preserve-credentials"])]
    dial = f"import socket; socket.create_connection(('127.0.0.1', {held.ports['exchange_port']}), 5)"
    tried = subprocess.run(["nsenter", *where, sys.executable, "-c", dial], capture_output=True, text=True, timeout=180)
    assert tried.returncode == 1 and "Network is unreachable" in tried.stderr


# ---- everybody else -------------------------------------------------------------------------------------------------


def test_no_process_of_a_hospital_listens_or_connects_beyond_loopback(held: Held) -> None:
    assert held.elsewhere == []
    for name in NAMES:
        assert {kind for site, kind in held.family if site == name} >= {"gate", "compute", "executor", "SuperNode"}
        assert len(held.listening[name, "gate"]) == 1  # the forwarder
        assert len(held.listening[name, "SuperNode"]) == 1  # the Runtime API
        assert (name, "executor") not in held.listening and (name, "compute") not in held.listening


def test_only_the_gate_reaches_the_exchange_and_the_supernode_only_the_gates_forwarder(held: Held) -> None:
    for name in NAMES:
        (forwarder,), (runtime,) = held.listening[name, "gate"], held.listening[name, "SuperNode"]
        assert held.reached[name, "gate"] == {held.ports["exchange_port"], held.ports["superlink_port"]}
        assert held.reached[name, "SuperNode"] == {forwarder}
        assert held.reached.get((name, "executor"), set()) <= {runtime}
        assert held.reached.get((name, "compute"), set()) == set()


# ---- what is loaded -------------------------------------------------------------------------------------------------


def _loaded(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def _memory_holds(pid: int, secret: bytes) -> bool:
    """Whether the bytes stand anywhere in the writable memory of a process."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in _loaded(pid).splitlines():
            bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
            if bounds is None or "[v" in line:
                continue
            low, high = (int(bound, 16) for bound in bounds.groups())
            try:
                memory.seek(low)
                if secret in memory.read(high - low):
                    return True
            except OSError:
                continue
    return False


@pytest.mark.parametrize("name", NAMES)
def test_the_gate_has_no_reader_and_no_torch_and_compute_no_grpc_and_no_key(held: Held, name: str) -> None:
    (gate,), (compute,) = held.family[name, "gate"], held.family[name, "compute"]
    at_the_gate, in_compute = _loaded(gate), _loaded(compute)
    assert "cygrpc" in at_the_gate and "cryptography" in at_the_gate  # the audit sees what is loaded
    for library in ("bed_reader", "pgenlib", "cyvcf2", "/bgen", "polars", "torch"):
        assert library not in at_the_gate, library
    for library in ("cygrpc", "flwr", "torch"):  # a linear model needs no torch
        assert library not in in_compute, library
    folder = held.lowlands.home(name) / "consortia" / "lowlands"
    key = load_pem_private_key((folder / "identity.key").read_bytes(), None)
    secret = key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())  # type: ignore[call-arg]
    assert _memory_holds(gate, secret)
    assert not _memory_holds(compute, secret)
    opened = {_link(fd) for fd in Path(f"/proc/{compute}/fd").iterdir()}
    assert not any("/consortia/" in path or path.endswith(("ledger.db", ".key", ".pem")) for path in opened)


# ---- and the end ----------------------------------------------------------------------------------------------------


def test_the_receipt_and_the_report_print_who_went_without_isolation(held: Held, tmp_path: Path) -> None:
    consortium = held.lowlands.consortium
    os.kill(held.family["zeeland", "compute"][0], signal.SIGCONT)
    held.lowlands.until("it is done", lambda: consortium.status(held.study.digest)["state"] == "done")
    # every gate has tried itself before it joined, though nobody typed anything for that
    assert consortium.status(held.study.digest)["release"] == {
        "sites": dict.fromkeys(NAMES, "passed"), "granted_by": "passes"
    }  # fmt: skip
    consortium.coordinate("study", "results", held.study.digest, "--out", str(tmp_path / "out"))
    receipts = {name: consortium.receipt(name, held.study.digest) for name in NAMES}
    assert {name: body["allow_unisolated"] for name, body in receipts.items()} == {
        BARE: True,
        "gouda": False,
        "zeeland": False,
    }
    assert receipts[BARE]["isolation"] == "compute shares this host's network"
    assert all("network namespace of its own" in receipts[name]["isolation"] for name in ISOLATED)
    for name in NAMES:
        rows = json.loads(consortium.hospital(name, "ledger", "--json"))["rows"]
        (row,) = [row for row in rows if row.get("what") == "Verdict" and row["study"] == held.study.digest]
        reserved = next(row for row in rows if row["kind"] == "reserve" and row["study"] == held.study.digest)
        assert row["seq"] < reserved["seq"] and row["bytes"] < 1000
    page = re.sub(r"<[^>]+>", " ", (tmp_path / "out" / "report.html").read_text("utf-8"))
    assert re.search(
        rf"without isolation[^.]*{BARE}|{BARE}[^.]*(without|no) (network )?isolation|allow_unisolated", page
    )


def test_a_model_without_a_verdict_stays_in_until_it_is_tried_again_or_waived_by_all(
    held: Held, tmp_path: Path
) -> None:
    consortium, digest, out = held.lowlands.consortium, held.study.digest, tmp_path / "out"
    results = ("study", "results", digest, "--out", out)
    store = consortium.server / "exchange" / "store.db"

    def lose() -> None:
        with closing(sqlite3.connect(store, timeout=20)) as db, db:
            lost = "DELETE FROM attestations WHERE digest = ? AND site = 'gouda' AND kind = 'verdict'"
            assert db.execute(lost, (digest,)).rowcount == 1

    lose()
    server(consortium.server, *results).one_error(40, "the release gate: gouda missing; a pass of every", "study waive")
    assert not out.exists()
    again = client(held.lowlands.home("gouda"), "audit", "release", digest, "--json")
    said = json.loads(again.out)
    assert again.status == 0 and said["passed"] and said["sent"] and said["models"][0]["checks"]
    assert consortium.status(digest)["release"]["granted_by"] == "passes"
    lose()
    reason = "The machine of gouda is gone."
    consortium.coordinate("study", "waive", digest, "--reason", reason)

    def sign(name: str) -> None:
        shown = consortium.hospital(name, "countersign", digest, "--person", "The data keeper", "--yes")
        assert reason in shown and "gouda missing" in shown

    consortium.each(sign, NAMES)
    consortium.coordinate(*map(str, results))
    assert reason in (out / "report.html").read_text("utf-8")
    waived = json.loads((out / "certificate.json").read_text("utf-8"))["release_gate"]
    assert waived["granted_by"] == "waiver" and waived["waiver"]["countersigned"] == list(NAMES)
