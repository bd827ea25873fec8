"""From records to one row per patient, with the flow chart: how many people each step of the definition leaves.

In order: index date, observation, criteria, columns. Records outside every observation period, before birth, after death
or after the definition's last day do not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

from sequester.client.ingest.phenotypes.definitions import Expanded
from sequester.client.ingest.phenotypes.records import Event, Person, Records
from sequester.protocols.definition import (
    DEATH,
    AgeColumn,
    CaseColumn,
    Column,
    CountColumn,
    HasColumn,
    SexColumn,
    TimeColumn,
    ValueColumn,
    Window,
)
from sequester.protocols.errors import SiteError

YEAR = 365.25


@dataclass(frozen=True, slots=True)
class Derived:
    """`rows`: cells as text, the id first, empty where missing. `flow`: people left after each step, in order.

    `columns`: of each binary column, how many have 1, 0 and nothing.
    """

    names: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    flow: tuple[tuple[str, int], ...]
    columns: dict[str, dict[str, int]]
    left_out: dict[str, int]
    unmapped: dict[str, int]


@dataclass(slots=True)
class _Patient:
    """One patient while the steps are taken: events by set, those that count only, in order of day."""

    id: str
    person: Person
    periods: list[tuple[date, date]]
    events: dict[str, list[Event]]
    index: date = date.min
    end: date = date.max  # last observed day of the period that holds the index date


def derive(records: Records, expanded: Expanded, id_column: str) -> Derived:
    """The table of a definition; ids in order."""
    definition = expanded.definition
    left_out = Counter(records.left_out)
    patients = [_patient(name, records, expanded, left_out) for name in sorted(records.people)]
    flow = [("people in the source", len(patients))]

    def step(name: str, keep: Callable[[_Patient], bool]) -> None:
        nonlocal patients
        patients = [p for p in patients if keep(p)]
        flow.append((name, len(patients)))

    step("with an index date", lambda p: _set_index(p, expanded))
    step("observed on the index date", _set_period)
    observed = definition.observed
    if observed.before_days:
        step(
            f"observed for {observed.before_days} days before",
            lambda p: (p.index - _start(p)).days >= observed.before_days,
        )
    if observed.after_days:
        step(
            f"observed for {observed.after_days} days after, or until death",
            lambda p: (p.end - p.index).days >= observed.after_days or p.person.death == p.end,
        )
    for criterion in definition.criteria:
        step(
            criterion.name,
            lambda p, c=criterion: (  # type: ignore[misc]  # mypy does not infer a lambda with a default
                (len(_days(p, c.set, c.window)) >= c.minimum_dates) == c.wanted
            ),
        )
    names: list[str] = [id_column]
    for column in definition.columns:
        names += [column.name, column.event] if isinstance(column, TimeColumn) else [column.name]
    if len(set(names)) < len(names):
        raise SiteError(f"the definition has a column `{id_column}`, which is the id here", hint="rename `id_column`")
    rows = []
    for patient in patients:
        cells = [patient.id]
        for column in definition.columns:
            cells += _cells(patient, column, expanded, left_out)
        rows.append(tuple(cells))
    counted: dict[str, dict[str, int]] = {}
    for j, name in enumerate(names[1:], 1):
        values = Counter(row[j] for row in rows)
        if set(values) <= {"0", "1", ""}:
            counted[name] = {"1": values["1"], "0": values["0"], "missing": values[""]}
        else:
            counted[name] = {"present": len(rows) - values[""], "missing": values[""]}
    return Derived(
        tuple(names), tuple(rows), tuple(flow), counted, dict(sorted(left_out.items())),
        dict(sorted(records.unmapped.items())),
    )  # fmt: skip


def _patient(name: str, records: Records, expanded: Expanded, left_out: Counter[str]) -> _Patient:
    person = records.people[name]
    until = expanded.definition.until
    last = date.fromisoformat(until) if until else date.max
    if person.death is not None and person.death > last:  # nobody knew of it yet
        person = Person(person.sex, person.birth, None, person.periods)
    periods = _joined(person, last, expanded.definition.observed.maximum_gap_days)
    events: dict[str, list[Event]] = {}
    for set_name, of in records.events.items():
        kept = []
        for event in of.get(name, ()):
            if event.day > last:
                left_out["record after the definition's last day"] += 1
            elif person.birth is not None and event.day < person.birth:
                left_out["record before birth"] += 1
            elif person.death is not None and event.day > person.death:
                left_out["record after death"] += 1
            elif not any(first <= event.day <= end for first, end in periods):
                left_out["record outside observation"] += 1
            else:
                kept.append(event)
        if kept:
            events[set_name] = sorted(kept, key=lambda e: e.day)
    return _Patient(name, person, periods, events)


def _joined(person: Person, last: date, gap_days: int) -> list[tuple[date, date]]:
    """Periods in order, cut at death and at the last day, joined where the gap is at most `gap_days`."""
    end = min(last, person.death or date.max)
    out: list[tuple[date, date]] = []
    for first, final in sorted(person.periods):
        final = min(final, end)
        if final < first:
            continue
        if out and (first - out[-1][1]).days - 1 <= gap_days:
            out[-1] = (out[-1][0], max(out[-1][1], final))
        else:
            out.append((first, final))
    return out


def _set_index(patient: _Patient, expanded: Expanded) -> bool:
    index = expanded.definition.index
    if index.date is not None:
        patient.index = date.fromisoformat(index.date)
        return patient.person.death is None or patient.person.death >= patient.index
    if index.kind == "entry":
        if not patient.periods:
            return False
        patient.index = patient.periods[0][0]
        return True
    days = sorted({event.day for event in patient.events.get(index.set or "", ())})
    if len(days) < index.minimum_dates:
        return False
    patient.index = days[index.minimum_dates - 1]
    return True


def _set_period(patient: _Patient) -> bool:
    for first, end in patient.periods:
        if first <= patient.index <= end:
            patient.end = end
            return True
    return False


def _start(patient: _Patient) -> date:
    return next(first for first, end in patient.periods if end == patient.end)


def _within(patient: _Patient, name: str, window: Window) -> list[Event]:
    low = date.min if window.from_days is None else _moved(patient.index, window.from_days)
    high = date.max if window.to_days is None else _moved(patient.index, window.to_days)
    return [event for event in patient.events.get(name, ()) if low <= event.day <= high]


def _moved(day: date, days: int) -> date:
    try:
        return day + timedelta(days)
    except OverflowError:
        return date.min if days < 0 else date.max


def _days(patient: _Patient, name: str, window: Window) -> set[date]:
    return {event.day for event in _within(patient, name, window)}


def _cells(patient: _Patient, column: Column, expanded: Expanded, left_out: Counter[str]) -> Sequence[str]:
    person = patient.person
    match column:
        case AgeColumn():
            if person.birth is None or person.birth > patient.index:
                return ("",)
            return (f"{(patient.index - person.birth).days / YEAR:.2f}",)
        case SexColumn():
            return ({"male": column.male, "female": column.female}.get(person.sex, ""),)
        case CaseColumn():
            dates = len(_days(patient, column.set, column.window))
            if dates >= column.minimum_dates:
                return ("1",)
            around = [n for n in (column.exclusion, expanded.exclusions.get(column.set)) if n is not None]
            excluded = dates or any(_days(patient, name, column.window) for name in around)
            return ("" if excluded else "0",)
        case HasColumn():
            return ("1" if len(_days(patient, column.set, column.window)) >= column.minimum_dates else "0",)
        case CountColumn():
            return (str(len(_days(patient, column.set, column.window))),)
        case ValueColumn():
            return (_value(patient, column, left_out),)
        case TimeColumn():
            return _time(patient, column)


def _value(patient: _Patient, column: ValueColumn, left_out: Counter[str]) -> str:
    by_day: dict[date, list[float]] = {}
    for event in _within(patient, column.set, column.window):
        if event.value is None:
            continue
        factor = column.units.get(event.unit)
        if factor is None:
            left_out[f"{column.name} in another unit"] += 1
            continue
        by_day.setdefault(event.day, []).append(event.value * float(factor))
    if not by_day:
        return ""
    values = [value for of_day in by_day.values() for value in of_day]
    match column.pick:
        case "mean":
            found = sum(values) / len(values)
        case "minimum":
            found = min(values)
        case "maximum":
            found = max(values)
        case "latest" | "first":
            day = max(by_day) if column.pick == "latest" else min(by_day)
            found = sum(by_day[day]) / len(by_day[day])
    return f"{found:.10g}"


def _time(patient: _Patient, column: TimeColumn) -> tuple[str, str]:
    if column.set == DEATH and patient.person.death is not None:
        days = [patient.person.death]
    elif column.set == DEATH:
        days = []
    else:
        days = sorted(_days(patient, column.set, Window()))
    if days and days[0] <= patient.index and column.set != DEATH:
        return "", ""
    happened = bool(days) and days[0] <= patient.end
    length = ((days[0] if happened else patient.end) - patient.index).days
    return (f"{length / YEAR:.6g}" if column.unit == "years" else str(length)), "1" if happened else "0"
