"""The gate's unix socket for Flower: the executor asks whether a bundle is approved, the ClientApp brings a `join`.

One JSON line asked, one answered. Nothing else can be asked, and no answer says more than a code of the closed list.
The executor's account needs the socket's group, and no other file of the gate.
"""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path
from typing import Any, Protocol

from sequester.client.gate import control
from sequester.protocols.errors import RefusalCode, SiteError

log = logging.getLogger("sequester.door")

VARIABLE = "SEQUESTER_DOOR"
WAIT_S = 60.0  # the gate answers a `join` in less; after this the ClientApp says "not yet"
BUNDLE_S = 10.0
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NONSENSE = {"status": "refused", "code": RefusalCode.STUDY.value}


class Consortium(Protocol):
    """What stands behind the door."""

    async def bundle_approved(self, sha256: str) -> bool:
        """Whether some approved study names this bundle."""

    async def join(self, digest: str, bundle: str) -> tuple[str, str]:
        """Status and public code."""


def is_digest(value: object) -> bool:
    """Whether this is 64 lower-case hex digits."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


async def serve_door(path: Path, consortium: Consortium) -> asyncio.Server:
    """The listening door (mode 0660). What is not one of the two questions is refused."""

    async def answer(request: dict[str, Any]) -> dict[str, Any]:
        try:
            match request:
                case {"ask": "bundle", "sha256": sha256} if len(request) == 2 and is_digest(sha256):
                    return {"approved": await consortium.bundle_approved(sha256)}
                case {"ask": "join", "study": study, "bundle": bundle} if (
                    len(request) == 3 and is_digest(study) and is_digest(bundle)
                ):
                    status, code = await consortium.join(study, bundle)
                    return {"status": status, "code": code}
        except Exception:
            log.exception("a question at the door failed")
            return {"status": "refused", "code": RefusalCode.NOT_READY.value}
        return dict(_NONSENSE)

    return await control.serve(path, answer, mode=0o660)


def bundle_approved(path: Path, sha256: str) -> bool:
    """Whether the gate approves of the bundle; a `SiteError` where no gate answers."""
    return control.ask(path, {"ask": "bundle", "sha256": sha256}, BUNDLE_S).get("approved") is True


def join(path: Path, study: str, bundle: str) -> tuple[str, str]:
    """("joined", ""), ("not yet", "") or ("refused", code); "not yet" too where no gate answers in time."""
    try:
        answer = control.ask(path, {"ask": "join", "study": study, "bundle": bundle}, WAIT_S)
    except SiteError as error:
        log.warning("%s", error.message)
        return "not yet", ""
    match answer:
        case {"status": "joined" | "not yet" as status}:
            return status, ""
        case {"status": "refused", "code": str(code)} if code in RefusalCode.__members__:
            return "refused", code
    return "refused", RefusalCode.NOT_READY.value
