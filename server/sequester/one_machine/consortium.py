"""A coordinator, an exchange and hospitals on loopback, through the commands that people type.

    with Consortium(folder) as consortium:
        consortium.found("heart")                       # init, serve
        consortium.enrol([Site("north", genotypes=..., phenotypes=...), ...])
        consortium.pin(); consortium.examine(); consortium.run_sites()
        study = consortium.publish(fields)              # new, sign, publish
        consortium.decide(study)                        # studies, data freeze, approve at every hospital
        results = consortium.run_study(study, out)      # start --wait, results

Where a real consortium differs: one machine and one account hold everything, a script compares the fingerprints that people
would read to each other by telephone, and nobody reads what is approved.
"""

from __future__ import annotations

import io
import json
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from ruamel.yaml import YAML

from sequester.one_machine.processes import Failed, Processes, Running, python

Value = TypeVar("Value")
Say = Callable[[str], None]

SERVER, CLIENT = "sequester.server.cli.app", "sequester.client.cli.app"
PORTS = ("enrolment", "exchange", "superlink", "control")
SERVE_S, ENROL_S, STUDY_S = 180.0, 180.0, 900.0
_FINGERPRINT = re.compile(r"fingerprint: ([0-9a-f]{4}(?:[ -][0-9a-f]{4}){15})")
_SIGNED = re.compile(r"study ([0-9a-f]{64}) signed")


@dataclass(frozen=True, slots=True)
class Site:
    """One hospital before it knows anybody: where its files lie and what its policy says beyond the defaults."""

    name: str
    phenotypes: Path
    genotypes: Path | None = None
    build: str = "GRCh38"
    policy: Mapping[str, object] = field(default_factory=dict)

    def toml(self) -> str:
        """Its site.toml."""
        data = {"id": "main", "build": self.build, "phenotypes": str(self.phenotypes), "id_column": "patient"}
        if self.genotypes is not None:
            data["genotypes"] = str(self.genotypes)
        sections = {"site": {"id": self.name}, "data": data, "policy": self.policy}
        lines = []
        for section, values in sections.items():
            # a JSON string, list or number is a TOML one too
            lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items()), ""]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Published:
    """A study that was signed and handed to the exchange."""

    digest: str
    signed: Path
    bundle: Path


