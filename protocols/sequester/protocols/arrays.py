"""Named arrays as bytes, one way only, so that both sides hash the same thing.

Used for broadcasts (their SHA-256 stands in every task), for the socket between compute and gate, and for the
exchange's journal. No pickle, no objects: three little-endian dtypes, C order, names in ascending order.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequester.protocols.errors import PeerError

Arrays = Mapping[str, NDArray[Any]]

_DTYPES: dict[str, np.dtype[Any]] = {"f8": np.dtype("<f8"), "i8": np.dtype("<i8"), "u1": np.dtype("u1")}
_MAX_NAME, _MAX_DIMS, _MAX_SPAN = 64, 4, 2**48
_AT_ONCE = 1 << 16  # numbers of one part: half a megabyte


def encode(arrays: Arrays) -> bytes:
    """Canonical bytes of named arrays (float64, int64 or uint8; at most four dimensions).

    Layout: count u32, then for each name in ascending order: name length u8, name, dtype 2 bytes, dims u8,
    each dim u64, data. All big-endian but the data, which is little-endian.
    """
    out = [struct.pack(">I", len(arrays))]
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        tag = next((t for t, d in _DTYPES.items() if d.kind == array.dtype.kind and d.itemsize == array.itemsize), None)
        if tag is None or array.ndim > _MAX_DIMS or not 0 < len(name) <= _MAX_NAME or not name.isascii():
            raise ValueError(f"array {name!r} of {array.dtype}, {array.ndim} dimensions cannot travel")
        data = np.array(array, dtype=_DTYPES[tag], order="C", copy=None)
        out.append(struct.pack(">B", len(name)) + name.encode("ascii") + tag.encode() + struct.pack(">B", data.ndim))
        out.append(struct.pack(f">{data.ndim}Q", *data.shape))
        out.append(data.tobytes())
    return b"".join(out)


def decode(data: bytes | memoryview) -> dict[str, NDArray[Any]]:
    """The arrays of `encode`; anything else, a trailing byte included, is a `PeerError`. Read-only views, no copy."""
    view = memoryview(data)
    at = 0

    def take(size: int) -> memoryview:
        nonlocal at
        if size < 0 or at + size > len(view):
            raise PeerError(f"named arrays end at byte {len(view)}, {at + size} expected")
        at += size
        return view[at - size : at]

    (count,) = struct.unpack(">I", take(4))
    arrays: dict[str, NDArray[Any]] = {}
    name = ""
    for _ in range(count):
        name, dtype, shape = _head(take, name)
        size = math.prod(shape)
        arrays[name] = np.frombuffer(take(size * dtype.itemsize), dtype=dtype).reshape(shape)
    if at != len(view):
        raise PeerError(f"named arrays: {len(view) - at} bytes too many")
    return arrays


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbouring numbers of one array: its name and shape, where the first of them stands in it, and they themselves."""

    name: str
    shape: tuple[int, ...]
    at: int
    values: NDArray[Any]  # (numbers,), overwritten by the next part


def parts(size: int, fill: Callable[[memoryview], None]) -> Iterator[Part]:
    """The arrays of `encode` as their `size` bytes arrive: `fill` writes the next ones over all of what it is given.

    Every array is at least one part, if an empty one. What `decode` refuses is refused here where it stands, after the parts
    before it.
    """
    left = size

    def take(wanted: int) -> memoryview:
        nonlocal left
        if wanted > left:
            raise PeerError(f"named arrays end at byte {size}, {size - left + wanted} expected")
        left -= wanted
        data = memoryview(bytearray(wanted))
        fill(data)
        return data

    (count,) = struct.unpack(">I", take(4))
    name = ""
    for _ in range(count):
        name, dtype, shape = _head(take, name)
        total = math.prod(shape)
        if total * dtype.itemsize > left:
            raise PeerError(f"named arrays end at byte {size}, {size - left + total * dtype.itemsize} expected")
        block = np.empty(min(total, _AT_ONCE), dtype=dtype)
        try:
            for at in range(0, max(total, 1), _AT_ONCE):
                values = block[: total - at]
                fill(values.data.cast("B") if len(values) else memoryview(bytearray()))
                left -= values.nbytes
                yield Part(name, shape, at, values)
        finally:
            block.fill(0)  # they may be a patient's
    if left:
        raise PeerError(f"named arrays: {left} bytes too many")


def _head(take: Callable[[int], memoryview], last: str) -> tuple[str, np.dtype[Any], tuple[int, ...]]:
    """Name, dtype and shape of the next array; `last` is the name before it."""
    name = bytes(take(take(1)[0])).decode("ascii", "replace")
    if name <= last:
        raise PeerError("named arrays are not in ascending order of name")
    dtype = _DTYPES.get(bytes(take(2)).decode("ascii", "replace"))
    dims = take(1)[0]
    if dtype is None or dims > _MAX_DIMS:
        raise PeerError("named arrays: unknown dtype or too many dimensions")
    shape = struct.unpack(f">{dims}Q", take(8 * dims))
    span = dtype.itemsize
    for dim in shape:
        span *= max(dim, 1)
    if span > _MAX_SPAN:  # no bytes at all may still claim a shape that cannot be
        raise PeerError(f"named arrays: a shape of {span} bytes, were it not empty")
    return name, dtype, shape


def digest(arrays: Arrays) -> bytes:
    """SHA-256 of the canonical bytes."""
    return hashlib.sha256(encode(arrays)).digest()
