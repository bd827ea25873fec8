"""Key streams added to and taken from vectors: AES-256-CTR, one stream a key, never a key twice.

The fused loop keeps one block and one scratch buffer in cache: outer loop over blocks, inner loop over streams
(spec/secure-aggregation.md, section 11). Words are little-endian, so little-endian hosts only.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from sequester.protocols.quantise import Words

if sys.byteorder != "little":
    raise ImportError("masks are little-endian words: this host is not supported")

BLOCK_BYTES = 128 * 1024  # zeros, key stream and vector together fit a second-level cache of half a megabyte
_ZEROS = bytes(BLOCK_BYTES)
_WORKING = threading.local()  # a key stream's buffer, wiped after each use: fresh memory costs more than a short stream


def word_type(ring_bits: int) -> np.dtype[np.uint32] | np.dtype[np.uint64]:
    """uint32 or uint64, little-endian."""
    return np.dtype("<u4") if ring_bits == 32 else np.dtype("<u8")


def add_streams(
    vector: Words, plus: Sequence[bytes], minus: Sequence[bytes] = (), vectors: Sequence[Words] = ()
) -> None:
    """Add the key streams of `plus` and subtract those of `minus`, in place, modulo the word size.

    vector: uint32 or uint64 (words,), contiguous. Keys: 32 bytes each, IV zero: a key belongs to exactly one stream.
    Where `vectors` are given, of the same words each, their sum comes first, in place of what `vector` held: in the same
    pass, since each pass over long vectors costs as much as a stream.
    """
    streams: list[tuple[CipherContext, np.ufunc]] = [
        (Cipher(AES(key), CTR(bytes(16))).encryptor(), np.add) for key in plus
    ]
    streams += [(Cipher(AES(key), CTR(bytes(16))).encryptor(), np.subtract) for key in minus]
    size = vector.itemsize
    per_block = BLOCK_BYTES // size
    # update_into asks for a block more than it writes
    buffer = _buffer()
    scratch = np.frombuffer(buffer, dtype=vector.dtype, count=min(per_block, len(vector)))
    zeros = memoryview(_ZEROS)
    for start in range(0, len(vector), per_block):
        part = vector[start : start + per_block]
        n_bytes = len(part) * size
        for place, other in enumerate(vectors):
            if place:
                np.add(part, other[start : start + per_block], out=part)
            else:
                np.copyto(part, other[start : start + per_block])
        for stream, operation in streams:
            stream.update_into(zeros[:n_bytes], buffer)
            operation(part, scratch[: len(part)], out=part)
    used = min(BLOCK_BYTES, vector.nbytes) + 15
    buffer[:used] = bytes(used)


def _buffer() -> bytearray:
    """This thread's."""
    try:
        found: bytearray = _WORKING.buffer
    except AttributeError:
        found = _WORKING.buffer = bytearray(BLOCK_BYTES + 15)
    return found
