"""One VCF, BCF or BGEN file into PLINK 2 files, checked and hashed: what resumes is a source file.

FOLDER/genotypes.pgen .pvar .psam   every entry in file order
FOLDER/reasons.npy, split.npy       uint8 and bool (entries,): why an entry has no genotypes, whether its row was split
FOLDER/part.json                    SHA-256 of the source and of each file, counts; written last
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequester.client.compute.genome.source import REASONS, Entry, Reading, Scan, Source, open_source
from sequester.client.compute.genome.variants import chromosome_code, chromosome_name
from sequester.client.ingest.durable import folder_in_place, sha256_of, write_json
from sequester.client.ingest.isolated import Progress
from sequester.protocols.errors import SiteError

_BATCH_BYTES = 1 << 24
FORMAT = 1


def convert(source: Path, target: Path, reading: Reading, progress: Progress) -> dict[str, Any]:
    """Read `source` into the folder `target` and say what was found: the content of part.json."""
    opened = open_source(source, reading)
    progress(f"checking {source.name}", 0, 1)
    scan = opened.scan()
    with folder_in_place(target) as folder:
        return _write(folder, opened, scan, progress)


def finished(target: Path, sha256: str, reading: Reading) -> dict[str, Any] | None:
    """The content of part.json where this source was read before, the same way, and its files are still whole."""
    try:
        part = json.loads((target / "part.json").read_text("utf-8"))
        same = part["format"] == FORMAT and part["sha256"] == sha256 and part["reading"] == _as_json(reading)
        if same and all(sha256_of(target / name) == digest for name, digest in part["files"].items()):
            return dict(part)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _as_json(reading: Reading) -> dict[str, Any]:
    return {"keep_filtered": reading.keep_filtered, "r2_floor": reading.r2_floor}


def _write(folder: Path, source: Source, scan: Scan, progress: Progress) -> dict[str, Any]:
    n = len(scan.samples)
    reasons, split = np.zeros(scan.entries, np.uint8), np.zeros(scan.entries, bool)
    with (
        GenotypeWriter(folder / "genotypes.pgen", n, scan.entries, dosages=source.has_dosages) as genotypes,
        (folder / "genotypes.pvar").open("w", encoding="utf-8", newline="\n") as pvar,
    ):
        pvar.write("#CHROM\tPOS\tID\tREF\tALT\n")
        for index, entry in enumerate(source.entries(scan)):
            if index >= scan.entries:
                raise SiteError(f"{source.path.name} gave more variants than it holds", hint="copy the file again")
            if not (entry.chromosome + entry.id + entry.counted + entry.other).isprintable():
                raise SiteError(
                    f"{source.path.name}, variant {index + 1}: a control character in its name or alleles",
                    hint="copy the file again, or rename the variant",
                )
            pvar.write(_pvar_line(entry))
            genotypes.add(entry.genotypes)
            reasons[index] = REASONS.index(entry.reason) + 1 if entry.reason else 0
            split[index] = entry.is_split
            if index % 512 == 0:
                progress(f"reading {source.path.name}", index, scan.entries)
    write_psam(folder / "genotypes.psam", scan.samples, scan.sex or [0] * n)
    np.save(folder / "reasons.npy", reasons)
    np.save(folder / "split.npy", split)
    names = ("genotypes.pgen", "genotypes.pvar", "genotypes.psam", "reasons.npy", "split.npy")
    part = {
        "format": FORMAT,
        "source": source.path.name,
        "size": source.path.stat().st_size,
        "sha256": scan.sha256,
        "reading": _as_json(source.reading),
        "people": n,
        "rows": scan.rows,
        "entries": scan.entries,
        "header_build": scan.build,
        "calls": dict(sorted(source.calls.items())),
        "files": {name: sha256_of(folder / name) for name in names},
        "versions": versions(),
    }
    write_json(folder / "part.json", part)
    return part


def _pvar_line(entry: Entry) -> str:
    code = chromosome_code(entry.chromosome)
    name = chromosome_name(code) if code else entry.chromosome
    return f"{name}\t{entry.position}\t{entry.id}\t{entry.other}\t{entry.counted}\n"


def write_psam(path: Path, samples: list[str], sex: list[int]) -> None:
    """People of a PLINK 2 set: IID and SEX (1, 2 or NA)."""
    rows = (f"{sample}\t{code or 'NA'}\n" for sample, code in zip(samples, sex, strict=True))
    path.write_text("#IID\tSEX\n" + "".join(rows), "utf-8")


def versions() -> dict[str, str]:
    """What read and wrote: a store says it."""
    return {name: metadata.version(name) for name in ("sequester", "pgenlib", "cyvcf2", "bgen", "numpy")}


class GenotypeWriter:
    """A .pgen file of biallelic entries; hard calls in batches, dosages one by one."""

    def __init__(self, path: Path, people: int, variants: int, *, dosages: bool) -> None:
        import pgenlib

        self._writer: Any = pgenlib.PgenWriter(
            str(path).encode(), people, variant_ct=variants, nonref_flags=False, dosage_present=dosages
        )
        self._batch = np.empty((max(1, min(variants, _BATCH_BYTES // people)), people), dtype=np.int8)
        self._held = self._written = 0
        self._variants = variants

    def __enter__(self) -> GenotypeWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._flush()
            if self._written == self._variants:
                self._writer.close()
            else:
                raise SiteError(f"{self._written} variants were read of {self._variants}", hint="copy the file again")

    def add(self, genotypes: NDArray[Any]) -> None:
        """One entry: int8 copies or float32 dosages, -9 missing."""
        if genotypes.dtype == np.int8:
            self._batch[self._held] = genotypes
            self._held += 1
            if self._held == len(self._batch):
                self._flush()
            return
        self._flush()
        self._writer.append_dosages(np.ascontiguousarray(genotypes))
        self._written += 1

    def _flush(self) -> None:
        if self._held:
            self._writer.append_biallelic_batch(self._batch[: self._held])
            self._written += self._held
            self._held = 0
