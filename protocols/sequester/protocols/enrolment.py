"""What a hospital and the consortium agree on when it joins: the token, what is proved, whose clock may differ by how much.

The token travels over another channel (a letter, a call). It names the authority's SHA-256, so a site knows whom it talks
to before it says anything, and a secret that is good once. The authority's certificate names the coordinator's signing
key: an exchange that holds neither cannot put its own key in the place of the coordinator's.
"""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from sequester.protocols import exchange_pb2 as pb
from sequester.protocols.errors import StudyError
from sequester.protocols.signing import canonical
from sequester.protocols.study import SiteId

PREFIX = "sq1."
COORDINATOR_KEY_URI = "sequester:coordinator-key:"
CLOCK_METADATA = "sequester-clock-ms"
FAST_S, SLOW_S = 5, 305  # a SuperNode's clock: at most 5 s ahead, 305 s behind (spec/flower.md, fact 12)
MAX_TOKEN = 2048

ConsortiumId = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
Host = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.:-]{0,251}[A-Za-z0-9])?$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Hex32 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Token(BaseModel):
    """An invitation. `authority` is the SHA-256 of the authority's certificate (DER), `expires` Unix seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    consortium: ConsortiumId
    site: SiteId
    host: Host
    enrolment_port: Port
    exchange_port: Port
    superlink_port: Port
    authority: Hex32
    secret: Hex32
    expires: int

    def text(self) -> str:
        """One line to copy."""
        return PREFIX + base64.urlsafe_b64encode(canonical(self.model_dump())).decode("ascii").rstrip("=")


def read_token(text: str) -> Token:
    """The token in a line of text; white space around or inside (a wrapped line) does not matter."""
    packed = re.sub(r"\s+", "", text)
    try:
        if not packed.startswith(PREFIX) or len(packed) > MAX_TOKEN:
            raise ValueError
        body = packed.removeprefix(PREFIX)
        return Token.model_validate_json(base64.b64decode(body + "=" * (-len(body) % 4), b"-_", validate=True))
    except (ValueError, ValidationError):
        raise StudyError(
            f"this is not an invitation: {len(packed)} characters that should begin with `{PREFIX}`",
            hint="copy the whole line that the coordinator's `invite` printed",
        ) from None


def statement(request: pb.EnrolmentRequest, authority: str) -> bytes:
    """What a site's identity key signs: its name and its three public keys, for this authority (hex) only."""
    parts = (
        request.site.encode(),
        request.tls_request_pem,
        request.identity_key,
        request.supernode_key,
        bytes.fromhex(authority),
    )
    digest = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
    return b"sequester-enrolment/v1/" + digest


def read_fingerprint(text: str) -> str:
    """A fingerprint that a person typed: 64 hex digits, groups and case as they like."""
    digits = re.sub(r"[\s:-]+", "", text).lower()
    if not re.fullmatch(r"[0-9a-f]{64}", digits):
        raise StudyError(
            f"a fingerprint of {len(digits)} characters; expected 64 hex digits",
            hint="type all sixteen groups: a part of a fingerprint can be forged",
        )
    return digits


def clock_fault(ahead_s: float) -> str:
    """What is wrong with a site's clock that runs `ahead_s` before the consortium's, "" where it will do.

    >>> clock_fault(2.0), clock_fault(-400.0)
    ('', "this site's clock is 400 s slow; at most 305 s are accepted")
    """
    if ahead_s > FAST_S:
        return f"this site's clock is {ahead_s:.0f} s fast; at most {FAST_S} s are accepted"
    if ahead_s < -SLOW_S:
        return f"this site's clock is {-ahead_s:.0f} s slow; at most {SLOW_S} s are accepted"
    return ""
