"""Who survived, and the one sum: agreement, shares, seeds, commitments, masks taken off (sections 5 and 6)."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from itertools import combinations, islice

from sequester.protocols import session
from sequester.protocols.errors import PeerError
from sequester.protocols.secagg import keys, masks, shamir
from sequester.protocols.secagg.aggregator_set_up import Gathering
from sequester.protocols.secagg.aggregator_state import Open
from sequester.protocols.secagg.messages import (
    Ack,
    Effect,
    PairSeeds,
    SeedRequest,
    Send,
    SurvivorAck,
    SurvivorProposal,
    UnmaskRequest,
    UnmaskShares,
)


class Unmasking(Gathering):
    """From CLOSED to DONE or ABANDONED."""

    # ---- survivors ------------------------------------------------------------------------------------------------

    def _agree(self, survivors: tuple[int, ...]) -> list[Effect]:
        """AGREEING(v + 1) over `survivors`, or abandoned where they are too few or did not shrink."""
        r = self._round
        assert r is not None
        if len(survivors) < session.floor(self.params, len(r.start.active)):
            gone = tuple(i for i in r.start.active if i not in survivors)
            return self._abandon(f"{len(survivors)} sites acknowledged, too few to open", gone)
        if r.survivors and not set(survivors) < set(r.survivors) and r.version > 0:
            return self._abandon("the survivor set did not shrink", ())
        r.version += 1
        r.survivors, r.acks, r.waited = survivors, {}, False
        self.state = "AGREEING"
        return [*(Send(self._proposal(r), i) for i in survivors), self._clock()]

    def _proposal(self, r: Open) -> SurvivorProposal:
        return SurvivorProposal(r.ctx, r.version, r.survivors, r.salts)

    def _ack(self, sender: int, message: SurvivorAck) -> list[Effect]:
        r = self._round
        if message.index != sender:
            raise PeerError(f"site {sender} acknowledged for site {message.index}")
        if r is None or self.state != "AGREEING" or message.version != r.version or sender not in r.survivors:
            return []
        digest = keys.survivors_digest(r.ctx, r.version, r.survivors, r.salts)
        if message.digest != digest or not keys.is_signed(
            self.params.roster[sender], message.signature, keys.ack_bytes(digest)
        ):
            raise PeerError(f"the acknowledgement of site {sender} is not its own for this set")
        r.acks[sender] = Ack(sender, message.signature)
        if len(r.acks) < len(r.survivors):
            return []
        self.state = "UNMASKING"
        return [*(Send(self._request(r, i), i) for i in r.survivors), self._clock()]

    # ---- opening --------------------------------------------------------------------------------------------------

    def _request(self, r: Open, to: int) -> UnmaskRequest:
        boxes = {j: r.inputs[j].seals[to] for j in r.survivors}
        return UnmaskRequest(r.ctx, r.version, r.survivors, r.salts, boxes, tuple(r.acks.values()))

    def _shares(self, sender: int, message: UnmaskShares) -> list[Effect]:
        r = self._round
        if message.index != sender:
            raise PeerError(f"site {sender} sent shares of site {message.index}")
        if r is None or self.state != "UNMASKING" or message.ctx != r.ctx or message.version != r.version:
            return []
        if sender in r.shares:  # each try to open costs up to n quorums: one try a site
            return []
        absent = {j for j in r.start.active if j not in r.survivors}
        if sender not in r.survivors or set(message.shares) != set(r.survivors) or set(message.pair_seeds) != absent:
            raise PeerError(f"site {sender} sent shares or seeds of other sites than were asked")
        for share in message.shares.values():
            try:
                shamir.element(share)
            except ValueError:
                raise PeerError(f"site {sender} sent a share that is not canonical") from None
        if any(len(seed) != 32 for seed in message.pair_seeds.values()):
            raise PeerError(f"site {sender} sent a seed of the wrong size")
        r.shares[sender] = dict(message.shares)
        r.seeds.update({(sender, j): seed for j, seed in message.pair_seeds.items()})
        return self._try_open(r)

    def _pair_seeds(self, sender: int, message: PairSeeds) -> list[Effect]:
        r = self._round
        if message.index != sender:
            raise PeerError(f"site {sender} sent seeds of site {message.index}")
        if r is None or self.state != "UNMASKING" or message.ctx != r.ctx or sender in r.survivors:
            return []
        if not set(message.pair_seeds) <= set(r.survivors) or any(len(s) != 32 for s in message.pair_seeds.values()):
            raise PeerError(f"site {sender} sent seeds that were not asked")
        r.seeds.update({(i, sender): seed for i, seed in message.pair_seeds.items()})
        self._readied.add(sender)
        return self._try_open(r)

    def _missing_seeds(self, r: Open) -> list[tuple[int, int]]:
        absent = [j for j in r.start.active if j not in r.survivors]
        return [(i, j) for i in r.survivors for j in absent if (i, j) not in r.seeds]

    def _try_open(self, r: Open) -> list[Effect]:
        if len(r.shares) < self.threshold or self._missing_seeds(r):
            return []
        seeds = self._open_seeds(r)
        if seeds is None:
            if len(r.shares) + len(r.failed_boxes) < len(r.survivors):
                return []  # more shares may still come
            return self._abandon("an opened seed does not match its commitment", tuple(sorted(r.shares)))
        minus = [keys.self_key(seed, r.ctx) for seed in seeds.values()]
        plus: list[bytes] = []
        for i in r.survivors:
            for j in r.start.active:
                if j not in r.survivors:
                    # site i added +PRG(k_ij) where j > i and -PRG(k_ij) where j < i: take it out again
                    (minus if j > i else plus).append(r.seeds[(i, j)])
        r.total = self._room.array(r.start.length, masks.word_type(self.params.ring_bits))
        masks.add_streams(r.total, plus, minus, [r.inputs[i].y for i in r.survivors])
        return self._done(r)

    def _open_seeds(self, r: Open) -> dict[int, bytes] | None:
        """b_j of every survivor, from the first quorum whose openings all match their commitments."""
        for quorum in islice(combinations(sorted(r.shares), self.threshold), len(r.start.active)):
            weights = shamir.lagrange_at_zero([i + 1 for i in quorum])
            seeds = {}
            for j in r.survivors:
                secret = shamir.combine(weights, [shamir.element(r.shares[i][j]) for i in quorum])
                seeds[j] = shamir.b32(secret)
            if all(
                hmac.compare_digest(keys.commitment(r.ctx, j, seeds[j]), r.inputs[j].commit)  # C19
                for j in r.survivors
            ):
                return seeds
        return None

    def _late_shares(self, r: Open) -> list[Effect]:
        if r.version == 0:
            silent = [i for i in r.survivors if i not in r.shares]
            if not r.waited:
                r.waited = True
                return [*(Send(self._request(r, i), i) for i in silent), self._clock()]
            return self._abandon(f"{len(r.shares)} of {self.threshold} share sets came", tuple(silent))
        silent = [i for i in r.survivors if i not in r.shares]
        if not r.shares:
            return self._abandon("no site opened the sum", tuple(silent))
        if not r.waited:
            r.waited = True
            absent = [j for j in r.start.active if j not in r.survivors]
            return [*self._ask_seeds(r, absent, True), self._clock()]
        return self._abandon(f"sites {silent} were silent after the sum was agreed", tuple(silent))

    def _ask_seeds(self, r: Open, absent: Sequence[int], with_start: bool) -> list[Effect]:
        """Asks absent sites that came back for their seeds with survivors that fell silent."""
        effects: list[Effect] = []
        missing = self._missing_seeds(r)
        for j in absent:
            wanted = tuple(i for i, other in missing if other == j and i not in r.shares)
            if wanted and r.acks:
                start = self._start_for(j) if with_start else None
                effects.append(
                    Send(SeedRequest(r.ctx, r.version, r.survivors, r.salts, tuple(r.acks.values()), wanted, start), j)
                )
        return effects
