"""A public panel in PLINK 1 files, as the coordinator has it: the only genotypes that this side of the program ever reads.

Variants are matched by chromosome, position and allele pair, on either strand (a study lists no palindromic variant); a
variant that the panel lacks, or that does not vary in it, has no linkage and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sequester.protocols.errors import StudyError
from sequester.protocols.study import Variant

MAGIC = bytes([0x6C, 0x1B, 0x01])
COPIES = np.array([2.0, np.nan, 1.0, 0.0])  # of A1, by the two bits of a call (PLINK 1.9 file formats, .bed)
_COMPLEMENT = str.maketrans("ACGT", "TGCA")


class Reference:
    """The panel's calls at a study's variants. A file that is missing, cut or not variant-major is a `StudyError`."""

    def __init__(self, prefix: str, variants: Sequence[Variant]) -> None:
        bed, bim, fam = (Path(f"{prefix}{ending}") for ending in (".bed", ".bim", ".fam"))
        try:
            rows = [line.split() for line in bim.read_text("utf-8").splitlines() if line.strip()]
            self.people = sum(1 for line in fam.read_text("utf-8").splitlines() if line.strip())
            size = bed.stat().st_size
            with bed.open("rb") as file:
                magic = file.read(3)
        except (OSError, UnicodeDecodeError) as error:
            raise StudyError(f"{prefix}: {error}", hint="name the prefix of a .bed, .bim and .fam") from None
        width = -(-self.people // 4)
        if any(len(row) < 6 or not row[3].isdigit() for row in rows) or not rows or not self.people:
            raise StudyError(f"{bim} is no .bim file", hint="six columns a line: chromosome, id, cM, position, A1, A2")
        if magic != MAGIC or size != 3 + len(rows) * width:
            raise StudyError(
                f"{bed} has {size} bytes; {self.people} people and {len(rows)} variants, variant-major, need "
                f"{3 + len(rows) * width}",
                hint="the three files do not belong together; `plink2 --make-bed` writes them",
            )
        self._calls = np.memmap(bed, dtype=np.uint8, mode="r", offset=3, shape=(len(rows), width))
        at: dict[tuple[str, int, str, str], tuple[int, bool]] = {}
        for line, row in enumerate(rows):
            chromosome, position, a, b = row[0].lower().removeprefix("chr"), int(row[3]), row[4].upper(), row[5].upper()
            for pair, counted in (((a, b), True), ((b, a), False)):
                other_strand = (pair[0].translate(_COMPLEMENT), pair[1].translate(_COMPLEMENT))
                for effect, other in (pair, other_strand):
                    at.setdefault((chromosome, position, effect, other), (line, counted))
        found = [at.get((v.chromosome, v.position, v.effect, v.other)) for v in variants]
        self.matched = np.array([place is not None for place in found], dtype=bool)
        self._line = np.array([place[0] if place else 0 for place in found], dtype=np.int64)
        self._counted = np.array([place[1] if place else True for place in found], dtype=bool)

    def copies(self, places: NDArray[np.int64]) -> NDArray[np.float64]:
        """Copies of the study's effect allele, (people, places), NaN missing, of variants that are matched."""
        packed = self._calls[self._line[places]]
        calls = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=2).reshape(len(places), -1)
        counts = COPIES[calls[:, : self.people]].T
        return np.where(self._counted[places], counts, 2 - counts)

    def standardised(self, places: NDArray[np.int64]) -> NDArray[np.float64]:
        """Columns of mean 0 and length 1, a missing call 0, so that X'X are correlations; 0 where nobody varies."""
        x = self.copies(places)
        with np.errstate(invalid="ignore"):
            x = np.nan_to_num(x - np.nan_to_num(np.nansum(x, axis=0) / (~np.isnan(x)).sum(axis=0)))
        length = np.sqrt(np.einsum("ij,ij->j", x, x))
        unit: NDArray[np.float64] = x / np.where(length > 1e-9, length, np.inf)
        return unit
