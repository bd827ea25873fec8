"""Hospitals join: a one-time invitation, a request with public keys, a person's comparison, a certificate.

The coordinator makes the token; the exchange keeps only the SHA-256 of its secret. What a site sends proves possession
of its TLS key (a signed request) and of its identity key (a signature over everything). Nothing is admitted by the
exchange: certificate and `member` document come from the coordinator, whose keys are not here. A new invitation of an
admitted hospital (a certificate renewed, keys lost) leaves what it has in force until the coordinator admits it again.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable
from typing import Any, Protocol

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256

from sequester.protocols import exchange_pb2 as pb
from sequester.protocols.enrolment import CLOCK_METADATA, statement
from sequester.protocols.errors import StudyError
from sequester.protocols.secagg.keys import is_signed
from sequester.protocols.signing import open_document, sha256
from sequester.server.authority import requested_key

MAX_REQUEST = 16 * 1024
_BURST, _PER_S, _MAX_ADDRESSES = 60.0, 10.0, 4096

_STATES = {
    "pending": pb.EnrolmentAnswer.PENDING,
    "admitted": pb.EnrolmentAnswer.ADMITTED,
    "refused": pb.EnrolmentAnswer.REFUSED,
}


class Execution(Protocol):
    """The one thing needed of a database connection."""

    def execute(self, sql: str, parameters: tuple[Any, ...] = (), /) -> Any: ...


class Keeper(Protocol):
    """Where invitations and enrolments lie: `store.Store`, durable before anything is answered."""

    @property
    def db(self) -> Execution: ...


class Rate:
    """Calls of one address: 60 at once, then 10 a second. Old addresses are forgotten first."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}

    def is_within(self, address: str) -> bool:
        """True where this call may be served; counts it."""
        now = self._clock()
        left, since = self._left.pop(address, (_BURST, now))
        left = min(_BURST, left + max(0.0, now - since) * _PER_S)
        while len(self._left) >= _MAX_ADDRESSES:
            del self._left[next(iter(self._left))]
        self._left[address] = (max(0.0, left - 1.0), now)
        return left >= 1.0


