"""Generalised linear models: full-batch clipped gradients in private mode, Newton where columns are few.

Private gradient (spec/privacy.md 3.2 and 5): a patient's gradient is r (x, kappa), r = prediction - outcome, kappa the
constant intercept feature; each is scaled by min(1, C / norm) and the sum is released. All sums are float64. n0 and the
prevalence K are public; nothing that depends on the patients divides, scales or stops anything.

Exact Newton: X'WX, X'r and the log-likelihood, one sum a step; the step is halved where the log-likelihood fell
(spec/genomics.md, section 7).
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from sequester.protocols.analyses.analysis import Broadcast, Finished, Layout, Next, State, Sums
from sequester.protocols.analyses.cohort import Cohort, Part, Result
from sequester.protocols.analyses.plan import AnalysisPlan, Number

if TYPE_CHECKING:
    from sequester.protocols.study import Study

Vector = NDArray[np.float64]
MAX_NEWTON_COLUMNS = 20  # private Newton pays d^2 noise (spec/privacy.md, section 5)


class GlmPlan(AnalysisPlan):
    """A logistic or linear model of the study's phenotype on its features.

    `rounds` is T. `step_scale` is a of the default recipe; `step`, where given, replaces the recipe's step on the sum
    over n0. `over_sqrt_p` divides the standardised features by the square root of their number before the record's norm
    is clipped to `record_norm`.
    """

    kind: Literal["glm"] = "glm"
    family: Literal["logistic", "linear"] = "logistic"
    solver: Literal["gradient", "newton"] = "gradient"
    rounds: int = Field(default=10, ge=1, le=500)
    clip: Number = Decimal("0.6")
    record_norm: Number = Decimal("1")
    kappa: Number = Decimal("0.5")
    step_scale: Number = Decimal("1")
    step: Number | None = None
    over_sqrt_p: bool = True
    average_last: Number = Decimal("0.5")
    prevalence: Number = Decimal("0.5")
    part: Part = "train"

    @model_validator(mode="after")
    def _can_be_run(self) -> GlmPlan:
        if self.mode == "private" and self.solver == "newton" and self.family == "linear":
            raise ValueError("a private linear model by Newton has no bound on its residuals; use kind `linear`")
        return self


def sigmoid(z: Vector) -> Vector:
    """1 / (1 + exp(-z)) without overflow."""
    return np.where(z >= 0, 1.0 / (1.0 + np.exp(-np.abs(z))), np.exp(-np.abs(z)) / (1.0 + np.exp(-np.abs(z))))


def private_rows(x: Vector, plan: GlmPlan) -> tuple[Vector, float]:
    """Records as the private solvers see them: scaled, norm clipped to `record_norm`; and the scale that was applied."""
    scale = x.shape[1] ** -0.5 if plan.over_sqrt_p and x.shape[1] else 1.0
    rows = x * scale
    norms = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    rows *= np.minimum(1.0, float(plan.record_norm) / np.maximum(norms, 1e-300))[:, None]
    return rows, scale


def predictor(x: Vector, w: Vector, b: float | Vector) -> Vector:
    """x w + b, clamped to +-1e6 and 0 where it is not a number; `w` (features,) or one row for each of x.

    Weights come from the exchange. Weights so large that one patient's value overflows would make the contribution not
    finite, and the site's refusal would say that this patient is here: no refusal may depend on patients.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        z = x @ w + b if w.ndim == 1 else np.einsum("ij,ij->i", x, w) + b
    return np.clip(np.nan_to_num(z, nan=0.0, posinf=1e6, neginf=-1e6), -1e6, 1e6)


