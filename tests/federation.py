"""A whole study in one process, over real bytes and without a socket: every site, the exchange, every frame between.

Each site is the product's `Member` behind the product's `StudyRules` and ledger; its vector goes from the analysis
through the gate (`noise_share`, `ring_vector`) under its masks; every message is encoded, serialised, parsed and read
again. Only the transport is missing: frames are delivered in order, and a deadline passes when nothing is under way.
"""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from sequester.client.gate import contribution
from sequester.client.gate.ledger import Ledger
from sequester.client.gate.rules import StudyRules, Witnesses
from sequester.client.policy import Policy
from sequester.protocols import arrays, privacy
from sequester.protocols import exchange_pb2 as pb
from sequester.protocols.analyses import loop
from sequester.protocols.analyses.analysis import Broadcast, Finished, Layout, Sums
from sequester.protocols.analyses.cohort import Cohort
from sequester.protocols.analyses.registry import Plan, analysis_of
from sequester.protocols.analyses.training import TrainingPlan, local_round
from sequester.protocols.errors import RoundAbandoned
from sequester.protocols.packets import packed, unpacked
from sequester.protocols.quantise import RingVector
from sequester.protocols.secagg.aggregator import Aggregator
from sequester.protocols.secagg.member import Member
from sequester.protocols.secagg.messages import (
    Abandoned,
    Contribute,
    Deadline,
    Effect,
    MaskedInput,
    Message,
    Outcome,
    Persist,
    Send,
    StoreOutbox,
)
from sequester.protocols.signing import raw_public
from sequester.protocols.study import Study
from sequester.protocols.wire import Limits, Reader, check_hello, frames, hello

EXCHANGE = -1
_DEADLINES = 8  # no round of this protocol needs more: one to close, N - t shrinkings at most, two to open


def identity(name: str) -> Ed25519PrivateKey:
    """The identity key of the hospital of that name: the same in every run."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"identity of {name}".encode()).digest())


def sites(names: Sequence[str]) -> list[dict[str, str]]:
    """What a study's `sites` says of those hospitals."""
    return [{"id": name, "key": raw_public(identity(name)).hex()} for name in names]


@dataclass(frozen=True, slots=True)
class Absent:
    """Sites that never deliver in a round, and sites that deliver and then fall silent."""

    before: frozenset[int] = frozenset()
    after: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Round:
    """What one round opened, and what stood under the masks: signed integers, noise included."""

    number: int
    analysis: str
    step: int
    attempt: int
    survivors: tuple[int, ...]
    opened: NDArray[np.int64]
    plain: Mapping[int, NDArray[np.int64]]

    @property
    def plain_sum(self) -> list[int]:
        """The survivors' integers added as Python integers, which cannot wrap."""
        total = np.sum([self.plain[i].astype(object) for i in self.survivors], axis=0)
        return [int(value) for value in total]


@dataclass(slots=True)
class Site:
    """One hospital: its cohort, its machine, and what it made durable."""

    cohort: Cohort
    member: Member
    ledger: Ledger
    journal: list[bytes] = field(default_factory=list)
    outbox: MaskedInput | None = None
    bytes_up: int = 0


@contextmanager
def seeded_noise(seed: int) -> Iterator[None]:
    """The gates' noise keys come from a seed, so that a test of accuracy raises no false alarm."""
    system = contribution.os
    contribution.os = SimpleNamespace(urandom=random.Random(seed).randbytes)  # type: ignore[assignment]
    try:
        yield
    finally:
        contribution.os = system


