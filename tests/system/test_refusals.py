"""A coordinator or an exchange that asks for more than was signed: each refused by name at home, by its public code outside.

The exchange here is the malicious one: its database and Flower's Control API are changed by hand. Some questions are asked at
a running gate's door, as its ClientApp asks them; the two about Flower itself go the whole way.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.common.serde import user_config_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import Fab

from lowlands import CAN_ISOLATE, NAMES, POLICY, Copy, Lowlands, Said
from sequester.client.gate.flower import door
from sequester.one_machine.consortium import Published, Site
from sequester.protocols import privacy
from sequester.protocols.signing import open_document, sha256, sign_document
from sequester.protocols.study import study_json, validated
from sequester.server import authority
from sequester.server.flower.bundle import PYPROJECT
from sequester.server.flower.control import Control

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

UNISOLATED: dict[str, object] = {} if CAN_ISOLATE else {"allow_unisolated": True}


@dataclass
class Running:
    """Exchange and gates run; `study` is approved by everybody, `other` by nobody."""

    lowlands: Lowlands
    study: Published
    other: Published
    fab: bytes  # the bundle of both: it lets a run's configuration name an epsilon, which Flower's own would not

    def store(self, statement: str, *values: object) -> None:
        """What a malicious exchange writes into its own database."""
        path = self.lowlands.consortium.server / "exchange" / "store.db"
        with closing(sqlite3.connect(path, timeout=120)) as store, store:
            assert store.execute(statement, values).rowcount == 1

    def asked(self, site: str, study: str, bundle: str) -> tuple[str, str]:
        """The gate's answer to a `join`."""
        return door.join(self.lowlands.home(site) / "run" / "lowlands.door", study, bundle)

    def log(self, site: str, kind: str = "gate") -> str:
        """What a hospital's gate, or its executor, has written to its own log."""
        if kind == "gate":
            return self.lowlands.consortium.gates[site].log.read_text("utf-8")
        return (self.lowlands.home(site) / "log" / f"{kind}-lowlands.log").read_text("utf-8")

    def words(self) -> dict[str, str]:
        """`study status` of the study: site -> word."""
        found: dict[str, str] = self.lowlands.consortium.status(self.study.digest)["sites"]
        return found

    def bundle(self) -> str:
        """The SHA-256 that both studies name."""
        return str(body_of(self.study)["bundle"])


def body_of(study: Published) -> dict[str, Any]:
    body: dict[str, Any] = open_document(study.signed.read_bytes(), "study", None).body
    return body


@pytest.fixture(scope="module")
def running(lowlands: Lowlands) -> Iterator[Running]:
    with lowlands.exchange():
        fab = _bundle(PYPROJECT + "epsilon = 1.0\n")
        at = lowlands.consortium.folder / "sequester.fab"
        at.unlink(missing_ok=True)
        at.write_bytes(fab)
        study, other = lowlands.publish(), lowlands.publish(approve=False)
        at.unlink()  # the next study has its own again
        for name in NAMES:
            lowlands.consortium.hospital(name, "studies", "--refresh", "--json")
        lowlands.consortium.run_sites()
        for name in NAMES:
            lowlands.until("its door is there", lambda n=name: (lowlands.home(n) / "run" / "lowlands.door").exists())  # type: ignore[misc]
        try:
            yield Running(lowlands, study, other, fab)
        finally:
            lowlands.consortium.stop_sites()


# ---- through Flower -------------------------------------------------------------------------------------------------


def _bundle(toml: str, **modules: str) -> bytes:
    from flwr.cli.build import build_fab_from_files

    files = {"pyproject.toml": toml.encode()} | {f"{name}.py": text.encode() for name, text in modules.items()}
    return bytes(build_fab_from_files(files)[0])


def _evil(marker: Path) -> bytes:
    """A bundle that would leave a mark wherever it is imported."""
    app = f"open({str(marker)!r}, 'w').write('x')\nfrom flwr.clientapp import ClientApp\napp = ClientApp()\n"
    return _bundle(PYPROJECT.replace("sequester.client.gate.flower.app:app", "evil:app"), evil=app)


