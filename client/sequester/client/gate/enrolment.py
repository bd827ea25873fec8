"""This hospital joins a consortium: keys are made here and stay here, three public halves go out, a certificate comes back.

In order: read the token; compare the authority's certificate with the token's hash BEFORE anything is said; make the keys;
compare clocks; ask; let two people compare the fingerprint; collect. Everything lies under `enrolment/<consortium>/` until
it is whole, so a run that was cut short goes on where it stopped, with the same keys.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from cryptography.x509.oid import NameOID

from sequester.client.config import Home, SiteConfig
from sequester.client.gate import tls
from sequester.client.gate.ledger import Ledger
from sequester.client.gate.reach import presented
from sequester.protocols import exchange_pb2 as pb
from sequester.protocols.enrolment import (
    CLOCK_METADATA,
    COORDINATOR_KEY_URI,
    Token,
    clock_fault,
    read_token,
    statement,
)
from sequester.protocols.errors import PeerError, SequesterError, SiteError
from sequester.protocols.signing import fingerprint, raw_public, sha256, spoken

_BUSY_S = (0.5, 1.0, 2.0)  # pauses before a call that the exchange had no time for is made again
CALL_S = 15.0
_NEW_TOKEN = "ask the coordinator for a new invitation"


@dataclass(frozen=True, slots=True)
class Enrolled:
    """How far an enrolment is. `fingerprint` is this site's own, to be read to the coordinator."""

    consortium: str
    is_admitted: bool
    fingerprint: str


def enrol(
    home: Home,
    token: str | None,
    wait: bool = True,
    say: Callable[[str], None] = lambda text: None,
    poll_s: float = 2.0,
    clock: Callable[[], float] = time.time,
) -> Enrolled:
    """Join, or go on joining (`token` None). With `wait` it ends when the coordinator has decided."""
    config = home.config()
    invitation = _invitation(home, config, token)
    folder, place = home.root / "enrolment" / invitation.consortium, home.consortium(invitation.consortium)
    with _alone(folder):
        if (folder / "ready").exists():  # cut short while it was being moved into place
            mark = fingerprint(raw_public(_identity(folder if (folder / "identity.key").exists() else place)))
            finished = (folder / "token").read_text("ascii") == invitation.text()
            _move(folder, place)
            if finished:
                return Enrolled(invitation.consortium, True, mark)
        folder.mkdir(mode=0o700, exist_ok=True)
        _write(folder / "token", invitation.text().encode(), replace=True)
        proxy = config.network.https_proxy
        authority = _authority(invitation, proxy, clock())
        identity = _make_keys(folder, place, invitation, authority)
        mark = fingerprint(raw_public(identity))
        where = tls.membership_of(invitation)
        with _channel(where, authority, proxy) as channel:
            if fault := clock_fault(ahead_s(channel, where.site, clock)):
                raise SiteError(fault, hint="let this machine keep time by NTP, then repeat; nothing was sent")
            answer = _ask(channel, "Request", _request(folder, invitation, identity, clock()))
            _require_ours(answer, invitation, authority)
            if answer.state == pb.EnrolmentAnswer.PENDING:
                say(f"this site's fingerprint: {spoken(mark)}")
                say("read it to the coordinator over another channel; the coordinator admits you with it.")
            while answer.state == pb.EnrolmentAnswer.PENDING and wait:
                time.sleep(poll_s)
                answer = _collect(channel, invitation) or answer
        if answer.state == pb.EnrolmentAnswer.PENDING:
            return Enrolled(invitation.consortium, False, mark)
        if answer.state != pb.EnrolmentAnswer.ADMITTED:
            raise SiteError("the coordinator refused this enrolment", hint="ask why; a new invitation starts again")
        _keep_certificate(folder, answer.certificate_pem, invitation.site, authority)
        tls.write_membership(folder / "consortium.json", where)
        Ledger.found(home.dataset(config.data.id), config.policy)
        _write(folder / "ready", b"", replace=True)
        _move(folder, place)
    return Enrolled(invitation.consortium, True, mark)


# ---- before anything is said ----------------------------------------------------------------------------------------


