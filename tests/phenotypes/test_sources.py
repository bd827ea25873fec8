"""What a source refuses, in words that name files and rows and never a person; phecodes; tables; the command."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import typer
from typer.testing import CliRunner

import contracts
from phenotypes.generated import as_ndjson, facts, fhir_resources, omop_frames
from phenotypes.test_cohorts import DATED
from sequester.client.cli import data
from sequester.client.config import Home
from sequester.client.ingest.phenotypes import phecodes
from sequester.client.ingest.phenotypes.definitions import expand
from sequester.client.ingest.phenotypes.derive import derive
from sequester.client.ingest.phenotypes.fhir import Fhir
from sequester.client.ingest.phenotypes.omop_tables import Database
from sequester.client.ingest.phenotypes.produce import Wish, produce
from sequester.protocols import privacy
from sequester.protocols.definition import Definition, definition_of
from sequester.protocols.errors import SequesterError, SiteError, StudyError
from sequester.protocols.study import study_json

PERSON = "Jansen-1950"  # whatever is refused, this is not said
AGE = definition_of(
    {"sets": {"x": {"domain": "condition", "lists": [{"vocabulary": "OMOP", "codes": ["5"], "descendants": True}]}},
     "index": {"kind": "date", "date": "2015-01-01"}, "columns": [{"kind": "age"}, {"kind": "has", "name": "x", "set": "x"}]}
)  # fmt: skip


def cdm(folder: Path, **tables: str) -> Path:
    """A small CDM of CSV text; one patient, observed from 2010 to 2020."""
    base = {
        "person": f"person_id,gender_concept_id,year_of_birth,person_source_value\n1,8507,1950,{PERSON}\n",
        "observation_period": "person_id,observation_period_start_date,observation_period_end_date\n1,2010-01-01,2020-01-01\n",
        "condition_occurrence": "person_id,condition_concept_id,condition_start_date\n1,5,2011-02-03\n",
        "concept_ancestor": "ancestor_concept_id,descendant_concept_id\n5,5\n",
    }
    folder.mkdir(exist_ok=True)
    for name, text in (base | tables).items():
        if text:
            (folder / f"{name}.csv").write_text(text, "utf-8")
    return folder


def refused(tmp_path: Path, source: str, definition: Definition | None = AGE, **more: Any) -> SequesterError:
    with pytest.raises(SequesterError) as caught:
        produce(Wish(source, tmp_path / "out.csv", definition, **more), "patient")
    assert PERSON not in caught.value.message + caught.value.hint and not (tmp_path / "out.csv").exists()
    return caught.value


def test_a_small_cdm_gives_the_row_it_should(tmp_path: Path) -> None:
    produce(Wish(f"omop:{cdm(tmp_path / 'c')}", tmp_path / "out.csv", AGE, "person_source_value"), "patient")
    assert (tmp_path / "out.csv").read_text() == f"patient,age,x\n{PERSON},64.50,1\n"  # born 1 July 1950, by the year


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"person": f"person_id,gender_concept_id,year_of_birth,person_source_value\n1,0,1950,{PERSON}\n2,0,1950,{PERSON}\n"},
         "person.csv row 2 and 3 are the same patient"),
        ({"person": "person_id,gender_concept_id,year_of_birth,person_source_value\n1,0,1950,\n"}, "row 2 has no"),
        ({"person": f"person_id,gender_concept_id,year_of_birth,month_of_birth,person_source_value\n1,0,1950,13,{PERSON}\n"},
         "person.csv row 2: the birth date is not a date"),
        ({"person": f"person_id,year_of_birth,person_source_value\n1,1950,{PERSON}\n"}, "no column `gender_concept_id`"),
        ({"condition_occurrence": "person_id,condition_concept_id,condition_start_date\n1,9,x\n1,5,03/02/2011\n"},
         "condition_occurrence.csv row 3: a field that is not a date"),
        ({"condition_occurrence": ""}, "there is no condition_occurrence.csv"),
        ({"concept_ancestor": ""}, "no table `concept_ancestor`"),
    ],
)  # fmt: skip
def test_a_damaged_cdm_is_refused_with_file_and_row_and_no_person(
    tmp_path: Path, tables: dict[str, str], said: str
) -> None:
    error = refused(tmp_path, f"omop:{cdm(tmp_path / 'c', **tables)}", id="person_source_value")
    assert isinstance(error, SiteError) and said in error.message


def test_a_database_is_opened_to_read_and_its_password_is_never_said(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "cdm.db"
    connection = sqlite3.connect(path)
    for name, frame in omop_frames(facts(3, 20)).items():
        frame.to_sql(name, connection, index=False)
    connection.close()
    database = Database(f"sqlite:///{path}")
    import sqlalchemy as sa

    with pytest.raises(sa.exc.OperationalError, match="readonly"):
        database._connection.execute(sa.text("DELETE FROM person"))
    database.close()
    monkeypatch.setenv("CDM", f"sqlite:///{path}")
    account = produce(Wish("omop:env:CDM", tmp_path / "o.csv", DATED), "patient")
    assert account["flow"][0] == ["people in the source", 20]
    for url, said in (
        (f"mysql://reader:{PERSON}@host/db", "a database of kind mysql"),
        (f"sqlite:////nowhere/{PERSON}.db", "not there"),
        (f"postgresql://reader:{PERSON}@127.0.0.1:1/db", "PostgreSQL|cannot be opened"),
    ):
        import re

        assert re.search(said, refused(tmp_path, f"omop:{url}").message)
    assert "has no NOT_SET" in refused(tmp_path, "omop:env:NOT_SET").message


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.ndjson": '{"resourceType": "Patient", "id": "%s"}\n{broken\n'}, "a.ndjson: one line is not JSON"),
        ({"a.ndjson": '{"resourceType": "Patient", "id": "%s"}\n[1]\n'}, "a.ndjson line 2 is not a FHIR resource"),
        ({"a.ndjson": '{"resourceType": "Patient", "id": "%s"}\n{"resourceType": "Patient", "id": "%s", "gender": "male"}\n'},
         "line 1 and a.ndjson line 2 are the same patient"),
        ({"a.ndjson": '{"resourceType": "Patient", "id": "%s", "birthDate": "03/02/1950"}\n'}, "line 1: this Patient"),
        ({"a.ndjson.gz": "not gzip"}, "cannot be read to its end"),
        ({"b.txt": ""}, "holds no FHIR files"),
    ],
)  # fmt: skip
def test_damaged_fhir_is_refused_with_file_and_line_and_no_person(
    tmp_path: Path, files: dict[str, str], said: str
) -> None:
    folder = tmp_path / "fhir"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text.replace("%s", PERSON), "utf-8")
    definition = Definition.model_validate(DATED.model_dump())
    assert said in refused(tmp_path, f"fhir:{folder}", definition).message


def test_what_fhir_cannot_answer_is_refused_and_not_guessed(tmp_path: Path) -> None:
    folder = tmp_path / "fhir"
    as_ndjson(folder, fhir_resources(facts(4, 5)))
    assert "OMOP concept ids, which FHIR does not know" in refused(tmp_path, f"fhir:{folder}").message
    below = {
        "x": {"domain": "condition", "lists": [{"vocabulary": "SNOMED", "codes": ["44054006"], "descendants": True}]}
    }
    definition = definition_of(AGE.model_dump() | {"sets": below})
    assert "FHIR files hold no hierarchy" in refused(tmp_path, f"fhir:{folder}", definition).message


def test_blood_pressure_below_a_limit_is_no_number_and_is_counted(tmp_path: Path) -> None:
    lines = [
        {"resourceType": "Patient", "id": "p", "birthDate": "1950"},
        {"resourceType": "Observation", "id": "1", "status": "final", "subject": {"reference": "Patient/p"},
         "effectiveDateTime": "2015-01-01", "code": {"coding": [{"system": "http://loinc.org", "code": "1"}]},
         "valueQuantity": {"value": 5, "comparator": "<", "code": "mg"}},
        {"resourceType": "MedicationRequest", "id": "2", "status": "active", "doNotPerform": True,
         "subject": {"reference": "Patient/p"}, "authoredOn": "2015-01-01"},
    ]  # fmt: skip
    path = tmp_path / "all.ndjson"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    definition = definition_of(
        {"sets": {"m": {"domain": "measurement", "lists": [{"vocabulary": "LOINC", "codes": ["1"]}]}},
         "index": {"kind": "entry"}, "columns": [{"kind": "value", "name": "m", "set": "m", "units": {"mg": "1"}}]}
    )  # fmt: skip
    expanded = expand(definition, None)
    found = derive(Fhir(path).read(expanded), expanded, "patient")
    assert found.rows == (("p", ""),)
    assert found.left_out == {"MedicationRequest that says not to": 1, "measurement with a sign such as <": 1}


MAP = """ICD10,ICD10 String,PheCode,Phenotype,Excl. Phecodes,Excl. Phenotypes
E10,Type 1,250.1,Type 1 diabetes,249-250.99,DIABETES
E11,Type 2,250.2,Type 2 diabetes,249-250.99,DIABETES
E11.9,Type 2,250.2,Type 2 diabetes,249-250.99,DIABETES
E11.2,Kidney,250.22,Type 2 with kidney,249-250.99,DIABETES
E09,Drug induced,249,Secondary diabetes,249-250.99,DIABETES
I10,High,401.1,Hypertension,401-405.99,HYPERTENSION
Z99,None,,,,
"""


def test_a_phecode_counts_two_dates_and_excludes_its_range(tmp_path: Path) -> None:
    path = tmp_path / "map.csv"
    path.write_text(MAP)
    found = phecodes.load(path)
    assert [c for codes in found.codes("250.2") for c in codes.codes] == ["E11", "E11.2", "E11.9"]
    assert [c for codes in found.exclusion("250.2") for c in codes.codes] == ["E09", "E10", "E11", "E11.2", "E11.9"]
    assert [codes.vocabulary for codes in found.codes("401.1")] == ["ICD10"]
    given = {"sets": {"t2d": {"domain": "condition", "phecode": "250.2", "map_sha256": hashlib.sha256(MAP.encode()).hexdigest()}},
             "index": {"kind": "entry"}, "columns": [{"kind": "case", "name": "t2d", "set": "t2d"}]}  # fmt: skip
    definition = definition_of(given)
    cases = {  # patient: codes and days; what they are
        "case": ([("E11.9", "2015-01-01"), ("E11.2", "2015-01-02")], "1"),
        "same day twice": ([("E11.9", "2015-01-01"), ("E11", "2015-01-01")], ""),
        "one date": ([("E11.9", "2015-01-01")], ""),
        "excluded": ([("E09", "2015-01-01")], ""),
        "control": ([("I10", "2015-01-01")], "0"),
        "late evening": ([("E11", "2015-01-01T23:59:00-10:00"), ("E11", "2015-01-02T00:01:00-10:00")], "1"),
    }
    lines: list[dict[str, Any]] = []
    for patient, (codes, _) in cases.items():
        lines.append({"resourceType": "Patient", "id": patient})
        lines += [
            {"resourceType": "Condition", "subject": {"reference": f"Patient/{patient}"}, "recordedDate": day,
             "code": {"coding": [{"system": "http://hl7.org/fhir/sid/icd-10", "code": code}]}}
            for code, day in codes
        ]  # fmt: skip
    (tmp_path / "all.ndjson").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out.parquet"
    account = produce(Wish(f"fhir:{tmp_path / 'all.ndjson'}", out, definition, phecode_map=path), "patient")
    table = pl.read_parquet(out)
    answer = dict(zip(table["patient"].to_list(), table["t2d"].to_list(), strict=True))
    assert answer == {patient: wanted for patient, (_, wanted) in cases.items()}
    assert account["columns"]["t2d"] == {"1": 2, "0": 1, "missing": 3}
    with pytest.raises(SiteError, match=r"is phecode 250\.2 and no map was named"):
        expand(definition, None)
    path.write_text(MAP + "E12,x,250.3,y,,\n")
    with pytest.raises(SiteError, match="the phecode map has SHA-256"):
        expand(definition, phecodes.load(path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"columns": []}, "columns"),
        ({"columns": [{"kind": "age"}, {"kind": "age"}]}, "named twice"),
        ({"columns": [{"kind": "has", "name": "a", "set": "nothing"}]}, "nothing, which is not defined"),
        ({"index": {"kind": "first"}}, "of kind first has a set"),
        ({"index": {"kind": "date", "date": "1-2-2015"}}, "YYYY-MM-DD"),
        ({"until": "2015-02-30"}, "until|day"),
        ({"sets": {"x": {"domain": "drug", "phecode": "250.2"}}}, "domain condition"),
        ({"sets": {"x": {"domain": "drug"}}}, "code lists or a phecode"),
        ({"columns": [{"kind": "value", "name": "a", "set": "x", "units": {"kg": "1"}}]}, "not a measurement"),
        ({"columns": [{"kind": "has", "name": "a", "set": "x", "window": {"from_days": 1, "to_days": 0}}]}, "ends before"),
        ({"surprise": 1}, "surprise"),
    ],
)  # fmt: skip
def test_a_definition_that_contradicts_itself_is_the_study_s_fault(change: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyError, match=said):
        definition_of(AGE.model_dump() | change)


def test_a_definition_in_a_study_is_signed_and_a_study_without_one_keeps_its_bytes() -> None:
    plain, carrying = contracts.study(), contracts.study(definition=AGE.model_dump(mode="json"))
    assert "definition" not in study_json(plain)
    assert carrying.definition == AGE and privacy.study_digest(carrying) != privacy.study_digest(plain)
    other = contracts.study(definition=AGE.model_dump(mode="json") | {"until": "2019-01-01"})
    assert privacy.study_digest(other) != privacy.study_digest(carrying)


def test_the_command_takes_the_signed_definition_and_wearable_columns_and_freeze_takes_its_table(
    tmp_path: Path,
) -> None:
    study = contracts.study(definition=DATED.model_dump(mode="json"))
    home, digest = contracts.hospital(tmp_path / "home", study)
    given = facts(1)
    as_ndjson(tmp_path / "fhir", fhir_resources(given))
    steps = tmp_path / "steps.tsv"
    steps.write_text("patient\tsteps\n" + "".join(f"{i}\t{int(i) * 10}\n" for i in given.people.id[5:]))
    app = typer.Typer()
    data.register(app)
    runner = CliRunner(env={"SEQUESTER_HOME": str(home.root), "COLUMNS": "200"})
    out = tmp_path / "table.parquet"
    words = ["data", "phenotypes", "--source", f"fhir:{tmp_path / 'fhir'}", "--study", digest[:8], "--id", "urn:hospital",
             "--out", str(out), "--join", str(steps)]  # fmt: skip
    said = runner.invoke(app, words)
    assert said.exit_code == 0, said.output
    for text in (
        "people in the source",
        "no lung disease in the year before",
        "records that do not count",
        "urn:local",
    ):
        assert text in said.output
    assert not any(i in said.output.split() for i in given.people.id)  # nobody's id
    account = json.loads(runner.invoke(app, [*words, "--json"]).output)
    assert account["definition"] == DATED.digest and account["joined"]["steps.tsv"]["only there"] > 0
    table = pl.read_parquet(out)
    assert table["steps"].drop_nulls().to_list() == [
        str(int(i) * 10) for i in table["patient"] if i in set(given.people.id[5:])
    ]

    from sequester.client.ingest import freeze

    home.site_toml.write_text(f'[site]\nid = "north"\n[data]\nphenotypes = "{out}"\n[policy]\nminimum_cohort = 5\n')
    needs = contracts.study(
        phenotype={"name": "t2d", "kind": "binary"}, variants=[], cohort={},
        covariates=[{"name": "age", "kind": "quantitative", "lower": "0", "upper": "100"}],
    )  # fmt: skip
    frozen = freeze.freeze(Home(home.root), home.config(), needs, "ab" * 32)
    assert frozen.patients == account["columns"]["t2d"]["1"] + account["columns"]["t2d"]["0"] > 5


def test_a_table_is_taken_as_it_is_and_a_second_row_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("patient,age\n 007 ,50\n008,NA\n")
    produce(Wish(f"table:{path}", tmp_path / "o.parquet"), "patient")
    assert pl.read_parquet(tmp_path / "o.parquet").rows() == [("007", "50"), ("008", "NA")]
    path.write_text(f"patient,age\n{PERSON},50\n{PERSON},51\n")
    assert "rows 2 and 3 of the table" in refused(tmp_path, f"table:{path}", None).message
    assert "a URL is not a path" in refused(tmp_path, "fhir:https://example.org/x").message
    assert "a source of kind" in refused(tmp_path, "sas:/x").message
    assert "need a definition" in refused(tmp_path, f"omop:{tmp_path}", None).message
