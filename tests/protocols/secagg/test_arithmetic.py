"""Laws of the encoding, the shares and the masks, each against a slow twin."""

from __future__ import annotations

import random
from itertools import combinations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from hypothesis import given, settings
from hypothesis import strategies as st

from sequester.protocols.secagg import masks, shamir
from sequester.protocols.secagg.encoding import enc

part = st.recursive(
    st.integers(0, 2**64 - 1) | st.text(max_size=4) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(part, max_size=4), st.lists(part, max_size=4))
def test_encoding_is_injective(one: list[object], other: list[object]) -> None:
    assert (enc(one) == enc(other)) == (one == other)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [True, -1, 2**64, 1.5, None])
def test_encoding_refuses_booleans_negatives_and_floats(bad: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        enc([bad])  # type: ignore[list-item]


def test_any_threshold_of_shares_recovers_and_the_order_does_not_matter() -> None:
    source = random.Random(3)
    coefficients = [shamir.random_element(source.randbytes) for _ in range(4)]
    shares = shamir.split(coefficients, range(1, 8))
    for chosen in combinations(range(7), 4):
        weights = shamir.lagrange_at_zero([i + 1 for i in chosen])
        assert shamir.combine(weights, [shares[i] for i in chosen]) == coefficients[0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, shamir.P - 1), st.integers(0, 2**32))
def test_fewer_shares_than_the_threshold_fit_every_secret(guess: int, seed: int) -> None:
    source = random.Random(seed)
    shares = shamir.split([shamir.random_element(source.randbytes) for _ in range(3)], [1, 2])
    # through (0, guess) and the two shares goes exactly one polynomial of degree 2: nothing is excluded
    weights = shamir.lagrange_at_zero([1, 2, 3])
    third = (guess - weights[0] * shares[0] - weights[1] * shares[1]) * pow(weights[2], -1, shamir.P) % shamir.P
    assert shamir.combine(weights, [*shares, third]) == guess


@pytest.mark.parametrize("indices", [[0, 1], [1, 1], []])
def test_index_zero_and_duplicate_indices_are_refused(indices: list[int]) -> None:
    if indices:
        with pytest.raises(ValueError, match="distinct"):
            shamir.lagrange_at_zero(indices)


def test_a_share_of_p_or_more_is_refused() -> None:
    assert shamir.element(shamir.b32(shamir.P - 1)) == shamir.P - 1
    with pytest.raises(ValueError, match="canonical"):
        shamir.element(shamir.b32(shamir.P))


@pytest.mark.parametrize("word", [np.uint32, np.uint64])
@pytest.mark.parametrize("offset", [None, -1, 0, 1])
def test_blocked_streams_equal_one_long_stream(word: type, offset: int | None) -> None:
    size = 3 if offset is None else masks.BLOCK_BYTES // np.dtype(word).itemsize + offset
    keys = [bytes([k]) * 32 for k in range(1, 4)]
    vector = np.arange(size, dtype=word)
    masks.add_streams(vector, keys[:2], keys[2:])
    plain = np.arange(size, dtype=word)
    for sign, key in zip((1, 1, -1), keys, strict=True):
        stream = Cipher(AES(key), CTR(bytes(16))).encryptor().update(bytes(plain.nbytes))
        words = np.frombuffer(stream, word)
        plain = plain + words if sign > 0 else plain - words
    np.testing.assert_array_equal(vector, plain)
    masks.add_streams(vector, keys[2:], keys[:2])
    np.testing.assert_array_equal(vector, np.arange(size, dtype=word))


@pytest.mark.parametrize("word", [np.uint32, np.uint64])
@pytest.mark.parametrize("length", [1, 32_768, 100_001])
def test_sum_of_vectors_and_streams_in_one_pass_is_the_sum_of_both(word: type, length: int) -> None:
    rng = np.random.default_rng(length)
    vectors = [rng.integers(0, np.iinfo(word).max, length, dtype=word) for _ in range(3)]
    keys = [bytes([k]) * 32 for k in range(1, 4)]
    expected = vectors[0] + vectors[1] + vectors[2]
    masks.add_streams(expected, keys[:2], keys[2:])
    total = np.full(length, 77, dtype=word)  # what stood there before is not in the sum
    masks.add_streams(total, keys[:2], keys[2:], vectors)
    np.testing.assert_array_equal(total, expected)
