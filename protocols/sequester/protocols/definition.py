"""How a hospital's records become one row per patient: code lists, minimum counts, windows and an index date, as JSON.

A definition travels in the signed study, or lies in a file of the site. It names public codes and rules only; what it finds
is computed and kept at the hospital. All windows are in days from the index date, both ends counted. Dates are calendar
days as the record wrote them: a time zone never moves a record to another day.
"""

from __future__ import annotations

import re
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from sequester.protocols.errors import StudyError
from sequester.protocols.signing import canonical, sha256

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,63}$")]
Vocabulary = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,31}$")]
Code = Annotated[str, StringConstraints(pattern=r"^[!-~]{1,64}$")]
Phecode = Annotated[str, StringConstraints(pattern=r"^([A-Z]{2}_)?[0-9]{1,4}(\.[0-9]{1,4})?$")]
Days = Annotated[int, Field(ge=-50_000, le=50_000)]
Domain = Literal["condition", "drug", "measurement"]
DEATH = "death"  # may stand where a time column names its set


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _day(value: object) -> object:
    if isinstance(value, str) and not re.fullmatch(r"\d{4}-\d{2}-\d{2}", value):
        raise ValueError("a date is written YYYY-MM-DD")
    return value


class CodeList(_Strict):
    """Codes of one vocabulary. `descendants` adds what lies below them: by prefix where codes are built so (ICD, ATC),
    by the site's `concept_ancestor` for all others. Vocabulary OMOP means concept ids."""

    vocabulary: Vocabulary
    codes: tuple[Code, ...] = Field(min_length=1, max_length=100_000)
    descendants: bool = False


class CodeSet(_Strict):
    """What counts as one thing: code lists of one domain, or a phecode of the public map whose SHA-256 is given."""

    domain: Domain
    lists: tuple[CodeList, ...] = ()
    phecode: Phecode | None = None
    map_sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> CodeSet:
        if bool(self.lists) == (self.phecode is not None):
            raise ValueError("a set is code lists or a phecode, one of the two")
        if self.phecode is not None and self.domain != "condition":
            raise ValueError("a phecode is of domain condition")
        return self


class Window(_Strict):
    """Days from the index date, both ends counted; None is open."""

    from_days: Days | None = None
    to_days: Days | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> Window:
        if self.from_days is not None and self.to_days is not None and self.from_days > self.to_days:
            raise ValueError("a window ends before it begins")
        return self


WHOLE = Window()


class Index(_Strict):
    """Day zero: a calendar date, the first observed day, or the day a set was coded for the `minimum_dates`-th time."""

    kind: Literal["date", "entry", "first"]
    date: str | None = None
    set: Name | None = None
    minimum_dates: int = Field(default=1, ge=1, le=1000)

    @model_validator(mode="after")
    def _complete(self) -> Index:
        if (self.kind == "date") != (self.date is not None) or (self.kind == "first") != (self.set is not None):
            raise ValueError("an index of kind date has a date, one of kind first has a set, no other has either")
        if self.date is not None:
            date.fromisoformat(str(_day(self.date)))
        return self


class Observed(_Strict):
    """Who is observed long enough: periods less than `maximum_gap_days` apart are one; it must hold the index date."""

    before_days: int = Field(default=0, ge=0, le=50_000)
    after_days: int = Field(default=0, ge=0, le=50_000)
    maximum_gap_days: int = Field(default=0, ge=0, le=50_000)


class Criterion(_Strict):
    """One step of the flow chart: a set on at least `minimum_dates` dates of the window, or, not `wanted`, on fewer."""

    name: Annotated[str, StringConstraints(pattern=r"^[!-~][ -~]{0,79}$")]
    set: Name
    window: Window = WHOLE
    minimum_dates: int = Field(default=1, ge=1, le=1000)
    wanted: bool = True


class AgeColumn(_Strict):
    """Years at the index date, two decimals; of a birth date known to the year, the middle of that year is taken."""

    kind: Literal["age"]
    name: Name = "age"


