"""A risk score in one round: the sum of (y - K) x at weights zero, then shrinkage at the exchange, free to repeat.

The one route to private weights of a thousand variants (spec/privacy.md, section 5): a patient's term is clipped to C, so
that is the sensitivity; spike-and-slab weights follow by EM from the opened sums alone. Broadcast-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from sequester.protocols.analyses.analysis import Broadcast, Finished, Layout, Next, State, Sums
from sequester.protocols.analyses.cohort import Cohort, Part
from sequester.protocols.analyses.counts import noise_sd
from sequester.protocols.analyses.plan import AnalysisPlan, Number
from sequester.protocols.analyses.weights import model, private_rows

if TYPE_CHECKING:
    from sequester.protocols.study import Study

Vector = NDArray[np.float64]
EM_STEPS = 60


class PrsPlan(AnalysisPlan):
    """`prevalence` K is public. `shrinkage` none keeps the marginal weights."""

    kind: Literal["prs"] = "prs"
    clip: Number = Decimal("0.6")
    record_norm: Number = Decimal("1")
    prevalence: Number = Decimal("0.5")
    shrinkage: Literal["spike_and_slab", "none"] = "spike_and_slab"
    part: Part = "train"


class Prs:
    """See the module."""

    kind = "prs"

    def rounds(self, plan: PrsPlan, study: Study) -> int:
        return 1

    def layout(self, plan: PrsPlan, study: Study, step: int) -> Layout:
        return Layout((("score", (len(study.features()),)),))

    def sensitivity(self, plan: PrsPlan, study: Study) -> float:
        return float(plan.clip) if plan.mode == "private" else 64.0  # exact: head-room only

    def is_iterative(self, plan: PrsPlan, study: Study) -> bool:
        return False

    def start(self, plan: PrsPlan, study: Study, earlier: Mapping[str, Finished]) -> Next:
        return Next({}, {})

    def contribution(self, plan: PrsPlan, study: Study, cohort: Cohort, broadcast: Broadcast, step: int) -> Sums:
        total = np.zeros(len(study.features()))
        k, clip = float(plan.prevalence), float(plan.clip)
        for block in cohort.blocks(plan.part):
            if plan.mode == "exact":
                total += block.x.T @ (block.y - k)
                continue
            x, _ = private_rows(block.x, True, float(plan.record_norm))
            r = np.clip(block.y, 0.0, 1.0) - k
            norms = np.abs(r) * np.sqrt(np.einsum("ij,ij->i", x, x))
            total += x.T @ (r * np.minimum(1.0, clip / np.maximum(norms, 1e-300)))
        return {"score": total}

    def combine(self, plan: PrsPlan, study: Study, state: State, sums: Sums, step: int) -> Next | Finished:
        z, k, p = sums["score"], float(plan.prevalence), len(study.features())
        noise = noise_sd(plan, study)
        w, share = shrunk(z, noise**2) if plan.shrinkage == "spike_and_slab" else (z, 1.0)
        # private records were divided by sqrt(p): once in the sum, once where the weights meet a patient again
        scale = (p**0.5 if plan.mode == "private" else 1.0) / (study.n0 * k * (1 - k))
        done = model(
            study, w * scale, np.array([np.log(k / (1 - k))]), share_with_effect=share, shrinkage=plan.shrinkage
        )
        for row, value in zip(done.result["weights"], z, strict=True):
            row["score"] = float(value)
        return Finished(done.result | ({"noise_sd": noise} if plan.mode == "private" else {}), done.state)


def shrunk(z: Vector, noise_variance: float) -> tuple[Vector, float]:
    """Posterior means of effects under pi N(0, v + tau2) + (1 - pi) N(0, v), and pi; all estimated from z."""
    v = max((float(np.median(np.abs(z))) / 0.6745) ** 2, noise_variance, 1e-300)
    pi = 0.02
    tau2 = max(float(z.var()) - v, 0.05 * v) / pi
    rho = np.zeros(len(z))
    for _ in range(EM_STEPS):
        slab = np.log(pi) - 0.5 * np.log(v + tau2) - z * z / (2 * (v + tau2))
        spike = np.log1p(-pi) - 0.5 * np.log(v) - z * z / (2 * v)
        rho = 1.0 / (1.0 + np.exp(np.clip(spike - slab, -700, 700)))
        pi = float(np.clip(rho.mean(), 1e-4, 0.9))
        tau2 = max(float(rho @ (z * z)) / max(float(rho.sum()), 1e-300) - v, 0.02 * v)
    return rho * z * tau2 / (v + tau2), pi


def faults(study: Study, plan: PrsPlan, earlier: Mapping[str, Any]) -> Iterator[str]:
    """What a plan says against its study."""
    if study.phenotype.kind != "binary":
        yield f"analysis {plan.name}: a one-shot score of a {study.phenotype.kind} phenotype; binary was expected"
    if not 0 < plan.prevalence < 1 or plan.clip <= 0 or plan.record_norm <= 0:
        yield f"analysis {plan.name}: prevalence is a fraction, clip and record_norm are above 0"


PRS = Prs()
