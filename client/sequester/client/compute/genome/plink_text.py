"""The text beside PLINK genotypes: .fam and .psam (people), .bim and .pvar (variants), read line by line.

Fields are split at ASCII blanks before anything is decoded, so that a no-break space in a name moves no column. A fault
names file and line, never a person.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sequester.client.compute.genome.variants import Columns, Variants, chromosome_code
from sequester.protocols.errors import SiteError

LONGEST_LINE = 1 << 24
MAX_POSITION = 2**31
_COLUMNS = "copy the file again; a tab or blank inside a name adds a column"
_POSITION = "correct or remove the row, or copy the file again"
_SEX = {b"1": 1, b"M": 1, b"MALE": 1, b"2": 2, b"F": 2, b"FEMALE": 2}


@dataclass(slots=True)
class People:
    """Sample ids in file order, and the recorded sex of each: 1 male, 2 female, 0 not recorded."""

    ids: list[str] = field(default_factory=list)
    sex: array[int] = field(default_factory=lambda: array("b"))


@dataclass(frozen=True, slots=True)
class VariantRows:
    """`variants`: one entry for each ALT allele. `allele`: which ALT of its line, from 1. `line`: the genotype file's row."""

    variants: Variants
    allele: array[int]
    line: array[int]
    lines: int


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and content of each line, without its end; what is no plain text line is refused."""
    try:
        if not path.is_file():
            raise SiteError(f"{path} is not a file", hint="check the path; the files of one set lie beside each other")
        with path.open("rb") as file:
            number = 0
            while line := file.readline(LONGEST_LINE):
                number += 1
                if len(line) >= LONGEST_LINE:
                    raise SiteError(
                        f"{path.name} line {number}: longer than {LONGEST_LINE} bytes",
                        hint="it is not a text file: copy it again",
                    )
                line = line.rstrip(b"\r\n")
                if b"\0" in line:
                    raise SiteError(
                        f"{path.name} line {number} holds a NUL byte", hint="it is not a text file: copy it again"
                    )
                if b"\r" in line:
                    raise SiteError(
                        f"{path.name} line {number}: a carriage return inside the line",
                        hint="line ends are mixed: save it with Unix line ends",
                    )
                yield number, line
    except OSError as error:
        raise SiteError(f"{path}: {error.strerror}", hint="check the path and who may read it") from None


def text(path: Path, number: int, field: bytes) -> str:
    """A field as text."""
    try:
        return field.decode("utf-8")
    except UnicodeDecodeError:
        raise SiteError(f"{path.name} line {number}: not UTF-8", hint="save the file as UTF-8") from None


def position_of(path: Path, number: int, field: bytes) -> int:
    """A position as a number; negative ones and 0 are left to the harmonisation, which excludes them by name."""
    digits = field[1:] if field[:1] == b"-" else field
    if not digits.isdigit():
        raise SiteError(f"{path.name} line {number}: the position is not a whole number", hint=_POSITION)
    if len(digits) > 10 or int(digits) >= MAX_POSITION:
        raise SiteError(f"{path.name} line {number}: the position is beyond any chromosome", hint=_POSITION)
    return int(field)


def fam(path: Path) -> People:
    """People of a .fam file (PLINK 1.9 file formats): FID, IID, father, mother, sex, phenotype."""
    people = People()
    for number, line in lines(path):
        fields = line.split()
        if len(fields) < 6:
            raise SiteError(f"{path.name} line {number}: {len(fields)} columns, 6 were expected", hint=_COLUMNS)
        people.ids.append(text(path, number, fields[1]))
        people.sex.append(_SEX.get(fields[4], 0))
    return people


def psam(path: Path) -> People:
    """People of a .psam file: the columns are those of its `#` line, without one they are FID and IID."""
    people = People()
    header: list[bytes] = []
    for number, line in lines(path):
        if line.startswith(b"##"):
            continue
        if not header:
            header = [b"FID", b"IID"]
            if line.startswith(b"#"):
                header = line[1:].split()
                if b"IID" not in header:
                    raise SiteError(f"{path.name} has no IID column", hint="`plink2 --make-pgen` writes one")
                continue
        fields = line.split(b"\t") if b"\t" in line else line.split()
        if len(fields) != len(header):
            raise SiteError(
                f"{path.name} line {number}: {len(fields)} columns, {len(header)} were expected", hint=_COLUMNS
            )
        people.ids.append(text(path, number, fields[header.index(b"IID")]))
        people.sex.append(_SEX.get(fields[header.index(b"SEX")].upper(), 0) if b"SEX" in header else 0)
    return people


def bim(path: Path) -> VariantRows:
    """Variants of a .bim file. A1, the fifth column, is the counted allele (PLINK 1.9 file formats, .bim)."""
    columns = Columns()
    codes: dict[bytes, int] = {}
    number = 0
    for number, line in lines(path):
        f = line.split()
        if len(f) != 6:
            raise SiteError(
                f"{path.name} line {number}: {len(f)} columns, 6 were expected",
                hint="chromosome, id, centimorgan, position, A1, A2",
            )
        if (code := codes.get(f[0])) is None:
            code = codes[f[0]] = chromosome_code(text(path, number, f[0]))
        name, counted, other = (text(path, number, f[i]) for i in (1, 4, 5))
        columns.add(code, position_of(path, number, f[3]), counted, other, name)
    return VariantRows(columns.variants(), array("H", [1]) * number, array("i", range(number)), number)


def pvar(path: Path) -> VariantRows:
    """Variants of a .pvar file (PLINK 2 file formats); a line with several ALT alleles gives an entry for each."""
    if not path.exists() and path.with_name(path.name + ".zst").exists():
        raise SiteError(
            f"{path.name}.zst is compressed", hint=f"`plink2 --zst-decompress {path.name}.zst > {path.name}`"
        )
    columns = Columns()
    allele, line_of = array("H"), array("i")
    codes: dict[bytes, int] = {}
    header: list[bytes] = []
    chrom = pos = name = ref = alt = 0
    row = 0
    for number, line in lines(path):
        if line.startswith(b"##"):
            continue
        if not header:
            header = line.lstrip(b"#").split()
            if not line.startswith(b"#") or not {b"CHROM", b"POS", b"ID", b"REF", b"ALT"} <= set(header):
                raise SiteError(
                    f"{path.name} has no header with #CHROM, POS, ID, REF and ALT",
                    hint="`plink2 --make-pgen` writes one",
                )
            chrom, pos, name, ref, alt = (header.index(c) for c in (b"CHROM", b"POS", b"ID", b"REF", b"ALT"))
            continue
        f = line.split(b"\t") if b"\t" in line else line.split()
        if len(f) != len(header):
            raise SiteError(f"{path.name} line {number}: {len(f)} columns, {len(header)} were expected", hint=_COLUMNS)
        if (code := codes.get(f[chrom])) is None:
            code = codes[f[chrom]] = chromosome_code(text(path, number, f[chrom]))
        position = position_of(path, number, f[pos])
        other, label = text(path, number, f[ref]), text(path, number, f[name])
        for k, counted in enumerate(text(path, number, f[alt]).split(","), 1):
            columns.add(code, position, counted, other, label)
            allele.append(k)
            line_of.append(row)
        row += 1
    return VariantRows(columns.variants(), allele, line_of, row)
