"""Genotype files in every format from one matrix, and plain readers to compare with: slow, short, and not ours to ship."""

from __future__ import annotations

import gzip
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from sequester.client.compute.genome.source import EOF_BLOCK, Reading, open_source
from sequester.client.ingest.convert import convert
from sequester.simulate.plink import Line, write_bed

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("SEQUESTER_DATA", str(ROOT.parent / "shared/data")))
needs_data = pytest.mark.skipif(not DATA.exists(), reason="SEQUESTER_DATA is not there")
needs_plink2 = pytest.mark.skipif(shutil.which("plink2") is None, reason="no plink2 on this machine")
HEADER = (
    "##fileformat=VCFv4.2\n##contig=<ID=1>\n##contig=<ID=X>\n"
    '##FILTER=<ID=LowQual,Description="x">\n##INFO=<ID=R2,Number=1,Type=Float,Description="x">\n'
    '##FORMAT=<ID=GT,Number=1,Type=String,Description="x">\n##FORMAT=<ID=DS,Number=A,Type=Float,Description="x">\n'
)
CALLS = {0: "0/0", 1: "0/1", 2: "1/1", -9: "./."}


def quiet(*_: object) -> None:
    """Progress that nobody watches."""


def vcf_text(samples: Sequence[str], rows: Sequence[Sequence[str]], header: str = HEADER) -> str:
    """A VCF of rows: CHROM POS ID REF ALT FILTER INFO FORMAT and one field for each sample."""
    lines = ["#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\t" + "\t".join(samples)]
    lines += ["\t".join([*r[:5], ".", *r[5:]]) for r in rows]
    return header + "\n".join(lines) + "\n"


def bgzip(data: bytes, block: int = 4096) -> bytes:
    """BGZF (SAM specification, section 4.1), in small blocks so that there is something to cut between."""
    out = b""
    for start in range(0, len(data), block):
        piece = data[start : start + block]
        packer = zlib.compressobj(6, zlib.DEFLATED, -15)
        body = packer.compress(piece) + packer.flush()
        head = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x06\0BC\x02\0" + struct.pack("<H", len(body) + 25)
        out += head + body + struct.pack("<II", zlib.crc32(piece), len(piece))
    return out + EOF_BLOCK


def matrix_vcf(path: Path, samples: Sequence[str], lines: Sequence[Line], counts: np.ndarray) -> None:
    """A VCF of hard calls; counts: (samples, variants), -9 missing."""
    rows = [
        [
            v.chromosome,
            str(v.position),
            v.id,
            v.other,
            v.counted,
            ".",
            ".",
            "GT",
            *[CALLS[int(c)] for c in counts[:, j]],
        ]
        for j, v in enumerate(lines)
    ]
    text = vcf_text(samples, rows).encode()
    path.write_bytes(bgzip(text) if path.suffix == ".gz" else text)


def to_bcf(source: Path, target: Path) -> None:
    """The same variants as BCF, written by htslib."""
    import cyvcf2

    reader = cyvcf2.VCF(str(source))
    writer = cyvcf2.Writer(str(target), reader, mode="wb")
    for variant in reader:
        writer.write_record(variant)
    writer.close()


def matrix_bgen(path: Path, samples: Sequence[str], lines: Sequence[Line], counts: np.ndarray) -> None:
    """A BGEN 1.2 file of hard calls, 8 bits, unphased, second allele counted."""
    import bgen

    with bgen.BgenWriter(str(path), len(samples), samples=list(samples)) as writer:
        for j, v in enumerate(lines):
            p = np.full((len(samples), 3), np.nan)
            for copies in range(3):
                p[counts[:, j] == copies] = np.eye(3)[copies]
            writer.add_variant(v.id, v.id, v.chromosome, v.position, [v.other, v.counted], p)


def twin_vcf(path: Path) -> tuple[list[tuple[str, int, str, str]], np.ndarray]:
    """Variants and copies (entries, samples) of each ALT allele of a clean diploid VCF, by reading it as text."""
    keys, copies = [], []
    opener: Callable[..., object] = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:  # type: ignore[attr-defined]
        for line in file:
            if line.startswith("#"):
                continue
            f = line.rstrip("\r\n").split("\t")
            for k, alt in enumerate(f[4].split(","), 1):
                keys.append((f[0], int(f[1]), alt, f[3]))
                row = []
                for cell in f[9:]:
                    alleles = cell.split(":")[0].replace("|", "/").split("/")
                    row.append(-9 if "." in alleles or len(alleles) != 2 else sum(a == str(k) for a in alleles))
                copies.append(row)
    return keys, np.array(copies, dtype=np.int8)


def read(path: Path, reading: Reading | None = None) -> tuple[list[tuple[str, int, str, str]], np.ndarray, list[str]]:
    """What our reader gives: variants, genotypes (entries, samples), reasons."""
    source = open_source(path, reading or Reading())
    entries = list(source.entries(source.scan()))
    genotypes = np.array([e.genotypes for e in entries])
    return [(e.chromosome, e.position, e.counted, e.other) for e in entries], genotypes, [e.reason for e in entries]


def converted(path: Path, folder: Path) -> str:
    """The prefix of the PLINK 2 files a source is turned into."""
    convert(path, folder, Reading(), quiet)
    return str(folder / "genotypes")


__all__ = ["Line", "write_bed"]
