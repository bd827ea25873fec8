"""What the exchange keeps of the release gate, and what it lets out: verdicts, a waiver, countersignatures.

Each is checked against the signed roster or the coordinator's key before it is kept. Whoever fetches results judges the
same documents again: the exchange can neither forge a pass nor a name under a waiver.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sequester.protocols import release
from sequester.protocols.errors import StudyError
from sequester.protocols.release import Release

if TYPE_CHECKING:
    from sequester.server.exchange import Exchange


def attest(exchange: Exchange, site: str, document: bytes) -> None:
    """Keep a hospital's verdict, or its name under the waiver that stands."""
    digest = _study_of(document)
    study = exchange.addressed(site, digest)
    kind = str(json.loads(document)["kind"])
    match kind:
        case "verdict":
            release.read_verdict(study, digest, site, document)
        case "countersignature":
            standing = exchange.release(digest).waiver
            if standing is None or release.read_countersignature(study, digest, site, document) != standing.digest:
                raise StudyError(
                    f"`{site}` countersigned a waiver that does not stand",
                    hint="`sequester-client countersign` shows the one that does; nothing was changed",
                )
        case _:
            raise StudyError(f"a `{kind[:20]}` says nothing of the release gate", hint="nothing was changed")
    exchange.store.attest(digest, kind, site, document)


def waive(exchange: Exchange, coordinator: bytes, document: bytes) -> None:
    """Keep the coordinator's waiver; an older one, and every name under it, no longer counts."""
    digest = _study_of(document)
    release.read_waiver(exchange.study(digest), digest, coordinator, document)
    exchange.store.attest(digest, "waiver", "", document)


def words(standing: Release) -> dict[str, object]:
    """For `study status`: what each hospital's verdict is, what lets models out, who has signed a waiver."""
    row: dict[str, object] = {"sites": standing.words, "granted_by": standing.granted_by}
    if standing.waiver is not None:
        row["waiver"] = {"reason": standing.waiver.reason, "countersigned": list(standing.countersigned)}
    return row


def _study_of(document: bytes) -> str:
    try:
        return str(json.loads(document)["body"]["study"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise StudyError("this is not a signed document about a study", hint="nothing was changed") from None