def _invitation(home: Home, config: SiteConfig, text: str | None) -> Token:
    if text is None:
        begun = sorted((home.root / "enrolment").glob("*/token"))
        if len(begun) != 1:
            joined = f"; this site belongs to {', '.join(home.consortia())}" if home.consortia() else ""
            raise SiteError(
                f"{len(begun)} enrolments are under way here{joined}; without a token there must be one",
                hint="to join or renew, give the token that the coordinator's `invite` printed",
            )
        text = begun[0].read_text("ascii")
    invitation = read_token(text)
    if invitation.site != config.site.id:
        raise SiteError(
            f"the invitation is for `{invitation.site}`; site.toml says this is `{config.site.id}`",
            hint="correct [site] id in site.toml, or ask for an invitation in this name",
        )
    present = home.consortium(invitation.consortium)
    if present.exists() and tls.membership(present).authority != invitation.authority:
        raise SiteError(
            f"this site belongs to another consortium named `{invitation.consortium}`",
            hint=f"ask both coordinators; move {present} aside only when its studies are over",
        )
    return invitation


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder.parent / f"{folder.name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SiteError("another `enrol` runs here", hint="wait for it, or end it; nothing is lost") from None
        yield
    finally:
        os.close(descriptor)


def _authority(invitation: Token, https_proxy: str, now: float) -> x509.Certificate:
    """The authority's certificate, fetched from whoever answers and believed only for its hash."""
    chain = presented(invitation.host, invitation.enrolment_port, https_proxy)
    found = next((der for der in chain if sha256(der) == invitation.authority), None)
    if found is None:
        raise PeerError(
            f"{invitation.host}:{invitation.enrolment_port} presents another authority than the invitation names: "
            f"expected {invitation.authority[:16]}, found {', '.join(sha256(der)[:16] for der in chain[-1:]) or 'none'}",
            hint="nothing was sent. A TLS-inspecting proxy or a wrong server stands between: tell the coordinator",
        )
    leaf = x509.load_der_x509_certificate(chain[0])
    today = datetime.fromtimestamp(now, UTC)
    if not leaf.not_valid_before_utc <= today <= leaf.not_valid_after_utc:
        raise SiteError(
            f"the exchange's certificate is good from {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} to "
            f"{leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; this machine's clock says {today:%Y-%m-%d %H:%M}",
            hint="set this machine's clock (NTP); if it is right, the coordinator must renew the certificate",
        )
    return x509.load_der_x509_certificate(found)


def coordinator_key(authority: x509.Certificate) -> bytes:
    """The coordinator's raw Ed25519 key, as the authority's certificate names it."""
    try:
        names = authority.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        (key,) = [uri.removeprefix(COORDINATOR_KEY_URI) for uri in uris if uri.startswith(COORDINATOR_KEY_URI)]
        if len(raw := bytes.fromhex(key)) != 32:
            raise ValueError
    except (x509.ExtensionNotFound, ValueError):
        raise PeerError(
            "the authority's certificate does not name the coordinator's key",
            hint="tell the coordinator; nothing was sent",
        ) from None
    return raw


# ---- keys, made here ------------------------------------------------------------------------------------------------


