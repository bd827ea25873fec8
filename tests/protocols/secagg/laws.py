"""What one honest site may say, watched from outside: the five laws, and a record before every word (section 5).

A watcher knows the messages the site heard and the effects that were performed, nothing of its state. Each failed
assertion is a broken law.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from sequester.protocols.secagg import keys
from sequester.protocols.secagg.messages import (
    CancelAck,
    Contribute,
    Effect,
    Hold,
    KeyAdvertisement,
    MaskedInput,
    Message,
    PairSeeds,
    Persist,
    Ratification,
    SeedRequest,
    Send,
    StoreOutbox,
    SurvivorAck,
    SurvivorProposal,
    UnmaskRequest,
    UnmaskShares,
    Withdraw,
)


class Watcher:
    """The words of one site since its disk was last whole."""

    def __init__(self) -> None:
        self.charges: Counter[tuple[str, int]] = Counter()
        self._rows: list[dict[str, Any]] = []
        self._outbox: MaskedInput | None = None
        self._stored = b""
        self._last_round = 0
        self._inputs: dict[int, bytes] = {}
        self._acks: dict[bytes, list[tuple[int, frozenset[int]]]] = {}
        self._over: set[bytes] = set()
        self._released: dict[int, bytes] = {}

    def saw(self, heard: Message | None, effect: Effect) -> None:
        """One effect, as it is performed; `heard` is the message that caused it, None where none did."""
        match effect:
            case Persist(record=record, charge=charge):
                row = json.loads(record)
                self._rows.append(row)
                if charge is not None:
                    self.charges[charge.analysis, charge.step] += 1
                if row["kind"] in ("round", "missed"):
                    assert row["round"] > self._last_round, "law 1: the last round fell"
                    self._last_round = row["round"]
            case StoreOutbox(message=message):
                self._outbox, self._stored = message, message.y.tobytes()
            case Contribute():
                assert self._row("round")["round"] == effect.round, "a vector was asked for before its record"
            case Send(message=message):
                self._said(heard, message)

    def restored(self, records: int) -> None:
        """The site's disk is an older one, with so many records: rounds fall and are masked again, no word is unsaid."""
        self._rows = self._rows[:records]
        self._last_round = max((row["round"] for row in self._rows if row["kind"] in ("round", "missed")), default=0)
        self._outbox, self._stored = None, b""
        self._inputs = {}

    def _row(self, *kinds: str, **fields: object) -> dict[str, Any]:
        rows = [row for row in self._rows if row["kind"] in kinds]
        rows = [row for row in rows if all(row[name] == value for name, value in fields.items())]
        assert rows, f"a word went out before its record: {kinds}"
        return rows[-1]

    def _round_of(self, ctx: bytes) -> int:
        return int(self._row("round", "missed", ctx=ctx.hex())["round"])

    def _said(self, heard: Message | None, message: Message) -> None:
        match message:
            case KeyAdvertisement():
                assert self._row("params")["adv"]["signature"] == message.signature.hex()
            case Ratification():
                self._row("roster")
            case Hold():
                self._row("held", round=message.round)
            case Withdraw():
                self._row("withdrawn")
            case MaskedInput():
                self._row("input", ctx=message.ctx.hex())
                assert self._outbox is not None and self._outbox.signature == message.signature
                assert self._stored == message.y.tobytes(), "other words went out than those that were stored"
                first = self._inputs.setdefault(self._round_of(message.ctx), message.signature)
                assert first == message.signature, "law 1: two inputs in one round"
            case SurvivorAck():
                row = self._row("acked", digest=message.digest.hex())
                if heard is None:  # said again on a new stream: the last one, nothing else
                    last = self._row("acked", "released", "cancelled", "missed", "round")
                    assert last is row, "an acknowledgement that is not the last word was said again"
                    return
                assert isinstance(heard, SurvivorProposal)
                assert heard.ctx not in self._over, "law 2: an acknowledgement after a release or a cancel"
                before = self._acks.setdefault(heard.ctx, [])
                for version, survivors in before:
                    assert message.version > version, "law 3: the version did not grow"
                    assert set(heard.survivors) < survivors, "law 3: the set did not shrink"
                before.append((message.version, frozenset(heard.survivors)))
            case UnmaskShares():
                assert isinstance(heard, UnmaskRequest)
                assert message.version > 0 or not self._acks.get(message.ctx), "law 4: a full release after an ack"
                self._release(heard)
            case PairSeeds():
                assert isinstance(heard, SeedRequest)
                self._release(heard)
            case CancelAck():
                self._row("cancelled", ctx=message.ctx.hex())
                self._over.add(message.ctx)

    def _release(self, heard: UnmaskRequest | SeedRequest) -> None:
        digest = keys.survivors_digest(heard.ctx, heard.version, heard.survivors, heard.salts)
        self._row("released", "missed", digest=digest.hex())
        self._over.add(heard.ctx)
        assert self._released.setdefault(self._round_of(heard.ctx), digest) == digest, "law 5: two released sets"
