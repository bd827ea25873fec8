"""Rounds under a malicious aggregator with c colluders: the goal of section 1, against the real `Member`.

Each test performs the attack of one row of section 9 and is named after it; `tests/mutate.py` deletes the check and
the test of that row has to fail. Where the attack would recover a vector, the adversary's arithmetic is really done.
With N = 4 and c = 1 (t = 3) sites 0, 1, 2 are honest and two honest acknowledgements make a quorum.
"""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from attacks.adversary import LENGTH, Adversary, is_refused, said
from sequester.protocols import session
from sequester.protocols.secagg import keys, masks, shamir
from sequester.protocols.secagg.member_state import Admission
from sequester.protocols.secagg.messages import (
    Ack,
    CancelAck,
    MaskedInput,
    PairSeeds,
    Refusal,
    RoundCancel,
    Send,
    SurvivorAck,
    SurvivorProposal,
    UnmaskRequest,
    UnmaskShares,
)

ALL = (0, 1, 2, 3)
OTHER_TASKS: dict[str, Any] = {
    "study_digest": bytes(32), "analysis": "linear", "step": 7, "attempt": 7, "broadcast": bytes(32), "layout": bytes(32),
    "codec": "w64b16g1", "clip": "none", "noise": "none", "event": "exact",
}  # fmt: skip


@pytest.fixture
def four() -> Adversary:
    return Adversary(4, 1)


# ---- contexts and numbers -------------------------------------------------------------------------------------------


def test_C6_other_model_for_one_site_leaves_masks_that_do_not_cancel() -> None:
    adversary = Adversary(4, 1, mode="strict")
    one = adversary.play(adversary.begin(1, broadcast=b"the model"), [0])
    rest = adversary.play(adversary.begin(1, broadcast=b"a model that isolates one patient"), [1, 2, 3])
    inputs = [adversary.inputs[one, 0], *(adversary.inputs[rest, i] for i in (1, 2, 3))]
    truth = [adversary.put_in(one, 0), *(adversary.put_in(rest, i) for i in (1, 2, 3))]
    total = np.sum([m.y for m in inputs], axis=0, dtype=np.uint32)
    assert not np.array_equal(total, np.sum(truth, axis=0, dtype=np.uint32))


def test_C6_other_active_set_for_one_site_leaves_masks_that_do_not_cancel() -> None:
    adversary = Adversary(5, 1, mode="strict")
    few = adversary.play(adversary.begin(1, (0, 1, 2, 3), step=1), [0, 1, 2, 3])
    every = adversary.play(adversary.begin(1, step=1), [4])
    keys_of = {keys.mask_key(adversary.members[0]._pairs[1], ctx) for ctx in (few, every)}
    assert len(keys_of) == 2


def test_C6_box_of_an_earlier_round_is_opened_in_a_later_one(four: Adversary) -> None:
    first = four.play(four.begin(1))
    acks = four.agree(first, 1, (0, 1, 3))
    for i in (0, 1):
        four.release(i, first, 1, (0, 1, 3), acks)  # seeds of site 2, whose input the aggregator held back
    second = four.play(four.begin(2))
    # site 2's boxes and salt of round 1 are slipped into the full opening of round 2
    for i in (0, 1):
        salts = tuple(four.inputs[first if j == 2 else second, j].salt for j in ALL)
        boxes = {j: four.inputs[first if j == 2 else second, j].seals[i] for j in ALL}
        effects = four.members[i].handle(UnmaskRequest(second, 0, ALL, salts, boxes))
        assert effects == [Send(Refusal(2))]
    assert four.learns_at_most_one_sum(first) == [frozenset({0, 1})]


def test_C6_round_set_length_and_task_are_all_bound_into_the_context(four: Adversary) -> None:
    start = four.begin(1)
    others = (
        replace(start, round=2),
        replace(start, active=(0, 1, 3)),
        replace(start, length=LENGTH + 1),
        *(replace(start, task=replace(start.task, **{name: value})) for name, value in OTHER_TASKS.items()),
    )
    contexts = {four.ctx(each) for each in (start, *others)}
    assert len(contexts) == len(others) + 1
    assert len({keys.mask_key(four.members[0]._pairs[1], ctx) for ctx in contexts}) == len(contexts)


