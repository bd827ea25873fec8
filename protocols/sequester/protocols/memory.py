"""Memory of vectors, used again: an operating system takes longer over fresh pages than we take over what is in them."""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class Room:
    """Room for one array a use. What was given out is given out again once nobody holds it or a view of it.

    Threads may share it: a round that was given up may still ask in its thread while the next one does in another.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()  # between the count and the giving another thread would be given the same memory
        self._arrays: dict[str, NDArray[Any]] = {}

    def array(self, length: int, dtype: DTypeLike, use: str = "") -> NDArray[Any]:
        """(length,), with whatever stood there before: to be written over whole."""
        with self._turn:
            found = self._arrays.get(use)
            # three who know a free one: the dictionary, this function and the call
            if found is None or found.shape != (length,) or found.dtype != dtype or sys.getrefcount(found) > 3:
                found = self._arrays[use] = np.empty(length, dtype=dtype)
            return found
