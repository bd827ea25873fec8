"""One injective way from values to bytes, and the hash and keyed hash over it (spec/secure-aggregation.md, section 3).

Each part is a tag byte, a 4-byte big-endian length and a body. Booleans, negative integers and floats are refused; a
float travels as the bytes of its big-endian binary64.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

LABEL = b"sequester-secagg/v1/"
Part = int | str | bytes | Sequence["Part"]


def enc(parts: Sequence[Part]) -> bytes:
    """The encoding of a sequence of parts.

    >>> enc([1, "a", b"b", [2]]).hex(" ", 4)[:17]
    '69 00000008 00000'
    """
    return b"".join(_one(part) for part in parts)


def _one(part: Part) -> bytes:
    if isinstance(part, bool):
        raise TypeError("a boolean has no encoding")
    if isinstance(part, int):
        if not 0 <= part < 1 << 64:
            raise ValueError("integers are unsigned, below 2^64")
        tag, body = b"i", part.to_bytes(8, "big")
    elif isinstance(part, str):
        tag, body = b"s", part.encode()
    elif isinstance(part, bytes):
        tag, body = b"b", part
    elif isinstance(part, Sequence):
        tag, body = b"t", enc(part)
    else:
        raise TypeError(f"{type(part).__name__} has no encoding")
    return tag + len(body).to_bytes(4, "big") + body


def labelled(label: str, *parts: Part) -> bytes:
    """enc(L + label, ...): the label is always the first part."""
    return enc([LABEL + label.encode("ascii"), *parts])


def H(label: str, *parts: Part) -> bytes:
    """SHA-256 over the labelled encoding."""
    return hashlib.sha256(labelled(label, *parts)).digest()


def prf(key: bytes, label: str, *parts: Part) -> bytes:
    """HMAC-SHA256 under `key` over the labelled encoding."""
    return hmac.digest(key, labelled(label, *parts), "sha256")
