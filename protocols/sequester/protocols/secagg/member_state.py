"""What one site knows in one protocol session, and what it asks its study, policy and disk (`Rules`).

The fields are written by the steps built on this: set-up, rounds, opening. They hold session secrets: a member has no
useful repr and refuses pickling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from sequester.protocols import session
from sequester.protocols.errors import PeerError, SequesterError
from sequester.protocols.secagg import keys
from sequester.protocols.secagg.messages import (
    Contribute,
    Effect,
    Evidence,
    KeyAdvertisement,
    MaskedInput,
    Persist,
    Refusal,
    RoundStart,
    Send,
)
from sequester.protocols.secagg.records import as_record
from sequester.protocols.session import SessionParams, Task


@dataclass(frozen=True, slots=True)
class Admission:
    """The rules' yes to one round: charges T + R of the analysis, and whether a human decides first."""

    charges: int
    exact: bool
    needs_hold: bool = False
    hold_until_unix: int = 0


class Rules(Protocol):
    """Look-ups of study, policy and disk. To refuse, raise a `SequesterError` with a public code."""

    pinned: frozenset[bytes]

    def epoch_floor(self) -> int:
        """The highest epoch journalled for this study, -1 where there is none."""
        ...

    def reserve(self, params: SessionParams) -> tuple[str, int, bytes]:
        """Data set, ledger counter and head, after T + R charges of every analysis are reserved durably."""
        ...

    def ledger_head_at(self, data_set: str, counter: int) -> bytes | None:
        """The head this site's ledger had at `counter`, None beyond its end."""
        ...

    def highest_seen(self, key: bytes, data_set: str) -> KeyAdvertisement | None:
        """The highest advertisement journalled of a peer's data set."""
        ...

    def saw(self, key: bytes, advertisement: KeyAdvertisement) -> None:
        """Journal an advertisement if it is higher than the one held."""
        ...

    def admit(self, start: RoundStart) -> Admission:
        """Whether the signed study and the policy allow this round."""
        ...


@dataclass(slots=True)
class Round:
    """The round this site is in; nothing of it is ever lowered or redrawn."""

    number: int
    ctx: bytes
    active: tuple[int, ...]
    length: int
    floor: int
    task: Task
    salt: bytes = b""
    version: int = 0
    survivors: tuple[int, ...] = ()
    digest: bytes = b""
    released: bytes = b""


class BoxFailed(Exception):
    """A sealed share that does not open: said with the sender's index, it depends on ciphertext only."""

    def __init__(self, sender: int) -> None:
        self.sender = sender


class MemberState:
    """One site in one protocol session: its keys, its round, what it has spent."""

    def __init__(
        self, params: SessionParams, index: int, sign: keys.Sign, rules: Rules, entropy: Callable[[int], bytes]
    ) -> None:
        session.check_params(params)
        self.state = "IDLE"
        self.last_round = 0
        self.last_refusal: SequesterError | None = None
        self._params = params
        self._index = index
        self._sign = sign
        self._rules = rules
        self._entropy = entropy
        self._kx: X25519PrivateKey | None = None
        self._adv: KeyAdvertisement | None = None
        self._roster_hash = b""
        self._pairs: dict[int, bytes] = {}
        self._seen: tuple[bytes, ...] = ()
        self._behind: tuple[KeyAdvertisement, ...] = ()  # the advertisements that `_seen` names
        self._ready = False
        self._round: Round | None = None
        self._held: RoundStart | None = None
        self._held_until, self._holds = 0, 0
        self._awaited: Contribute | None = None
        self._outbox: MaskedInput | None = None
        self._recorded = True  # False where a crash came between the outbox and its record
        self._used: dict[str, int] = {}  # analysis -> charges spent
        self._order: dict[str, int] = {}  # analysis -> its place, by first appearance here: none is gone back to
        self._last_task = (-1, -1, -1)  # (place, step, attempt)
        self._masked: dict[tuple[str, int], list[tuple[bytes, tuple[int, ...]]]] = {}
        self._exact_active: tuple[int, ...] | None = None
        self._last_released: tuple[bytes, bytes] | None = None

    def __repr__(self) -> str:
        return f"Member(index={self._index}, state={self.state}, last_round={self.last_round})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a protocol session cannot be pickled")

    @property
    def session_id(self) -> bytes:
        """The session's name; it binds roster, c, min_active, a, w, mode and suite."""
        return keys.session_id(self._params)

    @property
    def epoch(self) -> int:
        """The session's key epoch; before a proposal was accepted, the lowest there is."""
        return self._params.epoch

    @property
    def _current(self) -> Round:
        assert self._round is not None
        return self._round

    def _halt(self, what: str, proof: dict[str, Any]) -> list[Effect]:
        self.state = "HALTED"
        self.last_refusal = PeerError(what, hint="withdraw; the consortium starts a new key epoch")
        record = as_record("halted", {"what": what, **proof})
        return [Persist(record), Evidence(what, record), Send(Refusal())]
