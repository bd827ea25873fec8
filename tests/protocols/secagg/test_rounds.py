"""Whole rounds, bit for bit: the exact sum over the survivors, or the round is abandoned."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sequester.protocols import session
from sequester.protocols.quantise import RingVector
from sequester.protocols.secagg.aggregator import Aggregator
from sequester.protocols.secagg.messages import (
    Abandoned,
    CancelAck,
    Contribute,
    Hold,
    MaskedInput,
    Outcome,
    PairSeeds,
    Refusal,
    RoundCancel,
    Send,
    StudyRefusal,
    SurvivorAck,
    UnmaskRequest,
    UnmaskShares,
    Withdraw,
)


def check_sum(s: Any, survivors: tuple[int, ...]) -> None:
    end = s.outcomes[-1]
    assert isinstance(end, Outcome), end
    assert end.survivors == survivors
    np.testing.assert_array_equal(end.total, s.total_of(survivors))


@pytest.mark.parametrize("ring_bits", [32, 64])
@pytest.mark.parametrize(("n", "n_absent"), [(3, 0), (5, 0), (5, 1), (10, 0), (10, 1), (10, 3), (30, 0), (30, 10)])
def test_sum_over_the_survivors_is_exact_for_any_tolerated_absence(
    make_session: Any, n: int, n_absent: int, ring_bits: int
) -> None:
    s = make_session(n, ring_bits=ring_bits)
    s.absent = set(range(1, 1 + n_absent))
    s.round(1, length=33)
    check_sum(s, tuple(i for i in range(n) if i not in s.absent))
    s.absent = set()
    s.round(2)
    check_sum(s, tuple(range(n)))


def test_three_sites_with_one_absent_end_in_an_abandoned_round(make_session: Any) -> None:
    s = make_session(3)
    s.absent = {1}
    s.round(1)
    end = s.outcomes[-1]
    assert isinstance(end, Abandoned)
    assert end.suspects == (1,)


def test_more_absences_than_the_study_tolerates_abandon_the_round(make_session: Any) -> None:
    s = make_session(10)
    s.absent = {0, 4, 5, 9}
    s.round(1)
    assert isinstance(s.outcomes[-1], Abandoned)


def test_strict_mode_sums_in_one_trip(make_session: Any) -> None:
    s = make_session(5, mode="strict")
    s.said.clear()
    s.round(1)
    check_sum(s, (0, 1, 2, 3, 4))
    assert {type(m) for _, m in s.said} == {MaskedInput}
    assert all(not m.seals and not m.salt for _, m in s.said)


def test_strict_mode_abandons_on_any_absence_and_cancels_nothing(make_session: Any) -> None:
    s = make_session(5, mode="strict")
    s.absent = {2}
    s.round(1)
    assert isinstance(s.outcomes[-1], Abandoned)
    assert not any(isinstance(m, CancelAck) for _, m in s.said)


def test_a_survivor_silent_after_masking_is_taken_back_out(make_session: Any) -> None:
    s = make_session(10)
    s.absent = {3}
    s.lose = lambda sender, to, message: sender == 5 and isinstance(message, SurvivorAck)
    s.round(1)
    check_sum(s, (0, 1, 2, 4, 6, 7, 8, 9))


def test_sites_silent_after_a_complete_round_do_not_stop_the_sum(make_session: Any) -> None:
    s = make_session(10)
    s.lose = lambda sender, to, message: sender in (1, 5, 7) and isinstance(message, UnmaskShares)
    s.round(1)
    check_sum(s, tuple(range(10)))


def test_an_absent_site_that_comes_back_gives_the_seeds_of_a_survivor_that_fell_silent(make_session: Any) -> None:
    s = make_session(10)
    s.lose = lambda sender, to, message: (
        (sender == 5 and isinstance(message, UnmaskShares)) or (sender == 3 and isinstance(message, MaskedInput))
    )
    s.round(1)
    check_sum(s, (0, 1, 2, 4, 5, 6, 7, 8, 9))
    assert any(isinstance(m, PairSeeds) for _, m in s.said)


def test_an_absent_site_that_missed_the_start_gives_seeds_and_never_joins_that_round(make_session: Any) -> None:
    s = make_session(10)
    lost: list[int] = []

    def lose(sender: int, to: int, message: object) -> bool:
        if to == 3 and type(message).__name__ == "RoundStart":
            lost.append(to)
            return True
        return sender == 5 and isinstance(message, UnmaskShares)

    s.lose = lose
    s.round(1)
    check_sum(s, (0, 1, 2, 4, 5, 6, 7, 8, 9))
    assert lost
    assert s.members[3].state == "RELEASED"
    assert s.restart(3).state == "RELEASED"
    assert s.members[3].last_round == 1


def test_a_sealed_share_that_does_not_open_is_named_and_the_rest_go_on_without_its_sender(make_session: Any) -> None:
    s = make_session(10)
    inner = s.aggregator.handle

    def spoil(sender: int, message: Any) -> Any:
        if sender == 4 and isinstance(message, MaskedInput):
            message = replace(message, seals={j: bytes(48) for j in message.seals})
        return inner(sender, message)

    s.aggregator.handle = spoil
    s.round(1)
    check_sum(s, (0, 1, 2, 3, 5, 6, 7, 8, 9))
    assert (0, Refusal(4)) in s.said


def test_one_bad_share_set_is_left_out_by_the_commitments(make_session: Any) -> None:
    s = make_session(10)
    inner = s.aggregator.handle

    def spoil(sender: int, message: Any) -> Any:
        if sender == 0 and isinstance(message, UnmaskShares):
            message = replace(message, shares=dict.fromkeys(message.shares, bytes(32)))
        return inner(sender, message)

    s.aggregator.handle = spoil
    s.round(1)
    end = s.outcomes[-1]
    # at most n quorums are tried, in fixed order: either a clean one is among them, or the round is abandoned
    if isinstance(end, Outcome):
        check_sum(s, tuple(range(10)))
    else:
        assert 0 in end.suspects


def test_a_human_hold_comes_before_the_vector_and_a_yes_goes_on(make_session: Any) -> None:
    s = make_session(5)
    s.rules[2].hold = True
    s.vectors = {i: np.full(4, i, np.uint32) for i in range(5)}
    s.run(s.aggregator.start_round(1, (0, 1, 2, 3, 4), 4, 4, s.task(), b"broadcast"))
    assert s.members[2].state == "HELD"
    assert s.members[2].last_round == 0
    assert any(isinstance(m, Hold) for _, m in s.said)
    s.run(heard=(2, s.members[2].answer_hold(True)))
    check_sum(s, (0, 1, 2, 3, 4))


def test_a_human_no_is_an_opaque_refusal(make_session: Any) -> None:
    s = make_session(5)
    s.rules[2].hold = True
    s.vectors = {i: np.full(4, i, np.uint32) for i in range(5)}
    s.run(s.aggregator.start_round(1, (0, 1, 2, 3, 4), 4, 4, s.task(), b"broadcast"))
    s.run(heard=(2, s.members[2].answer_hold(False)))
    check_sum(s, (0, 1, 3, 4))
    assert (2, Refusal()) in s.said


def test_a_withdrawn_site_answers_everything_with_withdraw_and_keeps_no_key(make_session: Any) -> None:
    s = make_session(5)
    s.round(1)
    s.run(heard=(4, s.members[4].withdraw()))
    assert 4 in s.aggregator.withdrawn
    s.round(2)
    check_sum(s, (0, 1, 2, 3))
    assert isinstance(s.members[4].handle(RoundCancel(b""))[0], Send)
    assert s.restart(4).state == "WITHDRAWN"
    assert s.members[4]._pairs == {}


def test_a_retry_covered_by_cancels_costs_no_charge(make_session: Any) -> None:
    s = make_session(5)
    for rules in s.rules:
        rules.charges = 1
    s.absent = {3, 4}
    s.round(1, step=0)
    assert isinstance(s.outcomes[-1], Abandoned)
    s.absent = set()
    s.round(2, step=0, attempt=1)
    check_sum(s, (0, 1, 2, 3, 4))


def test_a_retry_without_cancels_is_charged_and_refused_when_nothing_is_left(make_session: Any) -> None:
    s = make_session(5)
    for rules in s.rules:
        rules.charges = 1
    s.absent = {3, 4}
    s.lose = lambda sender, to, message: isinstance(message, CancelAck)
    s.round(1, step=0)
    s.absent = set()
    s.round(2, step=0, attempt=1)
    assert isinstance(s.outcomes[-1], Abandoned)
    assert s.members[0].last_round == 1
    assert not any(isinstance(m, MaskedInput) and i == 0 for i, m in s.said[-10:])


def test_a_step_is_never_contributed_twice_and_an_analysis_never_gone_back_to(make_session: Any) -> None:
    s = make_session(5)
    s.round(1, step=4)
    s.round(2, step=4)
    assert isinstance(s.outcomes[-1], Abandoned)
    s.round(3, step=3)
    assert isinstance(s.outcomes[-1], Abandoned)
    s.round(4, step=5)
    assert isinstance(s.outcomes[-1], Outcome)


def test_a_session_resumed_at_any_moment_sends_the_same_bytes_again(make_session: Any) -> None:
    s = make_session(5)
    s.lose = lambda sender, to, message: sender == 1 and isinstance(message, MaskedInput)
    s.vectors = {i: np.full(4, i, np.uint32) for i in range(5)}
    s.run(s.aggregator.start_round(1, (0, 1, 2, 3, 4), 4, 4, s.task(), b"broadcast"))
    s.lose = lambda sender, to, message: False
    first = next(m for i, m in s.said if i == 1 and isinstance(m, MaskedInput))
    s.members[1] = s.restart(1)
    s.run(heard=(1, s.members[1].resume()))
    again = [m for i, m in s.said if i == 1 and isinstance(m, MaskedInput)][-1]
    assert (again.salt, again.commit, again.seals, again.signature) == (
        first.salt, first.commit, first.seals, first.signature,
    )  # fmt: skip
    assert again.y.tobytes() == first.y.tobytes()
    check_sum(s, (0, 1, 2, 3, 4))


def test_every_prefix_of_a_journal_gives_a_legal_state_that_never_masks_an_old_round_again(make_session: Any) -> None:
    s = make_session(5)
    s.absent = {3}
    s.round(1)
    s.absent = set()
    s.round(2)
    starts = [k for k, record in enumerate(s.journals[1]) if json.loads(record)["kind"] == "round"]
    for cut in range(len(s.journals[1]) + 1):
        back = s.restart(1, cut)
        rounds = [json.loads(r)["round"] for r in s.journals[1][:cut] if json.loads(r)["kind"] == "round"]
        assert back.last_round == (rounds[-1] if rounds else 0)
        assert back.contribute(RingVector(np.zeros(9, np.uint32))) == []
        if cut > starts[0]:
            start = replace(_start_of(s, back.last_round), ratifications=tuple(s.aggregator._ratifications.values()))
            assert not any(isinstance(e, Contribute) for e in back.handle(start))


def _start_of(s: Any, number: int) -> Any:
    from sequester.protocols.secagg.messages import RoundStart

    return RoundStart(s.aggregator.session_id, number, (0, 1, 2, 3, 4), 9, 9, s.task(number), b"broadcast")


def test_a_restarted_exchange_collects_the_open_round_again(make_session: Any) -> None:
    s = make_session(5)
    s.lose = lambda sender, to, message: sender == 2 and isinstance(message, MaskedInput)
    s.vectors = {i: np.full(4, i, np.uint32) for i in range(5)}
    s.run(s.aggregator.start_round(1, (0, 1, 2, 3, 4), 4, 4, s.task(), b"broadcast"))
    s.lose = lambda sender, to, message: False
    s.aggregator = Aggregator.restore(s.ledger, s.params, 1.0)
    assert s.aggregator.state == "COLLECTING"
    for i in range(5):
        s.run(heard=(i, s.members[i].resume()))
    check_sum(s, (0, 1, 2, 3, 4))


def test_no_full_release_after_an_acknowledgement(make_session: Any) -> None:
    s = make_session(5)
    s.absent = {3}
    s.lose = lambda sender, to, message: isinstance(message, UnmaskRequest)
    s.round(1)
    member = s.members[0]
    assert member.state in ("ACKED", "CANCELLED")
    everybody = (0, 1, 2, 3, 4)
    salts = tuple(box.salt if box else bytes(16) for box in s.outboxes)
    ctx = s.outboxes[0].ctx
    seals = {j: box.seals[0] if box else bytes(48) for j, box in enumerate(s.outboxes)}
    assert member.handle(UnmaskRequest(ctx, 0, everybody, salts, seals)) == [Send(Refusal())]


def test_charges_and_records_precede_every_word_of_a_round(make_session: Any) -> None:
    s = make_session(5)
    start = None

    def keep(sender: int, to: int, message: Any) -> bool:
        nonlocal start
        if to == 0 and type(message).__name__ == "RoundStart":
            start = message
        return to == 0

    s.lose = keep
    s.vectors = {i: np.full(4, i, np.uint32) for i in range(5)}
    s.run(s.aggregator.start_round(1, (0, 1, 2, 3, 4), 4, 4, s.task(), b"broadcast"))
    effects = s.members[0].handle(start)
    assert [type(e).__name__ for e in effects] == ["Persist", "Persist", "Contribute"]
    assert effects[1].charge == s.task()
    effects = s.members[0].contribute(RingVector(np.zeros(4, np.uint32)))
    assert [type(e).__name__ for e in effects] == ["StoreOutbox", "Persist", "Send"]


def test_a_member_with_too_many_unpinned_hospitals_refuses_the_study(make_session: Any) -> None:
    from sequester.protocols.secagg.member import Member
    from sequester.protocols.secagg.messages import SessionProposal

    s = make_session(5)
    s.rules[0].pinned = frozenset(s.params.roster[1:3])
    fresh = Member(s.params, 0, s.signs[0], s.rules[0], s.entropy)
    assert fresh.handle(SessionProposal(s.params)) == [Send(StudyRefusal("UNPINNED"))]
    s.rules[0].pinned = frozenset(s.params.roster[1:4])
    assert fresh.handle(SessionProposal(s.params))
    assert fresh.state == "ADVERTISED"


def test_a_member_has_no_useful_repr_and_cannot_be_pickled(make_session: Any) -> None:
    s = make_session(3)
    assert "kx" not in repr(s.members[0])
    with pytest.raises(TypeError):
        pickle.dumps(s.members[0])


@pytest.mark.parametrize(
    ("n", "c", "t", "h", "cancels"),
    [(3, 1, 3, 2, 2), (4, 1, 3, 2, 3), (5, 1, 4, 3, 3), (7, 2, 5, 3, 5), (10, 3, 7, 4, 7), (15, 4, 10, 6, 10),
     (30, 9, 20, 11, 20), (100, 33, 67, 34, 67)],
)  # fmt: skip
def test_session_numbers_are_those_of_the_table(
    make_session: Any, n: int, c: int, t: int, h: int, cancels: int
) -> None:
    from sequester.protocols.session import SessionParams

    assert session.threshold(n, c) == t
    params = SessionParams(bytes(32), 0, tuple(bytes([i]) * 32 for i in range(n)), c, t, n - t, 32, "double")
    session.check_params(params)
    assert session.noise_adders(params, n) == h
    assert session.cancels_needed(params, n) == cancels


def test_withdraw_names_the_study_and_the_session(make_session: Any) -> None:
    s = make_session(3)
    assert s.members[0].withdraw()[-1] == Send(Withdraw(s.params.study_digest, s.aggregator.session_id))
