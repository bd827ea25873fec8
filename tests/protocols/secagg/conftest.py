"""A protocol session in memory: N members, one aggregator, every message a value, every effect performed in order."""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sequester.protocols.quantise import RingVector
from sequester.protocols.secagg import masks
from sequester.protocols.secagg.aggregator import Aggregator
from sequester.protocols.secagg.member import Member
from sequester.protocols.secagg.member_state import Admission
from sequester.protocols.secagg.messages import (
    Abandoned,
    Contribute,
    Deadline,
    Effect,
    KeyAdvertisement,
    MaskedInput,
    Message,
    Outcome,
    Persist,
    RoundStart,
    Send,
    StoreOutbox,
)
from sequester.protocols.session import Mode, SessionParams, Task, threshold

STUDY = hashlib.sha256(b"study").digest()


class Allow:
    """Rules that allow everything but what a test sets."""

    def __init__(self, pinned: Iterable[bytes]) -> None:
        self.pinned = frozenset(pinned)
        self.epoch = -1
        self.charges = 100
        self.exact = False
        self.hold = False
        self.counter = 5
        self.seen: dict[tuple[bytes, str], KeyAdvertisement] = {}

    def epoch_floor(self) -> int:
        return self.epoch

    def reserve(self, params: SessionParams) -> tuple[str, int, bytes]:
        return "cohort", self.counter, self._head(self.counter)

    @staticmethod
    def _head(counter: int) -> bytes:
        return hashlib.sha256(b"head%d" % counter).digest()

    def ledger_head_at(self, data_set: str, counter: int) -> bytes | None:
        return self._head(counter) if counter <= self.counter else None

    def highest_seen(self, key: bytes, data_set: str) -> KeyAdvertisement | None:
        return self.seen.get((key, data_set))

    def saw(self, key: bytes, advertisement: KeyAdvertisement) -> None:
        held = self.seen.get((key, advertisement.data_set))
        if held is None or held.counter < advertisement.counter:
            self.seen[key, advertisement.data_set] = advertisement

    def admit(self, start: RoundStart) -> Admission:
        return Admission(self.charges, self.exact, self.hold, 0)


