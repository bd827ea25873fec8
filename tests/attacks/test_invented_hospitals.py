"""A coordinator who invents hospitals, and a hospital whose ledger was restored: on the files and verbs of a real site."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner, Result

from attacks.adversary import Adversary, Allow, renamed, said
from contracts import COORDINATOR, SITES, freeze, hospital, study
from sequester.client.cli import studies
from sequester.client.config import Home
from sequester.client.gate import approval, peers
from sequester.client.gate.ledger import Ledger
from sequester.client.gate.rules import StudyRules, Witnesses
from sequester.client.policy import Policy
from sequester.protocols import privacy
from sequester.protocols.errors import RefusalCode, SequesterError
from sequester.protocols.secagg.member import Member
from sequester.protocols.secagg.messages import (
    KeyAdvertisement,
    MaskedInput,
    Send,
    SessionProposal,
    StudyRefusal,
)
from sequester.protocols.signing import fingerprint, raw_public, sign_document

APP = typer.Typer()
studies.register(APP)
MINTED = {
    name: Ed25519PrivateKey.from_private_bytes(bytes([40 + i]) * 32) for i, name in enumerate(("annex", "bay", "cape"))
}
ROSTER = dict(sorted((SITES | MINTED).items()))
STUDY = study(sites=[{"id": name, "key": raw_public(key).hex()} for name, key in ROSTER.items()])
DIGEST = privacy.study_digest(STUDY)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """`north`, ready to approve; the coordinator vouches for all six hospitals, a person here compared two."""
    home, digest = hospital(tmp_path / "north", STUDY)
    Ledger.found(home.dataset("main"), home.config().policy)
    freeze(home, digest)
    folder = home.consortium("example") / "members"
    folder.mkdir()
    for name, key in ROSTER.items():
        body = {
            "site": name, "identity_key": raw_public(key).hex(), "supernode_key": "ecdsa-sha2-nistp384 AAAA",
            "certificate_sha256": "00" * 32, "time": "2026-01-01T00:00:00Z",
        }  # fmt: skip
        (folder / f"{name}.json").write_bytes(sign_document("member", body, COORDINATOR))
    for name in ("harbor", "lake"):
        pin(home, name)
    return home


def pin(home: Home, name: str) -> None:
    peers.pin(home, "example", name, fingerprint(raw_public(ROSTER[name])))


def run(home: Home, *words: str) -> Result:
    return CliRunner().invoke(APP, [*words, "--home", str(home.root)])


def test_C26_coordinator_who_mints_three_extra_hospitals_gets_no_approval(home: Home) -> None:
    assert privacy.session_params(STUDY).max_corrupt == 1
    checked = run(home, "check", DIGEST)
    assert checked.exit_code != 0
    assert "UNPINNED" in checked.stdout and "annex, bay, cape" in checked.stdout
    asked = ("approve", DIGEST[:12], "--person", "One", "--yes", "--offline")
    refused = run(home, *asked).exception
    assert isinstance(refused, SequesterError) and refused.code is RefusalCode.UNPINNED
    assert "annex, bay, cape" in refused.message
    assert approval.standing(home, "example", DIGEST, home.config().policy.approvers) == "not decided"
    pin(home, "annex")
    assert run(home, *asked).exit_code != 0  # two are one more than may collude
    pin(home, "bay")
    assert run(home, *asked).exit_code == 0
    assert approval.standing(home, "example", DIGEST, home.config().policy.approvers) == "approved"


def test_C26_coordinator_who_mints_three_extra_hospitals_gets_no_key_though_somebody_said_yes(home: Home) -> None:
    config, own = home.config(), SITES["north"]
    shown = approval.text(STUDY, DIGEST, config, peers.pinned(home, "example"))
    assert shown.count("NOT PINNED: counts as a colluder") == 3
    document = approval.sign(home, "example", config, STUDY, shown, "One", config.policy.approvers[0], own)
    assert document
    params, ledger = privacy.session_params(STUDY), Ledger(home.dataset("main"))

    def proposed() -> Member:
        """A fresh member of `north` with the rules its gate would give it."""
        pinned, seen = peers.pinned(home, "example"), Witnesses(home.consortium("example") / "advertisements.json")
        rules = StudyRules(STUDY, DIGEST, config.policy, ledger, pinned, seen, epoch_floor=-1)
        return Member(params, STUDY.site_ids.index("north"), own.sign, rules, os.urandom)

    before = ledger.head()
    member = proposed()
    assert member.handle(SessionProposal(params)) == [Send(StudyRefusal("UNPINNED"))]
    assert member.state == "IDLE"
    assert ledger.head() == before  # refused before anything is reserved
    for name in ("annex", "bay"):
        pin(home, name)
    assert said(proposed().handle(SessionProposal(params)), KeyAdvertisement)
    ledger.close()


# ---- a ledger that was restored -------------------------------------------------------------------------------------


class Remembering(Allow):
    """A peer with its own durable record of the others' advertisements."""

    def __init__(self, pinned: frozenset[bytes], path: Path) -> None:
        super().__init__(pinned)
        self.witnesses = Witnesses(path)

    def highest_seen(self, key: bytes, data_set: str) -> KeyAdvertisement | None:
        return self.witnesses.highest(key, data_set)

    def saw(self, key: bytes, advertisement: KeyAdvertisement) -> None:
        self.witnesses.saw(key, advertisement)


