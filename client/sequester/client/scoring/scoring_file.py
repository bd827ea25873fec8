"""A score as a file says it: PGS Catalog files 1.0 and 2.0, harmonised or not, structured tables, and our own results.

Every row ends in exactly one place: among `rows`, or in `set_aside` with its line, its name and the reason. Rows that are
no single variant (haplotypes, diplotypes, interactions, no allele, no weight) are `complex`: the file is refused for them
unless the caller says to score the rest.
Source: https://www.pgscatalog.org/downloads/#scoring_columns
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import math
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sequester.client.compute.genome.panel import BUILDS, Build
from sequester.client.compute.genome.variants import chromosome_code
from sequester.protocols.errors import SiteError

COMPLEX = ("haplotype", "diplotype", "interaction", "no_allele", "no_weight")
SET_ASIDE = (*COMPLEX, "no_position", "unreadable_alleles", "not_autosomal", "repeated")
Kind = Literal["additive", "dominant", "recessive"]
LARGEST = 1 << 30
_FLAGS = (("is_haplotype", "haplotype"), ("is_diplotype", "diplotype"), ("is_interaction", "interaction"))
_ALIASES = {"hg18": "NCBI36", "hg19": "GRCh37", "hg38": "GRCh38", "b37": "GRCh37"}
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_SEQUENCE = re.compile(r"[ACGT]+")


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One variant of a score. `other` may be empty; `frequency` is of the effect allele, None where the file has none."""

    line: int
    name: str
    code: int
    position: int
    effect: str
    other: str
    weight: float
    kind: Kind = "additive"
    frequency: float | None = None


@dataclass(frozen=True, slots=True)
class SetAside:
    """A row that cannot be scored, by line, name and reason (of SET_ASIDE)."""

    line: int
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class ScoringFile:
    """A score in one build."""

    id: str
    trait: str
    citation: str
    build: Build
    sha256: str
    header: dict[str, str]
    rows: tuple[ScoreRow, ...]
    set_aside: tuple[SetAside, ...]

    @property
    def complex(self) -> list[SetAside]:
        """Rows that are no single variant."""
        return [row for row in self.set_aside if row.reason in COMPLEX]


def read(path: Path, site_build: Build, declared: Build | None = None) -> ScoringFile:
    """The score in a file. Of an original and a harmonised position the one in `site_build` is taken, if either is."""
    data, text = _text(path)
    lines = text.splitlines()
    header, start = _header(lines)
    try:
        reader = csv.DictReader(io.StringIO("\n".join(lines[start:])), delimiter="\t")
        table = list(reader)
    except csv.Error:
        raise SiteError(f"{path.name} is not a table", hint="a PGS Catalog scoring file, tabs between") from None
    columns = set(reader.fieldnames or ())
    if not {"effect_allele", "effect_weight"} <= columns:
        raise SiteError(
            f"{path.name} has no columns effect_allele and effect_weight",
            hint="a PGS Catalog scoring file, tabs between",
        )
    build, harmonised = _build(path.name, header, columns, site_build, declared)
    places = ("hm_chr", "hm_pos") if harmonised else ("chr_name", "chr_position")
    rows: list[ScoreRow] = []
    aside: list[SetAside] = []
    seen: set[tuple[int, int, str, str]] = set()
    ids: Counter[str] = Counter()
    for number, line in enumerate(table, start + 2):
        cells = {
            name: (value or "").strip()
            for name, value in line.items()
            if name is not None and not isinstance(value, list)
        }
        ids[cells.get("accession", "")] += 1
        row = _row(path.name, number, cells, places)
        if isinstance(row, SetAside):
            aside.append(row)
            continue
        key = (row.code, row.position, row.effect, row.other)
        if key in seen:
            aside.append(SetAside(number, row.name, "repeated"))
            continue
        seen.add(key)
        rows.append(row)
    assert len(rows) + len(aside) == sum(ids.values()), "a row of the score in no place, or in two"
    name = header.get("pgs_id") or (ids.most_common(1)[0][0] if ids else "") or path.name
    return ScoringFile(
        name, header.get("trait_reported", ""), header.get("citation", ""), build, hashlib.sha256(data).hexdigest(),
        header, tuple(rows), tuple(aside),
    )  # fmt: skip


def header_of(path: Path) -> dict[str, str]:
    """The header of a scoring file alone."""
    return _header(_text(path)[1].splitlines())[0]


def _header(lines: Sequence[str]) -> tuple[dict[str, str], int]:
    """Names and values of the lines that begin with `#`, and how many of these there are."""
    header: dict[str, str] = {}
    for number, line in enumerate(lines):
        if not line.startswith("#"):
            return header, number
        name, found, value = line.lstrip("#").partition("=")
        if found:
            header[name.strip()] = value.strip()
    return header, len(lines)


