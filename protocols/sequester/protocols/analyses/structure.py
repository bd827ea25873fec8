"""Ancestry: federated principal components by orthogonal iteration, and projection on public loadings.

Projection is the default and opens nothing: a component is a weighted sum of dosages, so `projection` writes it as a
score of the study. Federated components are exact only, one patient moves Z'ZQ by about V: summed are allele counts,
then Z'(ZQ) each iteration, then (ZQ)'(ZQ); Z is standardised by the pooled frequency, a missing call is 0
(spec/genomics.md, sections 6 and 7).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from sequester.protocols.analyses.analysis import Broadcast, Finished, Layout, Next, State, Sums
from sequester.protocols.analyses.cohort import Cohort, Part
from sequester.protocols.analyses.newton import symmetric
from sequester.protocols.analyses.plan import AnalysisPlan

if TYPE_CHECKING:
    from sequester.protocols.study import Score, Study, Variant

Vector = NDArray[np.float64]
EXACT_BITS = 53.0  # of an integer in a float64: what the codec takes (spec/secure-aggregation.md, section 8)


class StructurePlan(AnalysisPlan):
    """`seed` starts the iteration and is public: the same study gives the same components."""

    kind: Literal["structure"] = "structure"
    part: Part = "all"
    components: int = Field(default=10, ge=1, le=50)
    oversampling: int = Field(default=10, ge=0, le=50)
    iterations: int = Field(default=12, ge=1, le=100)
    seed: int = Field(default=1, ge=0, le=2**32 - 1)


class Structure:
    """See the module."""

    kind = "structure"

    def rounds(self, plan: StructurePlan, study: Study) -> int:
        return plan.iterations + 2

    def layout(self, plan: StructurePlan, study: Study, step: int) -> Layout:
        v, width = len(study.variants), self._width(plan, study)
        if step == 0:
            return Layout((("copies", (v,)), ("observed", (v,)), ("people", (1,))))
        if step <= plan.iterations:
            return Layout((("product", (v, width)),))
        return Layout((("square", (width * (width + 1) // 2,)),))

    def _width(self, plan: StructurePlan, study: Study) -> int:
        return min(plan.components + plan.oversampling, len(study.variants))

    def sensitivity(self, plan: StructurePlan, study: Study) -> float:
        return 4.0 * len(study.variants)  # head-room only, a patient's share of a square; private mode is refused

    def is_iterative(self, plan: StructurePlan, study: Study) -> bool:
        return True

    def start(self, plan: StructurePlan, study: Study, earlier: Mapping[str, Finished]) -> Next:
        return Next({}, {})

    def later(self, plan: StructurePlan, study: Study, step: int) -> list[Broadcast]:
        return [standardisation(study, self._width(plan, study))]

    def contribution(self, plan: StructurePlan, study: Study, cohort: Cohort, broadcast: Broadcast, step: int) -> Sums:
        if step == 0:
            return allele_counts(study, cohort, plan.part)
        components = projected(cohort, plan.part, broadcast)  # (patients, width)
        if step > plan.iterations:
            square = components.T @ components
            return {"square": square[np.triu_indices(len(square))]}
        product = np.zeros((len(study.variants), components.shape[1]))
        for first, z in standard(cohort, plan.part, broadcast):
            product[first : first + z.shape[1]] = z.T @ components
        return {"product": product}

    def combine(self, plan: StructurePlan, study: Study, state: State, sums: Sums, step: int) -> Next | Finished:
        width = self._width(plan, study)
        if step == 0:
            mean, scale = frequencies(sums)
            q = np.random.default_rng(plan.seed).standard_normal((len(mean), width)) * (scale > 0)[:, None]
            loadings = np.linalg.qr(q)[0]
            new: State = {"mean": mean, "scale": scale, "loadings": loadings, "people": sums["people"]}
        elif step <= plan.iterations:
            new = {**state, "loadings": np.linalg.qr(sums["product"])[0]}
        else:
            return self._rotated(plan, study, state, symmetric(sums["square"], width))
        return Next(new, {name: new[name] for name in ("mean", "scale", "loadings")})

    def _rotated(self, plan: StructurePlan, study: Study, state: State, square: Vector) -> Finished:
        values, rotation = np.linalg.eigh(square)
        order = np.argsort(values)[::-1][: min(plan.components, len(values))]
        loadings = state["loadings"] @ rotation[:, order]
        largest = np.abs(loadings).argmax(axis=0)
        loadings = loadings * np.sign(loadings[largest, np.arange(len(order))])
        used = float((state["scale"] > 0).sum())
        values = np.maximum(values[order], 1e-300)
        result = {
            "eigenvalues": [float(v) for v in values / max(used, 1.0)],  # of Z Z' / V, as PLINK prints them
            "variants": int(used),
            "left_out": [v.id for v, s in zip(study.variants, state["scale"], strict=True) if s == 0],
            "loadings": {f"PC{k + 1}": [float(x) for x in loadings[:, k]] for k in range(len(order))},
        }
        # components of unit variance, for later analyses of the study
        scaled = loadings * np.sqrt(float(state["people"][0]) / values)
        return Finished(result, {"mean": state["mean"], "scale": state["scale"], "loadings": scaled})


def standardisation(study: Study, width: int) -> State:
    """Zeros in place of means, scales and `width` loadings of the study's variants."""
    v = len(study.variants)
    return {"mean": np.zeros(v), "scale": np.zeros(v), "loadings": np.zeros((v, width))}


