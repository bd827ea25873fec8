"""Weights of a fitted model: the linear predictor they give a patient, and how a result prints them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sequester.protocols.analyses.analysis import Broadcast, Finished, State
from sequester.protocols.analyses.cohort import Block, Result
from sequester.protocols.analyses.newton import Estimates

if TYPE_CHECKING:
    from sequester.protocols.study import Feature, Study

Vector = NDArray[np.float64]
LOG_MEAN = 12.0  # a Poisson mean beyond 160,000 is a broadcast, not a fit


def sigmoid(z: Vector) -> Vector:
    """1 / (1 + exp(-z)) without overflow."""
    return np.where(z >= 0, 1.0 / (1.0 + np.exp(-np.abs(z))), np.exp(-np.abs(z)) / (1.0 + np.exp(-np.abs(z))))


def private_rows(x: Vector, over_sqrt_p: bool, record_norm: float) -> tuple[Vector, float]:
    """Records as the private solvers see them: scaled, norm clipped to `record_norm`; and the scale that was applied."""
    scale = x.shape[1] ** -0.5 if over_sqrt_p and x.shape[1] else 1.0
    rows = x * scale
    norms = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    rows *= np.minimum(1.0, record_norm / np.maximum(norms, 1e-300))[:, None]
    return rows, scale


def predictor(x: Vector, w: Vector, b: float | Vector) -> Vector:
    """x w + b, clamped to +-1e6 and 0 where it is not a number; `w` (features,) or one row for each of x.

    Weights come from the exchange. Weights so large that one patient's value overflows would make the contribution not
    finite, and the site's refusal would say that this patient is here: no refusal may depend on patients.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        z = x @ w + b if w.ndim == 1 else np.einsum("ij,ij->i", x, w) + b
    return np.clip(np.nan_to_num(z, nan=0.0, posinf=1e6, neginf=-1e6), -1e6, 1e6)


def sent(model: State) -> Broadcast:
    """What sites need to judge patients: `w` (features,) and `b` (1,) of a model.

    Of heads: `w` (1 + groups, features) and `b` (1 + groups,), the pooled model and then the head of each stratum.
    """
    if "head_w" not in model:
        return {"w": model["w"], "b": model["b"]}
    return {"w": np.vstack([model["w"], model["head_w"]]), "b": np.append(model["b"], model["head_b"])}


def judged(block: Block, w: Vector, b: Vector) -> Vector:
    """The predictor of each patient of a block by the weights that `sent` gave: by the head of their own group, if any."""
    if w.ndim == 1:
        return predictor(block.x, w, float(b[0]))
    return predictor(block.x, w[1 + block.strata], b[1 + block.strata])


def score_sd(w: Vector) -> float:
    """The score's standard deviation were the standardised features independent: a public scale."""
    return max(float(np.sqrt((w * w).sum())), 1e-12)


def public_scale(w: Vector, b: Vector) -> tuple[float, float]:
    """(standard deviation, centre) of the predictor that `sent` weights give, from them alone: of heads over all groups."""
    if w.ndim == 1:
        return score_sd(w), float(b[0])
    return score_sd(w[1:] / np.sqrt(len(w) - 1)), float(b[1:].mean())


def mean_of(family: str, z: Vector) -> Vector:
    """The fitted mean of a linear predictor; a Poisson mean is finite for every broadcast."""
    if family == "logistic":
        return sigmoid(z)
    return np.exp(np.minimum(z, LOG_MEAN)) if family == "poisson" else z


def model(
    study: Study,
    w: Vector,
    b: Vector,
    estimates: Estimates | None = None,
    of: Sequence[Feature] | None = None,
    **more: Any,
) -> Finished:
    """A finished fit: what is printed, and the weights of all the study's features, 0 for those it left out.

    `of` are the features of `w`; without it the study's first ones: scores and covariates stand first, variants last.
    """
    of = study.features()[: len(w)] if of is None else of
    result = weights_result(of, w, float(b[0]), estimates) | more
    return Finished(result, {"w": widened(study, of, w), "b": np.asarray(b, dtype=np.float64)})


def widened(study: Study, of: Sequence[Feature], w: Vector) -> Vector:
    """Weights of all the study's features (features,), from those of some of them: 0 for the others."""
    features = study.features()
    place = {feature: j for j, feature in enumerate(features)}
    wide = np.zeros(len(features))
    wide[[place[feature] for feature in of]] = w
    return wide


def weights_result(features: Sequence[Feature], w: Vector, b: float, estimates: Estimates | None = None) -> Result:
    """Weights on the standardised scale and per raw unit (per copy of the effect allele).

    With `estimates`, whose column 0 is the intercept, also standard error, test and 95 % interval of the standardised
    weight, and the standard error per raw unit; or why there is none.
    """
    rows = []
    intercept = b
    for j, feature in enumerate(features):
        row: Result = {
            "name": feature.name,
            "kind": feature.kind,
            "standardised": float(w[j]),
            "per_unit": float(w[j]) / feature.scale,
        }
        intercept -= float(w[j]) * feature.centre / feature.scale
        if estimates is not None:
            row |= estimates.row(j + 1)
            if "se" in row:
                row["per_unit_se"] = row["se"] / feature.scale
        rows.append(row)
    result: Result = {"weights": rows, "intercept": b, "intercept_raw": intercept}
    if estimates is not None and "se" in (found := estimates.row(0)):
        result["intercept_se"] = found["se"]
    return result
