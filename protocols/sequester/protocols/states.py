"""The life of a study as one table: which event leads from which state to which, and whose event it is.

draft -> published -> approved -> running -> done
             |            |          |-> held -> running
             |            |          |-> suspended -> running
             v            v          v
          refused, withdrawn, abandoned, expired, superseded
"""

from __future__ import annotations

from enum import StrEnum

from sequester.protocols.errors import StudyError


class StudyState(StrEnum):
    """Where a study stands."""

    DRAFT = "draft"  # written, not signed
    PUBLISHED = "published"  # signed, offered to its sites
    APPROVED = "approved"  # enough sites said yes
    REFUSED = "refused"  # a site said no, and too few are left
    RUNNING = "running"  # a session stands
    HELD = "held"  # a human holds it: no new round starts
    SUSPENDED = "suspended"  # the exchange or too many sites are away; it may go on
    WITHDRAWN = "withdrawn"  # the coordinator took it back
    DONE = "done"  # results are out
    ABANDONED = "abandoned"  # it cannot go on; the reason is in the status
    EXPIRED = "expired"  # its date has passed
    SUPERSEDED = "superseded"  # an amendment replaced it


S = StudyState
FINAL = frozenset({S.REFUSED, S.WITHDRAWN, S.DONE, S.ABANDONED, S.EXPIRED, S.SUPERSEDED})

# (state, event) -> (state, who)
TRANSITIONS: dict[tuple[StudyState, str], tuple[StudyState, str]] = {
    (S.DRAFT, "publish"): (S.PUBLISHED, "coordinator"),
    (S.PUBLISHED, "enough-approvals"): (S.APPROVED, "sites"),
    (S.PUBLISHED, "too-many-refusals"): (S.REFUSED, "sites"),
    (S.APPROVED, "too-many-refusals"): (S.REFUSED, "sites"),
    (S.APPROVED, "start"): (S.RUNNING, "coordinator"),
    (S.RUNNING, "hold"): (S.HELD, "coordinator"),
    (S.HELD, "release"): (S.RUNNING, "coordinator"),
    (S.RUNNING, "suspend"): (S.SUSPENDED, "exchange"),
    (S.HELD, "suspend"): (S.SUSPENDED, "exchange"),
    (S.SUSPENDED, "resume"): (S.RUNNING, "coordinator"),
    (S.RUNNING, "finish"): (S.DONE, "exchange"),
    **{(s, "abandon"): (S.ABANDONED, "exchange") for s in (S.RUNNING, S.HELD, S.SUSPENDED)},
    **{
        (s, "withdraw"): (S.WITHDRAWN, "coordinator")
        for s in (S.DRAFT, S.PUBLISHED, S.APPROVED, S.RUNNING, S.HELD, S.SUSPENDED)
    },
    **{(s, "expire"): (S.EXPIRED, "clock") for s in S if s not in FINAL},
    **{(s, "supersede"): (S.SUPERSEDED, "coordinator") for s in (S.PUBLISHED, S.APPROVED, S.DONE)},
}


def what_next(state: StudyState) -> str:
    """What the coordinator can do about a study in `state`, by the verbs of `sequester-server study`."""
    if state is StudyState.DONE:
        return "its results are there: `sequester-server study results`; an amendment is a new study"
    if state in FINAL:
        return "it has ended; an amendment is a new study"
    if state is StudyState.PUBLISHED:
        return "its hospitals approve it first: `sequester-server study status` shows who has"
    own = {event for (at, event), (_, who) in TRANSITIONS.items() if at == state and who == "coordinator"}
    verbs = sorted({"resume": "start"}.get(event, event) for event in own - {"supersede"})
    return "what `sequester-server study` can do with it now: " + ", ".join(verbs)


def advance(state: StudyState, event: str) -> StudyState:
    """The next state; `StudyError` names the state where the event does not belong.

    >>> advance(StudyState.RUNNING, "finish")
    <StudyState.DONE: 'done'>
    """
    if (state, event) not in TRANSITIONS:
        raise StudyError(
            f"a study that is {state} cannot `{event}`",
            hint=what_next(state),
        )
    return TRANSITIONS[(state, event)][0]
