"""What a site says when its vector fails, and what closing advertisements may cost the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sequester.protocols.secagg import keys
from sequester.protocols.secagg.aggregator import Aggregator
from sequester.protocols.secagg.aggregator_set_up import MAX_CLOSINGS
from sequester.protocols.secagg.messages import Refusal, Resume, Send, SessionProposal, StudyRefusal


def test_a_site_without_a_vector_refuses_once_and_again_after_a_reconnect(make_session: Any) -> None:
    made = make_session(5)
    member = made.members[0]
    start = next(e.message for e in made.aggregator.start_round(1, (0, 1, 2, 3, 4), 3, 3, made.task(1), b"broadcast")
                 if isinstance(e, Send) and e.to == 0)  # fmt: skip
    member.handle(start)
    assert member.give_up() == [Send(Refusal())] and member.give_up() == []
    assert Send(Refusal()) in member.resume()


def test_a_closing_advertisement_of_a_data_set_that_never_joined_is_not_kept(make_session: Any) -> None:
    made = make_session(5)
    before = len(made.rules[1].seen)
    adv = made.members[0]._adv
    assert adv is not None
    for i in range(3):
        forged = replace(adv, data_set=f"other{i}", counter=99, signature=b"")
        forged = replace(forged, signature=made.signs[0](keys.advertisement_bytes(forged)))
        assert isinstance(made.members[1].handle(forged)[0].message, StudyRefusal | Refusal)
    assert len(made.rules[1].seen) == before


def test_a_site_that_closes_for_ever_costs_its_peers_a_few_writes(make_session: Any) -> None:
    made = make_session(5)
    relayed = 0
    for counter in range(100, 150):
        (said,) = made.members[0].closing(counter, bytes(32))
        assert isinstance(said, Send)
        relayed += len(made.aggregator.handle(0, said.message))
    assert relayed == 4 * MAX_CLOSINGS


def test_a_site_of_an_earlier_key_epoch_hears_of_the_new_one(make_session: Any) -> None:
    made = make_session(5)
    member, later = made.members[0], Aggregator(replace(made.params, epoch=1), 1.0)
    later.start()
    old = Resume(member.session_id, member.last_round, member.state)
    assert later.returned(0, old) == [Send(SessionProposal(later.params), 0)]
    assert member._adv is not None and later.handle(0, member._adv) == []  # said again before it heard
    assert later.handle(0, member._ratification()) == []