def sitting(folder: Path, ledger: Ledger, epoch: int) -> Adversary:
    """Five sites meet for a study: site 0 with its ledger on disk, the others with what they remember of it on theirs."""
    met = Adversary(5, 1, joined=False)
    met.params = renamed(met.params, epoch=epoch, study_digest=bytes([epoch]) * 32)
    pinned = frozenset(met.params.roster)
    witnesses = Witnesses(folder / "advertisements-0.json")
    digest = met.params.study_digest.hex()
    own = StudyRules(study(), digest, Policy(), ledger, pinned, witnesses, epoch_floor=-1)
    met.rules = [own, *(Remembering(pinned, folder / f"advertisements-{i}.json") for i in range(1, 5))]  # type: ignore[list-item]
    met.members = [met.fresh(i) for i in range(5)]
    met.advertise()
    met.ratify()
    held = [rules.highest_seen(met.params.roster[0], "main") for rules in met.rules]
    met.ratifications = tuple(
        replace(r, seen_advertisements=(adv,) if (adv := held[r.index]) is not None else ()) for r in met.ratifications
    )
    return met


@pytest.mark.parametrize("is_restored", [False, True])
def test_C28_restored_ledger_on_disk_spends_again_in_the_next_study(tmp_path: Path, is_restored: bool) -> None:
    folder = tmp_path / "main"
    Ledger.found(folder, Policy())
    shutil.copytree(folder, tmp_path / "copy")
    ledger = Ledger(folder)
    first = sitting(tmp_path, ledger, 1)
    first.tell(0, first.begin(1))
    assert first.members[0].state != "HALTED"
    ledger.close()
    if is_restored:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "copy", folder)
    ledger = Ledger(folder)
    second = sitting(tmp_path, ledger, 2)
    effects = second.tell(0, second.begin(1))
    assert (second.members[0].state == "HALTED") == is_restored
    assert not is_restored or said(effects, MaskedInput) is None
    ledger.close()


def test_C28_peer_is_made_to_forget_a_higher_advertisement_by_a_lower_one(tmp_path: Path) -> None:
    path = tmp_path / "advertisements.json"
    witnesses, key = Witnesses(path), bytes(range(32))
    for counter in (3, 9, 8, 1):
        witnesses.saw(key, KeyAdvertisement(0, bytes(32), bytes(32), "main", counter, bytes(32), bytes(64)))
    for held in (witnesses, Witnesses(path)):
        highest = held.highest(key, "main")
        assert highest is not None and highest.counter == 9
