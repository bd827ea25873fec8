"""Which row of a file is which variant of the study, and how its count becomes the effect allele's dosage.

Identity is chromosome, position and allele pair, never an id (spec/genomics.md, section 3, rule 5): direct, swapped,
flipped, or both. The study names no palindromic variants, so a complement is unambiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sequester.client.compute.genome.plink import Row, chromosome
from sequester.protocols.study import Variant

_COMPLEMENT = str.maketrans("ACGT", "TGCA")
MISSING = -9


@dataclass(frozen=True, slots=True)
class Match:
    """For each variant of the study: the file's row or -1, and whether the file counts the other allele."""

    row: tuple[int, ...]
    swapped: tuple[bool, ...]
    categories: dict[str, int]  # every variant of the study in exactly one

    def dosage(self, counts: NDArray[np.int8]) -> NDArray[np.int8]:
        """Effect-allele copies (samples, variants), -9 missing, from the counts of the matched rows in order."""
        out = np.full((counts.shape[0], len(self.row)), MISSING, dtype=np.int8)
        column = 0
        for j, row in enumerate(self.row):
            if row < 0:
                continue
            g = counts[:, column]
            out[:, j] = np.where(g < 0, MISSING, 2 - g) if self.swapped[j] else np.where(g < 0, MISSING, g)
            column += 1
        return out


def match(variants: Sequence[Variant], rows: Sequence[Row]) -> Match:
    """The study's variants found in a file. A position with several rows: each by its own allele pair, first wins."""
    at: dict[tuple[str, int], list[int]] = {}
    for index, row in enumerate(rows):
        at.setdefault((row.chromosome, row.position), []).append(index)
    found, swaps = [], []
    categories = dict.fromkeys(("direct", "swapped", "flipped", "flipped_swapped", "allele_mismatch", "absent"), 0)
    for v in variants:
        candidates = at.get((chromosome(v.chromosome), v.position), [])
        best = next(((i, case) for i in candidates if (case := _case(rows[i], v)) is not None), None)
        if best is None:
            categories["allele_mismatch" if candidates else "absent"] += 1
            found.append(-1)
            swaps.append(False)
            continue
        categories[best[1]] += 1
        found.append(best[0])
        swaps.append(best[1] in ("swapped", "flipped_swapped"))
    return Match(tuple(found), tuple(swaps), categories)


def _case(row: Row, v: Variant) -> str | None:
    pair = (row.counted, row.other)
    if pair == (v.effect, v.other):
        return "direct"
    if pair == (v.other, v.effect):
        return "swapped"
    if len(v.effect) == len(v.other) == 1:
        flipped = (row.counted.translate(_COMPLEMENT), row.other.translate(_COMPLEMENT))
        if flipped == (v.effect, v.other):
            return "flipped"
        if flipped == (v.other, v.effect):
            return "flipped_swapped"
    return None
