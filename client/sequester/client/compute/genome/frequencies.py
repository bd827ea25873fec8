"""On which strand a file's A/T and C/G variants are, told by frequencies: the panel's, mixed as the site's people are.

Pooled frequencies give wrong signs where a site's ancestry is not the panel's (spec/genomics.md, section 3, rule 6). The
answer depends on the patients, so it is for exact studies only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sequester.client.compute.genome import ancestry
from sequester.client.compute.genome.harmonise import Match, oriented
from sequester.client.compute.genome.panel import Panel
from sequester.client.compute.genome.quality import variant_counts

MINOR_FREQUENCY, TOLERANCE = 0.40, 0.10

Read = Callable[[list[int]], NDArray[np.int8]]  # rows of the file -> int8 (rows, people)


def on_strand(panel: Panel, matched: Match, read: Read) -> dict[int, bool]:
    """Panel rows of palindromic variants whose strand is told: whether the file is on the panel's.

    Kept: minor frequency below 0.40 in the panel, as mixed here, and exactly one reading within 0.10 of it.
    """
    columns = ancestry.populations(panel.frequency)
    row_of = np.array(matched.row)
    present = np.where((row_of >= 0)[:, None], panel.frequency, np.nan)
    rows = ancestry.informative(present)
    if len(rows) < ancestry.LEAST_VARIANTS or not matched.ambiguous:
        return {}
    genotypes = read([matched.row[j] for j in rows.tolist()])
    for i, j in enumerate(rows.tolist()):
        genotypes[i] = oriented(genotypes[i], matched.swapped[j])
    shares = ancestry.shares(genotypes, panel.frequency[np.ix_(rows, columns)]).mean(axis=0)
    expected = panel.frequency[:, columns].astype(np.float64) @ shares
    seen = variant_counts(read([i for i, _, _ in matched.ambiguous])).frequency
    out = {}
    for (_, j, swapped), frequency in zip(matched.ambiguous, seen, strict=True):
        same = 1 - frequency if swapped else frequency
        near = [abs(reading - expected[j]) <= TOLERANCE for reading in (same, 1 - same)]
        if min(expected[j], 1 - expected[j]) < MINOR_FREQUENCY and near[0] != near[1]:
            out[j] = near[0]
    return out