def _make_keys(folder: Path, present: Path, invitation: Token, authority: x509.Certificate) -> Ed25519PrivateKey:
    """The identity key; every file that is not there yet is written. A hospital that enrols again keeps its identity."""
    for name in ("identity.key", "supernode.key", "superexec.secret"):
        if not (folder / name).exists() and (present / name).exists():
            _write(folder / name, (present / name).read_bytes(), 0o640 if name == "superexec.secret" else 0o600)
    pem, plain = Encoding.PEM, NoEncryption()
    made: list[tuple[str, int, Callable[[], bytes]]] = [
        ("identity.key", 0o600, lambda: Ed25519PrivateKey.generate().private_bytes(pem, PrivateFormat.PKCS8, plain)),
        ("tls.key", 0o600, lambda: _curve(ec.SECP256R1()).private_bytes(pem, PrivateFormat.PKCS8, plain)),
        ("supernode.key", 0o600, lambda: _curve(ec.SECP384R1()).private_bytes(pem, PrivateFormat.OpenSSH, plain)),
        ("superexec.secret", 0o640, lambda: os.urandom(32)),
    ]
    for name, mode, make in made:
        if not (folder / name).exists():
            _write(folder / name, make(), mode)
    supernode = _private(folder / "supernode.key")
    public = supernode.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    _write(folder / "supernode.key.pub", public + b"\n", 0o644, replace=True)
    _write(folder / "authority.pem", authority.public_bytes(Encoding.PEM), 0o644, replace=True)
    _write(folder / "coordinator.pub", coordinator_key(authority).hex().encode() + b"\n", 0o644, replace=True)
    if not (folder / "request.pem").exists():
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"sequester:site:{invitation.site}")])
        request = (
            x509.CertificateSigningRequestBuilder().subject_name(subject).sign(_private(folder / "tls.key"), SHA256())
        )
        _write(folder / "request.pem", request.public_bytes(Encoding.PEM), 0o644)
    return _identity(folder)


def _identity(folder: Path) -> Ed25519PrivateKey:
    identity = _private(folder / "identity.key")
    if not isinstance(identity, Ed25519PrivateKey):
        raise SiteError(f"{folder / 'identity.key'} is not an Ed25519 key", hint="remove the folder and enrol again")
    return identity


def _curve(curve: ec.EllipticCurve) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(curve)


def _private(path: Path) -> Any:
    try:
        data = path.read_bytes()
        if b"OPENSSH" in data:
            return load_ssh_private_key(data, None)
        return load_pem_private_key(data, None)
    except (OSError, ValueError, TypeError):
        raise SiteError(f"{path} cannot be read", hint="remove its folder and enrol again with a new token") from None


def _write(path: Path, data: bytes, mode: int = 0o600, replace: bool = False) -> None:
    """Whole or not at all, with its final permissions from the first byte on."""
    unfinished = path.with_name(path.name + ".new")
    unfinished.unlink(missing_ok=True)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(data)
        file.flush()
        os.fsync(descriptor)
    if path.exists() and not replace:
        raise SiteError(f"{path} is there already", hint="a key is never replaced; another `enrol` may have run")
    unfinished.replace(path)


# ---- asking ---------------------------------------------------------------------------------------------------------


def _channel(place: tls.Membership, authority: x509.Certificate, https_proxy: str) -> grpc.Channel:
    credentials = grpc.ssl_channel_credentials(authority.public_bytes(Encoding.PEM))
    return grpc.secure_channel(place.address(place.enrolment_port), credentials, tls.proxy_options(https_proxy))


def enrolment_channel(folder: Path, place: tls.Membership, https_proxy: str) -> grpc.Channel:
    """A channel to the enrolment port that trusts the authority in `folder`."""
    return _channel(place, x509.load_pem_x509_certificate((folder / "authority.pem").read_bytes()), https_proxy)


def ahead_s(channel: grpc.Channel, site: str, clock: Callable[[], float] = time.time) -> float:
    """How many seconds this machine's clock runs before the exchange's. Sends the site's name and no secret."""
    before = clock()
    call = _stub(channel, "Collect", pb.EnrolmentCollect(site=site))
    after = clock()
    stamps = [int(value) for key, value in call.trailing_metadata() or () if key == CLOCK_METADATA]
    if not stamps:
        raise _fault(call, "Collect")
    return (before + after) / 2 - stamps[0] / 1000


def _request(folder: Path, invitation: Token, identity: Ed25519PrivateKey, now: float) -> pb.EnrolmentRequest:
    request = pb.EnrolmentRequest(
        token_secret=bytes.fromhex(invitation.secret),
        site=invitation.site,
        tls_request_pem=(folder / "request.pem").read_bytes(),
        identity_key=raw_public(identity),
        supernode_key=(folder / "supernode.key.pub").read_bytes().strip(),
        clock_unix_ms=int(now * 1000),
    )
    request.proof = identity.sign(statement(request, invitation.authority))
    return request


