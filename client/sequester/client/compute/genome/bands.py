"""People at two hospitals, found in a rehearsal: eight keyed digests of 32 common variants each, any of them equal.

A digest of one long row of genotypes would miss most of them, since two laboratories disagree about one genotype in a
hundred; eight short ones found all of 564 real people and no false pair (spec/genomics.md, section 4).

Who holds the key and somebody's genome can test whether that person is here. So the key is thrown away after a rehearsal
on simulated or public people, and nothing here is called for a study.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sequester.client.compute.genome.panel import Panel
from sequester.client.compute.genome.plink import MISSING

BANDS, WIDTH = 8, 32
_MINOR_FREQUENCY = 0.3


def band_rows(panel: Panel) -> NDArray[np.int64]:
    """The 256 panel rows of the bands, int64 (BANDS, WIDTH): common, not palindromic, spread over the genome."""
    minor = np.minimum(panel.mean_frequency, 1 - panel.mean_frequency)
    common = np.flatnonzero((minor > _MINOR_FREQUENCY) & ~panel.palindromic)
    chosen = common[np.linspace(0, len(common) - 1, BANDS * WIDTH).astype(np.int64)]
    return np.asarray(chosen.reshape(WIDTH, BANDS).T, dtype=np.int64)  # neighbours in different bands


def digests(genotypes: NDArray[np.int8], key: bytes) -> list[list[bytes | None]]:
    """For each person a digest of each band, None where a genotype of it is missing.

    genotypes: int8 (people, BANDS * WIDTH), copies of ALT at the rows of `band_rows` in order, -9 missing.
    """
    bands = genotypes.reshape(len(genotypes), BANDS, WIDTH)
    return [
        [
            None if (row[band] == MISSING).any() else hmac.digest(key, bytes([band]) + row[band].tobytes(), "sha256")
            for band in range(BANDS)
        ]
        for row in bands
    ]


def pairs(here: Sequence[Sequence[bytes | None]], there: Sequence[Sequence[bytes | None]]) -> set[tuple[int, int]]:
    """People who share any digest, as rows of both sides."""
    found: set[tuple[int, int]] = set()
    for band in range(BANDS):
        rows: dict[bytes, list[int]] = {}
        for row, person in enumerate(there):
            if (digest := person[band]) is not None:
                rows.setdefault(digest, []).append(row)
        for row, person in enumerate(here):
            if (digest := person[band]) is not None:
                found.update((row, other) for other in rows.get(digest, ()))
    return found
