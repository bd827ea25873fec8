"""Who takes part in a round: every patient alone, with the plan's public rate, by bytes of the operating system.

Amplification by sampling holds while nobody can guess the sample, so torch's 32-bit seeds are out of the question
(spec/privacy.md, 3.3 and trap 3). Nothing is drawn that depends on the number of patients.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

ByteSource = Callable[[int], bytes]


def poisson_mask(patients: int, rate: Decimal, source: ByteSource) -> NDArray[np.bool_]:
    """Each patient independently with probability `rate`, bool (patients,); rounded down to a multiple of 2^-64.

    `source` gives so many secret bytes: `os.urandom` in the product.
    """
    if rate >= 1:
        return np.ones(patients, dtype=bool)
    words = np.frombuffer(source(8 * patients), dtype="<u8")
    return np.asarray(words < np.uint64(int(rate * 2**64)))
