"""Whether a study's private models may be exported: verdicts of the release gate, or a waiver that everybody signed.

Every hospital tries its own installation on made-up patients before it joins (client `release.py`) and signs pass or fail.
Export asks for a pass of every hospital in the signed roster: each clips its own patients and adds a share of everybody's
noise with a program of its own, so a pass elsewhere says nothing about it; and a roster is signed, while who took part in
a round is the exchange's word. A hospital that was away may be left out by a waiver only.

A waiver is the coordinator's: the study, the reason, and what stood at each hospital without a pass. It counts once every
hospital of the roster has countersigned these bytes, and while what it says of them still holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sequester.protocols.analyses.registry import Plan, leaves_a_model
from sequester.protocols.errors import PrivacyError, RefusalCode, StudyError
from sequester.protocols.faults import is_plain
from sequester.protocols.signing import Document, open_document
from sequester.protocols.study import Study

Form = Literal["full", "short"]
Word = Literal["passed", "failed", "missing"]
FORMS: tuple[Form, ...] = ("full", "short")
LONGEST_REASON = 2000
SMALL = 1_000_000  # patients times features: below, the short form runs by itself


@dataclass(frozen=True, slots=True)
class Tried:
    """How large the simulated cohorts of one model were: patients, ordinary columns, canaries of both kinds, trainings."""

    analysis: str
    patients: int
    columns: int
    canaries: int
    runs: int

    def json(self) -> dict[str, Any]:
        return {"analysis": self.analysis, "patients": self.patients, "columns": self.columns,
                "canaries": self.canaries, "runs": self.runs}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdict:
    """One hospital's signed word on its own installation; pass or fail is all that its trial says outside.

    `attempt` counts the hospital's verdicts on this study: a pass after failures is seen to be one.
    """

    site: str
    passed: bool
    form: Form
    tried: tuple[Tried, ...]
    attempt: int
    program: str
    time: str


@dataclass(frozen=True, slots=True)
class Waiver:
    """`stood` is what each hospital without a pass had when it was signed; `digest` is what hospitals countersign."""

    reason: str
    stood: dict[str, Word]
    time: str
    digest: str


@dataclass(frozen=True, slots=True)
class Documents:
    """What the exchange keeps of a study's release: verdicts and countersignatures by site, the coordinator's waiver."""

    verdicts: Mapping[str, bytes] = field(default_factory=dict)
    waiver: bytes | None = None
    countersignatures: Mapping[str, bytes] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """As texts: documents are canonical JSON."""
        return {
            "verdicts": {site: raw.decode() for site, raw in self.verdicts.items()},
            "waiver": None if self.waiver is None else self.waiver.decode(),
            "countersignatures": {site: raw.decode() for site, raw in self.countersignatures.items()},
        }

    @classmethod
    def from_json(cls, value: Any) -> Documents:
        """What `json` wrote; another shape is a `StudyError`."""
        try:
            waiver = value["waiver"]
            return cls(
                {str(site): raw.encode() for site, raw in value["verdicts"].items()},
                None if waiver is None else waiver.encode(),
                {str(site): raw.encode() for site, raw in value["countersignatures"].items()},
            )
        except (KeyError, TypeError, AttributeError):
            raise StudyError(
                "the exchange's answer says nothing of the release gate", hint="update the older of the two programs"
            ) from None


@dataclass(frozen=True, slots=True)
class Release:
    """Where a study's export stands. `words` has every hospital of the roster, in its order; empty without models."""

    words: dict[str, Word]
    verdicts: dict[str, Verdict]
    waiver: Waiver | None
    countersigned: tuple[str, ...]

    @property
    def lacking(self) -> dict[str, Word]:
        """Hospitals without a pass."""
        return {site: word for site, word in self.words.items() if word != "passed"}

    @property
    def granted_by(self) -> Literal["nothing to release", "passes", "waiver", ""]:
        """What lets the models out, "" where nothing does."""
        if not self.words:
            return "nothing to release"
        if not self.lacking:
            return "passes"
        if self.waiver is not None and self._is_covered(self.waiver) and self.countersigned == tuple(self.words):
            return "waiver"
        return ""

    def _is_covered(self, waiver: Waiver) -> bool:
        """True while no hospital stands otherwise than the waiver says, but for one that has passed since."""
        return all(waiver.stood.get(site) == word for site, word in self.lacking.items())

    def require(self) -> None:
        """`PrivacyError` where no model may be exported: what was found, what was expected, what to do."""
        if self.granted_by:
            return
        found = ", ".join(f"{site} {word}" for site, word in self.lacking.items())
        message = f"the release gate: {found}; a pass of every hospital was expected"
        if self.waiver is None:
            hint = (
                "a hospital's gate tries again with `sequester-client audit release STUDY`; else `sequester-server study "
                "waive STUDY --reason ...`, which every hospital countersigns"
            )
        elif not self._is_covered(self.waiver):
            said = ", ".join(f"{site} {word}" for site, word in self.waiver.stood.items())
            message += f"; the waiver was signed for: {said}"
            hint = (
                "`sequester-server study waive STUDY --reason ...` signs another one, which every hospital countersigns"
            )
        else:
            open_ones = [site for site in self.words if site not in self.countersigned]
            message += f"; the waiver lacks the countersignature of {', '.join(open_ones)}"
            hint = "each of them reads it and signs with `sequester-client countersign STUDY --person NAME`"
        raise PrivacyError(message, hint=f"nothing is exported: {hint}", code=RefusalCode.BUDGET)


