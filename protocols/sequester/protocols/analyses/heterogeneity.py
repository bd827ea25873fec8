"""How far the hospitals' own estimates lie apart: Cochran's Q and I2 of named terms, without any one hospital's estimate.

Each hospital fits the model to its own patients; with b its estimate and w = 1 / standard error squared, the sums of w,
w b and w b^2 over hospitals give Q = sum w (b - mean)^2 and the mean itself (Cochran 1954; Higgins and Thompson 2002). A
hospital's own b and w stay there. A term is a covariate or score (log odds or outcome per standardised unit) in the model
of all of them, or a variant (per copy, a missing call is the public mean) added to that model alone. A hospital that
cannot estimate a term (no cases, separated, constant) adds nothing to it; with fewer than three that can, nothing is printed,
but the exchange has seen the sums, which are then those of one or two. Exact only, under its own line of consent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from sequester.protocols.analyses import exact_glm, null_model
from sequester.protocols.analyses.analysis import Broadcast, Finished, Layout, Next, State, Sums
from sequester.protocols.analyses.cohort import Cohort, Result, chosen
from sequester.protocols.analyses.newton import inverse
from sequester.protocols.analyses.null_model import CovariatePlan

if TYPE_CHECKING:
    from sequester.protocols.study import Study

Vector = NDArray[np.float64]
LOCAL_STEPS = 50
LEAST_HOSPITALS = 3  # of two, one that takes its own numbers off has the other's
LEAST_PEOPLE = 5.0  # people of the rarer outcome for each column of a fit
LEAST_CARRIERS = 50.0  # of a term among them; below it Q rejects too rarely (measured in the oracle test)


class HeterogeneityPlan(CovariatePlan):
    """`terms` are named covariates, scores or variants; `of` an earlier scan, whose `top` smallest p values are added."""

    kind: Literal["heterogeneity"] = "heterogeneity"
    terms: tuple[str, ...] = ()
    of: str | None = None
    top: int = Field(default=10, ge=1, le=1000)


class Heterogeneity:
    """See the module."""

    kind = "heterogeneity"

    def rounds(self, plan: HeterogeneityPlan, study: Study) -> int:
        return 1

    def layout(self, plan: HeterogeneityPlan, study: Study, step: int) -> Layout:
        m = len(plan.terms) + _top(plan, study)
        return Layout((("hospitals", (m,)), ("w", (m,)), ("wb", (m,)), ("wbb", (m,))))

    def sensitivity(self, plan: HeterogeneityPlan, study: Study) -> float:
        return 64.0 * null_model.columns(plan, study)  # head-room only: private mode is refused

    def is_iterative(self, plan: HeterogeneityPlan, study: Study) -> bool:
        return plan.of is not None or plan.components is not None

    def start(self, plan: HeterogeneityPlan, study: Study, earlier: Mapping[str, Finished]) -> Next:
        state = null_model.start(plan, study, earlier)
        if plan.of is not None:
            z = np.abs(np.asarray(earlier[plan.of].state.get("z", np.zeros(len(study.variants)))))
            state["places"] = np.argsort(-z, kind="stable")[: _top(plan, study)].astype(np.int64)
        sent = null_model.to_all(state)
        return Next(state, sent | ({"places": state["places"]} if "places" in state else {}))

    def contribution(
        self, plan: HeterogeneityPlan, study: Study, cohort: Cohort, broadcast: Broadcast, step: int
    ) -> Sums:
        x, y, _ = null_model.design(plan, study, cohort, broadcast)
        names = [f.name for f in chosen(study, "table")]
        place = {v.id: j for j, v in enumerate(study.variants)}
        asked: list[tuple[str, int]] = [
            ("column", 1 + names.index(t)) if t in names else ("variant", place[t]) for t in plan.terms
        ]
        if plan.of is not None:
            top = np.clip(np.asarray(broadcast["places"], dtype=np.int64), 0, len(place) - 1)
            asked += [("variant", int(j)) for j in top]
        b, w = np.zeros(len(asked)), np.zeros(len(asked))
        if any(kind == "column" for kind, _ in asked):
            beta, weight = local_fit(study, x, y)
        variants = [j for kind, j in asked if kind == "variant"]
        g = cohort.some(plan.part, variants) - np.array([2 * float(study.variants[j].frequency) for j in variants])
        g[np.isnan(g)] = 0.0
        columns = iter(g.T)
        for k, (kind, j) in enumerate(asked):
            if kind == "variant":
                beta, weight = local_fit(study, np.column_stack([x, next(columns)]), y)
                j = -1
            b[k], w[k] = beta[j], weight[j]
        # what would not fit the ring is left out, as is what cannot be estimated: no refusal depends on patients
        w[(w * np.maximum(1.0, b * b)) >= 2.0 ** (50 - study.aggregation.fraction_bits)] = 0.0
        return {"hospitals": (w > 0).astype(np.float64), "w": w, "wb": w * b, "wbb": w * b * b}

    def combine(self, plan: HeterogeneityPlan, study: Study, state: State, sums: Sums, step: int) -> Next | Finished:
        top = [study.variants[int(j)].id for j in state["places"]] if "places" in state else []
        columns = zip(*(sums[name] for name in ("hospitals", "w", "wb", "wbb")), strict=True)
        rows = [
            {"term": term} | cochran(*(float(v) for v in four))
            for term, four in zip([*plan.terms, *top], columns, strict=True)
        ]
        return Finished({"terms": rows}, {})


def local_fit(study: Study, x: Vector, y: Vector) -> tuple[Vector, Vector]:
    """(coefficients, 1 / squared standard errors) of one hospital's own fit; weight 0 where there is no estimate."""
    family, d = null_model.family(study), x.shape[1]
    nothing = np.zeros(d), np.zeros(d)
    rarer = min(float(y.sum()), len(y) - float(y.sum())) if family == "logistic" else len(y) - d
    if rarer < LEAST_PEOPLE * d:
        return nothing
    state = exact_glm.fresh(np.zeros(d), False) | {"people": np.array([float(len(y)), y.sum(), y @ y])}
    upper = np.triu_indices(d)
    for _ in range(LOCAL_STEPS):
        z = np.clip(np.nan_to_num(x @ state["beta"]), -1e6, 1e6)
        information, score, value = exact_glm.moments(family, x, y, z)
        sums = {"information": information[upper], "score": score, "log_likelihood": np.array([value])}
        state = exact_glm.progressed(state, sums, family, "never", study, last=False)
        if state["done"][0]:
            break
    kept = np.asarray(state["kept"], dtype=bool)
    if not state["converged"][0] or state["gone"].any():
        return nothing
    variance = np.diag(inverse(state["information"], kept)).copy()
    if family == "linear":
        variance *= max(-2 * float(state["best"][0]), 0.0) / max(len(y) - float(kept.sum()), 1.0)
    usable = kept & (variance > 1e-300)
    if family == "logistic":
        # people who carry a column's variance; of a rare allele the carriers, of a normal column a third of all
        squares = np.square(x - x.mean(axis=0))
        carriers = squares.sum(axis=0) ** 2 / np.maximum(np.square(squares).sum(axis=0), 1e-300)
        usable &= carriers * rarer / len(y) >= LEAST_CARRIERS
    return np.asarray(state["beta"]), np.where(usable, 1 / np.where(usable, variance, 1.0), 0.0)


