"""What fixes a protocol session, and its arithmetic (spec/secure-aggregation.md, section 2).

Everything here follows from the roster and the signed study: each site computes it for itself and compares, none of it
is received. No key is near: the key schedule is `secagg/keys.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sequester.protocols.errors import RefusalCode, StudyError

SUITE = "x25519-aes256ctr-v1"
Mode = Literal["strict", "double"]


@dataclass(frozen=True, slots=True)
class SessionParams:
    """Fixed for one protocol session; every field is compared with the signed study (C4)."""

    study_digest: bytes
    epoch: int
    roster: tuple[bytes, ...]
    max_corrupt: int
    min_active: int
    max_absent: int
    ring_bits: int
    mode: Mode
    suite: str = SUITE


@dataclass(frozen=True, slots=True)
class Task:
    """What one contribution is for; its hash is in every mask key of the round (section 3)."""

    study_digest: bytes
    analysis: str
    step: int
    attempt: int
    broadcast: bytes
    layout: bytes
    codec: str
    clip: str
    noise: str
    event: str


def threshold(n_sites: int, max_corrupt: int) -> int:
    """t = floor((N + c)/2) + 1: two quorums of the roster share an honest site."""
    return (n_sites + max_corrupt) // 2 + 1


def check_params(params: SessionParams) -> None:
    """`StudyError` where the numbers of a session cannot hold the promise of section 1."""
    n, c, t = len(params.roster), params.max_corrupt, threshold(len(params.roster), params.max_corrupt)
    if c < 1 or n < c + 2:
        raise StudyError(
            f"{n} sites with {c} possible colluders",
            hint="c is at least 1 and N at least c + 2, so that any sum has two honest inputs",
            code=RefusalCode.PARAMS,
        )
    if params.suite != SUITE or params.ring_bits not in (32, 64) or params.mode not in ("double", "strict"):  # C30
        raise StudyError(
            f"suite {params.suite}, {params.ring_bits} bits, mode {params.mode}",
            hint=f"this version knows {SUITE}, rings of 32 and 64 bits, and the modes double and strict",
            code=RefusalCode.PARAMS,
        )
    if len(set(params.roster)) != n:
        raise StudyError("the roster names a key twice", hint="one hospital, one key", code=RefusalCode.ROSTER)
    if not 0 <= params.max_absent <= n - t or not t <= params.min_active <= n:
        raise StudyError(
            f"max_absent {params.max_absent}, min_active {params.min_active} with t = {t} of {n}",
            hint=f"0 <= max_absent <= {n - t} and {t} <= min_active <= {n}",
            code=RefusalCode.PARAMS,
        )
    if params.mode == "strict" and params.max_absent != 0:
        raise StudyError("strict mode tolerates no absence", hint="set max_absent to 0", code=RefusalCode.PARAMS)


def floor(params: SessionParams, n_active: int) -> int:
    """u = max(t, n - a), n in strict mode: the smallest survivor set this site acknowledges or opens."""
    if params.mode == "strict":
        return n_active
    return max(threshold(len(params.roster), params.max_corrupt), n_active - params.max_absent)


def noise_adders(params: SessionParams, n_active: int) -> int:
    """h = u - c, the honest shares of noise counted on."""
    return floor(params, n_active) - params.max_corrupt


def cancels_needed(params: SessionParams, n_active: int) -> int:
    """n' - t' + c + 1: with so many cancels fewer than t - c honest sites can ever release that ctx (section 7)."""
    return n_active - threshold(len(params.roster), params.max_corrupt) + params.max_corrupt + 1
