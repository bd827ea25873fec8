"""Exact discrete Gaussian noise in integers (Canonne, Kamath, Steinke 2020, algorithms 1 to 3), vectorised.

Draws come from a byte source that is an argument: in the product AES-256-CTR under a key from the operating system,
used once. Never a float is rounded into noise, and no generator with a small seed is anywhere near. Rejection takes
variable time, so the gate draws before it looks at the vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import mpmath  # type: ignore[import-untyped]  # it ships no types
import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

from sequester.protocols.errors import PrivacyError

ByteSource = Callable[[int], bytes]
SIGMA_MIN, SIGMA_MAX = 4, 2**24
_NEAR = 2.0**-40  # closer than this to the threshold, the comparison is made again exactly
_SLICE = 1 << 16  # candidates at a time: working memory stays in cache and does not grow with the vector


def aes_stream(key: bytes, iv: bytes) -> ByteSource:
    """Successive bytes of AES-256-CTR; the caller's key comes from the operating system and serves one round."""
    stream = Cipher(AES(key), CTR(iv)).encryptor()
    return lambda size: stream.update(bytes(size))


def discrete_gaussian(sigma_int: int, size: int, source: ByteSource) -> NDArray[np.int64]:
    """`size` independent draws of the discrete Gaussian with parameter `sigma_int`, int64 (size,).

    Exact for 4 <= sigma_int <= 2^24; outside that is refused.
    """
    out, done = np.empty(size, dtype=np.int64), 0
    for drawn in in_pieces(sigma_int, size, source):
        out[done : done + len(drawn)] = drawn
        done += len(drawn)
    return out


def in_pieces(sigma_int: int, size: int, source: ByteSource) -> Iterator[NDArray[np.int64]]:
    """The draws of `discrete_gaussian`, in order, some tens of thousands at a time."""
    if not SIGMA_MIN <= sigma_int <= SIGMA_MAX:
        raise PrivacyError(f"a noise scale of {sigma_int} units", hint=f"between {SIGMA_MIN} and {SIGMA_MAX}")
    while size > 0:
        wanted = min(_SLICE, int(size * 2.2) + 64)
        drawn = _candidates(sigma_int, wanted, source)[:size]  # in order, truncated by position
        size -= len(drawn)
        yield drawn


def _words(source: ByteSource, n: int) -> NDArray[np.uint64]:
    return np.frombuffer(source(8 * n), dtype=np.uint64)


def _below(bound: int, n: int, source: ByteSource) -> NDArray[np.int64]:
    """Uniform in 0..bound-1 by rejection on 64-bit words."""
    limit = np.uint64((1 << 64) - (1 << 64) % bound - 1)
    words = _words(source, n)
    while (bad := words > limit).any():
        words = words.copy()
        words[bad] = _words(source, int(bad.sum()))
    return (words % np.uint64(bound)).astype(np.int64)


def _bernoulli_exp(
    exponents: NDArray[np.float64], exact: Callable[[int], mpmath.mpf], source: ByteSource
) -> NDArray[np.bool_]:
    """Bernoulli(exp(-g)) for each g; `exact(i)` gives the i-th g to any precision, for the few that are close."""
    words = _words(source, len(exponents))
    uniform = words.astype(np.float64) * 2.0**-64
    threshold = np.exp(-exponents)
    accept = uniform < threshold
    for i in np.flatnonzero(np.abs(uniform - threshold) < _NEAR):
        accept[i] = _decide(int(words[i]), partial(exact, int(i)), source)
    return accept


def _decide(word: int, exponent: Callable[[], mpmath.mpf], source: ByteSource) -> bool:
    """Whether the uniform that starts with `word` lies below exp(-exponent): words are appended until it is clear.

    The exponent is computed in here, at the working precision: a quotient made outside would carry 53 bits only.
    """
    bits = 64
    while True:
        with mpmath.workprec(256 + bits):
            threshold = mpmath.exp(-exponent()) * mpmath.mpf(2) ** bits
            if word + 1 <= threshold - mpmath.mpf(2) ** -128:
                return True
            if word >= threshold + mpmath.mpf(2) ** -128:
                return False
        word = (word << 64) | int.from_bytes(source(8), "little")
        bits += 64


def _candidates(sigma: int, n: int, source: ByteSource) -> NDArray[np.int64]:
    t = sigma + 1
    # (1) U uniform in 0..t-1, kept with probability exp(-U/t)
    u = _below(t, n, source)
    u = u[_bernoulli_exp(u / t, lambda i: mpmath.mpf(int(u[i])) / t, source)]
    # (2) V = successes of Bernoulli(exp(-1)) before the first failure; X = U + t V
    v = np.zeros(len(u), dtype=np.int64)
    going = np.arange(len(u))
    while len(going):
        success = _bernoulli_exp(np.ones(len(going)), lambda i: mpmath.mpf(1), source)
        going = going[success]
        v[going] += 1
    x = u + t * v
    # (3) a random sign; minus zero is dropped
    negative = (np.frombuffer(source(len(x)), dtype=np.uint8) & 1).astype(bool)
    keep = ~(negative & (x == 0))
    x, negative = x[keep], negative[keep]
    # (4) accept with probability exp(-(tX - sigma^2)^2 / (2 sigma^2 t^2)); t X - sigma^2 is exact in int64, its square
    # and the denominator are not (spec/privacy.md, trap 22): they are taken in float64, and exactly where it matters
    distance = t * x - sigma * sigma
    scaled = distance / (float(sigma) * float(t))
    accept = _bernoulli_exp(
        scaled * scaled / 2.0,
        lambda i: mpmath.mpf(int(distance[i])) ** 2 / (2 * mpmath.mpf(sigma) ** 2 * mpmath.mpf(t) ** 2),
        source,
    )
    signed: NDArray[np.int64] = np.where(negative, -x, x)[accept]
    return signed