def _by_hand(control: Control, bundle: bytes, config: dict[str, Any]) -> str:
    """A Flower run as a coordinator starts it who leaves `study start` aside."""
    request = StartRunRequest(
        fab=Fab(hash_str=sha256(bundle), content=bundle), override_config=user_config_to_proto(config)
    )
    return str(control._client.StartRun(request).run_id)


def test_another_bundle_and_a_raised_epsilon_in_flowers_run_config_are_refused_everywhere(
    running: Running, tmp_path: Path
) -> None:
    lowlands, digest, marker = running.lowlands, running.study.digest, tmp_path / "ran"
    running.store("UPDATE studies SET bundle = ? WHERE digest = ?", _evil(marker), digest)
    lowlands.consortium.coordinate("study", "start", digest)
    everywhere = dict.fromkeys(NAMES, "refused:STUDY")
    lowlands.until("every hospital refuses the bundle", lambda: running.words() == everywhere)
    for name in NAMES:
        assert f"refused bundle {sha256(_evil(marker))}: no study approved here names it" in running.log(
            name, "executor"
        )
    assert not marker.exists()
    # the right bundle now, and a wish in the run config; the exchange is led to take this run for its own
    ports = json.loads((lowlands.consortium.server / "exchange" / "ports.json").read_text("utf-8"))
    with Control(ports["control_port"]) as control:
        with closing(sqlite3.connect(lowlands.consortium.server / "exchange" / "store.db")) as store:
            ((first,),) = store.execute("SELECT run_id FROM studies WHERE digest = ?", (digest,)).fetchall()
        with pytest.raises(httpx.HTTPStatusError):  # Flower itself takes no wish that the bundle does not know of
            _by_hand(control, _bundle(PYPROJECT), {"study": digest, "epsilon": 30.0})
        second = _by_hand(control, running.fab, {"study": digest, "epsilon": 30.0})
        running.store("UPDATE studies SET bundle = ?, run_id = ? WHERE digest = ?", running.fab, second, digest)
        control.stop(first)
    said = "Flower's run config sets epsilon; only the signed study decides"
    lowlands.until("every hospital refuses", lambda: all(said in running.log(n, "executor") for n in NAMES))
    lowlands.until("the exchange has heard of it", lambda: running.words() == everywhere)
    assert lowlands.consortium.status(digest)["rounds_closed"] == 0
    assert all(not (lowlands.home(name) / "consortia" / "lowlands" / "journal" / digest).exists() for name in NAMES)
    lowlands.consortium.coordinate("study", "withdraw", digest)
    for name in NAMES:  # nothing was reserved, let alone spent
        balance = json.loads(lowlands.consortium.hospital(name, "ledger", "--json"))["rows"]
        assert not [row for row in balance if row["kind"] in ("reserve", "spend") and row["study"] == digest]


# ---- at the door of a running gate ----------------------------------------------------------------------------------


def test_another_study_under_an_old_approval_is_refused_by_name(running: Running) -> None:
    lowlands, old, new = running.lowlands, running.study.digest, running.other.digest
    assert running.asked("zeeland", new, running.bundle()) == ("refused", "NOT_READY")
    assert "there is no frozen cohort for this study" in running.log("zeeland")
    lowlands.consortium.hospital("zeeland", "data", "freeze", new)
    assert running.asked("zeeland", new, running.bundle()) == ("refused", "NOT_READY")
    assert "not approved yet: 1 of 1 approvers are missing (dpo)" in running.log("zeeland")
    approvals = lowlands.home("zeeland") / "consortia" / "lowlands" / "approvals"
    (approvals / new).mkdir()
    (approvals / new / "dpo.json").write_bytes((approvals / old / "dpo.json").read_bytes())
    assert running.asked("zeeland", new, running.bundle()) == ("refused", "NOT_READY")
    assert "the approval by `dpo` was given for another study" in running.log("zeeland")


