"""One tree of errors; the branch says whose fault it is.

    SequesterError
    +-- StudyError       the study: its text, its signature, what it asks for          exit 10
    +-- SiteError        this site: its files, settings, clock, disk, network          exit 20
    +-- PeerError        the other side broke the protocol                             exit 30
    +-- PrivacyError     the budget or a guarantee says no                             exit 40
    +-- RoundAbandoned   nobody's fault: too few sites; try again                      exit 50

Every error says what was found and what was expected (`message`) and what to do (`hint`). None ever carries a
person's data: counts, positions in a file and variant names only. The command line prints `error:` and `hint:`.
"""

from __future__ import annotations

from enum import StrEnum


class RefusalCode(StrEnum):
    """The closed list of reasons a site says aloud about a study (spec/secure-aggregation.md, section 5).

    Anything that depends on patients is NOT_READY, without a reason.
    """

    VERSION = "VERSION"
    STUDY = "STUDY"
    PARAMS = "PARAMS"
    EPOCH = "EPOCH"
    ROSTER = "ROSTER"
    UNPINNED = "UNPINNED"
    POLICY = "POLICY"
    BUDGET = "BUDGET"
    EXPIRED = "EXPIRED"
    NOT_READY = "NOT_READY"


class SequesterError(Exception):
    """Root of the tree. `code` is what may be said to the other side; the message stays on this machine."""

    exit_status = 1

    def __init__(self, message: str, *, hint: str = "", code: RefusalCode | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code


class StudyError(SequesterError):
    """The study is at fault."""

    exit_status = 10


class SiteError(SequesterError):
    """This site's files or settings are at fault."""

    exit_status = 20


class PeerError(SequesterError):
    """The other side broke the protocol."""

    exit_status = 30


class PrivacyError(SequesterError):
    """The budget or a guarantee says no."""

    exit_status = 40


class RoundAbandoned(SequesterError):
    """Nobody's fault: fewer sites than the study's floor delivered."""

    exit_status = 50
