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


def advance(state: StudyState, event: str) -> StudyState:
    """The next state; `StudyError` names the state where the event does not belong.

    >>> advance(StudyState.RUNNING, "finish")
    <StudyState.DONE: 'done'>
    """
    if (state, event) not in TRANSITIONS:
        raise StudyError(
            f"a study that is {state} cannot `{event}`",
            hint="it may: "
            + (", ".join(sorted(e for s, e in TRANSITIONS if s == state)) or "nothing more, it has ended"),
        )
    return TRANSITIONS[(state, event)][0]
