"""What a site gives so that a sum opens: acknowledgements, shares, seeds, cancels (section 5; C11 to C18, C22)."""

from __future__ import annotations

from collections.abc import Sequence

from cryptography.exceptions import InvalidTag

from sequester.protocols import session
from sequester.protocols.errors import PeerError, SequesterError
from sequester.protocols.secagg import keys, shamir
from sequester.protocols.secagg.member_rounds import Rounds
from sequester.protocols.secagg.member_state import BoxFailed, Round
from sequester.protocols.secagg.messages import (
    Ack,
    CancelAck,
    Effect,
    PairSeeds,
    Persist,
    Refusal,
    RoundCancel,
    SeedRequest,
    Send,
    SurvivorAck,
    SurvivorProposal,
    UnmaskRequest,
    UnmaskShares,
)
from sequester.protocols.secagg.records import as_record, task_json

SERVES_SEEDS = frozenset({"COMPUTING", "MASKED", "ACKED", "RELEASED"})  # of the round this site is in


class Opening(Rounds):
    """From MASKED to RELEASED or CANCELLED."""

    def _check_double(self) -> None:
        if self._params.mode == "strict":
            raise PeerError("strict mode has one trip and no recovery")

    def _acknowledge(self, message: SurvivorProposal) -> list[Effect]:
        self._check_double()
        r, survivors = self._current, message.survivors
        if self.state in ("RELEASED", "CANCELLED"):  # C13
            raise PeerError("no acknowledgement after a release or a cancel")
        if message.ctx != r.ctx:
            raise PeerError("survivors of another round")
        if message.version <= r.version or (r.survivors and not set(survivors) < set(r.survivors)):  # C12
            raise PeerError("survivor sets only shrink, versions only grow")
        self._check_survivors(survivors, message.salts)
        if not set(survivors) < set(r.active) or self._index not in survivors:
            raise PeerError("the survivors are not a proper part of the active set with me in it")
        if message.salts[survivors.index(self._index)] != r.salt:  # C16
            raise PeerError("the salt named for me is not mine")
        r.version, r.survivors = message.version, survivors
        r.digest = keys.survivors_digest(r.ctx, message.version, survivors, message.salts)
        self.state = "ACKED"
        record = {"version": r.version, "survivors": list(survivors), "digest": r.digest.hex()}
        return [Persist(as_record("acked", record)), Send(self._ack())]

    def _ack(self) -> SurvivorAck:
        """The acknowledgement of the last set, the same bytes each time."""
        r = self._current
        return SurvivorAck(self._index, r.version, r.digest, self._sign(keys.ack_bytes(r.digest)))

    def _check_survivors(self, survivors: Sequence[int], salts: Sequence[bytes]) -> None:
        if list(survivors) != sorted(set(survivors)) or len(salts) != len(survivors):
            raise PeerError("the survivor set is malformed")
        if len(survivors) < self._current.floor:  # C17
            raise PeerError(f"{len(survivors)} survivors, at least {self._current.floor} are needed")

    def _check_quorum(self, digest: bytes, survivors: Sequence[int], acks: Sequence[Ack]) -> None:
        statement = keys.ack_bytes(digest)
        valid = {
            ack.index
            for ack in acks
            if ack.index in survivors and keys.is_signed(self._params.roster[ack.index], ack.signature, statement)
        }
        t = session.threshold(len(self._params.roster), self._params.max_corrupt)  # C7
        if len(valid) < t:  # C11
            raise PeerError(f"{len(valid)} valid acknowledgements, {t} are needed")

    def _unmask(self, message: UnmaskRequest) -> list[Effect]:
        self._check_double()
        r, survivors = self._current, message.survivors
        if message.ctx != r.ctx:
            raise PeerError("an opening of another round")
        self._check_survivors(survivors, message.salts)
        digest = keys.survivors_digest(r.ctx, message.version, survivors, message.salts)
        if r.released and r.released != digest:  # C15
            raise PeerError("another set was released in this round")
        if message.version == 0:
            if r.version > 0:  # C14
                raise PeerError("no full release after an acknowledgement")
            if survivors != r.active:
                raise PeerError("version 0 opens the whole active set")
        else:
            if digest != r.digest:  # C11
                raise PeerError("not the set I acknowledged last")
            self._check_quorum(digest, survivors, message.acks)
        if self._index not in survivors or message.salts[survivors.index(self._index)] != r.salt:  # C16
            raise PeerError("the salt named for me is not mine")
        shares = {j: self._open_box(j, message, salt) for j, salt in zip(survivors, message.salts, strict=True)}
        absent = [j for j in r.active if j not in survivors]
        seeds = {j: keys.mask_key(self._pairs[j], r.ctx) for j in absent}
        answer = UnmaskShares(self._index, r.ctx, message.version, shares, seeds)
        return self._release(digest, answer)

    def _open_box(self, sender: int, message: UnmaskRequest, salt: bytes) -> bytes:
        try:
            box = message.seals[sender]
            share = keys.unseal(self._pairs[sender], sender, self._index, self._current.ctx, salt, box)  # C18
            shamir.element(share)  # C18: canonical
        except (KeyError, InvalidTag, ValueError):
            raise BoxFailed(sender) from None
        return share

    def _seeds(self, message: SeedRequest) -> list[Effect]:
        self._check_double()
        effects: list[Effect] = []
        entered = self._round is not None and message.ctx == self._round.ctx
        if not entered:
            start = message.round_start
            if start is None:
                raise PeerError("seeds of a round this site has not seen, without its start")
            effects = self._make_ready(start)
            if self.state == "HALTED":
                return effects
        try:
            digest, target = self._check_seeds(message)
        except SequesterError as error:
            # the ratifications held, so READY stands; the request itself is refused
            self.last_refusal = error
            return [*effects, Send(Refusal())]
        if not entered:
            self._round = target
            self._outbox = self._held = self._awaited = None
            self.last_round = target.number  # C9
            target.released = digest
            self.state = "RELEASED"
            # one record: a round this site never masked is either unknown to it or released, nothing between
            record = {
                "round": target.number, "ctx": target.ctx.hex(), "active": list(target.active), "length": target.length,
                "task": task_json(target.task), "digest": digest.hex(),
            }  # fmt: skip
            effects.append(Persist(as_record("missed", record)))
        seeds = {j: keys.mask_key(self._pairs[j], message.ctx) for j in message.wanted}
        return [*effects, *self._release(digest, PairSeeds(self._index, message.ctx, seeds))]

    def _check_seeds(self, message: SeedRequest) -> tuple[bytes, Round]:
        """The digest the request opens and the round it is of, this site's own or one it missed."""
        if self._round is not None and message.ctx == self._round.ctx:
            if self.state not in SERVES_SEEDS:  # C22: cancelled, or given up for a later round
                raise PeerError("seeds of a round that is over here")
            target = self._round
        else:
            start = message.round_start
            assert start is not None
            self._check_start(start)
            ctx = keys.context(self._roster_hash, start.round, start.active, start.length, start.task)
            if message.ctx != ctx:  # C22
                raise PeerError("the seeds asked are not of the round that came with the request")
            floor = session.floor(self._params, len(start.active))
            target = Round(start.round, ctx, start.active, start.length, floor, start.task)
        if list(message.survivors) != sorted(set(message.survivors)) or not set(message.survivors) < set(target.active):
            raise PeerError("the survivor set is malformed")
        if len(message.survivors) < target.floor:  # C17
            raise PeerError(f"{len(message.survivors)} survivors, at least {target.floor} are needed")
        if self._index in message.survivors or not set(message.wanted) <= set(message.survivors):  # C22
            raise PeerError("seeds are given by an absent site, for survivors only")
        digest = keys.survivors_digest(message.ctx, message.version, message.survivors, message.salts)
        if target.released and target.released != digest:  # C15
            raise PeerError("another set was released in this round")
        self._check_quorum(digest, message.survivors, message.acks)  # C22
        return digest, target

    def _release(self, digest: bytes, answer: UnmaskShares | PairSeeds) -> list[Effect]:
        r = self._current
        if r.released == digest:
            return [Send(answer)]
        r.released = digest
        self._awaited = None
        self.state = "RELEASED"
        return [Persist(as_record("released", {"digest": digest.hex()})), Send(answer)]

    def _cancel(self, message: RoundCancel) -> list[Effect]:
        self._check_double()
        r = self._current
        if message.ctx != r.ctx:
            raise PeerError("a cancel of another round")
        ack = CancelAck(self._index, r.ctx, self._sign(keys.cancel_bytes(r.ctx)))
        if self.state == "CANCELLED":
            return [Send(ack)]
        self.state = "CANCELLED"
        self._awaited = None
        return [Persist(as_record("cancelled", {"ctx": r.ctx.hex()})), Send(ack)]
