"""What one bad, broken or restored site can do to the sum and to itself; checks of the aggregator, the codec, the disk.

Each test performs the attack of one row of section 9 and is named after it; `tests/mutate.py` deletes the check and
the test of that row has to fail.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from attacks.adversary import LENGTH, Adversary, ledger_head, said, task
from contracts import exact_study, study
from sequester.client.gate.contribution import noise_share
from sequester.client.gate.journal import Journal
from sequester.protocols import exchange_pb2 as pb
from sequester.protocols import privacy
from sequester.protocols.analyses.registry import analysis_of
from sequester.protocols.errors import PeerError, PrivacyError, SiteError, StudyError
from sequester.protocols.packets import packed
from sequester.protocols.quantise import Codec, RingVector
from sequester.protocols.secagg import keys
from sequester.protocols.secagg.aggregator import Aggregator
from sequester.protocols.secagg.aggregator_state import Open
from sequester.protocols.secagg.member import Member
from sequester.protocols.secagg.messages import (
    Abandoned,
    Contribute,
    Effect,
    MaskedInput,
    MaskedVector,
    Message,
    Outcome,
    Persist,
    Ratification,
    RoundStart,
    Send,
    StoreOutbox,
    UnmaskShares,
)
from sequester.protocols.session import Mode
from sequester.protocols.wire import Limits, Reader, frames

SIGNED = pb.Ack(index=1, signature=bytes(64))
ADVERTISED = pb.KeyAdvertisement(
    index=1, session_id=bytes(32), kx=bytes(32), data_set="main", head=bytes(32), signature=bytes(64)
)
Spoil = Callable[[int, Message], list[tuple[int, Message]]]


def run(n: int, spoil: Spoil, mode: Mode = "double") -> tuple[Adversary, Outcome | Abandoned]:
    """One round of the product's aggregator over honest sites, whose every word `spoil` may replace or repeat."""
    sites = Adversary(n, 1, mode=mode)
    aggregator = Aggregator(sites.params, 1.0)
    for adv in sites.advs:
        aggregator.handle(adv.index, adv)
    for ratification in sites.ratifications:
        aggregator.handle(ratification.index, ratification)
    everybody = tuple(range(n))
    queue = list(aggregator.start_round(1, everybody, LENGTH, LENGTH, task(1), b"model"))
    while queue:
        effect = queue.pop(0)
        if isinstance(effect, Outcome | Abandoned):
            return sites, effect
        if isinstance(effect, Send):
            for answer in sites.tell(effect.to, effect.message):
                if isinstance(answer, Send):
                    for sender, message in spoil(effect.to, answer.message):
                        queue += aggregator.handle(sender, message)
    raise AssertionError("the round has no end")


def exact_or_nothing(sites: Adversary, end: Outcome | Abandoned) -> None:
    """Correctness, section 1: the exact sum over U, or the round is abandoned."""
    if isinstance(end, Outcome):
        truth = np.sum([sites.put_in(end.ctx, i) for i in end.survivors], axis=0, dtype=np.uint32)
        np.testing.assert_array_equal(end.total, truth)


def test_an_honest_round_has_the_exact_sum() -> None:
    sites, end = run(4, lambda i, message: [(i, message)])
    assert isinstance(end, Outcome)
    exact_or_nothing(sites, end)


def setting_up(sites: Adversary) -> tuple[Aggregator, list[bytes]]:
    """The product's aggregator, with a key of every site and no ratification; its journal."""
    aggregator, journal = Aggregator(sites.params, 1.0), []
    for adv in sites.advs:
        journal += [e.record for e in aggregator.handle(adv.index, adv) if isinstance(e, Persist)]
    assert aggregator.state == "RATIFYING"
    return aggregator, journal


def signed_again(sites: Adversary, r: Ratification, **changed: object) -> Ratification:
    """A ratification changed by the site whose it is."""
    made = replace(r, **changed)  # type: ignore[arg-type]
    return replace(
        made, signature=sites.signs[r.index](keys.ratification_bytes(r.session_id, r.roster_hash, made.seen))
    )


def test_site_that_ratifies_what_a_peer_never_signed_ends_the_set_up_with_its_own_name() -> None:
    sites = Adversary(4, 1)
    mine = sites.ratifications[2]
    invented = replace(sites.advs[0], counter=99)  # site 0 never signed that
    other = replace(sites.advs[0], data_set="other", counter=99, signature=b"")  # nor joined with that
    other = replace(other, signature=sites.signs[0](keys.advertisement_bytes(other)))
    for named, behind in ((bytes(32), ()), (keys.seen_hash(invented), (invented,)), (keys.seen_hash(other), (other,))):
        aggregator, _ = setting_up(sites)
        for r in sites.ratifications[:2]:
            aggregator.handle(r.index, r)
        bad = signed_again(sites, mine, seen=(named, *mine.seen[1:]), seen_advertisements=behind)
        (end,) = [e for e in aggregator.handle(2, bad) if isinstance(e, Abandoned)]
        assert end.suspects == (2,) and end.session_over and "site 2 ratified" in end.reason, end
        assert aggregator.state == "FAILED"


