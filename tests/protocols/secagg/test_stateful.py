"""Sessions in every order of events hypothesis finds: an honest exchange on a bad network, and a malicious one.

Under the honest exchange messages are dropped, doubled and reordered, sites and the exchange crash between any two
effects, and every round still ends: in the exact sum over its survivors, or abandoned. The malicious one sends what it
likes, to real members of which it may roll back disks; it never reads more than one sum of a round.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from attacks.adversary import LENGTH, Adversary, renamed, task
from protocols.secagg.laws import Watcher
from sequester.protocols import session
from sequester.protocols.errors import PeerError
from sequester.protocols.secagg.aggregator import Aggregator
from sequester.protocols.secagg.member_state import Admission
from sequester.protocols.secagg.messages import (
    Abandoned,
    CancelAck,
    Contribute,
    Deadline,
    Effect,
    MaskedInput,
    Message,
    Outcome,
    PairSeeds,
    Persist,
    RoundCancel,
    RoundStart,
    Send,
    UnmaskShares,
)

SHAPES = [(4, 1), (5, 1), (5, 2), (7, 1), (7, 2)]
View = tuple[RoundStart, int, tuple[int, ...]]


def weighted(**weights: int) -> list[str]:
    return [name for name, weight in weights.items() for _ in range(weight)]


class Watched(Adversary):
    """Sites that can be slow, crash after a number of effects, and are watched."""

    def __init__(self, n: int, c: int, **options: Any) -> None:
        self.watchers = [Watcher() for _ in range(n)]
        self.slow: set[int] = set()
        self.waiting: dict[int, Contribute] = {}
        self.fuse: int | None = None
        self.told: list[tuple[int, Message]] = []
        self.hearing: Message | None = None
        super().__init__(n, c, **options)

    def tell(self, i: int, message: Message) -> list[Effect]:
        self.told.append((i, message))
        self.hearing = message
        return super().tell(i, message)

    def heard(self, i: int, effects: Sequence[Effect]) -> list[Effect]:
        done: list[Effect] = []
        for effect in effects:
            if self.fuse is not None:
                if self.fuse == 0:
                    return done
                self.fuse -= 1
            if i in self.honest:
                self.watchers[i].saw(self.hearing, effect)
            if isinstance(effect, Contribute) and i in self.slow:
                self.waiting[i] = effect
                done.append(effect)
            else:
                done += super().heard(i, [effect])
        return done

    def compute(self, i: int) -> list[Effect]:
        """The vector of a slow site, late."""
        self.hearing = None
        return super().heard(i, [self.waiting.pop(i)])

    def come_back(self, i: int) -> list[Effect]:
        """Site i after a crash: from its journal, its stream opened again."""
        self.fuse = self.hearing = None
        self.waiting.pop(i, None)
        self.members[i] = self.restart(i)
        return self.heard(i, self.members[i].resume() if self.members[i].state != "IDLE" else [])

    def leave(self, i: int) -> list[Effect]:
        self.hearing = None
        return self.heard(i, self.members[i].withdraw())

    def answer(self, i: int, yes: bool) -> list[Effect]:
        self.hearing = None
        return self.heard(i, self.members[i].answer_hold(yes))

    def looks(self, i: int, holds: bool) -> None:
        """Whether a person looks at every round of site i first."""
        self.rules[i].admission = replace(self.rules[i].admission, needs_hold=holds, hold_until_unix=9 * holds)


def same_after_a_restart(sites: Watched, i: int) -> None:
    """The journal alone gives the state; a held request dies with its process, the exchange asks again."""
    now, back = sites.members[i], sites.restart(i)
    assert now.last_round == back.last_round
    assert {now.state, back.state} in ({now.state}, {"HELD", "READY"})


# ---- an honest exchange on a bad network ----------------------------------------------------------------------------


class BadNetwork(RuleBasedStateMachine):
    """Everything in flight may be lost, doubled or overtaken; machines may stop between any two effects."""

    @initialize(
        shape=st.sampled_from([(3, 1), *SHAPES]), mode=st.sampled_from(["double", "double", "double", "strict"]),
        calm=st.sampled_from([True] * 7 + [False]),
    )  # fmt: skip
    def begin(self, shape: tuple[int, int], mode: Any, calm: bool) -> None:
        self.sites = Watched(*shape, mode=mode, corrupt=(), joined=False)
        self.params = self.sites.params
        self.flight: list[tuple[int, int, Message]] = []
        self.ledger: list[bytes] = []
        self.token = 0
        self.step, self.attempt = 0, 0
        self.contexts: dict[int, bytes] = {}
        self.ended: dict[int, Outcome | Abandoned] = {}
        self.exchange = Aggregator(self.params, 1.0)
        self._did(self.exchange.start())
        if calm:
            self._settle()
            assert self.exchange.state == "READY"

    def _did(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Persist():
                    self.ledger.append(effect.record)
                case Send():
                    self.flight.append((-1, effect.to, effect.message))
                case Deadline():
                    self.token = effect.token
                case Outcome() | Abandoned():
                    self._end(effect)

    def _end(self, effect: Outcome | Abandoned) -> None:
        if isinstance(effect, Abandoned) and (effect.session_over or effect.round not in self.contexts):
            return
        assert effect.round not in self.ended, "a round ended twice"
        self.ended[effect.round] = effect
        if isinstance(effect, Outcome):
            truth = [self.sites.put_in(effect.ctx, i) for i in effect.survivors]
            assert effect.ctx == self.contexts[effect.round]
            np.testing.assert_array_equal(effect.total, np.sum(truth, axis=0, dtype=np.uint32))
            active = self.sites.active[effect.ctx]
            assert set(effect.survivors) <= set(active)
            assert len(effect.survivors) >= session.floor(self.params, len(active))

    def _said(self, i: int, effects: Sequence[Effect]) -> None:
        self.flight += [(i, -1, e.message) for e in effects if isinstance(e, Send)]

    def _deliver(self, at: int, fuse: int | None = None) -> None:
        sender, to, message = self.flight.pop(at)
        if to >= 0:
            self.sites.fuse = fuse
            self._said(to, self.sites.tell(to, message))
            if self.sites.fuse == 0:
                self._said(to, self.sites.come_back(to))
            self.sites.fuse = None
        else:
            self._heard(sender, message)

    def _heard(self, sender: int, message: Message) -> None:
        try:
            self._did(self.exchange.handle(sender, message))
        except PeerError:  # the driver closes that stream; the site opens it again
            self._reconnect(sender)

    def _reconnect(self, i: int) -> None:
        self.flight = [f for f in self.flight if i not in (f[0], f[1])]
        member = self.sites.members[i]
        self.sites.hearing = None
        if member.state == "IDLE":
            self._did(self.exchange.returned(i, None))
        else:
            self._said(i, self.sites.heard(i, member.resume()))

    def _settle(self) -> None:
        while self.flight:
            self._deliver(0)

    @property
    def _is_open(self) -> bool:
        return self.exchange.last_round in self.contexts and self.exchange.last_round not in self.ended

    def _one(self, data: st.DataObject) -> int:
        return int(data.draw(st.integers(0, len(self.flight) - 1), "message"))

    def _everyone(self) -> st.SearchStrategy[int]:
        return st.integers(0, self.sites.n - 1)

    def start_round(self, data: st.DataObject) -> None:
        if self.exchange.state in ("KEYS", "RATIFYING", "FAILED"):
            return
        n, most = self.sites.n, self.sites.n - self.sites.t
        most *= data.draw(st.sampled_from([0, 0, 0, 1]), "leave some out")
        out = data.draw(st.sets(self._everyone(), max_size=most), "left out") | self.exchange.withdrawn
        active = tuple(i for i in range(n) if i not in out)
        retry = self.step > 0 and data.draw(st.booleans(), "retry")
        self.step, self.attempt = (self.step, self.attempt + 1) if retry else (self.step + 1, 0)
        number = self.exchange.last_round + 1
        if self._is_open:
            self.ended[self.exchange.last_round] = Abandoned(self.exchange.last_round, "given up for the next")
        what = task(self.step, self.attempt)
        effects = self.exchange.start_round(number, active, LENGTH, LENGTH, what, b"model")
        if self.exchange.state != "FAILED":
            start = next(e.message for e in effects if isinstance(e, Send) and isinstance(e.message, RoundStart))
            ctx = self._ctx(start)
            self.contexts[number], self.sites.active[ctx] = ctx, active
        self._did(effects)

    def _ctx(self, start: RoundStart) -> bytes:
        self.sites.advs = [self.exchange._advs[i] for i in range(self.sites.n)]
        return self.sites.ctx(start)

    def deliver_in_order(self, data: st.DataObject) -> None:
        for _ in range(data.draw(st.integers(1, 40), "how many")):
            if self.flight:
                self._deliver(0)

    def some_are_cut_off(self, data: st.DataObject) -> None:
        """A round in which some never deliver and some fall silent once they did; deadlines pass until it ends."""
        if not self._is_open:
            self.start_round(data)
        before = data.draw(st.sets(self._everyone(), max_size=1), "never deliver")
        after = data.draw(st.sets(self._everyone(), max_size=2), "deliver and fall silent")
        for _ in range(data.draw(st.integers(1, 4), "deadlines")):
            while self.flight:
                sender, to, message = self.flight[0]
                silent = after & {sender, to} and not isinstance(message, RoundStart | MaskedInput)
                if silent or before & {sender, to}:
                    self.flight.pop(0)
                else:
                    self._deliver(0)
            self._did(self.exchange.deadline(self.token))

    def deliver_out_of_order(self, data: st.DataObject) -> None:
        if self.flight:
            self._deliver(self._one(data))

    def crash_between_two_effects(self, data: st.DataObject) -> None:
        if self.flight:
            self._deliver(self._one(data), data.draw(st.integers(0, 3), "effects performed"))

    def drop(self, data: st.DataObject) -> None:
        if self.flight:
            self.flight.pop(self._one(data))

    def duplicate(self, data: st.DataObject) -> None:
        if self.flight:
            at = self._one(data)
            self.flight.insert(data.draw(st.sampled_from([at, len(self.flight)]), "again at"), self.flight[at])

    def deadline(self, data: st.DataObject) -> None:
        self._did(self.exchange.deadline(self.token))

    def stream_breaks(self, data: st.DataObject) -> None:
        self._reconnect(data.draw(self._everyone()))

    def exchange_restarts(self, data: st.DataObject) -> None:
        self.exchange = Aggregator.restore(self.ledger, self.params, 1.0)
        self.flight = []
        self._did(self.exchange.again())
        for i in range(self.sites.n):
            self._reconnect(i)

    def slow(self, data: st.DataObject) -> None:
        self.sites.slow ^= {data.draw(self._everyone(), "site")}

    def compute(self, data: st.DataObject) -> None:
        if self.sites.waiting:
            i = data.draw(st.sampled_from(sorted(self.sites.waiting)), "site")
            self._said(i, self.sites.compute(i))

    def look(self, data: st.DataObject) -> None:
        self.sites.looks(data.draw(self._everyone(), "site"), data.draw(st.booleans(), "holds"))

    def answer(self, data: st.DataObject) -> None:
        for i in range(self.sites.n):
            if self.sites.members[i].state == "HELD":
                self._said(i, self.sites.answer(i, data.draw(st.booleans(), "yes")))

    def withdraw(self, data: st.DataObject) -> None:
        if len(self.contexts) > 1 and not self.exchange.withdrawn:
            i = data.draw(self._everyone(), "site")
            self._said(i, self.sites.leave(i))

    EVENTS = weighted(
        deliver_in_order=9, some_are_cut_off=6, start_round=4, deadline=2, drop=2, duplicate=4, deliver_out_of_order=3,
        stream_breaks=2, crash_between_two_effects=3, exchange_restarts=1, slow=1, compute=2, look=1, answer=2,
        withdraw=1,
    )  # fmt: skip

    @rule(data=st.data(), event=st.sampled_from(EVENTS))
    def event(self, data: st.DataObject, event: str) -> None:
        getattr(self, event)(data)

    @invariant()
    def a_restart_changes_nothing(self) -> None:
        if not hasattr(self, "sites"):
            return
        for i, _ in self.sites.told[-1:]:
            same_after_a_restart(self.sites, i)

    def teardown(self) -> None:
        """Every round ends once the network is calm and deadlines pass."""
        if not hasattr(self, "sites"):
            return
        for _ in range(2 * self.sites.n + 4):
            self._settle()
            if not self._is_open or self.exchange.state == "FAILED":
                return
            self._did(self.exchange.deadline(self.token))
        raise AssertionError(f"the round never ends: {self.exchange.state}")


# ---- a malicious exchange -------------------------------------------------------------------------------------------


class MaliciousExchange(RuleBasedStateMachine):
    """k <= c colluders from the start; up to c - k disks are restored to where an ack, a release or a cancel was not."""

    @initialize(
        shape=st.sampled_from(SHAPES), k=st.integers(0, 2), absent=st.sampled_from([2, 2, 1, 0]),
        mode=st.sampled_from(["double", "double", "double", "strict"]), data=st.data(),
    )  # fmt: skip
    def begin(self, shape: tuple[int, int], k: int, absent: int, mode: Any, data: st.DataObject) -> None:
        n, c = shape
        k = min(k, c)
        absent = 0 if mode == "strict" else min(absent, n - session.threshold(n, c))
        self.a = Watched(n, c, mode=mode, absent=absent, corrupt=range(n - k, n))
        charges = data.draw(st.sampled_from([2, 50, 50]), "charges")
        for rules in self.a.rules:
            rules.admission = Admission(charges, exact=False)
        self.spoiled = k
        self.restored: set[int] = set()  # disks that lost something, counted among the c or not
        self.starts: list[RoundStart] = []
        self.views: list[View] = []
        self.past: list[tuple[int, Message]] = []
        self.sums: dict[bytes, list[frozenset[int]]] = {}
        self.rounds: dict[int, list[bytes]] = {}
        self.number = self.step = self.checked = 0
        self.epoch = 0
        self.start_round(data)

    def _site(self, data: st.DataObject, label: str = "site") -> int:
        return int(data.draw(st.integers(0, self.a.n - 1), label))

    def _some(self, data: st.DataObject, among: Sequence[int], label: str) -> tuple[int, ...]:
        """A subset, more often all of them or all but one."""
        most = data.draw(st.sampled_from([0, 0, 1, 1, 2, len(among)]), f"{label}, missing at most")
        out = data.draw(st.sets(st.sampled_from(sorted(among)), max_size=most), "without") if most else set()
        return tuple(i for i in sorted(among) if i not in out)

    def _start(self, data: st.DataObject) -> RoundStart:
        back = data.draw(st.sampled_from([0, 0, 0, 0, 1, 2]), "start")
        return self.starts[-1 - min(back, len(self.starts) - 1)]

    def start_round(self, data: st.DataObject) -> None:
        self.number += data.draw(st.sampled_from([1, 1, 1, 1, 0]), "next round")
        self.number = max(self.number, 1)
        most = data.draw(st.sampled_from([0, 0, 0, 1, 2]), "left out at most")
        out = data.draw(st.sets(st.integers(0, self.a.n - 1), max_size=most), "left out")
        active = tuple(i for i in range(self.a.n) if i not in out)
        retry = bool(self.starts) and data.draw(st.booleans(), "retry")
        self.step += not retry
        attempt = 1 + self.starts[-1].task.attempt if retry else 0
        model = data.draw(st.sampled_from([b"model", b"model", b"other"]), "broadcast")
        start = self.a.begin(
            self.number, active, step=self.step, attempt=attempt, broadcast=model, cancels=self._cancels()
        )
        self.starts.append(start)
        contexts = self.rounds.setdefault(self.number, [])
        if (ctx := self.a.ctx(start)) not in contexts:
            contexts.append(ctx)
        for i in self._some(data, active, "delivered to"):
            self.a.tell(i, start)

    def _cancels(self) -> dict[bytes, tuple[CancelAck, ...]]:
        """Cancels of every context of this step: honest ones as given, corrupt ones at will."""
        given = [m for i, m in self.a.words if isinstance(m, CancelAck) and i in self.a.honest]
        found = {}
        for start in self.starts:
            ctx = self.a.ctx(start)
            forged = self.a.cancelled(ctx, self.a.corrupt)
            found[ctx] = tuple({m.index: m for m in (*given, *forged) if m.ctx == ctx}.values())
        return found

    def whole_round(self, data: st.DataObject) -> None:
        self.start_round(data)
        for i in self.starts[-1].active:
            self.a.tell(i, self.starts[-1])
        self.open_in_full(data)

    def deliver_start(self, data: st.DataObject) -> None:
        self.a.tell(self._site(data), self._start(data))

    def _new_view(self, data: st.DataObject) -> View:
        start = self._start(data)
        most = data.draw(st.sampled_from([1, 1, 1, 2, len(start.active)]), "survivors, missing at most")
        out = data.draw(st.sets(st.sampled_from(start.active), min_size=most < 2, max_size=most), "without")
        version = data.draw(st.sampled_from([1, 1, 2, 2, 3, 4]), "version")
        self.views.append((start, version, tuple(i for i in start.active if i not in out)))
        return self.views[-1]

    def _view(self, data: st.DataObject) -> View:
        """One of the newest sets that were proposed, or a new one."""
        back = data.draw(st.integers(0, min(3, len(self.views))), "view")
        return self.views[-back] if back else self._new_view(data)

    def propose(self, data: st.DataObject) -> None:
        start, version, survivors = self._new_view(data)
        for i in self._some(data, range(self.a.n), "asked"):
            self.a.propose(i, self.a.ctx(start), version, survivors)

    def agree_and_open(self, data: st.DataObject) -> None:
        start, version, survivors = self._new_view(data)
        acks = self.a.agree(self.a.ctx(start), version, survivors)
        for i in self._some(data, start.active, "opened at"):
            if i in survivors:
                self.a.release(i, self.a.ctx(start), version, survivors, acks)
            else:
                self.a.ask_seeds(i, self.a.ctx(start), version, survivors, acks, start=start)

    def open_in_full(self, data: st.DataObject) -> None:
        start = self._start(data)
        for i in self._some(data, start.active, "opened at"):
            self.a.release(i, self.a.ctx(start), 0, start.active)

    def open_a_part(self, data: st.DataObject) -> None:
        start, version, survivors = self._view(data)
        acks = self.a.acks(self.a.ctx(start), version, survivors, survivors)
        for i in self._some(data, start.active, "opened at"):
            self.a.release(i, self.a.ctx(start), version, survivors, acks)

    def ask_seeds(self, data: st.DataObject) -> None:
        start, version, survivors = self._view(data)
        acks = self.a.acks(self.a.ctx(start), version, survivors, survivors)
        wanted = self._some(data, survivors, "wanted") if survivors else ()
        shown = start if data.draw(st.booleans(), "with the start") else None
        outside = [i for i in range(self.a.n) if i not in survivors]
        asked = outside if outside and data.draw(st.booleans(), "outside only") else range(self.a.n)
        for i in self._some(data, asked, "asked"):
            self.a.ask_seeds(i, self.a.ctx(start), version, survivors, acks, wanted, shown)

    def cancel(self, data: st.DataObject) -> None:
        start = self._start(data)
        for i in self._some(data, start.active, "cancelled at"):
            self.a.tell(i, RoundCancel(self.a.ctx(start)))

    def replay_at_any_site(self, data: st.DataObject) -> None:
        """Words of this session and of earlier ones, meant for whomever."""
        self.a.tell(self._site(data), self._earlier(data))

    def _earlier(self, data: st.DataObject) -> Message:
        heap = self.past if self.past and data.draw(st.booleans(), "another session") else self.a.told
        return heap[-1 - data.draw(st.integers(0, min(30, len(heap) - 1)), "back")][1]

    def crash(self, data: st.DataObject) -> None:
        i, message = self._site(data), self._earlier(data)
        self.a.fuse = data.draw(st.integers(0, 3), "effects performed")
        self.a.tell(i, message)
        self.a.come_back(i)

    def restore_an_old_disk(self, data: st.DataObject) -> None:
        """Any prefix. Over a said ack, release or cancel the site counts among the c, as in strict after any input."""
        if not self.a.honest:
            return
        i = data.draw(st.sampled_from(self.a.honest), "site")
        lose = data.draw(st.sampled_from([1, 1, 1, 1, 1, 2, 2, 3, 99]), "records lost")
        cut = max(0, len(self.a.journals[i]) - lose)
        lost = list(map(_kind, self.a.journals[i][cut:]))
        tells = {"acked", "released", "missed", "cancelled"} | ({"input"} if self.a.params.mode == "strict" else set())
        if tells & set(lost):
            if self.spoiled >= self.a.c or "withdrawn" in map(_kind, self.a.journals[i]):
                return
            self.spoiled += 1
            self.a.corrupts(i)
        if lost:
            self.restored.add(i)
            self.a.watchers[i].restored(cut)
            self.a.rules[i].epoch = self.epoch
            self.a.roll_back(i, cut)

    def look(self, data: st.DataObject) -> None:
        self.a.looks(self._site(data), data.draw(st.booleans(), "holds"))

    def answer(self, data: st.DataObject) -> None:
        for i in range(self.a.n):
            if self.a.members[i].state == "HELD":
                self.a.answer(i, data.draw(st.booleans(), "yes"))

    def slow(self, data: st.DataObject) -> None:
        self.a.slow ^= {self._site(data)}

    def compute(self, data: st.DataObject) -> None:
        if self.a.waiting:
            self.a.compute(data.draw(st.sampled_from(sorted(self.a.waiting)), "site"))

    def withdraw(self, data: st.DataObject) -> None:
        if len(self.starts) > 2 and not any(m.state == "WITHDRAWN" for m in self.a.members):
            self.a.leave(data.draw(st.sampled_from(self.a.honest or range(self.a.n)), "site"))

    def new_epoch(self, data: st.DataObject) -> None:
        """All sites meet again; what was said before can still be said again."""
        if self.epoch > 1 or len(self.starts) < 3:
            return
        self._goal()
        self.epoch += 1
        self.past += self.a.told
        before = self.a
        self.a = Watched(
            before.n, before.c, mode=before.params.mode, absent=before.params.max_absent, corrupt=before.corrupt,
            joined=False,
        )  # fmt: skip
        self.a.entropy = before.entropy  # the same seed again would give the same keys
        self.a.params = renamed(self.a.params, epoch=self.epoch)
        for i, rules in enumerate(self.a.rules):
            rules.epoch, rules.admission = self.epoch - 1, before.rules[i].admission
            rules.seen = before.rules[i].seen
            self.a.members[i] = self.a.fresh(i)
        for i in range(self.a.n):
            self.a.looks(i, False)
        self.a.advertise()
        self.a.ratify()
        self.starts, self.views, self.rounds, self.sums = [], [], {}, {}
        self.number = self.step = self.checked = 0
        self.restored = set()
        self.start_round(data)

    EVENTS = weighted(
        start_round=3, whole_round=3, deliver_start=2, propose=5, agree_and_open=6, open_in_full=5, open_a_part=5,
        ask_seeds=5, cancel=2, replay_at_any_site=3, crash=2, restore_an_old_disk=3, look=1, answer=2, slow=1, compute=2,
        withdraw=1, new_epoch=1,
    )  # fmt: skip

    @rule(data=st.data(), event=st.sampled_from(EVENTS))
    def event(self, data: st.DataObject, event: str) -> None:
        getattr(self, event)(data)

    # ---- what must hold -----------------------------------------------------------------------------------------

    @invariant()
    def the_goal(self) -> None:
        if hasattr(self, "a") and len(self.a.words) > self.checked:
            self._goal()
            self.checked = len(self.a.words)

    def _goal(self) -> None:
        touched = {getattr(m, "ctx", b"") for _, m in self.a.words[self.checked :]}
        for contexts in self.rounds.values():
            if touched & set(contexts):
                sums = self.a.learns_at_most_one_sum(*contexts)
                for ctx in contexts:
                    self.sums[ctx] = sums and self.a.opened(ctx)
                    self._never_shares_and_a_seed(ctx)
        self._no_sum_without_a_charge()

    def _never_shares_and_a_seed(self, ctx: bytes) -> None:
        """Never t shares of b_j and a seed of a j left out, from what honest sites said and c clones hold."""
        excluded = {i for i, m in self.a.words if isinstance(m, PairSeeds) and m.ctx == ctx}
        excluded |= {j for _, m in self.a.words if isinstance(m, UnmaskShares) and m.ctx == ctx for j in m.pair_seeds}
        for (c, j, _), shares in self.a.shares.items():
            if c == ctx and j in self.a.honest:
                holders = set(shares) | {k + 1 for k in self.a.corrupt if k in self.a.active[ctx]}
                assert len(holders) < self.a.t or j not in excluded, f"site {j} is padded by nothing"

    def _no_sum_without_a_charge(self) -> None:
        """A site is in no more sums of a step than it charged: a covered retry's first attempts never open."""
        for i in self.a.honest:
            if i in self.restored:
                continue
            for step in {s.task.step for s in self.starts}:
                contexts = {self.a.ctx(s) for s in self.starts if s.task.step == step}
                sums = [some for ctx in contexts for some in self.sums.get(ctx, []) if i in some]
                assert len(sums) <= self.a.watchers[i].charges["glm", step], f"site {i}, step {step}"

    @invariant()
    def a_restart_changes_nothing(self) -> None:
        if hasattr(self, "a"):
            for i, _ in self.a.told[-1:]:
                same_after_a_restart(self.a, i)


def _kind(record: bytes) -> str:
    return str(json.loads(record)["kind"])


SHORT = settings(
    max_examples=60, stateful_step_count=40, derandomize=True, deadline=None, database=None,
    suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
)  # fmt: skip
LONG = settings(SHORT, max_examples=3000, stateful_step_count=80, derandomize=False)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [BadNetwork, MaliciousExchange])
def test_no_short_sequence_of_events_breaks_a_law(machine: type[RuleBasedStateMachine]) -> None:
    run_state_machine_as_test(machine, settings=SHORT)  # type: ignore[no-untyped-call]


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("machine", [BadNetwork, MaliciousExchange])
def test_no_long_sequence_of_events_breaks_a_law(machine: type[RuleBasedStateMachine]) -> None:
    run_state_machine_as_test(machine, settings=LONG)  # type: ignore[no-untyped-call]
