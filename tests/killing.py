"""A consortium of real processes in which a test kills one, in the middle of a round, and looks at what is left.

Processes are found by their command lines below the ones that the harness started. A round is held open by stopping one
hospital's compute (SIGSTOP): as long as it is stopped no round can close, whatever else happens.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

import released
from sequester.client.config import Home
from sequester.one_machine.consortium import PORTS, Consortium, Published, Site
from sequester.one_machine.memory import kind_of
from sequester.one_machine.processes import Running
from sequester.protocols.signing import open_document
from sequester.protocols.study import parse_study
from sequester.server.flower.control import Control
from sequester.simulate.hospitals import Hospital, hospitals

SITES = (
    Hospital("harbor", (50, 150, 650), 1.0, 0.9, 0.01, "chr"),
    Hospital("lake", (300, 700, 100), 1.0, 0.9, 0.01, "swapped"),
    Hospital("metro", (550, 500, 150), 2.0, 0.9, 0.01, "flipped"),
)
BRAKE = "metro"  # the hospital whose compute holds a round open
PEOPLE, ROUNDS, SPARES = 900, 150, 30
WAIT_S = 180.0  # other programs may want this machine as well
POLICY: dict[str, object] = {"epsilon_life": 60, "order_life": 2}  # a dozen studies on one data set


def is_running(pid: int) -> bool:
    """Alive, and not a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def below(parent: int, kind: str) -> list[int]:
    """Ids of the living processes of a kind below a process, oldest first."""
    try:
        family = psutil.Process(parent).children(recursive=True)
    except psutil.Error:
        return []
    found = []
    for process in family:
        try:
            if kind_of(process.cmdline(), "") == kind and process.status() != psutil.STATUS_ZOMBIE:
                found.append((process.create_time(), process.pid))
        except psutil.Error:
            continue
    return [pid for _, pid in sorted(found)]


def below_bound(bound_s: float, measure: Callable[[], float]) -> None:
    """The least of at most three measurements is below the bound: what else runs on this machine only adds time."""
    took: list[float] = []
    while len(took) < 3 and min(took, default=bound_s) >= bound_s:
        took.append(measure())
    assert min(took) < bound_s, took


@dataclass
class Case:
    """One line of the table that a run prints: what was killed, when, what happened, in how many seconds."""

    what: str
    when: str
    outcome: str
    seconds: float


