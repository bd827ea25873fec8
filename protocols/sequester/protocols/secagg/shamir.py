"""Shamir's shares over GF(2^255 - 19) in Python integers (Shamir 1979).

Index i >= 1 holds f(i), f of degree t - 1 with f(0) the secret. No verification of shares: the aggregator compares the
opened secret with its commitment (C19).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

P = 2**255 - 19


def b32(value: int) -> bytes:
    """32 bytes, little-endian, of a field element."""
    return value.to_bytes(32, "little")


def element(data: bytes) -> int:
    """The field element of 32 bytes; a value of P or more is refused (C18)."""
    value = int.from_bytes(data, "little")
    if len(data) != 32 or value >= P:
        raise ValueError("not a canonical field element")
    return value


def random_element(entropy: Callable[[int], bytes]) -> int:
    """Uniform in [0, P) by rejection."""
    while True:
        value = int.from_bytes(entropy(32), "little") & (2**255 - 1)
        if value < P:
            return value


def split(coefficients: Sequence[int], indices: Sequence[int]) -> list[int]:
    """f at each index; `coefficients` from the constant term up, by Horner's rule."""
    shares = []
    for x in indices:
        y = 0
        for coefficient in reversed(coefficients):
            y = (y * x + coefficient) % P
        shares.append(y)
    return shares


def lagrange_at_zero(indices: Sequence[int]) -> list[int]:
    """Weights w with f(0) = sum w_i f(i); indices distinct and not zero."""
    if len(set(indices)) != len(indices) or not all(0 < i < P for i in indices):
        raise ValueError("share indices must be distinct and not zero")
    weights = []
    for i in indices:
        above = below = 1
        for j in indices:
            if j != i:
                above = above * j % P
                below = below * (j - i) % P
        weights.append(above * pow(below, -1, P) % P)
    return weights


def combine(weights: Sequence[int], shares: Sequence[int]) -> int:
    """f(0) from one share for each weight."""
    return sum(w * s for w, s in zip(weights, shares, strict=True)) % P
