"""PLINK 2 on the files that the hospitals were made from: it has read nothing that this program wrote but who belongs.

Phenotype and covariates come from the hospitals' tables, variants and people are named by their ids.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Plink:
    """PLINK files (prefix `genotypes`), the people and variants of a study in them, and a folder for what PLINK writes."""

    genotypes: Path
    people: Sequence[str]
    variants: Sequence[str]
    folder: Path

    def run(self, name: str, *words: str, people: Sequence[str] | None = None) -> Path:
        """The common prefix of what PLINK wrote; of some of the people where they are named."""
        self.folder.mkdir(parents=True, exist_ok=True)
        out = self.folder / name
        self._table(out.with_suffix(".keep"), people or self.people, {})
        out.with_suffix(".extract").write_text("\n".join(self.variants) + "\n", "utf-8")
        command = ["plink2", "--bfile", str(self.genotypes), "--keep", f"{out}.keep", "--extract", f"{out}.extract",
                   "--nonfounders", "--threads", "1", "--out", str(out), *words]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")
        return out

    def columns(self, name: str, columns: Mapping[str, Sequence[float] | Matrix]) -> Path:
        """A file of columns for `--pheno` or `--covar`, people in their order."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.columns"
        self._table(path, self.people, columns)
        return path

    def _table(self, path: Path, people: Sequence[str], columns: Mapping[str, Sequence[float] | Matrix]) -> None:
        family = {}
        for line in Path(f"{self.genotypes}.fam").read_text("utf-8").splitlines():
            words = line.split()
            family[words[1]] = words[0]
        text = ["\t".join(["#FID", "IID", *columns])]
        for i, person in enumerate(people):
            text.append("\t".join([family[person], person, *(f"{column[i]:.17g}" for column in columns.values())]))
        path.write_text("\n".join(text) + "\n", "utf-8")


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a PLINK table."""
    head, *body = [line.split() for line in path.read_text("utf-8").splitlines() if not line.startswith("##")]
    return [dict(zip(head, row, strict=True)) for row in body]


def components(out: Path, people: Sequence[str], count: int) -> Matrix:
    """(people, count) of `.eigenvec`, in the order of `people`."""
    rows = {row["IID"]: row for row in read(out.with_name(f"{out.name}.eigenvec"))}
    return np.array([[float(rows[person][f"PC{k + 1}"]) for k in range(count)] for person in people])
