"""Cohorts from generated OMOP and FHIR records equal an answer worked out in plain pandas from the same facts."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pytest

from phenotypes.generated import (
    ASTHMA,
    DIABETES,
    HBA1C,
    LUNG,
    METFORMIN,
    OTHER_DIABETES,
    Facts,
    as_bundles,
    as_ndjson,
    facts,
    fhir_resources,
    omop_frames,
)
from sequester.client.ingest.phenotypes.produce import Wish, produce
from sequester.protocols.definition import Definition, definition_of

SETS = {
    "diabetes": {
        "domain": "condition",
        "lists": [{"vocabulary": "ICD10CM", "codes": ["E11"], "descendants": True}],
    },
    "lung": {"domain": "condition", "lists": [{"vocabulary": "ICD10CM", "codes": ["J450", "J44.1"]}]},
    "metformin": {"domain": "drug", "lists": [{"vocabulary": "ATC", "codes": ["A10B"], "descendants": True}]},
    "hba1c": {"domain": "measurement", "lists": [{"vocabulary": "LOINC", "codes": [HBA1C]}]},
}
CODES = {"diabetes": {DIABETES, OTHER_DIABETES}, "lung": {ASTHMA, LUNG}, "metformin": {METFORMIN}, "hba1c": {HBA1C}}
COLUMNS = [
    {"kind": "age"},
    {"kind": "sex"},
    {"kind": "case", "name": "t2d", "set": "diabetes", "exclusion": "lung", "window": {"to_days": 1500}},
    {"kind": "has", "name": "drug", "set": "metformin", "window": {"from_days": -365, "to_days": 0}},
    {"kind": "count", "name": "visits", "set": "lung"},
    {"kind": "value", "name": "hba1c", "set": "hba1c", "units": {"%": "1", "mmol/mol": "0.0915"}, "window": {"from_days": -700}},
    {"kind": "value", "name": "highest", "set": "hba1c", "pick": "maximum", "units": {"%": "1"}},
    {"kind": "time", "name": "years", "event": "lung_event", "set": "lung"},
    {"kind": "time", "name": "days", "event": "died", "set": "death", "unit": "days"},
]  # fmt: skip
DATED = definition_of(
    {"sets": SETS, "index": {"kind": "date", "date": "2013-06-01"}, "until": "2020-12-31",
     "observed": {"before_days": 200, "after_days": 100, "maximum_gap_days": 31},
     "criteria": [{"name": "no lung disease in the year before", "set": "lung", "wanted": False,
                   "window": {"from_days": -365, "to_days": -1}}], "columns": COLUMNS}
)  # fmt: skip
FROM_SECOND_CODE = definition_of(
    {"sets": SETS, "index": {"kind": "first", "set": "diabetes", "minimum_dates": 2}, "columns": COLUMNS}
)
FROM_ENTRY = definition_of({"sets": SETS, "index": {"kind": "entry"}, "until": "2017-01-01", "columns": COLUMNS})


def plain(given: Facts, periods: pd.DataFrame, definition: Definition) -> tuple[pd.DataFrame, list[int]]:
    """The answer: table, and the number of people after each step. Written with frames, apart from the product."""
    last = pd.Timestamp(definition.until or "2200-01-01")
    people = given.people.set_index("id").sort_index()
    people["death"] = people.death.where(people.death <= last)
    stop = people.death.fillna(last).clip(upper=last)
    spans = periods.assign(last=[min(b, stop[i]) for i, b in zip(periods.id, periods["last"], strict=True)])
    spans = spans[spans["last"] >= spans["first"]].sort_values(["id", "first"])
    gap = pd.Timedelta(definition.observed.maximum_gap_days + 1, "D")
    new = (spans["first"] - spans.groupby("id")["last"].transform(lambda s: s.cummax().shift())) > gap
    new |= spans.id != spans.id.shift()
    spans = spans.assign(run=new.cumsum()).groupby(["id", "run"], as_index=False).agg({"first": "min", "last": "max"})

    facts_of: dict[str, pd.DataFrame] = {}
    for name, frame in (("diabetes", given.conditions), ("lung", given.conditions), ("metformin", given.drugs),
                        ("hba1c", given.values)):  # fmt: skip
        found = frame[frame.code.isin(CODES[name])].copy()
        found = found[(found.day >= found.id.map(people.birth)) & (found.day <= found.id.map(stop))]
        both = found.reset_index().merge(spans, on="id")
        inside = both[(both.day >= both["first"]) & (both.day <= both["last"])]["index"].unique()
        facts_of[name] = found.loc[sorted(inside)]

    index = definition.index
    if index.kind == "date":
        zero = pd.Series(pd.Timestamp(index.date), people.index)
        zero = zero[~(people.death < zero)]
    elif index.kind == "entry":
        zero = spans.groupby("id")["first"].min()
    else:
        days = facts_of[index.set or ""].drop_duplicates(["id", "day"]).sort_values("day")
        zero = days[days.groupby("id").cumcount() == index.minimum_dates - 1].set_index("id").day
    steps = [len(people), len(zero)]
    holding = spans[spans.id.isin(zero.index)]
    holding = holding[(holding["first"] <= holding.id.map(zero)) & (holding.id.map(zero) <= holding["last"])].set_index(
        "id"
    )
    steps.append(len(holding))
    if definition.observed.before_days:
        holding = holding[(zero[holding.index] - holding["first"]).dt.days >= definition.observed.before_days]
        steps.append(len(holding))
    if definition.observed.after_days:
        enough = (holding["last"] - zero[holding.index]).dt.days >= definition.observed.after_days
        holding = holding[enough | (people.death[holding.index] == holding["last"])]
        steps.append(len(holding))

    def within(name: str, low: int | None, high: int | None) -> pd.DataFrame:
        frame = facts_of[name]
        frame = frame[frame.id.isin(holding.index)]
        offset = (frame.day - frame.id.map(zero)).dt.days
        return frame[((low is None) | (offset >= (low or 0))) & ((high is None) | (offset <= (high or 0)))]

    for criterion in definition.criteria:
        dates = within(criterion.set, criterion.window.from_days, criterion.window.to_days).groupby("id").day.nunique()
        hit = dates.reindex(holding.index, fill_value=0) >= criterion.minimum_dates
        holding = holding[hit == criterion.wanted]
        steps.append(len(holding))

    holding = holding.sort_index()
    out = pd.DataFrame(index=holding.index)
    out["age"] = ((zero[out.index] - people.birth[out.index]).dt.days / 365.25).map("{:.2f}".format)
    out.loc[people.birth[out.index] > zero[out.index], "age"] = ""
    out["sex"] = people.sex[out.index].replace("unknown", "")
    dates = within("diabetes", None, 1500).groupby("id").day.nunique().reindex(out.index, fill_value=0)
    around = within("lung", None, 1500).groupby("id").day.nunique().reindex(out.index, fill_value=0)
    out["t2d"] = ""
    out.loc[dates >= 2, "t2d"] = "1"
    out.loc[(dates == 0) & (around == 0), "t2d"] = "0"
    out["drug"] = out.index.isin(within("metformin", -365, 0).id).astype(int).astype(str)
    out["visits"] = within("lung", None, None).groupby("id").day.nunique().reindex(out.index, fill_value=0).astype(str)
    tests = within("hba1c", -700, None)
    tests = tests.assign(value=tests.value * tests.unit.map({"%": 1.0, "mmol/mol": 0.0915}))
    out["hba1c"] = tests.groupby(["id", "day"]).value.mean().reset_index().sort_values("day").groupby("id").value.last()
    percents = within("hba1c", None, None)
    out["highest"] = percents[percents.unit == "%"].groupby("id").value.max()
    first = within("lung", None, None).groupby("id").day.min().reindex(out.index)
    happened = (first <= holding["last"]) & (first > zero[out.index])
    length = (first.where(happened, holding["last"]) - zero[out.index]).dt.days
    before = first <= zero[out.index]
    out["years"] = (length / 365.25).where(~before)
    out["lung_event"] = happened.astype(int).astype(str).mask(before, "")
    death = people.death[out.index]
    died = death <= holding["last"]
    out["days"] = (death.where(died, holding["last"]) - zero[out.index]).dt.days.astype(str)
    out["died"] = died.astype(int).astype(str)
    return out, steps


def check(out: Path, account: dict[str, Any], wanted: pd.DataFrame, steps: list[int]) -> None:
    table = pl.read_parquet(out)
    assert [count for _, count in account["flow"]] == steps
    assert table["patient"].to_list() == list(wanted.index)
    for name in wanted.columns:
        cells = table[name].to_list()
        if name in ("hba1c", "highest", "years"):  # printed to 10 and 6 digits
            numbers = [float(c) if c else float("nan") for c in cells]
            assert numbers == pytest.approx(wanted[name].tolist(), rel=5e-6, abs=5e-6, nan_ok=True), name
        else:
            assert cells == wanted[name].tolist(), name
    assert out.stat().st_mode & 0o077 == 0
    assert json.loads(out.with_name(out.name + ".flow.json").read_text())["flow"] == account["flow"]


def observed_in_fhir(given: Facts) -> pd.DataFrame:
    """First to last dated record of each patient: what FHIR has instead of observation periods."""
    every = pd.concat([f[["id", "day"]] for f in (given.conditions, given.drugs, given.values)])
    return every.groupby("id").day.agg(first="min", last="max").reset_index()


@pytest.mark.slow
@pytest.mark.parametrize("definition", [DATED, FROM_SECOND_CODE, FROM_ENTRY], ids=["date", "second code", "entry"])
@pytest.mark.parametrize("kind", ["csv", "parquet", "sqlite"])
def test_a_cohort_from_omop_equals_plain_pandas(tmp_path: Path, definition: Definition, kind: str) -> None:
    given = facts(1, 1_200)
    folder = tmp_path / "cdm"
    folder.mkdir()
    frames = omop_frames(given)
    source = f"omop:{folder}"
    if kind == "sqlite":
        with sqlite3.connect(tmp_path / "cdm.db") as database:
            for name, frame in frames.items():
                frame.to_sql(name.upper(), database, index=False)
        database.close()
        source = f"omop:sqlite:///{tmp_path / 'cdm.db'}"
    for name, frame in frames.items():
        if kind == "csv":
            frame.to_csv(folder / f"{name.upper()}.csv", index=False)
        elif kind == "parquet":
            pl.DataFrame({c: frame[c].to_list() for c in frame.columns}).write_parquet(folder / f"{name}.parquet")
    out = tmp_path / "out.parquet"
    account = produce(Wish(source, out, definition, "person_source_value"), "patient")
    wanted, steps = plain(given, given.periods, definition)
    check(out, account, wanted, steps)
    assert len(wanted) > 30 and {"0", "1"} <= set(wanted.died)
    assert set(wanted.t2d) == ({"1"} if definition is FROM_SECOND_CODE else {"", "0", "1"})
    assert account["unmapped"] == {"condition_occurrence: concept 0": 7}
    if kind == "sqlite":
        assert not list(tmp_path.glob("cdm.db-*"))  # opened read-only: no journal beside it


@pytest.mark.parametrize("definition", [DATED, FROM_SECOND_CODE, FROM_ENTRY], ids=["date", "second code", "entry"])
@pytest.mark.parametrize("write", [as_ndjson, as_bundles], ids=["ndjson", "bundles"])
def test_a_cohort_from_fhir_equals_plain_pandas(tmp_path: Path, definition: Definition, write: Any) -> None:
    given = facts(2)
    resources = fhir_resources(given)
    write(tmp_path / "fhir", resources)
    out = tmp_path / "out.parquet"
    account = produce(Wish(f"fhir:{tmp_path / 'fhir'}", out, definition, "urn:hospital"), "patient")
    wanted, steps = plain(given, observed_in_fhir(given), definition)
    check(out, account, wanted, steps)
    assert len(wanted) > 40
    assert set(wanted.t2d) == ({"1"} if definition is FROM_SECOND_CODE else {"", "0", "1"})
    wrong = [r["id"][0] for r in resources if r["id"][0] in "exq" and r["resourceType"] != "Patient"]
    skipped = sum(n for reason, n in account["left_out"].items() if reason.split(" ")[-1] in
                  ("entered-in-error", "refuted", "draft", "cancelled", "not-taken"))  # fmt: skip
    assert skipped == len(wrong) > 0
    assert account["left_out"]["Condition of nobody among the patients"] == 1
    assert account["left_out"]["Condition without a day"] == 1
    local = sum(json.dumps(r).count("urn:local") for r in {(r["resourceType"], r["id"]): r for r in resources}.values()
                if r["resourceType"] != "Medication" and r["id"][0] not in "exq" and r["id"] != "day")  # fmt: skip
    by_reference = {r["id"]: json.dumps(r).count("urn:local") for r in resources if r["resourceType"] == "Medication"}
    local += sum(
        by_reference[r["medicationReference"]["reference"].split("/")[1]]
        for r in resources
        if r["id"][0] == "d" and r.get("medicationReference", {}).get("reference", "#").startswith("Medication/")
    )
    assert account["unmapped"] == {"urn:local": local}
