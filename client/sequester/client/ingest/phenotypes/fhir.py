"""FHIR R4: bulk NDJSON and bundles, streamed, to people and dated records.

Patient, Condition, Observation, MedicationRequest and MedicationStatement are read; Medication where a request names one.
A date is the day the record wrote, in the record's own time zone; a record known only to a month or a year counts as no
date. FHIR has no observation period: a patient is observed from the first to the last dated record of these kinds.
Source: https://hl7.org/fhir/R4/
"""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sequester.client.ingest.phenotypes.definitions import Expanded, Lookup, is_hierarchical
from sequester.client.ingest.phenotypes.records import Event, Person, Records, birth_of, day_of
from sequester.protocols.definition import Domain
from sequester.protocols.errors import SiteError

SKIPPED = frozenset({"entered-in-error", "refuted", "draft", "cancelled", "not-taken"})
SYSTEMS = {
    "http://hl7.org/fhir/sid/icd-10": "ICD10",
    "urn:oid:2.16.840.1.113883.6.3": "ICD10",
    "http://hl7.org/fhir/sid/icd-10-cm": "ICD10CM",
    "urn:oid:2.16.840.1.113883.6.90": "ICD10CM",
    "http://fhir.de/CodeSystem/bfarm/icd-10-gm": "ICD10GM",
    "http://hl7.org/fhir/sid/icd-9-cm": "ICD9CM",
    "urn:oid:2.16.840.1.113883.6.103": "ICD9CM",
    "http://snomed.info/sct": "SNOMED",
    "urn:oid:2.16.840.1.113883.6.96": "SNOMED",
    "http://loinc.org": "LOINC",
    "urn:oid:2.16.840.1.113883.6.1": "LOINC",
    "http://www.nlm.nih.gov/research/umls/rxnorm": "RxNorm",
    "urn:oid:2.16.840.1.113883.6.88": "RxNorm",
    "http://www.whocc.no/atc": "ATC",
    "urn:oid:2.16.840.1.113883.6.73": "ATC",
}
_DATES = {
    "Condition": ("onsetDateTime", "onsetPeriod", "recordedDate"),
    "Observation": ("effectiveDateTime", "effectiveInstant", "effectivePeriod"),
    "MedicationRequest": ("authoredOn",),
    "MedicationStatement": ("effectiveDateTime", "effectivePeriod", "dateAsserted"),
}
MOST_SYSTEMS = 50
_KIND = re.compile(r"[A-Za-z]{1,40}")
_SYSTEM = re.compile(r"none|[a-z][a-z0-9+.-]*:[!-~]{1,160}")  # a URI; whatever else stands there is not repeated
_DOMAIN: dict[str, Domain] = {
    "Condition": "condition", "Observation": "measurement", "MedicationRequest": "drug", "MedicationStatement": "drug",
}  # fmt: skip
Resource = dict[str, Any]
_MALFORMED = (TypeError, AttributeError, ValueError, OverflowError, KeyError)  # a field of another kind than R4 says