@dataclass
class Alps:
    """The founded consortium `alps` of three hospitals, its gates running."""

    consortium: Consortium
    fields: dict[str, Any]
    cases: list[Case] = field(default_factory=list)
    _numbers: int = 0
    _braked: int = 0

    # ---- studies ------------------------------------------------------------------------------------------------

    def publish(self, rounds: int = ROUNDS, **changed: object) -> Published:
        """A signed and published study that every hospital approved."""
        self._numbers += 1
        fields = self.fields | {
            "lineage": f"kills-{self._numbers}",
            "analyses": [{"kind": "glm", "name": "score", "rounds": rounds, "prevalence": 0.15, "budget": 1}],
            **changed,
        }
        study = self.consortium.publish(self.consortium.write_study(fields, name=f"study-{self._numbers}"))
        for name in self.consortium.sites:  # these tests are about something else than the release gate
            parsed = parse_study(open_document(study.signed.read_bytes(), "study", None).body_bytes)
            released.passed_here(Home(self.consortium.home(name)), "alps", parsed)
        self.consortium.decide(study)
        return study

    def start(self, study: Published) -> None:
        """Start it; returns at once."""
        self.consortium.coordinate("study", "start", study.digest)

    def begin(self, study: Published, rounds: int = 2) -> None:
        """Start it and wait for so many closed rounds."""
        self.start(study)
        self.closed(study, rounds)

    def closed(self, study: Published, rounds: int) -> None:
        """Wait for so many closed rounds."""
        deadline = time.monotonic() + WAIT_S
        while len(self.steps(study)) < rounds:
            self.consortium.processes.require_alive()
            assert time.monotonic() < deadline, (
                f"{len(self.steps(study))} of {rounds} rounds closed; {self.state(study)}"
            )
            time.sleep(0.02)

    def state(self, study: Published) -> tuple[str, str]:
        """State and reason, from the exchange's store."""
        return self._rows("SELECT state, reason FROM studies WHERE digest = ?", study.digest)[0]

    def run_id(self, study: Published) -> str:
        """The Flower run that calls its hospitals."""
        return str(self._rows("SELECT run_id FROM studies WHERE digest = ?", study.digest)[0][0])

    def steps(self, study: Published) -> list[int]:
        """Steps of the closed rounds in the order they were closed."""
        return [row[0] for row in self._rows("SELECT step FROM rounds WHERE digest = ? ORDER BY rowid", study.digest)]

    def attempts(self, study: Published) -> dict[int, int]:
        """Step -> the attempt that closed it, where it was not the first."""
        rows = self._rows("SELECT step, attempt FROM rounds WHERE digest = ?", study.digest)
        least = min((attempt for _, attempt in rows), default=0)
        return {step: attempt - least for step, attempt in rows if attempt > least}

    def receipts(self, study: Published) -> dict[str, dict[str, Any]]:
        """Site -> the body of the receipt that reached the exchange."""
        rows = self._rows("SELECT site, document FROM receipts WHERE digest = ?", study.digest)
        return {site: json.loads(document)["body"] for site, document in rows}

    def outcome(self, site: str, study: Published) -> str:
        """What a hospital wrote down as the study's end, "" while it has not."""
        path = self.consortium.home(site) / "consortia" / "alps" / "outcomes" / study.digest
        return path.read_text("ascii") if path.exists() else ""

    def ended(self, study: Published) -> tuple[str, str]:
        """State and reason once the study has ended and every hospital has sent its receipt."""
        running = ("published", "approved", "running", "held")
        self.until("the study has ended", lambda: self.state(study)[0] not in running)
        if self.state(study)[0] != "suspended":
            self.until("every receipt is here", lambda: set(self.receipts(study)) == set(self.consortium.sites))
            self.until("every outcome is written", lambda: all(self.outcome(s, study) for s in self.consortium.sites))
        return self.state(study)

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        store = sqlite3.connect(f"file:{self.store}?mode=ro", uri=True, timeout=20)
        try:
            return store.execute(query, values).fetchall()
        finally:
            store.close()

    @property
    def store(self) -> Path:
        """The exchange's database."""
        return self.consortium.server / "exchange" / "store.db"

    @property
    def ports(self) -> dict[str, int]:
        """The four ports of the exchange."""
        kept = json.loads((self.consortium.server / "exchange" / "ports.json").read_text("utf-8"))
        return {name: kept[f"{name}_port"] for name in PORTS}

    def control(self) -> Control:
        """Flower's Control API, as somebody with `flwr` on the coordinator's machine reaches it."""
        return Control(self.ports["control"])

    # ---- processes ----------------------------------------------------------------------------------------------

    def until(self, what: str, ready: Callable[[], bool], within_s: float = WAIT_S) -> float:
        """Wait for it; seconds that it took. Anything that should live on and does not is `Failed`."""
        began = time.monotonic()
        self.consortium.processes.wait_until(what, ready, within_s, self.consortium.exchange)
        return time.monotonic() - began

    def one(self, kind: str, site: str = "") -> int:
        """The one process of a kind: of a hospital, or of the exchange."""
        running = self.consortium.gates[site] if site else self.consortium.exchange
        assert running is not None
        if kind in ("gate", "exchange"):
            return running.pid
        self.until(f"a {kind} runs", lambda: bool(below(running.pid, kind)))
        return below(running.pid, kind)[-1]

    def kill(self, kind: str, site: str = "") -> int:
        """`kill -9`; the id that it had."""
        pid = self.one(kind, site)
        os.kill(pid, signal.SIGKILL)
        self.until(f"the {kind} is gone", lambda: not is_running(pid))
        return pid

    def replaced(self, kind: str, site: str, dead: int, within_s: float = WAIT_S) -> float:
        """Seconds until another process of that kind runs."""
        running = self.consortium.gates[site] if site else self.consortium.exchange
        assert running is not None
        return self.until(f"another {kind} runs", lambda: any(p != dead for p in below(running.pid, kind)), within_s)

    def kill_gate(self, site: str) -> list[int]:
        """`kill -9` of a gate alone; the ids of what it had started."""
        gate = self.consortium.gates.pop(site)
        return self._kill_parent(gate)

    def kill_exchange(self) -> list[int]:
        """`kill -9` of the exchange alone; the ids of what it had started."""
        exchange = self.consortium.exchange
        assert exchange is not None
        return self._kill_parent(exchange)

    def _kill_parent(self, running: Running) -> list[int]:
        self.consortium.processes.forget(running)
        family = [child.pid for child in psutil.Process(running.pid).children(recursive=True)]
        os.kill(running.pid, signal.SIGKILL)
        running.popen.wait()
        return family

    def brake(self, study: Published) -> None:
        """No round of the study closes from here on, and one is open: one hospital's compute is stopped."""
        self._braked = self._compute_of(BRAKE, study)
        os.kill(self._braked, signal.SIGSTOP)
        self.still(study)
        assert self.state(study)[0] == "running", self.state(study)

    def release(self) -> None:
        """Let the stopped compute go on, if it lives."""
        if is_running(self._braked):
            os.kill(self._braked, signal.SIGCONT)

    def _compute_of(self, site: str, study: Published) -> int:
        """The compute process of one study: the one whose log is its."""
        gate = self.consortium.gates[site].pid

        def found() -> list[int]:
            log = f"compute-{study.digest[:12]}.log"
            return [pid for pid in below(gate, "compute") if _writes_to(pid, log)]

        self.until("compute runs", lambda: bool(found()))
        return found()[-1]

    def still(self, study: Published) -> None:
        """Wait until no more rounds close."""
        last, since = -1, time.monotonic()
        while time.monotonic() - since < 0.7:
            if (now := len(self.steps(study))) != last:
                last, since = now, time.monotonic()
            time.sleep(0.05)

    def told(self, what: str, when: str, outcome: str, seconds: float) -> None:
        """Keep a line of the table."""
        self.cases.append(Case(what, when, outcome, seconds))
        print(f"{what} | {when} | {outcome} | {seconds:.1f} s", flush=True)

    # ---- disks --------------------------------------------------------------------------------------------------

    def stop_one(self, where: str) -> None:
        """Stop the exchange, or a hospital's gate, in order."""
        if where == "exchange":
            exchange, self.consortium.exchange = self.consortium.exchange, None
            assert exchange is not None
            self.consortium.processes.stop(exchange)
        else:
            self.consortium.processes.stop(self.consortium.gates.pop(where))

    def start_one(self, where: str) -> None:
        """Start it again."""
        if where == "exchange":
            self.consortium.serve()
        else:
            self.consortium.run_site(where)

    def log_of(self, where: str) -> Path:
        """Its own log, of this start."""
        running = self.consortium.exchange if where == "exchange" else self.consortium.gates[where]
        assert running is not None
        return running.log

    # ---- what must hold afterwards ------------------------------------------------------------------------------

    def require_whole(self, study: Published, rounds: int = ROUNDS) -> None:
        """The study was done with every step once, and every ledger charged every step."""
        assert self.steps(study) == list(range(rounds))
        for site, ledger in self.consortium.ledgers().items():
            mine = [row for row in ledger["rows"] if row.get("study") == study.digest]
            spent = Counter((row["step"], row["attempt"]) for row in mine if row["kind"] == "spend")
            assert {step for step, _ in spent} == set(range(rounds)), site
            assert max(spent.values()) == 1, f"{site} charged one attempt twice"
            assert len(spent) <= rounds + SPARES, site
            assert [row["kind"] for row in mine if row["kind"] in ("reserve", "settle")] == ["reserve", "settle"], site

    def reservations(self, study: Published) -> dict[str, float]:
        """What every running ledger holds in reserve; a lost reservation would be 0."""
        found = {}
        for site, ledger in self.consortium.ledgers().items():
            mine = [row["kind"] for row in ledger["rows"] if row.get("study") == study.digest]
            assert "reserve" in mine and "settle" not in mine, site
            found[site] = ledger["balance"]["reserved"]
        return found

    def require_quiet(self) -> None:
        """No study runs: no compute, no ServerApp, no open reservation, no unfinished Flower run; every ledger whole."""
        exchange = self.consortium.exchange
        assert exchange is not None
        for site, gate in self.consortium.gates.items():
            self.until(f"no compute is left at {site}", lambda pid=gate.pid: not below(pid, "compute"))
        self.until("no ServerApp is left", lambda: not below(exchange.pid, "ServerApp"))
        said = json.loads(self.consortium.coordinate("study", "status", "--json"))
        assert all(row["state"] not in ("running", "held") for row in said), said
        for site, ledger in self.consortium.ledgers().items():
            assert ledger["balance"]["reserved"] == 0, site
        self.consortium.audits()

    def require_nothing_left(self) -> None:
        """After everything was stopped: no process, lock, socket or port."""
        assert self.consortium.processes.left_behind == []
        folders = [self.consortium.server / "exchange", *(self.consortium.home(s) for s in self.consortium.sites)]
        for folder in folders:
            assert [path for path in folder.rglob("*") if path.is_socket()] == []
            for lock in folder.rglob("lock"):
                with lock.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name, port in self.ports.items():
            with socket.socket() as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("127.0.0.1", port))
                listener.listen()
            assert port, name
        home = str(self.consortium.folder)
        assert [p.pid for p in psutil.process_iter() if _mentions(p, home)] == []


