"""What an analysis may see of a site's patients. Compute implements it; nothing else ever holds one.

Values are public-scale: each feature is already imputed, clamped and standardised by the study's public constants
(`Study.features()`), so that no number here was derived from the patients as a group (spec/privacy.md, 3.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Part = Literal["train", "test", "all"]


@dataclass(frozen=True, slots=True)
class Block:
    """Some patients: `x` float64 (rows, features) standardised, `y` float64 (rows,), `fold` int64 (rows,),

    `strata` int64 (rows,) index into the study's subgroups, 0 where it names none.
    """

    x: NDArray[np.float64]  # (rows, features)
    y: NDArray[np.float64]  # (rows,)
    fold: NDArray[np.int64]  # (rows,), 0..folds-1 by keyed hash of the patient
    strata: NDArray[np.int64]  # (rows,)


class Cohort(Protocol):
    """A frozen cohort. Iterating twice gives the same patients in the same order."""

    def blocks(self, part: Part) -> Iterator[Block]:
        """The patients of one part, in blocks of rows; parts are fixed at ingest by keyed hash of the patient."""
        ...


Result = dict[str, Any]