def allele_counts(study: Study, cohort: Cohort, part: Part) -> Sums:
    """Copies and called patients of each variant, and patients."""
    v = len(study.variants)
    copies, observed = np.zeros(v), np.zeros(v)
    for block in cohort.dosages(part):
        at = slice(block.first, block.first + block.copies.shape[1])
        total = block.copies.sum(axis=0)
        called = np.full(len(total), float(len(block.copies)))
        holes = np.flatnonzero(np.isnan(total))  # NaN spreads: only these variants have missing calls
        total[holes] = np.nansum(block.copies[:, holes], axis=0)
        called[holes] = (~np.isnan(block.copies[:, holes])).sum(axis=0)
        copies[at], observed[at] = total, called
    return {"copies": copies, "observed": observed, "people": np.array([float(len(cohort.columns(part).y))])}


def frequencies(sums: Mapping[str, Vector]) -> tuple[Vector, Vector]:
    """Mean copies and sqrt(2 f (1 - f)) of each variant; scale 0 where nobody varies or nobody is called."""
    observed = np.maximum(sums["observed"], 1.0)
    mean = sums["copies"] / observed
    f = mean / 2
    scale = np.sqrt(np.maximum(2 * f * (1 - f), 0.0))
    return mean, np.where((sums["observed"] > 0.5) & (scale > 1e-6), scale, 0.0)


def standard(cohort: Cohort, part: Part, broadcast: Mapping[str, NDArray[Any]]) -> Iterator[tuple[int, Vector]]:
    """(first, Z) in blocks of variants: standardised by the broadcast's mean and scale, missing 0, left out 0."""
    mean, scale = np.asarray(broadcast["mean"]), np.asarray(broadcast["scale"])
    inverse = np.where(scale > 0, 1.0 / np.maximum(scale, 1e-12), 0.0)
    for block in cohort.dosages(part):
        at = slice(block.first, block.first + block.copies.shape[1])
        z = (block.copies - mean[at]) * inverse[at]
        yield block.first, np.nan_to_num(z, nan=0.0, posinf=0.0, neginf=0.0)


def projected(cohort: Cohort, part: Part, broadcast: Mapping[str, NDArray[Any]]) -> Vector:
    """Z times the broadcast's loadings, (patients, components)."""
    loadings = np.asarray(broadcast["loadings"], dtype=np.float64)
    out = np.zeros((len(cohort.columns(part).y), loadings.shape[1]))
    for first, z in standard(cohort, part, broadcast):
        out += z @ loadings[first : first + z.shape[1]]
    return out


def projection(variants: Sequence[Variant], loadings: Vector, deviations: Sequence[float]) -> tuple[Score, ...]:
    """Public loadings (variants, components) as scores of a study, by the study's public frequencies.

    PC = sum of L (g - 2 f) / sqrt(2 f (1 - f)); `deviations` are the components' standard deviations in the reference,
    already multiplied by the shrinkage of projected components. Nothing leaves a hospital.
    """
    from sequester.protocols.study import Score  # the study knows analyses at import

    f = np.array([float(v.frequency) for v in variants])
    weights = loadings / np.sqrt(2 * f * (1 - f))[:, None]

    def decimal(value: float) -> Decimal:
        return Decimal(f"{value:.9f}")

    return tuple(
        Score(
            name=f"PC{k + 1}",
            weights=tuple((v.id, decimal(w)) for v, w in zip(variants, weights[:, k], strict=True)),
            mean=decimal(float(2 * f @ weights[:, k])),
            sd=decimal(sd),
        )
        for k, sd in enumerate(deviations)
    )


def faults(study: Study, plan: StructurePlan, earlier: Mapping[str, Any]) -> Iterator[str]:
    """What a plan says against its study."""
    if plan.mode == "private":
        yield (
            f"analysis {plan.name}: federated components are exact only, one patient moves them by the number of variants; "
            "project on public loadings instead, as scores of the study"
        )
    # squared components add up to people times variants over all components together: each is below that
    widest = study.n_max * len(study.variants)
    most = int(np.floor(EXACT_BITS - np.log2(max(widest, 1))))
    if plan.mode == "exact" and study.aggregation.fraction_bits > most:
        yield (
            f"analysis {plan.name}: components of up to {study.n_max} people and {len(study.variants)} variants leave room for "
            f"{most} fraction_bits, found {study.aggregation.fraction_bits}"
        )
    if plan.components > len(study.variants):
        yield f"analysis {plan.name}: {plan.components} components of {len(study.variants)} variants"


STRUCTURE = Structure()
