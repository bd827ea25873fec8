"""The consortium `lowlands`: three hospitals of 200 made-up patients, real processes, and what a command said.

The patients are called `pat-...`, so that a test can say of every line that was printed that none of them is in it.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sequester.one_machine.consortium import CLIENT, SERVER, Consortium, Published, Site
from sequester.one_machine.processes import Running, environment, python
from sequester.simulate.plink import Line, write_bed

NAMES = ("drenthe", "gouda", "zeeland")
PEOPLE = 200
WAIT_S = 180.0  # other programs may want this machine as well
POLICY: dict[str, object] = {"epsilon_life": 60, "order_life": 2}  # a dozen studies on one data set
LINES = (Line("1", "rs1", 1_000_000, "A", "G"), Line("2", "rs2", 2_000_000, "T", "C"))
FIELDS: dict[str, Any] = {
    "variants": [
        {"id": "rs1", "chromosome": "1", "position": 1_000_000, "effect": "A", "other": "G", "frequency": "0.3"},
        {"id": "rs2", "chromosome": "2", "position": 2_000_000, "effect": "T", "other": "C", "frequency": "0.3"},
    ],
    "analyses": [{"kind": "glm", "name": "score", "rounds": 4, "prevalence": "0.3", "budget": 1}],
    "cohort": {"where": ["age >= 20"]},
    "privacy": {"epsilon": "1", "delta": "0.000001", "order": "22"},
    "aggregation": {"mode": "strict", "round_deadline_s": 300},
    "n0": 600,
    "n_max": 900,
}


@dataclass(frozen=True, slots=True)
class Said:
    """How a command ended and what it printed."""

    status: int
    out: str
    err: str

    def one_error(self, status: int, found: str, advice: str) -> None:
        """It was one `error:` line that says what was found and one `hint:` line that says what to do; nobody is named."""
        everything = self.out + self.err
        assert self.status == status, everything
        assert "Traceback" not in everything and "pat-" not in everything, everything
        last = [line for line in self.err.splitlines() if not line.startswith("{")]  # `run` writes its log there too
        assert len(last) == 2 and last[0].startswith("error: ") and last[1].startswith("hint: "), everything
        assert re.search(found, last[0]), last[0]
        assert re.search(advice, last[1]), last[1]


def said(command: Sequence[str], stdin: str = "", timeout_s: float = 180.0) -> Said:
    """What a command says that ends by itself; one that does not is ended with all it started."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        start_new_session=True,
    ) as ran:  # fmt: skip
        try:
            out, err = ran.communicate(stdin, timeout_s)
        except BaseException:
            os.killpg(ran.pid, signal.SIGKILL)
            raise
    return Said(ran.returncode, out, err)


def client(home: Path, *words: object, stdin: str = "") -> Said:
    """A command of `sequester-client`."""
    return said(client_line(home, *words), stdin)


def client_line(home: Path, *words: object) -> list[str]:
    """The command line of `sequester-client`, as this interpreter starts it."""
    return python("-m", CLIENT, *map(str, words), "--home", str(home))


def server(home: Path, *words: object) -> Said:
    """A command of `sequester-server`."""
    return said(python("-m", SERVER, *map(str, words), "--home", str(home)))


