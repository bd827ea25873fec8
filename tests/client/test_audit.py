"""An auditor notices a changed, cut or restored ledger, with this program and without it."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from typer.testing import CliRunner

from sequester.client.cli import ledger as cli
from sequester.client.gate.audit import export, verify, witnesses
from sequester.client.gate.ledger import Ledger, signing_key
from sequester.client.policy import Policy
from sequester.protocols.accounting import Event
from sequester.protocols.errors import PrivacyError
from sequester.protocols.signing import canonical, raw_public, sha256, sign_document

STUDY = "ab" * 32
VERIFIER = Path(__file__).parents[2] / "deploy" / "verify_ledger.py"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "site.toml").write_text('[site]\nid = "north"\n', "utf-8")
    place = tmp_path / "datasets" / "main"
    Ledger.found(place, Policy())
    ledger = Ledger(place)
    ledger.reserve(STUDY, [Event("fit", 4.531, 4)], [])
    for step in range(4):
        ledger.spend(STUDY, "fit", step, 0)
    ledger.close()
    return place


def head(folder: Path) -> tuple[int, bytes]:
    ledger = Ledger(folder, read_only=True)
    try:
        return ledger.head()
    finally:
        ledger.close()


def forge(folder: Path, *statements: tuple[str, tuple[object, ...]]) -> None:
    db = sqlite3.connect(folder / "ledger.db", isolation_level=None)
    db.executescript("DROP TRIGGER no_update; DROP TRIGGER no_delete;")
    for statement, values in statements:
        db.execute(statement, values)
    db.close()


def test_a_whole_ledger_agrees_with_its_witnesses(folder: Path) -> None:
    assert verify(folder, [head(folder)]).bad == 0


def test_three_rows_cut_off_are_noticed_with_a_witness_only(folder: Path) -> None:
    seen = head(folder)
    forge(folder, ("DELETE FROM rows WHERE seq > ?", (seen[0] - 3,)))
    assert verify(folder, []).bad == 0  # a chain alone cannot know
    assert verify(folder, [seen]).bad == seen[0] - 2


def test_yesterdays_copy_is_noticed_even_after_new_rows(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("copy"))
    ledger = Ledger(folder)
    ledger.append("note", {"study": STUDY})
    seen = ledger.head()
    ledger.close()
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("copy"), folder)
    ledger = Ledger(folder)
    ledger.append("note", {"study": "other"})
    ledger.close()
    assert verify(folder, []).bad == 0
    assert verify(folder, [seen]).bad == seen[0]


@pytest.mark.parametrize(
    ("statement", "values", "bad"),
    [
        ("UPDATE rows SET body = replace(body, 'fit', 'fat') WHERE seq = ?", (3,), 3),
        ("UPDATE rows SET body = 'text' WHERE seq = ?", (4,), 4),
        ("UPDATE rows SET signature = zeroblob(64) WHERE seq = ?", (5,), 5),
        ("DELETE FROM rows WHERE seq = ?", (2,), 2),
        ("UPDATE rows SET body = 'text' WHERE seq = ?", (1,), 1),
    ],
)
def test_the_first_bad_entry_is_named(folder: Path, statement: str, values: tuple[int], bad: int) -> None:
    forge(folder, (statement, values))
    assert verify(folder, []).bad == bad


def test_a_changed_row_with_its_hash_made_good_is_not_signed(folder: Path) -> None:
    ledger = Ledger(folder, read_only=True)
    row = list(ledger.rows())[2]
    ledger.close()
    raw = canonical({**row.body, "step": 9})
    forge(folder, ("UPDATE rows SET body = ?, hash = ? WHERE seq = 3", (raw, bytes.fromhex(sha256(raw)))))
    assert verify(folder, []).sentence == "entry 3 is not signed by this data set's key"


def test_receipts_and_advertised_heads_are_witnesses(tmp_path: Path) -> None:
    (tmp_path / "receipts").mkdir()
    body = {"data_set": "main", "ledger": {"counter": 5, "head": "05" * 32}}
    (tmp_path / "receipts" / "a.json").write_bytes(sign_document("receipt", body, Ed25519PrivateKey.generate()))
    own = Ed25519PrivateKey.generate()
    (tmp_path / "identity.key").write_bytes(own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    names = (f"{raw_public(own).hex()}/main", f"{raw_public(own).hex()}/other", f"{'ab' * 32}/main")
    rows = {name: {"counter": 7 + i, "head": "07" * 32} for i, name in enumerate(names)}
    (tmp_path / "advertisements.json").write_text(json.dumps(rows), "utf-8")
    assert witnesses([tmp_path], "main") == [(5, b"\x05" * 32), (7, b"\x07" * 32)]


def run_verifier(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", str(VERIFIER), *map(str, arguments)], capture_output=True, text=True, timeout=180, check=False
    )  # fmt: skip


def exported(folder: Path, change: Callable[[dict[str, object]], None] = lambda body: None) -> Path:
    ledger = Ledger(folder, read_only=True)
    body = json.loads(export(ledger, signing_key(folder)))["body"]
    ledger.close()
    change(body)
    path = folder.parent / "export.json"
    path.write_bytes(sign_document("audit", body, signing_key(folder)))
    return path


def test_the_standalone_verifier_accepts_a_whole_export_and_its_receipts(folder: Path) -> None:
    counter, hashed = head(folder)
    receipt = folder.parent / "receipt.json"
    body = {"data_set": "main", "ledger": {"counter": counter, "head": hashed.hex()}}
    receipt.write_bytes(sign_document("receipt", body, Ed25519PrivateKey.generate()))
    key = raw_public(signing_key(folder)).hex()
    done = run_verifier(exported(folder), "--key", key, "--receipt", receipt)
    assert done.returncode == 0, done.stderr
    assert f"{counter} entries, whole; 1 receipts agree" in done.stdout
    assert len(VERIFIER.read_text("utf-8").splitlines()) < 200


def _cut(body: dict[str, object]) -> None:
    del body["rows"][-3:]  # type: ignore[attr-defined]


def _cut_and_said(body: dict[str, object]) -> None:
    _cut(body)
    rows = body["rows"]
    body |= {"counter": len(rows), "head": rows[-1]["hash"]}  # type: ignore[arg-type,index]


def _changed(body: dict[str, object]) -> None:
    row = body["rows"][3]  # type: ignore[index]
    row["body"] = row["body"].replace('"step":1', '"step":7')


@pytest.mark.parametrize(
    ("change", "said"),
    [(_cut, "6 entries, 3 are there"), (_changed, "entry 4 was changed"), (_cut_and_said, "entry 6")],
)
def test_the_standalone_verifier_says_what_is_wrong(
    folder: Path, change: Callable[[dict[str, object]], None], said: str
) -> None:
    counter, hashed = head(folder)
    receipt = folder.parent / "receipt.json"
    body = {"data_set": "main", "ledger": {"counter": counter, "head": hashed.hex()}}
    receipt.write_bytes(sign_document("receipt", body, Ed25519PrivateKey.generate()))
    done = run_verifier(exported(folder, change), "--receipt", receipt)
    assert done.returncode == 1 and said in done.stderr


def test_the_verbs_show_verify_and_export(folder: Path) -> None:
    app = typer.Typer()
    cli.register(app)
    home = ["--home", str(folder.parents[1])]
    shown = CliRunner().invoke(app, ["ledger", "--json", *home])
    assert shown.exit_code == 0 and json.loads(shown.stdout)["balance"]["reserved"] > 0
    assert "fit 4" in CliRunner().invoke(app, ["ledger", *home]).stdout
    assert "6 entries, whole" in CliRunner().invoke(app, ["audit", "verify", *home]).stdout
    file = folder.parent / "audit.json"
    assert CliRunner().invoke(app, ["audit", "export", str(file), *home]).exit_code == 0
    assert run_verifier(file).returncode == 0
    forge(folder, ("DELETE FROM rows WHERE seq = ?", (3,)))
    broken = CliRunner().invoke(app, ["audit", "verify", *home])
    assert isinstance(broken.exception, PrivacyError) and "entry 3 is missing" in broken.exception.message
