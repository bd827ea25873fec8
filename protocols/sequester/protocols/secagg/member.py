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
This object holds session secrets: it has no useful repr and refuses pickling.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from sequester.protocols import session
from sequester.protocols.errors import PeerError, PrivacyError, RefusalCode, SequesterError, StudyError
from sequester.protocols.quantise import RingVector
from sequester.protocols.secagg import keys, masks, shamir
from sequester.protocols.secagg.messages import (
    Ack,
    CancelAck,
    Contribute,
    Effect,
    Evidence,
    Hold,
    KeyAdvertisement,
    MaskedInput,
    MaskedVector,
    Message,
    PairSeeds,
    Persist,
    Ratification,
    Refusal,
    Resume,
    Roster,
    RoundCancel,
    RoundStart,
    SeedRequest,
    Send,
    SessionProposal,
    StoreOutbox,
    StudyRefusal,
    SurvivorAck,
    SurvivorProposal,
    UnmaskRequest,
    UnmaskShares,
    Withdraw,
)
from sequester.protocols.session import SessionParams, Task

MAX_WORDS = 2**28
MAX_HOLDS = 64  # rounds that wait for a person, one after another, without one that was contributed

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
SERVES_SEEDS = frozenset({"COMPUTING", "MASKED", "ACKED", "RELEASED"})  # of the round this site is in
BEFORE_ROUNDS = frozenset({"IDLE", "ADVERTISED"})


@dataclass(frozen=True, slots=True)
class Admission:
    """The rules' yes to one round: charges T + R of the analysis, and whether a human decides first."""

    charges: int
    exact: bool
    needs_hold: bool = False
    hold_until_unix: int = 0


class Rules(Protocol):
    """Look-ups of study, policy and disk. To refuse, raise a `SequesterError` with a public code."""

    pinned: frozenset[bytes]

    def epoch_floor(self) -> int:
        """The highest epoch journalled for this study, -1 where there is none."""
        ...

    def reserve(self, params: SessionParams) -> tuple[str, int, bytes]:
        """Data set, ledger counter and head, after T + R charges of every analysis are reserved durably."""
        ...

    def ledger_head_at(self, data_set: str, counter: int) -> bytes | None:
        """The head this site's ledger had at `counter`, None beyond its end."""
        ...

    def highest_seen(self, key: bytes, data_set: str) -> KeyAdvertisement | None:
        """The highest advertisement journalled of a peer's data set."""
        ...

    def saw(self, key: bytes, advertisement: KeyAdvertisement) -> None:
        """Journal an advertisement if it is higher than the one held."""
        ...

    def admit(self, start: RoundStart) -> Admission:
        """Whether the signed study and the policy allow this round."""
        ...


@dataclass(slots=True)
class _Round:
    """The round this site is in; nothing of it is ever lowered or redrawn."""

    number: int
    ctx: bytes
    active: tuple[int, ...]
    length: int
    floor: int
    task: Task
    salt: bytes = b""
    version: int = 0
    survivors: tuple[int, ...] = ()
    digest: bytes = b""
    released: bytes = b""


