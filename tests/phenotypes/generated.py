"""Invented records of a hospital as plain data frames, written as OMOP tables and as FHIR resources, edge cases in.

Every fact is a row: (person, code, day, ...). The writers only change clothes; what counts is decided by the oracle in
test_cohorts.py and by the product, apart.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

DIABETES, OTHER_DIABETES, ASTHMA, LUNG = "E11.9", "E11.65", "J45.0", "J44.1"
METFORMIN, HBA1C, WEIGHT = "A10BA02", "4548-4", "29463-7"
CONCEPTS = {  # vocabulary, code -> concept id
    ("ICD10CM", DIABETES): 1_001, ("ICD10CM", OTHER_DIABETES): 1_002, ("ICD10CM", ASTHMA): 1_003,
    ("ICD10CM", LUNG): 1_004, ("ICD10CM", "Z00.0"): 1_005, ("ATC", METFORMIN): 2_001, ("ATC", "C09AA01"): 2_002,
    ("LOINC", HBA1C): 3_001, ("LOINC", WEIGHT): 3_002, ("UCUM", "%"): 8_554, ("UCUM", "mmol/mol"): 9_579,
    ("UCUM", "kg"): 9_529,
}  # fmt: skip
SYSTEM = {
    "ICD10CM": "http://hl7.org/fhir/sid/icd-10-cm", "ATC": "http://www.whocc.no/atc", "LOINC": "http://loinc.org",
}  # fmt: skip


@dataclass
class Facts:
    """`people`: id, sex, birth, death. `periods`: id, first, last. The rest: id, code, day; of values number and unit."""

    people: pd.DataFrame
    periods: pd.DataFrame
    conditions: pd.DataFrame
    drugs: pd.DataFrame
    values: pd.DataFrame
    rng: Any


def facts(seed: int, n: int = 400) -> Facts:
    """One hospital. Days lie in 2008-2021 and cluster, so that several codes fall on the same day."""
    rng = np.random.default_rng(seed)
    ids = [f"{i:05d}" for i in rng.permutation(np.arange(1, n + 1))]
    day = lambda low, high, size: pd.Timestamp(low) + pd.to_timedelta(rng.integers(0, high, size), "D")  # noqa: E731
    people = pd.DataFrame(
        {"id": ids, "sex": rng.choice(["male", "female", "unknown"], n, p=[0.48, 0.48, 0.04]),
         "birth": day("1930-01-01", 25_000, n), "death": day("2012-01-01", 3_600, n)}
    )  # fmt: skip
    people.loc[rng.random(n) < 0.8, "death"] = pd.NaT
    periods = []
    for i in ids:
        start = pd.Timestamp("2008-01-01") + pd.Timedelta(int(rng.integers(0, 1_200)), "D")
        for _ in range(rng.integers(0, 4)):  # some are never observed; gaps of 0 to 120 days between periods
            end = start + pd.Timedelta(int(rng.integers(100, 1_800)), "D")
            periods.append((i, start, end))
            start = end + pd.Timedelta(int(rng.choice([1, 2, 31, 32, 120])), "D")

    def records(codes: list[str], mean: float) -> pd.DataFrame:
        rows = []
        for i in ids:
            some = pd.Timestamp("2008-01-01") + pd.to_timedelta(rng.integers(0, 4_900, 3), "D")
            for _ in range(rng.poisson(mean)):
                on = (
                    some[rng.integers(3)]
                    if rng.random() < 0.6
                    else pd.Timestamp("2008-01-01") + pd.Timedelta(int(rng.integers(0, 4_900)), "D")
                )
                rows.append((i, str(rng.choice(codes)), on))
        rows += [(ids[0], codes[0], people.birth[0] - pd.Timedelta(1, "D"))]  # before birth
        return pd.DataFrame(rows, columns=["id", "code", "day"])

    conditions = records([DIABETES, OTHER_DIABETES, ASTHMA, LUNG, "Z00.0"], 3.0)
    drugs = records([METFORMIN, "C09AA01"], 1.5)
    values = records([HBA1C, WEIGHT], 2.0)
    values["value"] = np.round(rng.normal(60, 12, len(values)), 1)
    values["unit"] = np.where(
        values.code == HBA1C, rng.choice(["%", "mmol/mol"], len(values)), rng.choice(["kg", "[lb_av]"], len(values))
    )
    columns = ["id", "first", "last"]
    return Facts(people, pd.DataFrame(periods, columns=columns), conditions, drugs, values, rng)


def omop_frames(given: Facts) -> dict[str, pd.DataFrame]:
    """The CDM tables; person_id is a number, the hospital's own id is person_source_value."""
    number = {i: 10 + int(i) for i in given.people.id}
    people = given.people
    iso = lambda column: column.dt.strftime("%Y-%m-%d")  # noqa: E731

    def records(frame: pd.DataFrame, domain: str, vocabulary: str, day: str) -> pd.DataFrame:
        concept = frame.code.map(lambda code: CONCEPTS[vocabulary, code])
        source = given.rng.random(len(frame)) < 0.5  # the set's concept is the standard one, or the source's
        return pd.DataFrame(
            {
                f"{domain}_id": np.arange(len(frame)), "person_id": frame.id.map(number).to_numpy(),
                f"{domain.split('_')[0]}_concept_id": np.where(source, 77, concept), day: iso(frame.day).to_numpy(),
                f"{domain.split('_')[0]}_source_concept_id": np.where(source, concept, 0),
            }
        )  # fmt: skip

    dead = people[people.death.notna()]
    measurement = records(given.values, "measurement", "LOINC", "measurement_date")
    measurement["value_as_number"] = given.values.value.to_numpy()
    measurement["unit_concept_id"] = [CONCEPTS.get(("UCUM", u), 0) for u in given.values.unit]
    measurement["unit_source_value"] = given.values.unit.to_numpy()
    measurement["operator_concept_id"] = 0
    condition = records(given.conditions, "condition_occurrence", "ICD10CM", "condition_start_date")
    nothing = condition.iloc[:7].assign(condition_concept_id=0, condition_source_concept_id=0)
    stranger = condition.iloc[:3].assign(person_id=999_999_999)  # a record of nobody
    return {
        "person": pd.DataFrame(
            {"person_id": people.id.map(number),
             "gender_concept_id": people.sex.map({"male": 8507, "female": 8532, "unknown": 0}),
             "year_of_birth": people.birth.dt.year, "month_of_birth": people.birth.dt.month,
             "day_of_birth": people.birth.dt.day, "person_source_value": people.id}
        ),
        "observation_period": pd.DataFrame(
            {"person_id": given.periods.id.map(number), "observation_period_start_date": iso(given.periods["first"]),
             "observation_period_end_date": iso(given.periods["last"])}
        ),
        "death": pd.DataFrame({"person_id": dead.id.map(number), "death_date": iso(dead.death)}),
        "condition_occurrence": pd.concat([condition, nothing, stranger]),
        "drug_exposure": records(given.drugs, "drug_exposure", "ATC", "drug_exposure_start_date"),
        "measurement": measurement,
        "concept": pd.DataFrame(
            [(c, code, v) for (v, code), c in CONCEPTS.items()], columns=["concept_id", "concept_code", "vocabulary_id"]
        ),
        "concept_ancestor": pd.DataFrame(
            {"ancestor_concept_id": [5, 5, 5], "descendant_concept_id": [5, 1_003, 1_004]}
        ),
    }  # fmt: skip