def test_C7_threshold_of_one(four: Adversary) -> None:
    ctx = four.play(four.begin(1))
    four.propose(0, ctx, 1, (0, 1, 3))
    effects = four.release(0, ctx, 1, (0, 1, 3), four.acks(ctx, 1, (0, 1, 3), (0, 3)))
    assert is_refused(effects)
    assert is_refused(four.ask_seeds(2, ctx, 1, (0, 1, 3), four.acks(ctx, 1, (0, 1, 3), (3,))))


def test_C7_two_active_sets_of_one_round_share_the_colluder() -> None:
    adversary = Adversary(6, 1)  # t = 4 of 6; a threshold taken from sets of 4 would be 3, with two sums
    one = adversary.play(adversary.begin(1, (0, 1, 2, 5)), [0, 1, 2, 5])
    other = adversary.play(adversary.begin(1, (2, 3, 4, 5)), [3, 4, 5])
    for i in (0, 1, 2):
        adversary.release(i, one, 0, (0, 1, 2, 5))
    acks = adversary.agree(other, 1, (3, 4, 5))
    for i in (3, 4):
        adversary.release(i, other, 1, (3, 4, 5), acks)
    assert adversary.learns_at_most_one_sum(one, other) == [frozenset({0, 1, 2})]


def test_C7_quorum_is_counted_from_the_active_set() -> None:
    adversary = Adversary(7, 1)  # t = 5 of 7; counted from an active set of 6 it would be 4
    ctx = adversary.play(adversary.begin(1, (0, 1, 2, 3, 4, 6)))
    some = (0, 1, 2, 3, 6)
    for i in (0, 1, 2):
        adversary.propose(i, ctx, 1, some)
    acks = adversary.acks(ctx, 1, some, (0, 1, 2, 6))
    assert len(acks) == 4
    assert is_refused(adversary.release(0, ctx, 1, some, acks))
    assert is_refused(adversary.ask_seeds(4, ctx, 1, some, acks))


def test_C7_survivors_are_counted_from_the_active_set() -> None:
    adversary = Adversary(7, 1)  # u = 5; from an active set of 6 it would be max(4, 6 - 2)
    ctx = adversary.play(adversary.begin(1, (0, 1, 2, 3, 4, 6)))
    for i in (0, 1, 2):
        assert is_refused(adversary.propose(i, ctx, 1, (0, 1, 2, 6)))


def test_C8_tiny_duplicated_or_foreign_active_sets() -> None:
    adversary = Adversary(6, 1, min_active=5)
    for active in ((0, 1, 2, 3), (0, 5), (0, 0, 1, 2, 3, 4), (1, 0, 2, 3, 4), (1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 9)):
        adversary.members[0] = adversary.restart(0)
        assert is_refused(adversary.tell(0, adversary.begin(1, active))[-1:]), active
        assert adversary.members[0].last_round == 0


def test_C9_round_is_replayed_with_another_task(four: Adversary) -> None:
    first = four.play(four.begin(1, step=0), [0])
    assert is_refused(four.tell(0, four.begin(1, step=1)))
    four.members[0] = four.restart(0)
    assert is_refused(four.tell(0, four.begin(1, step=1)))
    assert [ctx for ctx, i in four.inputs if i == 0] == [first]


def test_C9_round_a_site_gave_seeds_for_is_started_at_it_after_all(four: Adversary) -> None:
    start = four.begin(1)
    ctx = four.play(start, [0, 1, 3])
    acks = four.agree(ctx, 1, (0, 1, 3))
    assert said(four.ask_seeds(2, ctx, 1, (0, 1, 3), acks, start=start), PairSeeds)
    assert is_refused(four.tell(2, four.begin(1, step=2)))
    four.members[2] = four.restart(2)
    assert is_refused(four.tell(2, four.begin(1, step=3)))
    assert four.members[2].last_round == 1


