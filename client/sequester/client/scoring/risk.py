"""Absolute risk over some years from public incidence and the score's published effect, with its interval.

The hazard of a person is the population's at that age and sex times exp(b z - b^2/2): z is standard normal in the
population, so that the mean over it is the population's. Death from other causes competes where mortality is given.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

from sequester.protocols.errors import SiteError


@dataclass(frozen=True, slots=True)
class Effect:
    """The hazard or odds ratio per SD of the score, with its published 95 % interval."""

    ratio: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Incidence:
    """Yearly rates by (sex, age in whole years): new cases, and deaths from other causes."""

    cases: dict[tuple[str, int], float]
    deaths: dict[tuple[str, int], float]


def effect_of(text: str) -> Effect:
    """`1.6,1.5,1.7`: ratio per SD, lower and upper end of its 95 % interval."""
    try:
        ratio, low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise SiteError(
            f"`{text[:40]}` is not an effect per SD", hint="RATIO,LOW,HIGH as published, e.g. 1.6,1.5,1.7"
        ) from None
    if not 0 < low <= ratio <= high < math.inf:
        raise SiteError(f"an effect of {ratio:g} between {low:g} and {high:g}", hint="RATIO,LOW,HIGH, all above 0")
    return Effect(ratio, low, high)


def read_incidence(path: Path) -> Incidence:
    """Rates of a CSV with columns sex, age, incidence and perhaps mortality, per person and year."""
    try:
        reader = csv.DictReader(io.StringIO(path.read_text("utf-8-sig")))
    except (OSError, UnicodeDecodeError):
        raise SiteError(f"{path} cannot be read", hint="CSV: sex,age,incidence,mortality") from None
    if not {"sex", "age", "incidence"} <= set(reader.fieldnames or ()):
        raise SiteError(f"{path.name} has no columns sex, age and incidence", hint="CSV: sex,age,incidence,mortality")
    cases: dict[tuple[str, int], float] = {}
    deaths: dict[tuple[str, int], float] = {}
    for number, line in enumerate(reader, 2):
        try:
            key = (line["sex"].strip(), int(line["age"]))
            cases[key], deaths[key] = float(line["incidence"]), float(line.get("mortality") or 0)
        except (ValueError, AttributeError, TypeError):
            raise SiteError(f"{path.name} line {number}: an age and rates were expected") from None
        if not 0 <= cases[key] < 1 or not 0 <= deaths[key] < 1:
            raise SiteError(f"{path.name} line {number}: a rate that is not in 0..1", hint="per person and year")
    return Incidence(cases, deaths)


def absolute_risk(incidence: Incidence, sex: str, age: float, years: int, ratio: float, z: float) -> float | None:
    """Probability 0..1 of becoming a case within `years`; None where the table does not reach.

    Rates hold for a year of age; the first and last may be parts of one.
    """
    b = math.log(ratio)
    relative = math.exp(b * z - b * b / 2)
    alive, risk = 1.0, 0.0
    at, end = age, age + years
    while at < end:
        year = math.floor(at)
        length = min(year + 1, end) - at
        if (sex, year) not in incidence.cases:
            return None
        case, death = incidence.cases[sex, year] * relative, incidence.deaths[sex, year]
        if case + death > 0:
            leaves = 1 - math.exp(-(case + death) * length)
            risk += alive * leaves * case / (case + death)
            alive *= 1 - leaves
        at = float(year + 1)
    return risk


def risk_interval(
    incidence: Incidence, sex: str, age: float, years: int, effect: Effect, z: float, sd: float
) -> tuple[float, float, float] | None:
    """Risk, and its lowest and highest over the ends of the effect's interval and of the score's own."""
    middle = absolute_risk(incidence, sex, age, years, effect.ratio, z)
    if middle is None:
        return None
    corners = [
        absolute_risk(incidence, sex, age, years, ratio, z + moved)
        for ratio in (effect.low, effect.ratio, effect.high)
        for moved in (-1.96 * sd, 0.0, 1.96 * sd)
    ]
    found = [risk for risk in corners if risk is not None]
    return middle, min(found), max(found)