@contextmanager
def small_disk(folder: Path, megabytes: int = 48) -> Iterator[Callable[[], Path]]:
    """The folder on a file system of its own while nothing has it open; the function fills it up, with the file it returns.

    Skips the test where this account may not mount.
    """
    aside = folder.with_name(folder.name + ".aside")
    shutil.copytree(folder, aside, ignore=_sockets)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0700", "none", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode != 0:
        shutil.rmtree(aside)
        pytest.skip("mounting takes root")

    def fill() -> Path:
        path = folder / "filler"
        with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        return path

    try:
        shutil.copytree(aside, folder, dirs_exist_ok=True)
        yield fill
    finally:
        kept = folder.with_name(folder.name + ".kept")
        shutil.copytree(folder, kept, ignore=_sockets)
        subprocess.run(["umount", str(folder)], check=True)
        shutil.rmtree(folder)
        kept.rename(folder)
        shutil.rmtree(aside)


def _sockets(folder: str, names: list[str]) -> list[str]:
    return [name for name in [*names] if (Path(folder) / name).is_socket() or name == "filler"]


def _writes_to(pid: int, name: str) -> bool:
    try:
        return Path(f"/proc/{pid}/fd/2").readlink().name == name
    except OSError:
        return False


def _mentions(process: psutil.Process, text: str) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and any(text in word for word in process.cmdline())
    except psutil.Error:
        return False


