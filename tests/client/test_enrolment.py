"""A hospital joins a consortium over real TLS; what goes wrong on the way is one clear error each."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import typer
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from typer.testing import CliRunner

import consortium
from consortium import Exchange, closed_port, founded, heard, hospital
from sequester.client.cli import identity
from sequester.client.gate import enrolment, exchange, peers, reach, tls
from sequester.client.gate.enrolment import enrol
from sequester.client.gate.ledger import Ledger
from sequester.protocols import exchange_pb2 as pb
from sequester.protocols.enrolment import Token, read_token
from sequester.protocols.errors import PeerError, SiteError, StudyError
from sequester.protocols.signing import sign_document
from sequester.server import authority

FILES = {
    "consortium.json", "identity.key", "tls.key", "tls.pem", "supernode.key", "supernode.key.pub", "authority.pem",
    "coordinator.pub", "superexec.secret",
}  # fmt: skip


@pytest.fixture
def alps(tmp_path: Path) -> Iterator[Exchange]:
    alps = founded(tmp_path / "server")
    with alps.listening():
        yield alps


def join(alps: Exchange, home: enrolment.Home, token: str) -> enrolment.Enrolled:
    """Ask, let the coordinator admit, collect."""
    asked = enrol(home, token, wait=False)
    alps.admit(home.config().site.id, asked.fingerprint)
    return enrol(home, None)


def test_a_hospital_that_waits_is_enrolled_when_the_coordinator_admits_what_it_read_out(
    alps: Exchange, tmp_path: Path
) -> None:
    home = hospital(tmp_path / "north", "north")
    said: list[str] = []
    found: list[enrolment.Enrolled] = []
    token = alps.token("north")
    thread = threading.Thread(target=lambda: found.append(enrol(home, token, True, said.append, 0.05)))
    thread.start()
    until = time.monotonic() + 120
    while not any("fingerprint" in line for line in said) and time.monotonic() < until:
        time.sleep(0.01)
    alps.admit("north", heard(said))
    thread.join(120)
    assert found and found[0].is_admitted
    folder = home.consortium("alps")
    assert {path.name for path in folder.iterdir()} == FILES and not (home.root / "enrolment" / "alps").exists()
    Ledger(home.dataset("main"), read_only=True).close()


def test_private_keys_are_the_owners_alone_and_none_of_them_reaches_the_exchange(
    alps: Exchange, tmp_path: Path
) -> None:
    home = hospital(tmp_path / "north", "north")
    join(alps, home, alps.token("north"))
    folder = home.consortium("alps")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert {modes[name] for name in ("identity.key", "tls.key", "supernode.key")} == {0o600}
    assert modes["superexec.secret"] == 0o640 and stat.S_IMODE(folder.stat().st_mode) == 0o700
    everything = b"".join(path.read_bytes() for path in alps.home.root.rglob("*") if path.is_file())
    for name in ("identity.key", "tls.key", "supernode.key"):
        lines = (folder / name).read_text().splitlines()[1:-1]
        assert all(line.encode() not in everything for line in lines if len(line) > 20)
    assert (folder / "superexec.secret").read_bytes() not in everything


def test_the_exchange_never_keeps_the_tokens_secret(alps: Exchange, tmp_path: Path) -> None:
    token = alps.token("north")
    join(alps, hospital(tmp_path / "north", "north"), token)
    secret = read_token(token).secret
    everything = b"".join(path.read_bytes() for path in alps.home.root.rglob("*") if path.is_file())
    assert bytes.fromhex(secret) not in everything and secret.encode() not in everything


def test_an_enrolled_hospital_talks_over_mutual_tls_and_is_known_by_its_certificate(
    alps: Exchange, tmp_path: Path
) -> None:
    home = hospital(tmp_path / "north", "north")
    join(alps, home, alps.token("north"))
    assert len(exchange.fetch_members(home, "alps")) == 1
    (member,) = peers.members(home, "alps")
    key = load_pem_private_key((home.consortium("alps") / "identity.key").read_bytes(), None)
    assert member.site == "north" and member.identity_key == key.public_key().public_bytes_raw()  # type: ignore[union-attr]
    with tls.site_channel(home.consortium("alps")) as channel:
        ask = channel.unary_unary(
            "/sequester.v1.Coordinator/Invite", request_serializer=pb.Invitation.SerializeToString
        )
        with pytest.raises(grpc.RpcError) as refused:
            ask(pb.Invitation(site="x"), timeout=120)
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED  # type: ignore[attr-defined]
    assert refused.value.details() == "sequester:site:north may not ask that"  # type: ignore[attr-defined]


def test_the_supernode_key_is_what_ssh_keygen_reads_as_p384(alps: Exchange, tmp_path: Path) -> None:
    home = hospital(tmp_path / "north", "north")
    enrol(home, alps.token("north"), wait=False)
    key = home.root / "enrolment" / "alps" / "supernode.key"
    said = subprocess.run(["ssh-keygen", "-y", "-f", key], capture_output=True, check=True, text=True).stdout
    assert said.split()[:2] == key.with_suffix(".key.pub").read_text().split()[:2]
    assert said.startswith("ecdsa-sha2-nistp384 ")


def test_an_enrolment_cut_short_goes_on_with_the_same_keys(alps: Exchange, tmp_path: Path) -> None:
    home = hospital(tmp_path / "north", "north")
    token = alps.token("north")
    first = enrol(home, token, wait=False)
    again = enrol(home, token, wait=False)
    alps.admit("north", first.fingerprint)
    last = enrol(home, None)
    assert first.fingerprint == again.fingerprint == last.fingerprint and last.is_admitted


@pytest.mark.parametrize("cut", range(10))
def test_a_move_into_place_cut_short_is_finished_by_the_next_run(
    alps: Exchange, tmp_path: Path, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = hospital(tmp_path / "north", "north")
    first = join(alps, home, alps.token("north"))
    asked = enrol(home, alps.token("north"), wait=False)
    alps.admit("north", asked.fingerprint)
    moved = 0
    replace = Path.replace

    def dying(path: Path, target: Path) -> Path:
        nonlocal moved
        if target.parent == home.consortium("alps"):
            if moved == cut:
                raise KeyboardInterrupt
            moved += 1
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying)
        with pytest.raises(KeyboardInterrupt) if cut < len(FILES) else _nothing():
            enrol(home, None)
    if cut < len(FILES):
        assert enrol(home, None) == enrolment.Enrolled("alps", True, first.fingerprint)
    folder = home.consortium("alps")
    certificate = x509.load_pem_x509_certificate((folder / "tls.pem").read_bytes())
    key = load_pem_private_key((folder / "tls.key").read_bytes(), None)
    assert certificate.public_key() == key.public_key() and {path.name for path in folder.iterdir()} == FILES
    exchange.fetch_members(home, "alps")


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


def test_renewing_keeps_identity_and_pins_and_brings_a_new_tls_key(alps: Exchange, tmp_path: Path) -> None:
    north, lake = hospital(tmp_path / "north", "north"), hospital(tmp_path / "lake", "lake")
    before = join(alps, north, alps.token("north"))
    seen = join(alps, lake, alps.token("lake"))
    exchange.fetch_members(north, "alps")
    peers.pin(north, "alps", "lake", seen.fingerprint)
    old = (north.consortium("alps") / "tls.key").read_bytes()
    asked = enrol(north, alps.token("north"), wait=False)
    exchange.fetch_members(north, "alps")  # what it has stays in force until it is admitted again
    replaced = {name: (north.consortium("alps") / name).read_bytes() for name in ("tls.key", "tls.pem")}
    alps.admit("north", asked.fingerprint)
    after = enrol(north, None)
    assert after.fingerprint == before.fingerprint and len(peers.pinned(north, "alps")) == 1
    assert (north.consortium("alps") / "tls.key").read_bytes() != old
    assert len(exchange.fetch_members(north, "alps")) == 2
    for name, data in replaced.items():  # whoever has a copy of the old key
        (north.consortium("alps") / name).write_bytes(data)
    with pytest.raises(SiteError, match="permission denied"):
        exchange.fetch_members(north, "alps")


@pytest.mark.parametrize("name", ["../pins", "../advertisements", "../../../site", "", 5])
def test_a_coordinator_who_signs_a_path_for_a_name_writes_no_file_of_the_gate(
    alps: Exchange, tmp_path: Path, name: object
) -> None:
    north = hospital(tmp_path / "north", "north")
    join(alps, north, alps.token("north"))
    exchange.fetch_members(north, "alps")
    (north.consortium("alps") / "advertisements.json").write_text("{}")
    before = {path: path.read_bytes() for path in north.root.rglob("*") if path.is_file()}
    body = {
        "site": name, "identity_key": "00" * 32, "supernode_key": "ecdsa-sha2-nistp384 AAAA",
        "certificate_sha256": "00" * 32, "time": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    signed = sign_document("member", body, authority.signing_key(alps.home))
    assert alps.store is not None
    alps.store.db.execute("UPDATE enrolments SET member = ? WHERE site = 'north'", (signed,))
    with pytest.raises(PeerError, match="a wrong `site`"):
        exchange.fetch_members(north, "alps")
    assert {path: path.read_bytes() for path in north.root.rglob("*") if path.is_file()} == before


# ---- bad input: one clear error each --------------------------------------------------------------------------------


def test_an_expired_token_is_refused(alps: Exchange, tmp_path: Path) -> None:
    token = alps.token("north", "--days", 1)
    alps.ahead_s = 86400 + 3600
    home = hospital(tmp_path / "north", "north")
    with pytest.raises(SiteError, match="expired") as refused:
        enrol(home, token, wait=False, clock=alps.now)
    assert "new invitation" in refused.value.hint and not home.consortium("alps").exists()


def test_a_token_is_good_for_one_set_of_keys(alps: Exchange, tmp_path: Path) -> None:
    token = alps.token("north")
    join(alps, hospital(tmp_path / "north", "north"), token)
    thief = hospital(tmp_path / "thief", "north")
    with pytest.raises(SiteError, match="used already") as refused:
        enrol(thief, token, wait=False)
    assert "somebody has your token" in refused.value.hint


def test_a_newer_invitation_voids_the_older(alps: Exchange, tmp_path: Path) -> None:
    old = alps.token("north")
    alps.token("north")
    with pytest.raises(SiteError, match="newer one replaced it"):
        enrol(hospital(tmp_path / "north", "north"), old, wait=False)


def test_another_authority_than_the_token_names_is_noticed_before_anything_is_sent(
    alps: Exchange, tmp_path: Path
) -> None:
    token = read_token(alps.token("north"))
    forged = token.model_copy(update={"authority": "00" * 32}).text()
    home = hospital(tmp_path / "north", "north")
    with pytest.raises(PeerError, match="another authority") as refused:
        enrol(home, forged, wait=False)
    assert "nothing was sent" in refused.value.hint and not list(home.root.rglob("*.key"))
    assert json.loads(alps.verb("enrolments", "--json").output) == []


def test_an_exchange_with_another_coordinators_key_is_noticed(
    alps: Exchange, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = consortium.enrolment.EnrolmentService._answer

    def lying(service: consortium.enrolment.EnrolmentService, site: str) -> pb.EnrolmentAnswer:
        said = answer(service, site)
        said.coordinator_key = bytes(32)
        return said

    monkeypatch.setattr(consortium.enrolment.EnrolmentService, "_answer", lying)
    with pytest.raises(PeerError, match="another coordinator's key"):
        enrol(hospital(tmp_path / "north", "north"), alps.token("north"), wait=False)


def test_a_certificate_for_another_site_or_key_is_not_installed(alps: Exchange, tmp_path: Path) -> None:
    home = hospital(tmp_path / "north", "north")
    asked = enrol(home, alps.token("north"), wait=False)
    alps.admit("north", asked.fingerprint)
    request = (home.root / "enrolment" / "alps" / "request.pem").read_bytes()
    other = authority.issue_site_certificate(alps.home, request, "lake")
    assert alps.store is not None
    alps.store.db.execute("UPDATE enrolments SET certificate = ?", (other,))
    with pytest.raises(PeerError, match="not for `north`"):
        enrol(home, None)
    assert not home.consortium("alps").exists()


def test_a_refused_hospital_is_told_so(alps: Exchange, tmp_path: Path) -> None:
    home = hospital(tmp_path / "north", "north")
    enrol(home, alps.token("north"), wait=False)
    assert alps.verb("refuse", "north").exit_code == 0
    with pytest.raises(SiteError, match="refused this enrolment"):
        enrol(home, None)


@pytest.mark.parametrize(("ahead", "word"), [(9.0, "fast"), (-330.0, "slow")])
def test_a_wrong_clock_is_refused_before_the_token_is_spent(
    alps: Exchange, tmp_path: Path, ahead: float, word: str
) -> None:
    home = hospital(tmp_path / "north", "north")
    with pytest.raises(SiteError, match=word) as refused:
        enrol(home, alps.token("north"), wait=False, clock=lambda: time.time() + ahead)
    assert "NTP" in refused.value.hint and json.loads(alps.verb("enrolments", "--json").output) == []


def test_a_clock_beyond_the_certificates_life_is_named_as_such(alps: Exchange, tmp_path: Path) -> None:
    with pytest.raises(SiteError, match=r"clock says 20\d\d"):
        enrol(hospital(tmp_path / "n", "north"), alps.token("north"), clock=lambda: time.time() + 800 * 86400)


def test_an_unreachable_coordinator_is_named_with_host_and_port(alps: Exchange, tmp_path: Path) -> None:
    port = closed_port()
    token = read_token(alps.token("north")).model_copy(update={"enrolment_port": port}).text()
    with pytest.raises(SiteError, match=f"127.0.0.1:{port} cannot be reached") as refused:
        enrol(hospital(tmp_path / "north", "north"), token)
    assert "outbound TCP" in refused.value.hint


def test_a_name_that_does_not_resolve_is_named() -> None:
    with pytest.raises(SiteError, match="does not resolve"):
        reach.dial("no-such-host.invalid", 443)


def test_a_port_that_speaks_no_tls_is_named(alps: Exchange) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"220 mail\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(PeerError, match="does not speak TLS"):
            reach.presented("127.0.0.1", server.getsockname()[1])
        thread.join(120)


def test_a_token_for_another_site_changes_nothing(alps: Exchange, tmp_path: Path) -> None:
    home = hospital(tmp_path / "lake", "lake")
    with pytest.raises(SiteError, match=r"for `north`; site\.toml says this is `lake`"):
        enrol(home, alps.token("north"))
    assert not (home.root / "enrolment").exists()


def test_an_exchange_that_restarts_while_two_people_talk_is_waited_for(tmp_path: Path) -> None:
    alps = founded(tmp_path / "server")
    home = hospital(tmp_path / "north", "north")
    found: list[enrolment.Enrolled] = []
    said: list[str] = []
    with alps.listening():
        token = alps.token("north")
        thread = threading.Thread(target=lambda: found.append(enrol(home, token, True, said.append, 0.05)))
        thread.start()
        until = time.monotonic() + 120
        while len(said) < 2 and time.monotonic() < until:
            time.sleep(0.01)
    time.sleep(0.2)
    with alps.listening():
        alps.admit("north", heard(said))
        thread.join(120)
    assert found and found[0].is_admitted


def test_without_a_token_there_must_be_an_enrolment_under_way(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="0 enrolments are under way"):
        enrol(hospital(tmp_path / "north", "north"), None)


def test_a_member_that_resumes_nothing_is_told_where_it_belongs(alps: Exchange, tmp_path: Path) -> None:
    home = hospital(tmp_path / "north", "north")
    join(alps, home, alps.token("north"))
    with pytest.raises(SiteError, match="this site belongs to alps"):
        enrol(home, None)


def test_run_before_the_coordinator_decided_says_how_to_go_on(alps: Exchange, tmp_path: Path) -> None:
    home = hospital(tmp_path / "north", "north")
    for asked, hint in ((False, "`sequester-client enrol` joins one"), (True, "--resume")):
        if asked:
            enrol(home, alps.token("north"), wait=False)
        said = subprocess.run(
            [sys.executable, "-m", "sequester.client.cli.app", "run", "--home", home.root],
            capture_output=True,
            text=True,
        )
        assert said.returncode == 20 and "no consortium yet" in said.stderr and hint in said.stderr


def test_who_stops_waiting_is_told_that_the_request_stands(alps: Exchange, tmp_path: Path) -> None:
    home, app = hospital(tmp_path / "north", "north"), typer.Typer()
    identity.register(app)
    token, before = alps.token("north"), signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker ignores it
    waiting = threading.Thread(target=lambda: (time.sleep(4), signal.raise_signal(signal.SIGINT)))
    waiting.start()
    try:
        said = CliRunner().invoke(app, ["enrol", token, "--home", str(home.root)])
    finally:
        waiting.join()
        signal.signal(signal.SIGINT, before)
    assert said.exit_code == 130 and "enrol --resume" in said.stdout and home.enrolling() == ["alps"]


def test_who_enrols_again_is_told_that_it_renews(alps: Exchange, tmp_path: Path) -> None:
    home, app = hospital(tmp_path / "north", "north"), typer.Typer()
    identity.register(app)
    join(alps, home, alps.token("north"))
    said = CliRunner().invoke(app, ["enrol", alps.token("north"), "--no-wait", "--home", str(home.root)])
    assert said.exit_code == 0 and "renews its certificate" in said.stdout


@pytest.mark.parametrize("damage", ["sq1.", "hello", "sq2.{}", "sq1.e30", "sq1.!!!!", "sq1." + "A" * 4000])
def test_what_is_not_a_token_is_refused(damage: str) -> None:
    with pytest.raises(StudyError, match="not an invitation"):
        read_token(damage)


def test_a_token_survives_wrapping_and_every_changed_letter_is_noticed_or_names_something_else() -> None:
    token = Token(
        consortium="alps", site="north", host="host.example", enrolment_port=1, exchange_port=2, superlink_port=3,
        authority="ab" * 32, secret="cd" * 32, expires=4,
    )  # fmt: skip
    text = token.text()
    assert read_token(f" {text[:50]}\n  {text[50:]}\n") == token
    for at in range(4, len(text), 7):
        changed = text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]
        try:
            assert read_token(changed) != token
        except StudyError:
            continue
