"""What a file that is read once from end to end gives: an entry for each ALT allele, with genotypes for every person.

VCF, BCF and BGEN have no direct access; `ingest` turns them into PLINK 2 files and nothing else reads them. What a row
lacks to be used is said in `reason`; its genotypes are then all missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sequester.client.compute.genome.panel import Build
from sequester.protocols.errors import SiteError

# reasons a reader gives; the harmonisation adds its own
REASONS = ("filtered", "no_genotypes", "undecodable_genotypes", "low_imputation_quality", "multiallelic_bgen")
COPY_AGAIN = "copy the file again from where it was made"


@dataclass(frozen=True, slots=True)
class Entry:
    """One ALT allele of one row. `genotypes`: int8 (samples,) copies of `counted`, or float32 dosages; -9 missing."""

    chromosome: str
    position: int
    counted: str
    other: str
    id: str
    genotypes: NDArray[np.int8] | NDArray[np.float32]
    is_split: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Reading:
    """How a file is to be read: rows that failed their FILTER kept or not, floor on INFO/R2 or 0 for none."""

    keep_filtered: bool = False
    r2_floor: float = 0.0


@dataclass(slots=True)
class Scan:
    """What one pass over the bytes found: SHA-256, people, entries to come, and the build the header speaks of."""

    sha256: str
    samples: list[str]
    entries: int
    rows: int
    build: Build | None
    sex: list[int] = field(default_factory=list)


class Source(Protocol):
    """A file that is read once."""

    path: Path
    reading: Reading
    has_dosages: bool
    calls: Counter[str]  # genotypes set to missing, by reason

    def scan(self) -> Scan:
        """Check the whole file without its genotypes."""

    def entries(self, scan: Scan) -> Iterator[Entry]:
        """Every entry, in file order."""


def is_bgzip(head: bytes) -> bool:
    """True where a gzip member carries the BC field of a BGZF block (SAM specification, section 4.1)."""
    return head[:4] == b"\x1f\x8b\x08\x04" and head[12:14] == b"BC"


EOF_BLOCK = bytes.fromhex("1f8b0804 00000000 00ff0600 42430200 1b000300 00000000 00000000")


def check_end(path: Path) -> None:
    """Refuse a bgzip file without its last, empty block: it was cut between two blocks, and every reader would go on."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - len(EOF_BLOCK)))
        if file.read() != EOF_BLOCK:
            raise SiteError(f"{path.name} does not end with the empty block of bgzip: it was cut", hint=COPY_AGAIN)


def unique(path: Path, samples: list[str]) -> None:
    """Refuse two people of one name, by their numbers."""
    seen: dict[str, int] = {}
    for number, sample in enumerate(samples, 1):
        if not sample or not sample.isprintable():
            raise SiteError(
                f"{path.name}: the sample id of person {number} is empty or holds a control character",
                hint="rename the sample (`bcftools reheader`)",
            )
        if sample in seen:
            raise SiteError(
                f"{path.name}: the sample ids of people {seen[sample]} and {number} are the same",
                hint="one column per person: `bcftools reheader` or `bcftools view -S`",
            )
        seen[sample] = number
    if not samples:
        raise SiteError(f"{path.name} has no samples", hint="a file of sites only holds no genotypes")


def missing(n: int) -> NDArray[Any]:
    """Genotypes of a row that has none."""
    return np.full(n, -9, dtype=np.int8)


def open_source(path: Path, reading: Reading) -> Source:
    """The reader for a file, by its name."""
    from sequester.client.compute.genome.bgen import BgenFile
    from sequester.client.compute.genome.vcf import VcfFile

    if "://" in str(path):
        raise SiteError(f"{path} is not a path", hint="genotypes are read from files of this machine only")
    if not path.is_file():
        raise SiteError(f"{path} is not a file", hint="check the path and who may read it")
    if path.name.endswith((".vcf", ".vcf.gz", ".vcf.bgz", ".bcf")):
        return VcfFile(path, reading)
    if path.suffix == ".bgen":
        return BgenFile(path, reading)
    raise SiteError(f"{path.name}: not a kind of file that is known", hint=".vcf, .vcf.gz, .bcf, .bgen or PLINK files")