def test_C10_late_input_of_a_site_said_to_be_absent(four: Adversary) -> None:
    ctx = four.play(four.begin(1))  # site 2's input did arrive; the aggregator says it did not
    acks = four.agree(ctx, 1, (0, 1, 3))
    for i in (0, 1):
        assert said(four.release(i, ctx, 1, (0, 1, 3), acks), UnmaskShares)
    late = np.array(four.inputs[ctx, 2].y)
    masks.add_streams(late, [four.pair_seed(ctx, 2, j) or b"" for j in (0, 1)], [four.pair_seed(ctx, 2, 3) or b""])
    truth = four.put_in(ctx, 2)
    assert not np.array_equal(late, truth)
    for guess in (bytes(32), shamir.b32(1)):  # nor with a self-mask that is the same every time
        stripped = late.copy()
        masks.add_streams(stripped, [], [keys.self_key(guess, ctx)])
        assert not np.array_equal(stripped, truth)
    assert four.learns_at_most_one_sum(ctx) == [frozenset({0, 1})]


# ---- survivors ------------------------------------------------------------------------------------------------------


def quorums(adversary: Adversary, ctx: bytes) -> dict[str, tuple[Ack, ...]]:
    """Acknowledgement lists that are no quorum of t on ({0, 1, 2, 3}, v = 1) of five sites with t = 4."""
    good = adversary.acks(ctx, 1, (0, 1, 2, 4), (0, 1, 4))
    other = adversary.acks(ctx, 2, (0, 1, 2, 4), (4,))
    return {
        "too few": good,
        "duplicated": (*good, good[0]),
        "forged": (*good, Ack(2, bytes(64))),
        "another site's signature": (*good, Ack(2, good[0].signature)),
        "of another set": (*good, Ack(2, other[0].signature)),
        "of a site outside the set": (*good, Ack(3, adversary.signs[3](keys.ack_bytes(digest(adversary, ctx))))),
    }


def digest(adversary: Adversary, ctx: bytes) -> bytes:
    return keys.survivors_digest(ctx, 1, (0, 1, 2, 4), adversary.salts(ctx, (0, 1, 2, 4)))


@pytest.mark.parametrize(
    "case",
    ["too few", "duplicated", "forged", "another site's signature", "of another set", "of a site outside the set"],
)
def test_C11_quorum_of_forged_replayed_duplicated_or_foreign_acks(case: str) -> None:
    adversary = Adversary(5, 1)
    ctx = adversary.play(adversary.begin(1))
    for i in (0, 1):
        adversary.propose(i, ctx, 1, (0, 1, 2, 4))
    acks = quorums(adversary, ctx)[case]
    assert is_refused(adversary.release(0, ctx, 1, (0, 1, 2, 4), acks))
    assert is_refused(adversary.ask_seeds(3, ctx, 1, (0, 1, 2, 4), acks))


def test_C11_quorum_on_a_set_the_site_has_left_behind() -> None:
    adversary = Adversary(7, 1)  # t = 5, u = 5
    ctx = adversary.play(adversary.begin(1))
    first, second = (0, 1, 2, 3, 4, 6), (0, 1, 2, 3, 6)
    before = adversary.agree(ctx, 1, first)
    adversary.propose(0, ctx, 2, second)
    assert is_refused(adversary.release(0, ctx, 1, first, before))


def test_C12_bouncing_between_two_sets_until_one_input_stands_alone(four: Adversary) -> None:
    ctx = four.play(four.begin(1))
    first = four.agree(ctx, 1, (0, 1, 3))
    second = four.agree(ctx, 2, (0, 2, 3))  # site 0 is asked to bounce
    four.release(0, ctx, 2, (0, 2, 3), second)
    four.release(1, ctx, 1, (0, 1, 3), first)
    four.ask_seeds(2, ctx, 1, (0, 1, 3), first)
    four.release(0, ctx, 1, (0, 1, 3), first)
    assert four.learns_at_most_one_sum(ctx) in ([], [frozenset({0, 1})])