def test_another_bundle_than_the_study_names_is_refused_by_the_gate_too(running: Running) -> None:
    assert running.asked("gouda", running.study.digest, "ab" * 32) == ("refused", "STUDY")
    assert "Flower brought abababababab" in running.log("gouda")


def test_a_byte_changed_after_approval_is_refused_by_name(running: Running) -> None:
    path = running.lowlands.home("gouda") / "consortia" / "lowlands" / "studies" / f"{running.study.digest}.json"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"epsilon":"1"', b'"epsilon":"9"'))
    assert path.read_bytes() != whole
    try:
        assert running.asked("gouda", running.study.digest, running.bundle())[0] == "refused"
        assert "changed after signing" in running.log("gouda")
    finally:
        path.write_bytes(whole)


def test_a_policy_changed_after_approval_and_a_missing_second_approver_are_refused_by_name(running: Running) -> None:
    lowlands, digest = running.lowlands, running.study.digest
    data, toml = lowlands.data("drenthe"), lowlands.home("drenthe") / "site.toml"
    before = toml.read_text("utf-8")
    lowlands.consortium.processes.stop(lowlands.consortium.gates["drenthe"])
    policy = {**POLICY, **UNISOLATED, "approvers": ["dpo", "pi"]}
    toml.write_text(Site("drenthe", data / "phenotypes.csv", data / "genotypes", policy=policy).toml(), "utf-8")
    try:
        lowlands.consortium.run_site("drenthe")
        lowlands.until("its door is there", lambda: (lowlands.home("drenthe") / "run" / "lowlands.door").exists())
        lowlands.until(
            "it answers", lambda: running.asked("drenthe", digest, running.bundle()) == ("refused", "NOT_READY")
        )
        assert "the approval by `dpo` was given for another policy" in running.log("drenthe")
        approve = ("approve", digest, "--offline", "--yes", "--person")
        said = lowlands.consortium.hospital("drenthe", *approve, "A. Keeper", "--role", "dpo")
        assert "1 of 2 approved" in said
        assert running.asked("drenthe", digest, running.bundle()) == ("refused", "NOT_READY")
        assert "not approved yet: 1 of 2 approvers are missing (pi)" in running.log("drenthe")
        copy = Copy("drenthe", lowlands.home("drenthe"), data)
        copy.say(*approve, "A. Keeper", "--role", "pi").one_error(
            20, "same person cannot approve in two", "another person"
        )
        copy.say(*approve, "A. Keeper").one_error(20, "2 roles: dpo, pi", "--role")
    finally:
        toml.write_text(before, "utf-8")


def test_a_site_that_is_not_ready_says_its_reason_at_home_and_a_code_outside(running: Running) -> None:
    lowlands, digest = running.lowlands, running.other.digest
    manifest = lowlands.home("gouda") / "datasets" / "main" / "cohorts" / digest / "manifest.json"
    lowlands.consortium.hospital("gouda", "data", "freeze", digest)
    held = json.loads(manifest.read_text("utf-8"))
    manifest.write_text(
        json.dumps(held | {"ready": False}), "utf-8"
    )  # as `freeze` writes it below the policy's minimum
    assert running.asked("gouda", digest, running.bundle()) == ("refused", "NOT_READY")
    assert "the frozen cohort does not meet this site's own policy" in running.log("gouda")


# ---- at the command line --------------------------------------------------------------------------------------------


def _signed(running: Running, key: Ed25519PrivateKey | None = None, **changed: object) -> tuple[str, bytes]:
    """A study with changed fields, its noise made to fit, signed by the coordinator or by somebody else."""
    study = validated(study_json(privacy.calibrate(validated(body_of(running.other) | changed))))
    signer = key or authority.signing_key(authority.Home(running.lowlands.consortium.server), None)
    return privacy.study_digest(study), sign_document("study", study_json(study), signer)


def _uncalibrated(body: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**plan, "noise_multiplier": None} for plan in body["analyses"]]