def models(study: Study) -> tuple[Plan, ...]:
    """The private analyses whose result is a model: what the release gate is about."""
    return tuple(plan for plan in study.analyses if plan.mode == "private" and leaves_a_model(plan))


def form_of(study: Study) -> Form:
    """The short form for a small plan: smaller cohorts and three trainings, which find the same gross faults."""
    return "short" if study.n0 * len(study.features()) < SMALL else "full"


def judge(study: Study, digest: str, coordinator: bytes, documents: Documents) -> Release:
    """Where the export stands, from signed documents alone; one that is forged or about something else is a `StudyError`."""
    if not models(study):
        return Release({}, {}, None, ())
    keys = dict(zip(study.site_ids, study.roster, strict=True))
    for site in (*documents.verdicts, *documents.countersignatures):
        if site not in keys:
            raise _bad("release document", site[:32], "no hospital of this study has that name")
    verdicts = {site: read_verdict(study, digest, site, raw) for site, raw in documents.verdicts.items()}
    words: dict[str, Word] = {}
    for site in study.site_ids:
        words[site] = "missing" if site not in verdicts else "passed" if verdicts[site].passed else "failed"
    if documents.waiver is None:
        return Release(words, verdicts, None, ())
    waiver = read_waiver(study, digest, coordinator, documents.waiver)
    signed = {
        site for site, raw in documents.countersignatures.items()
        if read_countersignature(study, digest, site, raw) == waiver.digest
    }  # fmt: skip
    return Release(words, verdicts, waiver, tuple(site for site in study.site_ids if site in signed))


# ---- the documents --------------------------------------------------------------------------------------------------


def verdict_body(
    digest: str, site: str, passed: bool, form: Form, tried: Sequence[Tried], attempt: int, program: str, time: str
) -> dict[str, Any]:
    """What a hospital signs as a `verdict`: pass or fail, and sizes that follow from the signed study."""
    return {"study": digest, "site": site, "passed": passed, "form": form, "tried": [row.json() for row in tried],
            "attempt": attempt, "program": program, "time": time}  # fmt: skip


def waiver_body(digest: str, reason: str, stood: Mapping[str, Word], time: str) -> dict[str, Any]:
    """What the coordinator signs as a `waiver`."""
    return {"study": digest, "reason": reason, "stood": dict(stood), "time": time}


def countersignature_body(digest: str, site: str, waiver: str, person: str, role: str, time: str) -> dict[str, Any]:
    """What a hospital signs as a `countersignature`: the waiver's digest; of the person only a hash leaves."""
    return {"study": digest, "site": site, "waiver": waiver, "person": person, "role": role, "time": time}


