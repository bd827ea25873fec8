"""Cases the specification names (section 13) and no other file here or under attacks performs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from attacks.adversary import Adversary, is_refused, renamed, said
from sequester.protocols.secagg import keys
from sequester.protocols.secagg.member_rounds import MAX_HOLDS
from sequester.protocols.secagg.member_state import Admission
from sequester.protocols.secagg.messages import (
    Effect,
    Hold,
    KeyAdvertisement,
    MaskedInput,
    Persist,
    Send,
    SessionProposal,
    StudyRefusal,
    SurvivorAck,
    UnmaskShares,
)


def charge_of(effects: list[Effect]) -> int:
    return sum(isinstance(e, Persist) and e.charge is not None for e in effects)


def test_attempt_3_with_the_cancels_of_attempt_1_is_charged() -> None:
    adversary = Adversary(5, 1)
    first = adversary.begin(1, step=0)
    assert charge_of(adversary.tell(0, first)) == 1
    for i in range(1, 5):
        adversary.tell(i, first)
    ctx = adversary.ctx(first)
    cancels = {ctx: adversary.cancelled(ctx, range(5))}
    second = adversary.begin(2, step=0, attempt=1, cancels=cancels)
    assert charge_of(adversary.tell(0, second)) == 0  # covered: attempt 1 can never open
    third = adversary.begin(3, step=0, attempt=2, cancels=cancels)
    effects = adversary.tell(0, third)
    assert charge_of(effects) == 1
    assert said(effects, MaskedInput)


def test_attempt_3_with_the_cancels_of_both_is_covered() -> None:
    adversary = Adversary(5, 1)
    cancels: dict[bytes, Any] = {}
    for number in (1, 2, 3):
        start = adversary.begin(number, step=0, attempt=number - 1, cancels=cancels)
        assert charge_of(adversary.tell(0, start)) == (number == 1)
        for i in range(1, 5):
            adversary.tell(i, start)
        cancels[adversary.ctx(start)] = adversary.cancelled(adversary.ctx(start), range(5))


@pytest.mark.parametrize("crash", [False, True])
def test_charge_t_plus_r_plus_1_is_refused(crash: bool) -> None:
    adversary = Adversary(5, 1)
    adversary.rules[0].admission = Admission(charges=3, exact=False)  # T + R = 2 + 1
    for number, (step, attempt) in enumerate([(0, 0), (0, 1), (1, 0)], 1):
        assert charge_of(adversary.tell(0, adversary.begin(number, step=step, attempt=attempt))) == 1
    if crash:
        adversary.members[0] = adversary.restart(0)
    for number, (step, attempt) in ((4, (1, 1)), (5, (2, 0))):
        effects = adversary.tell(0, adversary.begin(number, step=step, attempt=attempt))
        assert is_refused(effects)
        assert charge_of(effects) == 0
    assert adversary.members[0].last_round == 3


def test_a_hold_after_the_vector_is_out_is_impossible(make_session: Any) -> None:
    adversary = Adversary(4, 1)
    ctx = adversary.play(adversary.begin(1))
    for rules in adversary.rules:
        rules.admission = replace(rules.admission, needs_hold=True, hold_until_unix=9)
    acks = adversary.agree(ctx, 1, (0, 1, 3))
    effects = adversary.release(0, ctx, 1, (0, 1, 3), acks)
    assert said(effects, UnmaskShares)
    assert adversary.members[0].answer_hold(False) == []
    assert not any(isinstance(m, Hold) for _, m in adversary.words)
    assert any(isinstance(m, SurvivorAck) for _, m in adversary.words)
    # nor does the exchange wait for one: after COLLECTING a Hold moves no deadline
    s = make_session(4)
    s.absent = {2}
    s.vectors = {i: np.full(4, i, np.uint32) for i in range(4)}
    s.lose = lambda sender, to, message: isinstance(message, SurvivorAck)
    s.run(s.aggregator.start_round(1, (0, 1, 2, 3), 4, 4, s.task(), b"broadcast"))
    s.deadline()
    assert s.aggregator.state == "AGREEING"
    assert s.aggregator.handle(0, Hold(1, 10**10)) == []


def test_a_held_round_that_is_asked_again_costs_no_record_and_held_rounds_have_an_end() -> None:
    adversary = Adversary(4, 1)
    adversary.rules[0].admission = Admission(charges=10**6, exact=False, needs_hold=True, hold_until_unix=9)
    start = adversary.begin(1)
    assert adversary.tell(0, start)[-1] == Send(Hold(1, 9))
    kept = len(adversary.journals[0])
    for _ in range(100):
        assert adversary.tell(0, replace(start, ratifications=())) == [Send(Hold(1, 9))]
    assert len(adversary.journals[0]) == kept
    for number in range(2, 200):
        adversary.tell(0, adversary.begin(number, step=number))
    assert len(adversary.journals[0]) == kept + MAX_HOLDS - 1
    assert adversary.members[0].state == "HELD" and adversary.members[0].answer_hold(True)  # the last one still counts


def test_a_roster_without_a_revoked_identity_is_a_new_epoch_and_the_old_session_is_over_there() -> None:
    before = Adversary(5, 1)
    old_words = [before.begin(number) for number in (1, 2)]
    after = Adversary(4, 1, joined=False)
    after.params = renamed(after.params, epoch=1)
    for i in range(4):
        after.rules[i].epoch = 0  # the epoch before was journalled
        after.members[i] = after.fresh(i)
    assert after.params.roster == before.params.roster[:4]
    stale = renamed(after.params, epoch=0)
    assert after.members[0].handle(SessionProposal(stale)) == [Send(StudyRefusal("EPOCH"))]
    after.advertise()
    after.ratify()
    for start in old_words:
        assert said(after.tell(0, start), MaskedInput) is None
    ctx = after.play(after.begin(1))
    for i in range(4):
        after.release(i, ctx, 0, range(4))
    assert after.learns_at_most_one_sum(ctx) == [frozenset({0, 1, 2})]


def test_a_revoked_identity_is_in_no_session_of_the_smaller_roster() -> None:
    adversary = Adversary(5, 1, joined=False)
    smaller = renamed(adversary.params, roster=adversary.params.roster[:4], epoch=1, max_absent=1, min_active=3)
    effects = adversary.tell(0, SessionProposal(smaller))
    assert said(effects, KeyAdvertisement) is None  # another roster is another signed study, not a proposal


def test_a_renewed_certificate_changes_nothing_the_session_is_made_of() -> None:
    """The roster names identity keys only: there is no place where a certificate could enter (the exchange binds streams)."""
    params = Adversary(5, 1, joined=False).params
    assert set(params.__slots__) == {
        "study_digest", "epoch", "roster", "max_corrupt", "min_active", "max_absent", "ring_bits", "mode", "suite",
    }  # fmt: skip
    assert all(len(key) == 32 for key in params.roster)
    assert keys.session_id(params) == keys.session_id(renamed(params))


def test_stored_bytes_go_out_after_their_record_where_a_crash_came_between_the_two(make_session: Any) -> None:
    s = make_session(5)
    s.lose = lambda sender, to, message: sender == 1 and isinstance(message, MaskedInput)
    s.vectors = {i: np.full(4, i, np.uint32) for i in range(5)}
    s.run(s.aggregator.start_round(1, (0, 1, 2, 3, 4), 4, 4, s.task(), b"broadcast"))
    s.lose = lambda sender, to, message: False
    assert b'"input"' in s.journals[1].pop()  # the outbox was stored, its record was not
    s.members[1] = s.restart(1)
    effects = s.members[1].resume()
    assert [type(e).__name__ for e in effects] == ["Persist", "Send", "Send"]
    s.run(heard=(1, effects))
    assert b'"input"' in s.journals[1][-2]  # and the release after it
    assert s.outcomes[-1].survivors == (0, 1, 2, 3, 4)
    assert s.restart(1).state == s.members[1].state == "RELEASED"


@pytest.mark.parametrize("crash", [False, True])
def test_an_acknowledgement_lost_with_its_stream_is_said_again_and_the_round_goes_on(
    make_session: Any, crash: bool
) -> None:
    s = make_session(5)  # t = 4: with site 3 absent, everybody else is needed
    s.absent = {3}
    s.lose = lambda sender, to, message: sender == 1 and isinstance(message, SurvivorAck)
    s.vectors = {i: np.full(4, i, np.uint32) for i in range(5)}
    s.run(s.aggregator.start_round(1, (0, 1, 2, 3, 4), 4, 4, s.task(), b"broadcast"))
    s.deadline()
    assert s.aggregator.state == "AGREEING"
    s.lose = lambda sender, to, message: False
    if crash:
        s.members[1] = s.restart(1)
    s.run(heard=(1, s.members[1].resume()))
    assert s.outcomes[-1].survivors == (0, 1, 2, 4)
    acks = {(m.version, m.digest, m.signature) for i, m in s.said if i == 1 and isinstance(m, SurvivorAck)}
    assert len(acks) == 1
