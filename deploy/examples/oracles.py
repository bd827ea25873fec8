"""What statsmodels says of the pooled patients of an example: only possible here, where one machine has all hospitals.

The patients are read from the cohorts that the hospitals froze, so that columns, scaling, folds and held-out patients are
the study's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequester.client.compute.cohort import StoredCohort
from sequester.protocols.analyses.evaluation import outcome_value
from sequester.protocols.study import Study

Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Pooled:
    """Everybody's rows: x standardised (patients, features), y, fold; with the design's intercept column in front."""

    x: Matrix
    y: Matrix
    fold: NDArray[np.int64]

    @property
    def design(self) -> Matrix:
        return np.column_stack([np.ones(len(self.y)), self.x])  # (patients, 1 + features)


def pooled(study: Study, stores: Mapping[str, Path], part: str) -> Pooled:
    """The rows of one part of all hospitals' frozen cohorts."""
    blocks = [
        block
        for folder in stores.values()
        for block in StoredCohort(folder, study).blocks(part)  # type: ignore[arg-type]
    ]
    return Pooled(
        np.vstack([b.x for b in blocks]),
        np.concatenate([b.y for b in blocks]),
        np.concatenate([b.fold for b in blocks]),
    )


def coefficients(result: Mapping[str, Any]) -> Matrix:
    """Intercept and standardised weights of a linear or glm result."""
    return np.array([result["intercept"], *(row["standardised"] for row in result["weights"])])


def relative_difference(found: Matrix, expected: Matrix) -> float:
    """The largest |found - expected| / |expected|."""
    return float(np.max(np.abs(found - expected) / np.abs(expected)))


def least_squares(rows: Pooled) -> Matrix:
    """Intercept and weights of ordinary least squares."""
    import statsmodels.api as sm

    return np.asarray(sm.OLS(rows.y, rows.design).fit().params)


def logistic(rows: Pooled) -> Matrix:
    """Intercept and weights of logistic regression by maximum likelihood."""
    import statsmodels.api as sm

    return np.asarray(sm.Logit(rows.y, rows.design).fit(disp=0, method="newton", tol=1e-12, maxiter=100).params)


def mean_absolute_error(study: Study, rows: Pooled, beta: Matrix) -> float:
    """Of one model, on the outcome's own scale."""
    fitted = outcome_value(study.phenotype, rows.design @ beta)
    return float(np.abs(fitted - outcome_value(study.phenotype, rows.y)).mean())


def cross_validated_error(study: Study, rows: Pooled) -> float:
    """Of least squares, each patient judged by the fit that left their fold out."""
    errors = np.empty(len(rows.y))
    actual = outcome_value(study.phenotype, rows.y)
    for fold in np.unique(rows.fold):
        out = rows.fold == fold
        beta = least_squares(Pooled(rows.x[~out], rows.y[~out], rows.fold[~out]))
        errors[out] = np.abs(outcome_value(study.phenotype, rows.design[out] @ beta) - actual[out])
    return float(errors.mean())


def auc(rows: Pooled, beta: Matrix) -> float:
    """Of one model's ranking."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(rows.y, rows.design @ beta))
