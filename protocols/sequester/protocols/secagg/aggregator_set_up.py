"""The exchange's set-up: advertisements, roster, ratifications, and closing advertisements (section 4)."""

from __future__ import annotations

from dataclasses import replace

from sequester.protocols.errors import PeerError
from sequester.protocols.secagg import keys
from sequester.protocols.secagg.aggregator_state import AggregatorState, framed
from sequester.protocols.secagg.messages import (
    Effect,
    KeyAdvertisement,
    Persist,
    Ratification,
    Roster,
    RoundStart,
    Send,
)
from sequester.protocols.secagg.records import adv_json

MAX_CLOSINGS = 4


class Gathering(AggregatorState):
    """From KEYS to READY."""

    def _advertised(self, sender: int, adv: KeyAdvertisement) -> list[Effect]:
        if self._is_of_an_earlier_epoch(sender, adv):
            return []
        if adv.index != sender or adv.session_id != self.session_id:
            raise PeerError(f"site {sender} advertised for {adv.index} or another session")
        if not keys.is_signed(self.params.roster[sender], adv.signature, keys.advertisement_bytes(adv)):
            raise PeerError(f"the advertisement of site {sender} is not signed by it")
        if self.state != "KEYS" or sender in self._advs:
            return self._closing(sender, adv)
        self._advs[sender] = adv
        self._known_advs[keys.seen_hash(adv)] = adv
        record = Persist(framed("adv", adv_json(adv)))
        if len(self._advs) < len(self.params.roster):
            return [record]
        self.state = "RATIFYING"
        roster = self._roster_message()
        return [record, *(Send(roster, i) for i in range(len(self.params.roster))), self._clock()]

    def _is_of_an_earlier_epoch(self, sender: int, message: KeyAdvertisement | Ratification) -> bool:
        """True for the last word of a site that has not heard of this epoch yet, said again on its new stream."""
        return message.session_id != self.session_id and self.state == "KEYS" and sender not in self._advs

    def _closing(self, sender: int, adv: KeyAdvertisement) -> list[Effect]:
        """A site's ledger has grown since set-up: its peers keep the newest head it signed."""
        held = self._advs.get(sender)
        if held is None or (adv.kx, adv.data_set) != (held.kx, held.data_set) or adv.counter <= held.counter:
            return []
        if adv.counter <= self._closed.get(sender, (0, 0))[0] or self._closed.get(sender, (0, 0))[1] >= MAX_CLOSINGS:
            return []  # each costs every peer a write: a site closes once, or once more after a crash
        self._closed[sender] = (adv.counter, self._closed.get(sender, (0, 0))[1] + 1)
        self._known_advs[keys.seen_hash(adv)] = adv
        return [Send(adv, i) for i in range(len(self.params.roster)) if i != sender]

    def _roster_message(self) -> Roster:
        return Roster(tuple(self._advs[i] for i in sorted(self._advs)))

    def _ratified(self, sender: int, ratification: Ratification) -> list[Effect]:
        if self._is_of_an_earlier_epoch(sender, ratification):
            return []
        roster = keys.roster_hash(self.session_id, [self._advs[i].kx for i in sorted(self._advs)])
        statement = keys.ratification_bytes(ratification.session_id, ratification.roster_hash, ratification.seen)
        if (
            ratification.index != sender
            or ratification.roster_hash != roster
            or len(ratification.seen) != len(self.params.roster)
            or not keys.is_signed(self.params.roster[sender], ratification.signature, statement)
        ):
            raise PeerError(f"the ratification of site {sender} is not its own for this roster")
        if self.state != "RATIFYING" or sender in self._ratifications:
            return []
        behind = {keys.seen_hash(a): a for a in ratification.seen_advertisements}
        for j, named in enumerate(ratification.seen):
            if not self._is_founded(j, named, behind.get(named, self._known_advs.get(named))):
                # forwarded, it would have site j refuse the set-up, and nobody could say through whose fault
                return self._fail(f"site {sender} ratified an advertisement that site {j} never signed", (sender,))
        named_advs = tuple(behind[named] for named in ratification.seen if named in behind)
        self.knows(named_advs)
        ratification = replace(ratification, seen_advertisements=named_advs)
        self._ratifications[sender] = ratification
        row = {
            "index": sender, "seen": [s.hex() for s in ratification.seen], "signature": ratification.signature.hex(),
            "behind": list(map(adv_json, ratification.seen_advertisements)),
        }  # fmt: skip
        if len(self._ratifications) == len(self.params.roster):
            self.state = "READY"
            self._token += 1
        return [Persist(framed("ratification", row))]

    def _is_founded(self, j: int, named: bytes, adv: KeyAdvertisement | None) -> bool:
        """True where `named` is empty, or names an advertisement of site j, of the data set that it joined with."""
        if not named or (j, named) in self._founded:
            return True
        if adv is None or adv.data_set != self._advs[j].data_set:
            return False
        if not keys.is_signed(self.params.roster[j], adv.signature, keys.advertisement_bytes(adv)):
            return False
        self._founded.add((j, named))
        return True

    def _start_for(self, index: int) -> RoundStart:
        """The round's start; with the ratifications, and the site's own advertisements behind them, until it is ready."""
        assert self._round is not None
        start = self._round.start
        if index in self._readied:
            return start
        attached = []
        for r in self._ratifications.values():
            own = self._known_advs.get(r.seen[index])
            attached.append(replace(r, seen_advertisements=(own,) if own is not None else ()))
        return replace(start, ratifications=tuple(attached))
