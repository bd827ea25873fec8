"""Writes the test vectors of the secure sum: `PYTHONPATH=tests python tests/vectors/make_secagg.py` from the root.

Every byte comes from the product's own code under fixed entropy, so the files change only with the protocol. A reader
that shares no code with us (`read_secagg.py`) checks them; a released version's files are never written again.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from attacks.adversary import Adversary, said
from sequester.protocols.quantise import Codec
from sequester.protocols.secagg import keys, masks, shamir
from sequester.protocols.secagg.encoding import enc
from sequester.protocols.secagg.messages import KeyAdvertisement, UnmaskShares
from sequester.protocols.session import SessionParams, Task

FOLDER = Path(__file__).parent / "secagg" / "v1"


def _hex(value: Any) -> Any:
    """Bytes as hex, tuples as lists, keys as text: what JSON can say."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {str(k): _hex(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_hex(v) for v in value]
    return value


def _parts(parts: Sequence[Any]) -> list[Any]:
    """Parts with their tags in sight."""
    tags = {int: "i", str: "s", bytes: "b", list: "t"}
    return [{tags[type(p)]: _parts(p) if isinstance(p, list) else _hex(p)} for p in parts]


def encoding() -> dict[str, Any]:
    good: list[list[Any]] = [
        [], [0], [2**64 - 1], ["", b""], ["é", b"\x00"], [b"ab", b"c"], [b"a", b"bc"], [[]], [[1, [b"x", "y"]], 2],
        ["1", 1, b"1"], [b"sequester-secagg/v1/round", bytes(32), 7, [0, 2, 3]],
    ]  # fmt: skip
    return {
        "good": [{"parts": _parts(p), "enc": enc(p).hex()} for p in good],
        "bad": [{"i": -1}, {"i": 2**64}, {"i": True}, {"i": 1.5}, {"n": None}],
    }


def _identity(i: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes([i + 1]) * 32)


TASK = Task(
    bytes(range(32)), "score", 3, 1, hashlib.sha256(b"broadcast").digest(), hashlib.sha256(b"layout").digest(),
    "w32b16g1", "72090", "discrete-gaussian/9000", "gaussian sigma=2.5",
)  # fmt: skip


def key_schedule() -> dict[str, Any]:
    n = 5
    roster = tuple(_identity(i).public_key().public_bytes_raw() for i in range(n))
    params = SessionParams(TASK.study_digest, 7, roster, 1, 4, 1, 32, "double")
    session = keys.session_id(params)
    kx = [X25519PrivateKey.from_private_bytes(bytes([i + 65]) * 32) for i in range(n)]
    public = [k.public_key().public_bytes_raw() for k in kx]
    roster_hash = keys.roster_hash(session, public)
    pairs = [keys.pair_keys(kx[i], i, public, roster_hash) for i in range(n)]
    active, length = (0, 1, 3, 4), 1000
    ctx = keys.context(roster_hash, 12, active, length, TASK)
    seed, salt, share = shamir.b32(shamir.P - 2), bytes(range(16)), shamir.b32(2**200 + 9)
    commit = keys.commitment(ctx, 1, seed)
    box = keys.seal(pairs[1][3], 1, 3, ctx, salt, share)
    advert = KeyAdvertisement(1, session, public[1], "cohort", 41, bytes(range(32)), b"")
    advert = replace(advert, signature=_identity(1).sign(keys.advertisement_bytes(advert)))
    seen = [keys.seen_hash(advert) if i == 1 else b"" for i in range(n)]
    salts = [bytes([i]) * 16 for i in (0, 1, 4)]
    digest = keys.survivors_digest(ctx, 2, (0, 1, 4), salts)
    sign = _identity(1).sign
    signed = {
        "adv": {
            "parts": _parts([session, 1, public[1], "cohort", 41, bytes(range(32))]), "signature": advert.signature,
        },
        "ratify": {
            "parts": _parts([session, roster_hash, seen]),
            "signature": sign(keys.ratification_bytes(session, roster_hash, seen)),
        },
        "input": {
            "parts": _parts([ctx, 12, 1, salt, commit]), "signature": sign(keys.input_bytes(ctx, 12, 1, salt, commit)),
        },
        "input, strict": {
            "label": "input", "parts": _parts([ctx, 12, 1]), "signature": sign(keys.input_bytes(ctx, 12, 1, b"", b"")),
        },
        "ack": {"parts": _parts([digest]), "signature": sign(keys.ack_bytes(digest))},
        "cancel": {"parts": _parts([ctx]), "signature": sign(keys.cancel_bytes(ctx))},
    }  # fmt: skip
    return _hex(
        {
            "params": asdict(params), "session_id": session, "kx": [k.private_bytes_raw() for k in kx],
            "kx_public": public, "roster_hash": roster_hash, "pairs": pairs, "task": asdict(TASK),
            "task_hash": keys.task_hash(TASK), "round": 12, "active": active, "length": length, "ctx": ctx,
            "mask_keys": {f"{i},{j}": keys.mask_key(pairs[i][j], ctx) for i in active for j in active if i < j},
            "seed": seed, "self_key": keys.self_key(seed, ctx), "commit": {"index": 1, "value": commit},
            "seal": {"from": 1, "to": 3, "salt": salt, "share": share, "box": box},
            "survivors": {"version": 2, "set": [0, 1, 4], "salts": salts, "digest": digest},
            "seen": {"of": signed["adv"]["parts"], "signature": advert.signature, "hash": seen[1]},
            "signer": roster[1], "signed": signed,
        }
    )  # fmt: skip


