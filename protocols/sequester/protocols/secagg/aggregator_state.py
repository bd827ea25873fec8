"""What the exchange knows in one protocol session: who advertised and ratified, the open round, how one ends."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sequester.protocols import session
from sequester.protocols.memory import Room
from sequester.protocols.quantise import Words
from sequester.protocols.secagg import keys
from sequester.protocols.secagg.messages import (
    Abandoned,
    Ack,
    CancelAck,
    Deadline,
    Effect,
    KeyAdvertisement,
    MaskedInput,
    Outcome,
    Persist,
    Ratification,
    RoundCancel,
    RoundStart,
    Send,
)
from sequester.protocols.secagg.records import as_record
from sequester.protocols.session import SessionParams, Task


@dataclass(slots=True)
class Open:
    """The open round."""

    start: RoundStart
    ctx: bytes
    inputs: dict[int, MaskedInput] = field(default_factory=dict)
    total: Words | None = None
    version: int = 0
    survivors: tuple[int, ...] = ()
    acks: dict[int, Ack] = field(default_factory=dict)
    shares: dict[int, dict[int, bytes]] = field(default_factory=dict)  # from -> of -> share
    seeds: dict[tuple[int, int], bytes] = field(default_factory=dict)  # (survivor, absent) -> k
    failed_boxes: dict[int, int] = field(default_factory=dict)  # reporter -> sender
    refused: set[int] = field(default_factory=set)
    held: set[int] = field(default_factory=set)
    waited: bool = False

    @property
    def salts(self) -> tuple[bytes, ...]:
        return tuple(self.inputs[j].salt for j in self.survivors)


class AggregatorState:
    """One protocol session at the exchange."""

    def __init__(self, params: SessionParams, deadline_s: float, set_up_s: float | None = None) -> None:
        session.check_params(params)
        self.state = "KEYS"
        self.params = params
        self.last_round = 0
        self.withdrawn: set[int] = set()
        self._deadline_s = deadline_s
        self._set_up_s = deadline_s if set_up_s is None else set_up_s  # hospitals come when they come
        self._token = 0
        self._advs: dict[int, KeyAdvertisement] = {}
        self._ratifications: dict[int, Ratification] = {}
        self._known_advs: dict[bytes, KeyAdvertisement] = {}  # hash -> advertisement, across studies
        self._founded: set[tuple[int, bytes]] = set()  # (site, hash) of what was found to be signed by the site
        self._closed: dict[int, tuple[int, int]] = {}  # site -> (highest closing counter, closings)
        self._readied: set[int] = set()
        self._round: Open | None = None
        self._room = Room()  # of the sum: whoever was given the last one has read it
        self._cancels: dict[bytes, dict[int, CancelAck]] = {}
        self._earlier: dict[tuple[str, int], list[tuple[bytes, tuple[int, ...]]]] = {}

    @property
    def session_id(self) -> bytes:
        """The session's name."""
        return keys.session_id(self.params)

    @property
    def threshold(self) -> int:
        """t, from the roster size."""
        return session.threshold(len(self.params.roster), self.params.max_corrupt)

    @property
    def open_task(self) -> Task | None:
        """The task of the open round, None where none is open."""
        return self._round.start.task if self._round is not None else None

    def attempts(self, analysis: str, step: int) -> int:
        """Rounds of this session that were opened for one step so far."""
        return len(self._earlier.get((analysis, step), ()))

    def knows(self, advertisements: Iterable[KeyAdvertisement]) -> None:
        """Advertisements journalled in earlier studies: what a peer's `seen` may point at."""
        for adv in advertisements:
            self._known_advs[keys.seen_hash(adv)] = adv

    # ---- ends -----------------------------------------------------------------------------------------------------

    def _done(self, r: Open) -> list[Effect]:
        assert r.total is not None
        outcome = Outcome(r.start.round, r.ctx, r.total, r.survivors)
        self._round = None
        self.state = "READY"
        self._token += 1
        return [Persist(framed("closed", {"round": outcome.round})), outcome]

    def _abandon(self, reason: str, suspects: tuple[int, ...]) -> list[Effect]:
        r = self._round
        assert r is not None
        effects: list[Effect] = [Persist(framed("abandoned", {"round": r.start.round}))]
        effects += self.cancel()
        self._round = None
        self.state = "READY"
        self._token += 1
        return [*effects, Abandoned(r.start.round, reason, suspects)]

    def _fail(self, reason: str, suspects: tuple[int, ...] = ()) -> list[Effect]:
        if self.state == "FAILED":
            return []
        self.state = "FAILED"
        self._token += 1
        return [
            Persist(framed("failed", {"reason": reason})),
            Abandoned(self.last_round, reason, suspects, session_over=True),
        ]

    def _clock(self) -> Deadline:
        self._token += 1
        return Deadline(self._token, self._set_up_s if self.state in ("KEYS", "RATIFYING") else self._deadline_s)

    def cancel(self) -> list[Effect]:
        """Asks the active sites never to open the last round, so that a retry costs no new charge (double only)."""
        r = self._round
        if r is None or self.params.mode == "strict":
            return []
        return [Send(RoundCancel(r.ctx), i) for i in r.start.active]


def framed(kind: str, row: dict[str, Any], payload: bytes = b"") -> bytes:
    """A record and, on the lines after it, bytes as they are."""
    return as_record(kind, row) + b"\n" + payload
