"""The exchange's side of enrolment: what it takes, what it keeps, and the coordinator who does not take its word."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from consortium import Exchange, founded, hospital
from sequester.client.gate import enrolment as site
from sequester.client.gate import exchange as site_exchange
from sequester.client.gate.enrolment import enrol
from sequester.protocols import exchange_pb2 as pb
from sequester.protocols.enrolment import clock_fault, read_fingerprint, read_token, statement
from sequester.protocols.errors import SiteError, StudyError
from sequester.server import authority, enrolment, tls
from sequester.server.coordinator import coordinator_stub, listening


@pytest.fixture
def alps(tmp_path: Path) -> Iterator[Exchange]:
    alps = founded(tmp_path / "server")
    with alps.listening():
        yield alps


def asked(alps: Exchange, tmp_path: Path, name: str = "north") -> tuple[site.Home, pb.EnrolmentRequest, str]:
    """A hospital that has asked; its request and its token."""
    home = hospital(tmp_path / name, name)
    token = alps.token(name)
    enrol(home, token, wait=False)
    folder = home.root / "enrolment" / "alps"
    return home, site._request(folder, read_token(token), site._identity(folder), time.time()), token


def call(alps: Exchange, method: str, request: Any) -> tuple[grpc.StatusCode, str, Any]:
    """What the enrolment port answers somebody with no certificate."""
    config = listening(alps.home)
    credentials = grpc.ssl_channel_credentials((alps.home.exchange / "authority.pem").read_bytes())
    with grpc.secure_channel(f"127.0.0.1:{config.enrolment_port}", credentials) as channel:
        stub = channel.unary_unary(
            f"/sequester.v1.Enrolment/{method}", request_serializer=lambda m: m.SerializeToString()
        ).future(request, timeout=120)
        stub.exception()
        return stub.code(), stub.details(), stub


def rows(alps: Exchange) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(alps.verb("enrolments", "--json").output)
    return found


def test_every_changed_half_of_a_request_breaks_its_proof(alps: Exchange, tmp_path: Path) -> None:
    _, request, _ = asked(alps, tmp_path)
    digest = authority.authority_digest(alps.home.coordinator)
    assert enrolment.proof_fault(request, digest) == ""
    _, other, _ = asked(alps, tmp_path, "lake")
    for field in ("site", "tls_request_pem", "identity_key", "supernode_key", "proof"):
        forged = pb.EnrolmentRequest.FromString(request.SerializeToString())
        setattr(forged, field, getattr(other, field))
        assert "does not hold" in enrolment.proof_fault(forged, digest), field
    assert "does not hold" in enrolment.proof_fault(request, "00" * 32)  # an enrolment elsewhere is not one here


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("supernode_key", b"ssh-ed25519 AAAA", "P-384"),
        ("tls_request_pem", b"nothing", "P-256"),
        ("identity_key", bytes(31), "does not hold"),
    ],
)
def test_keys_of_another_kind_are_refused_even_where_the_proof_holds(
    alps: Exchange, tmp_path: Path, field: str, value: bytes, said: str
) -> None:
    home, request, _ = asked(alps, tmp_path)
    secret = read_token(alps.token("north")).secret  # a second invitation, not yet used
    setattr(request, field, value)
    request.token_secret = bytes.fromhex(secret)
    key = site._identity(home.root / "enrolment" / "alps")
    request.proof = key.sign(statement(request, authority.authority_digest(alps.home.coordinator)))
    code, details, _ = call(alps, "Request", request)
    assert code is grpc.StatusCode.INVALID_ARGUMENT and said in details


def test_a_request_beyond_its_size_is_refused(alps: Exchange, tmp_path: Path) -> None:
    _, request, _ = asked(alps, tmp_path)
    request.tls_request_pem = bytes(enrolment.MAX_REQUEST)
    assert call(alps, "Request", request)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_message_of_megabytes_from_somebody_without_a_certificate_is_not_taken_in(alps: Exchange) -> None:
    message = pb.EnrolmentCollect(site="north", token_secret=bytes(2 << 20))
    code, details, said = call(alps, "Collect", message)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details
    assert "sequester-clock-ms" not in dict(said.trailing_metadata())  # every answer of the service has the clock


def test_collecting_needs_the_secret(alps: Exchange, tmp_path: Path) -> None:
    asked(alps, tmp_path)
    code, details, said = call(alps, "Collect", pb.EnrolmentCollect(site="north", token_secret=os.urandom(32)))
    assert (code, details) == (grpc.StatusCode.PERMISSION_DENIED, "unknown token")
    assert dict(said.trailing_metadata())["sequester-clock-ms"]  # the clock is no secret


def test_an_address_that_asks_without_end_is_slowed_and_others_are_not() -> None:
    now = [0.0]
    rate = enrolment.Rate(lambda: now[0])
    assert [rate.is_within("ipv4:10.0.0.1") for _ in range(61)] == [True] * 60 + [False]
    assert rate.is_within("ipv4:10.0.0.2")
    now[0] = 1.0
    assert [rate.is_within("ipv4:10.0.0.1") for _ in range(11)] == [True] * 10 + [False]
    for other in range(10_000):
        rate.is_within(f"ipv6:{other}")
    assert len(rate._left) <= 4096


def test_the_enrolment_port_serves_a_flood_of_calls_from_one_address_with_refusals(alps: Exchange) -> None:
    codes = {call(alps, "Collect", pb.EnrolmentCollect(site="x"))[0] for _ in range(80)}
    assert codes == {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.RESOURCE_EXHAUSTED}


def test_the_exchange_port_takes_no_one_without_a_certificate_of_ours(alps: Exchange) -> None:
    config = listening(alps.home)
    credentials = grpc.ssl_channel_credentials((alps.home.exchange / "authority.pem").read_bytes())
    with grpc.secure_channel(f"127.0.0.1:{config.exchange_port}", credentials) as channel:
        ask = channel.unary_unary("/sequester.v1.Site/Peers", request_serializer=pb.Empty.SerializeToString)
        call_ = ask.future(pb.Empty(), timeout=120)
        call_.exception()
    assert call_.code() is grpc.StatusCode.UNAVAILABLE


def test_the_clock_of_a_hospital_is_noted(alps: Exchange, tmp_path: Path) -> None:
    home, token = hospital(tmp_path / "north", "north"), alps.token("north")
    enrol(home, token, wait=False, clock=lambda: time.time() - 100)
    (row,) = rows(alps)
    assert row["state"] == "pending" and -102 < row["clock_skew_s"] < -98 and row["fault"] == ""
    assert clock_fault(5.5) and clock_fault(-306) and not clock_fault(5) and not clock_fault(-305)


# ---- the coordinator compares ---------------------------------------------------------------------------------------


def test_a_fingerprint_that_differs_in_one_digit_admits_nobody(alps: Exchange, tmp_path: Path) -> None:
    asked(alps, tmp_path)
    right = rows(alps)[0]["fingerprint"]
    wrong = right[:-1] + ("0" if right[-1] != "0" else "1")
    said = alps.verb("admit", "north", "--fingerprint", wrong)
    assert isinstance(said.exception, StudyError) and "does not match" in said.exception.message
    assert rows(alps)[0]["state"] == "pending"


@pytest.mark.parametrize("typed", ["", "ab" * 31, "zz" * 32, "ab" * 33])
def test_a_part_of_a_fingerprint_is_not_enough(typed: str) -> None:
    with pytest.raises(StudyError, match="64 hex digits"):
        read_fingerprint(typed)
    assert read_fingerprint("AB:" * 31 + "ab") == "ab" * 32


def test_an_exchange_that_swaps_a_key_of_a_compared_hospital_is_caught_by_the_coordinator(
    alps: Exchange, tmp_path: Path
) -> None:
    _, request, _ = asked(alps, tmp_path)
    _, other, _ = asked(alps, tmp_path, "lake")
    right = next(row["fingerprint"] for row in rows(alps) if row["site"] == "north")
    assert alps.store is not None
    for field in ("tls_request_pem", "supernode_key"):
        forged = pb.EnrolmentRequest.FromString(request.SerializeToString())
        setattr(forged, field, getattr(other, field))
        alps.store.db.execute("UPDATE enrolments SET request = ? WHERE site = 'north'", (forged.SerializeToString(),))
        said = alps.verb("admit", "north", "--fingerprint", right)
        assert isinstance(said.exception, StudyError) and "does not hold" in said.exception.message
    assert enrolment.members(alps.store) == []


def test_an_exchange_cannot_admit_a_hospital_by_itself(alps: Exchange, tmp_path: Path) -> None:
    _, request, _ = asked(alps, tmp_path)
    from sequester.protocols.signing import sign_document

    body = {
        "site": "north",
        "identity_key": request.identity_key.hex(),
        "supernode_key": request.supernode_key.decode(),
        "certificate_sha256": "00" * 32,
        "time": "2026-01-01T00:00:00Z",
    }
    own = site.Ed25519PrivateKey.generate()
    admission = pb.Admission(site="north", member=pb.Document(json=sign_document("member", body, own)))
    assert alps.store is not None
    key = bytes.fromhex((alps.home.exchange / "coordinator.pub").read_text().strip())
    with pytest.raises(StudyError, match="signed by"):
        enrolment.admit(alps.store, admission, key)


def test_an_admission_of_keys_that_were_since_replaced_does_not_stand(alps: Exchange, tmp_path: Path) -> None:
    _, request, _ = asked(alps, tmp_path)
    certificate = authority.issue_site_certificate(alps.home, request.tls_request_pem, "north")
    member = authority.member_document(alps.home, "north", bytes(32), request.supernode_key, certificate)
    with coordinator_stub(alps.home) as ask, pytest.raises(StudyError, match="other keys"):
        ask.call("Admit", pb.Admission(site="north", certificate_pem=certificate, member=pb.Document(json=member)))


def test_refusing_an_admitted_hospital_ends_its_membership_at_once(alps: Exchange, tmp_path: Path) -> None:
    home, _, _ = asked(alps, tmp_path)
    alps.admit("north", rows(alps)[0]["fingerprint"])
    enrol(home, None)
    site_exchange.fetch_members(home, "alps")
    assert alps.verb("refuse", "north").exit_code == 0
    with pytest.raises(SiteError, match="permission denied"):
        site_exchange.fetch_members(home, "alps")
    assert alps.store is not None and enrolment.members(alps.store) == []


def test_refusing_a_renewal_leaves_the_membership_that_stood(alps: Exchange, tmp_path: Path) -> None:
    home, _, _ = asked(alps, tmp_path)
    alps.admit("north", rows(alps)[0]["fingerprint"])
    enrol(home, None)
    enrol(home, alps.token("north"), wait=False)
    assert alps.verb("refuse", "north").exit_code == 0
    assert len(site_exchange.fetch_members(home, "alps")) == 1


def test_admitting_who_never_asked_is_refused(alps: Exchange) -> None:
    for verb in (("admit", "north", "--fingerprint", "00" * 32), ("refuse", "north")):
        said = alps.verb(*verb)
        assert isinstance(said.exception, StudyError) and "has not asked" in said.exception.message
        assert "enrolments" in said.exception.hint


def test_enrolments_shows_people_what_they_have_to_compare(alps: Exchange, tmp_path: Path) -> None:
    assert "No hospital" in alps.verb("enrolments").output
    asked(alps, tmp_path)
    shown = alps.verb("enrolments").output
    first = rows(alps)[0]["fingerprint"][:4]
    assert "north" in shown and "pending" in shown and first in shown


# ---- commands -------------------------------------------------------------------------------------------------------


def test_init_says_what_to_do_next_and_that_keys_have_no_passphrase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = Exchange(founded(tmp_path / "a").home.__class__(tmp_path / "b"))
    monkeypatch.delenv("SEQUESTER_PASSPHRASE", raising=False)
    said = exchange.verb("init", "alps", "--host", "127.0.0.1")
    assert said.exit_code == 0 and "no passphrase" in said.output and "next:" in said.output
    monkeypatch.setenv("SEQUESTER_PASSPHRASE", "correct horse")
    other = Exchange(exchange.home.__class__(tmp_path / "c"))
    assert "no passphrase" not in other.verb("init", "alps", "--host", "127.0.0.1").output
    assert b"ENCRYPTED" in (other.home.coordinator / "coordinator.key").read_bytes()


def test_a_coordinator_whose_exchange_is_away_is_told_where_it_should_be(tmp_path: Path) -> None:
    alps = founded(tmp_path / "server")
    said = alps.verb("enrolments")
    assert isinstance(said.exception, StudyError) and "no exchange has chosen one" in said.exception.message
    with alps.listening():
        pass
    said = alps.verb("enrolments")
    assert isinstance(said.exception, StudyError) and "does not answer" in said.exception.message
    assert said.exception.hint and str(listening(alps.home).exchange_port) in said.exception.message


@pytest.mark.parametrize("name", ["North", "n", "a b"])
def test_an_invitation_in_a_name_no_study_could_write_is_refused(alps: Exchange, name: str) -> None:
    said = alps.verb("invite", name)
    assert isinstance(said.exception, StudyError) and "lower-case" in said.exception.hint


def test_only_the_coordinators_certificate_opens_the_coordinators_service(alps: Exchange, tmp_path: Path) -> None:
    class Context:
        def __init__(self, *names: bytes) -> None:
            self.names = names

        def auth_context(self) -> dict[str, list[bytes]]:
            return {"peer_uri": list(self.names), "x509_subject_alternative_name": [b"sequester:coordinator"]}

    assert tls.is_coordinator(Context(b"sequester:coordinator")) and not tls.is_coordinator(Context())
    assert not tls.is_coordinator(Context(b"sequester:site:coordinator"))
    assert tls.peer_site(Context(b"sequester:site:north")) == "north"
    assert tls.peer_site(Context(b"sequester:coordinator")) is None and tls.peer_site(Context()) is None