def test_C12_same_view_is_signed_for_two_sets() -> None:
    adversary = Adversary(7, 1)
    ctx = adversary.play(adversary.begin(1))
    assert said(adversary.propose(0, ctx, 3, (0, 1, 2, 3, 4, 6)), SurvivorAck)
    for version in (0, 2, 3):
        assert is_refused(adversary.propose(0, ctx, version, (0, 1, 2, 3, 6)))
    for survivors in ((0, 1, 2, 3, 4, 6), (0, 1, 2, 3, 5, 6)):
        assert is_refused(adversary.propose(0, ctx, 4, survivors))


def test_C13_full_sum_is_released_and_then_a_site_is_excluded(four: Adversary) -> None:
    ctx = four.play(four.begin(1))
    for i in (0, 1):
        assert said(four.release(i, ctx, 0, ALL), UnmaskShares)
    acks = four.agree(ctx, 1, (0, 1, 3))
    four.ask_seeds(2, ctx, 1, (0, 1, 3), acks)
    assert four.learns_at_most_one_sum(ctx) == [frozenset({0, 1, 2})]


def test_C13_cancelled_round_is_acknowledged_and_opened(four: Adversary) -> None:
    ctx = four.play(four.begin(1))
    assert len(four.cancelled(ctx, (0, 1, 2))) == 3
    acks = four.agree(ctx, 1, (0, 1, 3))
    for i in (0, 1):
        four.release(i, ctx, 1, (0, 1, 3), acks)
    assert four.learns_at_most_one_sum(ctx) == []


def test_C14_site_is_excluded_and_then_its_self_mask_is_opened(four: Adversary) -> None:
    ctx = four.play(four.begin(1))
    acks = four.agree(ctx, 1, (0, 1, 3))
    assert said(four.ask_seeds(2, ctx, 1, (0, 1, 3), acks), PairSeeds)
    for i in (0, 1):
        assert is_refused(four.release(i, ctx, 0, ALL))
    assert four.learns_at_most_one_sum(ctx) == []


def test_C15_share_of_a_self_mask_and_a_seed_of_the_same_site(four: Adversary) -> None:
    ctx = four.play(four.begin(1))
    acks = four.agree(ctx, 1, (0, 1, 3))
    given = said(four.ask_seeds(2, ctx, 1, (0, 1, 3), acks), PairSeeds)
    shares = said(four.release(2, ctx, 0, ALL), UnmaskShares)
    assert given is not None
    assert shares is None, (
        f"site 2 gave a seed and a share of sites {sorted(set(given.pair_seeds) & set(shares.shares))}"
    )


def test_C15_seeds_are_asked_under_a_second_set() -> None:
    adversary = Adversary(7, 1)
    ctx = adversary.play(adversary.begin(1))
    first, second = (0, 1, 2, 3, 4, 6), (0, 1, 2, 3, 6)
    before = adversary.agree(ctx, 1, first)
    after = adversary.agree(ctx, 2, second)
    assert said(adversary.ask_seeds(5, ctx, 1, first, before), PairSeeds)
    assert is_refused(adversary.ask_seeds(5, ctx, 2, second, after))
    assert said(adversary.ask_seeds(5, ctx, 1, first, before, wanted=(2,)), PairSeeds)  # the same d again


def test_C16_other_salt_in_the_place_of_the_sites_own(four: Adversary) -> None:
    ctx = four.play(four.begin(1))
    wrong = tuple(bytes(16) if j == 0 else four.inputs[ctx, j].salt for j in (0, 1, 3))
    assert is_refused(four.tell(0, SurvivorProposal(ctx, 1, (0, 1, 3), wrong)))
    boxes = {j: four.inputs[ctx, j].seals[0] for j in ALL}
    wrong = tuple(bytes(16) if j == 0 else four.inputs[ctx, j].salt for j in ALL)
    effects = four.tell(0, UnmaskRequest(ctx, 0, ALL, wrong, boxes))
    assert said(effects, UnmaskShares) is None