def fhir_resources(given: Facts) -> list[dict[str, Any]]:
    """Resources, in an order that is nobody's; the hospital's own id is an identifier, Patient.id another."""
    rng = given.rng
    key = {i: f"pt-{int(i) * 7}" for i in given.people.id}
    out: list[dict[str, Any]] = []
    for p in given.people.itertuples():
        patient = {
            "resourceType": "Patient", "id": key[p.id], "gender": p.sex, "birthDate": f"{p.birth:%Y-%m-%d}",
            "identifier": [{"system": "urn:other", "value": "x"}, {"system": "urn:hospital", "value": p.id}],
        }  # fmt: skip
        if not pd.isna(p.death):
            patient["deceasedDateTime"] = f"{p.death:%Y-%m-%d}T04:00:00+09:00"  # the day before in UTC
        out.append(patient)

    def reference(i: str) -> dict[str, str]:
        return {
            "reference": rng.choice(
                [f"Patient/{key[i]}", f"https://example.org/fhir/Patient/{key[i]}", f"Patient/{key[i]}/_history/3"]
            )
        }

    def when(day: pd.Timestamp) -> str:
        return str(
            rng.choice(
                [f"{day:%Y-%m-%d}", f"{day:%Y-%m-%d}T23:30:00-05:00", f"{day:%Y-%m-%d}T00:10:00.123+11:00",
                 f"{day:%Y-%m-%d}T12:00:00Z"]
            )
        )  # fmt: skip

    def concept(vocabulary: str, code: str) -> dict[str, Any]:
        local = {"system": "urn:local", "code": "17"}
        right = {"system": SYSTEM[vocabulary], "code": code}
        return {"coding": [local, right] if rng.random() < 0.3 else [right]}

    for n, c in enumerate(given.conditions.itertuples()):
        condition = {
            "resourceType": "Condition", "id": f"c{n}", "subject": reference(c.id), "code": concept("ICD10CM", c.code),
            "verificationStatus": {"coding": [{"code": "confirmed"}]},
        }  # fmt: skip
        shape = rng.integers(3)
        if shape == 0:
            condition["onsetDateTime"] = when(c.day)
        elif shape == 1:
            condition["onsetPeriod"] = {"start": when(c.day)}
        else:  # an onset known to the year only: the day it was recorded is the day
            condition |= {"onsetDateTime": str(c.day.year), "recordedDate": when(c.day)}
        out.append(condition)
        if n % 9 == 0:
            out.append(
                condition
                | {"id": f"e{n}", "recordedDate": "2013-03-03", "onsetDateTime": "2013-03-03",
                   "verificationStatus": {"coding": [{"code": ["entered-in-error", "refuted"][n % 2]}]}}
            )  # fmt: skip
        if n % 11 == 0:
            out.append(condition)  # the same resource in two files
    for n, d in enumerate(given.drugs.itertuples()):
        if n % 2:
            drug = {"resourceType": "MedicationRequest", "authoredOn": when(d.day), "status": "active"}
        else:
            drug = {"resourceType": "MedicationStatement", "effectiveDateTime": when(d.day), "status": "completed"}
        drug |= {"id": f"d{n}", "subject": reference(d.id)}
        how = rng.integers(3)
        if how == 0:
            drug["medicationCodeableConcept"] = concept("ATC", d.code)
        elif how == 1:
            drug["contained"] = [{"resourceType": "Medication", "id": "m", "code": concept("ATC", d.code)}]
            drug["medicationReference"] = {"reference": "#m"}
        else:
            drug["medicationReference"] = {"reference": f"Medication/{d.code}"}
        out.append(drug)
        if n % 7 == 0:
            wrong = ["draft", "cancelled", "entered-in-error"][n % 3] if n % 2 else "not-taken"
            out.append(drug | {"id": f"x{n}", "status": wrong, "authoredOn": "2013-03-03"})
    for code in given.drugs.code.unique():
        out.append({"resourceType": "Medication", "id": code, "code": concept("ATC", code)})
    for n, v in enumerate(given.values.itertuples()):
        number = {"value": v.value, "system": "http://unitsofmeasure.org", "code": v.unit}
        value = {
            "resourceType": "Observation", "id": f"o{n}", "status": "final", "subject": reference(v.id),
            "effectiveDateTime": when(v.day),
        }  # fmt: skip
        if n % 3:
            value |= {"code": concept("LOINC", v.code), "valueQuantity": number}
        else:
            value |= {
                "code": {"coding": [{"system": SYSTEM["LOINC"], "code": "panel"}]},
                "component": [{"code": concept("LOINC", v.code), "valueQuantity": number}],
            }
        out.append(value)
        if n % 8 == 0:
            out.append(value | {"id": f"q{n}", "status": "entered-in-error"})
    first = given.people.id[0]
    out.append({"resourceType": "Condition", "id": "no", "subject": {"reference": "Patient/nobody"}})
    out.append({"resourceType": "Condition", "id": "day", "subject": reference(first), "onsetDateTime": "2014-05",
                "code": concept("ICD10CM", DIABETES)})  # fmt: skip
    rng.shuffle(out)
    return out


