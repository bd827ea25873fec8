"""The same patients under another data set's name have the budget they had, not a new one."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import small_hospital
from sequester.client.cli.app import app
from sequester.client.gate import differencing
from sequester.client.gate.ledger import SCHEMA, Ledger
from sequester.client.ingest.freeze import freeze
from sequester.client.policy import Policy
from sequester.protocols.accounting import Event, cost, epsilon_pld
from sequester.protocols.errors import RefusalCode, SiteError

ONE = Event("score", 4.531, 1)
STUDY = "cd" * 32


def renamed(home: small_hospital.Home, name: str) -> small_hospital.Home:
    """The hospital after it registered its files as data set `name`."""
    text = home.site_toml.read_text("utf-8").replace("[data]\n", f'[data]\nid = "{name}"\n')
    home.site_toml.write_text(text, "utf-8")
    return home


def rows(folder: Path) -> list[tuple[object, ...]]:
    with sqlite3.connect(folder / "ledger.db") as db:
        return db.execute("SELECT * FROM rows").fetchall()


@pytest.fixture
def home(tmp_path: Path) -> small_hospital.Home:
    """Data set `main` froze its 120 patients and spent; then the same files were registered as `second`."""
    home, of = small_hospital.hospital(tmp_path / "site"), small_hospital.study()
    freeze(home, home.config(), of, STUDY)
    Ledger.found(home.dataset("main"), Policy())
    first = Ledger(home.dataset("main"))
    first.reserve(STUDY, [replace(ONE, count=20)], [])
    first.close()
    renamed(home, "second")
    account = freeze(home, home.config(), of, STUDY)
    assert any("120 of these patients are in data set main" in said for said in account.sentences)
    Ledger.found(home.dataset("second"), Policy())
    return home


def test_the_new_name_shows_what_its_patients_spent_under_the_old_one(home: small_hospital.Home) -> None:
    said = CliRunner().invoke(app, ["ledger", "--home", str(home.root)])
    together = epsilon_pld([replace(ONE, count=20)], 1e-6)
    assert f"120 patients are in data set main as well: epsilon {together:.2f}" in said.output
    machine = json.loads(CliRunner().invoke(app, ["ledger", "--home", str(home.root), "--json"]).output)
    assert machine["shared_patients"]["data_sets"] == {"main": 120}
    assert machine["shared_patients"]["epsilon_pld_together"] == pytest.approx(together)


def test_a_study_that_the_two_budgets_together_do_not_hold_is_not_joined(home: small_hospital.Home) -> None:
    ledger = Ledger(home.dataset("second"))
    left = ledger.balance().left
    most = int((left - cost(replace(ONE, count=20), 4.4)) / cost(ONE, 4.4))
    with pytest.raises(SiteError, match=r"have spent .* in data set main") as refused:
        differencing.join(
            ledger, home.dataset("second"), STUDY, exact=False, floor=10, events=[replace(ONE, count=most + 1)]
        )
    assert refused.value.code is RefusalCode.NOT_READY  # it depends on patients: no reason leaves
    assert not list(ledger.rows("cohort"))
    differencing.join(ledger, home.dataset("second"), STUDY, exact=False, floor=10, events=[replace(ONE, count=most)])
    assert len(list(ledger.rows("cohort"))) == 1
    ledger.close()


def test_other_patients_have_a_budget_of_their_own(home: small_hospital.Home) -> None:
    table = home.root.parent / "phenotypes.csv"
    lines = table.read_text("utf-8").splitlines()
    renamed_people = [lines[0]] + [line.replace("p", "q", 1) for line in lines[1:]]
    table.write_text("\n".join(renamed_people) + "\n", "utf-8")
    genotypes = home.root.parent / "g.fam"
    genotypes.write_text(genotypes.read_text("utf-8").replace("p", "q"), "utf-8")
    third = small_hospital.Home(home.root)
    text = home.site_toml.read_text("utf-8").replace('id = "second"', 'id = "third"')
    home.site_toml.write_text(text, "utf-8")
    freeze(third, third.config(), small_hospital.study(), STUDY)
    assert differencing.shared_with(home.dataset("third")) == {}


def test_a_ledger_of_another_schema_is_refused_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "main"
    monkeypatch.setattr("sequester.client.gate.ledger.SCHEMA", SCHEMA + 1)
    Ledger.found(folder, Policy())
    before = rows(folder)
    monkeypatch.undo()
    with pytest.raises(SiteError, match=f"schema {SCHEMA + 1}, this version reads {SCHEMA}"):
        Ledger(folder)
    assert rows(folder) == before and len(before) == 1
