"""Whether predicted risks are right: slope and intercept by a logistic model of the linear predictor, and risk by decile.

Exact: Newton on two numbers a subgroup, with people, cases and summed risk between public edges in the first round.
Private: the bins alone, once; slope and intercept are not released (spec/genomics.md, section 7). The coefficients are
offered as a recalibration, never applied silently.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from sequester.protocols.analyses import exact_glm
from sequester.protocols.analyses.analysis import Broadcast, Finished, Layout, Next, State, Sums
from sequester.protocols.analyses.cohort import Cohort, Part, Result
from sequester.protocols.analyses.counts import noise_sd
from sequester.protocols.analyses.evaluation import subgroups
from sequester.protocols.analyses.metrics import by_group
from sequester.protocols.analyses.newton import Estimates, inverse
from sequester.protocols.analyses.plan import AnalysisPlan
from sequester.protocols.analyses.weights import judged, public_scale, sent, sigmoid

if TYPE_CHECKING:
    from sequester.protocols.study import Study

Vector = NDArray[np.float64]


class CalibrationPlan(AnalysisPlan):
    """`of` names an earlier analysis that leaves a model of a binary outcome; `bins` lie at its public quantiles."""

    kind: Literal["calibration"] = "calibration"
    of: str
    part: Part = "test"
    bins: int = Field(default=10, ge=2, le=100)
    rounds: int = Field(default=15, ge=2, le=50)


class Calibration:
    """See the module."""

    kind = "calibration"

    def rounds(self, plan: CalibrationPlan, study: Study) -> int:
        return plan.rounds if plan.mode == "exact" else 1

    def layout(self, plan: CalibrationPlan, study: Study, step: int) -> Layout:
        g = len(subgroups(study)) + 1  # the last is everybody together
        bins = ("bins", (g - 1, plan.bins, 3))
        if plan.mode == "private":
            return Layout((bins,))
        fit = (("information", (g, 3)), ("score", (g, 2)), ("log_likelihood", (g, 1)), ("people", (g, 3)))
        return Layout((*fit, bins) if step == 0 else fit)

    def sensitivity(self, plan: CalibrationPlan, study: Study) -> float:
        return 2500.0 if plan.mode == "exact" else float(np.sqrt(3.0))  # exact: head-room, a squared predictor

    def is_iterative(self, plan: CalibrationPlan, study: Study) -> bool:
        return True

    def start(self, plan: CalibrationPlan, study: Study, earlier: Mapping[str, Finished]) -> Next:
        g = len(subgroups(study)) + 1
        state: State = dict(sent(earlier[plan.of].state))
        if plan.mode == "exact":
            # a start at the claim itself: slope 1, intercept 0
            state |= exact_glm.packed([exact_glm.fresh(np.array([0.0, 1.0]), False) for _ in range(g)])
        return Next(state, _to_all(state))

    def contribution(
        self, plan: CalibrationPlan, study: Study, cohort: Cohort, broadcast: Broadcast, step: int
    ) -> Sums:
        w, b = np.asarray(broadcast["w"], dtype=np.float64), np.asarray(broadcast["b"], dtype=np.float64)
        sums = {name: np.zeros(shape) for name, shape in self.layout(plan, study, step).fields}
        inner = _edges(w, b, plan.bins)
        for block in cohort.blocks(plan.part):
            z = np.clip(judged(block, w, b), -50.0, 50.0)
            x = np.column_stack([np.ones(len(z)), z])
            if "bins" in sums:
                at = np.searchsorted(inner, z, side="right")
                y = np.clip(block.y, 0.0, 1.0)
                np.add.at(sums["bins"], (block.strata, at), np.column_stack([np.ones(len(z)), y, sigmoid(z)]))
            for g, beta in enumerate(broadcast["betas"]) if plan.mode == "exact" else ():
                rows = block.strata == g if g < len(broadcast["betas"]) - 1 else np.ones(len(z), dtype=bool)
                at_beta = np.clip(x[rows] @ np.nan_to_num(np.asarray(beta, dtype=np.float64)), -1e6, 1e6)
                square, score, value = exact_glm.moments("logistic", x[rows], block.y[rows], at_beta)
                sums["information"][g] += square[np.triu_indices(2)]
                sums["score"][g] += score
                sums["log_likelihood"][g] += value
                sums["people"][g] += [rows.sum(), block.y[rows].sum(), block.y[rows].sum()]
        return sums

    def combine(self, plan: CalibrationPlan, study: Study, state: State, sums: Sums, step: int) -> Next | Finished:
        if plan.mode == "private":
            return Finished(_report(plan, study, sums["bins"], []), {})
        if step == 0:
            state = {**state, "bins": sums["bins"]}
        last = step + 1 >= plan.rounds
        fits = []
        for g, fit in enumerate(exact_glm.unpacked(state)):
            if not fit["done"][0]:
                fit = fit if step else {**fit, "people": sums["people"][g]}
                n, cases, _ = (float(v) for v in fit["people"])
                if 0.5 < cases < n - 0.5:
                    mine = {name: sums[name][g] for name in ("information", "score", "log_likelihood")}
                    fit = exact_glm.progressed(fit, mine, "logistic", "never", study, last)
                else:
                    fit = {**fit, "done": np.ones(1)}
            fits.append(fit)
        new = {**state, **exact_glm.packed(fits)}
        if last or all(fit["done"][0] for fit in fits):
            return Finished(_report(plan, study, state["bins"], fits), {})
        return Next(new, _to_all(new))


def _to_all(state: State) -> Broadcast:
    weights: Broadcast = {"w": state["w"], "b": state["b"]}
    return weights | ({"betas": state["f.beta"]} if "f.beta" in state else {})


def _edges(w: Vector, b: Vector, bins: int) -> Vector:
    """Inner edges of the predictor: public quantiles were the features independent."""
    from scipy.special import ndtri  # heavy: loaded where it is used

    sd, centre = public_scale(np.nan_to_num(w), np.nan_to_num(b))
    with np.errstate(invalid="ignore"):
        edges = ndtri(np.linspace(0, 1, bins + 1))[1:-1] * sd + centre
    found: Vector = np.clip(np.nan_to_num(edges), -1e300, 1e300)
    return found


def _report(plan: CalibrationPlan, study: Study, bins: Vector, fits: list[State]) -> Result:
    names = subgroups(study)
    floor, noise = study.publication_floor, noise_sd(plan, study)

    def measure(cells: Vector, fit: State | None, groups: int) -> Result:
        n, cases = float(cells[:, 0].sum()), float(cells[:, 1].sum())
        if min(cases, n - cases) < floor + 2 * noise * np.sqrt(plan.bins * groups):
            return {"suppressed": f"<{floor}"}
        shown = cells[:, 0] >= max(floor, 5 * noise * np.sqrt(groups))
        rows = [[float(np.clip(p / m, 0, 1)), float(np.clip(y / m, 0, 1))] for m, y, p in cells[shown]]
        gaps = [abs(p - y) * float(m) for (p, y), m in zip(rows, cells[shown, 0], strict=True)]
        found: Result = {"bins": rows}
        if rows:
            found["expected_calibration_error"] = float(sum(gaps)) / float(cells[shown, 0].sum())
        found["observed_over_expected"] = cases / max(float(cells[:, 2].sum()), 1e-9)
        if fit is not None and fit["done"][0] and not np.asarray(fit["gone"]).any():
            kept = np.asarray(fit["kept"], dtype=bool)
            errors = np.sqrt(np.maximum(np.diag(inverse(fit["information"], kept)), 0.0))
            own = Estimates(np.asarray(fit["beta"]), errors, [exact_glm.REASONS[int(c)] for c in fit["why"]])
            found["intercept"] = {"value": float(fit["beta"][0]), **own.row(0)}
            found["slope"] = {"value": float(fit["beta"][1]), **own.row(1)}
        return found

    result = measure(bins.sum(axis=0), fits[-1] if fits else None, len(bins))
    if len(names) > 1:
        place = {name: g for g, name in enumerate(names)}
        size = {name: float(bins[g, :, 0].sum()) for name, g in place.items()}
        result["groups"] = by_group(size, lambda n: measure(bins[place[n]], fits[place[n]] if fits else None, 1))
    return result


def faults(study: Study, plan: CalibrationPlan, earlier: Mapping[str, Any]) -> Iterator[str]:
    """What a plan says against its study."""
    from sequester.protocols.analyses.registry import leaves_a_model  # the registry knows this file at import

    of = earlier.get(plan.of)
    if of is None or not leaves_a_model(of) or of.kind == "training":
        yield f"analysis {plan.name} is of `{plan.of}`, which is no model with weights before it"
    if study.phenotype.kind != "binary":
        yield f"analysis {plan.name}: calibration of a {study.phenotype.kind} phenotype; binary was expected"


CALIBRATION = Calibration()