def write_hospital(folder: Path, name: str, people: int = PEOPLE) -> None:
    """Genotypes and phenotypes of made-up patients."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([7, *name.encode()])
    ids = [f"pat-{name}-{i:04d}" for i in range(people)]
    write_bed(folder / "genotypes", ids, list(LINES), rng.binomial(2, 0.3, (people, 2)).astype(np.int8))
    rows = [f"{i},{int(rng.random() < 0.3)},{rng.integers(25, 80)},{rng.integers(0, 2)}" for i in ids]
    (folder / "phenotypes.csv").write_text("\n".join(["patient,case,age,sex", *rows]) + "\n", "utf-8")


def can_isolate() -> bool:
    """Whether this host lets a process of ours leave the network."""
    from sequester.client.isolation import leave_network

    child = os.fork()
    if child == 0:
        os._exit(0 if leave_network() else 1)
    return os.waitpid(child, 0)[1] == 0


CAN_ISOLATE = can_isolate()


@dataclass
class Lowlands:
    """The founded consortium and where its files are; `_numbers` counts its studies."""

    consortium: Consortium
    folder: Path
    _numbers: int = field(default=0)

    def home(self, name: str) -> Path:
        """A hospital's installation."""
        return self.consortium.home(name)

    def data(self, name: str) -> Path:
        """A hospital's files."""
        return self.folder / "data" / name

    def publish(self, approve: bool = True, **changed: object) -> Published:
        """A signed and published study, approved by every hospital unless told otherwise."""
        self._numbers += 1
        fields = FIELDS | {"lineage": f"study-{self._numbers}", **changed}
        path = self.consortium.write_study(fields, name=f"study-{self._numbers}")
        study = self.consortium.publish(path)
        if approve:
            self.consortium.decide(study)
        return study

    @contextmanager
    def exchange(self) -> Iterator[Running]:
        """The exchange, while the block runs."""
        self.consortium.serve()
        assert self.consortium.exchange is not None
        try:
            yield self.consortium.exchange
        finally:
            self.consortium.processes.stop(self.consortium.exchange)

    def until(self, what: str, ready: Callable[[], bool], within_s: float = WAIT_S) -> None:
        """Wait; `Failed` where it does not come, or something died."""
        self.consortium.processes.wait_until(what, ready, within_s)

    def copy(self, name: str, to: Path, policy: Mapping[str, object] | None = None) -> Copy:
        """A hospital's installation and files once more, to be damaged; it is enrolled under the same name."""
        shutil.copytree(self.home(name), to / "home", ignore=shutil.ignore_patterns("*.sock", "*.door", "log", "lock"))
        shutil.copytree(self.data(name), to / "data")
        made = Copy(name, to / "home", to / "data")
        made.settings(policy=policy)
        return made


@dataclass(frozen=True)
class Copy:
    """A hospital that a test may damage."""

    name: str
    home: Path
    data: Path

    def settings(self, policy: Mapping[str, object] | None = None, **changed: str) -> None:
        """Write site.toml again, with other policy lines or other lines under [data]."""
        site = Site(
            self.name, self.data / "phenotypes.csv", self.data / "genotypes", policy={**POLICY, **(policy or {})}
        )
        text = site.toml()
        for key, value in changed.items():
            text, count = re.subn(rf'^{key} = ".*"$', f'{key} = "{value}"', text, flags=re.MULTILINE)
            assert count == 1, key
        (self.home / "site.toml").write_text(text, "utf-8")

    def table(self, old: str, new: str, count: int = 1) -> None:
        """Change the phenotype table; the text must be there."""
        path = self.data / "phenotypes.csv"
        text = path.read_text("utf-8")
        assert old in text
        path.write_text(text.replace(old, new, count), "utf-8")

    def say(self, *words: object, stdin: str = "") -> Said:
        """A command here."""
        return client(self.home, *words, stdin=stdin)


def founded(folder: Path) -> Lowlands:
    """Data, exchange, three hospitals enrolled and pinned; then everything is stopped again."""
    policy = POLICY if CAN_ISOLATE else {**POLICY, "allow_unisolated": True}
    sites = []
    for name in NAMES:
        data = folder / "data" / name
        write_hospital(data, name)
        sites.append(Site(name, data / "phenotypes.csv", data / "genotypes", policy=policy))
    consortium = Consortium(folder / "lowlands")
    consortium.processes.__enter__()
    try:
        consortium.found("lowlands")
        consortium.enrol(sites)
        consortium.pin()
        assert consortium.exchange is not None
        consortium.processes.stop(consortium.exchange)
    except BaseException:
        consortium.processes.end()
        raise
    return Lowlands(consortium, folder)
