"""PLINK 1 files of simulated people, written as hospitals write them: some swap alleles, some flip strands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_MAGIC = bytes([0x6C, 0x1B, 0x01])
_CODE = np.array([0b11, 0b10, 0b00, 0b01], dtype=np.uint8)  # copies of A1 0, 1, 2; missing (PLINK 1.9 file formats)


@dataclass(frozen=True, slots=True)
class Line:
    """One row of a .bim file: `counted` is A1."""

    chromosome: str
    id: str
    position: int
    counted: str
    other: str


def bed_bytes(counts: NDArray[np.int8]) -> bytes:
    """A .bed file, variant-major, of counts of A1: int8 (people, variants), negative = missing."""
    people, variants = counts.shape
    codes = _CODE[np.where(counts.T < 0, 3, counts.T)]  # (variants, people)
    padded = np.zeros((variants, -(-people // 4) * 4), dtype=np.uint8)
    padded[:, :people] = codes
    quads = padded.reshape(variants, -1, 4)
    packed = quads[:, :, 0] | quads[:, :, 1] << 2 | quads[:, :, 2] << 4 | quads[:, :, 3] << 6
    data: bytes = packed.astype(np.uint8).tobytes()
    return _MAGIC + data


def write_bed(prefix: Path, people: Sequence[str], lines: Sequence[Line], counts: NDArray[np.int8]) -> None:
    """Write prefix.bed, .bim and .fam; counts: int8 (people, variants) copies of each line's `counted` allele."""
    prefix.with_suffix(".bed").write_bytes(bed_bytes(counts))
    bim = "".join(f"{v.chromosome}\t{v.id}\t0\t{v.position}\t{v.counted}\t{v.other}\n" for v in lines)
    prefix.with_suffix(".bim").write_text(bim, "utf-8")
    prefix.with_suffix(".fam").write_text("".join(f"0 {name} 0 0 0 -9\n" for name in people), "utf-8")