def test_C16_two_boxes_of_a_restored_site_open_for_one_set(four: Adversary) -> None:
    before = len(four.journals[1])
    start = four.begin(1)
    ctx = four.play(start)
    first = four.inputs[ctx, 1]
    four.roll_back(1, before)
    four.tell(1, start)
    second = four.inputs[ctx, 1]
    assert second.salt != first.salt
    salts = tuple(first.salt if j == 1 else four.inputs[ctx, j].salt for j in ALL)
    boxes = {j: four.inputs[ctx, j].seals[0] for j in ALL}  # site 1's second box under its first salt
    assert four.members[0].handle(UnmaskRequest(ctx, 0, ALL, salts, boxes)) == [Send(Refusal(1))]


def test_C16_boxes_are_redirected_or_swapped(four: Adversary) -> None:
    ctx = four.play(four.begin(1))
    for boxes in (
        {j: four.inputs[ctx, j].seals[1 if j == 2 else 0] for j in ALL},  # sealed to site 1
        {j: four.inputs[ctx, {1: 2, 2: 1}.get(j, j)].seals[0] for j in ALL},  # senders swapped
    ):
        effects = four.tell(0, UnmaskRequest(ctx, 0, ALL, four.salts(ctx, ALL), boxes))
        refusal = said(effects, Refusal)
        assert refusal is not None
        assert refusal.box_failed in (1, 2)


def restored(four: Adversary) -> tuple[bytes, MaskedInput, MaskedInput]:
    """A round in which site 1's disk was restored: its context, and site 1's two inputs, the second one being current."""
    before = len(four.journals[1])
    start = four.begin(1)
    ctx = four.play(start)
    first = four.inputs[ctx, 1]
    four.roll_back(1, before)
    four.tell(1, start)
    return ctx, first, four.inputs[ctx, 1]


def opening(four: Adversary, ctx: bytes, to: int, word: MaskedInput) -> UnmaskRequest:
    """The request for the whole sum in which site 1 stands with `word`."""
    of = {j: word if j == 1 else four.inputs[ctx, j] for j in ALL}
    return UnmaskRequest(ctx, 0, ALL, tuple(m.salt for m in of.values()), {j: m.seals[to] for j, m in of.items()})


def test_C16_shares_of_both_self_masks_of_a_restored_site(four: Adversary) -> None:
    ctx, first, second = restored(four)
    assert said(four.tell(0, opening(four, ctx, 0, first)), UnmaskShares)
    assert is_refused(four.tell(0, opening(four, ctx, 0, second)))


def test_C16_restored_site_opens_its_own_first_box(four: Adversary) -> None:
    ctx, first, second = restored(four)
    assert is_refused(four.tell(1, opening(four, ctx, 1, first)))
    assert said(four.tell(1, opening(four, ctx, 1, second)), UnmaskShares)


def test_C16_own_box_is_reflected_as_the_receivers(four: Adversary) -> None:
    ctx = four.play(four.begin(1))
    mine = four.inputs[ctx, 0]
    salts = tuple(four.inputs[ctx, 0 if j == 2 else j].salt for j in ALL)
    boxes = {**{j: four.inputs[ctx, j].seals[0] for j in ALL}, 2: mine.seals[2]}
    assert four.members[0].handle(UnmaskRequest(ctx, 0, ALL, salts, boxes)) == [Send(Refusal(2))]


def test_C16_site_that_is_no_survivor_is_asked_for_shares(four: Adversary) -> None:
    ctx = four.play(four.begin(1))
    acks = four.agree(ctx, 1, (0, 1, 3))
    assert is_refused(four.release(2, ctx, 1, (0, 1, 3), acks))
    assert four.members[2].state == "MASKED"


