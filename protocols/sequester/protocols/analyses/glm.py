"""Generalised linear models: full-batch clipped gradients in private mode, Newton where columns are few.

Private gradient (spec/privacy.md 3.2 and 5): a patient's gradient is r (x, kappa), r = prediction - outcome, kappa the
constant intercept feature; each is scaled by min(1, C / norm) and the sum is released. All sums are float64. n0 and the
prevalence K are public; nothing that depends on the patients divides, scales or stops anything.

Exact Newton stands in `exact_glm.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from sequester.protocols.analyses import exact_glm
from sequester.protocols.analyses.analysis import Broadcast, Finished, Layout, Next, State, Sums
from sequester.protocols.analyses.cohort import Cohort, Part, Which, chosen, designs
from sequester.protocols.analyses.newton import symmetric
from sequester.protocols.analyses.plan import AnalysisPlan, Number
from sequester.protocols.analyses.weights import mean_of, model, predictor, private_rows, sigmoid

if TYPE_CHECKING:
    from sequester.protocols.study import Study

Vector = NDArray[np.float64]
MAX_NEWTON_COLUMNS = 20  # private Newton pays d^2 noise (spec/privacy.md, section 5)


class GlmPlan(AnalysisPlan):
    """A logistic, linear or Poisson model of the study's phenotype on its features.

    `rounds` is T. `step_scale` is a of the default recipe; `step`, where given, replaces the recipe's step on the sum
    over n0. `over_sqrt_p` divides the standardised features by the square root of their number before the record's norm
    is clipped to `record_norm`. `prevalence` is public: of a Poisson model the mean count. `features` table leaves the
    variants out, `leave_out` scores and covariates by name. `firth` penalises the likelihood by half the log determinant
    of the information: always, or where a coefficient has no maximum without it (exact only).
    """

    kind: Literal["glm"] = "glm"
    family: Literal["logistic", "linear", "poisson"] = "logistic"
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
    features: Which = Field(default="all", exclude_if=lambda which: which == "all")
    leave_out: tuple[str, ...] = Field(default=(), exclude_if=lambda names: not names)
    firth: Literal["never", "if_separated", "always"] = Field(default="never", exclude_if=lambda when: when == "never")

    @model_validator(mode="after")
    def _can_be_run(self) -> GlmPlan:
        if self.mode == "private" and self.solver == "newton" and self.family == "linear":
            raise ValueError("a private linear model by Newton has no bound on its residuals; use kind `linear`")
        if self.mode == "private" and self.solver == "newton" and self.family == "poisson":
            raise ValueError("a private Poisson model by Newton has no bound on its residuals; use solver gradient")
        if self.firth != "never" and (self.mode == "private" or self.family != "logistic"):
            raise ValueError("firth is for exact logistic models; private gradients stay finite without it")
        return self


class Glm:
    """See the module."""

    kind = "glm"

    def rounds(self, plan: GlmPlan, study: Study) -> int:
        return plan.rounds

    def layout(self, plan: GlmPlan, study: Study, step: int) -> Layout:
        if plan.mode == "exact":
            return exact_glm.layout(plan, study)
        p = len(chosen(study, plan.features, plan.leave_out))
        if plan.solver == "gradient":
            return Layout((("gradient", (p,)), ("intercept", (1,))))
        return Layout((("information", ((p + 1) * (p + 2) // 2,)), ("score", (p + 1,))))

    def sensitivity(self, plan: GlmPlan, study: Study) -> float:
        if plan.mode == "exact":
            return exact_glm.reach(plan, study)
        if plan.solver == "gradient":
            return float(plan.clip)
        bound = float(np.hypot(float(plan.record_norm), 1.0))
        return float(np.sqrt(bound**2 + bound**4 / 16))

    def is_iterative(self, plan: GlmPlan, study: Study) -> bool:
        return True

    def start(self, plan: GlmPlan, study: Study, earlier: Mapping[str, Finished]) -> Next:
        if plan.mode == "exact":
            return exact_glm.start(plan, study)
        p = len(chosen(study, plan.features, plan.leave_out))
        b = 0.0
        if plan.solver == "gradient":
            k = float(plan.prevalence)
            b = {"logistic": np.log(k / (1 - k)) if k < 1 else 0.0, "poisson": np.log(k), "linear": 0.0}[plan.family]
        state: State = {"w": np.zeros(p), "b": np.array([b])}
        state |= {"mean_w": np.zeros(p), "mean_b": np.zeros(1), "averaged": np.zeros(1, dtype=np.int64)}
        return Next(state, {"w": state["w"], "b": state["b"]})

    def later(self, plan: GlmPlan, study: Study, step: int) -> list[Broadcast]:
        return exact_glm.later(plan, study)

    def contribution(self, plan: GlmPlan, study: Study, cohort: Cohort, broadcast: Broadcast, step: int) -> Sums:
        if plan.mode == "exact":
            return exact_glm.contribution(plan, study, cohort, broadcast)
        w = np.asarray(broadcast["w"], dtype=np.float64)
        b = float(broadcast["b"][0])
        solve = self._gradient if plan.solver == "gradient" else self._newton
        return solve(plan, study, cohort, w, b)

    def _gradient(self, plan: GlmPlan, study: Study, cohort: Cohort, w: Vector, b: float) -> Sums:
        total, intercept = np.zeros_like(w), 0.0
        kappa, clip = float(plan.kappa), float(plan.clip)
        low, high = (0.0, float(study.phenotype.upper or 1)) if plan.family == "poisson" else (-1.0, 1.0)
        for block in designs(study, cohort, plan.part, plan.features, plan.leave_out):
            x, _ = private_rows(block.x, plan.over_sqrt_p, float(plan.record_norm))  # (rows, features)
            r = mean_of(plan.family, predictor(x, w, b)) - np.clip(block.y, low, high)
            norms = np.abs(r) * np.sqrt(np.einsum("ij,ij->i", x, x) + kappa * kappa)
            c = np.minimum(1.0, clip / np.maximum(norms, 1e-300))
            total += x.T @ (r * c)
            intercept += kappa * float((r * c).sum())
        return {"gradient": total, "intercept": np.array([intercept])}

    def _newton(self, plan: GlmPlan, study: Study, cohort: Cohort, w: Vector, b: float) -> Sums:
        p = len(w)
        information, score = np.zeros((p + 1, p + 1)), np.zeros(p + 1)
        for block in designs(study, cohort, plan.part, plan.features, plan.leave_out):
            x = private_rows(block.x, plan.over_sqrt_p, float(plan.record_norm))[0]
            ones = np.column_stack([np.ones(len(x)), x])  # (rows, 1 + features)
            mu = sigmoid(predictor(x, w, b))
            information += ones.T @ (ones * (mu * (1 - mu))[:, None])
            score += ones.T @ (np.clip(block.y, 0.0, 1.0) - mu)  # so that |y - mu| <= 1
        return {"information": information[np.triu_indices(p + 1)], "score": score}

    def combine(self, plan: GlmPlan, study: Study, state: State, sums: Sums, step: int) -> Next | Finished:
        if plan.mode == "exact":
            return exact_glm.combine(plan, study, state, sums, step)
        return (self._descend if plan.solver == "gradient" else self._solve)(plan, study, state, sums, step)

    def _descend(self, plan: GlmPlan, study: Study, state: State, sums: Sums, step: int) -> Next | Finished:
        p, t, k, a = len(state["w"]), plan.rounds, float(plan.prevalence), float(plan.step_scale)
        curvature = {"logistic": k * (1 - k), "poisson": k, "linear": 1.0}[plan.family]
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
        return model(study, mean_w, mean_b, of=chosen(study, plan.features, plan.leave_out))

    def _solve(self, plan: GlmPlan, study: Study, state: State, sums: Sums, step: int) -> Next | Finished:
        p = len(state["w"])
        information = symmetric(sums["information"], p + 1)
        sigma = float(plan.noise_multiplier or 0) * self.sensitivity(plan, study)
        information = information + np.eye(p + 1) * sigma * np.sqrt(p + 1)
        move = np.linalg.solve(information, sums["score"])
        w, b = state["w"] + move[1:], state["b"] + move[:1]
        if step + 1 < plan.rounds:
            return Next({**state, "w": w, "b": b}, {"w": w, "b": b})
        return model(
            study, w * (p**-0.5 if plan.over_sqrt_p and p else 1.0), b, of=chosen(study, plan.features, plan.leave_out)
        )


GLM = Glm()
