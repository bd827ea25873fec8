"""The exchange's state machine: collects masked inputs, agrees on who survived, opens the one sum.

    KEYS -> RATIFYING -> READY -> COLLECTING -> (AGREEING ->) UNMASKING -> READY ... ; FAILED ends the session

The sum is exact over the survivors or the round is abandoned; never a third thing. Masked inputs are ciphertext: they
are kept until the sum is out, because a site may have to be taken back out. A message that breaks the protocol raises
`PeerError` and changes nothing; the driver closes that stream. Section numbers are spec/secure-aggregation.md's.
The steps are in the files of their time: `aggregator_set_up`, `_inputs`, `_opening`, over `_state`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from sequester.protocols.errors import PeerError
from sequester.protocols.secagg import keys
from sequester.protocols.secagg.aggregator_inputs import Collecting
from sequester.protocols.secagg.aggregator_state import Open, framed
from sequester.protocols.secagg.messages import (
    CancelAck,
    Effect,
    Hold,
    KeyAdvertisement,
    MaskedInput,
    Message,
    PairSeeds,
    Persist,
    Ratification,
    Refusal,
    Resume,
    RoundStart,
    Send,
    SessionProposal,
    StudyRefusal,
    SurvivorAck,
    UnmaskShares,
    Withdraw,
)
from sequester.protocols.secagg.records import adv_from_json, task_from_json, task_json
from sequester.protocols.session import SessionParams, Task


class Aggregator(Collecting):
    """One protocol session at the exchange."""

    # ---- entries --------------------------------------------------------------------------------------------------

    def start(self) -> list[Effect]:
        """Proposes the session to every site."""
        everybody = range(len(self.params.roster))
        return [*(Send(SessionProposal(self.params), i) for i in everybody), self._clock()]

    def handle(self, sender: int, message: Message) -> list[Effect]:
        """Effects of one site's message; `PeerError` where it breaks the protocol."""
        match message:
            case KeyAdvertisement():
                return self._advertised(sender, message)
            case Ratification():
                return self._ratified(sender, message)
            case MaskedInput():
                return self._input(sender, message)
            case SurvivorAck():
                return self._ack(sender, message)
            case UnmaskShares():
                return self._shares(sender, message)
            case PairSeeds():
                return self._pair_seeds(sender, message)
            case CancelAck():
                return self._cancelled(sender, message)
            case Refusal():
                return self._refused(sender, message)
            case Hold():
                return self._hold(sender, message)
            case Withdraw():
                return self._left(sender)
            case StudyRefusal():
                return self._fail(f"site {sender} refused the study: {message.code}", (sender,))
            case Resume():
                return self.returned(sender, message)
            case _:
                raise PeerError(f"{type(message).__name__} is not for the aggregator")

    def start_round(
        self, number: int, active: tuple[int, ...], length: int, coordinates: int, task: Task, broadcast: bytes
    ) -> list[Effect]:
        """Opens a round; a round that is still open is given up."""
        if self.state in ("KEYS", "RATIFYING", "FAILED"):
            raise ValueError(f"no round starts in state {self.state}")
        if number <= self.last_round:
            raise ValueError("round numbers only grow")
        if len(active) < max(self.threshold, self.params.min_active):
            return self._fail(f"{len(active)} sites are left, {max(self.threshold, self.params.min_active)} are needed")
        roster = keys.roster_hash(self.session_id, [self._advs[i].kx for i in sorted(self._advs)])
        ctx = keys.context(roster, number, active, length, task)
        step = (task.analysis, task.step)
        cancels = {c: tuple(self._cancels.get(c, {}).values()) for c, _ in self._earlier.get(step, [])}
        start = RoundStart(self.session_id, number, active, length, coordinates, task, broadcast, (), cancels)
        self._round = Open(start, ctx)
        self._earlier.setdefault(step, []).append((ctx, active))
        self.last_round = number
        self.state = "COLLECTING"
        row = {"round": number, "active": list(active), "length": length, "coordinates": coordinates}
        record = framed("round", {**row, "task": task_json(task)}, broadcast)
        return [Persist(record), *(Send(self._start_for(i), i) for i in active), self._clock()]

    def deadline(self, token: int) -> list[Effect]:
        """What a deadline decides; a replaced one decides nothing."""
        if token != self._token:
            return []
        r = self._round
        match self.state:
            case "KEYS":
                missing = tuple(i for i in range(len(self.params.roster)) if i not in self._advs)
                return self._fail(f"no key from sites {list(missing)}", missing)
            case "RATIFYING":
                missing = tuple(i for i in range(len(self.params.roster)) if i not in self._ratifications)
                return self._fail(f"no ratification from sites {list(missing)}", missing)
            case "COLLECTING":
                return self._close()
            case "AGREEING":
                assert r is not None
                return self._agree(tuple(sorted(r.acks)))
            case "UNMASKING":
                assert r is not None
                return self._late_shares(r)
            case _:
                return []

    def returned(self, index: int, resume: Resume | None) -> list[Effect]:
        """A site's stream stands again: what it has to be told. None: it knows of no session."""
        r = self._round
        if resume is None:
            if self.state == "KEYS" and index not in self._advs:
                return [Send(SessionProposal(self.params), index)]
            if index in self._advs:
                return self._fail(f"site {index} lost its journal: a new epoch is needed", (index,))
            return []
        if resume.session_id != self.session_id:
            if self.state == "KEYS" and index not in self._advs:  # of an earlier key epoch: this one is news to it
                return [Send(SessionProposal(self.params), index)]
            raise PeerError(f"site {index} resumes another session")
        if resume.last_round > self.last_round:
            return self._fail(f"site {index} knows round {resume.last_round}, this exchange was restored", ())
        if resume.state not in ("ADVERTISED", "RATIFIED"):
            self._readied.add(index)
        if resume.state == "ADVERTISED" and self.state == "RATIFYING":
            return [Send(self._roster_message(), index)]
        if r is None or index not in r.start.active:
            return []
        if self.state == "COLLECTING" and index not in r.inputs and resume.last_round < r.start.round:
            return [Send(self._start_for(index), index)]
        if self.state == "AGREEING" and index in r.survivors and index not in r.acks:
            return [Send(self._proposal(r), index)]
        if self.state == "UNMASKING":
            if index in r.survivors and index not in r.shares:
                return [Send(self._request(r, index), index)]
            if index not in r.survivors:
                return self._ask_seeds(r, [index], resume.last_round < r.start.round)
        return []

    # ---- restart --------------------------------------------------------------------------------------------------

    @classmethod
    def restore(
        cls, records: Iterable[bytes], params: SessionParams, deadline_s: float, set_up_s: float | None = None
    ) -> Aggregator:
        """The aggregator whose journal this is. An open round is collecting again: sites re-send their stored bytes."""
        machine = cls(params, deadline_s, set_up_s)
        for record in records:
            head, _, payload = record.partition(b"\n")
            machine._replay(json.loads(head), payload)
        return machine

    def again(self) -> list[Effect]:
        """After `restore`: the deadline of whatever is open. Sites are told what they miss as their streams return."""
        return [self._clock()] if self.state in ("KEYS", "RATIFYING", "COLLECTING") else []

    def _replay(self, row: dict[str, Any], payload: bytes) -> None:
        match row["kind"]:
            case "adv":
                adv = adv_from_json(row)
                self._advs[adv.index] = adv
                self._known_advs[keys.seen_hash(adv)] = adv
                if len(self._advs) == len(self.params.roster):
                    self.state = "RATIFYING"
            case "ratification":
                roster = keys.roster_hash(self.session_id, [self._advs[i].kx for i in sorted(self._advs)])
                seen = tuple(bytes.fromhex(s) for s in row["seen"])
                signature = bytes.fromhex(row["signature"])
                behind = tuple(map(adv_from_json, row.get("behind", ())))
                self.knows(behind)
                self._ratifications[row["index"]] = Ratification(
                    row["index"], self.session_id, roster, seen, signature, behind
                )
                if len(self._ratifications) == len(self.params.roster):
                    self.state = "READY"
            case "round":
                self.state = "READY"
                self.start_round(
                    row["round"], tuple(row["active"]), row["length"], row["coordinates"],
                    task_from_json(row["task"]), payload,
                )  # fmt: skip
            case "closed" | "abandoned":
                self._round = None
                self.state = "READY"
            case "failed":
                self.state = "FAILED"