class EnrolmentService:
    """The `Enrolment` servicer (grpc.aio). Every answer and every refusal carries this machine's clock."""

    def __init__(
        self,
        store: Keeper,
        consortium: str,
        authority_pem: bytes,
        coordinator_key: bytes,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._consortium = consortium
        self._authority_pem = authority_pem
        self._authority = x509.load_pem_x509_certificate(authority_pem).fingerprint(SHA256()).hex()
        self._coordinator = coordinator_key
        self._clock = clock
        self._rate = Rate(time.monotonic)

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """What `server.add_generic_rpc_handlers` takes."""
        methods = {
            "Request": grpc.unary_unary_rpc_method_handler(
                self.Request, pb.EnrolmentRequest.FromString, pb.EnrolmentAnswer.SerializeToString
            ),
            "Collect": grpc.unary_unary_rpc_method_handler(
                self.Collect, pb.EnrolmentCollect.FromString, pb.EnrolmentAnswer.SerializeToString
            ),
        }
        handler: grpc.GenericRpcHandler[Any, Any] = grpc.method_handlers_generic_handler(
            "sequester.v1.Enrolment", methods
        )
        return handler

    async def Request(self, request: pb.EnrolmentRequest, context: Any) -> pb.EnrolmentAnswer:
        """Keep a hospital's request, once, if its token is good; the same request again is answered again."""
        await self._admit_call(request, context)
        digest = hashlib.sha256(request.token_secret).digest()
        row = self._store.db.execute(
            "SELECT secret_sha256, expires FROM invitations WHERE site = ?", (request.site,)
        ).fetchone()
        if row is None or not hmac.compare_digest(bytes(row[0]), digest):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "unknown token")
        held = self._store.db.execute(
            "SELECT secret_sha256, request FROM enrolments WHERE site = ?", (request.site,)
        ).fetchone()
        if held is not None and bytes(held[0]) == digest:
            if _keys(pb.EnrolmentRequest.FromString(held[1])) != _keys(request):
                await context.abort(grpc.StatusCode.ALREADY_EXISTS, "this token was used with other keys")
            return self._answer(request.site)
        if row[1] < self._clock():
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "expired token")
        if (fault := proof_fault(request, self._authority)) != "":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, fault)
        kept = pb.EnrolmentRequest()
        kept.CopyFrom(request)
        kept.token_secret = b""
        skew = request.clock_unix_ms - int(self._clock() * 1000)
        self._store.db.execute(
            "INSERT INTO enrolments VALUES (?, 'pending', ?, ?, x'', x'', ?) ON CONFLICT (site) DO UPDATE SET "
            "state = 'pending', secret_sha256 = excluded.secret_sha256, request = excluded.request, "
            "skew_ms = excluded.skew_ms",
            (request.site, digest, kept.SerializeToString(), skew),
        )
        return self._answer(request.site)

    async def Collect(self, request: pb.EnrolmentCollect, context: Any) -> pb.EnrolmentAnswer:
        """The certificate, once a person admitted the hospital."""
        await self._admit_call(request, context)
        row = self._store.db.execute("SELECT secret_sha256 FROM enrolments WHERE site = ?", (request.site,)).fetchone()
        digest = hashlib.sha256(request.token_secret).digest()
        if row is None or not hmac.compare_digest(bytes(row[0]), digest):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "unknown token")
        return self._answer(request.site)

    async def _admit_call(self, request: Any, context: Any) -> None:
        context.set_trailing_metadata(((CLOCK_METADATA, str(int(self._clock() * 1000))),))
        if not self._rate.is_within(context.peer().rpartition(":")[0]):
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls from this address")
        if request.ByteSize() > MAX_REQUEST:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"a request beyond {MAX_REQUEST} bytes")

    def _answer(self, site: str) -> pb.EnrolmentAnswer:
        state, certificate = self._store.db.execute(
            "SELECT state, certificate FROM enrolments WHERE site = ?", (site,)
        ).fetchone()
        return pb.EnrolmentAnswer(
            state=_STATES[state],
            certificate_pem=certificate if state == "admitted" else b"",
            authority_pem=self._authority_pem,
            consortium=self._consortium,
            coordinator_key=self._coordinator,
            clock_unix_ms=int(self._clock() * 1000),
        )


def _keys(request: pb.EnrolmentRequest) -> tuple[bytes, bytes, bytes]:
    return request.tls_request_pem, request.identity_key, request.supernode_key


def proof_fault(request: pb.EnrolmentRequest | pb.EnrolmentRow, authority: str) -> str:
    """What does not hold in a hospital's three public keys, "" where all do. Asked by the exchange, and again by the
    coordinator, who does not take the exchange's word."""
    asked = pb.EnrolmentRequest(
        site=request.site,
        tls_request_pem=request.tls_request_pem,
        identity_key=request.identity_key,
        supernode_key=request.supernode_key,
    )
    if len(request.identity_key) != 32 or not is_signed(
        request.identity_key, request.proof, statement(asked, authority)
    ):
        return "the identity key's signature over the request does not hold"
    if not request.supernode_key.startswith(b"ecdsa-sha2-nistp384 ") or not request.supernode_key.strip().isascii():
        return "the SuperNode key is not an OpenSSH public key on P-384"
    try:
        requested_key(request.tls_request_pem, request.site)
    except StudyError as error:
        return error.message
    return ""


# ---- the coordinator's side, behind mutual TLS ----------------------------------------------------------------------


