"""What is said in a protocol session, and what a state machine asks of its driver.

Letters follow Bonawitz et al. 2017 (y masked input, b self-mask seed, t threshold, U survivors); see
protocols/README.md for the glossary. Vectors and broadcasts are part of these values; `wire.py` chunks them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NewType

import numpy as np

from sequester.protocols.quantise import Words
from sequester.protocols.session import SessionParams, Task

# A vector in the ring after its masks: it may leave. Before them it is a `quantise.RingVector`: two types, never swapped.
MaskedVector = NewType("MaskedVector", np.ndarray)


@dataclass(frozen=True, slots=True)
class Resume:
    session_id: bytes
    last_round: int
    state: str


@dataclass(frozen=True, slots=True)
class SessionProposal:
    params: SessionParams


@dataclass(frozen=True, slots=True)
class KeyAdvertisement:
    """adv_i: a fresh X25519 key and the head of the site's ledger, signed by its identity."""

    index: int
    session_id: bytes
    kx: bytes
    data_set: str
    counter: int
    head: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Roster:
    advertisements: tuple[KeyAdvertisement, ...]


@dataclass(frozen=True, slots=True)
class Ratification:
    """`seen[j]` is the hash of the highest advertisement journalled for (site j, its data set), b"" where none.

    A site sends the advertisements that it names along; the exchange forwards to site j only j's own one, if any.
    """

    index: int
    session_id: bytes
    roster_hash: bytes
    seen: tuple[bytes, ...]
    signature: bytes
    seen_advertisements: tuple[KeyAdvertisement, ...] = ()


@dataclass(frozen=True, slots=True)
class CancelAck:
    index: int
    ctx: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class RoundStart:
    session_id: bytes
    round: int
    active: tuple[int, ...]
    length: int  # ring words
    coordinates: int  # numbers before packing, padding included
    task: Task
    broadcast: bytes  # arrays.encode(...); its SHA-256 is task.broadcast
    ratifications: tuple[Ratification, ...] = ()
    cancels: Mapping[bytes, tuple[CancelAck, ...]] = field(default_factory=dict)  # earlier ctx -> acks


@dataclass(frozen=True, slots=True)
class MaskedInput:
    """`y` and, in double mode, one sealed share for every active site. Strict: salt, commit and seals are empty."""

    index: int
    ctx: bytes
    salt: bytes
    commit: bytes
    seals: Mapping[int, bytes]
    signature: bytes
    y: MaskedVector


@dataclass(frozen=True, slots=True)
class Ack:
    index: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class SurvivorProposal:
    ctx: bytes
    version: int
    survivors: tuple[int, ...]
    salts: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class SurvivorAck:
    index: int
    version: int
    digest: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class UnmaskRequest:
    ctx: bytes
    version: int
    survivors: tuple[int, ...]
    salts: tuple[bytes, ...]
    seals: Mapping[int, bytes]  # j in U -> seal_j->i
    acks: tuple[Ack, ...] = ()


@dataclass(frozen=True, slots=True)
class UnmaskShares:
    index: int
    ctx: bytes
    version: int
    shares: Mapping[int, bytes]  # j in U -> share of b_j, 32 bytes
    pair_seeds: Mapping[int, bytes]  # j in A_r minus U -> k_ij


@dataclass(frozen=True, slots=True)
class SeedRequest:
    ctx: bytes
    version: int
    survivors: tuple[int, ...]
    salts: tuple[bytes, ...]
    acks: tuple[Ack, ...]
    wanted: tuple[int, ...]
    round_start: RoundStart | None = None


@dataclass(frozen=True, slots=True)
class PairSeeds:
    index: int
    ctx: bytes
    pair_seeds: Mapping[int, bytes]


@dataclass(frozen=True, slots=True)
class RoundCancel:
    ctx: bytes


@dataclass(frozen=True, slots=True)
class Hold:
    round: int
    until_unix: int


@dataclass(frozen=True, slots=True)
class Withdraw:
    study_digest: bytes
    session_id: bytes


@dataclass(frozen=True, slots=True)
class StudyRefusal:
    code: str


@dataclass(frozen=True, slots=True)
class Refusal:
    box_failed: int | None = None


Message = (
    Resume
    | SessionProposal
    | KeyAdvertisement
    | Roster
    | Ratification
    | RoundStart
    | MaskedInput
    | SurvivorProposal
    | SurvivorAck
    | UnmaskRequest
    | UnmaskShares
    | SeedRequest
    | PairSeeds
    | RoundCancel
    | CancelAck
    | Hold
    | Withdraw
    | StudyRefusal
    | Refusal
)


# ---- effects: what a state machine asks of its driver ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Persist:
    """Make this record durable before anything that follows in the list. `charge` marks one spent charge of `task`."""

    record: bytes
    charge: Task | None = None


@dataclass(frozen=True, slots=True)
class StoreOutbox:
    """Keep these bytes durably until the round is over: a crashed site re-sends them, it never masks again (C25)."""

    message: MaskedInput


@dataclass(frozen=True, slots=True)
class Send:
    """`to` is the roster index at the aggregator; a member has one peer and leaves it at -1."""

    message: Message
    to: int = -1


@dataclass(frozen=True, slots=True)
class Contribute:
    """Member: every check passed and is journalled; compute this vector, then call `Member.contribute`."""

    task: Task
    round: int
    active: tuple[int, ...]
    broadcast: bytes
    length: int
    coordinates: int
    noise_adders: int  # h = u - c, from this site's own numbers


@dataclass(frozen=True, slots=True)
class Deadline:
    """Aggregator: call `Aggregator.deadline(token)` after `after_s` seconds unless a later Deadline replaces it."""

    token: int
    after_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """The exact integer sum over the survivors, in the ring."""

    round: int
    ctx: bytes
    total: Words
    survivors: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Abandoned:
    """The round, or the session, ends without a sum. `suspects` are roster indices where the fault is attributable."""

    round: int
    reason: str
    suspects: tuple[int, ...] = ()
    session_over: bool = False


@dataclass(frozen=True, slots=True)
class Evidence:
    """Proof of misconduct for the egress log: two signed statements that cannot both be honest."""

    what: str
    record: bytes


Effect = Persist | StoreOutbox | Send | Contribute | Deadline | Outcome | Abandoned | Evidence
