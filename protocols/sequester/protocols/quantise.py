"""Real vectors as integers in the ring, and back (spec/secure-aggregation.md, section 8).

value -> round to nearest of value * 2^b, signed int64 -> (noise is added here, in integers) -> ring words of w bits, G
signed lanes of l bits in each. Wrapping is a fault of accuracy, never a leak; head-room is checked when the plan is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NewType

import numpy as np
from numpy.typing import NDArray

from sequester.protocols.errors import SiteError
from sequester.protocols.memory import Room

Words = NDArray[np.uint32] | NDArray[np.uint64]
# A vector in the ring before its masks: secret. After them it is a `secagg.messages.MaskedVector`: two types, never swapped.
RingVector = NewType("RingVector", np.ndarray)


_BLOCK = 1 << 16  # values at a time: half a megabyte of working memory stays in cache


def _blocks(start: int, stop: int) -> Iterator[slice]:
    return (slice(at, min(at + _BLOCK, stop)) for at in range(start, stop, _BLOCK))


@dataclass(frozen=True, slots=True)
class Codec:
    """Fixed point with `fraction_bits` fractional bits in words of `ring_bits`, `lanes` numbers in each word."""

    ring_bits: int
    fraction_bits: int
    lanes: int = 1

    @property
    def lane_bits(self) -> int:
        """l: bits for one signed number of a sum."""
        return self.ring_bits // self.lanes

    def describe(self) -> str:
        """The codec's name in a task.

        >>> Codec(32, 16).describe()
        'w32b16g1'
        """
        return f"w{self.ring_bits}b{self.fraction_bits}g{self.lanes}"

    def words(self, coordinates: int) -> int:
        """Ring words for that many numbers."""
        return -(-coordinates // self.lanes)

    def encode(self, vector: NDArray[np.float64]) -> NDArray[np.int64]:
        """Nearest multiples of 2^-b as int64; NaN, infinity and anything beyond 2^53 steps are refused (C21)."""
        integers = np.empty(len(vector), dtype=np.int64)
        scaled = np.empty(min(_BLOCK, len(vector)))
        for part in _blocks(0, len(vector)):
            self._nearest(vector[part], scaled, integers[part])
        scaled.fill(0.0)
        return integers

    def _nearest(self, values: NDArray[np.float64], scaled: NDArray[np.float64], out: NDArray[np.int64]) -> None:
        """The nearest integers into `out`; `scaled` is working memory for at least as many numbers."""
        scaled = scaled[: len(values)]
        with np.errstate(over="ignore"):  # what overflows is refused below
            np.multiply(values, float(2**self.fraction_bits), out=scaled)
        if not (scaled.min() > -(2.0**53) and scaled.max() < 2.0**53):  # C21: a NaN is neither
            scaled.fill(0.0)
            raise SiteError(
                "a contribution is not finite, or too large for the plan's fraction bits",
                hint="a fault of the code or of the plan: nothing was sent",
            )
        np.rint(scaled, out=scaled)
        np.copyto(out, scaled, casting="unsafe")

    def words_of(
        self, vector: NDArray[np.float64], noise: NDArray[np.int64] | None = None, room: Room | None = None
    ) -> RingVector:
        """Ring words of `encode(vector)` plus `noise`: the same words as `to_ring`, one block in cache at a time.

        They stand in `room`, where one is given.
        """
        n_words = self.words(len(vector))
        room = Room() if room is None else room
        words = room.array(n_words, np.uint32 if self.ring_bits == 32 else np.uint64)
        block = min(_BLOCK, n_words)
        scaled, held = room.array(block, np.float64, "scaled"), room.array(block, np.int64, "integers")
        for lane in range(self.lanes):  # the first one fills every word, the others are added
            first = lane * n_words
            for part in _blocks(first, min(first + n_words, len(vector))):
                integers = held[: part.stop - part.start]
                self._nearest(vector[part], scaled, integers)
                if noise is not None:
                    integers += noise[part]
                place = words[part.start - first : part.stop - first]
                shifted = integers.view(np.uint64)
                if lane:
                    np.left_shift(shifted, np.uint64(lane * self.lane_bits), out=shifted)
                    np.add(place, shifted, out=place, casting="unsafe")
                else:
                    np.copyto(place, shifted, casting="unsafe")
        scaled.fill(0.0)
        held.fill(0)
        return RingVector(words)

    def to_ring(self, integers: NDArray[np.int64]) -> RingVector:
        """uint32 or uint64 (words,): lanes are planar, coordinate k lies in lane k // words."""
        n_words = self.words(len(integers))
        word: NDArray[np.uint64] = np.zeros(n_words, dtype=np.uint64)
        for lane in range(self.lanes):
            part = integers[lane * n_words : (lane + 1) * n_words].astype(np.uint64)
            word[: len(part)] += part << np.uint64(lane * self.lane_bits)
        return RingVector(word.astype(np.uint32) if self.ring_bits == 32 else word)

    def from_sum(self, total: Words, coordinates: int) -> NDArray[np.int64]:
        """The signed integers of an opened sum, int64 (coordinates,)."""
        if self.lanes == 1:
            signed = total.view(np.int32 if self.ring_bits == 32 else np.int64)
            return signed[:coordinates].astype(np.int64)
        bits = self.lane_bits
        half = np.uint64(1 << (bits - 1))
        shifted = total.astype(np.uint64)
        for lane in range(self.lanes):
            shifted = shifted + (half << np.uint64(lane * bits))
        lanes = [
            ((shifted >> np.uint64(lane * bits)) & np.uint64((1 << bits) - 1)).astype(np.int64) - np.int64(half)
            for lane in range(self.lanes)
        ]
        return np.concatenate(lanes)[:coordinates]

    def values_of(self, total: Words, coordinates: int, room: Room | None = None) -> NDArray[np.float64]:
        """`decode(from_sum(total, coordinates))`, one block in cache at a time, float64 (coordinates,), in `room`."""
        values = (Room() if room is None else room).array(coordinates, np.float64, "values")
        n_words = self.words(coordinates)
        for part in _blocks(0, n_words):
            integers = self.from_sum(total[part], self.lanes * (part.stop - part.start)).reshape(self.lanes, -1)
            for lane, row in enumerate(integers):
                place = values[lane * n_words + part.start : lane * n_words + part.stop]
                np.multiply(row[: len(place)], 2.0**-self.fraction_bits, out=place)
        return values

    def decode(self, integers: NDArray[np.int64]) -> NDArray[np.float64]:
        """Real values of a sum of encodings."""
        return integers / float(2**self.fraction_bits)