def test_C17_sum_below_the_calibration_of_the_noise() -> None:
    adversary = Adversary(7, 1, absent=1)  # t = 5, but u = 6: the noise counts on five honest shares
    ctx = adversary.play(adversary.begin(1))
    small = (0, 1, 2, 3, 6)
    for i in (0, 1, 2, 3):
        assert is_refused(adversary.propose(i, ctx, 1, small))
    # even had enough sites fallen for it, an honest one outside gives no seeds for so small a set
    statement = keys.ack_bytes(keys.survivors_digest(ctx, 1, small, adversary.salts(ctx, small)))
    acks = tuple(Ack(i, adversary.signs[i](statement)) for i in small)
    assert is_refused(adversary.ask_seeds(4, ctx, 1, small, acks))
    assert adversary.learns_at_most_one_sum(ctx) == []


def test_C18_box_is_tampered_with(four: Adversary) -> None:
    ctx = four.play(four.begin(1))
    boxes = {j: four.inputs[ctx, j].seals[0] for j in ALL}
    for at in (0, 31, 47):
        spoiled = bytearray(boxes[1])
        spoiled[at] ^= 1
        request = UnmaskRequest(ctx, 0, ALL, four.salts(ctx, ALL), {**boxes, 1: bytes(spoiled)})
        assert four.members[0].handle(request) == [Send(Refusal(1))]
    assert four.members[0].state == "MASKED"


def test_C18_colluder_seals_a_share_that_is_not_canonical(four: Adversary) -> None:
    ctx = four.play(four.begin(1))
    mine = four.inputs[ctx, 3]
    same = shamir.P + 5  # 5, written a second way
    box = keys.seal(four.members[3]._pairs[0], 3, 0, ctx, mine.salt, same.to_bytes(32, "little"))
    boxes = {**{j: four.inputs[ctx, j].seals[0] for j in ALL}, 3: box}
    assert four.members[0].handle(UnmaskRequest(ctx, 0, ALL, four.salts(ctx, ALL), boxes)) == [Send(Refusal(3))]


# ---- what may be asked, and how often -------------------------------------------------------------------------------


def test_C20_same_statistic_over_two_sets() -> None:
    adversary = Adversary(5, 1)
    whole = adversary.play(adversary.begin(1, step=0))
    for i in range(4):
        adversary.release(i, whole, 0, range(5))
    without = adversary.begin(2, (0, 1, 2, 4), step=0)
    for i in (0, 1, 2):
        assert is_refused(adversary.tell(i, without))
    assert is_refused(adversary.tell(0, adversary.begin(3, step=0)))


def test_C20_uncharged_retry() -> None:
    adversary = Adversary(5, 1)
    adversary.rules[0].admission = Admission(charges=2, exact=False)
    assert said(adversary.tell(0, adversary.begin(1, step=0)), MaskedInput)
    assert said(adversary.tell(0, adversary.begin(2, step=0, attempt=1)), MaskedInput)
    assert is_refused(adversary.tell(0, adversary.begin(3, step=0, attempt=2)))
    adversary.members[0] = adversary.restart(0)
    assert is_refused(adversary.tell(0, adversary.begin(4, step=1)))


def one_charge(adversary: Adversary) -> tuple[bytes, tuple[CancelAck, ...]]:
    """A first attempt of step 0 at all of five sites that have one charge, and everybody's cancel of it."""
    for rules in adversary.rules:
        rules.admission = Admission(charges=1, exact=False)
    ctx = adversary.play(adversary.begin(1, step=0))
    return ctx, adversary.cancelled(ctx, range(5))


def test_C20_cancels_of_attempt_1_are_replayed_for_attempt_3() -> None:
    adversary = Adversary(5, 1)
    first, cancels = one_charge(adversary)
    second = adversary.play(adversary.begin(2, step=0, attempt=1, cancels={first: cancels}))
    assert (second, 0) in adversary.inputs  # covered: the one charge pays for both
    for i in range(4):
        adversary.release(i, second, 0, range(5))
    assert adversary.learns_at_most_one_sum(second)
    assert is_refused(adversary.tell(0, adversary.begin(3, step=0, attempt=2, cancels={first: cancels})))