class Fhir:
    """A `Source` over .ndjson, .ndjson.gz and .json files of a folder, or one such file.

    `id_system`: the system of the Patient.identifier that is the patient's id elsewhere; without it, Patient.id is.
    """

    def __init__(self, path: Path, id_system: str = "") -> None:
        self._id_system = id_system
        if path.is_dir():
            self._paths = sorted(p for p in path.iterdir() if p.name.endswith((".ndjson", ".ndjson.gz", ".json")))
        else:
            self._paths = [path]
        if not self._paths or not all(p.is_file() for p in self._paths):
            raise SiteError(f"{path} holds no FHIR files", hint="bulk export .ndjson or .ndjson.gz, bundles .json")

    def read(self, expanded: Expanded) -> Records:
        """Two passes: patients and medications first, then their records."""
        _no_hierarchies(expanded)
        lookup = Lookup(expanded.sets)
        records = Records()
        name_of, medications = self._patients(records)
        seen: set[tuple[str, str]] = set()
        for place, url, resource in self._resources():
            kind = str(resource.get("resourceType", ""))
            if kind not in _DATES:
                if kind not in ("Patient", "Medication"):
                    records.left_out[f"resource of another kind: {kind if _KIND.fullmatch(kind) else 'unnamed'}"] += 1
                continue
            identity = (kind, str(resource.get("id") or url))
            if identity[1]:
                if identity in seen:
                    records.left_out[f"{kind} given twice"] += 1
                    continue
                seen.add(identity)
            try:
                self._record(kind, resource, records, name_of, medications, lookup)
            except _MALFORMED:
                raise SiteError(f"{place}: this {kind} is not as FHIR R4 has it", hint="validate the export") from None
        for person in records.people.values():
            if person.periods:
                firsts, lasts = zip(*person.periods, strict=True)
                person.periods = [(min(firsts), max(lasts))]
        return records

    def _patients(self, records: Records) -> tuple[dict[str, str], dict[str, Any]]:
        """Fill `people`; the patient's id by every reference that may name them, and medications likewise."""
        name_of: dict[str, str] = {}
        medications: dict[str, Any] = {}
        where: dict[str, tuple[str, Resource]] = {}
        for place, url, resource in self._resources():
            kind = resource.get("resourceType")
            if kind == "Medication":
                for key in _keys("Medication", url, resource):
                    medications[key] = resource.get("code")
            if kind != "Patient":
                continue
            try:
                name = self._name(resource)
                person = Person(_sex(resource), birth_of(str(resource.get("birthDate") or "")))
                person.death = day_of(resource.get("deceasedDateTime"))
            except _MALFORMED:
                raise SiteError(f"{place}: this Patient is not as FHIR R4 has it", hint="validate the export") from None
            if not name:
                records.left_out["Patient without the identifier asked for"] += 1
                continue
            if name in where:
                if where[name][1] != resource:
                    raise SiteError(
                        f"{where[name][0]} and {place} are the same patient",
                        hint="one Patient each: export again, or merge them before",
                    )
                records.left_out["Patient given twice"] += 1
                continue
            where[name] = (place, resource)
            if resource.get("deceasedBoolean") is True:
                records.left_out["death without a date"] += 1
            records.people[name] = person
            for key in _keys("Patient", url, resource):
                name_of[key] = name
        return name_of, medications

    def _name(self, patient: Resource) -> str:
        if not self._id_system:
            return str(patient.get("id") or "").strip()
        values = [i.get("value") for i in patient.get("identifier") or () if i.get("system") == self._id_system]
        return str(values[0] or "").strip() if values else ""

    def _record(
        self,
        kind: str,
        resource: Resource,
        records: Records,
        name_of: dict[str, str],
        medications: dict[str, Any],
        lookup: Lookup,
    ) -> None:
        status = _status(resource)
        if status in SKIPPED:
            records.left_out[f"{kind} {status}"] += 1
            return
        if resource.get("doNotPerform") is True:
            records.left_out[f"{kind} that says not to"] += 1
            return
        reference = (resource.get("subject") or {}).get("reference")
        name = name_of.get(_key("Patient", str(reference or "")))
        if name is None:
            records.left_out[f"{kind} of nobody among the patients"] += 1
            return
        day = _first_day(kind, resource)
        if day is None:
            records.left_out[f"{kind} without a day"] += 1
            return
        records.people[name].periods.append((day, day))
        for concept, number in self._concepts(kind, resource, medications, records):
            value, unit = _quantity(number, records)
            found: set[str] = set()
            for coding in (concept or {}).get("coding") or ():
                system = str(coding.get("system") or "none")
                vocabulary = SYSTEMS.get(system)
                if vocabulary is None:
                    known = system in records.unmapped or len(records.unmapped) < MOST_SYSTEMS
                    records.unmapped[system if known and _SYSTEM.fullmatch(system) else "other systems"] += 1
                elif coding.get("code"):
                    found |= lookup.sets(_DOMAIN[kind], vocabulary, str(coding["code"]))
            for of in found:
                records.add(of, name, Event(day, value, unit))

    def _concepts(
        self, kind: str, resource: Resource, medications: dict[str, Any], records: Records
    ) -> Iterator[tuple[Any, Any]]:
        """Each code of a record with its number: an Observation's own, and those of its components."""
        if not kind.startswith("Medication"):
            yield resource.get("code"), resource.get("valueQuantity")
            for part in resource.get("component") or ():
                yield part.get("code"), part.get("valueQuantity")
            return
        if resource.get("medicationCodeableConcept"):
            yield resource["medicationCodeableConcept"], None
            return
        reference = str((resource.get("medicationReference") or {}).get("reference") or "")
        for contained in resource.get("contained") or ():
            if reference == f"#{contained.get('id')}":
                yield contained.get("code"), None
                return
        if (key := _key("Medication", reference)) in medications:
            yield medications[key], None
        else:
            records.left_out[f"{kind} whose medication is not in the files"] += 1

    def _resources(self) -> Iterator[tuple[str, str, Resource]]:
        """Place in words, full URL in a bundle or nothing, and the resource."""
        for path in self._paths:
            opened: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
            try:
                with opened(path, "rt", encoding="utf-8") as file:
                    if path.suffix == ".json":
                        yield from _bundle(path.name, json.load(file))
                        continue
                    for number, line in enumerate(file, 1):
                        if line.strip():
                            yield from _bundle(f"{path.name} line {number}", json.loads(line))
            except json.JSONDecodeError as error:
                at = f"line {error.lineno}" if path.suffix == ".json" else "one line"
                raise SiteError(f"{path.name}: {at} is not JSON", hint="copy the export again") from None
            except (OSError, EOFError, zlib.error, UnicodeDecodeError, RecursionError):
                raise SiteError(f"{path.name} cannot be read to its end", hint="copy the export again") from None


