"""The life of a study: nothing happens that the table does not say."""

from __future__ import annotations

import pytest

from sequester.protocols.errors import StudyError
from sequester.protocols.states import FINAL, TRANSITIONS, StudyState, advance

EVENTS = sorted({event for _, event in TRANSITIONS})


@pytest.mark.parametrize("state", StudyState)
@pytest.mark.parametrize("event", EVENTS)
def test_every_event_that_is_not_in_the_table_is_refused_by_name(state: StudyState, event: str) -> None:
    if (state, event) in TRANSITIONS:
        assert advance(state, event) == TRANSITIONS[(state, event)][0]
    else:
        with pytest.raises(StudyError) as refused:
            advance(state, event)
        assert state in refused.value.message and event in refused.value.message and refused.value.hint


def test_a_whole_life_ends_as_done() -> None:
    state = StudyState.DRAFT
    for event in ("publish", "enough-approvals", "start", "hold", "release", "suspend", "resume", "finish"):
        state = advance(state, event)
    assert state == StudyState.DONE


def test_what_has_ended_stays_ended_but_results_may_be_superseded() -> None:
    leaving = {(state, event) for state, event in TRANSITIONS if state in FINAL}
    assert leaving == {(StudyState.DONE, "supersede")}


def test_every_state_is_reached_from_draft() -> None:
    reached, before = {StudyState.DRAFT}, set[StudyState]()
    while reached != before:
        before = set(reached)
        reached |= {to for (state, _), (to, _) in TRANSITIONS.items() if state in before}
    assert reached == set(StudyState)


def test_only_the_coordinator_starts_holds_and_withdraws() -> None:
    hers = {"publish", "start", "resume", "hold", "release", "withdraw", "supersede"}
    for (_, event), (_, who) in TRANSITIONS.items():
        assert (who == "coordinator") == (event in hers)
