"""PLINK and VCF files of simulated people, written as hospitals write them: some swap alleles, some flip strands."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_MAGIC = bytes([0x6C, 0x1B, 0x01])
_CODE = np.array([0b11, 0b10, 0b00, 0b01], dtype=np.uint8)  # copies of A1 0, 1, 2; missing (PLINK 1.9 file formats)


@dataclass(frozen=True, slots=True)
class Line:
    """One row of a file: `counted` is A1 of a .bim file, ALT elsewhere; a VCF row may name several, of which the first."""

    chromosome: str
    id: str
    position: int
    counted: str
    other: str


def bed_bytes(counts: NDArray[np.int8]) -> bytes:
    """A .bed file, variant-major, of counts of A1: int8 (people, variants), negative = missing."""
    return _MAGIC + _packed(_CODE[np.where(counts.T < 0, 3, counts.T)])


def _packed(codes: NDArray[np.uint8]) -> bytes:
    """Codes (variants, people) of two bits each, the first person lowest, rows padded to whole bytes."""
    variants, people = codes.shape
    padded = np.zeros((variants, -(-people // 4) * 4), dtype=np.uint8)
    padded[:, :people] = codes
    quads = padded.reshape(variants, -1, 4)
    packed = quads[:, :, 0] | quads[:, :, 1] << 2 | quads[:, :, 2] << 4 | quads[:, :, 3] << 6
    data: bytes = packed.astype(np.uint8).tobytes()
    return data


def write_pgen(prefix: Path, people: Sequence[str], lines: Sequence[Line], counts: NDArray[np.int8]) -> None:
    """Write prefix.pgen (PGEN specification, mode 2: hard calls of fixed width), .pvar and .psam; counts as in `write_bed`."""
    head = b"\x6c\x1b\x02" + len(lines).to_bytes(4, "little") + len(people).to_bytes(4, "little") + b"\x40"
    prefix.with_suffix(".pgen").write_bytes(head + _packed(np.where(counts.T < 0, 3, counts.T).astype(np.uint8)))
    rows = "".join(f"{v.chromosome}\t{v.position}\t{v.id}\t{v.other}\t{v.counted}\n" for v in lines)
    prefix.with_suffix(".pvar").write_text("#CHROM\tPOS\tID\tREF\tALT\n" + rows, "utf-8")
    prefix.with_suffix(".psam").write_text("#IID\tSEX\n" + "".join(f"{name}\tNA\n" for name in people), "utf-8")


_CALL = np.array(["0/0", "0/1", "1/1", "./."])
_CHROMOSOME_1 = {"GRCh37": 249_250_621, "GRCh38": 248_956_422}


def write_vcf(
    path: Path, people: Sequence[str], lines: Sequence[Line], counts: NDArray[np.int8], build: str = "GRCh38"
) -> None:
    """Write a gzip-compressed VCF; counts as in `write_bed`, of the first ALT allele of each line."""
    head = [
        "##fileformat=VCFv4.2",
        f"##contig=<ID=1,length={_CHROMOSOME_1[build]}>",
        '##FORMAT=<ID=GT,Number=1,Type=String,Description="Genotype">',
        "\t".join(["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO", "FORMAT", *people]),
    ]
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
        file.write(("\n".join(head) + "\n").encode())
        for j, v in enumerate(lines):
            calls = _CALL[np.where(counts[:, j] < 0, 3, counts[:, j])]
            row = [v.chromosome, str(v.position), v.id, v.other, v.counted, ".", "PASS", ".", "GT", *calls]
            file.write(("\t".join(row) + "\n").encode())


def write_bed(prefix: Path, people: Sequence[str], lines: Sequence[Line], counts: NDArray[np.int8]) -> None:
    """Write prefix.bed, .bim and .fam; counts: int8 (people, variants) copies of each line's `counted` allele."""
    prefix.with_suffix(".bed").write_bytes(bed_bytes(counts))
    bim = "".join(f"{v.chromosome}\t{v.id}\t0\t{v.position}\t{v.counted}\t{v.other}\n" for v in lines)
    prefix.with_suffix(".bim").write_text(bim, "utf-8")
    prefix.with_suffix(".fam").write_text("".join(f"0 {name} 0 0 0 -9\n" for name in people), "utf-8")
