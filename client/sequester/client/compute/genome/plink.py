"""PLINK 1 and PLINK 2 files: checked against their own counts first, then read with pgenlib.

Damage that the library reads without a word (rows of the sample file off by a few, NUL in an id, a flipped magic byte)
is refused here, with file, line and what was expected (spec/genomics.md, section 2). No person's id is ever printed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sequester.protocols.errors import SiteError

_TELLING = 20  # variants from which on one genotype everywhere is no person
BED_MAGIC = bytes([0x6C, 0x1B, 0x01])


@dataclass(frozen=True, slots=True)
class Row:
    """One variant of a file: `counted` is the allele whose copies the reader returns."""

    chromosome: str
    position: int
    counted: str
    other: str


class PlinkFiles:
    """The three files behind a prefix: `samples` ids in file order, `variants` rows in file order."""

    def __init__(self, prefix: str) -> None:
        if "://" in prefix:
            raise SiteError(f"{prefix} is not a path", hint="genotypes are read from files of this machine only")
        self._prefix = prefix
        if Path(prefix + ".bed").exists():
            self._genotypes = Path(prefix + ".bed")
            self.samples = _samples(Path(prefix + ".fam"), 1, 6)
            self.variants = _bim(Path(prefix + ".bim"))
            self._check_bed()
        elif Path(prefix + ".pgen").exists():
            self._genotypes = Path(prefix + ".pgen")
            self.samples = _psam(Path(prefix + ".psam"))
            self.variants = _pvar(Path(prefix + ".pvar"))
        else:
            raise SiteError(
                f"no {prefix}.bed and no {prefix}.pgen",
                hint="`genotypes` in site.toml is the prefix of .bed/.bim/.fam or .pgen/.pvar/.psam files",
            )
        seen: dict[str, int] = {}
        for number, sample in enumerate(self.samples, 1):
            if sample in seen:
                raise SiteError(
                    f"{prefix}: the sample ids of people {seen[sample]} and {number} are the same",
                    hint="one row per person; remove the duplicate (`plink2 --remove`)",
                )
            seen[sample] = number

    def _check_bed(self) -> None:
        n, v = len(self.samples), len(self.variants)
        width = -(-n // 4)
        size, expected = self._genotypes.stat().st_size, 3 + v * width
        with self._genotypes.open("rb") as file:
            magic = file.read(3)
            if magic[:2] != BED_MAGIC[:2]:
                raise SiteError(
                    f"{self._genotypes.name} does not begin as a .bed file",
                    hint="copy it again, or name the right prefix",
                )
            if magic[2:] != BED_MAGIC[2:]:
                raise SiteError(
                    f"{self._genotypes.name} is sample-major, variant-major was expected",
                    hint=f"`plink2 --bfile {Path(self._prefix).name} --make-pgen`",
                )
            if size != expected:
                raise SiteError(
                    f"{self._genotypes.name} has {size} bytes; {n} people in .fam and {v} variants in .bim need {expected}",
                    hint="the three files do not belong together, or a copy was cut: copy all three again",
                )
            if not v or not n:
                raise SiteError(
                    f"{self._genotypes.name} holds {n} people and {v} variants", hint="copy the files again"
                )
            last = np.memmap(self._genotypes, dtype=np.uint8, mode="r", offset=3, shape=(v, width))[:, -1]
            # a row too many in .fam makes padding a person: two copies of A1 everywhere
            if v >= _TELLING and not (last & (3 << (2 * ((n - 1) % 4)))).any():
                raise SiteError(
                    f"the last person of {Path(self._prefix).name}.fam has two A1 alleles at all {v} variants",
                    hint="rows of .fam are too many: use the .fam that was written with this .bed",
                )
            if n % 4:
                mask = (0xFF << (2 * (n % 4))) & 0xFF
                if (last & mask).any():
                    raise SiteError(
                        f"{self._genotypes.name} holds more people than the {n} of {Path(self._prefix).name}.fam",
                        hint="rows of .fam are missing: use the .fam that was written with this .bed",
                    )

    def counts(self, wanted: Sequence[int]) -> NDArray[np.int8]:
        """Copies of the counted allele, int8 (samples, len(wanted)), -9 missing, for the variants at `wanted`."""
        import pgenlib

        out = np.empty((len(wanted), len(self.samples)), dtype=np.int8)  # (variants, samples)
        try:
            reader = pgenlib.PgenReader(
                str(self._genotypes).encode(), raw_sample_ct=len(self.samples), variant_ct=len(self.variants)
            )
            for row, index in enumerate(wanted):
                reader.read(index, out[row])
            reader.close()
        except (RuntimeError, OSError) as error:
            raise SiteError(
                f"{self._genotypes.name} cannot be read: {str(error).splitlines()[0]}", hint="copy the file again"
            ) from None
        return np.ascontiguousarray(out.T)


def _lines(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SiteError(f"{path}: {error.strerror}", hint="check the path and who may read it") from None
    if b"\x00" in data:
        raise SiteError(f"{path.name} holds a NUL byte", hint="it is not a text file: copy it again")
    try:
        return data.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise SiteError(f"{path.name} line {line}: not UTF-8", hint="save the file as UTF-8") from None


def _samples(path: Path, column: int, least: int) -> list[str]:
    ids = []
    for number, line in enumerate(_lines(path), 1):
        fields = line.split()
        if len(fields) < least:
            raise SiteError(f"{path.name} line {number}: {len(fields)} columns, {least} were expected")
        ids.append(fields[column])
    return ids


def _psam(path: Path) -> list[str]:
    lines = [line for line in _lines(path) if not line.startswith("##")]
    header = lines[0].lstrip("#").split() if lines and lines[0].startswith("#") else ["FID", "IID"]
    body = lines[1:] if lines and lines[0].startswith("#") else lines
    if "IID" not in header:
        raise SiteError(f"{path.name} has no IID column", hint="`plink2 --make-pgen` writes one")
    column = header.index("IID")
    ids = []
    for number, line in enumerate(body, 1):
        fields = line.split()
        if len(fields) <= column:
            raise SiteError(f"{path.name}, person {number}: {len(fields)} columns, {len(header)} were expected")
        ids.append(fields[column])
    return ids


def _position(path: Path, number: int, text: str) -> int:
    try:
        position = int(text)
    except ValueError:
        raise SiteError(f"{path.name} line {number}: `{text}` is not a position") from None
    if position >= 2**31:
        raise SiteError(f"{path.name} line {number}: position {position} is beyond any chromosome")
    return position


def _bim(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(_lines(path), 1):
        fields = line.split()
        if len(fields) != 6:
            raise SiteError(
                f"{path.name} line {number}: {len(fields)} columns, 6 were expected",
                hint="chromosome, id, centimorgan, position, A1, A2",
            )
        # A1 of a .bim file is the counted allele (PLINK 1.9 file formats, .bim)
        rows.append(
            Row(chromosome(fields[0]), _position(path, number, fields[3]), fields[4].upper(), fields[5].upper())
        )
    return rows


def _pvar(path: Path) -> list[Row]:
    lines = [(number, line) for number, line in enumerate(_lines(path), 1) if not line.startswith("##")]
    if not lines or not lines[0][1].startswith("#CHROM"):
        raise SiteError(f"{path.name} has no #CHROM header", hint="`plink2 --make-pgen` writes one")
    header = lines[0][1].lstrip("#").split()
    if not {"CHROM", "POS", "REF", "ALT"} <= set(header):
        raise SiteError(
            f"{path.name}: the header lacks CHROM, POS, REF or ALT", hint="`plink2 --make-pgen` writes them"
        )
    chrom, pos, ref, alt = (header.index(name) for name in ("CHROM", "POS", "REF", "ALT"))
    rows = []
    for number, line in lines[1:]:
        f = line.split()
        if len(f) < len(header):
            raise SiteError(f"{path.name} line {number}: {len(f)} columns, {len(header)} were expected")
        rows.append(Row(chromosome(f[chrom]), _position(path, number, f[pos]), f[alt].upper(), f[ref].upper()))
    return rows


def chromosome(name: str) -> str:
    """1..22, X, Y, XY or MT, whatever the file's habit; other contigs keep their name.

    >>> chromosome("chr1"), chromosome("23"), chromosome("chrM")
    ('1', 'X', 'MT')
    """
    bare = name[3:] if name[:3].lower() == "chr" else name
    return {"23": "X", "24": "Y", "25": "XY", "26": "MT", "M": "MT"}.get(bare.upper(), bare.upper())