def as_ndjson(folder: Path, resources: list[dict[str, Any]]) -> None:
    """Bulk export: a file for each kind, one of them compressed, with blank lines."""
    folder.mkdir()
    by_kind: dict[str, list[str]] = {}
    for resource in resources:
        by_kind.setdefault(resource["resourceType"], []).append(json.dumps(resource))
    for kind, lines in by_kind.items():
        text = "\n\n".join(lines) + "\n"
        if kind == "Observation":
            (folder / f"{kind}.ndjson.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / f"{kind}.ndjson").write_text(text, "utf-8")


def as_bundles(folder: Path, resources: list[dict[str, Any]]) -> None:
    """Bundles of 500 entries; patients are named by the URN of their entry in references too."""
    folder.mkdir()
    entries = []
    urn = {}
    for resource in resources:
        if resource["resourceType"] == "Patient":
            urn[resource["id"]] = f"urn:uuid:{resource['id']}"
    for resource in resources:
        resource = json.loads(json.dumps(resource))
        said = resource.get("subject", {}).get("reference", "").split("/_history")[0].split("/")[-1]
        if said in urn and int(said[3:]) % 2:
            resource["subject"]["reference"] = urn[said]
        entries.append({"fullUrl": urn.get(resource.get("id"), ""), "resource": resource})
    for start in range(0, len(entries), 500):
        bundle = {"resourceType": "Bundle", "type": "collection", "entry": entries[start : start + 500]}
        (folder / f"bundle{start:06d}.json").write_text(json.dumps(bundle), "utf-8")
