"""A malicious aggregator and its c colluding sites against real members: what it sends, and what it can compute.

Honest members are the product's own `Member`. Corrupt sites are real too, so that they hold real keys, and hand all of
them to the aggregator: it signs, seals and opens in their name. `opened` does not argue about what the adversary might
know: it recovers sums from the bytes that left honest sites and compares them with what those sites put in.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sequester.protocols.quantise import RingVector
from sequester.protocols.secagg import keys, masks, shamir
from sequester.protocols.secagg.member import Member
from sequester.protocols.secagg.member_state import Admission
from sequester.protocols.secagg.messages import (
    Ack,
    CancelAck,
    Contribute,
    Effect,
    KeyAdvertisement,
    MaskedInput,
    Message,
    PairSeeds,
    Persist,
    Ratification,
    Refusal,
    Roster,
    RoundCancel,
    RoundStart,
    SeedRequest,
    Send,
    SessionProposal,
    StoreOutbox,
    SurvivorAck,
    SurvivorProposal,
    UnmaskRequest,
    UnmaskShares,
)
from sequester.protocols.session import Mode, SessionParams, Task

STUDY = hashlib.sha256(b"study").digest()
LENGTH = 6
M = TypeVar("M")


class Allow:
    """A site's rules that allow everything but what a test sets."""

    def __init__(self, pinned: Iterable[bytes]) -> None:
        self.pinned = frozenset(pinned)
        self.epoch = -1
        self.admission = Admission(charges=100, exact=False)
        self.counter = 5
        self.seen: dict[tuple[bytes, str], KeyAdvertisement] = {}

    def epoch_floor(self) -> int:
        return self.epoch

    def reserve(self, params: SessionParams) -> tuple[str, int, bytes]:
        return "cohort", self.counter, ledger_head(self.counter)

    def ledger_head_at(self, data_set: str, counter: int) -> bytes | None:
        return ledger_head(counter) if counter <= self.counter else None

    def highest_seen(self, key: bytes, data_set: str) -> KeyAdvertisement | None:
        return self.seen.get((key, data_set))

    def saw(self, key: bytes, advertisement: KeyAdvertisement) -> None:
        held = self.seen.get((key, advertisement.data_set))
        if held is None or held.counter < advertisement.counter:
            self.seen[key, advertisement.data_set] = advertisement

    def admit(self, start: RoundStart) -> Admission:
        return self.admission


def ledger_head(counter: int, history: str = "") -> bytes:
    return hashlib.sha256(f"{history}{counter}".encode()).digest()


def task(step: int = 0, attempt: int = 0, broadcast: bytes = b"model") -> Task:
    layout = hashlib.sha256(b"layout").digest()
    digest = hashlib.sha256(broadcast).digest()
    return Task(STUDY, "glm", step, attempt, digest, layout, "w32b16g1", "clip", "noise", "event")


def said(effects: Sequence[Effect], kind: type[M]) -> M | None:
    """The message of that kind among the effects, None where there is none."""
    return next((e.message for e in effects if isinstance(e, Send) and isinstance(e.message, kind)), None)


def is_refused(effects: Sequence[Effect]) -> bool:
    """True where nothing but the opaque refusal of a round was said."""
    return [e.message for e in effects if isinstance(e, Send)] == [Refusal()]


