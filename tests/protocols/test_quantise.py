"""Fixed point: sums of encodings decode to the plain sum, with carries between lanes, and nothing odd is encoded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sequester.protocols.errors import SiteError
from sequester.protocols.memory import Room
from sequester.protocols.quantise import Codec, RingVector


def summed(codec: Codec, vectors: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    words = [codec.to_ring(codec.encode(vector)) for vector in vectors]
    total = words[0].copy()
    for word in words[1:]:
        total += word
    return codec.decode(codec.from_sum(total, len(vectors[0])))


@pytest.mark.parametrize("codec", [Codec(32, 16), Codec(64, 28), Codec(64, 8, lanes=3), Codec(64, 4, lanes=5)])
@given(values=st.lists(st.lists(st.integers(-250, 250), min_size=7, max_size=7), min_size=3, max_size=8))
def test_the_decoded_sum_of_encodings_is_the_plain_sum(codec: Codec, values: list[list[int]]) -> None:
    vectors = [np.array(row) / 2**codec.fraction_bits for row in values]  # eight of them fit the smallest lane
    assert np.array_equal(summed(codec, vectors), np.sum(vectors, axis=0))


def test_rounding_is_to_nearest_and_moves_a_number_by_half_a_step_at_most() -> None:
    values = np.linspace(-3, 3, 1001)
    codec = Codec(32, 8)
    assert np.abs(codec.decode(codec.encode(values)) - values).max() <= 2**-9


@pytest.mark.parametrize("codec", [Codec(32, 16), Codec(64, 28), Codec(64, 8, lanes=3)])
@pytest.mark.parametrize("size", [0, 1, 7, 65_536, 200_003])
def test_words_of_blocks_are_the_words_of_the_whole(codec: Codec, size: int) -> None:
    draw = np.random.default_rng(size)
    vector, noise = draw.normal(size=size), draw.integers(-1000, 1000, size)
    before = vector.copy()
    assert np.array_equal(codec.words_of(vector), codec.to_ring(codec.encode(vector)))
    assert np.array_equal(codec.words_of(vector, noise), codec.to_ring(codec.encode(vector) + noise))
    assert np.array_equal(vector, before)
    room = Room()
    for _ in range(2):  # the second time over the first one's words
        assert np.array_equal(codec.words_of(vector, noise, room), codec.to_ring(codec.encode(vector) + noise))


@pytest.mark.parametrize("codec", [Codec(32, 16), Codec(64, 28), Codec(64, 8, lanes=3), Codec(64, 4, lanes=5)])
@pytest.mark.parametrize("size", [0, 1, 7, 65_536, 200_003])
def test_values_of_blocks_are_the_values_of_the_whole(codec: Codec, size: int) -> None:
    bits = np.random.default_rng(size).integers(0, 2**codec.ring_bits, codec.words(size), dtype=np.uint64)
    total = bits.astype(np.uint32 if codec.ring_bits == 32 else np.uint64)
    assert np.array_equal(codec.values_of(total, size), codec.decode(codec.from_sum(total, size)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**40, 1e308])
def test_what_is_not_finite_or_too_large_is_refused(bad: float) -> None:
    with pytest.raises(SiteError, match="not finite, or too large"):
        Codec(32, 16).encode(np.array([0.0, bad]))
    with pytest.raises(SiteError, match="not finite, or too large"):
        Codec(32, 16).words_of(np.concatenate([np.zeros(70_000), [bad]]))


@pytest.mark.parametrize(("ring_bits", "kind"), [(32, np.uint32), (64, np.uint64)])
def test_words_have_the_rings_own_type_and_wrap_in_it(ring_bits: int, kind: type) -> None:
    codec = Codec(ring_bits, 4)
    words: RingVector = codec.to_ring(np.array([-1, 0, 1]))
    assert words.dtype == kind and int(words[0]) == 2**ring_bits - 1
    assert codec.from_sum(words, 3).tolist() == [-1, 0, 1]


def test_lanes_are_planar() -> None:
    words = Codec(64, 0, lanes=2).to_ring(np.array([1, 2, 3, 4, 5]))
    assert [(int(w) & 0xFFFFFFFF, int(w) >> 32) for w in words] == [(1, 4), (2, 5), (3, 0)]