def shares() -> dict[str, Any]:
    source = random.Random(13)
    good = []
    for t, n in ((1, 1), (3, 4), (4, 5), (7, 10)):
        coefficients = [shamir.random_element(source.randbytes) for _ in range(t)]
        indices = list(range(1, n + 1))
        values = shamir.split(coefficients, indices)
        quorum = indices[n - t :]
        weights = shamir.lagrange_at_zero(quorum)
        good.append(
            {
                "coefficients": [shamir.b32(c) for c in coefficients], "indices": indices,
                "shares": [shamir.b32(v) for v in values], "quorum": quorum,
                "lagrange": [shamir.b32(w) for w in weights],
            }
        )  # fmt: skip
    over = [v.to_bytes(32, "little") for v in (shamir.P, shamir.P + 1, 2**255 - 1, 2**256 - 1)]
    return _hex(
        {"good": good, "bad_elements": [*over, bytes(31), bytes(33)], "bad_quorums": [[0, 1], [1, 1], [2, 3, 2]]}
    )


def mask_bytes() -> dict[str, Any]:
    key, other = bytes(range(32)), bytes(range(32, 64))
    rows = []
    for bits in (32, 64):
        block = 4 * masks.BLOCK_BYTES * 8 // bits  # where the loop turns, and half a megabyte
        for words in (1, 3, block - 1, block, block + 1):
            vector = np.arange(words, dtype=masks.word_type(bits))
            masks.add_streams(vector, [key], [other])
            data = vector.tobytes()
            rows.append(
                {
                    "ring_bits": bits, "words": words, "first": data[: bits // 8], "last": data[-bits // 8 :],
                    "sha256": hashlib.sha256(data).digest(),
                }
            )  # fmt: skip
    return _hex({"plus": key, "minus": other, "start": "0, 1, 2, ...", "sums": rows})


def codecs() -> dict[str, Any]:
    rows = []
    step = 2.0**-4
    ties = [0.5 * step, 1.5 * step, -0.5 * step, -1.5 * step, 2.5 * step, 0.0, -0.0, 7.25, -1.0]
    for bits, lanes in ((32, 1), (64, 1), (32, 2), (64, 3), (64, 5)):
        codec = Codec(bits, 4, lanes)
        top = 2 ** (codec.lane_bits - 1)
        edge = [(top - 1) // 2 * step, -(top // 2) * step] if codec.lane_bits < 50 else [1e9, -1e9]
        vectors = [np.array(ties + edge), np.array([-v for v in ties] + edge)]
        words = [codec.to_ring(codec.encode(v)) for v in vectors]
        total = words[0] + words[1]
        rows.append(
            {
                "ring_bits": bits, "lanes": lanes, "fraction_bits": 4,
                "values": [[struct.pack(">d", x) for x in v] for v in vectors],
                "integers": [[int(q) for q in codec.encode(v)] for v in vectors],
                "words": [[int(w) for w in ring] for ring in words],
                "sum_words": [int(w) for w in total],
                "sum": [int(q) for q in codec.from_sum(total, len(ties) + 2)],
            }
        )  # fmt: skip
    bad = [float("nan"), float("inf"), -float("inf"), 2.0**49, -(2.0**49), 1e300]
    return _hex({"good": rows, "refused_with_4_fraction_bits": [struct.pack(">d", x) for x in bad]})


def transcript() -> dict[str, Any]:
    """Four sites, t = 3: three deliver, one is absent; three trips, down to the opened sum."""
    adversary = Adversary(4, 1, corrupt=(), seed=99)
    start = adversary.begin(1, length=5)
    survivors = (0, 1, 3)
    ctx = adversary.play(start, survivors)
    acks = adversary.agree(ctx, 1, survivors)
    answers = {i: said(adversary.release(i, ctx, 1, survivors, acks), UnmaskShares) for i in survivors}
    total = np.sum([adversary.put_in(ctx, i) for i in survivors], axis=0, dtype=np.uint32)
    kx = [json.loads(journal[0])["kx"] for journal in adversary.journals]
    return _hex(
        {
            "params": asdict(adversary.params), "kx": kx,
            "advertisements": [asdict(a) for a in adversary.advs],
            "ratifications": [asdict(r) for r in adversary.ratifications],
            "round": 1, "active": start.active, "length": 5, "broadcast": start.broadcast, "task": asdict(start.task),
            "ctx": ctx, "x": {i: [int(v) for v in adversary.put_in(ctx, i)] for i in survivors},
            "inputs": [
                {
                    "index": i, "salt": sent.salt, "commit": sent.commit, "seals": sent.seals,
                    "signature": sent.signature, "y": [int(v) for v in sent.y],
                }
                for i in survivors for sent in [adversary.inputs[ctx, i]]
            ],
            "version": 1, "survivors": survivors, "acks": [asdict(a) for a in acks],
            "answers": {
                i: {"shares": a.shares, "pair_seeds": a.pair_seeds} for i, a in answers.items() if a is not None
            },
            "sum": [int(v) for v in total],
        }
    )  # fmt: skip


def bad() -> dict[str, Any]:
    """Each a change of `keys.json` that must not pass: a bit in every signed field, in every sealed byte, a wrong role."""
    good = key_schedule()
    flips = []
    for name, statement in good["signed"].items():
        for at, part in enumerate(statement["parts"]):
            flips.append({"signed": name, "part": at, "parts": [*statement["parts"][:at], _flipped(part),
                                                                *statement["parts"][at + 1 :]]})  # fmt: skip
    labels = ["adv", "ratify", "input", "ack", "cancel"]
    wrong = [
        {"signed": name, "label": other}
        for name, statement in good["signed"].items()
        for other in labels
        if other != statement.get("label", name)
    ]
    seal = good["seal"]
    boxes = [
        {**seal, "from": seal["to"], "to": seal["from"]},
        {**seal, "from": 0},
        {**seal, "to": 4},
        {**seal, "salt": _flip_hex(seal["salt"], 0)},
        *({**seal, "box": _flip_hex(seal["box"], at)} for at in (0, 31, 32, 47)),
        {**seal, "ctx": _flip_hex(good["ctx"], 31)},
        {**seal, "label": "mask"},
    ]
    return {
        "signatures": [*flips, *wrong],
        "boxes": boxes,
        "small_order_kx": ["00" * 32, "01" + "00" * 31],
        "lane_of_the_seed": {"seed": good["seed"], "not_the_commit": _flip_hex(good["commit"]["value"], 5)},
    }


def _flip_hex(text: str, at: int) -> str:
    data = bytearray.fromhex(text)
    data[at] ^= 1
    return data.hex()


def _flipped(part: dict[str, Any]) -> dict[str, Any]:
    ((tag, value),) = part.items()
    if tag == "i":
        return {"i": value ^ 1}
    if tag == "s":
        return {"s": chr(ord(value[0]) ^ 1) + value[1:]}
    if tag == "b":
        return {"b": _flip_hex(value, 0)}
    return {"t": [*value[:1], _flipped(value[1]), *value[2:]]}


def vectors() -> dict[str, str]:
    """File name -> text."""
    made = {
        "encoding": encoding(), "keys": key_schedule(), "shamir": shares(), "masks": mask_bytes(), "codec": codecs(),
        "transcript": transcript(), "bad": bad(),
    }  # fmt: skip
    return {f"{name}.json": json.dumps(value, indent=1) + "\n" for name, value in made.items()}


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in vectors().items():
        (FOLDER / name).write_text(text, "utf-8")
        print(f"{name}: {len(text)} bytes")
