"""The consortium's keys and certificates: made once by the coordinator, on the coordinator's machine.

`coordinator/` holds the Ed25519 key that signs studies and vouches for hospitals, the certificate authority, and a TLS
client key. `exchange/` holds only what the exchange's account needs to serve TLS. Private files are 0600, created once.
The authority's certificate names the coordinator's signing key, so whoever knows its SHA-256 knows both.
"""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pydantic import TypeAdapter, ValidationError

from sequester.protocols.enrolment import COORDINATOR_KEY_URI, ConsortiumId, Host
from sequester.protocols.errors import StudyError
from sequester.protocols.signing import raw_public, sha256, sign_document
from sequester.server.config import Home

YEAR = timedelta(days=365)
COORDINATOR_URI = "sequester:coordinator"
SITE_URI = "sequester:site:"
_SKEW = timedelta(minutes=10)
PORTS = ("enrolment_port", "exchange_port", "superlink_port", "control_port")


def site_uri(site: str) -> str:
    """The name a hospital's certificate carries."""
    return SITE_URI + site


def found(
    home: Home,
    consortium: str,
    host: str,
    ports: tuple[int, int, int, int] = (7441, 7442, 7443, 7444),
    passphrase: bytes | None = None,
) -> str:
    """Found a consortium: both folders, all keys; the SHA-256 of the authority's certificate.

    `ports` are enrolment, exchange, SuperLink and the loopback control port. Both folders are made aside and then moved
    into place; where one stands already nothing is changed.
    """
    _require(ConsortiumId, consortium, "a consortium's name is lower-case letters, digits and hyphens, at most 32")
    _require(Host, host, "--host is the name or address under which hospitals reach the exchange")
    if len(taken := [port for port in ports if port]) != len(set(taken)):
        said = ", ".join(f"{name} {port}" for name, port in zip(PORTS, ports, strict=True))
        raise StudyError(f"two ports are the same: {said}", hint="give each its own; nothing was changed")
    aside = Home(home.root / ".founding")
    for folder in (home.coordinator, home.exchange):
        if folder.exists():
            cut = f"a founding was cut short: remove {folder} and repeat" if aside.root.exists() else ""
            raise StudyError(
                f"{folder} exists: this home already holds a consortium",
                hint=cut or "choose another --home; nothing was changed",
            )
    shutil.rmtree(aside.root, ignore_errors=True)  # keys of a founding that was cut short: nobody ever saw them
    for folder in (aside.coordinator, aside.exchange, aside.exchange / "run"):
        folder.mkdir(mode=0o700, parents=True)
    signing = Ed25519PrivateKey.generate()
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = _authority(consortium, authority_key, raw_public(signing))
    pem = authority.public_bytes(Encoding.PEM)
    secret: KeySerializationEncryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    for name, own in (("coordinator.key", signing), ("authority.key", authority_key)):
        write_private(aside.coordinator / name, own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, secret))
    for folder in (aside.coordinator, aside.exchange):
        (folder / "authority.pem").write_bytes(pem)
        (folder / "coordinator.pub").write_text(raw_public(signing).hex() + "\n", "ascii")
        (folder / "consortium.toml").write_text(_settings(consortium, host, ports), "utf-8")
    for folder, uri, hosts in (
        (aside.coordinator, COORDINATOR_URI, []),
        # A SuperNode dials its gate's forwarder on 127.0.0.1, whatever the exchange is called.
        (aside.exchange, "sequester:exchange", sorted({host, "localhost", "127.0.0.1"})),
    ):
        key = ec.generate_private_key(ec.SECP256R1())
        write_private(folder / "tls.key", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        (folder / "tls.pem").write_bytes(_issue(authority, authority_key, key.public_key(), uri, hosts) + pem)
    write_private(aside.exchange / "superexec.secret", os.urandom(32), mode=0o640)
    aside.exchange.rename(home.exchange)
    aside.coordinator.rename(home.coordinator)
    aside.root.rmdir()
    return sha256(authority.public_bytes(Encoding.DER))


def _require(pattern: Any, value: str, sentence: str) -> None:
    try:
        TypeAdapter(pattern).validate_python(value)
    except ValidationError:
        raise StudyError(f"`{value[:64]}` will not do: {sentence}", hint="nothing was changed") from None


def _settings(consortium: str, host: str, ports: tuple[int, int, int, int]) -> str:
    lines = [f'consortium = "{consortium}"', f'host = "{host}"']
    return "\n".join(lines + [f"{name} = {port}" for name, port in zip(PORTS, ports, strict=True)]) + "\n"


def write_private(path: Path, data: bytes, mode: int = 0o600) -> None:
    """A new file only its owner reads; refuses to replace one."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)  # whatever the umask takes away or leaves
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def _authority(consortium: str, key: ec.EllipticCurvePrivateKey, coordinator: bytes) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{consortium} authority")])
    now = datetime.now(UTC)
    signs = dict.fromkeys(_KEY_USAGES, False) | {"key_cert_sign": True, "crl_sign": True}
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + 10 * YEAR)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**signs), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(COORDINATOR_KEY_URI + coordinator.hex())]),
            critical=False,
        )
        .sign(key, SHA256())
    )


_KEY_USAGES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip


def _issue(
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    public: ec.EllipticCurvePublicKey,
    uri: str,
    hosts: list[str],
    days: int = 365,
) -> bytes:
    """One year of `uri`, nothing of what a request asks for; a server's where it has `hosts`, otherwise a client's."""
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri)]
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    now = datetime.now(UTC)
    signs = dict.fromkeys(_KEY_USAGES, False) | {"digital_signature": True}
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, uri)]))
        .issuer_name(authority.subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**signs), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH]),
            critical=False,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
            critical=False,
        )
        .sign(authority_key, SHA256())
    )
    return certificate.public_bytes(Encoding.PEM)


def authority_digest(folder: Path) -> str:
    """SHA-256 of the authority's certificate in `folder`, as tokens name it."""
    return sha256(_certificate(folder).public_bytes(Encoding.DER))


def _certificate(folder: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate((folder / "authority.pem").read_bytes())
    except (OSError, ValueError):
        raise StudyError(
            f"{folder / 'authority.pem'} is missing or damaged", hint="`sequester-server init` founds a consortium"
        ) from None


def signing_key(home: Home, passphrase: bytes | None = None) -> Ed25519PrivateKey:
    """The coordinator's signing key."""
    key = _load(home.coordinator / "coordinator.key", passphrase)
    if not isinstance(key, Ed25519PrivateKey):
        raise StudyError(f"{home.coordinator / 'coordinator.key'} is not an Ed25519 key", hint="restore it")
    return key


def _load(path: Path, passphrase: bytes | None) -> object:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StudyError(f"{path}: {error.strerror}", hint="this command runs on the coordinator's machine") from None
    try:
        # A passphrase in the environment does no harm to a key that has none.
        return load_pem_private_key(data, passphrase if b"ENCRYPTED" in data else None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise StudyError(
            f"{path} does not open", hint="set SEQUESTER_PASSPHRASE to the passphrase it was made with"
        ) from None


def issue_site_certificate(
    home: Home, request_pem: bytes, site: str, passphrase: bytes | None = None, days: int = 365
) -> bytes:
    """The PEM certificate of a hospital for the P-256 key in its PKCS#10 request, one year."""
    if re.fullmatch(r"[a-z][a-z0-9-]{1,31}", site) is None:
        raise StudyError(f"`{site[:40]}` is no hospital's name", hint="lower-case letters, digits and hyphens")
    authority_key = _load(home.coordinator / "authority.key", passphrase)
    if not isinstance(authority_key, ec.EllipticCurvePrivateKey):
        raise StudyError(f"{home.coordinator / 'authority.key'} is not the authority's key", hint="restore it")
    return _issue(
        _certificate(home.coordinator), authority_key, requested_key(request_pem, site), site_uri(site), [], days
    )


def requested_key(request_pem: bytes, site: str) -> ec.EllipticCurvePublicKey:
    """The P-256 key in a PKCS#10 request that is signed with it."""
    try:
        request = x509.load_pem_x509_csr(request_pem)
        public = request.public_key()
        holds = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm):
        public, holds = None, False
    if not holds or not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name != "secp256r1":
        raise StudyError(
            f"the certificate request of `{site}` does not hold: expected a P-256 key and its own signature",
            hint="refuse it, and let the hospital enrol again",
        )
    return public


def member_document(
    home: Home,
    site: str,
    identity_key: bytes,
    supernode_key: bytes,
    certificate_pem: bytes,
    passphrase: bytes | None = None,
) -> bytes:
    """The coordinator's signed word for one hospital: its name and its three public keys."""
    certificate = x509.load_pem_x509_certificate(certificate_pem)
    body = {
        "site": site,
        "identity_key": identity_key.hex(),
        "supernode_key": supernode_key.decode("ascii").strip(),
        "certificate_sha256": certificate.fingerprint(SHA256()).hex(),
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    return sign_document("member", body, signing_key(home, passphrase))