def _approves(running: Running, tmp_path: Path, digest: str, document: bytes, site: str = "") -> Said:
    copy = running.lowlands.copy("gouda", tmp_path, policy=UNISOLATED)
    if site:
        text = (copy.home / "site.toml").read_text("utf-8")
        (copy.home / "site.toml").write_text(text.replace('id = "gouda"', f'id = "{site}"'), "utf-8")
    (copy.home / "consortia" / "lowlands" / "studies" / f"{digest}.json").write_bytes(document)
    return copy.say("approve", digest, "--person", "A. Keeper", "--yes", "--offline")


PAST = "2020-01-01T00:00:00Z"
REFUSED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "expired": (lambda body: {"expires": PAST}, "EXPIRED: "),
    "its ethics vote expired": (lambda body: {"ethics": [{"reference": "vote", "expires": PAST}]}, "PAPER_EXPIRED: "),
    "of another consortium": (lambda body: {"consortium": "highlands"}, "CONSORTIUM: "),
    "more epsilon than the policy gives": (
        lambda body: {"privacy": {**body["privacy"], "epsilon": "5"}, "analyses": _uncalibrated(body)}, "EPSILON: ",
    ),
    "exact where the policy names none": (
        lambda body: {"analyses": [{"kind": "glm", "name": "score", "mode": "exact", "solver": "newton", "rounds": 4,
                                    "prevalence": "0.3"}]}, "EXACT: .*glm .private. answers the same question",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_signed_study_that_asks_for_what_this_site_does_not_give_cannot_be_approved(
    running: Running, tmp_path: Path, case: str
) -> None:
    change, found = REFUSED[case]
    digest, document = _signed(running, **change(body_of(running.other)))
    _approves(running, tmp_path, digest, document).one_error(10, found, "amendment|refuse")


def test_a_study_that_is_not_addressed_to_this_site_cannot_be_approved(running: Running, tmp_path: Path) -> None:
    digest, document = _signed(running, lineage="elsewhere")
    _approves(running, tmp_path, digest, document, "leiden").one_error(10, "NOT_ADDRESSED: ", "amendment|refuse")


def test_a_study_with_another_signature_or_another_name_is_not_even_shown(running: Running, tmp_path: Path) -> None:
    digest, document = _signed(running, Ed25519PrivateKey.generate(), lineage="forged")
    _approves(running, tmp_path / "a", digest, document).one_error(10, "signed by", "coordinator|expected|.")
    digest, document = _signed(running, lineage="renamed")
    _approves(running, tmp_path / "b", "ab" * 32, document).one_error(30, f"holds study {digest[:12]}", "refresh")


def test_an_exchange_that_hands_out_a_forged_study_is_noticed_when_it_is_fetched(running: Running) -> None:
    lowlands, digest = running.lowlands, running.other.digest
    whole = running.other.signed.read_bytes()
    forged = sign_document("study", body_of(running.other) | {"n0": 100000}, Ed25519PrivateKey.generate())
    for bad, found in ((forged, "signed by"), (whole.replace(b'"n0":600', b'"n0":601'), "changed after signing")):
        assert bad != whole
        running.store("UPDATE studies SET document = ? WHERE digest = ?", bad, digest)
        try:
            gouda = Copy("gouda", lowlands.home("gouda"), lowlands.data("gouda"))
            told = gouda.say("studies", "--refresh")
            told.one_error(10, found, ".")
        finally:
            running.store("UPDATE studies SET document = ? WHERE digest = ?", whole, digest)


def test_the_exchange_publishes_no_bundle_but_the_one_that_was_signed(running: Running, tmp_path: Path) -> None:
    from lowlands import server

    other = tmp_path / "other.fab"
    other.write_bytes(_evil(tmp_path / "ran"))
    home = running.lowlands.consortium.server
    told = server(home, "study", "publish", running.other.signed, "--bundle", other)
    told.one_error(10, "the bundle has SHA-256", "very file")
    told = server(home, "study", "start", running.other.digest)
    told.one_error(10, "not every hospital has approved: .*not decided", "status")