def test_C20_too_few_forged_or_repeated_cancels_cover_a_retry() -> None:
    adversary = Adversary(5, 1)  # n' - t' + c + 1 = 3
    first, cancels = one_charge(adversary)
    forged = CancelAck(2, first, cancels[0].signature)
    for shown in ((), cancels[:2], (*cancels[:2], cancels[0]), (*cancels[:2], forged)):
        assert is_refused(adversary.tell(0, adversary.begin(2, step=0, attempt=1, cancels={first: shown})))
    assert said(adversary.tell(0, adversary.begin(3, step=0, attempt=1, cancels={first: cancels[:3]})), MaskedInput)


def test_C20_cancel_of_a_site_outside_that_context() -> None:
    adversary = Adversary(6, 1)  # t = 4; the first attempt has 5 active sites: 5 - 4 + 1 + 1 = 3 cancels
    for rules in adversary.rules:
        rules.admission = Admission(charges=1, exact=False)
    first = adversary.play(adversary.begin(1, (0, 1, 2, 3, 5), step=0))
    cancels = adversary.cancelled(first, (0, 1))
    outside = CancelAck(4, first, adversary.signs[4](keys.cancel_bytes(first)))
    start = adversary.begin(2, step=0, attempt=1, cancels={first: (*cancels, outside)})
    assert is_refused(adversary.tell(0, start))


@pytest.fixture
def opened_once() -> tuple[Adversary, bytes, tuple[Ack, ...]]:
    """Round 1 with site 2 said to be absent; nobody asked it for seeds yet."""
    adversary = Adversary(4, 1)
    ctx = adversary.play(adversary.begin(1))
    return adversary, ctx, adversary.agree(ctx, 1, (0, 1, 3))


def test_C22_seeds_without_a_quorum(opened_once: tuple[Adversary, bytes, tuple[Ack, ...]]) -> None:
    adversary, ctx, acks = opened_once
    for few in ((), acks[:2], (acks[0], acks[0], acks[1])):
        assert is_refused(adversary.ask_seeds(2, ctx, 1, (0, 1, 3), few))


def test_C22_seeds_of_a_site_that_is_itself_a_survivor(
    opened_once: tuple[Adversary, bytes, tuple[Ack, ...]],
) -> None:
    adversary, ctx, acks = opened_once
    assert is_refused(adversary.ask_seeds(0, ctx, 1, (0, 1, 3), acks))
    assert is_refused(adversary.ask_seeds(0, ctx, 1, (0, 1, 3), acks, wanted=(1,)))


def test_C22_seeds_with_sites_that_are_absent_too() -> None:
    adversary = Adversary(7, 1)
    start = adversary.begin(1)
    ctx = adversary.play(start, (0, 1, 2, 3, 6))  # 4 and 5 come back later
    acks = adversary.agree(ctx, 1, (0, 1, 2, 3, 6))
    for wanted in ((5,), (0, 5)):
        assert is_refused(adversary.ask_seeds(4, ctx, 1, (0, 1, 2, 3, 6), acks, wanted=wanted, start=start))


def test_C22_seeds_of_a_past_round_with_the_start_of_a_new_one(
    opened_once: tuple[Adversary, bytes, tuple[Ack, ...]],
) -> None:
    adversary, ctx, acks = opened_once
    adversary.play(adversary.begin(2), [2])
    effects = adversary.ask_seeds(2, ctx, 1, (0, 1, 3), acks, start=adversary.begin(3))
    assert said(effects, PairSeeds) is None
    assert is_refused(adversary.ask_seeds(2, ctx, 1, (0, 1, 3), acks))


def test_C22_seeds_of_a_cancelled_round_while_a_person_looks_at_the_next(
    opened_once: tuple[Adversary, bytes, tuple[Ack, ...]],
) -> None:
    adversary, ctx, acks = opened_once
    assert said(adversary.tell(2, RoundCancel(ctx)), CancelAck)
    assert is_refused(adversary.ask_seeds(2, ctx, 1, (0, 1, 3), acks))
    adversary.rules[2].admission = Admission(100, False, needs_hold=True, hold_until_unix=9)
    adversary.tell(2, adversary.begin(2))
    assert adversary.members[2].state == "HELD"
    assert is_refused(adversary.ask_seeds(2, ctx, 1, (0, 1, 3), acks))


