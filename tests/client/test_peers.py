"""Who the others are: the coordinator's word, and what a person here compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from contracts import COORDINATOR, SITES, hospital, study
from sequester.client.cli.identity import register
from sequester.client.config import Home
from sequester.client.gate import approval, peers
from sequester.protocols.errors import PeerError, SequesterError, SiteError, StudyError
from sequester.protocols.signing import fingerprint, raw_public, sign_document, spoken

APP = typer.Typer()
register(APP)


def word(site: str, key: bytes, /, **changed: object) -> bytes:
    body = {
        "site": site,
        "identity_key": key.hex(),
        "supernode_key": "ecdsa-sha2-nistp384 AAAA",
        "certificate_sha256": "00" * 32,
        "time": "2026-01-01T00:00:00Z",
    }
    return sign_document("member", body | changed, COORDINATOR)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home, _ = hospital(tmp_path, study())
    folder = home.consortium("example") / "members"
    folder.mkdir()
    for name, key in SITES.items():
        (folder / f"{name}.json").write_bytes(word(name, raw_public(key)))
    return home


def run(home: Home, *words: str) -> Result:
    return CliRunner().invoke(APP, ["peers", *words, "--home", str(home.root)])


def mark(site: str) -> str:
    return fingerprint(raw_public(SITES[site]))


def test_nobody_is_pinned_until_a_person_compared(home: Home) -> None:
    assert peers.pinned(home, "example") == frozenset()
    standings = {row["site"]: row["standing"] for row in json.loads(run(home, "--json").output)}
    assert standings == {
        "harbor": "counts as a possible colluder",
        "lake": "counts as a possible colluder",
        "north": "this site",
    }


def test_a_fingerprint_typed_in_spoken_groups_pins_exactly_that_key(home: Home) -> None:
    assert run(home, "pin", "lake", "--fingerprint", spoken(mark("lake")).upper()).exit_code == 0
    assert peers.pinned(home, "example") == {raw_public(SITES["lake"])}
    assert "pinned" in {row["standing"] for row in json.loads(run(home, "--json").output)}
    assert run(home, "unpin", "lake").exit_code == 0 and peers.pinned(home, "example") == frozenset()


def test_pins_decide_whether_a_study_counts_too_many_strangers(home: Home) -> None:
    own = raw_public(SITES["north"])
    objection = approval.unpinned(study(), own, peers.pinned(home, "example"))
    assert objection is not None and "not pinned" in objection.sentence
    peers.pin(home, "example", "lake", mark("lake"))  # one stranger left: the study tolerates one
    assert approval.unpinned(study(), own, peers.pinned(home, "example")) is None


def test_a_fingerprint_of_somebody_else_pins_nobody(home: Home) -> None:
    with pytest.raises(SiteError, match="does not match"):
        peers.pin(home, "example", "lake", mark("harbor"))
    with pytest.raises(StudyError, match="64 hex digits"):
        peers.pin(home, "example", "lake", mark("lake")[:16])
    assert peers.pinned(home, "example") == frozenset()


def test_a_hospital_whose_key_changed_is_not_pinned_by_its_name(home: Home) -> None:
    peers.pin(home, "example", "lake", mark("lake"))
    new = raw_public(SITES["lake"])[::-1]
    (home.consortium("example") / "members" / "lake.json").write_bytes(word("lake", new))
    assert new not in peers.pinned(home, "example")
    standings = {row["site"]: row["standing"] for row in json.loads(run(home, "--json").output)}
    assert standings["lake"].startswith("ANOTHER KEY")


def test_a_hospital_does_not_pin_itself(home: Home) -> None:
    refused = run(home, "pin", "north", "--fingerprint", mark("north")).exception
    assert isinstance(refused, SiteError) and "is this site" in refused.message
    assert peers.pinned(home, "example") == frozenset()


def test_every_line_of_a_fingerprint_is_whole_on_a_terminal_of_80_columns(home: Home) -> None:
    said = CliRunner().invoke(APP, ["peers", "--home", str(home.root)], env={"COLUMNS": "80"}).stdout
    assert all(spoken(mark(site))[:39] in said and spoken(mark(site))[40:] in said for site in SITES)


def test_a_hospital_nobody_vouches_for_cannot_be_pinned(home: Home) -> None:
    with pytest.raises(SiteError, match="no hospital `west`"):
        peers.pin(home, "example", "west", "00" * 32)
    with pytest.raises(SiteError, match="not pinned"):
        peers.unpin(home, "example", "lake")


def test_a_word_that_is_not_the_coordinators_is_refused(home: Home) -> None:
    path = home.consortium("example") / "members" / "lake.json"
    body = json.loads(path.read_bytes())["body"]
    path.write_bytes(sign_document("member", body, SITES["harbor"]))
    with pytest.raises(StudyError, match="signed by"):
        peers.members(home, "example")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"site": "../../x"}, "site"),
        ({"identity_key": "00"}, "identity_key"),
        ({"certificate_sha256": 5}, "certificate_sha256"),
        ({"more": 1}, "more"),
    ],
)
def test_a_word_with_a_wrong_field_is_refused_though_it_is_signed(changed: dict[str, object], said: str) -> None:
    with pytest.raises(PeerError, match=said):
        peers.read_member(word("lake", bytes(32), **changed), raw_public(COORDINATOR))


def test_one_hospital_under_two_names_is_noticed(home: Home) -> None:
    (home.consortium("example") / "members" / "west.json").write_bytes(word("west", raw_public(SITES["lake"])))
    with pytest.raises(PeerError, match="4 hospitals with 3 keys"):
        peers.members(home, "example")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2, "pins": {}}', '{"format": 1, "pins": {"lake": {"key": "00"}}}', '{"format"']
)
def test_damaged_pins_are_an_error_and_never_more_pins(home: Home, text: str) -> None:
    (home.consortium("example") / "pins.json").write_text(text)
    with pytest.raises(SiteError, match="damaged") as refused:
        peers.pinned(home, "example")
    assert "compare the fingerprints again" in refused.value.hint


def test_a_site_in_no_consortium_or_in_several_is_asked_which(home: Home, tmp_path: Path) -> None:
    said = run(Home(tmp_path / "empty")).exception
    assert isinstance(said, SequesterError) and "no consortium" in said.message
    (home.root / "consortia" / "other").mkdir()
    said = run(home).exception
    assert isinstance(said, SequesterError) and "example, other" in said.message
    assert run(home, "--consortium", "example").exit_code == 0