def cochran(hospitals: float, w: float, wb: float, wbb: float) -> Result:
    """Q, its p on hospitals - 1 degrees of freedom, I2 in 0..1, and the mean of the hospitals' estimates."""
    from scipy.special import gammaincc  # heavy: loaded where it is used

    k = int(round(hospitals))
    if k < LEAST_HOSPITALS or w <= 0:
        return {"hospitals": k, "not_tested": f"fewer than {LEAST_HOSPITALS} hospitals can estimate it"}
    q = max(wbb - wb * wb / w, 0.0)
    return {
        "hospitals": k, "effect": wb / w, "se": w**-0.5, "q": q, "df": k - 1,
        "p": float(gammaincc((k - 1) / 2, q / 2)), "i2": max(0.0, 1 - (k - 1) / q) if q > 0 else 0.0,
    }  # fmt: skip


def consent(plan: HeterogeneityPlan, study: Study) -> str:
    """The line an approver reads: what this opens about single hospitals, by name."""
    what = [*plan.terms, *([f"the {_top(plan, study)} strongest variants of {plan.of}"] if plan.of else [])]
    return (
        f"It tells how far the hospitals' own estimates of {', '.join(what)} lie apart (heterogeneity). Three sums of a term "
        "are opened, over the hospitals that can estimate it: where only one can, they are its own estimate, and where two "
        f"can, each learns the other's. Of all {len(study.sites)}, one that takes its own numbers off learns about the rest "
        "together"
        + ("; they are so few that with their sizes it can solve for each one's." if len(study.sites) <= 4 else ".")
    )


def _top(plan: HeterogeneityPlan, study: Study) -> int:
    return 0 if plan.of is None else min(plan.top, len(study.variants))


def faults(study: Study, plan: HeterogeneityPlan, earlier: Mapping[str, Any]) -> Iterator[str]:
    """What a plan says against its study."""
    if plan.mode == "private":
        yield (
            f"analysis {plan.name}: heterogeneity is exact only, under a consent that names it: noise that hides one "
            "hospital's patients hides its estimate"
        )
    yield from null_model.covariate_faults(study, plan, earlier)
    known = {*(f.name for f in chosen(study, "table")), *(v.id for v in study.variants)}
    for term in plan.terms:
        if term not in known:
            yield f"analysis {plan.name}: `{term}` is no covariate, score or variant of the study"
    if len(set(plan.terms)) < len(plan.terms):
        yield f"analysis {plan.name}: a term is named twice"
    if not plan.terms and plan.of is None:
        yield f"analysis {plan.name}: name `terms`, or the scan whose strongest variants are meant (`of`)"
    if plan.of is not None and getattr(earlier.get(plan.of), "kind", "") != "association":
        yield f"analysis {plan.name}: `{plan.of}` is no association scan before it"


HETEROGENEITY = Heterogeneity()
