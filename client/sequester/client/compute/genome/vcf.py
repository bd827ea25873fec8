"""VCF and BCF, read once through cyvcf2; the text is checked first, because htslib reads some damage without a word.

Copies are counted from the alleles of each call, so that a call with two ALT alleles is right for both, and half a call is
missing (spec/genomics.md, section 2). On X and Y one called allele counts as two copies. No genotype and no sample id is
ever in an error; htslib's own messages can hold ids, so who calls this sends the error stream elsewhere.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequester.client.compute.genome.build import build_of_header
from sequester.client.compute.genome.plink import MISSING
from sequester.client.compute.genome.plink_text import position_of, text
from sequester.client.compute.genome.source import (
    COPY_AGAIN,
    Entry,
    Reading,
    Scan,
    check_end,
    is_bgzip,
    missing,
    unique,
)
from sequester.client.compute.genome.variants import X, Y, chromosome_code
from sequester.protocols.errors import SiteError

_CHUNK = 1 << 20
_LONGEST_HEADER, _LONGEST_LINE = 1 << 26, 1 << 28
_BEYOND_SHARE = 0.01  # of all calls, from which a file whose calls name alleles it does not list is refused
_TOLERANCE = 1e-3  # of a dosage over 2: files print three digits
_EMPTY = tuple(a + b for a in (b"\t", b":", b",") for b in (b"\t", b":", b","))
_HEXADECIMAL = re.compile(rb"[\t:,][-+]?0[xX]")
_QUALITY = ("R2", "DR2", "INFO")


class VcfFile:
    """One VCF (plain, gzip, bgzip) or BCF file."""

    def __init__(self, path: Path, reading: Reading) -> None:
        self.path, self.reading = path, reading
        self.calls: Counter[str] = Counter()
        self.has_dosages = False
        with path.open("rb") as file:
            head = file.read(18)
        if is_bgzip(head):
            check_end(path)
        with gzip.open(path) if head[:2] == b"\x1f\x8b" else path.open("rb") as file:
            try:
                start = file.read(17)
            except (OSError, EOFError, zlib.error):
                raise SiteError(f"{path.name} cannot be unpacked at its start", hint=COPY_AGAIN) from None
        self._is_bcf = start[:3] == b"BCF"
        if self._is_bcf and not is_bgzip(head):
            raise SiteError(f"{path.name} is a BCF file without bgzip", hint="`bcftools view -Ob` writes one with")
        if not self._is_bcf and not start.startswith(b"##fileformat=VCF"):
            raise SiteError(
                f"{path.name} does not begin with ##fileformat=VCF", hint="it is no VCF file, or it was cut"
            )
        self._is_gzip = head[:2] == b"\x1f\x8b"

    def scan(self) -> Scan:
        """One pass over the bytes: hash, decompression, columns of every line, positions, number of entries."""
        scan = self._scan_bcf() if self._is_bcf else self._scan_text()
        unique(self.path, scan.samples)
        if not scan.rows:
            raise SiteError(f"{self.path.name} has no variants", hint=COPY_AGAIN)
        return scan

    def _scan_bcf(self) -> Scan:
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        rows = entries = 0
        reader = self._open()
        self._heed(reader.raw_header)
        try:
            samples = list(reader.samples)
            for variant in self._variants(reader):
                rows += 1
                entries += max(1, len(variant.ALT))
        except UnicodeDecodeError as error:
            raise self._damaged(rows, error) from None
        return Scan(digest.hexdigest(), samples, entries, rows, build_of_header(reader.raw_header))

    def _scan_text(self) -> Scan:
        digest = hashlib.sha256()
        header: list[str] = []
        samples: list[str] = []
        number = rows = entries = header_bytes = columns = 0
        for number, line in self._lines(digest):
            if not columns:
                header_bytes += len(line)
                if header_bytes > _LONGEST_HEADER:
                    raise SiteError(
                        f"{self.path.name}: its header is longer than {_LONGEST_HEADER} bytes", hint=COPY_AGAIN
                    )
                words = text(self.path, number, line)
                if line.startswith(b"##"):
                    header.append(words)
                    continue
                fields = words.split("\t")
                if fields[:9] != ["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO", "FORMAT"]:
                    raise SiteError(
                        f"{self.path.name} line {number}: #CHROM, POS, ID, REF, ALT, QUAL, FILTER, INFO, FORMAT and "
                        "samples were expected",
                        hint="it is no VCF file with genotypes",
                    )
                columns, samples = len(fields), fields[9:]
                self._heed("\n".join(header))
                continue
            if line.startswith(b"#"):
                raise SiteError(f"{self.path.name} line {number}: a header line among the rows", hint=COPY_AGAIN)
            rows += 1
            entries += self._check_row(number, line, columns)
        if not columns:
            raise SiteError(f"{self.path.name} ends inside its header", hint=COPY_AGAIN)
        return Scan(digest.hexdigest(), samples, entries, rows, build_of_header("\n".join(header)))

    def _check_row(self, number: int, line: bytes, columns: int) -> int:
        """Refuse what htslib would read otherwise than it stands there; how many entries the row gives."""
        found = line.count(b"\t") + 1
        if found != columns:
            raise SiteError(
                f"{self.path.name} line {number}: {found} columns, {columns} were expected", hint=COPY_AGAIN
            )
        fields = line.split(b"\t", 9)
        position_of(self.path, number, fields[1])
        if fields[1][:1] == b"-":
            raise SiteError(f"{self.path.name} line {number}: a negative position", hint="remove the row")
        for field in (*fields[:5], fields[6]):
            text(self.path, number, field)
            if not field:
                raise SiteError(f"{self.path.name} line {number}: an empty column", hint="`.` stands for nothing")
        if b"\0" in line:
            raise SiteError(f"{self.path.name} line {number} holds a NUL byte", hint=COPY_AGAIN)
        # htslib reads an empty number as 0
        cells = b"\t" + fields[-1] + b"\t" if len(fields) == 10 else b""
        if self.has_dosages and b":" in cells and any(empty in cells for empty in _EMPTY):
            raise SiteError(
                f"{self.path.name} line {number}: an empty field of a sample", hint="`.` stands for nothing"
            )
        # and 0x1 as a hexadecimal one, which no VCF file has (VCF 4.3, section 1.3)
        if self.has_dosages and (b"0x" in cells or b"0X" in cells) and _HEXADECIMAL.search(cells):
            raise SiteError(f"{self.path.name} line {number}: a sample's number begins with 0x", hint=COPY_AGAIN)
        return fields[4].count(b",") + 1

    def _lines(self, digest: Any) -> Iterator[tuple[int, bytes]]:
        """Number and content of each line of the decompressed text; the bytes of the file go into `digest`."""
        rest: list[bytes] = []
        held = number = 0
        for piece in self._text(digest):
            *complete, last = piece.split(b"\n")
            for line in complete:
                if rest:
                    line = b"".join([*rest, line])
                    rest, held = [], 0
                number += 1
                line = line.removesuffix(b"\r")
                if b"\r" in line:
                    raise SiteError(
                        f"{self.path.name} line {number}: a carriage return inside the line",
                        hint="line ends are mixed: save it with Unix line ends",
                    )
                yield number, line
            if last:
                rest.append(last)
                held += len(last)
                if held > _LONGEST_LINE:
                    raise SiteError(
                        f"{self.path.name} line {number + 1}: longer than {_LONGEST_LINE} bytes", hint=COPY_AGAIN
                    )
        if rest:
            raise SiteError(f"{self.path.name} ends inside line {number + 1}", hint=COPY_AGAIN)

    def _text(self, digest: Any) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            if not self._is_gzip:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    yield chunk
                return
            unpack = zlib.decompressobj(31)
            try:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    while chunk:
                        if unpack.eof:
                            unpack = zlib.decompressobj(31)
                        out = unpack.decompress(chunk, 1 << 24)
                        chunk = unpack.unused_data or unpack.unconsumed_tail
                        if out:
                            yield out
                if not unpack.eof:
                    raise SiteError(f"{self.path.name} ends inside a compressed block", hint=COPY_AGAIN)
            except zlib.error:
                raise SiteError(
                    f"{self.path.name} cannot be unpacked near byte {file.tell()}: its check sum is wrong",
                    hint=COPY_AGAIN,
                ) from None

    def _heed(self, header: str) -> None:
        self.has_dosages = "##FORMAT=<ID=DS," in header

    def _open(self) -> Any:
        import cyvcf2

        try:
            return cyvcf2.VCF(str(self.path), lazy=True, strict_gt=True)
        except Exception as error:  # cyvcf2 raises nothing narrower
            raise self._damaged(0, error) from None

    def _variants(self, reader: Any) -> Iterator[Any]:
        row = 0
        while True:
            try:
                variant = next(reader)
            except StopIteration:
                return
            except Exception as error:  # cyvcf2 raises nothing narrower
                raise self._damaged(row + 1, error) from None
            row += 1
            yield variant

    def entries(self, scan: Scan) -> Iterator[Entry]:
        """Every ALT allele of every row; refuses where htslib saw other rows or people than the text has."""
        reader = self._open()
        if [s.rstrip("\r") for s in reader.samples] != scan.samples:
            raise SiteError(f"{self.path.name}: its header reads otherwise than its text", hint=COPY_AGAIN)
        row = given = 0
        for row, variant in enumerate(self._variants(reader), 1):
            try:
                for entry in self._split(row, variant, len(scan.samples)):
                    given += 1
                    yield entry
            except UnicodeDecodeError as error:  # in a BCF file, whose text is not seen before
                raise self._damaged(row, error) from None
        if (row, given) != (scan.rows, scan.entries):
            raise SiteError(f"{self.path.name}: {row} rows could be read of {scan.rows}", hint=COPY_AGAIN)
        beyond = self.calls["allele_beyond_alt"]
        if beyond > _BEYOND_SHARE * row * len(scan.samples):
            raise SiteError(
                f"{self.path.name}: {beyond} calls name an allele their row does not list",
                hint="the file was cut down without its genotypes: write it anew (`bcftools norm -m -any`)",
            )

    def _split(self, row: int, variant: Any, n: int) -> Iterator[Entry]:
        alternatives = variant.ALT or ["."]
        reason = self._reason(variant)
        calls = dosages = None
        if not reason:
            try:
                genotype = variant.genotype  # each access decodes the row
                calls = None if genotype is None else genotype.array()
            except Exception:  # cyvcf2 raises the same where a row has no GT and where it cannot decode one
                calls = None
            if self.has_dosages:
                try:
                    dosages = variant.format("DS")
                except Exception as error:  # a type of number that the header made up
                    raise self._damaged(row, error) from None
                if dosages is not None and dosages.shape != (n, len(alternatives)):
                    raise SiteError(
                        f"{self.path.name}, row {row}: DS has {dosages.shape[-1]} values a person for "
                        f"{len(alternatives)} alternative alleles",
                        hint="DS is one number for each ALT allele (Number=A)",
                    )
            if calls is None and dosages is None:
                reason = "undecodable_genotypes" if _names_genotypes(variant) else "no_genotypes"
        code = chromosome_code(variant.CHROM)
        for k, counted in enumerate(alternatives, 1):
            genotypes: NDArray[Any]
            if calls is None:
                genotypes = missing(n)
            else:
                genotypes = self._copies(calls, k, len(alternatives), hemizygous=code in (X, Y))
            if dosages is not None:
                genotypes = self._dosages(row, dosages[:, k - 1], genotypes)
            yield Entry(
                variant.CHROM, variant.POS, counted, variant.REF, variant.ID or ".", genotypes,
                len(alternatives) > 1, reason,
            )  # fmt: skip

    def _reason(self, variant: Any) -> str:
        if variant.FILTER is not None and not self.reading.keep_filtered:
            return "filtered"
        if self.reading.r2_floor:
            for name in _QUALITY:
                quality = variant.INFO.get(name)
                if isinstance(quality, float | int):
                    return "low_imputation_quality" if quality < self.reading.r2_floor else ""
        return ""

    def _copies(self, calls: NDArray[np.int16], k: int, alternatives: int, *, hemizygous: bool) -> NDArray[np.int8]:
        """int8 (samples,) copies of allele k; calls: int16 (samples, ploidy + 1), -1 missing, -2 beyond a call's ploidy."""
        alleles = calls[:, :-1]
        if alleles.shape[1] != 2:
            return self._odd_copies(alleles, k, alternatives, hemizygous=hemizygous)
        first, second = alleles[:, 0], alleles[:, 1]  # by columns: numpy is slow over an axis of two
        copies: NDArray[np.int8] = (first == k).astype(np.int8) + (second == k).astype(np.int8)
        low, high = np.minimum(first, second), np.maximum(first, second)
        odd = np.flatnonzero((low < 0) | (high > alternatives))
        if len(odd):
            copies[odd] = self._odd_copies(alleles[odd], k, alternatives, hemizygous=hemizygous)
        return copies

    def _odd_copies(
        self, alleles: NDArray[np.int16], k: int, alternatives: int, *, hemizygous: bool
    ) -> NDArray[np.int8]:
        """Copies where not every call is of two listed alleles; what is no such call is counted by its reason."""
        copies = (alleles == k).sum(axis=1).astype(np.int8)
        called = (alleles >= 0).sum(axis=1)
        ploidy = (alleles != -2).sum(axis=1)
        beyond = (alleles > alternatives).any(axis=1)
        single = (called == 1) & ~beyond
        good = (called == 2) & (ploidy == 2) & ~beyond
        if hemizygous:
            copies[single] *= 2
            good |= single
        if k == 1:
            self.calls["allele_beyond_alt"] += int(beyond.sum())
            self.calls["more_than_two_alleles"] += int(((ploidy > 2) & ~beyond).sum())
            if not hemizygous:
                self.calls["half_call"] += int((single & (ploidy == 2)).sum())
                self.calls["haploid_call"] += int((single & (ploidy == 1)).sum())
        copies[~good] = MISSING
        return np.asarray(copies)

    def _dosages(self, row: int, dosages: NDArray[np.float32], copies: NDArray[np.int8]) -> NDArray[np.float32]:
        """float32 (samples,): the file's dosage, its hard call where it has none."""
        given = ~np.isnan(dosages)
        if (dosages[given] < -_TOLERANCE).any() or (dosages[given] > 2 + _TOLERANCE).any():
            raise SiteError(f"{self.path.name}, row {row}: a dosage outside 0..2", hint="DS counts copies of ALT")
        return np.where(given, np.clip(dosages, 0, 2), copies).astype(np.float32)

    def _damaged(self, row: int, error: BaseException) -> SiteError:
        # htslib's own text may quote a genotype or a sample id
        return SiteError(
            f"{self.path.name} cannot be read at row {row}" if row else f"{self.path.name}: its header cannot be read",
            hint="a call that is not a genotype, or damage: `bcftools view` says more; " + COPY_AGAIN,
        )


def _names_genotypes(variant: Any) -> bool:
    """True where the row's FORMAT names GT. Asked of the row's text: `variant.FORMAT` crashes on a row not yet unpacked."""
    fields = str(variant).split("\t", 9)
    return len(fields) > 9 and "GT" in fields[8].split(":")