def check_complex(score: ScoringFile, rest: bool) -> None:
    """Refuse a score with complex rows, by name; with `rest` they are left to the report."""
    if not score.complex or rest:
        return
    named = ", ".join(f"line {row.line} ({row.name or row.reason})" for row in score.complex[:10])
    more = f" and {len(score.complex) - 10} more" if len(score.complex) > 10 else ""
    kinds = ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in Counter(r.reason for r in score.complex).items())
    total = len(score.rows) + len(score.set_aside)
    raise SiteError(
        f"{len(score.complex)} of {total} rows of {score.id} are no single variant ({kinds}): {named}{more}",
        hint="such a score needs a caller of haplotypes; `--score-rest` scores the other rows and says so",
    )


def _row(file: str, number: int, cells: Mapping[str, str], places: tuple[str, str]) -> ScoreRow | SetAside:
    name = (
        cells.get("rsID") or cells.get("hm_rsID") or cells.get("locus_name") or cells.get("variant_description") or ""
    )
    if not name and cells.get("chr_name"):
        name = f"{cells['chr_name']}:{cells.get('chr_position', '')}"
    for flag, reason in _FLAGS:
        if cells.get(flag, "").lower() == "true":
            return SetAside(number, cells.get("effect_allele") or name, reason)
    effect, other = cells["effect_allele"].upper(), cells.get("other_allele", "").upper()
    if not effect:
        return SetAside(number, name, "no_allele")
    if not cells["effect_weight"]:
        return SetAside(number, name, "no_weight")
    # ASCII digits and a point: Python's float would also take 1_000 and inf
    if not _NUMBER.fullmatch(cells["effect_weight"]) or not math.isfinite(weight := float(cells["effect_weight"])):
        raise SiteError(f"{file} line {number}: the effect weight is not a number")
    chromosome, position = (cells.get(place, "") for place in places)
    if not chromosome or not position:
        return SetAside(number, name, "no_position")
    if not re.fullmatch(r"[0-9]{1,10}", position) or not 0 < int(position) < 2**31:
        raise SiteError(f"{file} line {number}: the position is not a number of 1 or more")
    if not _SEQUENCE.fullmatch(effect) or (other and not _SEQUENCE.fullmatch(other)) or effect == other:
        return SetAside(number, name, "unreadable_alleles")
    code = chromosome_code(chromosome)
    if not 1 <= code <= 22:
        return SetAside(number, name, "not_autosomal")
    return ScoreRow(
        number, name, code, int(position), effect, other, weight, _kind(file, number, cells), _frequency(file, number, cells)
    )  # fmt: skip


def _kind(file: str, number: int, cells: Mapping[str, str]) -> Kind:
    dominant = cells.get("is_dominant", "").lower() == "true" or cells.get("effect_type") == "dominant"
    recessive = cells.get("is_recessive", "").lower() == "true" or cells.get("effect_type") == "recessive"
    if dominant and recessive:
        raise SiteError(f"{file} line {number}: dominant and recessive at once")
    return "dominant" if dominant else "recessive" if recessive else "additive"


def _frequency(file: str, number: int, cells: Mapping[str, str]) -> float | None:
    text = cells.get("allelefrequency_effect", "")
    if not text or text in ("NA", "NR"):
        return None
    if not _NUMBER.fullmatch(text) or not 0 <= float(text) <= 1:
        raise SiteError(f"{file} line {number}: the allele frequency is not a number from 0 to 1")
    return float(text)


def _build(
    file: str, header: Mapping[str, str], columns: set[str], site: Build, declared: Build | None
) -> tuple[Build, bool]:
    """The build, and whether it is that of the harmonised columns."""
    own = _known(header.get("genome_build", ""))
    harmonised = _known(header.get("HmPOS_build", "")) if {"hm_chr", "hm_pos"} <= columns else None
    if harmonised is not None and (harmonised == site or own != site):
        return harmonised, True
    own = own or (declared if not header.get("genome_build") or header["genome_build"] == "NR" else None)
    if own is None or not {"chr_name", "chr_position"} <= columns:
        raise SiteError(
            f"{file} does not say which build its positions are in (genome_build={header.get('genome_build', 'none')})",
            hint="take the catalogue's harmonised file (_hmPOS_), or say `--build` for a table without a header",
        )
    if declared not in (None, own):
        raise SiteError(f"{file} is in {own}, {declared} was declared", hint="leave `--build` out")
    return own, False


def _known(text: str) -> Build | None:
    name = _ALIASES.get(text.lower(), text)
    return next((build for build in BUILDS if build.lower() == name.lower()), None)


def _text(path: Path) -> tuple[bytes, str]:
    if "://" in str(path):
        raise SiteError(f"{path} is not a path", hint="download the file, then name it")
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
                plain = file.read(LARGEST + 1)
        else:
            plain = data
        if len(plain) > LARGEST:
            raise SiteError(f"{path.name} is larger than {LARGEST} bytes", hint="that is no scoring file")
        return data, plain.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        raise SiteError(f"{path.name} cannot be read as a scoring file", hint="text or .gz, UTF-8") from None
