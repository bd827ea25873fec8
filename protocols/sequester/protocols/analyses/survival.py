"""Time to an event: Cox models, Kaplan-Meier curves, and the discrete-time hazard, which is the private one.

`cox_by_site` stratifies by hospital and keeps exact times (Efron); `cox` shares a grid of times, so that risk sets are
those of all hospitals (Breslow); both are exact only, since a partial likelihood couples patients and no clip bounds what
one of them moves. `kaplan_meier` counts events and ends of follow-up on the grid, one cell a patient. `hazard` is a
logistic model of the event in each interval a patient is at risk in (spec/genomics.md, section 7; spec/privacy.md, 3.6).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from sequester.protocols.analyses import cox, hazard
from sequester.protocols.analyses.analysis import Broadcast, Finished, Layout, Next, State, Sums
from sequester.protocols.analyses.cohort import Cohort, Part, Result, Which, chosen
from sequester.protocols.analyses.counts import noise_sd
from sequester.protocols.analyses.plan import AnalysisPlan, Number

if TYPE_CHECKING:
    from sequester.protocols.study import Study

Vector = NDArray[np.float64]
MAX_BINS = 2000


class SurvivalPlan(AnalysisPlan):
    """`bins` equal intervals from 0 to the phenotype's upper bound are the grid; 12 of them carry a hazard model.

    The fields from `clip` on are of the private hazard: weights step by `step_w` d/T and intercepts, which start at
    `intercept`, by `step_b` / T, both on the sum over n0.
    """

    kind: Literal["survival"] = "survival"
    model: Literal["cox_by_site", "cox", "kaplan_meier", "hazard"]
    part: Part = "train"
    features: Which = "all"
    bins: int = Field(default=12, ge=2, le=MAX_BINS)
    rounds: int = Field(default=20, ge=1, le=500)
    by_subgroup: bool = False
    clip: Number = Decimal("1")
    record_norm: Number = Decimal("1")
    over_sqrt_p: bool = True
    kappa: Number = Decimal("0.3")
    intercept: Number = Decimal("-2")
    step_w: Number = Decimal("3")
    step_b: Number = Decimal("18")


class Survival:
    """See the module."""

    kind = "survival"

    def rounds(self, plan: SurvivalPlan, study: Study) -> int:
        return 1 if plan.model == "kaplan_meier" else plan.rounds

    def layout(self, plan: SurvivalPlan, study: Study, step: int) -> Layout:
        p = len(chosen(study, plan.features))
        match plan.model:
            case "kaplan_meier":
                return Layout((("leaving", (len(_groups(plan, study)), plan.bins, 2)),))
            case "cox_by_site":
                return cox.by_site_layout(p)
            case "cox":
                return cox.grid_layout(p, plan.bins)
            case "hazard":
                return hazard.layout(plan, p)

    def sensitivity(self, plan: SurvivalPlan, study: Study) -> float:
        if plan.model == "kaplan_meier":
            return 1.0
        if plan.mode == "private":
            return float(plan.clip)
        return 64.0 * max(1, len(chosen(study, plan.features))) * plan.bins  # head-room only

    def is_iterative(self, plan: SurvivalPlan, study: Study) -> bool:
        return plan.model != "kaplan_meier"

    def start(self, plan: SurvivalPlan, study: Study, earlier: Mapping[str, Finished]) -> Next:
        match plan.model:
            case "kaplan_meier":
                return Next({}, {})
            case "hazard":
                return hazard.start(plan, study)
            case _:
                return cox.start(len(chosen(study, plan.features)))

    def contribution(self, plan: SurvivalPlan, study: Study, cohort: Cohort, broadcast: Broadcast, step: int) -> Sums:
        match plan.model:
            case "kaplan_meier":
                return self._leaving(plan, study, cohort)
            case "hazard":
                return hazard.contribution(plan, study, cohort, broadcast)
            case "cox":
                return cox.on_grid(plan, study, cohort, broadcast)
            case "cox_by_site":
                return cox.by_site(plan, study, cohort, broadcast)

    def _leaving(self, plan: SurvivalPlan, study: Study, cohort: Cohort) -> Sums:
        leaving = np.zeros((len(_groups(plan, study)), plan.bins, 2))
        columns = cohort.columns(plan.part)
        assert columns.event is not None  # the study was validated
        group = columns.strata if plan.by_subgroup else np.zeros(len(columns.y), dtype=np.int64)
        at = cox.bin_of(columns.y, float(study.phenotype.upper or 1), plan.bins)
        np.add.at(leaving, (group, at, (columns.event > 0.5).astype(np.int64)), 1.0)
        return {"leaving": leaving}

    def combine(self, plan: SurvivalPlan, study: Study, state: State, sums: Sums, step: int) -> Next | Finished:
        match plan.model:
            case "kaplan_meier":
                return Finished(self._curves(plan, study, sums["leaving"]), {})
            case "hazard":
                return hazard.combine(plan, study, state, sums, step)
            case _:
                return cox.combine(plan, study, state, sums, step)

    def _curves(self, plan: SurvivalPlan, study: Study, leaving: Vector) -> Result:
        width, floor = float(study.phenotype.upper or 1) / plan.bins, study.publication_floor
        sd = noise_sd(plan, study)
        curves: Result = {}
        for name, cells in zip(_groups(plan, study), leaving, strict=True):
            curves[name] = curve(cells, width, floor, sd)
        hidden = [name for name, found in curves.items() if "suppressed" in found]
        if len(hidden) == 1 and len(curves) > 1:
            # alone it would be the total minus the others (spec/genomics.md, section 5)
            size = {name: float(c.sum()) for name, c in zip(curves, leaving, strict=True) if name != hidden[0]}
            curves[min(size, key=lambda name: size[name])] = {"suppressed": "complement"}
        return {"unit": study.phenotype.unit, "curves": curves}


def _groups(plan: SurvivalPlan, study: Study) -> tuple[str, ...]:
    return (*study.cohort.subgroup_values, "other") if plan.by_subgroup else ("all",)


def curve(cells: Vector, width: float, floor: int, noise: float = 0.0) -> Result:
    """Kaplan-Meier of (bins, 2) patients leaving without and with the event, at the ends of the bins.

    Points are printed where at least the floor of events lies between them, and while the floor is at risk; `at_risk` are
    the patients followed into the last interval before the point. Intervals (log minus log, 95 %) only without noise: with
    it none was verified.
    """
    cells = np.maximum(cells, 0.0) if noise else np.rint(cells)
    at_risk = cells[::-1].sum(axis=1).cumsum()[::-1]
    events = cells[:, 1]
    if at_risk[0] < floor + 2 * noise * np.sqrt(cells.size) or events.sum() < floor:
        return {"suppressed": f"<{floor}"}
    survival, greenwood, points, waiting = 1.0, 0.0, [], 0.0
    for b, (risk, died) in enumerate(zip(at_risk, events, strict=True)):
        if risk < floor:
            break
        survival *= 1 - died / risk
        greenwood += died / (risk * (risk - died)) if risk > died else 0.0
        waiting += died
        if waiting < floor:
            continue
        waiting = 0.0
        point = {"time": (b + 1) * width, "survival": max(survival, 0.0), "at_risk": float(np.rint(risk))}
        if not noise and 0 < survival < 1:
            from scipy.special import ndtri  # heavy: loaded where it is used

            half = float(ndtri(0.975)) * np.sqrt(greenwood) / abs(np.log(survival))
            point |= {"low": float(survival ** np.exp(half)), "high": float(survival ** np.exp(-half))}
        points.append(point)
    return {"points": points}


def faults(study: Study, plan: SurvivalPlan, earlier: Mapping[str, Any]) -> Iterator[str]:
    """What a plan says against its study."""
    if study.phenotype.kind != "time":
        yield f"analysis {plan.name}: survival of a {study.phenotype.kind} phenotype; a time with its event was expected"
    if plan.mode == "private" and plan.model in ("cox", "cox_by_site"):
        yield f"analysis {plan.name}: a Cox record has no bound on what it moves; model hazard is the private one"
    if plan.by_subgroup and (study.cohort.subgroup is None or plan.model != "kaplan_meier"):
        yield f"analysis {plan.name}: by_subgroup is for Kaplan-Meier curves of a study that names a subgroup"
    if plan.model != "kaplan_meier" and not chosen(study, plan.features):
        yield f"analysis {plan.name}: `features: table` needs a score or a covariate"
    if min(plan.clip, plan.record_norm, plan.kappa, plan.step_w, plan.step_b) <= 0:
        yield f"analysis {plan.name}: clip, record_norm, kappa, step_w and step_b are above 0"


SURVIVAL = Survival()
