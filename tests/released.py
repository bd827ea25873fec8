"""Verdicts, waivers and countersignatures as hospitals and coordinator sign them, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import contracts
from sequester.client.config import Home
from sequester.client.gate import approval
from sequester.client.gate.release import keep
from sequester.protocols import privacy, release
from sequester.protocols.release import Documents, Tried, Word
from sequester.protocols.signing import open_document, sign_document
from sequester.protocols.study import Study

TIME = "2026-11-24T20:15:00Z"


def tried(study: Study) -> list[Tried]:
    """The sizes of a short trial."""
    return [Tried(plan.name, 600, len(study.features()), 900, 3) for plan in release.models(study)]


def verdict(of: Study, at: str, has_passed: bool = True, key: Any = None, **changed: Any) -> bytes:
    """One hospital's verdict, by its own key unless another is given."""
    body = release.verdict_body(privacy.study_digest(of), at, has_passed, "short", tried(of), 1, "0.1.0", TIME)
    return sign_document("verdict", body | changed, key or contracts.SITES[at])


def verdicts(study: Study, **words: Word) -> dict[str, bytes]:
    """Passes of every hospital but those named: `failed`, or none where they are `missing`."""
    words_of = {site: words.get(site, "passed") for site in study.site_ids}
    return {site: verdict(study, site, word == "passed") for site, word in words_of.items() if word != "missing"}


def waiver(study: Study, stood: dict[str, Word], reason: str = "The machine is down.", key: Any = None) -> bytes:
    """The coordinator's waiver."""
    body = release.waiver_body(privacy.study_digest(study), reason, stood, TIME)
    return sign_document("waiver", body, key or contracts.COORDINATOR)


def countersigned(study: Study, of: bytes, sites: Sequence[str] | None = None) -> dict[str, bytes]:
    """Countersignatures under a waiver by every hospital, or by these."""
    named = open_document(of, "waiver", None).digest
    found = {}
    for site in study.site_ids if sites is None else sites:
        body = release.countersignature_body(privacy.study_digest(study), site, named, "ab" * 32, "dpo", TIME)
        found[site] = sign_document("countersignature", body, contracts.SITES[site])
    return found


def passed_here(home: Home, consortium: str, study: Study) -> None:
    """A hospital that tried its installation before: its own pass lies there, not yet sent."""
    site, digest = home.config().site.id, privacy.study_digest(study)
    if release.models(study):
        document = verdict(study, site, key=approval.identity(home, consortium), program=version("sequester"))
        keep(home, consortium, digest, "verdict", document)


def passes(study: Study) -> Documents:
    """What lets a study's models out; nothing for one without private models."""
    return Documents(verdicts(study)) if release.models(study) else Documents()
