"""Least squares in one round: X'X, X'y, y'y and N of each fold, so that the fit and its cross-validation open together.

Broadcast-free: the contribution depends on the signed study and the cohort alone (spec/genomics.md, section 7). Private
mode releases one noisy set for all folds together and adds a ridge of the noise's own size; d <= 20.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from sequester.protocols.analyses.analysis import Broadcast, Finished, Layout, Next, State, Sums
from sequester.protocols.analyses.cohort import Cohort, Part, Which, chosen, designs
from sequester.protocols.analyses.newton import Estimates, estimable, inverse, solved, symmetric
from sequester.protocols.analyses.plan import AnalysisPlan, Number
from sequester.protocols.analyses.weights import weights_result, widened

if TYPE_CHECKING:
    from sequester.protocols.study import Study

Vector = NDArray[np.float64]


class LinearPlan(AnalysisPlan):
    """`record_norm` B bounds a record's norm (intercept included) and 1 bounds the outcome, in private mode.

    `features` table leaves the variants out, `leave_out` scores and covariates by name.
    """

    kind: Literal["linear"] = "linear"
    record_norm: Number = Decimal("2.2")
    part: Part = "all"
    features: Which = Field(default="all", exclude_if=lambda which: which == "all")
    leave_out: tuple[str, ...] = Field(default=(), exclude_if=lambda names: not names)


class Linear:
    """See the module."""

    kind = "linear"

    def rounds(self, plan: LinearPlan, study: Study) -> int:
        return 1

    def _folds(self, plan: LinearPlan, study: Study) -> int:
        return study.cohort.folds if plan.mode == "exact" else 1

    def layout(self, plan: LinearPlan, study: Study, step: int) -> Layout:
        p, folds = len(chosen(study, plan.features, plan.leave_out)) + 1, self._folds(plan, study)
        q = p * (p + 1) // 2
        return Layout((("xx", (folds, q)), ("xy", (folds, p)), ("yy", (folds,)), ("n", (folds,))))

    def sensitivity(self, plan: LinearPlan, study: Study) -> float:
        if plan.mode == "exact":
            # head-room only: nothing is clipped
            return 64.0 * max(1, len(chosen(study, plan.features, plan.leave_out)))
        b = float(plan.record_norm)
        return float(np.sqrt(b**4 + b**2 + 1 + 1))

    def is_iterative(self, plan: LinearPlan, study: Study) -> bool:
        return False

    def start(self, plan: LinearPlan, study: Study, earlier: Mapping[str, Finished]) -> Next:
        return Next({}, {})

    def contribution(self, plan: LinearPlan, study: Study, cohort: Cohort, broadcast: Broadcast, step: int) -> Sums:
        p, folds = len(chosen(study, plan.features, plan.leave_out)) + 1, self._folds(plan, study)
        upper = np.triu_indices(p)
        xx, xy = np.zeros((folds, p, p)), np.zeros((folds, p))
        yy, n = np.zeros(folds), np.zeros(folds)
        for block in designs(study, cohort, plan.part, plan.features, plan.leave_out):
            x = np.column_stack([np.ones(len(block.y)), block.x])  # (rows, p)
            y = block.y
            fold = block.fold
            if plan.mode == "private":
                norms = np.sqrt(np.einsum("ij,ij->i", x, x))
                x = x * np.minimum(1.0, float(plan.record_norm) / norms)[:, None]
                y, fold = np.clip(y, -1.0, 1.0), np.zeros_like(fold)
            for k in range(folds):
                xk, yk = x[fold == k], y[fold == k]
                xx[k] += xk.T @ xk
                xy[k] += xk.T @ yk
                yy[k] += yk @ yk
                n[k] += len(yk)
        return {"xx": np.array([m[upper] for m in xx]), "xy": xy, "yy": yy, "n": n}

    def combine(self, plan: LinearPlan, study: Study, state: State, sums: Sums, step: int) -> Next | Finished:
        names = chosen(study, plan.features, plan.leave_out)
        p, folds = len(names) + 1, self._folds(plan, study)
        xx = np.array([symmetric(row, p) for row in sums["xx"]])
        gram, moment = xx.sum(axis=0), sums["xy"].sum(axis=0)
        if plan.mode == "private":
            gram = gram + np.eye(p) * float(plan.noise_multiplier or 0) * self.sensitivity(plan, study) * np.sqrt(p)
            beta = np.linalg.solve(gram, moment)
            w = widened(study, names, beta[1:])
            return Finished(weights_result(names, beta[1:], float(beta[0])), {"w": w, "b": beta[:1]})
        kept, why = estimable(gram)
        beta = solved(gram, moment, kept)
        n, yy = float(sums["n"].sum()), float(sums["yy"].sum())
        residual, df = max(yy - float(beta @ moment), 0.0), n - float(kept.sum())
        errors = np.sqrt(np.maximum(np.diag(inverse(gram, kept)), 0.0) * residual / max(df, 1.0))
        result = weights_result(names, beta[1:], float(beta[0]), Estimates(beta, errors, why, df))
        centred = yy - float(moment[0]) ** 2 / max(n, 1.0)
        result |= {"n": int(round(n)), "r2": 1.0 - residual / centred if centred > 0 else 0.0}
        fold_w, fold_b = np.zeros((folds, len(study.features()))), np.zeros(folds)
        for k in range(folds):
            left_out = solved(gram - xx[k], moment - sums["xy"][k], estimable(gram - xx[k])[0])
            fold_w[k], fold_b[k] = widened(study, names, left_out[1:]), left_out[0]
        w = widened(study, names, beta[1:])
        return Finished(result, {"w": w, "b": beta[:1], "fold_w": fold_w, "fold_b": fold_b})


LINEAR = Linear()
