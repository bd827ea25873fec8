"""Set-up under a malicious aggregator: who is in the session, under which numbers, with which keys.

Each test performs the attack of one row of section 9 and is named after it; `tests/mutate.py` deletes the check and
the test of that row has to fail.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from attacks.adversary import Adversary, is_refused, ledger_head, renamed, said
from sequester.protocols import exchange_pb2 as pb
from sequester.protocols import session, wire
from sequester.protocols.errors import PeerError, RefusalCode, StudyError
from sequester.protocols.secagg import keys
from sequester.protocols.secagg.member import Member
from sequester.protocols.secagg.messages import (
    Evidence,
    KeyAdvertisement,
    MaskedInput,
    Ratification,
    Roster,
    Send,
    SessionProposal,
    StudyRefusal,
)


def resigned(adversary: Adversary, i: int, **changes: object) -> KeyAdvertisement:
    """Site i's advertisement with some fields changed and signed again by i's own identity."""
    adv = replace(adversary.advs[i], **changes)  # type: ignore[arg-type]
    return replace(adv, signature=adversary.signs[i](keys.advertisement_bytes(adv)))


def swapped(adversary: Adversary, i: int, adv: KeyAdvertisement) -> Roster:
    return Roster(tuple(adv if a.index == i else a for a in adversary.advs))


def refuses_roster(adversary: Adversary, roster: Roster, site: int = 0) -> None:
    effects = adversary.tell(site, roster)
    assert effects == [Send(StudyRefusal("ROSTER"))]
    assert adversary.members[site].state == "ADVERTISED"


@pytest.fixture
def meeting() -> Adversary:
    """Five sites, the last one corrupt; keys are advertised, nothing is ratified."""
    adversary = Adversary(5, 1, joined=False)
    adversary.advertise()
    return adversary


def test_C1_man_in_the_middle_puts_its_own_pair_key_in_the_place_of_a_site(meeting: Adversary) -> None:
    own = X25519PrivateKey.from_private_bytes(bytes(range(32))).public_key().public_bytes_raw()
    refuses_roster(meeting, swapped(meeting, 1, replace(meeting.advs[1], kx=own)))


def test_C1_advertisement_of_another_session_is_shown_again(meeting: Adversary) -> None:
    other = keys.session_id(renamed(meeting.params, epoch=9))
    refuses_roster(meeting, swapped(meeting, 1, resigned(meeting, 1, session_id=other)))


def split_rosters(meeting: Adversary) -> None:
    """The colluder signs two keys, one for site 0 and one for everybody else."""
    kx = X25519PrivateKey.from_private_bytes(bytes(range(32))).public_key().public_bytes_raw()
    first, second = swapped(meeting, 4, resigned(meeting, 4, kx=kx)), Roster(tuple(meeting.advs))
    words = [said(meeting.tell(i, first if i == 0 else second), Ratification) for i in range(5)]
    meeting.ratifications = tuple(r for r in words if r is not None)


def test_C2_split_rosters_give_no_two_sites_a_common_key(meeting: Adversary) -> None:
    split_rosters(meeting)
    assert meeting.members[1]._pairs[2] == meeting.members[2]._pairs[1]
    assert meeting.members[0]._pairs[1] != meeting.members[1]._pairs[0]


def test_C2_split_rosters_end_the_session_before_the_first_mask(meeting: Adversary) -> None:
    split_rosters(meeting)
    effects = meeting.tell(1, meeting.begin(1))
    assert meeting.members[1].state == "HALTED"
    assert said(effects, MaskedInput) is None
    assert any(isinstance(e, Evidence) for e in effects)


@pytest.mark.parametrize("epoch", [0, 1])
def test_C3_old_session_is_revived(epoch: int) -> None:
    adversary = Adversary(5, 1, joined=False)
    adversary.rules[0].epoch = 1
    effects = adversary.tell(0, SessionProposal(renamed(adversary.params, epoch=epoch)))
    assert effects == [Send(StudyRefusal("EPOCH"))]
    assert said(adversary.tell(0, SessionProposal(renamed(adversary.params, epoch=2))), KeyAdvertisement)


@pytest.mark.parametrize(
    "weaker",
    [
        {"max_corrupt": 1}, {"max_absent": 2}, {"min_active": 5}, {"ring_bits": 64}, {"mode": "strict"},
        {"suite": "x25519-none-v0"}, {"study_digest": bytes(32)}, {"roster": tuple(bytes([i]) * 32 for i in range(7))},
    ],
    ids=lambda weaker: next(iter(weaker)),
)  # fmt: skip
def test_C4_weaker_numbers_than_the_signed_study(weaker: dict[str, object]) -> None:
    adversary = Adversary(7, 2, absent=1, min_active=6, joined=False)
    effects = adversary.tell(0, SessionProposal(renamed(adversary.params, **weaker)))
    assert effects == [Send(StudyRefusal("PARAMS"))]


def test_C5_colluder_reflects_the_key_of_an_honest_site(meeting: Adversary) -> None:
    refuses_roster(meeting, swapped(meeting, 4, resigned(meeting, 4, kx=meeting.advs[1].kx)))


def test_C5_own_key_is_replaced_by_one_from_before_a_crash(meeting: Adversary) -> None:
    lost = said(meeting.fresh(0).handle(SessionProposal(meeting.params)), KeyAdvertisement)
    assert lost is not None
    assert lost.session_id == meeting.advs[0].session_id
    refuses_roster(meeting, swapped(meeting, 0, lost))


def test_C5_colluder_advertises_a_small_order_key(meeting: Adversary) -> None:
    refuses_roster(meeting, swapped(meeting, 4, resigned(meeting, 4, kx=bytes(32))))


def test_C26_coordinator_who_mints_three_extra_hospitals_is_refused_by_name() -> None:
    adversary = Adversary(10, 2, corrupt=[7, 8, 9], joined=False)
    adversary.rules[0].pinned = frozenset(adversary.params.roster[:7])
    assert adversary.tell(0, SessionProposal(adversary.params)) == [Send(StudyRefusal("UNPINNED"))]
    refusal = adversary.members[0].last_refusal
    assert isinstance(refusal, StudyError)
    assert "3 hospitals" in refusal.message
    adversary.rules[0].pinned = frozenset(adversary.params.roster[:8])  # two unpinned: no more than c
    assert said(adversary.tell(0, SessionProposal(adversary.params)), KeyAdvertisement)


def test_C28_restored_ledger_spends_again_across_studies() -> None:
    adversary = Adversary(5, 1, joined=False)
    for rules in adversary.rules[1:4]:  # an earlier study: peers hold a higher advertisement of site 0
        earlier = KeyAdvertisement(0, bytes(32), bytes(32), "cohort", 9, ledger_head(9), b"")
        earlier = replace(earlier, signature=adversary.signs[0](keys.advertisement_bytes(earlier)))
        rules.saw(adversary.params.roster[0], earlier)
    adversary.advertise()
    adversary.ratify()
    behind = adversary.rules[1].seen[adversary.params.roster[0], "cohort"]
    adversary.ratifications = tuple(
        replace(r, seen_advertisements=(behind,) if r.index in (1, 2, 3) else ()) for r in adversary.ratifications
    )
    effects = adversary.tell(0, adversary.begin(1))
    assert adversary.members[0].state == "HALTED"
    assert said(effects, MaskedInput) is None


def test_C28_exchange_withholds_the_advertisement_behind_a_peers_word() -> None:
    adversary = Adversary(5, 1, joined=False)
    earlier = KeyAdvertisement(0, bytes(32), bytes(32), "cohort", 9, ledger_head(9), bytes(64))
    adversary.rules[1].saw(adversary.params.roster[0], earlier)
    adversary.advertise()
    adversary.ratify()
    adversary.ratifications = tuple(replace(r, seen_advertisements=()) for r in adversary.ratifications)
    assert said(adversary.tell(0, adversary.begin(1)), MaskedInput) is None
    assert adversary.members[0].state == "RATIFIED"


def test_C28_ledger_with_another_history_at_the_same_counter() -> None:
    adversary = Adversary(5, 1, joined=False)
    earlier = KeyAdvertisement(0, bytes(32), bytes(32), "cohort", 5, ledger_head(5, "another"), b"")
    earlier = replace(earlier, signature=adversary.signs[0](keys.advertisement_bytes(earlier)))
    adversary.rules[1].saw(adversary.params.roster[0], earlier)
    adversary.advertise()
    adversary.ratify()
    adversary.ratifications = tuple(
        replace(r, seen_advertisements=(earlier,) if r.index == 1 else ()) for r in adversary.ratifications
    )
    adversary.tell(0, adversary.begin(1))
    assert adversary.members[0].state == "HALTED"


@pytest.mark.parametrize("number", [1, 2])
def test_C29_ratifications_are_skipped_by_opening_at_any_round(number: int) -> None:
    adversary = Adversary(5, 1)
    for shown in ((), adversary.ratifications[:4], (*adversary.ratifications[:4], adversary.ratifications[0])):
        effects = adversary.tell(0, replace(adversary.begin(number), ratifications=shown))
        assert said(effects, MaskedInput) is None
        assert adversary.members[0].state == "RATIFIED"


def test_C29_ratifications_are_skipped_by_a_seed_request() -> None:
    adversary = Adversary(5, 1)
    start = adversary.begin(1)
    ctx = adversary.play(start, [1, 2, 3, 4])
    acks = adversary.agree(ctx, 1, (1, 2, 3, 4))
    bare = replace(start, ratifications=())
    assert adversary.ask_seeds(0, ctx, 1, (1, 2, 3, 4), acks, start=bare) == [Send(StudyRefusal("STUDY"))]
    assert adversary.members[0].state == "RATIFIED"


def test_C29_evidence_is_forged_from_another_epoch() -> None:
    adversary = Adversary(5, 1)
    other = keys.session_id(renamed(adversary.params, epoch=7))
    honest = adversary.ratifications[1]
    stale = replace(honest, session_id=other, roster_hash=bytes(32))
    stale = replace(stale, signature=adversary.signs[1](keys.ratification_bytes(other, bytes(32), stale.seen)))
    shown = tuple(stale if r.index == 1 else r for r in adversary.ratifications)
    effects = adversary.tell(0, replace(adversary.begin(1), ratifications=shown))
    assert adversary.members[0].state == "RATIFIED"  # refused, and nobody is accused
    assert not any(isinstance(e, Evidence) for e in effects)


def test_C29_ratification_is_forged_in_the_name_of_a_site() -> None:
    adversary = Adversary(5, 1)
    shown = (replace(adversary.ratifications[0], index=1, signature=bytes(64)),)
    shown = tuple(shown[0] if r.index == 1 else r for r in adversary.ratifications)
    assert said(adversary.tell(0, replace(adversary.begin(1), ratifications=shown)), MaskedInput) is None
    assert adversary.members[0].state == "RATIFIED"


def test_C30_downgrade_to_another_suite() -> None:
    adversary = Adversary(5, 1, joined=False)
    weak = renamed(adversary.params, suite="x25519-none-v0")
    with pytest.raises(StudyError):
        Member(weak, 0, adversary.signs[0], adversary.rules[0], adversary.entropy)


@pytest.mark.parametrize("weak", [{"ring_bits": 16}, {"mode": "plain"}], ids=lambda weak: next(iter(weak)))
def test_C30_ring_or_mode_that_no_suite_has(weak: dict[str, object]) -> None:
    params = Adversary(5, 1, joined=False).params
    with pytest.raises(StudyError) as refused:
        session.check_params(renamed(params, **weak))
    assert refused.value.code is RefusalCode.PARAMS


def test_C30_every_parameter_is_bound_into_the_sessions_name() -> None:
    params = Adversary(7, 2, joined=False).params
    changes: dict[str, object] = {
        "study_digest": bytes(32), "epoch": 1, "roster": params.roster[::-1], "max_corrupt": 1, "min_active": 6,
        "max_absent": 1, "ring_bits": 64, "mode": "strict", "suite": "x25519-none-v0",
    }  # fmt: skip
    names = {keys.session_id(renamed(params, **{name: value})) for name, value in changes.items()}
    assert len(names | {keys.session_id(params)}) == len(changes) + 1


@pytest.mark.parametrize(
    "first",
    [
        pb.Hello(wire_min=2, wire_max=9, study_formats=[1]),
        pb.Hello(wire_min=0, wire_max=0, study_formats=[1]),
        pb.Hello(wire_min=1, wire_max=1, study_formats=[2]),
        StudyRefusal("STUDY"),
    ],
    ids=["newer wire", "older wire", "another study format", "no hello"],
)
def test_C30_old_reader_guesses_at_new_bytes(first: object) -> None:
    with pytest.raises(PeerError) as refused:
        wire.check_hello(first)
    assert not isinstance(first, pb.Hello) or refused.value.code is RefusalCode.VERSION


def test_an_honest_set_up_is_accepted_by_every_site() -> None:
    adversary = Adversary(5, 1)
    ctx = adversary.play(adversary.begin(1))
    assert all(not is_refused(adversary.release(i, ctx, 0, range(5))) for i in range(5))
    assert adversary.learns_at_most_one_sum(ctx) == [frozenset({0, 1, 2, 3})]
