"""What every source of records gives: people, when they were observed, and the dated records that a definition asks for.

Nothing here is printed: only counts are, by the name of their reason.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Protocol

from sequester.client.ingest.phenotypes.definitions import Expanded


@dataclass(frozen=True, slots=True)
class Event:
    """One record of a set: its day, and of a measurement its number and unit."""

    day: date
    value: float | None = None
    unit: str = ""


@dataclass(slots=True)
class Person:
    """One patient. `periods`: first and last observed day of each, in any order. `sex`: male, female, or empty."""

    sex: str = ""
    birth: date | None = None
    death: date | None = None
    periods: list[tuple[date, date]] = field(default_factory=list)


@dataclass(slots=True)
class Records:
    """`events[set][person]`. `left_out`: records that do not count, by reason. `unmapped`: codings by their system."""

    people: dict[str, Person] = field(default_factory=dict)
    events: dict[str, dict[str, list[Event]]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    unmapped: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, person: str, event: Event) -> None:
        """One more record of a set."""
        self.events.setdefault(name, {}).setdefault(person, []).append(event)


class Source(Protocol):
    """A place that records are read from."""

    def read(self, expanded: Expanded) -> Records:
        """People, and the records of the definition's sets."""


def day_of(value: object) -> date | None:
    """The calendar day a field writes, None where it writes none or only a month or a year; `ValueError` for no date.

    >>> day_of("2020-03-01T23:30:00-05:00"), day_of("2020-03"), day_of(None)
    (datetime.date(2020, 3, 1), None, None)
    """
    if value is None or value == "":
        return None
    if isinstance(value, datetime):
        return value.date()
    if isinstance(value, date):
        return value
    text = str(value).strip()
    if not text:
        return None
    if len(text) in (4, 7):
        date.fromisoformat(text + "-01-01"[: 10 - len(text)] if len(text) == 4 else text + "-01")
        return None
    if len(text) > 10 and text[10] not in "T ":
        raise ValueError("not a date")
    return date.fromisoformat(text[:10])


def birth_of(text: str) -> date | None:
    """A birth date; of one known to the month its 15th, to the year 1 July.

    >>> birth_of("1950"), birth_of("1950-02"), birth_of("1950-02-03")
    (datetime.date(1950, 7, 1), datetime.date(1950, 2, 15), datetime.date(1950, 2, 3))
    """
    text = text.strip()
    if len(text) == 4:
        return date(int(text), 7, 1)
    if len(text) == 7:
        return date(int(text[:4]), int(text[5:]), 15)
    return day_of(text)
