"""A site's set-up: proposal, roster, ratifications, and what peers witnessed of its ledger (section 4; C1 to C5, C26 to C29)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from sequester.protocols.errors import PeerError, RefusalCode, StudyError
from sequester.protocols.secagg import keys
from sequester.protocols.secagg.member_state import MemberState
from sequester.protocols.secagg.messages import (
    Effect,
    KeyAdvertisement,
    Persist,
    Ratification,
    Roster,
    RoundStart,
    Send,
    SessionProposal,
)
from sequester.protocols.secagg.records import adv_json, as_record


class SetUp(MemberState):
    """From IDLE to READY."""

    def _proposal(self, message: SessionProposal) -> list[Effect]:
        asked, signed = message.params, self._params
        if replace(asked, epoch=signed.epoch) != signed:  # C4
            raise PeerError("the session's parameters are not the signed study's", code=RefusalCode.PARAMS)
        if asked.epoch <= self._rules.epoch_floor():  # C3
            raise PeerError(f"epoch {asked.epoch} was used before", code=RefusalCode.EPOCH)
        own = asked.roster[self._index]
        unpinned = [key for key in asked.roster if key != own and key not in self._rules.pinned]
        if len(unpinned) > asked.max_corrupt:  # C26
            raise StudyError(
                f"{len(unpinned)} hospitals of the roster are not pinned, the study tolerates {asked.max_corrupt} colluders",
                hint="compare fingerprints with the hospitals and pin them: `sequester-client peers`",
                code=RefusalCode.UNPINNED,
            )
        data_set, counter, head = self._rules.reserve(asked)
        self._params = asked
        self._kx = X25519PrivateKey.from_private_bytes(self._entropy(32))
        unsigned = KeyAdvertisement(
            self._index, self.session_id, self._kx.public_key().public_bytes_raw(), data_set, counter, head, b""
        )
        self._adv = replace(unsigned, signature=self._sign(keys.advertisement_bytes(unsigned)))
        self.state = "ADVERTISED"
        record = {"epoch": asked.epoch, "kx": self._kx.private_bytes_raw().hex(), "adv": adv_json(self._adv)}
        return [Persist(as_record("params", record)), Send(self._adv)]

    def _roster(self, message: Roster) -> list[Effect]:
        assert self._kx is not None
        advs = message.advertisements
        if len(advs) != len(self._params.roster) or [a.index for a in advs] != list(range(len(advs))):
            raise PeerError("the roster is not N advertisements in order", code=RefusalCode.ROSTER)
        for adv, key in zip(advs, self._params.roster, strict=True):
            if adv.session_id != self.session_id or not keys.is_signed(
                key, adv.signature, keys.advertisement_bytes(adv)
            ):  # C1
                raise PeerError(f"advertisement {adv.index} is not signed by its site", code=RefusalCode.ROSTER)
        if len({adv.kx for adv in advs}) != len(advs) or advs[self._index] != self._adv:  # C5
            raise PeerError("exchange keys repeat, or mine was changed", code=RefusalCode.ROSTER)
        roster = keys.roster_hash(self.session_id, [adv.kx for adv in advs])
        pairs = keys.pair_keys(self._kx, self._index, [adv.kx for adv in advs], roster)
        seen, behind = [], []
        for adv, key in zip(advs, self._params.roster, strict=True):
            # before the new one is kept: a ledger that was put back and has grown again since would pass for the newest
            highest = self._rules.highest_seen(key, adv.data_set)
            seen.append(keys.seen_hash(highest) if highest is not None else b"")
            behind += [highest] if highest is not None else []
            self._rules.saw(key, adv)
        self._roster_hash, self._pairs, self._seen, self._behind = roster, pairs, tuple(seen), tuple(behind)
        self.state = "RATIFIED"
        record = {
            "kx": [adv.kx.hex() for adv in advs], "seen": [s.hex() for s in seen], "behind": list(map(adv_json, behind)),
        }  # fmt: skip
        return [Persist(as_record("roster", record)), Send(self._ratification())]

    def _ratification(self) -> Ratification:
        statement = keys.ratification_bytes(self.session_id, self._roster_hash, self._seen)
        return Ratification(
            self._index, self.session_id, self._roster_hash, self._seen, self._sign(statement), self._behind
        )

    def _make_ready(self, start: RoundStart) -> list[Effect]:
        """The N ratifications, once; the effects that make READY durable."""
        if start.session_id != self.session_id:
            raise PeerError("a round of another session")
        if self._ready:
            return []
        halted = self._check_ratifications(start.ratifications)
        if halted:
            return halted
        self._ready = True
        self.state = "READY"
        return [Persist(as_record("ready", {}))]

    def _check_ratifications(self, ratifications: Sequence[Ratification]) -> list[Effect]:
        """Nothing where all N agree; the effects of HALTED on equivocation or a rolled-back ledger; else refuse."""
        if sorted(r.index for r in ratifications) != list(range(len(self._params.roster))):  # C29
            raise PeerError("the first round comes without the N ratifications")
        for r in ratifications:
            key = self._params.roster[r.index]
            if not keys.is_signed(key, r.signature, keys.ratification_bytes(r.session_id, r.roster_hash, r.seen)):
                raise PeerError(f"ratification {r.index} is not signed by its site")
            if r.session_id != self.session_id:  # C29: another session's proves nothing
                raise PeerError(f"ratification {r.index} is of another session")
            if r.roster_hash != self._roster_hash:  # C2
                return self._halt(
                    "two rosters were ratified in one session", {"index": r.index, "hash": r.roster_hash.hex()}
                )
            if len(r.seen) != len(self._params.roster):
                raise PeerError(f"ratification {r.index} names {len(r.seen)} advertisements")
            halted = self._check_own_past(r)
            if halted:
                return halted
        return []

    def _check_own_past(self, r: Ratification) -> list[Effect]:
        """HALTED where a peer holds my own signature on a ledger I no longer have (C28)."""
        assert self._adv is not None
        named = r.seen[self._index]
        if not named or named == keys.seen_hash(self._adv):
            return []
        adv = next((a for a in r.seen_advertisements if keys.seen_hash(a) == named), None)
        if adv is None:
            raise PeerError(f"ratification {r.index} names an advertisement of mine that did not come with it")
        own = self._params.roster[self._index]
        if not keys.is_signed(own, adv.signature, keys.advertisement_bytes(adv)) or adv.data_set != self._adv.data_set:
            return []
        if self._rules.ledger_head_at(adv.data_set, adv.counter) != adv.head:  # C28
            return self._halt(
                "my own signature stands on a ledger this disk does not have: it was restored or cut",
                {"counter": adv.counter, "head": adv.head.hex()},
            )
        return []

    def _witness(self, adv: KeyAdvertisement) -> list[Effect]:
        """A peer's closing advertisement: the newest head of its ledger that it signed in this session (C28)."""
        n = len(self._params.roster)
        if adv.index == self._index or not 0 <= adv.index < n or adv.session_id != self.session_id:
            raise PeerError("a closing advertisement of another session, or my own")
        key = self._params.roster[adv.index]
        if not keys.is_signed(key, adv.signature, keys.advertisement_bytes(adv)):
            raise PeerError(f"the closing advertisement of site {adv.index} is not signed by it")
        if (
            self._rules.highest_seen(key, adv.data_set) is None
        ):  # one row a data set that joined, however many are named
            raise PeerError(f"the closing advertisement of site {adv.index} names a data set it did not join with")
        self._rules.saw(key, adv)
        return []

    def closing(self, counter: int, head: bytes) -> list[Effect]:
        """When the study is over here: the ledger's head again, so that peers notice a copy from before this study."""
        if self._adv is None:
            return []
        unsigned = replace(self._adv, counter=counter, head=head, signature=b"")
        adv = replace(unsigned, signature=self._sign(keys.advertisement_bytes(unsigned)))
        self._rules.saw(self._params.roster[self._index], adv)
        return [Send(adv)]