class Glm:
    """See the module."""

    kind = "glm"

    def rounds(self, plan: GlmPlan, study: Study) -> int:
        return plan.rounds

    def layout(self, plan: GlmPlan, study: Study, step: int) -> Layout:
        p = len(study.features())
        if plan.solver == "gradient":
            return Layout((("gradient", (p,)), ("intercept", (1,))))
        q = (p + 1) * (p + 2) // 2
        fields: tuple[tuple[str, tuple[int, ...]], ...] = (("information", (q,)), ("score", (p + 1,)))
        return Layout((*fields, ("log_likelihood", (1,))) if plan.mode == "exact" else fields)

    def sensitivity(self, plan: GlmPlan, study: Study) -> float:
        if plan.mode == "exact":
            # no clipping: the largest entry one patient adds, for head-room only
            return float(max(1, len(study.features()))) * 64.0
        if plan.solver == "gradient":
            return float(plan.clip)
        bound = float(np.hypot(float(plan.record_norm), 1.0))
        return float(np.sqrt(bound**2 + bound**4 / 16))

    def is_iterative(self, plan: GlmPlan, study: Study) -> bool:
        return True

    def start(self, plan: GlmPlan, study: Study, earlier: Mapping[str, Finished]) -> Next:
        p = len(study.features())
        k = float(plan.prevalence)
        b = float(np.log(k / (1 - k))) if plan.family == "logistic" and plan.solver == "gradient" else 0.0
        state: State = {"w": np.zeros(p), "b": np.array([b])}
        if plan.solver == "gradient":
            state |= {"mean_w": np.zeros(p), "mean_b": np.zeros(1), "averaged": np.zeros(1, dtype=np.int64)}
        else:
            state |= {"held_w": np.zeros(p), "held_b": np.zeros(1), "best": np.array([-np.inf]), "halved": np.zeros(1)}
            state |= {"information": np.zeros(((p + 1) * (p + 2) // 2,)), "converged": np.zeros(1, dtype=np.int64)}
        return Next(state, {"w": state["w"], "b": state["b"]})

    def contribution(self, plan: GlmPlan, study: Study, cohort: Cohort, broadcast: Broadcast, step: int) -> Sums:
        w = np.asarray(broadcast["w"], dtype=np.float64)
        b = float(broadcast["b"][0])
        return self._gradient(plan, cohort, w, b) if plan.solver == "gradient" else self._newton(plan, cohort, w, b)

    def _gradient(self, plan: GlmPlan, cohort: Cohort, w: Vector, b: float) -> Sums:
        total, intercept = np.zeros_like(w), 0.0
        kappa, clip = float(plan.kappa), float(plan.clip)
        for block in cohort.blocks(plan.part):
            if plan.mode == "exact":
                x, y = block.x, block.y
                r = _residual(plan, x, y, w, b)
                c = np.ones_like(r)
            else:
                x, _ = private_rows(block.x, plan)  # (rows, features)
                y = np.clip(block.y, -1.0, 1.0)
                r = _residual(plan, x, y, w, b)
                norms = np.abs(r) * np.sqrt(np.einsum("ij,ij->i", x, x) + kappa * kappa)
                c = np.minimum(1.0, clip / np.maximum(norms, 1e-300))
            total += x.T @ (r * c)
            intercept += kappa * float((r * c).sum())
        return {"gradient": total, "intercept": np.array([intercept])}

    def _newton(self, plan: GlmPlan, cohort: Cohort, w: Vector, b: float) -> Sums:
        p = len(w)
        upper = np.triu_indices(p + 1)
        information, score, log_likelihood = np.zeros((p + 1, p + 1)), np.zeros(p + 1), 0.0
        for block in cohort.blocks(plan.part):
            x = block.x if plan.mode == "exact" else private_rows(block.x, plan)[0]
            y = block.y if plan.mode == "exact" else np.clip(block.y, 0.0, 1.0)  # so that |y - mu| <= 1
            ones = np.column_stack([np.ones(len(y)), x])  # (rows, 1 + features)
            z = predictor(x, w, b)
            if plan.family == "logistic":
                mu = sigmoid(z)
                weight = mu * (1 - mu)
                log_likelihood += float((y * z - np.logaddexp(0.0, z)).sum())
            else:
                mu, weight = z, np.ones_like(z)
                log_likelihood -= 0.5 * float(((y - mu) ** 2).sum())
            information += ones.T @ (ones * weight[:, None])
            score += ones.T @ (y - mu)
        sums: Sums = {"information": information[upper], "score": score}
        if plan.mode == "exact":
            sums["log_likelihood"] = np.array([log_likelihood])
        return sums

    def combine(self, plan: GlmPlan, study: Study, state: State, sums: Sums, step: int) -> Next | Finished:
        if plan.solver == "gradient":
            return self._descend(plan, study, state, sums, step)
        return self._solve(plan, study, state, sums, step)

    def _descend(self, plan: GlmPlan, study: Study, state: State, sums: Sums, step: int) -> Next | Finished:
        p, t, k, a = len(state["w"]), plan.rounds, float(plan.prevalence), float(plan.step_scale)
        curvature = k * (1 - k) if plan.family == "logistic" else 1.0
        if plan.step is not None:
            step_w = step_b = float(plan.step)
        else:
            step_w = a * (p if plan.over_sqrt_p else 1) / (curvature * t)
            step_b = min(a, 1.0) / (curvature * t)
        w = state["w"] - step_w * sums["gradient"] / study.n0
        b = state["b"] - step_b * sums["intercept"] / (float(plan.kappa) * study.n0)
        counts = step + 1 > t * (1 - float(plan.average_last))
        new: State = {
            "w": w,
            "b": b,
            "mean_w": state["mean_w"] + (w if counts else 0.0),
            "mean_b": state["mean_b"] + (b if counts else 0.0),
            "averaged": state["averaged"] + (1 if counts else 0),
        }
        if step + 1 < t:
            return Next(new, {"w": w, "b": b})
        m = max(1, int(new["averaged"][0]))
        scale = p**-0.5 if plan.mode == "private" and plan.over_sqrt_p and p else 1.0
        mean_w = (new["mean_w"] / m if new["averaged"][0] else w) * scale
        mean_b = new["mean_b"] / m if new["averaged"][0] else b
        return Finished(weights_result(study, mean_w, float(mean_b[0]), None), {"w": mean_w, "b": mean_b})

    def _solve(self, plan: GlmPlan, study: Study, state: State, sums: Sums, step: int) -> Next | Finished:
        p = len(state["w"])
        information = symmetric(sums["information"], p + 1)
        last = step + 1 >= plan.rounds
        if plan.mode == "private":
            sigma = float(plan.noise_multiplier or 0) * self.sensitivity(plan, study)
            information = information + np.eye(p + 1) * sigma * np.sqrt(p + 1)
            move = np.linalg.solve(information, sums["score"])
            w, b = state["w"] + move[1:], state["b"] + move[:1]
            if last:
                scale = p**-0.5 if plan.over_sqrt_p and p else 1.0
                return Finished(weights_result(study, w * scale, float(b[0]), None), {"w": w * scale, "b": b})
            return Next({**state, "w": w, "b": b}, {"w": w, "b": b})
        log_likelihood = float(sums["log_likelihood"][0])
        if log_likelihood < float(state["best"][0]) - 1e-9 * abs(log_likelihood) and float(state["halved"][0]) < 20:
            # the step went too far: half of it, from the last point that was better
            w, b = (state["w"] + state["held_w"]) / 2, (state["b"] + state["held_b"]) / 2
            halved = state["halved"] + 1
            new: State = {**state, "w": w, "b": b, "halved": halved}
            return self._newton_result(study, state, information) if last else Next(new, {"w": w, "b": b})
        move = np.linalg.lstsq(information, sums["score"], rcond=None)[0]
        w, b = state["w"] + move[1:], state["b"] + move[:1]
        converged = bool(np.abs(move).max() < 1e-10 * max(1.0, float(np.abs(w).max(initial=0.0))))
        new = {
            "w": w, "b": b, "held_w": state["w"], "held_b": state["b"], "best": np.array([log_likelihood]),
            "halved": np.zeros(1), "information": sums["information"], "converged": np.array([int(converged)]),
        }  # fmt: skip
        if converged or last:
            return self._newton_result(study, new, information)
        return Next(new, {"w": w, "b": b})

    def _newton_result(self, study: Study, state: State, information: Vector) -> Finished:
        errors = np.sqrt(np.maximum(np.diag(np.linalg.pinv(information)), 0.0))
        result = weights_result(study, state["w"], float(state["b"][0]), errors)
        result |= {"converged": bool(state["converged"][0]), "log_likelihood": float(state["best"][0])}
        separated = [f.name for f, w in zip(study.features(), state["w"], strict=True) if abs(w) > 15]
        if separated:
            result["separated"] = separated
        return Finished(result, {"w": state["w"], "b": state["b"]})


def symmetric(packed: Vector, size: int) -> Vector:
    """The full matrix of a packed upper triangle."""
    full = np.zeros((size, size))
    full[np.triu_indices(size)] = packed
    return full + np.triu(full, 1).T


def _residual(plan: GlmPlan, x: Vector, y: Vector, w: Vector, b: float) -> Vector:
    z = predictor(x, w, b)
    return (sigmoid(z) if plan.family == "logistic" else z) - y


def weights_result(study: Study, w: Vector, b: float, errors: Vector | None) -> Result:
    """Weights on the standardised scale and per raw unit (per copy of the effect allele); standard errors if given."""
    rows = []
    intercept = b
    for j, feature in enumerate(study.features()):
        row: Result = {
            "name": feature.name,
            "kind": feature.kind,
            "standardised": float(w[j]),
            "per_unit": float(w[j]) / feature.scale,
        }
        intercept -= float(w[j]) * feature.centre / feature.scale
        if errors is not None:
            row["se"] = float(errors[j + 1])
        rows.append(row)
    result: Result = {"weights": rows, "intercept": b, "intercept_raw": intercept}
    if errors is not None:
        result["intercept_se"] = float(errors[0])
    return result


GLM = Glm()
