"""Memory of vectors, used again: an operating system takes longer over fresh pages than we take over what is in them."""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class Room:
    """Room for one array at a time. What was given out is given out again once nobody holds it or a view of it.

    Threads may share it: a round that was given up may still ask in its thread while the next one does in another.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()  # between the count and the giving another thread would be given the same memory
        self._array: NDArray[Any] = np.empty(0, dtype=np.uint8)

    def array(self, length: int, dtype: DTypeLike) -> NDArray[Any]:
        """(length,), with whatever stood there before: to be written over whole."""
        with self._turn:
            fits = self._array.shape == (length,) and self._array.dtype == dtype
            if not fits or sys.getrefcount(self._array) > 2:  # this object's reference, and the call's
                self._array = np.empty(length, dtype=dtype)
            return self._array
