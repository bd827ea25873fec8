"""OMOP CDM 5.4: the tables a cohort needs, from a folder of CSV, TSV or Parquet files or a database that is only read.

Read by the operator-run ingest process, which holds no consortium key. A concept set's descendants come from the site's
own `concept_ancestor`; codes of other vocabularies are found through its `concept` table. Where a record has a standard
and a source concept, either may be of the set.
Source: https://ohdsi.github.io/CommonDataModel/cdm54.html
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Protocol

from sequester.client.ingest.phenotypes.definitions import Codes, Expanded, is_hierarchical, spelled
from sequester.client.ingest.phenotypes.records import Event, Person, Records, day_of
from sequester.protocols.definition import Domain
from sequester.protocols.errors import SiteError

MALE, FEMALE = "8507", "8532"
EQUALS = ("", "0", "4172703")  # operator_concept_id of a number that is meant as it stands
Row = tuple[int, dict[str, str]]  # number of the row, and its cells


@dataclass(frozen=True, slots=True)
class _Table:
    """A table of records: its columns by role."""

    name: str
    key: str
    concept: str
    source_concept: str
    day: str


RECORDS: dict[Domain, _Table] = {
    "condition": _Table(
        "condition_occurrence", "condition_occurrence_id", "condition_concept_id", "condition_source_concept_id",
        "condition_start_date",
    ),
    "drug": _Table(
        "drug_exposure", "drug_exposure_id", "drug_concept_id", "drug_source_concept_id", "drug_exposure_start_date"
    ),
    "measurement": _Table(
        "measurement", "measurement_id", "measurement_concept_id", "measurement_source_concept_id", "measurement_date"
    ),
}  # fmt: skip
_VALUE = ("value_as_number", "unit_concept_id", "unit_source_value", "operator_concept_id")


class Tables(Protocol):
    """The tables of one CDM. Cells are text, empty where NULL; column names are lower case."""

    def has(self, table: str) -> bool:
        """Whether there is such a table."""

    def rows(
        self, table: str, columns: Sequence[str], optional: Sequence[str] = (), among: dict[str, set[str]] | None = None
    ) -> Iterator[Row]:
        """Rows; with `among`, those where one of its columns has one of its values."""

    def place(self, table: str, number: int) -> str:
        """Where a row is, in words."""


class Omop:
    """A `Source` over OMOP tables. `id_column`: the column of `person` that is the patient's id elsewhere."""

    def __init__(self, tables: Tables, id_column: str = "person_id") -> None:
        self._tables, self._id_column = tables, id_column

    def read(self, expanded: Expanded) -> Records:
        """People, observation periods, deaths, and the records of the definition's sets."""
        records = Records()
        name_of = self._people(records)
        for number, row in self._tables.rows(
            "observation_period", ("person_id", "observation_period_start_date", "observation_period_end_date")
        ):
            person = records.people.get(name_of.get(row["person_id"], ""))
            first = self._day("observation_period", number, row["observation_period_start_date"])
            last = self._day("observation_period", number, row["observation_period_end_date"])
            if person is None:
                records.left_out["observation period of nobody in person"] += 1
            elif first is None or last is None or last < first:
                records.left_out["observation period without two dates in order"] += 1
            else:
                person.periods.append((first, last))
        if self._tables.has("death"):
            for number, row in self._tables.rows("death", ("person_id", "death_date")):
                person = records.people.get(name_of.get(row["person_id"], ""))
                if person is None:
                    records.left_out["death of nobody in person"] += 1
                else:
                    person.death = self._day("death", number, row["death_date"])
        for domain in RECORDS:
            sets = {name: codes for name, codes in expanded.sets.items() if codes.domain == domain}
            if sets:
                self._records(domain, sets, name_of, records)
        return records

    def _people(self, records: Records) -> dict[str, str]:
        """Fill `people`; the patient's id of each person_id."""
        optional = ("month_of_birth", "day_of_birth", "birth_datetime")
        columns = tuple(dict.fromkeys(("person_id", "gender_concept_id", "year_of_birth", self._id_column)))
        seen: dict[str, int] = {}
        name_of: dict[str, str] = {}
        for number, row in self._tables.rows("person", columns, optional):
            name = row[self._id_column].strip()
            if not name:
                raise SiteError(
                    f"{self._tables.place('person', number)} has no {self._id_column}", hint="every patient has an id"
                )
            if name in seen:
                raise SiteError(
                    f"{self._tables.place('person', seen[name])} and {number} are the same patient",
                    hint="one row a patient: merge them in `person` before",
                )
            seen[name] = number
            name_of[row["person_id"]] = name
            sex = {MALE: "male", FEMALE: "female"}.get(row["gender_concept_id"], "")
            records.people[name] = Person(sex=sex, birth=self._birth(number, row))
        return name_of

    def _birth(self, number: int, row: dict[str, str]) -> date | None:
        if row.get("birth_datetime") and (found := self._day("person", number, row["birth_datetime"])):
            return found
        if not row["year_of_birth"]:
            return None
        try:
            month = int(float(row.get("month_of_birth") or 0))
            if not month:
                return date(int(float(row["year_of_birth"])), 7, 1)
            return date(int(float(row["year_of_birth"])), month, int(float(row.get("day_of_birth") or 15)))
        except ValueError:
            raise SiteError(f"{self._tables.place('person', number)}: the birth date is not a date") from None

    def _records(self, domain: Domain, sets: dict[str, Codes], name_of: dict[str, str], records: Records) -> None:
        table = RECORDS[domain]
        sets_of: dict[str, list[str]] = {}
        for name, codes in sets.items():
            for concept in self._concepts(name, codes):
                sets_of.setdefault(concept, []).append(name)
        columns = ("person_id", table.concept, table.day)
        optional: tuple[str, ...] = (table.source_concept,)
        units: dict[str, str] = {}
        if domain == "measurement":
            optional = (*optional, *_VALUE)
            units = self._units()
        wanted = set(sets_of)
        for number, row in self._tables.rows(
            table.name, columns, optional, {table.concept: wanted, table.source_concept: wanted}
        ):
            person = name_of.get(row["person_id"])
            day = self._day(table.name, number, row[table.day])
            if person is None:
                records.left_out[f"{domain} of nobody in person"] += 1
                continue
            if day is None:
                records.left_out[f"{domain} without a date"] += 1
                continue
            names = {*sets_of.get(row[table.concept], ()), *sets_of.get(row.get(table.source_concept, ""), ())}
            event = Event(day)
            if domain == "measurement":
                event = self._measured(table, number, row, units, day, records)
            for name in names:
                records.add(name, person, event)
        none = {"0", ""}
        for _, row in self._tables.rows(table.name, (table.concept,), (table.source_concept,), {table.concept: {"0"}}):
            if row.get(table.source_concept, "") in none:
                records.unmapped[f"{table.name}: concept 0"] += 1

    def _measured(
        self, table: _Table, number: int, row: dict[str, str], units: dict[str, str], day: date, records: Records
    ) -> Event:
        text = row.get("value_as_number", "")
        if not text:
            return Event(day)
        if row.get("operator_concept_id", "") not in EQUALS:
            records.left_out["measurement with a sign such as <"] += 1
            return Event(day)
        try:
            value = float(text)
            if not math.isfinite(value):
                raise ValueError("not a number")
        except ValueError:
            raise SiteError(f"{self._tables.place(table.name, number)}: value_as_number is not a number") from None
        unit = units.get(row.get("unit_concept_id", ""), row.get("unit_source_value", ""))
        return Event(day, value, unit)

    def _units(self) -> dict[str, str]:
        if not self._tables.has("concept"):
            return {}
        rows = self._tables.rows(
            "concept", ("concept_id", "concept_code", "vocabulary_id"), among={"vocabulary_id": {"UCUM"}}
        )
        return {row["concept_id"]: row["concept_code"] for _, row in rows}

    def _concepts(self, name: str, codes: Codes) -> set[str]:
        """Concept ids of a set, descendants in."""
        found: set[str] = set()
        for listed in codes.lists:
            by_prefix = listed.descendants and is_hierarchical(listed.vocabulary)
            if listed.vocabulary.upper() == "OMOP":
                ids = {code.strip() for code in listed.codes}
                if not all(code.isdigit() for code in ids):
                    raise SiteError(f"the set {name} has an OMOP concept id that is not a number")
            else:
                ids = self._ids(name, listed.vocabulary, listed.codes, by_prefix)
            if listed.descendants and not by_prefix:
                ids |= self._below(name, ids)
            found |= ids
        return found

    def _ids(self, name: str, vocabulary: str, codes: Iterable[str], by_prefix: bool) -> set[str]:
        if not self._tables.has("concept"):
            raise SiteError(
                f"the set {name} names {vocabulary} codes and there is no table `concept`",
                hint="put `concept` beside the other tables, or let the definition name OMOP concept ids",
            )
        wanted = {spelled(vocabulary, code) for code in codes}
        prefixes = tuple(wanted)
        found = set()
        for _, row in self._tables.rows(
            "concept", ("concept_id", "concept_code", "vocabulary_id"), among={"vocabulary_id": {vocabulary}}
        ):
            code = spelled(vocabulary, row["concept_code"])
            if code in wanted or (by_prefix and code.startswith(prefixes)):
                found.add(row["concept_id"])
        if not found:
            raise SiteError(
                f"no {vocabulary} code of the set {name} is in the table `concept`",
                hint="is the vocabulary loaded, and called so there?",
            )
        return found

    def _below(self, name: str, ids: set[str]) -> set[str]:
        if not self._tables.has("concept_ancestor"):
            raise SiteError(
                f"the set {name} asks for descendants and there is no table `concept_ancestor`",
                hint="put it beside the other tables; nothing is guessed from names",
            )
        rows = self._tables.rows(
            "concept_ancestor", ("ancestor_concept_id", "descendant_concept_id"), among={"ancestor_concept_id": ids}
        )
        return {row["descendant_concept_id"] for _, row in rows}

    def _day(self, table: str, number: int, value: str) -> date | None:
        try:
            return day_of(value)
        except ValueError:
            raise SiteError(
                f"{self._tables.place(table, number)}: a field that is not a date", hint="dates are YYYY-MM-DD"
            ) from None