def _stub(channel: grpc.Channel, method: str, request: Any) -> Any:
    """The finished call, whatever became of it."""
    stub = channel.unary_unary(
        f"/sequester.v1.Enrolment/{method}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=pb.EnrolmentAnswer.FromString,
    )
    call = stub.future(request, timeout=CALL_S)
    call.exception()
    return call


def _ask(channel: grpc.Channel, method: str, request: Any) -> pb.EnrolmentAnswer:
    call = _stub(channel, method, request)
    for pause in _BUSY_S:  # many hospitals behind one address: the exchange serves some calls a second
        if call.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            break
        time.sleep(pause)
        call = _stub(channel, method, request)
    if call.code() is not grpc.StatusCode.OK:
        raise _fault(call, method)
    answer: pb.EnrolmentAnswer = call.result()
    return answer


def _collect(channel: grpc.Channel, invitation: Token) -> pb.EnrolmentAnswer | None:
    """The exchange's answer; None while it is away: it may be restarted while two people talk."""
    secret = bytes.fromhex(invitation.secret)
    call = _stub(channel, "Collect", pb.EnrolmentCollect(token_secret=secret, site=invitation.site))
    if call.code() in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    ):
        return None
    if call.code() is not grpc.StatusCode.OK:
        raise _fault(call, "Collect")
    answer: pb.EnrolmentAnswer = call.result()
    return answer


def _fault(call: Any, method: str) -> SequesterError:
    """The error for a call that was not answered with yes."""
    said = str(call.details() or "")[:160]
    match call.code(), said:
        case grpc.StatusCode.PERMISSION_DENIED, "expired token":
            return SiteError("this invitation has expired", hint=_NEW_TOKEN)
        case grpc.StatusCode.PERMISSION_DENIED, _:
            return SiteError(
                "the exchange does not know this invitation: a newer one replaced it, or it is another's",
                hint=_NEW_TOKEN,
            )
        case grpc.StatusCode.ALREADY_EXISTS, _:
            return SiteError(
                "this invitation was used already, with other keys than this machine's",
                hint="if that was not you, tell the coordinator at once: somebody has your token. "
                "Otherwise ask for a new invitation",
            )
        case ((grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED), _):
            return SiteError(
                f"the exchange does not answer on its enrolment port ({said})",
                hint="`sequester-client doctor` tests name, port, certificate and clock one by one",
            )
        case code, _:
            return PeerError(
                f"the exchange refused `{method}`: {code.name.lower().replace('_', ' ')} ({said})",
                hint="tell the coordinator; a newer exchange may need a newer client",
            )


# ---- what comes back ------------------------------------------------------------------------------------------------


def _require_ours(answer: pb.EnrolmentAnswer, invitation: Token, authority: x509.Certificate) -> None:
    """The exchange's word is compared with what the token vouches for; nothing is taken from it."""
    if (answer.consortium, answer.coordinator_key) != (invitation.consortium, coordinator_key(authority)):
        raise PeerError(
            "the exchange names another consortium or another coordinator's key than the authority's certificate",
            hint="stop, and tell the coordinator over another channel",
        )


def _keep_certificate(folder: Path, pem: bytes, site: str, authority: x509.Certificate) -> None:
    own = _private(folder / "tls.key").public_key()
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        certificate.verify_directly_issued_by(authority)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        is_ours = certificate.public_key() == own and [name.value for name in names] == [f"sequester:site:{site}"]
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        is_ours = False
    if not is_ours:
        raise PeerError(
            f"the certificate that came back is not for `{site}`, this machine's key and our authority",
            hint="nothing was installed; tell the coordinator",
        )
    _write(folder / "tls.pem", certificate.public_bytes(Encoding.PEM), 0o644, replace=True)


def _move(folder: Path, place: Path) -> None:
    """Into `consortia/`: at once where there is nothing yet, file by file where a membership is renewed. May be repeated."""
    passing = ("request.pem", "token", "ready")
    if not place.exists():
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.rename(place)
    else:
        for path in sorted(folder.iterdir()):
            if path.name not in passing:
                path.replace(place / path.name)
    left = folder if folder.exists() else place
    for name in passing:
        (left / name).unlink(missing_ok=True)
    if folder.exists():
        folder.rmdir()
