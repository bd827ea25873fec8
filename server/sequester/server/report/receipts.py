"""What each hospital signed at the end of a study: verified against the study's roster before anything is printed.

A receipt speaks of bytes, charges and a ledger's head, never of patients. Its text comes from a hospital and is treated
as such: fields of another shape, or more charges than the study reserves, are a fault of that receipt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sequester.protocols import privacy
from sequester.protocols.errors import StudyError
from sequester.protocols.faults import is_plain
from sequester.protocols.signing import open_document
from sequester.protocols.study import Study

_LONGEST = 300
_MOST_EXACT = 1000


@dataclass(frozen=True, slots=True)
class Life:
    """epsilon of everything that a data set's ledger was charged, by PLD, and its exact releases by name."""

    epsilon: float
    two_copies: float
    delta: float
    exact: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Receipt:
    """One site's: charges by analysis as its ledger counted them, and where its ledger stood afterwards.

    `life` is None in receipts of programs that did not say it.
    """

    site: str
    state: str
    bytes_up: int
    charges: dict[str, int]
    isolation: str
    allow_unisolated: bool
    ledger_counter: int
    ledger_head: str
    time: str
    life: Life | None = None


def opened(study: Study, digest: str, documents: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """Bodies by site, every signature checked against the roster's key; a `StudyError` names the site that fails."""
    keys = dict(zip(study.site_ids, study.roster, strict=True))
    bodies = {}
    for site, data in sorted(documents.items()):
        if site not in keys:
            raise _bad(site, "no hospital of this study has that name")
        try:
            bodies[site] = open_document(data, "receipt", keys[site]).body
        except StudyError as error:
            raise _bad(site, error.message) from None
        read(study, digest, site, bodies[site])
    return bodies


def read(study: Study, digest: str, site: str, body: Mapping[str, Any]) -> Receipt:
    """The receipt in a verified body; a `StudyError` that names the site where it is about something else."""
    if body.get("study") != digest or body.get("site") != site:
        raise _bad(site, f"it is about study {body.get('study')!r:.16} at {body.get('site')!r:.32}")
    charges, ledger = body.get("charges"), body.get("ledger")
    if not isinstance(charges, dict) or not isinstance(ledger, dict):
        raise _bad(site, "its charges or its ledger are missing")
    reserved = {plan.name: privacy.charges(study, plan) for plan in study.analyses}
    for name, count in charges.items():
        if name not in reserved or not _is_count(count) or count > reserved[name]:
            raise _bad(
                site, f"it counts {count!r:.12} charges for {name!r:.40}, the study reserves {reserved.get(name, 0)}"
            )
    texts = {name: body.get(name) for name in ("state", "isolation", "time")}
    for name, text in texts.items():
        if not isinstance(text, str) or len(text) > _LONGEST or not is_plain(text):
            raise _bad(site, f"`{name}` is not one line of plain text")
    counter, head = ledger.get("counter"), ledger.get("head")
    if not _is_count(counter) or not isinstance(head, str) or not re.fullmatch(r"[0-9a-f]{64}", head):
        raise _bad(site, "its ledger's counter or head is missing")
    if not _is_count(body.get("bytes_up")) or not isinstance(body.get("allow_unisolated"), bool):
        raise _bad(site, "`bytes_up` or `allow_unisolated` is missing")
    return Receipt(
        site, str(texts["state"]), body["bytes_up"], dict(charges), str(texts["isolation"]), body["allow_unisolated"],
        int(str(counter)), head, str(texts["time"]), None if body.get("life") is None else _life(site, body["life"]),
    )  # fmt: skip


def _life(site: str, value: Any) -> Life:
    try:
        figures = {name: value[name] for name in ("epsilon", "two_copies")} | {"delta": float(value["delta"])}
        exact = tuple(value["exact"])
        whole = all(type(v) in (int, float) and 0 <= v < 1e6 for v in figures.values()) and len(exact) <= _MOST_EXACT
        whole = whole and all(isinstance(name, str) and 0 < len(name) <= 80 and is_plain(name) for name in exact)
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise _bad(site, "what it says of its data set's whole life is not figures and names")
    return Life(float(figures["epsilon"]), float(figures["two_copies"]), figures["delta"], exact)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _bad(site: str, what: str) -> StudyError:
    return StudyError(
        f"the receipt of {site}: {what}",
        hint=f"nothing was written; ask {site} for its receipt (receipts/ in its home) over another channel",
    )