class SexColumn(_Strict):
    """Administrative sex as one of two words; anything else is missing."""

    kind: Literal["sex"]
    name: Name = "sex"
    male: str = "male"
    female: str = "female"


class CaseColumn(_Strict):
    """1 on at least `minimum_dates` distinct dates; 0 with none, nor any of the exclusion set or range; else missing."""

    kind: Literal["case"]
    name: Name
    set: Name
    minimum_dates: int = Field(default=2, ge=1, le=1000)
    exclusion: Name | None = None
    window: Window = WHOLE


class HasColumn(_Strict):
    """1 on at least `minimum_dates` distinct dates, else 0."""

    kind: Literal["has"]
    name: Name
    set: Name
    minimum_dates: int = Field(default=1, ge=1, le=1000)
    window: Window = WHOLE


class CountColumn(_Strict):
    """Number of distinct dates."""

    kind: Literal["count"]
    name: Name
    set: Name
    window: Window = WHOLE


class ValueColumn(_Strict):
    """One number of a measurement. `units` maps each accepted unit to the factor that brings it to the column's unit.

    Several values of one day are their mean before `first` or `latest` is taken.
    """

    kind: Literal["value"]
    name: Name
    set: Name
    pick: Literal["latest", "first", "mean", "minimum", "maximum"] = "latest"
    units: dict[str, str] = Field(min_length=1)
    window: Window = WHOLE

    @model_validator(mode="after")
    def _factors(self) -> ValueColumn:
        for factor in self.units.values():
            if not re.fullmatch(r"\d+(\.\d+)?", factor) or float(factor) <= 0:
                raise ValueError("a unit's factor is a decimal number above 0, as text")
        return self


class TimeColumn(_Strict):
    """Follow-up from the index date to the first record of a set after it, or to death; censored where observation ends.

    Two columns: `name` in `unit`, and `event` 1 or 0. Who had it on or before the index date has neither.
    """

    kind: Literal["time"]
    name: Name
    event: Name
    set: Name
    unit: Literal["days", "years"] = "years"


Column = Annotated[
    AgeColumn | SexColumn | CaseColumn | HasColumn | CountColumn | ValueColumn | TimeColumn, Field(discriminator="kind")
]


class Definition(_Strict):
    """One row per patient: who belongs, from when, and what each column is. Records after `until` do not exist."""

    format: Literal[1] = 1
    title: str = ""
    sets: dict[Name, CodeSet]
    index: Index
    until: str | None = None
    observed: Observed = Observed()
    criteria: tuple[Criterion, ...] = ()
    columns: tuple[Column, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Definition:
        if self.until is not None:
            date.fromisoformat(str(_day(self.until)))
        named = [(f"criterion {c.name}", c.set) for c in self.criteria]
        names: list[str] = []
        for column in self.columns:
            names.append(column.name)
            for attribute in ("set", "exclusion"):
                if (used := getattr(column, attribute, None)) is not None:
                    named.append((f"column {column.name}", used))
            if isinstance(column, TimeColumn):
                names.append(column.event)
            if isinstance(column, ValueColumn) and (of := self.sets.get(column.set)) and of.domain != "measurement":
                raise ValueError(f"column {column.name} takes a value of {column.set}, which is not a measurement")
        if self.index.set is not None:
            named.append(("the index", self.index.set))
        times = {column.set for column in self.columns if isinstance(column, TimeColumn)}
        for who, used in named:
            if used not in self.sets and not (used == DEATH and used in times and who.startswith("column")):
                raise ValueError(f"{who} uses the set {used}, which is not defined")
        if len(set(names)) < len(names):
            raise ValueError("a column is named twice")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON: what a table says it was made by."""
        return sha256(canonical(self.model_dump(mode="json")))


def definition_of(value: Any) -> Definition:
    """The definition in a JSON value; `StudyError` names the first field that is wrong."""
    try:
        return Definition.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the definition"
        raise StudyError(
            f"the definition of the phenotypes: {where}: {first['msg']}", hint="client/README.md shows one"
        ) from None
