"""BGEN 1.2 and 1.3, read once through the `bgen` package; its table of blocks is walked first, so that no size it claims
is believed before it was compared with the file's own.

Which allele is REF a BGEN file does not say. `counted` is the second allele; matching needs the pair only.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequester.client.compute.genome.plink_text import lines, text
from sequester.client.compute.genome.source import COPY_AGAIN, Entry, Reading, Scan, missing, unique
from sequester.client.compute.genome.variants import X, Y, chromosome_code
from sequester.protocols.errors import SiteError

_SAMPLE_FILE = "it is the .sample file that was written with the .bgen file: copy both again"
_SEX = {b"1": 1, b"2": 2}
_WHOLE = 1e-6  # a dosage this near to a whole number, for everybody, is a hard call


class BgenFile:
    """One .bgen file, with its .sample file where that lies beside it."""

    has_dosages = True

    def __init__(self, path: Path, reading: Reading) -> None:
        self.path, self.reading = path, reading
        self.calls: Counter[str] = Counter()
        sample = path.with_suffix(".sample")
        self._sample = sample if sample.is_file() else None

    def scan(self) -> Scan:
        """Walk the blocks (BGEN 1.2 specification): every length against the file's size, ending at its last byte."""
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            offset, header, variants, people, magic = struct.unpack("<IIII4s", _exactly(self.path, file, 20))
            if magic not in (b"bgen", b"\0\0\0\0") or header < 20 or header > offset:
                raise SiteError(f"{self.path.name} does not begin as a .bgen file", hint=COPY_AGAIN)
            file.seek(4 + header - 4)
            (flags,) = struct.unpack("<I", _exactly(self.path, file, 4))
            if (flags >> 2) & 15 != 2 or flags & 3 > 2:
                raise SiteError(
                    f"{self.path.name} is of layout {(flags >> 2) & 15}, layout 2 (BGEN 1.2) was expected",
                    hint="`plink2 --bgen FILE ref-last --export bgen-1.2` writes one",
                )
            if not people or not variants or offset + 4 > size or people > size:
                raise SiteError(
                    f"{self.path.name} claims {people} people and {variants} variants in {size} bytes", hint=COPY_AGAIN
                )
            ids = self._embedded(file, header, offset, people) if flags >> 31 else []
            file.seek(4 + offset)
            for number in range(1, variants + 1):
                self._walk(file, number, people, size, compressed=bool(flags & 3))
            if file.tell() != size:
                raise SiteError(
                    f"{self.path.name} has {size - file.tell()} bytes after its last variant", hint=COPY_AGAIN
                )
            file.seek(0)
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        samples, sex = self._people(people, ids)
        unique(self.path, samples)
        return Scan(digest.hexdigest(), samples, variants, variants, None, sex)

    def _embedded(self, file: Any, header: int, offset: int, people: int) -> list[str]:
        file.seek(4 + header)
        length, count = struct.unpack("<II", _exactly(self.path, file, 8))
        if count != people or header + length > offset:
            raise SiteError(f"{self.path.name}: its list of samples contradicts its header", hint=COPY_AGAIN)
        ids = []
        for _ in range(count):
            (n,) = struct.unpack("<H", _exactly(self.path, file, 2))
            ids.append(text(self.path, 1, _exactly(self.path, file, n)))
        if file.tell() != 4 + header + length:
            raise SiteError(f"{self.path.name}: its list of samples contradicts its header", hint=COPY_AGAIN)
        return ids

    def _walk(self, file: Any, number: int, people: int, size: int, *, compressed: bool) -> None:
        """Pass one variant's block; the genotypes it holds unpacked cannot be larger than its people and alleles allow."""
        for _ in range(3):  # id, rs id, chromosome
            (n,) = struct.unpack("<H", _exactly(self.path, file, 2))
            text(self.path, number, _exactly(self.path, file, n))
        _, alleles = struct.unpack("<IH", _exactly(self.path, file, 6))
        for _ in range(alleles):
            (n,) = struct.unpack("<I", _exactly(self.path, file, 4))
            if file.tell() + n > size:
                raise SiteError(f"{self.path.name}, variant {number}: an allele longer than the file", hint=COPY_AGAIN)
            text(self.path, number, _exactly(self.path, file, n))
        (length,) = struct.unpack("<I", _exactly(self.path, file, 4))
        if alleles < 2 or file.tell() + length > size:
            raise SiteError(f"{self.path.name}, variant {number}: its block is cut or damaged", hint=COPY_AGAIN)
        block = _exactly(self.path, file, min(length, 4 if compressed else 8))
        unpacked = length
        if compressed:
            (unpacked,) = struct.unpack("<I", block.ljust(4, b"\xff")[:4])
        if length < 10 or unpacked > 10 + people * (1 + 4 * 64 * alleles):
            raise SiteError(f"{self.path.name}, variant {number}: its block claims too many bytes", hint=COPY_AGAIN)
        file.seek(length - len(block), 1)

    def _people(self, people: int, ids: list[str]) -> tuple[list[str], list[int]]:
        if self._sample is None:
            if not ids:
                raise SiteError(f"{self.path.name} names no samples", hint="put its .sample file beside it")
            return ids, [0] * people
        header: list[bytes] = []
        samples, sex = [], []
        for number, line in lines(self._sample):
            fields = line.split()
            if number == 1:
                header = [f.lower() for f in fields]
                if header[:3] != [b"id_1", b"id_2", b"missing"]:
                    raise SiteError(f"{self._sample.name} line 1: ID_1 ID_2 missing were expected", hint=_SAMPLE_FILE)
            if len(fields) != len(header):
                raise SiteError(
                    f"{self._sample.name} line {number}: {len(fields)} columns, {len(header)} were expected",
                    hint=_SAMPLE_FILE,
                )
            if number > 2:
                samples.append(text(self._sample, number, fields[1]))
                sex.append(_SEX.get(fields[header.index(b"sex")], 0) if b"sex" in header else 0)
        if len(samples) != people:
            raise SiteError(
                f"{self.path.name} holds {people} people, {self._sample.name} lists {len(samples)}",
                hint="the two files do not belong together: copy both again",
            )
        if ids and ids != samples:
            raise SiteError(
                f"{self.path.name} names other people than {self._sample.name}, or in another order",
                hint="the two files do not belong together: copy both again, or remove the .sample file",
            )
        return samples, sex

    def entries(self, scan: Scan) -> Iterator[Entry]:
        """Every variant; the dosage is that of its second allele."""
        import bgen

        n, row = len(scan.samples), 0
        try:
            reader = bgen.BgenReader(str(self.path), delay_parsing=True)
            for row, variant in enumerate(reader, 1):
                alleles = variant.alleles
                name = variant.rsid or variant.varid or "."
                if len(alleles) != 2:
                    yield Entry(
                        variant.chrom, variant.pos, ",".join(alleles[1:]), alleles[0], name, missing(n), True,
                        "multiallelic_bgen",
                    )  # fmt: skip
                    continue
                genotypes = self._genotypes(row, variant, n)
                yield Entry(variant.chrom, variant.pos, alleles[1], alleles[0], name, genotypes)
        except SiteError:
            raise
        except Exception:  # the package raises its C++ exceptions as they come
            raise SiteError(
                f"{self.path.name}, variant {row + 1}: its genotypes cannot be read", hint=COPY_AGAIN
            ) from None
        if row != scan.rows:
            raise SiteError(f"{self.path.name}: {row} variants could be read of {scan.rows}", hint=COPY_AGAIN)

    def _genotypes(self, row: int, variant: Any, n: int) -> NDArray[Any]:
        dosage = np.asarray(variant.alt_dosage, dtype=np.float32)
        ploidy = np.asarray(variant.ploidy)
        if dosage.shape != (n,) or ploidy.shape != (n,):
            raise SiteError(f"{self.path.name}, variant {row}: genotypes of {len(dosage)} people", hint=COPY_AGAIN)
        called = np.isfinite(dosage) & (dosage >= 0)
        if chromosome_code(variant.chrom) in (X, Y):
            dosage = np.where(ploidy == 1, 2 * dosage, dosage)
            called &= ploidy <= 2
        else:
            self.calls["haploid_call"] += int((called & (ploidy == 1)).sum())
            self.calls["more_than_two_alleles"] += int((called & (ploidy > 2)).sum())
            called &= ploidy == 2
        if (dosage[called] > 2 + _WHOLE).any():
            raise SiteError(f"{self.path.name}, variant {row}: a dosage outside 0..2", hint=COPY_AGAIN)
        dosage = np.where(called, np.clip(dosage, 0, 2), np.float32(-9))
        whole = np.rint(dosage)
        if (np.abs(dosage - whole) <= _WHOLE).all():
            return whole.astype(np.int8)
        return dosage.astype(np.float32)


def _exactly(path: Path, file: Any, n: int) -> bytes:
    data: bytes = file.read(n)
    if len(data) != n:
        raise SiteError(f"{path.name} ends inside a variant or its header", hint=COPY_AGAIN)
    return data