class Member:
    """One site in one protocol session."""

    def __init__(
        self, params: SessionParams, index: int, sign: keys.Sign, rules: Rules, entropy: Callable[[int], bytes]
    ) -> None:
        session.check_params(params)
        self.state = "IDLE"
        self.last_round = 0
        self.last_refusal: SequesterError | None = None
        self._params = params
        self._index = index
        self._sign = sign
        self._rules = rules
        self._entropy = entropy
        self._kx: X25519PrivateKey | None = None
        self._adv: KeyAdvertisement | None = None
        self._roster_hash = b""
        self._pairs: dict[int, bytes] = {}
        self._seen: tuple[bytes, ...] = ()
        self._behind: tuple[KeyAdvertisement, ...] = ()  # the advertisements that `_seen` names
        self._ready = False
        self._round: _Round | None = None
        self._held: RoundStart | None = None
        self._held_until, self._holds = 0, 0
        self._awaited: Contribute | None = None
        self._outbox: MaskedInput | None = None
        self._recorded = True  # False where a crash came between the outbox and its record
        self._used: dict[str, int] = {}  # analysis -> charges spent
        self._order: dict[str, int] = {}  # analysis -> its place, by first appearance here: none is gone back to
        self._last_task = (-1, -1, -1)  # (place, step, attempt)
        self._masked: dict[tuple[str, int], list[tuple[bytes, tuple[int, ...]]]] = {}
        self._exact_active: tuple[int, ...] | None = None
        self._last_released: tuple[bytes, bytes] | None = None

    def __repr__(self) -> str:
        return f"Member(index={self._index}, state={self.state}, last_round={self.last_round})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a protocol session cannot be pickled")

    @property
    def session_id(self) -> bytes:
        """The session's name; it binds roster, c, min_active, a, w, mode and suite."""
        return keys.session_id(self._params)

    @property
    def epoch(self) -> int:
        """The session's key epoch; before a proposal was accepted, the lowest there is."""
        return self._params.epoch

    # ---- the one entry ------------------------------------------------------------------------------------------

    def handle(self, message: Message) -> list[Effect]:
        """Effects of one message; a refused one changes nothing and says so."""
        if self.state == "WITHDRAWN":
            return [Send(Withdraw(self._params.study_digest, self.session_id))]
        before = self.state
        try:
            if self.state not in HEARS.get(type(message), frozenset()):
                raise PeerError(f"{type(message).__name__} in state {self.state}", code=RefusalCode.STUDY)
            return self._dispatch(message)
        except _BoxFailed as failed:
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

    # ---- set-up, section 4 --------------------------------------------------------------------------------------

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
        return [Persist(_record("params", record)), Send(self._adv)]

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
        return [Persist(_record("roster", record)), Send(self._ratification())]

    def _ratification(self) -> Ratification:
        statement = keys.ratification_bytes(self.session_id, self._roster_hash, self._seen)
        return Ratification(
            self._index, self.session_id, self._roster_hash, self._seen, self._sign(statement), self._behind
        )

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

    def _halt(self, what: str, proof: dict[str, Any]) -> list[Effect]:
        self.state = "HALTED"
        self.last_refusal = PeerError(what, hint="withdraw; the consortium starts a new key epoch")
        record = _record("halted", {"what": what, **proof})
        return [Persist(record), Evidence(what, record), Send(Refusal())]

    # ---- rounds -------------------------------------------------------------------------------------------------

    def _start(self, start: RoundStart, *, decided: bool = False) -> list[Effect]:
        effects = self._make_ready(start)
        if self.state == "HALTED":
            return effects
        try:
            admission = self._check_start(start)
            if admission.needs_hold and not decided:
                held = self._held
                if held is not None and (start.round, start.active, start.task) == (held.round, held.active, held.task):
                    return [*effects, Send(Hold(start.round, self._held_until))]
                if self._holds >= MAX_HOLDS:
                    raise PeerError(f"{MAX_HOLDS} rounds were held and none of them contributed")
                self._held, self._held_until, self._holds = start, admission.hold_until_unix, self._holds + 1
                self.state = "HELD"
                record = _record("held", {"round": start.round, "until": admission.hold_until_unix})
                return [*effects, Persist(record), Send(Hold(start.round, admission.hold_until_unix))]
            charge = self._charge(start, admission)
        except SequesterError as error:
            # the ratifications held, so READY stands; the round itself is refused
            self.last_refusal = error
            return [*effects, Send(Refusal())]
        self._enter(start, admission, charged=charge is not None)
        row: dict[str, Any] = {
            "round": start.round, "ctx": self._current.ctx.hex(), "active": list(start.active), "length": start.length,
            "task": task_json(start.task), "exact": admission.exact,
            "charged": charge is not None,
        }  # fmt: skip
        self._awaited = Contribute(
            start.task, start.round, start.active, start.broadcast, start.length, start.coordinates,
            session.noise_adders(self._params, len(start.active)),
        )  # fmt: skip
        return [*effects, Persist(_record("round", row), charge), self._awaited]

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
        return [Persist(_record("ready", {}))]

    def _check_start(self, start: RoundStart) -> Admission:
        active = start.active
        if start.round <= self.last_round:  # C9
            raise PeerError(f"round {start.round} after round {self.last_round}")
        if (
            list(active) != sorted(set(active))
            or self._index not in active
            or not 0 <= active[0] <= active[-1] < len(self._params.roster)
        ):  # C8
            raise PeerError("the active set is malformed, or I am not in it")
        if len(active) < self._params.min_active:  # C8
            raise PeerError(f"{len(active)} active sites, the study asks for {self._params.min_active}")
        if not 0 < start.length <= MAX_WORDS:  # C24
            raise PeerError(f"a vector of {start.length} words")
        if start.task.study_digest != self._params.study_digest:
            raise PeerError("a task of another study")
        if hashlib.sha256(start.broadcast).digest() != start.task.broadcast:
            raise PeerError("the broadcast is not the one the task names")
        admission = self._rules.admit(start)
        task = start.task
        place = (self._order.get(task.analysis, len(self._order)), task.step, task.attempt)
        if place <= self._last_task:  # C20
            raise PrivacyError(f"{task.analysis} step {task.step} attempt {task.attempt} was contributed before")
        if admission.exact:
            everybody = tuple(range(len(self._params.roster)))
            if active != (self._exact_active or everybody) or self._params.max_absent != 0:  # C27
                raise PrivacyError("an exact analysis has one active set, the full roster, and no absence")
            if self._earlier(task) and not self._covered(start):  # C27
                raise PrivacyError(f"exact step {task.step} of {task.analysis} was contributed before")
        return admission

    def _earlier(self, task: Task) -> list[tuple[bytes, tuple[int, ...]]]:
        return self._masked.get((task.analysis, task.step), [])

    def _covered(self, start: RoundStart) -> bool:
        """True where cancels of EVERY earlier ctx of this step show that none of them can ever open (section 7)."""
        for ctx, active in self._earlier(start.task):
            statement = keys.cancel_bytes(ctx)
            valid = {
                ack.index
                for ack in start.cancels.get(ctx, ())
                if ack.index in active and keys.is_signed(self._params.roster[ack.index], ack.signature, statement)
            }
            if len(valid) < session.cancels_needed(self._params, len(active)):  # C20
                return False
        return self._params.mode == "double"

    def _charge(self, start: RoundStart, admission: Admission) -> Task | None:
        if self._earlier(start.task) and self._covered(start):
            return None
        if self._used.get(start.task.analysis, 0) >= admission.charges:  # C20
            raise PrivacyError(
                f"{start.task.analysis} has spent its {admission.charges} charges",
                hint="the plan's spare attempts are used up; the analysis ends here",
            )
        return start.task

    def _enter(self, start: RoundStart, admission: Admission, *, charged: bool) -> None:
        ctx = keys.context(self._roster_hash, start.round, start.active, start.length, start.task)
        floor = session.floor(self._params, len(start.active))  # C7: from the roster size and the study, never received
        self._round = _Round(start.round, ctx, start.active, start.length, floor, start.task)
        self._held = self._outbox = None
        self._holds = 0
        self.last_round = start.round
        self.state = "COMPUTING"
        place = self._order.setdefault(start.task.analysis, len(self._order))
        self._last_task = (place, start.task.step, start.task.attempt)
        self._masked.setdefault((start.task.analysis, start.task.step), []).append((ctx, start.active))
        if charged:
            self._used[start.task.analysis] = self._used.get(start.task.analysis, 0) + 1
        if admission.exact:
            self._exact_active = start.active

    @property
    def _current(self) -> _Round:
        assert self._round is not None
        return self._round

    def contribute(self, vector: RingVector) -> list[Effect]:
        """Masks the vector of the round that asked for it, overwriting it; empty where that round is over."""
        asked, self._awaited = self._awaited, None
        if asked is None or self.state != "COMPUTING" or asked.round != self._current.number:
            vector.fill(0)
            return []
        r, i = self._current, self._index
        if vector.shape != (r.length,) or vector.dtype != masks.word_type(self._params.ring_bits):
            raise ValueError("the vector is not what the round asked for")  # C21 is the codec's and the layout's
        plus = [keys.mask_key(self._pairs[j], r.ctx) for j in r.active if j > i]
        minus = [keys.mask_key(self._pairs[j], r.ctx) for j in r.active if j < i]
        salt, commit, seals = b"", b"", {}
        if self._params.mode == "double":
            b = shamir.random_element(self._entropy)  # C10
            t = session.threshold(len(self._params.roster), self._params.max_corrupt)
            coefficients = [b, *(shamir.random_element(self._entropy) for _ in range(t - 1))]
            shares = shamir.split(coefficients, [j + 1 for j in r.active])
            seed = shamir.b32(b)
            salt = self._entropy(16)
            commit = keys.commitment(r.ctx, i, seed)
            for j, share in zip(r.active, shares, strict=True):
                seals[j] = keys.seal(self._pairs[j], i, j, r.ctx, salt, shamir.b32(share))
            plus.append(keys.self_key(seed, r.ctx))
        y = np.array(vector)
        vector.fill(0)
        masks.add_streams(y, plus, minus)
        signature = self._sign(keys.input_bytes(r.ctx, r.number, i, salt, commit))
        self._outbox = MaskedInput(i, r.ctx, salt, commit, seals, signature, MaskedVector(y))
        r.salt = salt
        self.state = "MASKED"
        return [StoreOutbox(self._outbox), Persist(_input_record(self._outbox)), Send(self._outbox)]

    def give_up(self) -> list[Effect]:
        """There is no vector for the round that asked for one: nobody need wait for it, now or after a reconnect."""
        if self.state != "COMPUTING" or self._awaited is None:
            return []
        self._awaited = None
        return [Send(Refusal())]

    def answer_hold(self, yes: bool) -> list[Effect]:
        """A person's answer to the held round; every check is made again before a yes counts."""
        if self.state != "HELD" or self._held is None:
            return []
        start, self._held, self.state = self._held, None, "READY"
        if not yes:
            return [Persist(_record("unheld", {"round": start.round})), Send(Refusal())]
        return self._start(start, decided=True)

    # ---- survivors ----------------------------------------------------------------------------------------------

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
        return [Persist(_record("acked", record)), Send(self._ack())]

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
            raise _BoxFailed(sender) from None
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
            effects.append(Persist(_record("missed", record)))
        seeds = {j: keys.mask_key(self._pairs[j], message.ctx) for j in message.wanted}
        return [*effects, *self._release(digest, PairSeeds(self._index, message.ctx, seeds))]

    def _check_seeds(self, message: SeedRequest) -> tuple[bytes, _Round]:
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
            target = _Round(start.round, ctx, start.active, start.length, floor, start.task)
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
        return [Persist(_record("released", {"digest": digest.hex()})), Send(answer)]

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
        return [Persist(_record("cancelled", {"ctx": r.ctx.hex()})), Send(ack)]

    # ---- leaving and coming back --------------------------------------------------------------------------------

    def withdraw(self) -> list[Effect]:
        """Leaves the study for good: keys erased, `Withdraw` is the answer to everything after."""
        if self.state in ("WITHDRAWN", "HALTED"):
            return []
        self.state = "WITHDRAWN"
        self._kx = self._awaited = self._outbox = self._held = None
        self._pairs = {}
        return [
            Persist(_record("withdrawn", {})),
            Send(Withdraw(self._params.study_digest, self.session_id)),
        ]

    def resume(self) -> list[Effect]:
        """What to say first on every stream: where this site stands, and its last word again, same bytes."""
        effects: list[Effect] = [Send(Resume(self.session_id, self.last_round, self.state))]
        if self.state == "ADVERTISED" and self._adv is not None:
            effects.append(Send(self._adv))
        elif self.state == "RATIFIED":
            effects.append(Send(self._ratification()))
        elif self.state == "COMPUTING" and self._awaited is None:
            effects.append(Send(Refusal()))  # the vector died with the process: nobody need wait for it
        elif self.state == "HELD" and self._held is None:
            self.state = "READY"  # the request died with the process; the exchange asks again
        elif self.state == "MASKED" and self._outbox is not None:
            if not self._recorded:
                self._recorded = True
                effects.append(Persist(_input_record(self._outbox)))
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
                self._round = _Round(row["round"], bytes.fromhex(row["ctx"]), active, row["length"], floor, task)
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


