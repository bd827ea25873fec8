"""The key schedule (spec/secure-aggregation.md, section 3); the session's arithmetic is `protocols/session.py`.

Who must not learn what is here: pair keys and masks belong to two hospitals, never to the exchange. The identity key
signs and does nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sequester.protocols.errors import PeerError, RefusalCode
from sequester.protocols.secagg.encoding import LABEL as L
from sequester.protocols.secagg.encoding import H, enc, labelled, prf
from sequester.protocols.secagg.messages import KeyAdvertisement
from sequester.protocols.session import SessionParams, Task

Sign = Callable[[bytes], bytes]
SEAL_BYTES = 48


# ---- hashes ---------------------------------------------------------------------------------------------------------


def session_id(params: SessionParams) -> bytes:
    """H("session", ...): identity keys in order, no certificates; a renewed certificate changes nothing."""
    return H(
        "session", params.study_digest, params.epoch, list(params.roster), params.max_corrupt, params.min_active,
        params.max_absent, params.ring_bits, params.mode, params.suite,
    )  # fmt: skip


def roster_hash(session: bytes, kx: Sequence[bytes]) -> bytes:
    """H("roster", session_id, [kx...]): the salt of every pair key."""
    return H("roster", session, list(kx))


def task_hash(task: Task) -> bytes:
    """H("task", ...)."""
    return H(
        "task", task.study_digest, task.analysis, task.step, task.attempt, task.broadcast, task.layout, task.codec,
        task.clip, task.noise, task.event,
    )  # fmt: skip


def context(roster: bytes, round_number: int, active: Sequence[int], length: int, task: Task) -> bytes:
    """ctx: in every mask and seal key of the round (C6)."""
    return H("round", roster, round_number, list(active), length, task_hash(task))


def survivors_digest(ctx: bytes, version: int, survivors: Sequence[int], salts: Sequence[bytes]) -> bytes:
    """d(v, U): what t sites sign before a seed of an absent site may leave."""
    return H("survivors", ctx, version, list(survivors), list(salts))


def commitment(ctx: bytes, index: int, seed: bytes) -> bytes:
    """commit_i = H("commit", ctx, i, b32(b_i))."""
    return H("commit", ctx, index, seed)


# ---- signed statements ----------------------------------------------------------------------------------------------


def advertisement_bytes(adv: KeyAdvertisement) -> bytes:
    """What adv_i signs: key, data set, ledger counter and head."""
    return labelled("adv", adv.session_id, adv.index, adv.kx, adv.data_set, adv.counter, adv.head)


def seen_hash(adv: KeyAdvertisement) -> bytes:
    """H("seen", adv): how a peer names the highest advertisement it holds."""
    return H("seen", adv.session_id, adv.index, adv.kx, adv.data_set, adv.counter, adv.head, adv.signature)


def ratification_bytes(session: bytes, roster: bytes, seen: Sequence[bytes]) -> bytes:
    """What ratify_i signs."""
    return labelled("ratify", session, roster, list(seen))


def input_bytes(ctx: bytes, round_number: int, index: int, salt: bytes, commit: bytes) -> bytes:
    """What input_i signs; in strict mode salt and commit are empty and left out (section 6)."""
    if not salt and not commit:
        return labelled("input", ctx, round_number, index)
    return labelled("input", ctx, round_number, index, salt, commit)


def ack_bytes(digest: bytes) -> bytes:
    """What ack_i signs."""
    return labelled("ack", digest)


def cancel_bytes(ctx: bytes) -> bytes:
    """What cancel_i signs."""
    return labelled("cancel", ctx)


def is_signed(key: bytes, signature: bytes, message: bytes) -> bool:
    """True where `signature` is the identity key's over `message`."""
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


# ---- pair keys ------------------------------------------------------------------------------------------------------


def pair_keys(kx: X25519PrivateKey, own: int, peers: Sequence[bytes], roster: bytes) -> dict[int, bytes]:
    """K_ij for every j, K_ii included; a key whose shared secret is zero is refused (C5)."""
    keys = {}
    for j, public in enumerate(peers):
        if j == own:
            keys[j] = prf(kx.private_bytes_raw(), "own", roster)
            continue
        try:
            shared = kx.exchange(X25519PublicKey.from_public_bytes(public))  # C5: raises on an all-zero secret
        except ValueError:
            raise PeerError(
                f"site {j}'s exchange key gives no shared secret", hint="nothing was sent", code=RefusalCode.ROSTER
            ) from None
        info = enc([L + b"pair", min(own, j), max(own, j)])
        keys[j] = HKDF(SHA256(), 32, salt=roster, info=info).derive(shared)
    return keys


def mask_key(pair: bytes, ctx: bytes) -> bytes:
    """k_ij of one round."""
    return prf(pair, "mask", ctx)


def self_key(seed: bytes, ctx: bytes) -> bytes:
    """The key of the self-mask stream, from b32(b_i)."""
    return prf(seed, "self", ctx)


def _box(pair: bytes, sender: int, to: int, ctx: bytes, salt: bytes) -> AESGCM:
    return AESGCM(prf(pair, "seal", sender, to, ctx, salt))  # C16: the salt keeps two boxes of one round apart


def seal(pair: bytes, sender: int, to: int, ctx: bytes, salt: bytes, share: bytes) -> bytes:
    """seal_i->j, 48 bytes; the key is used for this one box."""
    return _box(pair, sender, to, ctx, salt).encrypt(bytes(12), share, None)


def unseal(pair: bytes, sender: int, to: int, ctx: bytes, salt: bytes, box: bytes) -> bytes:
    """The share in a box; `InvalidTag` where it was tampered with (C18)."""
    return _box(pair, sender, to, ctx, salt).decrypt(bytes(12), box, None)
