"""A ledger outlives the version that wrote it: one fixture of each released schema, read to the same balance for ever."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from sequester.client.gate.ledger import _TABLE, SCHEMA, Ledger

FIXTURES = sorted((Path(__file__).resolve().parents[1] / "vectors/ledger").glob("v*.json"))


def test_there_is_a_fixture_of_every_schema_up_to_this_one() -> None:
    assert [path.stem for path in FIXTURES] == [f"v{n}" for n in range(1, SCHEMA + 1)]


@pytest.fixture(params=FIXTURES, ids=lambda path: path.stem)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """The fixture, and a data set's folder with that ledger in it."""
    fixture = json.loads(request.param.read_text("utf-8"))
    folder = tmp_path / "main"
    folder.mkdir()
    with sqlite3.connect(folder / "ledger.db") as db:
        db.executescript(_TABLE)
        for row in fixture["rows"]:
            raw = row["body"].encode()
            values = (row["seq"], raw, bytes.fromhex(row["hash"]), bytes.fromhex(row["signature"]))
            db.execute("INSERT INTO rows VALUES (?, ?, ?, ?)", values)
    return fixture, folder


def test_an_old_ledger_has_the_balance_it_had(written: tuple[dict[str, Any], Path]) -> None:
    fixture, folder = written
    held = Ledger(folder, read_only=True)
    now, was = held.balance(), fixture["balance"]
    assert now.exact == tuple(was["exact"])
    for name in ("order", "delta", "cap", "reserved", "spent", "epsilon_pld"):
        assert getattr(now, name) == pytest.approx(was[name], abs=1e-9)
    for study, charges in fixture["charges"].items():
        assert held.charges_spent(study) == charges
    held.close()


def test_filter_and_pld_are_recomputed_from_the_entries_alone(written: tuple[dict[str, Any], Path]) -> None:
    """With dp-accounting and nothing of ours: sampled releases too, a running study by its whole reservation."""
    fixture, _ = written
    entries = [json.loads(row["body"]) for row in fixture["rows"]]
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(entries[0]["key"]))
    for row in fixture["rows"]:
        key.verify(bytes.fromhex(row["signature"]), b"sequester-ledger/v1/" + bytes.fromhex(row["hash"]))
    over = {entry["study"] for entry in entries if entry["kind"] == "settle"}
    pld, rdp = PLDAccountant(), RdpAccountant(orders=[fixture["balance"]["order"]])
    for entry in entries:
        if entry["kind"] == "settle" or (entry["kind"] == "reserve" and entry["study"] not in over):
            for event in entry["events"]:
                one: Any = dp_accounting.GaussianDpEvent(float(event["sigma"]))
                if float(event["q"]) < 1:
                    one = dp_accounting.PoissonSampledDpEvent(float(event["q"]), one)
                for accountant in (pld, rdp):
                    accountant.compose(one, event["count"])
    was = fixture["balance"]
    assert pld.get_epsilon(was["delta"]) == pytest.approx(was["epsilon_pld"], abs=1e-6)
    assert float(rdp.rdp[0]) == pytest.approx(was["reserved"] + was["spent"], abs=1e-9)