def test_C24_round_of_a_thousand_million_words(four: Adversary) -> None:
    tracemalloc.start()
    try:
        for length in (10**9, 2**28 + 1, 0):
            assert is_refused(four.members[0].handle(replace(four.begin(1), length=length))[-1:])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def exact(adversary: Adversary) -> Adversary:
    for rules in adversary.rules:
        rules.admission = Admission(charges=100, exact=True)
    return adversary


def test_C27_exact_sums_over_all_sites_and_over_all_but_one() -> None:
    adversary = exact(Adversary(5, 1, absent=0))
    assert is_refused(adversary.tell(0, adversary.begin(1, (0, 1, 2, 4)))[-1:])
    adversary.play(adversary.begin(2))
    for number, active in ((3, (0, 1, 2, 4)), (4, (0, 1, 3, 4))):
        assert is_refused(adversary.tell(0, adversary.begin(number, active)))


def test_C27_exact_sum_of_whoever_is_left() -> None:
    adversary = exact(Adversary(5, 1, absent=1))
    assert is_refused(adversary.tell(0, adversary.begin(1))[-1:])


def test_C27_exact_step_twice_at_two_models() -> None:
    adversary = exact(Adversary(5, 1, absent=0))
    ctx = adversary.play(adversary.begin(1, step=0))
    assert is_refused(adversary.tell(0, adversary.begin(2, step=0, attempt=1, broadcast=b"bisect")))
    cancels = adversary.cancelled(ctx, range(5))
    retry = adversary.begin(3, step=0, attempt=1, cancels={ctx: cancels})
    assert said(adversary.tell(0, retry), MaskedInput)  # with the cancels it never opens twice


def test_C27_exact_step_is_never_retried_in_strict_mode() -> None:
    adversary = exact(Adversary(5, 1, mode="strict"))
    ctx = adversary.play(adversary.begin(1, step=0))
    forged = tuple(CancelAck(i, ctx, adversary.signs[i](keys.cancel_bytes(ctx))) for i in range(5))
    assert is_refused(adversary.tell(0, adversary.begin(2, step=0, attempt=1, cancels={ctx: forged})))


# ---- everything at once ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "c"), [(4, 1), (5, 1), (5, 2), (7, 2)])
def test_every_split_of_the_honest_sites_opens_the_whole_or_a_part_and_never_both(n: int, c: int) -> None:
    outcomes = set()
    for released in range(n - c + 1):
        for excluded in combinations(range(n - c), 1):
            adversary = Adversary(n, c, seed=released)
            ctx = adversary.play(adversary.begin(1))
            everybody = tuple(range(n))
            part = tuple(i for i in everybody if i not in excluded)
            full_first = [i for i in adversary.honest if i not in excluded][:released]
            for i in full_first:
                adversary.release(i, ctx, 0, everybody)
            acks = adversary.agree(ctx, 1, part)
            for i in adversary.honest:
                adversary.release(i, ctx, 1, part, acks)
                adversary.ask_seeds(i, ctx, 1, part, acks)
                adversary.release(i, ctx, 0, everybody)
            outcomes |= {len(some) for some in adversary.learns_at_most_one_sum(ctx)}
    assert outcomes == ({n - c, n - c - 1} if n - 1 >= (n + c) // 2 + 1 else {n - c})


def test_a_threshold_one_lower_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "threshold", lambda n, c: (n + c) // 2)
    adversary = Adversary(5, 1, absent=2)  # t is 3 now: two honest sites release the whole, two agree without them
    ctx = adversary.play(adversary.begin(1))
    for i in (0, 1):
        adversary.release(i, ctx, 0, range(5))
    acks = adversary.agree(ctx, 1, (2, 3, 4))
    for i in (2, 3):
        adversary.release(i, ctx, 1, (2, 3, 4), acks)
    adversary.t = 3
    with pytest.raises(AssertionError, match="the adversary reads the sum"):
        adversary.learns_at_most_one_sum(ctx)
