"""The exchange's state machine: collects masked inputs, agrees on who survived, opens the one sum.

    KEYS -> RATIFYING -> READY -> COLLECTING -> (AGREEING ->) UNMASKING -> READY ... ; FAILED ends the session

The sum is exact over the survivors or the round is abandoned; never a third thing. Masked inputs are ciphertext: they
are kept until the sum is out, because a site may have to be taken back out. A message that breaks the protocol raises
`PeerError` and changes nothing; the driver closes that stream. Section numbers are spec/secure-aggregation.md's.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, islice
from typing import Any

import numpy as np

from sequester.protocols import session
from sequester.protocols.errors import PeerError
from sequester.protocols.quantise import Words
from sequester.protocols.secagg import keys, masks, shamir
from sequester.protocols.secagg.member import adv_from_json, adv_json, task_from_json, task_json
from sequester.protocols.secagg.messages import (
    Abandoned,
    Ack,
    CancelAck,
    Deadline,
    Effect,
    Hold,
    KeyAdvertisement,
    MaskedInput,
    Message,
    Outcome,
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
    StudyRefusal,
    SurvivorAck,
    SurvivorProposal,
    UnmaskRequest,
    UnmaskShares,
    Withdraw,
)
from sequester.protocols.session import SessionParams, Task

MAX_CLOSINGS = 4


@dataclass(slots=True)
class _Open:
    """The open round."""

    start: RoundStart
    ctx: bytes
    inputs: dict[int, MaskedInput] = field(default_factory=dict)
    total: Words | None = None
    version: int = 0
    survivors: tuple[int, ...] = ()
    acks: dict[int, Ack] = field(default_factory=dict)
    shares: dict[int, dict[int, bytes]] = field(default_factory=dict)  # from -> of -> share
    seeds: dict[tuple[int, int], bytes] = field(default_factory=dict)  # (survivor, absent) -> k
    failed_boxes: dict[int, int] = field(default_factory=dict)  # reporter -> sender
    refused: set[int] = field(default_factory=set)
    held: set[int] = field(default_factory=set)
    waited: bool = False

    @property
    def salts(self) -> tuple[bytes, ...]:
        return tuple(self.inputs[j].salt for j in self.survivors)


class Aggregator:
    """One protocol session at the exchange."""

    def __init__(self, params: SessionParams, deadline_s: float, set_up_s: float | None = None) -> None:
        session.check_params(params)
        self.state = "KEYS"
        self.params = params
        self.last_round = 0
        self.withdrawn: set[int] = set()
        self._deadline_s = deadline_s
        self._set_up_s = deadline_s if set_up_s is None else set_up_s  # hospitals come when they come
        self._token = 0
        self._advs: dict[int, KeyAdvertisement] = {}
        self._ratifications: dict[int, Ratification] = {}
        self._known_advs: dict[bytes, KeyAdvertisement] = {}  # hash -> advertisement, across studies
        self._founded: set[tuple[int, bytes]] = set()  # (site, hash) of what was found to be signed by the site
        self._closed: dict[int, tuple[int, int]] = {}  # site -> (highest closing counter, closings)
        self._readied: set[int] = set()
        self._round: _Open | None = None
        self._cancels: dict[bytes, dict[int, CancelAck]] = {}
        self._earlier: dict[tuple[str, int], list[tuple[bytes, tuple[int, ...]]]] = {}

    @property
    def session_id(self) -> bytes:
        """The session's name."""
        return keys.session_id(self.params)

    @property
    def threshold(self) -> int:
        """t, from the roster size."""
        return session.threshold(len(self.params.roster), self.params.max_corrupt)

    @property
    def open_task(self) -> Task | None:
        """The task of the open round, None where none is open."""
        return self._round.start.task if self._round is not None else None

    def attempts(self, analysis: str, step: int) -> int:
        """Rounds of this session that were opened for one step so far."""
        return len(self._earlier.get((analysis, step), ()))

    def knows(self, advertisements: Iterable[KeyAdvertisement]) -> None:
        """Advertisements journalled in earlier studies: what a peer's `seen` may point at."""
        for adv in advertisements:
            self._known_advs[keys.seen_hash(adv)] = adv

    # ---- entries ------------------------------------------------------------------------------------------------

    def start(self) -> list[Effect]:
        """Proposes the session to every site."""
        everybody = range(len(self.params.roster))
        return [*(Send(SessionProposal(self.params), i) for i in everybody), self._clock()]

    def handle(self, sender: int, message: Message) -> list[Effect]:
        """Effects of one site's message; `PeerError` where it breaks the protocol."""
        match message:
            case KeyAdvertisement():
                return self._advertised(sender, message)
            case Ratification():
                return self._ratified(sender, message)
            case MaskedInput():
                return self._input(sender, message)
            case SurvivorAck():
                return self._ack(sender, message)
            case UnmaskShares():
                return self._shares(sender, message)
            case PairSeeds():
                return self._pair_seeds(sender, message)
            case CancelAck():
                return self._cancelled(sender, message)
            case Refusal():
                return self._refused(sender, message)
            case Hold():
                return self._hold(sender, message)
            case Withdraw():
                return self._left(sender)
            case StudyRefusal():
                return self._fail(f"site {sender} refused the study: {message.code}", (sender,))
            case Resume():
                return self.returned(sender, message)
            case _:
                raise PeerError(f"{type(message).__name__} is not for the aggregator")

    def start_round(
        self, number: int, active: tuple[int, ...], length: int, coordinates: int, task: Task, broadcast: bytes
    ) -> list[Effect]:
        """Opens a round; a round that is still open is given up."""
        if self.state in ("KEYS", "RATIFYING", "FAILED"):
            raise ValueError(f"no round starts in state {self.state}")
        if number <= self.last_round:
            raise ValueError("round numbers only grow")
        if len(active) < max(self.threshold, self.params.min_active):
            return self._fail(f"{len(active)} sites are left, {max(self.threshold, self.params.min_active)} are needed")
        roster = keys.roster_hash(self.session_id, [self._advs[i].kx for i in sorted(self._advs)])
        ctx = keys.context(roster, number, active, length, task)
        step = (task.analysis, task.step)
        cancels = {c: tuple(self._cancels.get(c, {}).values()) for c, _ in self._earlier.get(step, [])}
        start = RoundStart(self.session_id, number, active, length, coordinates, task, broadcast, (), cancels)
        self._round = _Open(start, ctx)
        self._earlier.setdefault(step, []).append((ctx, active))
        self.last_round = number
        self.state = "COLLECTING"
        row = {"round": number, "active": list(active), "length": length, "coordinates": coordinates}
        record = _record("round", {**row, "task": task_json(task)}, broadcast)
        return [Persist(record), *(Send(self._start_for(i), i) for i in active), self._clock()]

    def deadline(self, token: int) -> list[Effect]:
        """What a deadline decides; a replaced one decides nothing."""
        if token != self._token:
            return []
        r = self._round
        match self.state:
            case "KEYS":
                missing = tuple(i for i in range(len(self.params.roster)) if i not in self._advs)
                return self._fail(f"no key from sites {list(missing)}", missing)
            case "RATIFYING":
                missing = tuple(i for i in range(len(self.params.roster)) if i not in self._ratifications)
                return self._fail(f"no ratification from sites {list(missing)}", missing)
            case "COLLECTING":
                return self._close()
            case "AGREEING":
                assert r is not None
                return self._agree(tuple(sorted(r.acks)))
            case "UNMASKING":
                assert r is not None
                return self._late_shares(r)
            case _:
                return []

    def cancel(self) -> list[Effect]:
        """Asks the active sites never to open the last round, so that a retry costs no new charge (double only)."""
        r = self._round
        if r is None or self.params.mode == "strict":
            return []
        return [Send(RoundCancel(r.ctx), i) for i in r.start.active]

    def returned(self, index: int, resume: Resume | None) -> list[Effect]:
        """A site's stream stands again: what it has to be told. None: it knows of no session."""
        r = self._round
        if resume is None:
            if self.state == "KEYS" and index not in self._advs:
                return [Send(SessionProposal(self.params), index)]
            if index in self._advs:
                return self._fail(f"site {index} lost its journal: a new epoch is needed", (index,))
            return []
        if resume.session_id != self.session_id:
            if self.state == "KEYS" and index not in self._advs:  # of an earlier key epoch: this one is news to it
                return [Send(SessionProposal(self.params), index)]
            raise PeerError(f"site {index} resumes another session")
        if resume.last_round > self.last_round:
            return self._fail(f"site {index} knows round {resume.last_round}, this exchange was restored", ())
        if resume.state not in ("ADVERTISED", "RATIFIED"):
            self._readied.add(index)
        if resume.state == "ADVERTISED" and self.state == "RATIFYING":
            return [Send(self._roster_message(), index)]
        if r is None or index not in r.start.active:
            return []
        if self.state == "COLLECTING" and index not in r.inputs and resume.last_round < r.start.round:
            return [Send(self._start_for(index), index)]
        if self.state == "AGREEING" and index in r.survivors and index not in r.acks:
            return [Send(self._proposal(r), index)]
        if self.state == "UNMASKING":
            if index in r.survivors and index not in r.shares:
                return [Send(self._request(r, index), index)]
            if index not in r.survivors:
                return self._ask_seeds(r, [index], resume.last_round < r.start.round)
        return []

    # ---- set-up -------------------------------------------------------------------------------------------------

    def _advertised(self, sender: int, adv: KeyAdvertisement) -> list[Effect]:
        if self._is_of_an_earlier_epoch(sender, adv):
            return []
        if adv.index != sender or adv.session_id != self.session_id:
            raise PeerError(f"site {sender} advertised for {adv.index} or another session")
        if not keys.is_signed(self.params.roster[sender], adv.signature, keys.advertisement_bytes(adv)):
            raise PeerError(f"the advertisement of site {sender} is not signed by it")
        if self.state != "KEYS" or sender in self._advs:
            return self._closing(sender, adv)
        self._advs[sender] = adv
        self._known_advs[keys.seen_hash(adv)] = adv
        record = Persist(_record("adv", adv_json(adv)))
        if len(self._advs) < len(self.params.roster):
            return [record]
        self.state = "RATIFYING"
        roster = self._roster_message()
        return [record, *(Send(roster, i) for i in range(len(self.params.roster))), self._clock()]

    def _is_of_an_earlier_epoch(self, sender: int, message: KeyAdvertisement | Ratification) -> bool:
        """True for the last word of a site that has not heard of this epoch yet, said again on its new stream."""
        return message.session_id != self.session_id and self.state == "KEYS" and sender not in self._advs

    def _closing(self, sender: int, adv: KeyAdvertisement) -> list[Effect]:
        """A site's ledger has grown since set-up: its peers keep the newest head it signed."""
        held = self._advs.get(sender)
        if held is None or (adv.kx, adv.data_set) != (held.kx, held.data_set) or adv.counter <= held.counter:
            return []
        if adv.counter <= self._closed.get(sender, (0, 0))[0] or self._closed.get(sender, (0, 0))[1] >= MAX_CLOSINGS:
            return []  # each costs every peer a write: a site closes once, or once more after a crash
        self._closed[sender] = (adv.counter, self._closed.get(sender, (0, 0))[1] + 1)
        self._known_advs[keys.seen_hash(adv)] = adv
        return [Send(adv, i) for i in range(len(self.params.roster)) if i != sender]

    def _roster_message(self) -> Roster:
        return Roster(tuple(self._advs[i] for i in sorted(self._advs)))

    def _ratified(self, sender: int, ratification: Ratification) -> list[Effect]:
        if self._is_of_an_earlier_epoch(sender, ratification):
            return []
        roster = keys.roster_hash(self.session_id, [self._advs[i].kx for i in sorted(self._advs)])
        statement = keys.ratification_bytes(ratification.session_id, ratification.roster_hash, ratification.seen)
        if (
            ratification.index != sender
            or ratification.roster_hash != roster
            or len(ratification.seen) != len(self.params.roster)
            or not keys.is_signed(self.params.roster[sender], ratification.signature, statement)
        ):
            raise PeerError(f"the ratification of site {sender} is not its own for this roster")
        if self.state != "RATIFYING" or sender in self._ratifications:
            return []
        behind = {keys.seen_hash(a): a for a in ratification.seen_advertisements}
        for j, named in enumerate(ratification.seen):
            if not self._is_founded(j, named, behind.get(named, self._known_advs.get(named))):
                # forwarded, it would have site j refuse the set-up, and nobody could say through whose fault
                return self._fail(f"site {sender} ratified an advertisement that site {j} never signed", (sender,))
        named_advs = tuple(behind[named] for named in ratification.seen if named in behind)
        self.knows(named_advs)
        ratification = replace(ratification, seen_advertisements=named_advs)
        self._ratifications[sender] = ratification
        row = {
            "index": sender, "seen": [s.hex() for s in ratification.seen], "signature": ratification.signature.hex(),
            "behind": list(map(adv_json, ratification.seen_advertisements)),
        }  # fmt: skip
        if len(self._ratifications) == len(self.params.roster):
            self.state = "READY"
            self._token += 1
        return [Persist(_record("ratification", row))]

    def _is_founded(self, j: int, named: bytes, adv: KeyAdvertisement | None) -> bool:
        """True where `named` is empty, or names an advertisement of site j, of the data set that it joined with."""
        if not named or (j, named) in self._founded:
            return True
        if adv is None or adv.data_set != self._advs[j].data_set:
            return False
        if not keys.is_signed(self.params.roster[j], adv.signature, keys.advertisement_bytes(adv)):
            return False
        self._founded.add((j, named))
        return True

    def _start_for(self, index: int) -> RoundStart:
        """The round's start; with the ratifications, and the site's own advertisements behind them, until it is ready."""
        assert self._round is not None
        start = self._round.start
        if index in self._readied:
            return start
        attached = []
        for r in self._ratifications.values():
            own = self._known_advs.get(r.seen[index])
            attached.append(replace(r, seen_advertisements=(own,) if own is not None else ()))
        return replace(start, ratifications=tuple(attached))

    # ---- collecting ---------------------------------------------------------------------------------------------

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
        if r.total is None:
            r.total = np.array(y)
        else:
            r.total += y
        # in strict mode nobody is ever taken back out: the vector itself need not be kept
        r.inputs[sender] = message if double else replace(message, y=without_words(y))
        return self._close() if self._nobody_is_waited_for(r) else []

    def _nobody_is_waited_for(self, r: _Open) -> bool:
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

    # ---- survivors ----------------------------------------------------------------------------------------------

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

    def _proposal(self, r: _Open) -> SurvivorProposal:
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

    # ---- opening ------------------------------------------------------------------------------------------------

    def _request(self, r: _Open, to: int) -> UnmaskRequest:
        boxes = {j: r.inputs[j].seals[to] for j in r.survivors}
        return UnmaskRequest(r.ctx, r.version, r.survivors, r.salts, boxes, tuple(r.acks.values()))

    def _shares(self, sender: int, message: UnmaskShares) -> list[Effect]:
        r = self._round
        if message.index != sender:
            raise PeerError(f"site {sender} sent shares of site {message.index}")
        if r is None or self.state != "UNMASKING" or message.ctx != r.ctx or message.version != r.version:
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

    def _missing_seeds(self, r: _Open) -> list[tuple[int, int]]:
        absent = [j for j in r.start.active if j not in r.survivors]
        return [(i, j) for i in r.survivors for j in absent if (i, j) not in r.seeds]

    def _try_open(self, r: _Open) -> list[Effect]:
        if len(r.shares) < self.threshold or self._missing_seeds(r):
            return []
        seeds = self._open_seeds(r)
        if seeds is None:
            if len(r.shares) + len(r.failed_boxes) < len(r.survivors):
                return []  # more shares may still come
            return self._abandon("an opened seed does not match its commitment", tuple(sorted(r.shares)))
        total = r.total
        assert total is not None
        for j in [j for j in r.inputs if j not in r.survivors]:
            total -= r.inputs[j].y
        minus = [keys.self_key(seed, r.ctx) for seed in seeds.values()]
        plus: list[bytes] = []
        for i in r.survivors:
            for j in r.start.active:
                if j not in r.survivors:
                    # site i added +PRG(k_ij) where j > i and -PRG(k_ij) where j < i: take it out again
                    (minus if j > i else plus).append(r.seeds[(i, j)])
        masks.add_streams(total, plus, minus)
        return self._done(r)

    def _open_seeds(self, r: _Open) -> dict[int, bytes] | None:
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

    def _late_shares(self, r: _Open) -> list[Effect]:
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

    def _ask_seeds(self, r: _Open, absent: Sequence[int], with_start: bool) -> list[Effect]:
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

    # ---- ends ---------------------------------------------------------------------------------------------------

    def _done(self, r: _Open) -> list[Effect]:
        assert r.total is not None
        outcome = Outcome(r.start.round, r.ctx, r.total, r.survivors)
        self._round = None
        self.state = "READY"
        self._token += 1
        return [Persist(_record("closed", {"round": outcome.round})), outcome]

    def _abandon(self, reason: str, suspects: tuple[int, ...]) -> list[Effect]:
        r = self._round
        assert r is not None
        effects: list[Effect] = [Persist(_record("abandoned", {"round": r.start.round}))]
        effects += self.cancel()
        self._round = None
        self.state = "READY"
        self._token += 1
        return [*effects, Abandoned(r.start.round, reason, suspects)]

    def _fail(self, reason: str, suspects: tuple[int, ...] = ()) -> list[Effect]:
        if self.state == "FAILED":
            return []
        self.state = "FAILED"
        self._token += 1
        return [
            Persist(_record("failed", {"reason": reason})),
            Abandoned(self.last_round, reason, suspects, session_over=True),
        ]

    def _clock(self) -> Deadline:
        self._token += 1
        return Deadline(self._token, self._set_up_s if self.state in ("KEYS", "RATIFYING") else self._deadline_s)

    # ---- restart ------------------------------------------------------------------------------------------------

    @classmethod
    def restore(
        cls, records: Iterable[bytes], params: SessionParams, deadline_s: float, set_up_s: float | None = None
    ) -> Aggregator:
        """The aggregator whose journal this is. An open round is collecting again: sites re-send their stored bytes."""
        machine = cls(params, deadline_s, set_up_s)
        for record in records:
            head, _, payload = record.partition(b"\n")
            machine._replay(json.loads(head), payload)
        return machine

    def again(self) -> list[Effect]:
        """After `restore`: the deadline of whatever is open. Sites are told what they miss as their streams return."""
        return [self._clock()] if self.state in ("KEYS", "RATIFYING", "COLLECTING") else []

    def _replay(self, row: dict[str, Any], payload: bytes) -> None:
        match row["kind"]:
            case "adv":
                adv = adv_from_json(row)
                self._advs[adv.index] = adv
                self._known_advs[keys.seen_hash(adv)] = adv
                if len(self._advs) == len(self.params.roster):
                    self.state = "RATIFYING"
            case "ratification":
                roster = keys.roster_hash(self.session_id, [self._advs[i].kx for i in sorted(self._advs)])
                seen = tuple(bytes.fromhex(s) for s in row["seen"])
                signature = bytes.fromhex(row["signature"])
                behind = tuple(map(adv_from_json, row.get("behind", ())))
                self.knows(behind)
                self._ratifications[row["index"]] = Ratification(
                    row["index"], self.session_id, roster, seen, signature, behind
                )
                if len(self._ratifications) == len(self.params.roster):
                    self.state = "READY"
            case "round":
                self.state = "READY"
                self.start_round(
                    row["round"], tuple(row["active"]), row["length"], row["coordinates"],
                    task_from_json(row["task"]), payload,
                )  # fmt: skip
            case "closed" | "abandoned":
                self._round = None
                self.state = "READY"
            case "failed":
                self.state = "FAILED"


def without_words(y: Any) -> Any:
    """An empty vector of the same words, in place of one that need not be kept."""
    return y[:0].copy()


def _record(kind: str, row: dict[str, Any], payload: bytes = b"") -> bytes:
    return json.dumps({"kind": kind, **row}, sort_keys=True, separators=(",", ":")).encode() + b"\n" + payload
