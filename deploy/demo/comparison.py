"""What one hospital alone, and all of them without privacy, would have learnt: computed by the demo, never by the product.

Only a script on one machine can do this. It reads the cohorts that the hospitals froze, so that training and held-out
patients are the same as the study's, and fits plain logistic regression (scikit-learn, no penalty, no noise).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sequester.client.compute.cohort import StoredCohort
from sequester.protocols.study import Study

Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Comparison:
    """AUC on all hospitals' held-out patients of: each hospital's own model, the pooled model, the released weights."""

    by_site: dict[str, float]
    pooled: float
    released: float
    held_out: int

    @property
    def best_site(self) -> float:
        return max(self.by_site.values())


def rows(cohort: StoredCohort, part: str) -> tuple[Matrix, Matrix]:
    """(x, y) of one part of a frozen cohort, standardised as the study says."""
    blocks = list(cohort.blocks(part))  # type: ignore[arg-type]
    return np.vstack([b.x for b in blocks]), np.concatenate([b.y for b in blocks])


def compare(study: Study, stores: Mapping[str, Path], weights: Mapping[str, float]) -> Comparison:
    """`weights`: feature name -> released weight on the standardised scale."""
    from sklearn.metrics import roc_auc_score

    cohorts = {site: StoredCohort(folder, study) for site, folder in stores.items()}
    train = {site: rows(cohort, "train") for site, cohort in cohorts.items()}
    test = [rows(cohort, "test") for cohort in cohorts.values()]
    x, y = np.vstack([part[0] for part in test]), np.concatenate([part[1] for part in test])

    def judged(w: Matrix) -> float:
        return float(roc_auc_score(y, x @ w))

    everybody = np.vstack([part[0] for part in train.values()]), np.concatenate([part[1] for part in train.values()])
    return Comparison(
        by_site={site: judged(fitted(*part)) for site, part in train.items()},
        pooled=judged(fitted(*everybody)),
        released=judged(np.array([weights[feature.name] for feature in study.features()])),
        held_out=len(y),
    )


def fitted(x: Matrix, y: Matrix) -> Matrix:
    """Weights of a logistic regression without penalty."""
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a fit that did not converge is no comparison
        model = LogisticRegression(C=np.inf, max_iter=1000, tol=1e-8).fit(x, y)
    return np.asarray(model.coef_[0], dtype=np.float64)