class _BoxFailed(Exception):
    """A sealed share that does not open: said with the sender's index, it depends on ciphertext only."""

    def __init__(self, sender: int) -> None:
        self.sender = sender


# ---- journal records: canonical JSON, secrets in hex; the driver seals them ------------------------------------------


def _record(kind: str, row: dict[str, Any]) -> bytes:
    return json.dumps({"kind": kind, **row}, sort_keys=True, separators=(",", ":")).encode()


def _input_record(sent: MaskedInput) -> bytes:
    digest = hashlib.sha256(np.ascontiguousarray(sent.y).data).hexdigest()  # no copy: it is contiguous
    return _record("input", {"ctx": sent.ctx.hex(), "salt": sent.salt.hex(), "sha256": digest})


def adv_json(adv: KeyAdvertisement) -> dict[str, Any]:
    return {
        "index": adv.index, "session_id": adv.session_id.hex(), "kx": adv.kx.hex(), "data_set": adv.data_set,
        "counter": adv.counter, "head": adv.head.hex(), "signature": adv.signature.hex(),
    }  # fmt: skip


def adv_from_json(row: dict[str, Any]) -> KeyAdvertisement:
    return KeyAdvertisement(
        row["index"], bytes.fromhex(row["session_id"]), bytes.fromhex(row["kx"]), row["data_set"], row["counter"],
        bytes.fromhex(row["head"]), bytes.fromhex(row["signature"]),
    )  # fmt: skip


def task_json(task: Task) -> list[Any]:
    return [
        task.study_digest.hex(), task.analysis, task.step, task.attempt, task.broadcast.hex(), task.layout.hex(),
        task.codec, task.clip, task.noise, task.event,
    ]  # fmt: skip


def task_from_json(row: list[Any]) -> Task:
    study, analysis, step, attempt, broadcast, layout, codec, clip, noise, event = row
    return Task(
        bytes.fromhex(study), analysis, step, attempt, bytes.fromhex(broadcast), bytes.fromhex(layout), codec, clip,
        noise, event,
    )  # fmt: skip
