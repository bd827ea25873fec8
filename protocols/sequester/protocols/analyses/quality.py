"""Genotype counts of the study's variants over all hospitals: call rate, frequency, Hardy-Weinberg, and who passes.

Summed: for each variant (and group) patients with 0, 1, 2 copies and without a call; exact mode keeps hospitals that
do not carry the variant apart. One patient is one cell of each variant: sensitivity sqrt(V) in private mode, for a short
declared list. What leaves is the list of variants that pass and the counts by reason; frequencies only where the study
says `frequencies` (spec/genomics.md, sections 4 and 9: frequency vectors tell who took part).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from sequester.protocols.analyses.analysis import Broadcast, Finished, Layout, Next, State, Sums
from sequester.protocols.analyses.cohort import Cohort, Part, Result
from sequester.protocols.analyses.counts import noise_sd
from sequester.protocols.analyses.plan import AnalysisPlan, Number

if TYPE_CHECKING:
    from sequester.protocols.study import Study

Vector = NDArray[np.float64]
MAX_PRIVATE_VARIANTS = 2000
HARD_CALL = 0.1  # a dosage further than this from a whole number of copies is no call, as in PLINK


class QualityPlan(AnalysisPlan):
    """Thresholds of spec/genomics.md, section 4. `split` makes groups: Hardy-Weinberg is tested in each, of a binary

    outcome in controls only; the other rules read all patients together.
    """

    kind: Literal["quality"] = "quality"
    part: Part = "all"
    split: Literal["none", "outcome", "subgroup"] = "none"
    frequencies: bool = False
    call_rate: Number = Decimal("0.95")
    minor_frequency: Number = Decimal("0.01")
    minor_count: Number = Decimal("20")
    hardy_weinberg: Number = Decimal("0.000001")


class Quality:
    """See the module."""

    kind = "quality"

    def rounds(self, plan: QualityPlan, study: Study) -> int:
        return 1

    def layout(self, plan: QualityPlan, study: Study, step: int) -> Layout:
        kinds = 5 if plan.mode == "exact" else 4
        return Layout((("genotypes", (len(groups(plan, study)), len(study.variants), kinds)),))

    def sensitivity(self, plan: QualityPlan, study: Study) -> float:
        return float(np.sqrt(len(study.variants)))

    def is_iterative(self, plan: QualityPlan, study: Study) -> bool:
        return False

    def start(self, plan: QualityPlan, study: Study, earlier: Mapping[str, Finished]) -> Next:
        return Next({}, {})

    def contribution(self, plan: QualityPlan, study: Study, cohort: Cohort, broadcast: Broadcast, step: int) -> Sums:
        table = np.zeros(self.layout(plan, study, step).fields[0][1])
        columns = cohort.columns(plan.part)
        group = np.zeros(len(columns.y), dtype=np.int64)
        if plan.split == "outcome":
            group = (columns.y > 0.5).astype(np.int64)
        elif plan.split == "subgroup":
            group = columns.strata
        member = [group == g for g in range(len(table))]
        for block in cohort.dosages(plan.part):
            nearest = np.rint(block.copies)
            called = np.abs(block.copies - nearest) <= HARD_CALL + 1e-12  # False where it is missing
            at = slice(block.first, block.first + block.copies.shape[1])
            for copies in range(3):
                hit = called & (nearest == copies)
                for g, rows in enumerate(member):
                    table[g, at, copies] = hit[rows].sum(axis=0)
            absent = plan.mode == "exact" and ~called.any(axis=0)
            for g, rows in enumerate(member):
                uncalled = (~called[rows]).sum(axis=0).astype(np.float64)
                table[g, at, 3] = np.where(absent, 0.0, uncalled)
                if plan.mode == "exact":
                    table[g, at, 4] = np.where(absent, uncalled, 0.0)
        return {"genotypes": table}

    def combine(self, plan: QualityPlan, study: Study, state: State, sums: Sums, step: int) -> Next | Finished:
        table = np.maximum(sums["genotypes"], 0.0) if plan.mode == "private" else np.rint(sums["genotypes"])
        together = table.sum(axis=0)  # (variants, kinds)
        homozygous, het, other, missing = together[:, :4].T
        called = homozygous + het + other
        alleles = 2 * called
        minor = np.minimum(het + 2 * other, 2 * homozygous + het)
        with np.errstate(invalid="ignore", divide="ignore"):
            rate, frequency = called / (called + missing), (het + 2 * other) / alleles
        reasons = {
            "absent": called + missing <= 0,
            "call_rate": rate < float(plan.call_rate),
            "minor_frequency": np.minimum(frequency, 1 - frequency) < float(plan.minor_frequency),
        }
        tested = table[:1] if plan.split == "outcome" else table
        p = np.ones((len(tested), len(together)))
        if plan.mode == "exact":
            reasons["minor_count"] = minor < float(plan.minor_count)
            p = np.array([[hardy_weinberg(*(int(n) for n in row[:3])) for row in group] for group in tested])
            reasons["hardy_weinberg"] = (p < float(plan.hardy_weinberg)).any(axis=0)
        failed = np.zeros(len(together), dtype=bool)
        counts = {}
        for name, hit in reasons.items():
            counts[name] = int((hit & ~failed).sum())  # the first reason counts
            failed |= hit
        ids = [v.id for v in study.variants]
        result: Result = {"variants": len(ids), "passing": [i for i, bad in zip(ids, failed, strict=True) if not bad]}
        result["failed"] = counts
        if plan.frequencies:
            result["frequencies"] = [
                {
                    "id": i,
                    "effect_frequency": None if np.isnan(f) else float(f),
                    "called": float(n),
                    "missing": float(m),
                }
                for i, f, n, m in zip(ids, frequency, called, missing, strict=True)
            ]
            if plan.mode == "exact":
                for row, values in zip(result["frequencies"], p.T, strict=True):
                    row["hardy_weinberg_p"] = float(values.min())
            else:
                result["noise_sd"] = noise_sd(plan, study)
        return Finished(result, {"passing": (~failed).astype(np.uint8)})


def groups(plan: QualityPlan, study: Study) -> tuple[str, ...]:
    """Names of the groups that genotypes are counted in."""
    if plan.split == "outcome":
        return ("controls", "cases")
    return (*study.cohort.subgroup_values, "other") if plan.split == "subgroup" else ("all",)


def hardy_weinberg(first: int, het: int, second: int) -> float:
    """The exact p value of Wigginton et al. 2005: all heterozygote counts at most as likely as the one seen.

    >>> round(hardy_weinberg(14, 57, 50), 6)
    0.84228
    """
    from scipy.special import gammaln

    n = first + het + second
    rare = 2 * min(first, second) + het
    if n == 0 or rare == 0:
        return 1.0
    possible = np.arange(rare % 2, rare + 1, 2)  # heterozygotes with these alleles
    homozygous = (rare - possible) / 2
    log = (
        possible * np.log(2.0)
        - gammaln(homozygous + 1)
        - gammaln(possible + 1)
        - gammaln(n - possible - homozygous + 1)
    )
    weight = np.exp(log - log.max())
    seen = weight[(het - rare % 2) // 2]
    return float(min(1.0, weight[weight <= seen * (1 + 1e-9)].sum() / weight.sum()))


def faults(study: Study, plan: QualityPlan, earlier: Mapping[str, Any]) -> Iterator[str]:
    """What a plan says against its study."""
    if not study.variants:
        yield f"analysis {plan.name}: quality of no variants"
    if plan.split == "outcome" and study.phenotype.kind != "binary":
        yield f"analysis {plan.name}: split by outcome needs a binary phenotype"
    if plan.split == "subgroup" and study.cohort.subgroup is None:
        yield f"analysis {plan.name}: split by subgroup, and the study names none"
    if plan.mode == "private" and len(study.variants) > MAX_PRIVATE_VARIANTS:
        yield (
            f"analysis {plan.name}: private counts of {len(study.variants)} variants are noise; at most "
            f"{MAX_PRIVATE_VARIANTS} were expected"
        )


QUALITY = Quality()
