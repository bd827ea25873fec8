"""A marker panel: public variants with their positions in three builds, frequencies by population, and loadings.

The bundled one is `panel.tsv.gz` beside this module (deploy/panel/build.py makes it; its first lines say from what). A
consortium may name its own, a table of the same columns. Everything that leaves a site is indexed by panel row.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sequester.client.compute.genome.variants import chromosome_code, is_palindromic
from sequester.protocols.errors import SiteError

Build = Literal["NCBI36", "GRCh37", "GRCh38"]
BUILDS: tuple[Build, ...] = get_args(Build)
POPULATIONS = ("AFR", "AMR", "EAS", "EUR", "SAS")
BUNDLED = Path(__file__).with_name("panel.tsv.gz")
_LARGEST = 1 << 30
_ALLELE = re.compile(r"[ACGT]+")


@dataclass(frozen=True, slots=True)
class Panel:
    """Arrays over panel rows. `position` is by build, 0 where the row has none there."""

    sha256: str
    code: NDArray[np.uint8]
    position: dict[Build, NDArray[np.int64]]
    ref: tuple[str, ...]
    alt: tuple[str, ...]
    ref_known: NDArray[np.bool_]  # REF is the reference genome's base, not a convention
    id: tuple[str, ...]  # rs ids, labels only
    frequency: NDArray[np.float32]  # (rows, POPULATIONS) of ALT, NaN where not known
    mean_frequency: NDArray[np.float32]  # (rows,) of ALT, the one the loadings are standardised by
    loadings: NDArray[np.float32]  # (rows, components), NaN where there are none
    shrinkage: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.code)

    @property
    def palindromic(self) -> NDArray[np.bool_]:
        """Rows whose strand cannot be told from the alleles."""
        return np.array([is_palindromic(r, a) for r, a in zip(self.ref, self.alt, strict=True)], dtype=bool)


def load(path: Path | None = None) -> Panel:
    """The panel in a file, by default the bundled one; a wrong table is a `SiteError` with its line."""
    path = path or BUNDLED
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
                text = file.read(_LARGEST).decode("utf-8")
        else:
            text = data.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        raise SiteError(
            f"{path} cannot be read as a panel", hint="a tab-separated table, UTF-8, .gz or plain"
        ) from None
    return _parse(path.name, text, hashlib.sha256(data).hexdigest())


def _parse(name: str, text: str, sha256: str) -> Panel:
    shrinkage: tuple[float, ...] = ()
    lines = text.splitlines()
    start = 0
    while start < len(lines) and lines[start].startswith("#"):
        if lines[start].startswith("# pc_shrinkage="):
            shrinkage = tuple(float(s) for s in lines[start].partition("=")[2].split(","))
        start += 1
    reader = csv.DictReader(lines[start:], delimiter="\t")
    missing = {"chromosome", *BUILDS, "ref", "alt"} - set(reader.fieldnames or ())
    if missing:
        raise SiteError(f"{name} has no column {sorted(missing)[0]}", hint="a panel has the bundled panel's columns")
    components = [c for c in reader.fieldnames or () if re.fullmatch(r"pc\d+", c)]
    codes, ref, alt, known, ids, frequency, mean, loadings = [], [], [], [], [], [], [], []
    positions: dict[Build, list[int]] = {build: [] for build in BUILDS}
    for number, row in enumerate(reader, start + 2):
        try:
            codes.append(chromosome_code(row["chromosome"]))
            for build in BUILDS:
                positions[build].append(int(row[build] or 0))
            frequency.append([float(row.get(f"af_{p}") or "nan") for p in POPULATIONS])
            mean.append(float(row.get("af") or "nan"))
            loadings.append([float(row[c] or "nan") for c in components])
        except (ValueError, TypeError):
            raise SiteError(f"{name} line {number}: a field that is not a number") from None
        if not codes[-1] or not _ALLELE.fullmatch(row["ref"] or "") or not _ALLELE.fullmatch(row["alt"] or ""):
            raise SiteError(f"{name} line {number}: chromosomes 1-22 and alleles of A, C, G, T were expected")
        ref.append(row["ref"])
        alt.append(row["alt"])
        known.append(row.get("ref_known") == "1")
        ids.append(row.get("id") or "")
    if not codes:
        raise SiteError(f"{name} has no rows", hint="a panel lists variants")
    return Panel(
        sha256, np.array(codes, np.uint8), {b: np.array(p, np.int64) for b, p in positions.items()},
        tuple(ref), tuple(alt), np.array(known, bool), tuple(ids), np.array(frequency, np.float32),
        np.array(mean, np.float32), np.array(loadings, np.float32).reshape(len(codes), len(components)), shrinkage,
    )  # fmt: skip