@dataclass
class Session:
    """`lose(sender, to, message)` drops a message; -1 is the aggregator. Sites in `absent` never contribute."""

    params: SessionParams
    members: list[Member]
    aggregator: Aggregator
    rules: list[Allow]
    signs: list[Callable[[bytes], bytes]]
    entropy: Callable[[int], bytes]
    journals: list[list[bytes]]
    outboxes: list[MaskedInput | None]
    ledger: list[bytes] = field(default_factory=list)
    absent: set[int] = field(default_factory=set)
    lose: Callable[[int, int, Message], bool] = lambda sender, to, message: False
    vectors: dict[int, np.ndarray] = field(default_factory=dict)
    outcomes: list[Outcome | Abandoned] = field(default_factory=list)
    said: list[tuple[int, Message]] = field(default_factory=list)
    token: int = -1

    def _aggregator_did(self, effects: Sequence[Effect], queue: deque[tuple[int, int, Message]]) -> None:
        for effect in effects:
            match effect:
                case Persist():
                    self.ledger.append(effect.record)
                case Send():
                    queue.append((-1, effect.to, effect.message))
                case Deadline():
                    self.token = effect.token
                case Outcome() | Abandoned():
                    self.outcomes.append(effect)

    def _member_did(self, i: int, effects: Sequence[Effect], queue: deque[tuple[int, int, Message]]) -> None:
        for effect in effects:
            match effect:
                case Persist():
                    self.journals[i].append(effect.record)
                case StoreOutbox():
                    self.outboxes[i] = effect.message
                case Send():
                    self.said.append((i, effect.message))
                    queue.append((i, -1, effect.message))
                case Contribute() if i not in self.absent:
                    x = RingVector(self.vectors[i].copy())
                    effects = self.members[i].contribute(x)
                    self._member_did(i, effects, queue)
                    # masked where it stood, or wiped: nowhere is an unmasked word left
                    assert any(e.message.y is x for e in effects if isinstance(e, StoreOutbox)) or not x.any()
                    assert not np.array_equal(x, self.vectors[i]) or not x.any()

    def run(self, effects: Sequence[Effect] = (), heard: tuple[int, Sequence[Effect]] | None = None) -> None:
        """Perform `effects` of the aggregator (or of one member), and everything they cause."""
        queue: deque[tuple[int, int, Message]] = deque()
        self._aggregator_did(effects, queue)
        if heard is not None:
            self._member_did(heard[0], heard[1], queue)
        while queue:
            sender, to, message = queue.popleft()
            if self.lose(sender, to, message):
                continue
            if to == -1:
                self._aggregator_did(self.aggregator.handle(sender, message), queue)
            else:
                self._member_did(to, self.members[to].handle(message), queue)

    def deadline(self) -> None:
        self.run(self.aggregator.deadline(self.token))

    def task(self, step: int = 0, attempt: int = 0) -> Task:
        layout = hashlib.sha256(b"layout").digest()
        broadcast = hashlib.sha256(b"broadcast").digest()
        return Task(STUDY, "glm", step, attempt, broadcast, layout, "w32f16g1", "clip", "noise", "event")

    def round(
        self, number: int, length: int = 9, step: int | None = None, attempt: int = 0, active: Sequence[int] = ()
    ) -> None:
        """One round with fresh vectors; deadlines pass until there is an end."""
        draw = np.random.default_rng(number)
        word = masks.word_type(self.params.ring_bits)
        top = np.iinfo(word).max
        n = len(self.members)
        self.vectors = {i: draw.integers(0, top, size=length, dtype=word, endpoint=True) for i in range(n)}
        task = self.task(number if step is None else step, attempt)
        ends = len(self.outcomes)
        chosen = tuple(active) or tuple(range(n))
        self.run(self.aggregator.start_round(number, chosen, length, length, task, b"broadcast"))
        for _ in range(8):
            if len(self.outcomes) == ends:
                self.deadline()

    def total_of(self, survivors: Iterable[int]) -> np.ndarray:
        return np.sum([self.vectors[i] for i in survivors], axis=0, dtype=masks.word_type(self.params.ring_bits))

    def restart(self, i: int, records: int | None = None) -> Member:
        """Site i from its journal, or from a prefix of it."""
        prefix = self.journals[i] if records is None else self.journals[i][:records]
        return Member.restore(prefix, self.outboxes[i], self.params, i, self.signs[i], self.rules[i], self.entropy)


Make = Callable[..., Session]


@pytest.fixture
def make_session() -> Make:
    return session


def session(
    n: int, *, c: int | None = None, mode: Mode = "double", ring_bits: int = 32, a: int | None = None, seed: int = 1
) -> Session:
    c = max(1, (n - 1) // 3) if c is None else c
    t = threshold(n, c)
    a = (0 if mode == "strict" else n - t) if a is None else a
    source = random.Random(seed)
    identities = [Ed25519PrivateKey.from_private_bytes(source.randbytes(32)) for _ in range(n)]
    roster = tuple(key.public_key().public_bytes_raw() for key in identities)
    params = SessionParams(STUDY, 0, roster, c, t, a, ring_bits, mode)
    rules = [Allow(roster) for _ in range(n)]
    signs: list[Callable[[bytes], bytes]] = [key.sign for key in identities]
    members = [Member(params, i, signs[i], rules[i], source.randbytes) for i in range(n)]
    made = Session(
        params, members, Aggregator(params, 1.0), rules, signs, source.randbytes, [[] for _ in range(n)], [None] * n
    )
    made.run(made.aggregator.start())
    assert made.aggregator.state == "READY"
    return made
