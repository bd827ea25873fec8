"""The verbs a hospital types about a study, as typed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from contracts import COORDINATOR, PINNED, SITES, exact_study, fields, freeze, hospital, study
from sequester.client.cli import ledger as ledger_verbs
from sequester.client.cli import studies as cli
from sequester.client.config import Home
from sequester.client.gate import control
from sequester.client.gate.ledger import Ledger
from sequester.protocols import privacy
from sequester.protocols.accounting import Event
from sequester.protocols.errors import PeerError, PrivacyError, SiteError, StudyError
from sequester.protocols.signing import open_document, raw_public, sign_document
from sequester.protocols.study import study_json

APP = typer.Typer()
cli.register(APP)
ledger_verbs.register(APP)
STUDY = study()
DIGEST = privacy.study_digest(STUDY)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setattr(cli, "_pinned", lambda home, consortium: PINNED)
    place, digest = hospital(tmp_path / "site", STUDY)
    Ledger.found(place.dataset("main"), place.config().policy)
    freeze(place, digest)
    return place


def run(home: Home, *words: object, typed: str = "") -> Result:
    return CliRunner().invoke(APP, [*map(str, words), "--home", str(home.root)], input=typed)


def contents(root: Path) -> dict[str, str]:
    """Every file with its hash; SQLite's shared memory of a reader is none of the ledger's content."""
    paths = [p for p in root.rglob("*") if p.is_file() and not p.name.endswith(("-shm", "-wal"))]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def test_a_published_study_is_listed_with_where_it_stands(home: Home) -> None:
    (row,) = json.loads(run(home, "studies", "--json").stdout)
    assert row == {
        "study": DIGEST, "consortium": "example", "title": "A risk score", "decision": "not decided", "ended": "",
        "expires": STUDY.expires,
    }  # fmt: skip
    assert DIGEST[:12] in run(home, "studies").stdout


def test_digest_and_date_are_whole_on_a_terminal_of_80_columns(home: Home) -> None:
    (home.consortium("example") / "outcomes").mkdir()
    (home.consortium("example") / "outcomes" / DIGEST).write_text("withdrawn", "ascii")
    said = CliRunner().invoke(APP, ["studies", "--home", str(home.root)], env={"COLUMNS": "80"}).stdout
    assert DIGEST[:12] in said and STUDY.expires[:10] in said and "withdrawn" in said and "…" not in said


def test_a_study_whose_date_has_passed_is_listed_as_expired(home: Home) -> None:
    old = study(expires="2020-01-01T00:00:00Z")
    document = sign_document("study", study_json(old), COORDINATOR)
    (home.consortium("example") / "studies" / f"{privacy.study_digest(old)}.json").write_bytes(document)
    listed = {row["study"]: row["ended"] for row in json.loads(run(home, "studies", "--json").stdout)}
    assert listed == {DIGEST: "", privacy.study_digest(old): "expired"}


def test_show_is_the_text_that_is_approved_and_its_json_the_bytes_that_are_signed(home: Home) -> None:
    assert "What would leave this building" in run(home, "show", DIGEST[:8]).stdout
    assert json.loads(run(home, "show", DIGEST[:8], "--json").stdout) == study_json(STUDY)


def test_check_accepts_says_what_to_do_next_and_changes_nothing(home: Home) -> None:
    before = contents(home.root)
    said = run(home, "check", DIGEST[:12])
    assert said.exit_code == 0 and "this site would accept it" in said.stdout and "approve" in said.stdout
    (home.dataset("main") / "cohorts" / DIGEST / "manifest.json").rename(home.root / "away")
    assert "data freeze" in run(home, "check", DIGEST[:12]).stdout
    (home.root / "away").rename(home.dataset("main") / "cohorts" / DIGEST / "manifest.json")
    assert contents(home.root) == before


def test_check_reads_a_yaml_that_nobody_signed_yet(home: Home, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps(fields()), "utf-8")  # JSON is YAML
    said = run(home, "check", path)
    assert said.exit_code == 0 and "signs and publishes" in said.stdout
    path.write_text(json.dumps(fields(privacy__epsilon="8", privacy__order="4.4", consortium="andes")), "utf-8")
    said = run(home, "check", path, "--json")
    assert said.exit_code == StudyError.exit_status
    assert [o["name"] for o in json.loads(said.stdout)["objections"]] == ["NOT_ENROLLED", "EPSILON"]


def test_check_names_an_exact_analysis_and_the_private_one_instead(home: Home, tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    path.write_bytes(sign_document("study", study_json(exact_study()), COORDINATOR))
    said = run(home, "check", path)
    assert said.exit_code == 10 and "EXACT" in said.stdout and "answers the same question" in said.stdout


def test_check_names_a_budget_for_life_that_does_not_hold_the_study(home: Home) -> None:
    ledger = Ledger(home.dataset("main"))
    balance = ledger.balance()
    sigma = (balance.order / (2 * 0.95 * balance.cap)) ** 0.5
    ledger.reserve("ef" * 32, [Event("earlier", sigma, 1)], [])
    ledger.close()
    said = run(home, "check", DIGEST, "--json")
    assert said.exit_code == 40
    assert [o["code"] for o in json.loads(said.stdout)["objections"]] == ["BUDGET"]


def test_check_names_hospitals_nobody_compared(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_pinned", lambda home, consortium: frozenset())
    said = run(home, "check", DIGEST)
    assert said.exit_code == 20 and "harbor, lake" in said.stdout and "peers pin" in said.stdout
    refused = run(home, "approve", DIGEST, "--person", "A", "--yes", "--offline").exception
    assert isinstance(refused, SiteError) and not (home.consortium("example") / "approvals").exists()


def test_approve_shows_asks_and_signs_one_document(home: Home) -> None:
    folder = home.consortium("example") / "approvals" / DIGEST
    said = run(home, "approve", DIGEST[:12], "--person", "A. Person", "--offline", typed="n\n")
    assert said.exit_code == 1 and "Nothing was signed" in said.stdout and not folder.exists()
    said = run(home, "approve", DIGEST[:12], "--person", "A. Person", "--offline", typed="y\n")
    assert said.exit_code == 0 and "What would leave" in said.stdout and "approved" in said.stdout
    document = open_document((folder / "dpo.json").read_bytes(), "approval", raw_public(SITES["north"]))
    assert document.body["study"] == DIGEST
    assert json.loads(run(home, "studies", "--json").stdout)[0]["decision"] == "approved"


def test_the_text_behind_an_approval_is_compared_with_todays_and_with_what_was_signed(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = home.consortium("example") / "approvals" / DIGEST / "dpo.txt"
    before = run(home, "show", DIGEST).stdout
    assert run(home, "approve", DIGEST, "--person", "A. Person", "--yes", "--offline").exit_code == 0
    assert text.read_text("utf-8") == before
    assert run(home, "show", DIGEST).stdout.endswith("after reading this very text.\n")
    assert run(home, "audit", "verify").exit_code == 0
    monkeypatch.setattr(cli, "_pinned", lambda home, consortium: PINNED - {raw_public(SITES["lake"])})
    said = run(home, "show", DIGEST).stdout
    assert "after reading another text; since then" in said
    assert "+   lake" in said and "NOT PINNED: counts as a colluder" in said.split("since then")[1]
    for spoil in (lambda: text.write_text(before + "and one more line\n", "utf-8"), text.unlink):
        spoil()
        assert "a text that is gone or was changed" in run(home, "show", DIGEST).stdout
        refused = run(home, "audit", "verify").exception
        assert isinstance(refused, PrivacyError) and f"`dpo` read before approving study {DIGEST[:12]}" in str(refused)


def test_refuse_signs_a_public_code_and_nothing_else(home: Home) -> None:
    assert run(home, "refuse", DIGEST, "--code", "NOT_READY", "--offline").exit_code == 0
    path = home.consortium("example") / "approvals" / DIGEST / "refusal.json"
    body = open_document(path.read_bytes(), "refusal", raw_public(SITES["north"])).body
    assert body == {"study": DIGEST, "site": "north", "code": "NOT_READY"}
    assert json.loads(run(home, "studies", "--json").stdout)[0]["decision"] == "refused"
    assert run(home, "refuse", DIGEST, "--code", "BECAUSE", "--offline").exit_code == 2


def test_a_no_to_a_study_that_runs_has_the_gate_leave_it(home: Home) -> None:
    asked: list[dict[str, object]] = []
    loop = asyncio.new_event_loop()

    async def answer(request: dict[str, object]) -> dict[str, object]:
        asked.append(request)
        return {"said": "this hospital has left it."}

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    socket = home.root.parent / "s"  # a short way to it: the names of unix sockets have 107 letters at most
    home.run.mkdir()
    (home.run / "gate.sock").symlink_to(socket)
    server = asyncio.run_coroutine_threadsafe(control.serve(socket, answer), loop).result(20)
    try:
        assert "has left it" in run(home, "refuse", DIGEST, "--offline").stdout
        assert asked == [{"ask": "withdraw", "study": DIGEST}]
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()


def test_a_study_file_changed_on_this_disk_is_refused_by_name(home: Home) -> None:
    path = home.consortium("example") / "studies" / f"{DIGEST}.json"
    original = path.read_bytes()
    path.write_bytes(original.replace(b'"n0":10000', b'"n0":90000'))
    refused = run(home, "show", DIGEST).exception
    assert isinstance(refused, StudyError) and "changed after signing" in refused.message
    path.write_bytes(sign_document("study", study_json(study(n0=9999)), COORDINATOR))
    assert isinstance(run(home, "show", DIGEST).exception, PeerError)


@pytest.mark.parametrize("prefix", ["", "abc", "ffffffff", "../../etc"])
def test_a_prefix_that_names_no_single_study_is_refused(home: Home, prefix: str) -> None:
    refused = run(home, "show", prefix).exception
    assert isinstance(refused, SiteError) and "sequester-client studies" in refused.hint