def test_what_a_site_ratifies_reaches_its_peer_though_the_exchange_forgot_it_and_both_were_restarted() -> None:
    sites = Adversary(4, 1, joined=False)
    sites.advertise()
    earlier = replace(sites.advs[0], counter=0, head=ledger_head(0), signature=b"")
    earlier = replace(earlier, signature=sites.signs[0](keys.advertisement_bytes(earlier)))
    sites.rules[2].seen[sites.params.roster[0], earlier.data_set] = earlier
    sites.ratify()
    assert Send(sites.ratifications[2]) in sites.restart(2).resume()
    assert sites.ratifications[2].seen_advertisements == (earlier,)
    aggregator, journal = setting_up(sites)
    for r in sites.ratifications:
        journal += [e.record for e in aggregator.handle(r.index, r) if isinstance(e, Persist)]
    assert aggregator.state == "READY"
    for machine in (aggregator, Aggregator.restore(journal, sites.params, 1.0)):
        start = machine.start_round(1, (0, 1, 2, 3), LENGTH, LENGTH, task(1), b"model")
        (to_zero,) = [e.message for e in start if isinstance(e, Send) and e.to == 0]
        assert isinstance(to_zero, RoundStart)
        assert to_zero.ratifications[2].seen_advertisements == (earlier,)
        assert all(r.seen_advertisements == () for r in to_zero.ratifications if r.index != 2)


@pytest.mark.parametrize("n", [3, 4, 5])
def test_C19_bad_share_never_corrupts_the_sum_in_silence(n: int) -> None:
    def spoil(i: int, message: Message) -> list[tuple[int, Message]]:
        if i == 0 and isinstance(message, UnmaskShares):
            message = replace(message, shares=dict.fromkeys(message.shares, bytes(32)))
        return [(i, message)]

    sites, end = run(n, spoil)
    exact_or_nothing(sites, end)
    # of three every quorum holds the bad share; of more there is one without it
    assert isinstance(end, Abandoned if n == 3 else Outcome)


def test_a_site_that_repeats_its_shares_without_end_has_the_exchange_try_to_open_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = []
    opens = Aggregator._open_seeds

    def counted(self: Aggregator, r: Open) -> dict[int, bytes] | None:
        tried.append(r)
        return opens(self, r)

    monkeypatch.setattr(Aggregator, "_open_seeds", counted)

    def spoil(i: int, message: Message) -> list[tuple[int, Message]]:
        if isinstance(message, UnmaskShares) and i == 3:
            return [(i, replace(message, shares=dict.fromkeys(message.shares, bytes(32))))] * 50
        return [(i, message)]

    sites, end = run(6, spoil)  # t = 4: with the fourth, which is bad, nothing opens; with the fifth it does
    exact_or_nothing(sites, end)
    assert isinstance(end, Outcome) and len(tried) == 2


def test_C21_value_that_no_integer_holds() -> None:
    codec = Codec(32, 16)
    for bad in (np.nan, np.inf, -np.inf, 1e300, 2.0**37, -(2.0**37)):
        with pytest.raises(SiteError):
            codec.encode(np.array([0.5, bad]))
    assert codec.encode(np.array([2.0**36])).tolist() == [2**52]


def test_C21_vector_of_another_shape_or_word_than_the_round_asked_for() -> None:
    adversary = Adversary(4, 1)
    for vector in (np.zeros(LENGTH + 1, np.uint32), np.zeros(LENGTH, np.uint64), np.zeros((LENGTH, 1), np.uint32)):
        member = adversary.restart(0)
        member.handle(adversary.begin(1))
        with pytest.raises(ValueError, match="not what the round asked for"):
            member.contribute(RingVector(vector))


def test_C21_sum_that_overflows_its_ring_is_no_plan() -> None:
    roomy = exact_study()  # 64 bits
    asked = roomy.aggregation.model_copy(update={"ring_bits": 32, "fraction_bits": 16})
    narrow = roomy.model_copy(update={"aggregation": asked})
    privacy.check_headroom(roomy)
    with pytest.raises(StudyError, match="in words of 32 bits"):
        privacy.check_headroom(narrow)
    for of, is_kept in ((roomy, True), (narrow, False)):  # the sum that n_max patients of the largest kind make
        codec, plan = privacy.codec(of), of.analyses[0]
        largest = np.rint(np.array([of.n_max * analysis_of(plan).sensitivity(plan, of)]))
        words = codec.to_ring((largest * 2.0**codec.fraction_bits).astype(np.int64))
        assert (codec.decode(codec.from_sum(words, 1)) == largest) == is_kept