class Federation:
    """`absent` says who is missing, by round number; `policy` is every site's. `run` takes the study to its end."""

    def __init__(
        self,
        study: Study,
        cohorts: Mapping[str, Cohort],
        folder: Path,
        *,
        absent: Mapping[int, Absent] | None = None,
        policy: Policy | None = None,
        seed: int = 1,
    ) -> None:
        assert tuple(sorted(cohorts)) == study.site_ids
        self.study = study
        self.digest = privacy.study_digest(study)
        self.absent = dict(absent or {})
        self.rounds: list[Round] = []
        self.abandoned: list[Abandoned] = []
        self.params = privacy.session_params(study)
        policy = policy or Policy(exact=("linear", "glm", "evaluation"), exact_iterative=True)
        entropy = random.Random(seed).randbytes
        self.sites = [
            self._site(i, name, cohorts[name], folder / name, policy, entropy) for i, name in enumerate(study.site_ids)
        ]
        self.aggregator = Aggregator(self.params, float(study.aggregation.round_deadline_s))
        limits = Limits.for_study(study)
        ends = range(len(self.sites))
        self._readers = {(i, EXCHANGE): Reader(limits) for i in ends} | {(EXCHANGE, i): Reader(limits) for i in ends}
        self._queue: deque[tuple[int, int, bytes]] = deque()
        self._token = 0
        self._ended: Outcome | Abandoned | None = None
        self._plain: dict[int, NDArray[np.int64]] = {}
        for reader in self._readers.values():  # C30: Hello both ways before anything else
            greeting = pb.Frame.FromString(hello(self.params.study_digest).SerializeToString())
            check_hello(reader.take(greeting), self.params.study_digest)

    def _site(
        self, i: int, name: str, cohort: Cohort, folder: Path, policy: Policy, entropy: Callable[[int], bytes]
    ) -> Site:
        Ledger.found(folder, policy)
        ledger = Ledger(folder)
        witnesses = Witnesses(folder / "witnesses.json")
        pinned = frozenset(self.study.roster)
        rules = StudyRules(self.study, self.digest, policy, ledger, pinned, witnesses, -1)
        return Site(cohort, Member(self.params, i, identity(name).sign, rules, entropy), ledger)

    def close(self) -> None:
        """Release every ledger."""
        for site in self.sites:
            site.ledger.close()

    # ---- the study ----------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Finished]:
        """Every analysis of the study; `RoundAbandoned` with the reason where it cannot go on."""
        self._aggregator_did(self.aggregator.start())
        self._deliver()
        if self.aggregator.state != "READY":
            assert isinstance(self._ended, Abandoned), self.aggregator.state
            raise RoundAbandoned(self._ended.reason)
        try:
            return loop.analyses(self.study, self._sum)
        finally:
            self.close()

    def _sum(self, plan: Plan, step: int, broadcast: Broadcast) -> Sums:
        """The opened sums of one step; the next attempt where a round is abandoned and a spare is left."""
        data = arrays.encode(broadcast)
        for attempt in range(privacy.spares(self.study, plan) + 1):
            outcome = self._round(plan, step, attempt, data)
            if isinstance(outcome, Outcome):
                codec, layout = privacy.codec(self.study), privacy.layout(self.study, plan, step)
                opened = codec.from_sum(outcome.total, layout.length)
                self.rounds.append(
                    Round(outcome.round, plan.name, step, attempt, outcome.survivors, opened, dict(self._plain))
                )
                return layout.split(codec.decode(opened))
            self.abandoned.append(outcome)
            if outcome.session_over:
                break
        raise RoundAbandoned(f"{plan.name}, step {step + 1}: {self.abandoned[-1].reason}")

    def _round(self, plan: Plan, step: int, attempt: int, broadcast: bytes) -> Outcome | Abandoned:
        layout = privacy.layout(self.study, plan, step)
        active = tuple(i for i in range(len(self.sites)) if i not in self.aggregator.withdrawn)
        task = privacy.task_for(self.study, plan, step, attempt, broadcast)
        words = privacy.codec(self.study).words(layout.length)
        self._ended, self._plain = None, {}
        number = self.aggregator.last_round + 1
        self._aggregator_did(self.aggregator.start_round(number, active, words, layout.length, task, broadcast))
        self._deliver()
        for _ in range(_DEADLINES):
            if self._ended is None:
                self._aggregator_did(self.aggregator.deadline(self._token))
                self._deliver()
        assert self._ended is not None, "the round has no end"
        return self._ended

    # ---- bytes --------------------------------------------------------------------------------------------------

    def _post(self, sender: int, to: int, message: Message) -> None:
        data = [packed(frame) for frame in frames(message)]
        if sender != EXCHANGE:
            self.sites[sender].bytes_up += sum(map(len, data))
            absent = self.absent.get(self.aggregator.last_round, Absent())
            if sender in absent.before | absent.after and not (
                sender in absent.after and isinstance(message, MaskedInput)
            ):
                return
        self._queue.extend((sender, to, frame) for frame in data)

    def _deliver(self) -> None:
        while self._queue:
            sender, to, data = self._queue.popleft()
            message = self._readers[sender, to].take(unpacked(data))
            if message is None:
                continue
            if to == EXCHANGE:
                self._aggregator_did(self.aggregator.handle(sender, message))
            else:
                self._site_did(to, self.sites[to].member.handle(message))

    # ---- effects ------------------------------------------------------------------------------------------------

    def _aggregator_did(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send():
                    self._post(EXCHANGE, effect.to, effect.message)
                case Deadline():
                    self._token = effect.token
                case Outcome() | Abandoned():
                    self._ended = effect

    def _site_did(self, i: int, effects: Sequence[Effect]) -> None:
        site = self.sites[i]
        for effect in effects:
            match effect:
                case Persist():
                    if (charge := effect.charge) is not None:
                        site.ledger.spend(self.digest, charge.analysis, charge.step, charge.attempt)
                    site.journal.append(effect.record)
                case StoreOutbox():
                    site.outbox = effect.message
                case Contribute() if i not in self.absent.get(effect.round, Absent()).before:
                    self._site_did(i, self._contribute(i, effect))
                case Send():
                    self._post(i, EXCHANGE, effect.message)

    def _contribute(self, i: int, asked: Contribute) -> list[Effect]:
        """What the gate does with compute's arrays (`client/gate/session.py`)."""
        study, plan, step = self.study, self.study.analysis(asked.task.analysis), asked.task.step
        layout, broadcast = privacy.layout(study, plan, step), arrays.decode(asked.broadcast)
        if isinstance(plan, TrainingPlan) and plan.local_steps > 1:
            words = self._stepped(i, asked, plan, layout, broadcast)
        else:
            share = contribution.noise_share(study, plan, step, asked.noise_adders)
            words = contribution.ring_vector(study, plan, layout, self._computed(i, plan, broadcast, step), share)
        self._plain[i] = privacy.codec(study).from_sum(words.copy(), layout.length)
        return self.sites[i].member.contribute(words)

    def _stepped(
        self, i: int, asked: Contribute, plan: TrainingPlan, layout: Layout, broadcast: Broadcast
    ) -> RingVector:
        study, step = self.study, asked.task.step
        walk = local_round(plan, study, layout, broadcast)
        weights = next(walk)
        while True:
            share = contribution.noise_share(study, plan, step, asked.noise_adders)
            sums = self._computed(i, plan, weights, step)
            try:
                weights = walk.send(contribution.noised_sum(study, plan, layout, sums, share))
            except StopIteration as over:
                return contribution.moved_words(study, plan, layout, over.value)

    def _computed(self, i: int, plan: Plan, broadcast: Broadcast, step: int) -> Sums:
        return analysis_of(plan).contribution(plan, self.study, self.sites[i].cohort, broadcast, step)
