"""PLINK 1 and PLINK 2 files: checked against their own counts first, then read with pgenlib.

Damage that the library reads without a word (rows of the sample file off by a few, bytes added at the end, NUL in an id)
is refused here, with file, line and what was expected (spec/genomics.md, section 2). No person's id is ever printed.
Whatever a library's own code for it, a missing genotype leaves this module as -9.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequester.client.compute.genome import plink_text
from sequester.client.compute.genome.pgen_header import pgen_header
from sequester.protocols.errors import SiteError

MISSING = -9
BED_MAGIC = bytes([0x6C, 0x1B, 0x01])
_TELLING = 20  # variants from which on one genotype everywhere is no person


class PlinkFiles:
    """The three files behind a prefix: `samples` ids and `sex` in file order, `variants` an entry for each ALT allele."""

    def __init__(self, prefix: str) -> None:
        if "://" in prefix:
            raise SiteError(f"{prefix} is not a path", hint="genotypes are read from files of this machine only")
        self.prefix = prefix
        self.has_dosages = False
        if Path(prefix + ".bed").exists():
            self.genotypes = Path(prefix + ".bed")
            self.files = tuple(Path(prefix + suffix) for suffix in (".bed", ".bim", ".fam"))
            people = plink_text.fam(self.files[2])
            rows = plink_text.bim(self.files[1])
        elif Path(prefix + ".pgen").exists():
            self.genotypes = Path(prefix + ".pgen")
            self.files = tuple(Path(prefix + suffix) for suffix in (".pgen", ".pvar", ".psam"))
            people = plink_text.psam(self.files[2])
            rows = plink_text.pvar(self.files[1])
        else:
            raise SiteError(
                f"no {prefix}.bed and no {prefix}.pgen",
                hint="`genotypes` in site.toml is the prefix of .bed/.bim/.fam or .pgen/.pvar/.psam files",
            )
        self.samples, self.sex = people.ids, np.array(people.sex, dtype=np.int8)
        self.variants = rows.variants
        self.rows = rows.lines  # of the genotype file; an entry for each ALT allele may be more
        self._line = np.array(rows.line, dtype=np.uint32)
        self._allele = np.array(rows.allele, dtype=np.uint16)
        self._first_allele: NDArray[np.uintp] | None = None  # only where a line has several ALT alleles
        if len(self._line) > self.rows:
            counts = np.bincount(self._line, minlength=self.rows).astype(np.uintp) + np.uintp(1)
            self._first_allele = np.concatenate([np.zeros(1, np.uintp), np.cumsum(counts, dtype=np.uintp)])
        self._unique_samples()
        if not self.rows or not self.samples:
            raise SiteError(
                f"{Path(prefix).name} holds {len(self.samples)} people and {self.rows} variants",
                hint="copy the files again",
            )
        if self.genotypes.suffix == ".bed":
            self._check_bed()
        else:
            self._check_pgen()

    @property
    def is_multiallelic(self) -> NDArray[np.bool_]:
        """For each entry: whether its line has several ALT alleles."""
        if self._first_allele is None:
            return np.zeros(len(self._line), dtype=bool)
        several: NDArray[np.bool_] = np.bincount(self._line, minlength=self.rows)[self._line] > 1
        return several

    def _unique_samples(self) -> None:
        seen: dict[str, int] = {}
        for number, sample in enumerate(self.samples, 1):
            if sample in seen:
                raise SiteError(
                    f"{self.prefix}: the sample ids of people {seen[sample]} and {number} are the same",
                    hint="one row per person; remove the duplicate (`plink2 --remove`)",
                )
            seen[sample] = number

    def _check_bed(self) -> None:
        n, v = len(self.samples), self.rows
        width = -(-n // 4)
        size, expected = self.genotypes.stat().st_size, 3 + v * width
        fam, bed = self.files[2].name, self.genotypes.name
        with self.genotypes.open("rb") as file:
            magic = file.read(3)
        if magic[:2] != BED_MAGIC[:2]:
            raise SiteError(f"{bed} does not begin as a .bed file", hint="copy it again, or name the right prefix")
        if magic[2:] != BED_MAGIC[2:]:
            raise SiteError(
                f"{bed} is sample-major, variant-major was expected",
                hint=f"`plink2 --bfile {Path(self.prefix).name} --make-pgen`",
            )
        if size != expected:
            raise SiteError(
                f"{bed} has {size} bytes; {n} people in .fam and {v} variants in .bim need {expected}",
                hint="the three files do not belong together, or a copy was cut: copy all three again",
            )
        last = np.memmap(self.genotypes, dtype=np.uint8, mode="r", offset=3, shape=(v, width))[:, -1]
        # a row too many in .fam makes padding a person: two copies of A1 everywhere
        if v >= _TELLING and not (last & (3 << (2 * ((n - 1) % 4)))).any():
            raise SiteError(
                f"the last person of {fam} has two A1 alleles at all {v} variants",
                hint="rows of .fam are too many: use the .fam that was written with this .bed",
            )
        if n % 4 and (last & ((0xFF << (2 * (n % 4))) & 0xFF)).any():
            raise SiteError(
                f"{bed} holds more people than the {n} of {fam}",
                hint="rows of .fam are missing: use the .fam that was written with this .bed",
            )

    def _check_pgen(self) -> None:
        header = pgen_header(self.genotypes)
        name = self.genotypes.name
        for found, listed, what, file in (
            (header.people, len(self.samples), "people", self.files[2].name),
            (header.variants, self.rows, "variants", self.files[1].name),
        ):
            if found != listed:
                raise SiteError(
                    f"{name} holds {found} {what}, {file} lists {listed}",
                    hint="the three files do not belong together: copy all three again",
                )
        size = self.genotypes.stat().st_size
        if size != header.size:
            raise SiteError(f"{name} has {size} bytes, its header promises {header.size}", hint="copy it again")
        self.has_dosages = header.has_dosages

    def counts(self, wanted: Sequence[int]) -> NDArray[np.int8]:
        """Copies of the counted allele, int8 (samples, len(wanted)), -9 missing, for the entries at `wanted`.

        Where the file has dosages, these are its hard calls; `dosages` rounds nothing.
        """
        out = np.empty((len(wanted), len(self.samples)), dtype=np.int8)  # (variants, samples)
        with _Reading(self) as reading:
            reading.fill(np.asarray(wanted, dtype=np.int64), out)
        return np.ascontiguousarray(out.T)

    def dosages(self, wanted: Sequence[int]) -> NDArray[np.int8] | NDArray[np.float32]:
        """Like `counts`; float32 in 0..2 where the file has dosages."""
        if not self.has_dosages:
            return self.counts(wanted)
        out = np.empty((len(wanted), len(self.samples)), dtype=np.float32)
        with _Reading(self) as reading:
            reading.fill(np.asarray(wanted, dtype=np.int64), out)
        return np.ascontiguousarray(out.T)

    def blocks(
        self, wanted: NDArray[np.int64] | None = None, size: int = 2048, *, hard_calls: bool = True
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
        """Entries and their genotypes (variants, samples), `size` entries at a time, in one buffer that is used again.

        int8 copies of the counted allele, or float32 dosages with `hard_calls=False`; -9 missing.
        """
        chosen = np.arange(len(self.variants)) if wanted is None else wanted
        dtype = np.int8 if hard_calls else np.float32
        buffer = np.empty((min(size, max(1, len(chosen))), len(self.samples)), dtype=dtype)
        with _Reading(self) as reading:
            for start in range(0, len(chosen), size):
                entries = chosen[start : start + size]
                out = buffer[: len(entries)]
                reading.fill(entries, out)
                yield entries, out

    def reading(self) -> _Reading:
        """The opened genotype file, for those who read it in pieces."""
        return _Reading(self)


class _Reading:
    """An open genotype file; `fill` reads entries into an array of the caller."""

    def __init__(self, files: PlinkFiles) -> None:
        self._files = files
        self._reader: Any = None

    def __enter__(self) -> _Reading:
        import pgenlib

        files = self._files
        options = {} if files._first_allele is None else {"allele_idx_offsets": files._first_allele}
        try:
            self._reader = pgenlib.PgenReader(
                str(files.genotypes).encode(), raw_sample_ct=len(files.samples), variant_ct=files.rows, **options
            )
        except (RuntimeError, OSError, AssertionError) as error:
            raise self._damaged(error) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def fill(self, entries: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Read the entries into `out`: int8 or float32 (variants, samples), -9 missing."""
        files, reader = self._files, self._reader
        lines, alleles = files._line[entries], files._allele[entries]
        dosages = out.dtype == np.float32
        try:
            if files._first_allele is not None:
                read = reader.read_dosages if dosages else reader.read
                for row, (line, allele) in enumerate(zip(lines.tolist(), alleles.tolist(), strict=True)):
                    read(line, out[row], allele)
            elif len(lines) and int(lines[-1]) - int(lines[0]) == len(lines) - 1 and (np.diff(lines) == 1).all():
                read = reader.read_dosages_range if dosages else reader.read_range
                read(int(lines[0]), int(lines[-1]) + 1, out)
            else:
                read = reader.read_dosages_list if dosages else reader.read_list
                read(lines, out)
        except (RuntimeError, OSError) as error:
            raise self._damaged(error) from None

    def _damaged(self, error: BaseException) -> SiteError:
        said = (str(error).splitlines() or ["no reason given"])[0]
        return SiteError(f"{self._files.genotypes.name} cannot be read: {said}", hint="copy the file again")