class Consortium:
    """Real processes below one folder; a context manager that ends them all."""

    def __init__(self, folder: Path, say: Say = lambda text: None, workers: int | None = None) -> None:
        self.folder = folder
        self.server = folder / "server"
        self.processes = Processes(folder / "log")
        self.fingerprints: dict[str, str] = {}
        self.sites: dict[str, Site] = {}
        self.name = ""
        self.exchange: Running | None = None
        self.gates: dict[str, Running] = {}
        self._say = say
        self._workers = workers or max(2, os.cpu_count() or 2)

    def __enter__(self) -> Consortium:
        self.processes.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.processes.__exit__(kind, error, trace)

    # ---- the command lines ----------------------------------------------------------------------------------------

    def coordinate(self, *words: str, timeout_s: float = 180.0, show: bool = False) -> str:
        """A command of the coordinator, and what it printed."""
        command = python("-m", SERVER, *words, "--home", str(self.server))
        return self.processes.run(f"coordinator-{words[0]}-{words[1]}" if words[0] == "study" else f"coordinator-{words[0]}",
                                  command, timeout_s=timeout_s, show=show)  # fmt: skip

    def hospital(self, site: str, *words: str, timeout_s: float = 180.0, statuses: Sequence[int] = (0,)) -> str:
        """A command at one hospital, and what it printed."""
        command = python("-m", CLIENT, *words, "--home", str(self.home(site)))
        return self.processes.run(f"{site}-{words[0]}", command, timeout_s=timeout_s, statuses=statuses)

    def home(self, site: str) -> Path:
        """The folder of one hospital's installation."""
        return self.folder / "hospitals" / site

    def each(self, act: Callable[[str], Value], names: Sequence[str] | None = None) -> dict[str, Value]:
        """`act(name)` for every hospital, a few at a time; the first failure ends everything."""
        pool = ThreadPoolExecutor(self._workers)
        futures = {name: pool.submit(act, name) for name in (names if names is not None else list(self.sites))}
        try:
            done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            return {name: future.result() for name, future in futures.items()}
        except BaseException:
            self.processes.end()  # so that the threads return at once
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    # ---- founding and joining -------------------------------------------------------------------------------------

    def found(self, name: str) -> None:
        """Found the consortium and start its exchange on free ports."""
        self.name = name
        ports = [word for port in PORTS for word in (f"--{port}-port", "0")]
        self.coordinate("init", name, "--host", "127.0.0.1", *ports)
        self.serve()

    def serve(self) -> None:
        """Start the exchange, again on the ports it had if it ran before; it listens when this returns."""
        command = python("-m", SERVER, "serve", "--home", str(self.server))
        self.exchange = self.processes.start("exchange", "exchange", command)
        self.processes.wait_until("the exchange listens", self._listens, SERVE_S, self.exchange)

    def _listens(self) -> bool:
        try:
            ports = json.loads((self.server / "exchange" / "ports.json").read_text("utf-8"))
            if not all(ports[f"{name}_port"] for name in PORTS):
                return False
            for name in ("enrolment", "exchange"):
                socket.create_connection(("127.0.0.1", ports[f"{name}_port"]), 1).close()
        except (OSError, ValueError, KeyError):
            return False
        return True

    def enrol(self, sites: Sequence[Site]) -> None:
        """Every hospital makes its keys, asks, is compared and admitted."""
        for site in sites:
            self.sites[site.name] = site
            self.home(site.name).mkdir(parents=True, mode=0o700)
            (self.home(site.name) / "site.toml").write_text(site.toml(), "utf-8")
        names = [site.name for site in sites]
        tokens = self.each(lambda name: str(json.loads(self.coordinate("invite", name, "--json"))["token"]), names)
        asking = {}
        for name in names:  # a token goes in by standard input: a command line can be seen by others
            command = python("-m", CLIENT, "enrol", "--wait", "--home", str(self.home(name)))
            asking[name] = self.processes.start(
                f"{name}-enrol", "command line", command, stdin=tokens[name] + "\n", lives_on=False
            )
        for name, running in asking.items():
            self.fingerprints[name] = self._heard(name, running)
            self._say(f"{name} asks to join, fingerprint {self.fingerprints[name][:9]} ...")
        self._compare(names)
        self.each(lambda name: self.coordinate("admit", name, "--fingerprint", self.fingerprints[name]), names)
        for name, running in asking.items():
            self.processes.finish(running, ENROL_S)
            self._say(f"{name} is admitted")

    def _heard(self, name: str, running: Running) -> str:
        """The fingerprint that a hospital reads out while it waits."""

        def spoke() -> bool:
            if not running.is_alive:
                raise Failed(f"{name} did not enrol (status {running.popen.returncode})", running.log)
            return _FINGERPRINT.search(running.said()) is not None

        self.processes.wait_until(f"{name} says its fingerprint", spoke, ENROL_S, running)
        found = _FINGERPRINT.search(running.said())
        assert found is not None
        return found[1]

    def _compare(self, names: Sequence[str]) -> None:
        """What the exchange shows the coordinator must be what each hospital said."""
        rows = {row["site"]: row for row in json.loads(self.coordinate("enrolments", "--json"))}
        for name in names:
            shown, heard = rows[name]["fingerprint"], re.sub(r"[^0-9a-f]", "", self.fingerprints[name])
            if shown != heard:
                raise Failed(f"the exchange shows {shown[:16]} for {name}, the hospital said {heard[:16]}")

    def pin(self) -> None:
        """Every hospital pins every other by the fingerprint that the other said itself."""

        def all_others(name: str) -> None:
            self.hospital(name, "peers", "--refresh", "--json")
            for other in self.sites:
                if other != name:
                    self.hospital(name, "peers", "pin", other, "--fingerprint", self.fingerprints[other])
            self._say(f"{name} has pinned {len(self.sites) - 1} others")

        self.each(all_others)

    def examine(self) -> dict[str, dict[str, Any]]:
        """What `doctor` found at every hospital: test -> verdict, found, advice. Does not fail for what it finds."""

        def look(name: str) -> dict[str, Any]:
            said = json.loads(self.hospital(name, "doctor", "--json", statuses=(0, 20)))
            return {row["test"]: row for row in said["findings"]}

        return self.each(look)

    def require_sound(self) -> bool:
        """`Failed` where a test of `doctor` fails. False where this machine cannot isolate compute: then that is allowed.

        A real hospital would refuse there; these hold nobody's secrets, and every approval, receipt and report says so.
        """
        found = self.examine()
        bad = [f"{site}: {test}: {row['found']}" for site, rows in found.items() for test, row in rows.items()
               if row["verdict"] == "fail" and test != "isolation"]  # fmt: skip
        if bad:
            raise Failed("`doctor` fails: " + "; ".join(sorted(bad)))
        isolated = all(rows["isolation"]["verdict"] == "ok" for rows in found.values())
        if not isolated:
            for site in list(self.sites.values()):
                self.set_policy(site.name, {**site.policy, "allow_unisolated": True})
        return isolated

    def set_policy(self, name: str, policy: Mapping[str, object]) -> None:
        """Another policy in a hospital's site.toml, before it runs; the budget of its ledger stays as it was founded."""
        self.sites[name] = replace(self.sites[name], policy=policy)
        (self.home(name) / "site.toml").write_text(self.sites[name].toml(), "utf-8")

    def run_sites(self) -> None:
        """Start `sequester-client run` at every hospital."""
        for name in self.sites:
            self.run_site(name)

    def run_site(self, name: str) -> Running:
        """Start one hospital's gate, which starts the rest."""
        command = python("-m", CLIENT, "run", "--home", str(self.home(name)))
        self.gates[name] = self.processes.start(f"{name}-gate", "gate", command)
        return self.gates[name]

    # ---- a study --------------------------------------------------------------------------------------------------

    def write_study(self, fields: Mapping[str, Any], template: str = "risk-score", name: str = "study") -> Path:
        """A study.yaml from a template, with the hospitals' keys and `fields` in place of the template's own."""
        keys = {row["site"]: row["identity_key"] for row in json.loads(self.coordinate("enrolments", "--json"))}
        sites = [word for site in self.sites for word in ("--site", f"{site}={keys[site]}")]
        path = self.folder / f"{name}.yaml"
        self.coordinate("study", "new", str(path), "--template", template, "--consortium", self.name, *sites)
        path.write_text(edited(path.read_text("utf-8"), fields), "utf-8")
        return path

    def publish(self, path: Path) -> Published:
        """Check, plan, sign and publish a study."""
        bundle = self.folder / "sequester.fab"
        if not bundle.exists():
            self.processes.run("coordinator-bundle", python("-m", SERVER, "bundle", str(bundle)))
        signed = path.with_suffix(".json")
        said = self.coordinate("study", "sign", str(path), "--bundle", str(bundle), "--output", str(signed))
        found = _SIGNED.search(said)
        if found is None:
            raise Failed(f"`study sign` named no digest: {said[:200]}")
        self.coordinate("study", "publish", str(signed), "--bundle", str(bundle))
        return Published(found[1], signed, bundle)

    def decide(self, study: Published) -> dict[str, dict[str, Any]]:
        """Every hospital fetches the study, freezes its cohort and approves; what `data freeze` counted, by hospital."""

        def one(name: str) -> dict[str, Any]:
            self.hospital(name, "studies", "--refresh", "--json")
            account: dict[str, Any] = json.loads(self.hospital(name, "data", "freeze", study.digest, "--json"))
            self.hospital(name, "approve", study.digest, "--person", f"The data keeper of {name}", "--yes")
            self._say(f"{name} approves")
            return account

        return self.each(one)

    def try_out(self, study: Published) -> Running:
        """The coordinator's own trial of the program, for `run_study`; its figures are the coordinator's to publish."""
        command = python("-m", CLIENT, "audit", "release", str(study.signed), "--json")
        return self.processes.start("coordinator-audit", "command line", command, lives_on=False)

    def run_study(
        self, study: Published, out: Path, trial: Running | None = None, timeout_s: float = STUDY_S
    ) -> dict[str, Any]:
        """Start the study, wait for its end, fetch what it leaves; results.json.

        With the coordinator's own `trial` the report tells its lower bounds on epsilon. The command draws its own progress
        on our terminal, or writes its plain lines where there is none.
        """
        assert self.exchange is not None
        sys.stdout.flush()
        try:
            self.coordinate("study", "start", study.digest, "--wait", timeout_s=timeout_s, show=True)
        except Failed as error:
            # the command has said its word on our terminal; what another process died of stands in its own log
            own = error.log is not None and error.log.name.startswith("coordinator-study-start")
            log = self.exchange.log if own else error.log
            raise Failed(f"the study did not end well: {error.message}", log) from None
        audit = []
        if trial is not None:
            told = self.folder / "audit.json"
            told.write_text(self.processes.finish(trial, STUDY_S), "utf-8")
            audit = ["--audit", str(told)]
        self.coordinate("study", "results", study.digest, "--out", str(out), "--overwrite", *audit)
        results: dict[str, Any] = json.loads((out / "results.json").read_text("utf-8"))
        return results

    def stop_sites(self) -> None:
        """Stop every hospital; what its Flower connection carried is in its ledger then."""
        gates, self.gates = self.gates, {}
        self.each(lambda name: self.processes.stop(gates[name]), list(gates))

    def status(self, digest: str) -> dict[str, Any]:
        """`study status --json`."""
        said: dict[str, Any] = json.loads(self.coordinate("study", "status", digest, "--json"))
        return said

    def ledgers(self) -> dict[str, dict[str, Any]]:
        """`ledger --json` of every hospital: balance and rows."""
        return self.each(lambda name: json.loads(self.hospital(name, "ledger", "--json")))

    def audits(self) -> dict[str, str]:
        """What `audit verify` says of every hospital's ledger; one that is not whole is `Failed`."""
        return self.each(lambda name: self.hospital(name, "audit", "verify").strip())

    def receipt(self, site: str, digest: str) -> dict[str, Any]:
        """The body of a hospital's own copy of its receipt."""
        path = self.home(site) / "consortia" / self.name / "receipts" / f"{digest}.json"
        if not path.exists():
            raise Failed(f"{site} has no receipt of study {digest[:12]}", self.processes.logs / f"{site}-gate.log")
        body: dict[str, Any] = json.loads(path.read_bytes())["body"]
        return body

    def cohort(self, site: str, digest: str) -> Path:
        """A hospital's frozen cohort: for comparisons with what nobody could compute outside one machine."""
        return self.home(site) / "datasets" / "main" / "cohorts" / digest


def edited(text: str, fields: Mapping[str, Any]) -> str:
    """A study.yaml with `fields` in place of its own; comments and the digits of every number stay."""
    editor = YAML()
    study = editor.load(text)
    study.update(fields)
    out = io.StringIO()
    editor.dump(study, out)
    return out.getvalue()