class Adversary:
    """N sites, the last c of them corrupt unless named; every honest word is kept."""

    def __init__(
        self,
        n: int,
        c: int,
        *,
        mode: Mode = "double",
        absent: int | None = None,
        min_active: int | None = None,
        corrupt: Iterable[int] | None = None,
        seed: int = 1,
        joined: bool = True,
    ) -> None:
        source = random.Random(seed)
        self.entropy = source.randbytes
        self.identities = [Ed25519PrivateKey.from_private_bytes(source.randbytes(32)) for _ in range(n)]
        self.signs: list[Callable[[bytes], bytes]] = [key.sign for key in self.identities]
        roster = tuple(key.public_key().public_bytes_raw() for key in self.identities)
        self.n, self.c, self.t = n, c, (n + c) // 2 + 1
        a = (0 if mode == "strict" else n - self.t) if absent is None else absent
        self.params = SessionParams(STUDY, 0, roster, c, min_active or self.t, a, 32, mode)
        self.corrupt = frozenset(range(n - c, n) if corrupt is None else corrupt)
        self.honest = tuple(i for i in range(n) if i not in self.corrupt)
        self.rules = [Allow(roster) for _ in range(n)]
        self.members = [self.fresh(i) for i in range(n)]
        self.journals: list[list[bytes]] = [[] for _ in range(n)]
        self.outboxes: list[MaskedInput | None] = [None] * n
        self.advs: list[KeyAdvertisement] = []
        self.ratifications: tuple[Ratification, ...] = ()
        self.words: list[tuple[int, Message]] = []
        self.inputs: dict[tuple[bytes, int], MaskedInput] = {}  # the newest one
        self.sent: dict[tuple[bytes, int], list[MaskedInput]] = {}  # several of a site whose disk was restored
        self.truth: dict[tuple[bytes, int, bytes], np.ndarray] = {}
        self.active: dict[bytes, tuple[int, ...]] = {}
        self.shares: dict[tuple[bytes, int, bytes], dict[int, int]] = {}  # (ctx, of, salt) -> holder + 1 -> share
        self.seeds: dict[tuple[bytes, int, int], bytes] = {}
        self._clones: dict[int, dict[int, bytes]] = {}  # pair keys that corrupt sites gave away for good
        self._asked: dict[int, bytes] = {}  # salts of the opening that is being answered
        if joined:
            self.advertise()
            self.ratify()

    def fresh(self, i: int) -> Member:
        """Site i with an empty disk."""
        return Member(self.params, i, self.signs[i], self.rules[i], self.entropy)

    # ---- saying things to sites ---------------------------------------------------------------------------------

    def tell(self, i: int, message: Message) -> list[Effect]:
        """Site i's effects; a vector it is asked for is given at once, and everything said is listened to."""
        if isinstance(message, UnmaskRequest):
            self._asked = dict(zip(message.survivors, message.salts, strict=False))
        return self.heard(i, self.members[i].handle(message))

    def heard(self, i: int, effects: Sequence[Effect]) -> list[Effect]:
        """Perform a site's effects and learn from them."""
        done: list[Effect] = []
        for effect in effects:
            done.append(effect)
            match effect:
                case Persist():
                    self.journals[i].append(effect.record)
                case StoreOutbox():
                    self.outboxes[i] = effect.message
                case Send():
                    self._learn(i, effect.message)
                case Contribute():
                    x = np.frombuffer(self.entropy(4 * effect.length), "<u4").copy()
                    after = self.members[i].contribute(RingVector(x.copy()))
                    sent = said(after, MaskedInput)
                    if sent is not None:
                        self.truth[sent.ctx, i, sent.salt] = x
                    done += self.heard(i, after)
        return done

    def advertise(self) -> None:
        self.advs = [
            a for i in range(self.n) if (a := said(self.tell(i, SessionProposal(self.params)), KeyAdvertisement))
        ]
        assert len(self.advs) == self.n

    def ratify(self) -> None:
        everyone = [said(self.tell(i, Roster(tuple(self.advs))), Ratification) for i in range(self.n)]
        self.ratifications = tuple(r for r in everyone if r is not None)
        assert len(self.ratifications) == self.n
        for k in self.corrupt:
            self.pairs_of(k)

    @property
    def session(self) -> bytes:
        return keys.session_id(self.params)

    def begin(
        self,
        number: int,
        active: Sequence[int] = (),
        *,
        step: int | None = None,
        attempt: int = 0,
        broadcast: bytes = b"model",
        length: int = LENGTH,
        cancels: Mapping[bytes, tuple[CancelAck, ...]] | None = None,
    ) -> RoundStart:
        """A RoundStart; by default of the whole roster, and of a new step each round."""
        chosen = tuple(active) or tuple(range(self.n))
        what = task(number if step is None else step, attempt, broadcast)
        start = RoundStart(
            self.session, number, chosen, length, length, what, broadcast, self.ratifications, dict(cancels or {})
        )
        self.active[self.ctx(start)] = chosen
        return start

    def ctx(self, start: RoundStart) -> bytes:
        roster = keys.roster_hash(self.session, [a.kx for a in self.advs])
        return keys.context(roster, start.round, start.active, start.length, start.task)

    def play(self, start: RoundStart, sites: Iterable[int] | None = None) -> bytes:
        """Start a round at `sites` (all of its active set); returns its ctx."""
        for i in start.active if sites is None else sites:
            self.tell(i, start)
        return self.ctx(start)

    # ---- forging what c corrupt sites would say, and assembling the rest ---------------------------------------

    def salts(self, ctx: bytes, survivors: Sequence[int]) -> tuple[bytes, ...]:
        return tuple(self.inputs[ctx, j].salt if (ctx, j) in self.inputs else bytes(16) for j in survivors)

    def propose(self, i: int, ctx: bytes, version: int, survivors: Sequence[int]) -> list[Effect]:
        return self.tell(i, SurvivorProposal(ctx, version, tuple(survivors), self.salts(ctx, survivors)))

    def acks(self, ctx: bytes, version: int, survivors: Sequence[int], signers: Iterable[int]) -> tuple[Ack, ...]:
        """Acknowledgements of that set: corrupt signers at will, honest ones only as they were given."""
        digest = keys.survivors_digest(ctx, version, survivors, self.salts(ctx, survivors))
        given = {
            i: m.signature
            for i, m in self.words
            if isinstance(m, SurvivorAck) and m.digest == digest and i in self.honest
        }
        forged = {i: self.signs[i](keys.ack_bytes(digest)) for i in signers if i in self.corrupt}
        return tuple(Ack(i, s) for i, s in sorted((given | forged).items()) if i in signers)

    def agree(self, ctx: bytes, version: int, survivors: Sequence[int]) -> tuple[Ack, ...]:
        """Propose the set to all its honest members; the acknowledgements that come of it, corrupt ones added."""
        for i in survivors:
            if i in self.honest:
                self.propose(i, ctx, version, survivors)
        return self.acks(ctx, version, survivors, survivors)

    def release(
        self, i: int, ctx: bytes, version: int, survivors: Sequence[int], acks: Sequence[Ack] = ()
    ) -> list[Effect]:
        boxes = {j: m.seals[i] for j in survivors if (m := self.inputs.get((ctx, j))) and i in m.seals}
        salts = self.salts(ctx, survivors)
        return self.tell(i, UnmaskRequest(ctx, version, tuple(survivors), salts, boxes, tuple(acks)))

    def ask_seeds(
        self,
        i: int,
        ctx: bytes,
        version: int,
        survivors: Sequence[int],
        acks: Sequence[Ack],
        wanted: Sequence[int] | None = None,
        start: RoundStart | None = None,
    ) -> list[Effect]:
        salts, names = self.salts(ctx, survivors), tuple(survivors)
        wanted = names if wanted is None else tuple(wanted)
        return self.tell(i, SeedRequest(ctx, version, names, salts, tuple(acks), wanted, start))

    def cancelled(self, ctx: bytes, sites: Iterable[int]) -> tuple[CancelAck, ...]:
        """Cancels of `sites`: asked of honest ones, signed at will for corrupt ones."""
        found = []
        for i in sites:
            if i in self.corrupt:
                found.append(CancelAck(i, ctx, self.signs[i](keys.cancel_bytes(ctx))))
            elif ack := said(self.tell(i, RoundCancel(ctx)), CancelAck):
                found.append(ack)
        return tuple(found)

    def restart(self, i: int) -> Member:
        """Site i after a crash: everything it made durable, nothing else."""
        rest = self.params, i, self.signs[i], self.rules[i], self.entropy
        return Member.restore(self.journals[i], self.outboxes[i], *rest)

    def roll_back(self, i: int, records: int) -> None:
        """Site i's disk is restored to an early moment: a prefix of its journal and no outbox."""
        self.journals[i] = self.journals[i][:records]
        self.outboxes[i] = None
        self.members[i] = Member.restore(
            self.journals[i], None, self.params, i, self.signs[i], self.rules[i], self.entropy
        )

    # ---- learning -----------------------------------------------------------------------------------------------

    def _learn(self, i: int, message: Message) -> None:
        self.words.append((i, message))
        match message:
            case MaskedInput():
                self.inputs[message.ctx, i] = message
                seen = self.sent.setdefault((message.ctx, i), [])
                if all(m.signature != message.signature for m in seen):
                    seen.append(message)
                for k in self.corrupt & set(message.seals):
                    self._unseal(message, k)
            case UnmaskShares():
                for j, share in message.shares.items():
                    self._share(message.ctx, j, self._asked[j], i, share)
                for j, seed in message.pair_seeds.items():
                    self.seeds[message.ctx, i, j] = self.seeds[message.ctx, j, i] = seed
            case PairSeeds():
                for j, seed in message.pair_seeds.items():
                    self.seeds[message.ctx, i, j] = self.seeds[message.ctx, j, i] = seed

    def put_in(self, ctx: bytes, i: int) -> np.ndarray:
        """What honest site i really put under its newest mask of that context."""
        return self.truth[ctx, i, self.inputs[ctx, i].salt]

    def _unseal(self, sent: MaskedInput, k: int) -> None:
        pair = self.pairs_of(k)[sent.index]
        share = keys.unseal(pair, sent.index, k, sent.ctx, sent.salt, sent.seals[k])
        self._share(sent.ctx, sent.index, sent.salt, k, share)

    def _share(self, ctx: bytes, of: int, salt: bytes, holder: int, share: bytes) -> None:
        self.shares.setdefault((ctx, of, salt), {})[holder + 1] = int.from_bytes(share, "little") % shamir.P

    def pairs_of(self, k: int) -> dict[int, bytes]:
        """The pair keys of corrupt site k, whatever became of its own disk since."""
        if self.members[k]._pairs and k not in self._clones:
            self._clones[k] = dict(self.members[k]._pairs)
        return self._clones.get(k, {})

    def corrupts(self, i: int) -> None:
        """Site i counts among the c from now on: it hands over its keys and what was sealed to it."""
        self.corrupt |= {i}
        self.honest = tuple(j for j in self.honest if j != i)
        self.pairs_of(i)
        for messages in self.sent.values():
            for sent in messages:
                if i in sent.seals:
                    self._unseal(sent, i)

    def self_seed(self, ctx: bytes, j: int, salt: bytes) -> bytes | None:
        """b_j behind that salt, where the shares that left open it; its commitment says so."""
        known = sorted(self.shares.get((ctx, j, salt), {}).items())
        sent = next((m for m in self.sent.get((ctx, j), []) if m.salt == salt), None)
        for k in range(1, len(known) + 1):
            weights = shamir.lagrange_at_zero([x for x, _ in known[:k]])
            seed = shamir.b32(shamir.combine(weights, [y for _, y in known[:k]]))
            if sent is not None and keys.commitment(ctx, j, seed) == sent.commit:
                return seed
        return None

    def pair_seed(self, ctx: bytes, i: int, j: int) -> bytes | None:
        """k_ij where a corrupt site knows it or an honest one gave it."""
        for a, b in ((i, j), (j, i)):
            if a in self.corrupt and b in self.pairs_of(a):
                return keys.mask_key(self.pairs_of(a)[b], ctx)
        return self.seeds.get((ctx, i, j))

    def opened(self, ctx: bytes) -> list[frozenset[int]]:
        """Every set of honest sites whose sum the adversary can compute, each checked against the truth."""
        found = []
        sites = [j for j in self.honest if (ctx, j) in self.inputs]
        for size in range(1, len(sites) + 1):
            for some in combinations(sites, size):
                alternatives = product(*(self.sent[ctx, j] for j in some))
                found += [frozenset(some) for chosen in alternatives if self._opens(ctx, some, chosen)]
        return found

    def _opens(self, ctx: bytes, some: Sequence[int], chosen: Sequence[MaskedInput]) -> bool:
        total = np.zeros(len(chosen[0].y), np.uint32)
        plus: list[bytes] = []
        minus: list[bytes] = []
        for i, sent in zip(some, chosen, strict=True):
            total += sent.y
            if sent.commit:
                seed = self.self_seed(ctx, i, sent.salt)
                if seed is None:
                    return False
                minus.append(keys.self_key(seed, ctx))
            for j in self.active[ctx]:
                if j not in some:
                    pair = self.pair_seed(ctx, i, j)
                    if pair is None:
                        return False
                    (minus if j > i else plus).append(pair)
        masks.add_streams(total, plus, minus)
        truth = np.sum([self.truth[ctx, m.index, m.salt] for m in chosen], axis=0, dtype=np.uint32)
        return bool(np.array_equal(total, truth))

    def learns_at_most_one_sum(self, *contexts: bytes) -> list[frozenset[int]]:
        """The goal of section 1 over the contexts of one round, asserted; the sums that opened."""
        sums = []
        for ctx in contexts:
            u = max(self.t, len(self.active[ctx]) - self.params.max_absent)
            if self.params.mode == "strict":
                u = len(self.active[ctx])
            for some in self.opened(ctx):
                assert len(some) >= u - self.c >= 2, f"the adversary reads the sum of sites {sorted(some)}"
                sums.append(some)
        assert len(sums) <= 1, f"the adversary reads the sums of {[sorted(s) for s in sums]}"
        return sums


def renamed(params: SessionParams, **changes: object) -> SessionParams:
    """The parameters with some of them changed."""
    return replace(params, **changes)  # type: ignore[arg-type]
