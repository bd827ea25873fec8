"""The site's state machine: takes one message, returns what to make durable and what to say, or refuses.

Rules of the file (spec/secure-aggregation.md, section 5), each an invariant of the stateful test:
  1. one MaskedInput per round, ever; last_round never falls;
  2. no ack after a release or a cancel;
  3. v strictly grows, U strictly shrinks;
  4. no full-set release after any ack;
  5. at most one released digest per round.

All checks of a message come before any change of state; a failed one leaves the state as it was and says a public code
(before the first round) or one opaque word (in a round). The reason is in `last_refusal`, for the site's own log.
Checks carry their number in section 9 (`# C12`): `tests/mutate.py` deletes each in turn and a named attack must succeed.
What a message asks is in the file of its time: `member_set_up`, `member_rounds`, `member_opening`, over `member_state`.
This object holds session secrets: it has no useful repr and refuses pickling.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from sequester.protocols import session
from sequester.protocols.errors import PeerError, RefusalCode, SequesterError
from sequester.protocols.secagg import keys
from sequester.protocols.secagg.member_opening import Opening
from sequester.protocols.secagg.member_state import Admission, BoxFailed, Round, Rules
from sequester.protocols.secagg.messages import (
    Effect,
    KeyAdvertisement,
    MaskedInput,
    Message,
    Persist,
    Refusal,
    Resume,
    Roster,
    RoundCancel,
    RoundStart,
    SeedRequest,
    Send,
    SessionProposal,
    StudyRefusal,
    SurvivorProposal,
    UnmaskRequest,
    Withdraw,
)
from sequester.protocols.secagg.records import adv_from_json, as_record, input_record, task_from_json
from sequester.protocols.session import SessionParams

# Which states may hear which message; everything else is refused. COMPUTING is MASKED before its vector is out.
HEARS: dict[type[Any], frozenset[str]] = {
    SessionProposal: frozenset({"IDLE"}),
    Roster: frozenset({"ADVERTISED"}),
    RoundStart: frozenset({"RATIFIED", "READY", "HELD", "COMPUTING", "MASKED", "ACKED", "RELEASED", "CANCELLED"}),
    SurvivorProposal: frozenset({"MASKED", "ACKED", "RELEASED", "CANCELLED"}),
    UnmaskRequest: frozenset({"MASKED", "ACKED", "RELEASED"}),
    SeedRequest: frozenset({"RATIFIED", "READY", "HELD", "COMPUTING", "MASKED", "ACKED", "RELEASED"}),
    RoundCancel: frozenset({"COMPUTING", "MASKED", "ACKED", "CANCELLED"}),
    KeyAdvertisement: frozenset(
        {"RATIFIED", "READY", "HELD", "COMPUTING", "MASKED", "ACKED", "RELEASED", "CANCELLED", "HALTED"}
    ),
}
BEFORE_ROUNDS = frozenset({"IDLE", "ADVERTISED"})


class Member(Opening):
    """One site in one protocol session."""

    # ---- the one entry --------------------------------------------------------------------------------------------

    def handle(self, message: Message) -> list[Effect]:
        """Effects of one message; a refused one changes nothing and says so."""
        if self.state == "WITHDRAWN":
            return [Send(Withdraw(self._params.study_digest, self.session_id))]
        before = self.state
        try:
            if self.state not in HEARS.get(type(message), frozenset()):
                raise PeerError(f"{type(message).__name__} in state {self.state}", code=RefusalCode.STUDY)
            return self._dispatch(message)
        except BoxFailed as failed:
            self.last_refusal = PeerError(f"the sealed share of site {failed.sender} does not open")
            return [Send(Refusal(failed.sender))]
        except SequesterError as error:
            self.last_refusal = error
            if before in BEFORE_ROUNDS or (before == "RATIFIED" and not self._ready):
                return [Send(StudyRefusal((error.code or RefusalCode.STUDY).value))]
            return [Send(Refusal())]

    def _dispatch(self, message: Message) -> list[Effect]:
        match message:
            case SessionProposal():
                return self._proposal(message)
            case Roster():
                return self._roster(message)
            case RoundStart():
                return self._start(message)
            case SurvivorProposal():
                return self._acknowledge(message)
            case UnmaskRequest():
                return self._unmask(message)
            case SeedRequest():
                return self._seeds(message)
            case RoundCancel():
                return self._cancel(message)
            case KeyAdvertisement():
                return self._witness(message)
            case _:
                raise PeerError(f"{type(message).__name__} is not for a site")

    # ---- leaving and coming back ----------------------------------------------------------------------------------

    def withdraw(self) -> list[Effect]:
        """Leaves the study for good: keys erased, `Withdraw` is the answer to everything after."""
        if self.state in ("WITHDRAWN", "HALTED"):
            return []
        self.state = "WITHDRAWN"
        self._kx = self._awaited = self._outbox = self._held = None
        self._pairs = {}
        return [
            Persist(as_record("withdrawn", {})),
            Send(Withdraw(self._params.study_digest, self.session_id)),
        ]

    def resume(self) -> list[Effect]:
        """What to say first on every stream: where this site stands, and its last word again, same bytes."""
        effects: list[Effect] = []
        if self.state == "MASKED" and self._outbox is not None and not self._recorded:
            # before the first word: a stream that broke at that word would have the vector go out on the next one unrecorded
            self._recorded = True
            effects.append(Persist(input_record(self._outbox)))
        effects.append(Send(Resume(self.session_id, self.last_round, self.state)))
        if self.state == "ADVERTISED" and self._adv is not None:
            effects.append(Send(self._adv))
        elif self.state == "RATIFIED":
            effects.append(Send(self._ratification()))
        elif self.state == "COMPUTING" and self._awaited is None:
            effects.append(Send(Refusal()))  # the vector died with the process: nobody need wait for it
        elif self.state == "HELD" and self._held is None:
            self.state = "READY"  # the request died with the process; the exchange asks again
        elif self.state == "MASKED" and self._outbox is not None:
            effects.append(Send(self._outbox))  # C25: stored bytes, never recomputed
        elif self.state == "ACKED":
            effects.append(Send(self._ack()))  # the last one again: one that was lost with its stream costs no round
        elif self.state == "WITHDRAWN":
            return [Send(Withdraw(self._params.study_digest, self.session_id))]
        return effects

    @classmethod
    def restore(
        cls,
        records: Iterable[bytes],
        outbox: MaskedInput | None,
        params: SessionParams,
        index: int,
        sign: keys.Sign,
        rules: Rules,
        entropy: Callable[[int], bytes],
    ) -> Member:
        """The member whose journal this is; any prefix of a journal gives a legal state."""
        member = cls(params, index, sign, rules, entropy)
        for record in records:
            member._replay(json.loads(record))
        if member._round is not None and outbox is not None and outbox.ctx == member._round.ctx:
            member._outbox = outbox
            member._round.salt = outbox.salt
            if member.state == "COMPUTING":
                member.state = "MASKED"  # stored before the crash: the same bytes may go out now, after their record
                member._recorded = False
        return member

    def _replay(self, row: dict[str, Any]) -> None:
        match row["kind"]:
            case "params":
                self._params = replace(self._params, epoch=row["epoch"])
                self._kx = X25519PrivateKey.from_private_bytes(bytes.fromhex(row["kx"]))
                self._adv = adv_from_json(row["adv"])
                self.state = "ADVERTISED"
            case "roster":
                assert self._kx is not None
                publics = [bytes.fromhex(k) for k in row["kx"]]
                self._roster_hash = keys.roster_hash(self.session_id, publics)
                self._pairs = keys.pair_keys(self._kx, self._index, publics, self._roster_hash)
                self._seen = tuple(bytes.fromhex(s) for s in row["seen"])
                self._behind = tuple(map(adv_from_json, row.get("behind", ())))
                self.state = "RATIFIED"
            case "ready":
                self._ready = True
                self.state = "READY"
            case "held":
                self.state = "HELD"
                self._holds += 1
            case "unheld":
                self.state = "READY"
            case "round":
                task = task_from_json(row["task"])
                active = tuple(row["active"])
                start = RoundStart(self.session_id, row["round"], active, row["length"], 0, task, b"")
                self._enter(start, Admission(0, row["exact"]), charged=row["charged"])
            case "missed":
                active = tuple(row["active"])
                floor = session.floor(self._params, len(active))
                task = task_from_json(row["task"])
                self._round = Round(row["round"], bytes.fromhex(row["ctx"]), active, row["length"], floor, task)
                self._round.released = bytes.fromhex(row["digest"])
                self.last_round = row["round"]
                self.state = "RELEASED"
            case "input":
                self._current.salt = bytes.fromhex(row["salt"])
                self.state = "MASKED"
            case "acked":
                r = self._current
                r.version, r.survivors = row["version"], tuple(row["survivors"])
                r.digest = bytes.fromhex(row["digest"])
                self.state = "ACKED"
            case "released":
                self._current.released = bytes.fromhex(row["digest"])
                self.state = "RELEASED"
            case "cancelled":
                self.state = "CANCELLED"
            case "withdrawn":
                self.state, self._kx, self._pairs = "WITHDRAWN", None, {}
            case "halted":
                self.state = "HALTED"
