"""The open round's inputs: one from each site, bound to its stream, until all are in or nobody is waited for (C23, C24)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sequester.protocols import session
from sequester.protocols.errors import PeerError
from sequester.protocols.secagg import keys, masks
from sequester.protocols.secagg.aggregator_opening import Unmasking
from sequester.protocols.secagg.aggregator_state import Open
from sequester.protocols.secagg.messages import (
    CancelAck,
    Effect,
    Hold,
    MaskedInput,
    Refusal,
    Send,
)


class Collecting(Unmasking):
    """From COLLECTING to CLOSED."""

    def _input(self, sender: int, message: MaskedInput) -> list[Effect]:
        r = self._round
        if message.index != sender:  # C23
            raise PeerError(f"site {sender} sent an input of site {message.index}")
        if r is None or self.state != "COLLECTING" or message.ctx != r.ctx:
            return []  # late, or of a round given up: its fresh self-mask protects it (C10)
        if sender not in r.start.active:
            raise PeerError(f"site {sender} is not in the active set")
        if sender in r.inputs:  # C23
            return []
        y, double = message.y, self.params.mode == "double"
        if y.shape != (r.start.length,) or y.dtype != masks.word_type(self.params.ring_bits):  # C24
            raise PeerError(f"site {sender} sent {y.shape} words of {y.dtype}, {r.start.length} were asked")
        expected = set(r.start.active) if double else set()
        if set(message.seals) != expected or any(len(box) != keys.SEAL_BYTES for box in message.seals.values()):
            raise PeerError(f"site {sender} sealed shares for other sites than the active set")
        if len(message.salt) != (16 if double else 0) or len(message.commit) != (32 if double else 0):
            raise PeerError(f"site {sender}'s salt or commitment has the wrong size")
        statement = keys.input_bytes(r.ctx, r.start.round, sender, message.salt, message.commit)
        if not keys.is_signed(self.params.roster[sender], message.signature, statement):
            raise PeerError(f"the input of site {sender} is not signed by it")
        self._readied.add(sender)
        if double:
            r.inputs[sender] = message  # who of them is in the sum is not known before it is opened
        else:  # nobody is ever left out: the vector itself need not be kept
            if r.total is None:
                r.total = self._room.array(r.start.length, y.dtype)
                r.total.fill(0)
            r.total += y
            r.inputs[sender] = replace(message, y=without_words(y))
        return self._close() if self._nobody_is_waited_for(r) else []

    def _nobody_is_waited_for(self, r: Open) -> bool:
        """True where every active site has delivered, refused or left."""
        return all(i in r.inputs or i in r.refused or i in self.withdrawn for i in r.start.active)

    def _hold(self, sender: int, message: Hold) -> list[Effect]:
        """A person is looking: the deadline starts again, once for each site and round."""
        r = self._round
        if r is None or self.state != "COLLECTING" or message.round != r.start.round or sender in r.held:
            return []
        if sender not in r.start.active:
            raise PeerError(f"site {sender} holds a round it is not in")
        r.held.add(sender)
        return [self._clock()]

    def _close(self) -> list[Effect]:
        r = self._round
        assert r is not None
        present = tuple(sorted(r.inputs))
        floor = session.floor(self.params, len(r.start.active))
        missing = tuple(i for i in r.start.active if i not in r.inputs)
        if len(present) < floor:
            return self._abandon(
                f"{len(present)} of {len(r.start.active)} sites delivered, {floor} are needed", missing
            )
        if self.params.mode == "strict":
            r.survivors = present
            return self._done(r)
        if not missing:
            r.survivors = present
            self.state = "UNMASKING"
            return [*(Send(self._request(r, i), i) for i in present), self._clock()]
        return self._agree(present)

    def _refused(self, sender: int, message: Refusal) -> list[Effect]:
        r = self._round
        if r is None or sender not in r.start.active:
            return []
        if message.box_failed is None:
            r.refused.add(sender)
            if self.state == "COLLECTING" and sender not in r.inputs and self._nobody_is_waited_for(r):
                return self._close()
            return []
        if self.state != "UNMASKING" or message.box_failed not in r.survivors:
            return []
        r.failed_boxes[sender] = message.box_failed
        able = [i for i in r.survivors if i not in r.failed_boxes]
        if r.version == 0 and len(able) >= self.threshold:
            return self._try_open(r)
        if not r.shares:
            bad = set(r.failed_boxes.values())
            return self._agree(tuple(i for i in r.survivors if i not in bad))
        suspects = tuple(sorted({*r.failed_boxes, *r.failed_boxes.values()}))
        return self._abandon(f"the share of site {message.box_failed} does not open", suspects)

    def _cancelled(self, sender: int, message: CancelAck) -> list[Effect]:
        known = {ctx: active for rounds in self._earlier.values() for ctx, active in rounds}
        if message.index != sender or message.ctx not in known or sender not in known[message.ctx]:
            raise PeerError(f"site {sender} cancelled a round that was not")
        if not keys.is_signed(self.params.roster[sender], message.signature, keys.cancel_bytes(message.ctx)):
            raise PeerError(f"the cancel of site {sender} is not signed by it")
        self._cancels.setdefault(message.ctx, {})[sender] = message
        return []

    def _left(self, sender: int) -> list[Effect]:
        self.withdrawn.add(sender)
        r = self._round
        if self.state in ("KEYS", "RATIFYING"):
            return self._fail(f"site {sender} withdrew during set-up", (sender,))
        if r is not None and self.state == "COLLECTING" and sender in r.start.active and sender not in r.inputs:
            if self._nobody_is_waited_for(r):
                return self._close()
        return []


def without_words(y: Any) -> Any:
    """An empty vector of the same words, in place of one that need not be kept."""
    return y[:0].copy()