def invite(store: Keeper, invitation: pb.Invitation) -> None:
    """Keep one invitation; a newer one replaces it, and its token is void."""
    if len(invitation.secret_sha256) != 32 or not invitation.site:
        raise StudyError("an invitation without a site or a secret", hint="use `sequester-server invite SITE`")
    store.db.execute(
        "INSERT OR REPLACE INTO invitations VALUES (?, ?, ?)",
        (invitation.site, invitation.secret_sha256, invitation.expires_unix),
    )


def rows(store: Keeper) -> pb.EnrolmentList:
    """Every request with its public keys, for the coordinator to compare."""
    found = []
    for site, state, raw, skew in store.db.execute(
        "SELECT site, state, request, skew_ms FROM enrolments ORDER BY site"
    ):
        request = pb.EnrolmentRequest.FromString(raw)
        found.append(
            pb.EnrolmentRow(
                site=site, state=state, tls_request_pem=request.tls_request_pem, identity_key=request.identity_key,
                supernode_key=request.supernode_key, proof=request.proof, clock_skew_ms=skew,
            )
        )  # fmt: skip
    return pb.EnrolmentList(rows=found)


def admit(store: Keeper, admission: pb.Admission, coordinator_key: bytes) -> bytes:
    """Keep the coordinator's decision; the hospital's SuperNode key, to register at (or strike from) the SuperLink.

    The member document must be the coordinator's and name the very keys that asked: what a person compared is what
    stands, even where the hospital asked again in between. A refusal of an admitted hospital ends its membership; of
    one that asked anew, only the new request.
    """
    row = store.db.execute("SELECT state, request FROM enrolments WHERE site = ?", (admission.site,)).fetchone()
    if row is None:
        raise StudyError(
            f"`{admission.site}` has not asked to enrol", hint="`sequester-server enrolments` lists who has"
        )
    request = pb.EnrolmentRequest.FromString(row[1])
    if admission.refused:
        ended = ", certificate = x'', member = x''" if row[0] == "admitted" else ""
        store.db.execute(f"UPDATE enrolments SET state = 'refused'{ended} WHERE site = ?", (admission.site,))
        return request.supernode_key
    body = open_document(admission.member.json, "member", coordinator_key).body
    named = (body.get("site"), body.get("identity_key"), body.get("supernode_key"))
    asked = (admission.site, request.identity_key.hex(), request.supernode_key.decode("ascii", "replace").strip())
    if named != asked:
        raise StudyError(
            f"the member document names other keys than `{admission.site}` asked with",
            hint="`sequester-server enrolments` shows its present fingerprint; compare again",
        )
    store.db.execute(
        "UPDATE enrolments SET state = 'admitted', certificate = ?, member = ? WHERE site = ?",
        (admission.certificate_pem, admission.member.json, admission.site),
    )
    return request.supernode_key


def members(store: Keeper) -> list[bytes]:
    """The signed member documents of every hospital whose membership stands."""
    return [m for (m,) in store.db.execute("SELECT member FROM enrolments WHERE member != x'' ORDER BY site")]


def is_member(store: Keeper, site: str) -> bool:
    """True while a hospital's membership stands: its certificate alone outlives a refusal."""
    row = store.db.execute("SELECT 1 FROM enrolments WHERE site = ? AND member != x''", (site,)).fetchone()
    return row is not None


def is_admitted(store: Keeper, site: str, certificate_pem: bytes) -> bool:
    """True while a hospital's membership stands and this is the certificate that it was last admitted with.

    An older one verifies for a year: whoever stole its key is no longer the hospital once that was admitted anew.
    """
    row = store.db.execute("SELECT certificate FROM enrolments WHERE site = ? AND member != x''", (site,)).fetchone()
    if row is None:
        return False
    try:
        shown, stands = (x509.load_pem_x509_certificate(pem) for pem in (certificate_pem, bytes(row[0])))
    except ValueError:
        return False
    return shown == stands


def secret_digest(secret: str) -> bytes:
    """What the exchange keeps of a token's secret."""
    return bytes.fromhex(sha256(bytes.fromhex(secret)))
