"""What hospitals said to a study: their signed documents, and where that leaves each of them.

The exchange relays decisions; whether an approval still holds is checked by the hospital's own gate when the study calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from sequester.protocols.errors import RefusalCode, StudyError
from sequester.protocols.signing import open_document
from sequester.protocols.study import Study

REFUSAL = "refusal"
_MAX_ROLES, _MAX_BYTES = 16, 1 << 14


def read(document: bytes, site: str, study_of: Callable[[str], Study]) -> tuple[str, str, list[str]]:
    """(study digest, role, every role that the hospital asks for) of a decision that it signed.

    The role of a no is "refusal", and it asks for nobody.
    """
    if len(document) > _MAX_BYTES:
        raise StudyError(
            f"a decision of {len(document)} bytes, at most {_MAX_BYTES} are kept", hint="nothing was changed"
        )
    try:
        value = json.loads(document)
        kind, digest = str(value["kind"]), str(value["body"]["study"])
    except (ValueError, KeyError, TypeError):
        raise StudyError("this is not a signed decision", hint="use `sequester-client approve` or `refuse`") from None
    study = study_of(digest)
    if kind not in ("approval", REFUSAL) or site not in study.site_ids:
        raise StudyError(
            f"a `{kind[:20]}` by `{site}` decides nothing about study {digest[:12]}", hint="ask the coordinator"
        )
    body = open_document(document, kind, study.roster[study.site_ids.index(site)]).body
    if body.get("site") != site:
        raise StudyError(f"`{site}` sent a decision of another hospital", hint="nothing was changed")
    if kind == REFUSAL:
        if body.get("code") not in RefusalCode.__members__:
            raise StudyError("a refusal with an unknown code", hint="update the older of client and exchange")
        return digest, REFUSAL, []
    approvers, role = body.get("approvers"), body.get("role")
    if not isinstance(approvers, list) or role not in approvers or len(approvers) > _MAX_ROLES:
        raise StudyError("an approval in a role that the hospital does not ask for", hint="nothing was changed")
    return digest, str(role), [str(name) for name in approvers]


def standing(decisions: Mapping[str, Mapping[str, bytes]], study: Study) -> dict[str, str]:
    """Site -> `approved`, `1 of 2 approved`, `refused: CODE` or `not decided`, in roster order."""
    words = {}
    for site in study.site_ids:
        given = decisions.get(site, {})
        if REFUSAL in given:
            words[site] = f"refused: {json.loads(given[REFUSAL])['body']['code']}"
        elif given:
            asked = set(json.loads(next(iter(given.values())))["body"]["approvers"])
            have = asked & set(given)
            words[site] = "approved" if have == asked else f"{len(have)} of {len(asked)} approved"
        else:
            words[site] = "not decided"
    return words