def test_C21_head_room_is_for_the_noise_too() -> None:
    fits = study()
    plan, n = fits.analyses[0], len(fits.sites)
    of = privacy.layout(fits, plan, 0)
    top = 2.0 ** (privacy.codec(fits).lane_bits - 1)
    most = int((top - n) // privacy.clip_int(fits, plan, of))  # patients that fit where nobody adds noise
    privacy.check_headroom(fits)
    with pytest.raises(StudyError, match="sums may reach"):
        privacy.check_headroom(fits.model_copy(update={"n_max": most}))


def test_C7_noise_is_thinned_by_a_round_of_too_few_honest_shares() -> None:
    signed = study()
    counted_on = privacy.noise_adders(signed)
    assert noise_share(signed, signed.analyses[0], 0, counted_on) is not None
    with pytest.raises(PrivacyError, match="honest noise shares"):
        noise_share(signed, signed.analyses[0], 0, counted_on - 1)


def test_C23_site_speaks_in_the_name_of_another() -> None:
    def spoil(i: int, message: Message) -> list[tuple[int, Message]]:
        return [(2 if isinstance(message, MaskedInput) and i == 1 else i, message)]

    with pytest.raises(PeerError, match="site 2 sent an input of site 1"):
        run(4, spoil)


@pytest.mark.parametrize("mode", ["strict", "double"])
@pytest.mark.parametrize("more", [0, 1], ids=["the same", "another"])
def test_C23_input_is_counted_twice_or_takes_the_firsts_place(mode: Mode, more: int) -> None:
    def spoil(i: int, message: Message) -> list[tuple[int, Message]]:
        if not isinstance(message, MaskedInput):
            return [(i, message)]
        return [(i, message), (i, replace(message, y=MaskedVector(message.y + np.uint32(more))))]

    sites, end = run(4, spoil, mode)
    assert isinstance(end, Outcome)
    exact_or_nothing(sites, end)


@pytest.mark.parametrize("words", [0, 1, LENGTH - 1, LENGTH + 1, 1000])
def test_C24_vector_of_another_length(words: int) -> None:
    def spoil(i: int, message: Message) -> list[tuple[int, Message]]:
        if isinstance(message, MaskedInput) and i == 1:
            message = replace(message, y=MaskedVector(np.zeros(words, np.uint32)))
        return [(i, message)]

    with pytest.raises(PeerError, match="words of"):
        run(4, spoil)


def test_C24_words_of_another_ring() -> None:
    def spoil(i: int, message: Message) -> list[tuple[int, Message]]:
        if isinstance(message, MaskedInput) and i == 1:
            message = replace(message, y=MaskedVector(message.y.astype(np.uint64)))
        return [(i, message)]

    with pytest.raises(PeerError, match="words of"):
        run(4, spoil)


def test_C24_payload_of_a_thousand_million_words_costs_no_memory() -> None:
    header = pb.MaskedInput(ctx=bytes(32), signature=bytes(64), payload_bytes=4 * 10**9)
    tracemalloc.start()
    try:
        with pytest.raises(PeerError, match="are allowed"):
            Reader(Limits(payload_bytes=1 << 20, ring_bits=32)).take(pb.Frame(masked_input=header))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("spoiled", "said"),
    [
        (pb.Frame(refusal=pb.Refusal(box_failed=10**9, has_box_failed=True)), "site index"),
        (pb.Frame(survivor_proposal=pb.SurvivorProposal(ctx=bytes(32), version=1, survivors=[0, 2, 1])), "ascending"),
        (pb.Frame(survivor_proposal=pb.SurvivorProposal(ctx=bytes(32), version=1, survivors=[0, 0])), "ascending"),
        (pb.Frame(unmask_request=pb.UnmaskRequest(ctx=bytes(32), acks=[SIGNED, SIGNED])), "stands twice"),
        (pb.Frame(unmask_request=pb.UnmaskRequest(ctx=bytes(32), acks=[SIGNED] * 1025)), "1025 entries"),
        (pb.Frame(roster=pb.Roster(advertisements=[ADVERTISED] * 1025)), "too many sites"),
    ],
    ids=["index", "order", "repeated", "map key twice", "map", "roster"],
)
def test_C24_sets_and_maps_without_bounds(spoiled: pb.Frame, said: str) -> None:
    with pytest.raises(PeerError, match=said):
        Reader(Limits(1 << 20, 32)).take(spoiled)


