"""Quality of variants and people: counts first, rules on the counts. Every number has PLINK 2's as its second opinion.

Rules about one person's record remove the person and are safe in both modes. Rules about variants read the whole cohort:
they only mark, and change no feature (spec/genomics.md, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sequester.client.compute.genome.plink import MISSING
from sequester.protocols.analyses.quality import hardy_weinberg


@dataclass(frozen=True, slots=True)
class Limits:
    """Thresholds; the defaults are those of spec/genomics.md, section 4."""

    sample_call_rate: float = 0.97
    heterozygosity: float = 0.2  # of |F| against the frequencies of the person's own ancestry
    variant_call_rate: float = 0.95
    minor_frequency: float = 0.01
    minor_count: int = 20
    hardy_weinberg: float = 1e-6
    differential_missingness: float = 1e-5
    duplicate: float = 0.354  # KING-robust kinship
    second_degree: float = 0.0884
    marked_share: float = 0.05  # of variants, from which an ingest stops


LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class VariantCounts:
    """int64 (variants,) each: people with 0, 1 and 2 copies of the counted allele, and without a call."""

    none: NDArray[np.int64]
    one: NDArray[np.int64]
    two: NDArray[np.int64]
    missing: NDArray[np.int64]

    @property
    def call_rate(self) -> NDArray[np.float64]:
        """Called over all people."""
        called = self.none + self.one + self.two
        return np.asarray(called / np.maximum(called + self.missing, 1), dtype=np.float64)

    @property
    def allele_count(self) -> NDArray[np.int64]:
        """Copies of the counted allele."""
        return self.one + 2 * self.two

    @property
    def frequency(self) -> NDArray[np.float64]:
        """Of the counted allele, NaN where nobody was called."""
        called = (self.none + self.one + self.two).astype(np.float64)
        out = np.full(len(called), np.nan)
        np.divide(self.allele_count, 2 * called, out=out, where=called > 0)
        return out


def variant_counts(genotypes: NDArray[np.int8]) -> VariantCounts:
    """Counts of one block, int8 (variants, people)."""
    cells = [np.count_nonzero(genotypes == value, axis=1).astype(np.int64) for value in (0, 1, 2, MISSING)]
    return VariantCounts(*cells)


def joined(parts: list[VariantCounts]) -> VariantCounts:
    """The counts of blocks, one after another."""
    return VariantCounts(*(np.concatenate([getattr(p, f) for p in parts]) for f in ("none", "one", "two", "missing")))


def fisher(a: int, b: int, c: int, d: int) -> float:
    """Exact two-sided p of a 2 x 2 table, 0..1: tables as likely as the one observed, or less (Fisher 1922).

    >>> round(fisher(8, 2, 1, 5), 6)
    0.034965
    """
    from scipy.special import gammaln

    row, column, total = a + b, a + c, a + b + c + d
    x = np.arange(max(0, column - (c + d)), min(row, column) + 1)
    logs = -(gammaln(x + 1) + gammaln(row - x + 1) + gammaln(column - x + 1) + gammaln(total - row - column + x + 1))
    terms = np.exp(logs - logs.max())
    observed = terms[a - x[0]]
    return min(1.0, float(terms[terms <= observed * (1 + 1e-7)].sum() / terms.sum()))


def differential_missingness(cases: VariantCounts, controls: VariantCounts) -> NDArray[np.float64]:
    """Fisher's p for missing by case status, each variant; 1 where nothing is missing."""
    out = np.ones(len(cases.missing))
    for j in np.flatnonzero((cases.missing > 0) | (controls.missing > 0)).tolist():
        called = [int(c.none[j] + c.one[j] + c.two[j]) for c in (cases, controls)]
        out[j] = fisher(int(cases.missing[j]), called[0], int(controls.missing[j]), called[1])
    return out


def hardy_weinberg_each(counts: VariantCounts) -> NDArray[np.float64]:
    """The exact p of each variant."""
    cells = zip(counts.none.tolist(), counts.one.tolist(), counts.two.tolist(), strict=True)
    return np.array([hardy_weinberg(*c) for c in cells])


def inbreeding(genotypes: NDArray[np.int8], frequency: NDArray[np.float64]) -> NDArray[np.float64]:
    """F of each person, (observed - expected) / (called - expected) homozygotes; NaN where nothing is informative.

    genotypes: int8 (variants, people); frequency: (variants,) of either allele, or (variants, people) where each person
    has an ancestry of their own.
    """
    spread = 2 * frequency * (1 - frequency)
    spread = spread[:, None] if spread.ndim == 1 else spread
    called = (genotypes != MISSING) & (spread > 0)
    het_expected = np.where(called, spread, 0.0).sum(axis=0)
    het_observed = (called & (genotypes == 1)).sum(axis=0)
    ratio = np.full(len(het_observed), np.nan)
    np.divide(het_observed, het_expected, out=ratio, where=het_expected > 0)
    return 1 - ratio


def sex_of(f: NDArray[np.float64]) -> NDArray[np.int8]:
    """1 male (F on X above 0.8), 2 female (below 0.2), 0 not told (PLINK 1.9, --check-sex)."""
    return np.where(f > 0.8, 1, np.where(f < 0.2, 2, 0)).astype(np.int8)
