"""Everybody of a study at once, from the cohorts that the hospitals froze: only possible here, where one machine has all.

Columns, scaling, folds and held-out people are the study's own. What is compared with them is computed by other programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequester.client.compute.cohort import StoredCohort
from sequester.protocols.analyses.cohort import Part, chosen, standardised
from sequester.protocols.study import Study

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class People:
    """The people of one part, hospital by hospital: `raw` of the table and `copies` of variants, NaN missing."""

    study: Study
    raw: Matrix  # (people, table features)
    copies: Matrix  # (people, variants)
    y: Matrix  # (people,) standardised
    fold: NDArray[np.int64]
    strata: NDArray[np.int64]
    site: NDArray[np.int64]  # (people,) place of the hospital
    event: Matrix | None  # (people,)

    @cached_property
    def table(self) -> Matrix:
        """Standardised table features (people, table features), 0 missing."""
        return standardised(self.raw, self.study.table_features())

    @cached_property
    def variants(self) -> Matrix:
        """Standardised variants (people, variants), 0 missing."""
        return standardised(self.copies, self.study.features()[len(self.study.table_features()) :])

    @cached_property
    def x(self) -> Matrix:
        """All features (people, features)."""
        return np.hstack([self.table, self.variants])

    def features(self, plan: Any) -> Matrix:
        """The features that a plan works on (people, features of the plan)."""
        which = getattr(plan, "features", "all")
        left_out = getattr(plan, "leave_out", ())
        kept = [j for j, f in enumerate(chosen(self.study, which)) if f.source not in left_out]
        return (self.x if which == "all" else self.table)[:, kept]

    def filled(self, j: int) -> Matrix:
        """Copies of one variant (people,), a missing call being the mean of all others."""
        copies = self.copies[:, j]
        return np.where(np.isnan(copies), np.nanmean(copies), copies)


def pooled(study: Study, stores: Mapping[str, Path], part: Part) -> People:
    """The people of one part of all hospitals' frozen cohorts, hospitals in order of their names."""
    columns, copies = [], []
    for name in sorted(stores):
        cohort = StoredCohort(stores[name], study)
        columns.append(cohort.columns(part))
        blocks = [block.copies for block in cohort.dosages(part)]
        copies.append(np.hstack(blocks) if blocks else np.zeros((len(columns[-1].y), 0)))
    together = {name: np.concatenate([getattr(c, name) for c in columns]) for name in ("raw", "y", "fold", "strata")}
    site = np.repeat(np.arange(len(columns)), [len(c.y) for c in columns])
    timed = study.phenotype.kind == "time"
    event = np.concatenate([c.event for c in columns]) if timed else None  # type: ignore[misc]
    return People(study, copies=np.vstack(copies), site=site, event=event, **together)
