"""Named arrays as they arrive, part by part: what `decode` reads whole, and no more than it takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sequester.protocols import arrays
from sequester.protocols.errors import PeerError

DTYPES = st.sampled_from(["<f8", "<i8", "u1"])
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
NAMED = st.dictionaries(st.text("abc.", min_size=1, max_size=5), st.tuples(DTYPES, SHAPES), max_size=4)


def collected(data: bytes) -> dict[str, np.ndarray]:
    """What `parts` makes of bytes that arrive as they are asked for."""
    at = 0

    def fill(view: memoryview) -> None:
        nonlocal at
        assert at + len(view) <= len(data), "more than there is was asked for: a socket would wait for ever"
        view[:] = data[at : at + len(view)]
        at += len(view)

    found: dict[str, Any] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for part in arrays.parts(len(data), fill):
        pieces = found.setdefault(part.name, [])
        assert part.at == sum(map(len, pieces)) and shapes.setdefault(part.name, part.shape) == part.shape
        pieces.append(part.values.copy())
    assert at == len(data)
    return {name: np.concatenate(pieces).reshape(shapes[name]) for name, pieces in found.items()}


def drawn(named: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.integers(0, 200, shape).astype(dtype) for name, (dtype, shape) in named.items()}


@given(NAMED)
def test_parts_are_the_arrays_that_were_encoded(named: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    sent = drawn(named)
    found = collected(arrays.encode(sent))
    assert set(found) == set(sent)
    for name, array in sent.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_a_long_array_comes_in_parts_of_at_most_half_a_megabyte() -> None:
    sent = {"a": np.arange(200_001, dtype=np.float64), "b": np.zeros((3, 70_000), dtype=np.int64)}
    data = arrays.encode(sent)
    found = collected(data)
    np.testing.assert_array_equal(found["a"], sent["a"])
    assert found["b"].shape == (3, 70_000)
    view = memoryview(data)

    def fill(into: memoryview) -> None:
        nonlocal view
        into[:], view = view[: len(into)], view[len(into) :]

    assert max(part.values.nbytes for part in arrays.parts(len(data), fill)) <= 1 << 19


@given(NAMED, st.data())
def test_parts_refuse_what_decode_refuses(named: dict[str, tuple[str, tuple[int, ...]]], data: st.DataObject) -> None:
    good = arrays.encode(drawn(named))
    at = data.draw(st.integers(0, len(good) - 1))
    broken = data.draw(
        st.sampled_from([good[:at], good + b"\0", good[:at] + bytes([good[at] ^ (1 << at % 8)]) + good[at + 1 :]])
    )
    try:
        expected = arrays.decode(broken)
    except PeerError:
        with pytest.raises(PeerError):
            collected(broken)
        return
    found = collected(broken)
    assert set(found) == set(expected)
    assert all(np.array_equal(found[n], expected[n], equal_nan=found[n].dtype.kind == "f") for n in found)