def founded(folder: Path) -> Alps:
    """Data, exchange, three hospitals enrolled and pinned, their gates running; `consortium.processes` ends them."""
    simulated = hospitals(7, folder / "data", SITES, PEOPLE, chromosomes=2, length_bp=100_000, published=6)
    part = dict(simulated.study)
    part.pop("prevalence")
    cohort = {"subgroup": part.pop("subgroup"), "subgroup_values": part.pop("subgroup_values"), "where": []}
    fields = {
        **part, "cohort": cohort, "privacy": {"epsilon": "1", "delta": "0.000001", "order": "22"},
        "aggregation": {"mode": "strict", "round_deadline_s": 300}, "spare_attempts": SPARES, "n0": 900, "n_max": 1200,
    }  # fmt: skip
    consortium = Consortium(folder / "alps")
    consortium.processes.__enter__()
    try:
        consortium.found("alps")
        consortium.enrol(sites_of(folder / "data", [site.name for site in SITES]))
        consortium.pin()
        consortium.run_sites()
    except BaseException:
        consortium.processes.end()
        raise
    return Alps(consortium, fields)


def sites_of(data: Path, names: Sequence[str]) -> list[Site]:
    """The hospitals' settings. A machine without network namespaces may run these made-up patients unisolated."""
    from sequester.client.isolation import leave_network

    isolated = os.fork()
    if isolated == 0:
        os._exit(0 if leave_network() else 1)
    _, status = os.waitpid(isolated, 0)
    policy = POLICY | ({} if status == 0 else {"allow_unisolated": True})
    return [
        Site(name, data / name / "phenotypes.csv", data / name / "genotypes", policy=policy) for name in sorted(names)
    ]