# ---- two ciphertexts under one key stream ---------------------------------------------------------------------------


OTHER = np.arange(LENGTH, dtype=np.uint32)  # another vector than the first: what a rerun on changed data would give


def vectors(member: Member, effects: Sequence[Effect]) -> list[MaskedVector]:
    """Every masked vector among the effects; a member that asks for a contribution gets another one than before."""
    found: list[MaskedVector] = []
    for effect in effects:
        if isinstance(effect, Send) and isinstance(effect.message, MaskedInput):
            found.append(effect.message.y)
        if isinstance(effect, Contribute):
            found += vectors(member, member.contribute(RingVector(OTHER.copy())))
    return found


@pytest.mark.parametrize("mode", ["strict", "double"])
def test_C25_second_vector_is_masked_with_the_same_key_streams(mode: Mode) -> None:
    adversary = Adversary(4, 1, mode=mode)
    start = adversary.begin(1)
    ctx = adversary.play(start, [0])
    first = adversary.inputs[ctx, 0].y
    assert adversary.members[0].contribute(RingVector(OTHER.copy())) == []
    entered = next(i for i, record in enumerate(adversary.journals[0]) if b'"kind":"round"' in record)
    sent_again = 0
    for cut in range(entered + 1, len(adversary.journals[0]) + 1):  # a crash at any moment after the round was entered
        back = Member.restore(
            adversary.journals[0][:cut], adversary.outboxes[0], adversary.params, 0, adversary.signs[0],
            adversary.rules[0], adversary.entropy,
        )  # fmt: skip
        words = vectors(back, back.resume()) + vectors(back, back.handle(start))
        words += vectors(back, back.contribute(RingVector(OTHER.copy())))
        assert all(np.array_equal(y, first) for y in words)
        sent_again += len(words)
    assert sent_again > 0


def test_C25_crash_between_the_records_and_the_vector_makes_the_site_absent() -> None:
    adversary = Adversary(4, 1, mode="strict")
    start = adversary.begin(1)
    adversary.play(start, [0])
    back = Member.restore(
        adversary.journals[0][:-1], None, adversary.params, 0, adversary.signs[0], adversary.rules[0], adversary.entropy
    )
    assert back.last_round == 1
    assert vectors(back, back.resume()) == vectors(back, back.handle(start)) == []
    assert back.contribute(RingVector(OTHER.copy())) == []


def test_C25_bytes_are_stored_before_they_are_sent_and_sent_again_as_they_were() -> None:
    adversary = Adversary(4, 1)
    start = adversary.begin(1)
    adversary.members[0].handle(start)
    effects = adversary.members[0].contribute(RingVector(OTHER.copy()))
    assert [type(effect) for effect in effects] == [StoreOutbox, Persist, Send]
    adversary.play(start, [1])
    (sent,) = [m for i, m in adversary.words if isinstance(m, MaskedInput)]
    again = said(adversary.restart(1).resume(), MaskedInput)
    assert again is not None
    assert [packed(f) for f in frames(again)] == [packed(f) for f in frames(sent)]


def test_C25_stream_that_breaks_at_the_first_word_after_a_crash_does_not_skip_the_record_of_the_vector() -> None:
    adversary = Adversary(4, 1)
    adversary.play(adversary.begin(1), [0])
    assert b'"kind":"input"' in adversary.journals[0].pop()  # the process died before it, with the vector stored
    back = adversary.restart(0)
    first = back.resume()  # the stream breaks at the first word of it: what stands after that word is not done
    assert [type(effect) for effect in first] == [Persist, Send, Send]
    assert [type(effect) for effect in back.resume()] == [Send, Send]


OPEN = """
import sys
from pathlib import Path
from sequester.client.gate.journal import Journal
from sequester.protocols.wire import Limits
Journal(Path(sys.argv[1]), bytes(32), Limits(1 << 20, 32)).append(b"a second gate's record")
"""


def test_C25_two_gate_processes_on_one_journal(tmp_path: Path) -> None:
    folder, limits = tmp_path / "study" / "0", Limits(1 << 20, 32)
    next_epoch = tmp_path / "study" / "1"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def other(where: Path = folder) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", OPEN, str(where)]
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=180, check=False)

    first = Journal(folder, bytes(32), limits)
    with pytest.raises(SiteError, match="in use by another gate"):
        Journal(folder, bytes(32), limits)
    for where in (folder, next_epoch):  # the lock is the study's: a new epoch would be a second process for one site
        assert "in use by another gate" in other(where).stderr
    assert first.records() == []
    first.close()
    assert other().returncode == 0
    after = Journal(folder, bytes(32), limits)
    assert after.records() == [b"a second gate's record"]
    after.close()
