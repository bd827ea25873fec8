"""A site's rounds: whether one is allowed, what it is charged, the one masked vector (section 5; C8 to C10, C20, C24, C27)."""

from __future__ import annotations

import hashlib
from typing import Any

from sequester.protocols import session
from sequester.protocols.errors import PeerError, PrivacyError, SequesterError
from sequester.protocols.quantise import RingVector
from sequester.protocols.secagg import keys, masks, shamir
from sequester.protocols.secagg.member_set_up import SetUp
from sequester.protocols.secagg.member_state import Admission, Round
from sequester.protocols.secagg.messages import (
    Contribute,
    Effect,
    Hold,
    MaskedInput,
    MaskedVector,
    Persist,
    Refusal,
    RoundStart,
    Send,
    StoreOutbox,
)
from sequester.protocols.secagg.records import as_record, input_record, task_json
from sequester.protocols.session import Task

MAX_WORDS = 2**28
MAX_HOLDS = 64  # rounds that wait for a person, one after another, without one that was contributed


class Rounds(SetUp):
    """From READY to MASKED."""

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
                record = as_record("held", {"round": start.round, "until": admission.hold_until_unix})
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
        return [*effects, Persist(as_record("round", row), charge), self._awaited]

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
        self._round = Round(start.round, ctx, start.active, start.length, floor, start.task)
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

    def contribute(self, vector: RingVector) -> list[Effect]:
        """Masks the vector of the round that asked for it, in its own memory: no unmasked word is left anywhere.

        Empty, and the vector overwritten, where that round is over.
        """
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
        signature = self._sign(keys.input_bytes(r.ctx, r.number, i, salt, commit))
        masks.add_streams(vector, plus, minus)
        self._outbox = MaskedInput(i, r.ctx, salt, commit, seals, signature, MaskedVector(vector))
        r.salt = salt
        self.state = "MASKED"
        return [StoreOutbox(self._outbox), Persist(input_record(self._outbox)), Send(self._outbox)]

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
            return [Persist(as_record("unheld", {"round": start.round})), Send(Refusal())]
        return self._start(start, decided=True)
