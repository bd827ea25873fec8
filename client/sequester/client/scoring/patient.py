"""What is said of one patient: a page to print, and a FHIR R4 RiskAssessment. Both stay at the hospital.

Percentiles and Z scores are printed, never the sum of weights: few variants can be read back from a sum.
Source: https://hl7.org/fhir/R4/riskassessment.html
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

DISCLAIMER = (
    "Not for diagnosis. This is a statistical estimate from common variants; it does not see rare variants of large effect, "
    "family history or lifestyle, and a low value does not rule the condition out."
)
DISAGREE = (
    "Scores for one condition that predict equally well often disagree about one person: in one comparison of scores for "
    "coronary disease, a fifth of all people were in both the highest and the lowest twentieth (JAMA 2024)."
)


@dataclass(frozen=True, slots=True)
class Standing:
    """The score against the reference: Z of both kinds, percentile 0..100 with its 95 % interval, most similar population."""

    z1: float
    z2: float
    percentile: float
    low: float
    high: float
    population: str
    probability: float
    reference_people: int

    @property
    def uncertain(self) -> bool:
        """True where the population is not clear: the percentile may be of the wrong people."""
        return self.probability < 0.9


@dataclass(frozen=True, slots=True)
class Risk:
    """Absolute risk 0..1 within `years`, with its interval, and the ratio against the population's mean."""

    years: int
    age: float
    value: float
    low: float
    high: float
    relative: float


@dataclass(frozen=True, slots=True)
class Patient:
    """One patient's result. `missing`: share of the score's variants without a call."""

    id: str
    missing: float
    standing: Standing | None
    risk: Risk | None


@dataclass(frozen=True, slots=True)
class About:
    """What all pages of one run say alike. `not_done`: why there is no percentile or no risk."""

    score: str
    version: str
    trait: str
    citation: str
    matched: int
    of: int
    weight_share: float
    left_out: tuple[str, ...]
    signer: str
    instant: str
    not_done: tuple[str, ...]


def page(about: About, patient: Patient) -> str:
    """One self-contained HTML page; it loads nothing from anywhere."""
    rows = [
        ("Patient", patient.id),
        ("Score", f"{about.score} (version {about.version[:12]})"),
        ("Condition", about.trait or "not named in the file"),
        ("Variants", f"{about.matched:,} of {about.of:,} found here, {about.weight_share:.0%} of the score's weight; "
                     f"{patient.missing:.1%} of them without a call for this patient"),
    ]  # fmt: skip
    said: list[str] = []
    if (standing := patient.standing) is not None:
        said.append(
            f"This score is higher than that of {_ordinal(standing.percentile)} of 100 people of the most similar reference "
            f"population (95 % interval {standing.low:.0f} to {standing.high:.0f})."
        )
        group = f"{standing.population}, {standing.reference_people} people, probability {standing.probability:.0%}"
        rows += [
            ("Most similar population", group + (": uncertain" if standing.uncertain else "")),
            ("Adjusted for ancestry", f"Z {standing.z1:+.2f} (mean), {standing.z2:+.2f} (mean and spread)"),
        ]
        if standing.uncertain:
            said.append("This patient's ancestry is between reference populations: the percentile may mislead.")
    if (risk := patient.risk) is not None:
        said.append(
            f"Estimated risk within {risk.years} years from age {risk.age:.0f}: {risk.value:.1%} "
            f"({risk.low:.1%} to {risk.high:.1%}), {risk.relative:.2f} times the average of that age and sex."
        )
    said += about.not_done
    table = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows)
    aside = "".join(f"<li>{escape(line)}</li>" for line in about.left_out)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Genomic score</title><style>'
        "body{font:16px/1.5 sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem}th{text-align:left;padding-right:1rem;"
        "vertical-align:top}.warning{border:2px solid #222;padding:.6rem}</style>"
        f'<h1>Genomic score</h1><p class="warning">{escape(DISCLAIMER)}</p>'
        + "".join(f"<p>{escape(sentence)}</p>" for sentence in said)
        + f"<table>{table}</table><p>{escape(DISAGREE)}</p>"
        + (f"<p>Rows of the score that were not used:</p><ul>{aside}</ul>" if aside else "")
        + f"<p>{escape(about.citation)}</p><p>Answerable: {escape(about.signer)}. Made {escape(about.instant)}.</p></html>\n"
    )


def _ordinal(percentile: float) -> str:
    return f"{min(99, max(1, round(percentile)))}"


def risk_assessment(about: About, patient: Patient, study: str = "") -> dict[str, Any]:
    """A RiskAssessment of status final; the Z score and percentile are in a contained Observation that it is based on."""
    subject = {"reference": f"Patient/{patient.id}"}
    note = f"{about.matched} of {about.of} variants, {about.weight_share:.0%} of the weight. {DISCLAIMER} {DISAGREE}"
    out: dict[str, Any] = {
        "resourceType": "RiskAssessment",
        "status": "final",
        "method": {"text": f"{about.score}, version {about.version}" + (f", study {study}" if study else "")},
        "subject": subject,
        "occurrenceDateTime": about.instant,
        "performer": {"display": about.signer},
        "note": [{"text": note}, *({"text": sentence} for sentence in about.not_done)],
    }
    if (standing := patient.standing) is not None:
        out["contained"] = [_observation(about, standing, subject)]
        out["basis"] = [{"reference": "#score"}]
    prediction: dict[str, Any] = {"outcome": {"text": about.trait or about.score}}
    if (risk := patient.risk) is not None:
        prediction |= {
            "probabilityRange": {"low": _percent(risk.low), "high": _percent(risk.high)},
            "relativeRisk": round(risk.relative, 4),
            "whenRange": {"low": _years(risk.age), "high": _years(risk.age + risk.years)},
            "rationale": f"point estimate {100 * risk.value:.2f} %",
        }
    elif patient.standing is not None:
        prediction["rationale"] = "no public incidence was given: a place among others, not a probability"
    out["prediction"] = [prediction]
    return out


def _observation(about: About, standing: Standing, subject: dict[str, str]) -> dict[str, Any]:
    def part(text: str, value: float, unit: str, code: str) -> dict[str, Any]:
        quantity = {"value": round(value, 4), "unit": unit, "system": "http://unitsofmeasure.org", "code": code}
        return {"code": {"text": text}, "valueQuantity": quantity}

    return {
        "resourceType": "Observation",
        "id": "score",
        "status": "final",
        "code": {"text": f"Polygenic score {about.score}"},
        "subject": subject,
        "effectiveDateTime": about.instant,
        "component": [
            part("Z adjusted for the mean along ancestry", standing.z1, "1", "1"),
            part("Z adjusted for mean and spread along ancestry", standing.z2, "1", "1"),
            part(f"Percentile in {standing.population}", standing.percentile, "%", "%"),
        ],
        "note": [{"text": f"Reference: {standing.reference_people} people, similarity {standing.probability:.0%}"}],
    }


def _percent(share: float) -> dict[str, Any]:
    return {"value": round(100 * share, 4), "unit": "%", "system": "http://unitsofmeasure.org", "code": "%"}


def _years(age: float) -> dict[str, Any]:
    return {"value": round(age, 2), "unit": "years", "system": "http://unitsofmeasure.org", "code": "a"}
