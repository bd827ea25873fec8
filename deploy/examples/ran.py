"""A study that ended, and everything on this machine that other programs need to compute the same."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from examples import plink2
from examples.people import People, pooled
from sequester.protocols.analyses.cohort import Part
from sequester.protocols.study import Study

Matrix = NDArray[np.float64]
Result = Mapping[str, Any]
SAME = 1e-8  # coefficients, their errors, and what follows from them by a formula
TIGHT: Mapping[str, Any] = {"disp": 0, "method": "newton", "tol": 1e-14, "maxiter": 100}  # for statsmodels


@dataclass(frozen=True)
class Ran:
    """A study that ended: its results, the hospitals' frozen cohorts and tables, and the files they were made from."""

    study: Study
    results: Mapping[str, Any]
    stores: Mapping[str, Path]
    tables: Mapping[str, Path]
    genotypes: Path | None
    work: Path
    _parts: dict[Part, People] = field(default_factory=dict)

    def people(self, part: Part) -> People:
        """Everybody of a part."""
        if part not in self._parts:
            self._parts[part] = pooled(self.study, self.stores, part)
        return self._parts[part]

    def result(self, name: str) -> Result:
        """What the study says of an analysis."""
        found: Result = self.results["analyses"][name]["result"]
        return found

    def model(self, name: str) -> tuple[Matrix, float]:
        """Weights of all the study's features and the intercept of an analysis."""
        rows = {row["name"]: float(row["standardised"]) for row in self.result(name)["weights"]}
        w = np.array([rows.get(feature.name, 0.0) for feature in self.study.features()])
        return w, float(self.result(name).get("intercept", 0.0))

    @cached_property
    def table(self) -> pd.DataFrame:
        """The hospitals' own tables, people in the order of `people("all")`."""
        frames = []
        for name in sorted(self.tables):
            frame = pd.read_csv(self.tables[name], dtype=str, keep_default_na=False)
            known = frame[self.study.phenotype.name].str.strip() != "NA"
            frames.append(frame[known].sort_values("patient"))
        table = pd.concat(frames, ignore_index=True)
        if len(table) != len(self.people("all").y):
            raise ValueError(f"{len(table)} people in the tables, {len(self.people('all').y)} in the cohorts")
        return table

    @cached_property
    def plink(self) -> plink2.Plink | None:
        """PLINK 2 on everybody; None where it is not installed or there are no genotypes."""
        if self.genotypes is None or shutil.which("plink2") is None:
            return None
        variants = [v.id for v in self.study.variants]
        return plink2.Plink(self.genotypes, list(self.table["patient"]), variants, self.work / self.study.lineage)

    def sign(self, name: str, allele: str) -> float:
        """1 where PLINK counted the allele that the study counts, else -1."""
        return 1.0 if self._effects[name] == allele else -1.0

    @cached_property
    def _effects(self) -> dict[str, str]:
        return {v.id: v.effect for v in self.study.variants}
