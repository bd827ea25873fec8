"""Founding a consortium: what lies where, who may read it, and what its certificates say."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from sequester.protocols.errors import StudyError
from sequester.protocols.signing import open_document, raw_public, sha256
from sequester.server import authority
from sequester.server.config import Home

PRIVATE = ("authority.key", "coordinator.key", "tls.key")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "alps")
    authority.found(home, "alps", "exchange.example.org", (1, 2, 3, 4))
    return home


def request(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None, **extensions: str) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sequester:coordinator")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    if uri := extensions.get("uri"):
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
        builder = builder.add_extension(names, critical=False)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return builder.sign(key or ec.generate_private_key(ec.SECP256R1()), SHA256()).public_bytes(Encoding.PEM)


def uris(pem: bytes) -> list[str]:
    names = x509.load_pem_x509_certificate(pem).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def test_the_exchange_holds_neither_the_signing_key_nor_the_authority(home: Home) -> None:
    secrets = [(home.coordinator / name).read_bytes() for name in PRIVATE]
    in_exchange = {path.name: path.read_bytes() for path in home.exchange.rglob("*") if path.is_file()}
    assert {"coordinator.key", "authority.key"}.isdisjoint(in_exchange)
    assert not set(secrets) & set(in_exchange.values())
    assert {"tls.key", "tls.pem", "authority.pem", "coordinator.pub", "superexec.secret", "consortium.toml"} == set(
        in_exchange
    )


def test_private_files_are_their_owners_alone(home: Home) -> None:
    for path in home.root.rglob("*.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE((home.exchange / "superexec.secret").stat().st_mode) == 0o640
    assert (home.exchange / "superexec.secret").stat().st_size == 32
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (home.coordinator, home.exchange)} == {0o700}


def test_founding_twice_is_refused_and_changes_nothing(home: Home) -> None:
    before = {path: path.read_bytes() for path in home.root.rglob("*") if path.is_file()}
    with pytest.raises(StudyError, match="already holds a consortium"):
        authority.found(home, "other", "127.0.0.1")
    assert before == {path: path.read_bytes() for path in home.root.rglob("*") if path.is_file()}


def test_two_ports_that_are_the_same_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="superlink_port 7443, control_port 7443"):
        authority.found(Home(tmp_path / "alps"), "alps", "exchange.example.org", (7441, 7442, 7443, 7443))
    assert not (tmp_path / "alps").exists()
    authority.found(Home(tmp_path / "alps"), "alps", "exchange.example.org", (0, 0, 0, 0))  # each a free one


def test_a_founding_cut_short_leaves_nothing_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(authority, "_issue", lambda *words: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            authority.found(home, "alps", "127.0.0.1")
    assert not home.coordinator.exists() and not home.exchange.exists()
    authority.found(home, "alps", "127.0.0.1")
    assert sorted(path.name for path in home.root.iterdir()) == ["coordinator", "exchange"]


def test_a_private_file_is_never_replaced(tmp_path: Path) -> None:
    authority.write_private(tmp_path / "key", b"first")
    with pytest.raises(FileExistsError):
        authority.write_private(tmp_path / "key", b"second")
    assert (tmp_path / "key").read_bytes() == b"first"


@pytest.mark.parametrize("name", ["", "Alps", 'al"ps', "a/b", "..", "x" * 33])
def test_a_name_that_would_not_do_as_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(StudyError, match="will not do"):
        authority.found(Home(tmp_path), name, "127.0.0.1")
    assert not list(tmp_path.iterdir())


def test_openssl_accepts_every_certificate_by_its_strict_rules(home: Home, tmp_path: Path) -> None:
    site = tmp_path / "site.pem"
    site.write_bytes(authority.issue_site_certificate(home, request(), "north"))
    ca = str(home.exchange / "authority.pem")
    for path, purpose in ((home.exchange, "sslserver"), (home.coordinator, "sslclient"), (site, "sslclient")):
        pem = str(path / "tls.pem") if path.is_dir() else str(path)
        command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", ca, pem]
        said = subprocess.run(command, capture_output=True, text=True, check=False)
        assert said.returncode == 0, said.stderr


def test_the_servers_certificate_carries_its_host_and_what_a_supernode_dials(home: Home) -> None:
    names = (
        x509.load_pem_x509_certificate((home.exchange / "tls.pem").read_bytes())
        .extensions.get_extension_for_class(x509.SubjectAlternativeName)
        .value
    )
    assert set(names.get_values_for_type(x509.DNSName)) == {"exchange.example.org", "localhost"}
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]


def test_the_server_presents_the_authority_behind_its_own_certificate(home: Home) -> None:
    chain = x509.load_pem_x509_certificates((home.exchange / "tls.pem").read_bytes())
    assert sha256(chain[-1].public_bytes(Encoding.DER)) == authority.authority_digest(home.coordinator)


def test_the_authority_names_the_coordinators_signing_key(home: Home) -> None:
    (uri,) = uris((home.exchange / "authority.pem").read_bytes())
    assert uri == "sequester:coordinator-key:" + raw_public(authority.signing_key(home)).hex()
    assert (home.exchange / "coordinator.pub").read_text().strip() == uri.rpartition(":")[2]


def test_a_hospitals_certificate_says_what_the_coordinator_says_not_what_the_request_asks(home: Home) -> None:
    pem = authority.issue_site_certificate(home, request(uri="sequester:coordinator"), "north")
    certificate = x509.load_pem_x509_certificate(pem)
    assert uris(pem) == ["sequester:site:north"] and "coordinator" not in certificate.subject.rfc4514_string()
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days == 365


def test_a_request_that_does_not_prove_its_key_is_refused(home: Home) -> None:
    good, other = request(), request()
    parsed = x509.load_pem_x509_csr(good)
    swapped = parsed.public_bytes(Encoding.DER).replace(
        parsed.signature, x509.load_pem_x509_csr(other).signature[: len(parsed.signature)].ljust(len(parsed.signature))
    )
    import base64

    forged = (
        b"-----BEGIN CERTIFICATE REQUEST-----\n" + base64.encodebytes(swapped) + b"-----END CERTIFICATE REQUEST-----\n"
    )
    weak = request(rsa.generate_private_key(65537, 2048))
    curve = request(ec.generate_private_key(ec.SECP384R1()))
    for bad in (forged, weak, curve, b"", b"hello", good[:200]):
        with pytest.raises(StudyError, match="does not hold"):
            authority.issue_site_certificate(home, bad, "north")


@pytest.mark.parametrize("site", ["", "North", "a", "x/y", "coordinator\n", "n" * 33])
def test_a_name_no_study_could_write_gets_no_certificate(home: Home, site: str) -> None:
    with pytest.raises(StudyError, match="no hospital's name"):
        authority.issue_site_certificate(home, request(), site)


def test_a_passphrase_is_asked_for_by_both_long_lived_keys_and_by_no_other(tmp_path: Path) -> None:
    home = Home(tmp_path)
    authority.found(home, "alps", "127.0.0.1", passphrase=b"correct horse")
    for name in ("coordinator.key", "authority.key"):
        assert b"ENCRYPTED" in (home.coordinator / name).read_bytes()
    assert authority.signing_key(home, b"correct horse")
    for wrong in (None, b"battery"):
        with pytest.raises(StudyError, match="does not open") as refused:
            authority.signing_key(home, wrong)
        assert "SEQUESTER_PASSPHRASE" in refused.value.hint
        with pytest.raises(StudyError, match="does not open"):
            authority.issue_site_certificate(home, request(), "north", wrong)


def test_a_passphrase_in_the_environment_does_no_harm_to_keys_without_one(home: Home) -> None:
    assert authority.signing_key(home, b"not needed")


def test_a_missing_key_says_whose_machine_it_is_on(home: Home) -> None:
    (home.coordinator / "coordinator.key").unlink()
    with pytest.raises(StudyError, match="No such file") as refused:
        authority.signing_key(home)
    assert "coordinator's machine" in refused.value.hint


def test_a_member_document_is_the_coordinators_word_for_three_keys(home: Home) -> None:
    pem = authority.issue_site_certificate(home, request(), "north")
    data = authority.member_document(home, "north", bytes(range(32)), b"ecdsa-sha2-nistp384 AAAA\n", pem)
    body = open_document(data, "member", raw_public(authority.signing_key(home))).body
    der = x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
    assert body["site"] == "north" and body["identity_key"] == bytes(range(32)).hex()
    assert body["supernode_key"] == "ecdsa-sha2-nistp384 AAAA" and body["certificate_sha256"] == sha256(der)