def _bundle(place: str, value: Any) -> Iterator[tuple[str, str, Resource]]:
    if not isinstance(value, dict) or "resourceType" not in value:
        raise SiteError(f"{place} is not a FHIR resource", hint="one resource a line, or a Bundle")
    if value["resourceType"] != "Bundle":
        yield place, "", value
        return
    entries = value.get("entry") or []
    if not isinstance(entries, list):
        raise SiteError(f"{place} is not a Bundle as FHIR R4 has it", hint="validate the export")
    for number, entry in enumerate(entries, 1):
        resource = entry.get("resource") if isinstance(entry, dict) else None
        if isinstance(resource, dict):
            yield f"{place} entry {number}", str(entry.get("fullUrl") or ""), resource


def _no_hierarchies(expanded: Expanded) -> None:
    for name, codes in expanded.sets.items():
        for listed in codes.lists:
            if listed.vocabulary.upper() == "OMOP":
                raise SiteError(
                    f"the set {name} names OMOP concept ids, which FHIR does not know",
                    hint="the definition lists codes of the vocabularies your records use",
                )
            if listed.descendants and not is_hierarchical(listed.vocabulary):
                raise SiteError(
                    f"the set {name} asks for descendants in {listed.vocabulary}, and FHIR files hold no hierarchy",
                    hint="the definition lists the codes themselves",
                )


def _keys(kind: str, url: str, resource: Resource) -> Iterator[str]:
    if resource.get("id"):
        yield f"{kind}/{resource['id']}"
    if url:
        yield _key(kind, url)


def _key(kind: str, reference: str) -> str:
    """A reference as it is compared: `Patient/1` whether relative, absolute or with a version; a URN as it is.

    >>> _key("Patient", "https://example.org/fhir/Patient/1/_history/2"), _key("Patient", "urn:uuid:5")
    ('Patient/1', 'urn:uuid:5')
    """
    if reference.startswith("urn:"):
        return reference
    parts = reference.split("/_history/")[0].split("/")
    return "/".join(parts[-2:]) if len(parts) > 1 and parts[-2] == kind else reference


def _sex(patient: Resource) -> str:
    gender = patient.get("gender")
    return str(gender) if gender in ("male", "female") else ""


def _status(resource: Resource) -> str:
    verification = resource.get("verificationStatus") or {}
    for coding in verification.get("coding") or ():
        if coding.get("code") in SKIPPED:
            return str(coding["code"])
    return str(resource.get("status") or "")


def _first_day(kind: str, resource: Resource) -> Any:
    for name in _DATES[kind]:
        value = resource.get(name)
        if isinstance(value, dict):
            value = value.get("start")
        if (day := day_of(value)) is not None:
            return day
    return None


def _quantity(quantity: Any, records: Records) -> tuple[float | None, str]:
    if not quantity or quantity.get("value") is None:
        return None, ""
    if quantity.get("comparator"):
        records.left_out["measurement with a sign such as <"] += 1
        return None, ""
    value = float(quantity["value"])
    if not math.isfinite(value):
        raise ValueError("not a number")
    return value, str(quantity.get("code") or quantity.get("unit") or "")