def read_verdict(study: Study, digest: str, site: str, raw: bytes) -> Verdict:
    """A hospital's verdict on this study: about every private model of it, signed by the roster's key."""
    body = _opened(study, digest, site, "verdict", raw)
    tried = _tried(body.get("tried"))
    if tried is None or tuple(row.analysis for row in tried) != tuple(plan.name for plan in models(study)):
        raise _bad("verdict", site, "it is not about the private models of the study, each once")
    if type(body.get("passed")) is not bool or body.get("form") not in FORMS:
        raise _bad("verdict", site, "it says neither pass nor fail, or not which form ran")
    attempt = body.get("attempt")
    if type(attempt) is not int or not 0 < attempt < 2**31:
        raise _bad("verdict", site, "it does not count its attempts")
    texts = {name: body.get(name) for name in ("program", "time")}
    for name, text in texts.items():
        if not _is_line(text, 60):
            raise _bad("verdict", site, f"`{name}` is not one line of plain text")
    return Verdict(site, body["passed"], body["form"], tried, attempt, str(texts["program"]), str(texts["time"]))


def read_waiver(study: Study, digest: str, coordinator: bytes, raw: bytes) -> Waiver:
    """The coordinator's waiver for this study."""
    signed = _signed("waiver", "the coordinator", lambda: open_document(raw, "waiver", coordinator))
    body = signed.body
    reason, stood = body.get("reason"), body.get("stood")
    if body.get("study") != digest:
        raise _bad("waiver", "the coordinator", f"it is about study {body.get('study')!r:.16}")
    if not isinstance(reason, str) or not reason.strip() or len(reason) > LONGEST_REASON or not is_plain(reason):
        raise _bad("waiver", "the coordinator", f"its reason is not plain text of up to {LONGEST_REASON} letters")
    if not isinstance(stood, dict) or not all(
        site in study.site_ids and word in ("failed", "missing") for site, word in stood.items()
    ):
        raise _bad("waiver", "the coordinator", "it does not say which hospitals lack a pass")
    if not _is_line(body.get("time"), 60):
        raise _bad("waiver", "the coordinator", "`time` is not one line of plain text")
    in_order: dict[str, Word] = {site: stood[site] for site in study.site_ids if site in stood}
    return Waiver(reason, in_order, body["time"], signed.digest)


def read_countersignature(study: Study, digest: str, site: str, raw: bytes) -> str:
    """The digest of the waiver that a hospital countersigned."""
    waiver = _opened(study, digest, site, "countersignature", raw).get("waiver")
    if not isinstance(waiver, str) or not re.fullmatch(r"[0-9a-f]{64}", waiver):
        raise _bad("countersignature", site, "it names no waiver")
    return waiver


def _opened(study: Study, digest: str, site: str, kind: str, raw: bytes) -> dict[str, Any]:
    if site not in study.site_ids:
        raise _bad(kind, site[:32], "no hospital of this study has that name")
    key = study.roster[study.site_ids.index(site)]
    body = _signed(kind, site, lambda: open_document(raw, kind, key)).body
    if body.get("study") != digest or body.get("site") != site:
        raise _bad(kind, site, f"it is about study {body.get('study')!r:.16} at {body.get('site')!r:.32}")
    return body


def _signed(kind: str, site: str, opened: Callable[[], Document]) -> Document:
    try:
        return opened()
    except StudyError as error:
        raise _bad(kind, site, error.message) from None


def _tried(rows: object) -> tuple[Tried, ...] | None:
    if not isinstance(rows, list):
        return None
    found = []
    for row in rows:
        counts = ("patients", "columns", "canaries", "runs")
        if not isinstance(row, dict) or set(row) != {"analysis", *counts} or not isinstance(row["analysis"], str):
            return None
        if not all(type(row[name]) is int and 0 <= row[name] < 2**31 for name in counts):
            return None
        found.append(Tried(**row))
    return tuple(found)


def _is_line(value: object, longest: int) -> bool:
    return isinstance(value, str) and 0 < len(value) <= longest and is_plain(value)


def _bad(kind: str, whose: str, what: str) -> StudyError:
    return StudyError(
        f"the {kind} of {whose}: {what}",
        hint=f"nothing is exported on such a document; ask {whose} for the original over another channel",
        code=RefusalCode.STUDY,
    )
