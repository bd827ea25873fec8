"""The quality of a store before it is put in place: who leaves, which variants are marked, and what could not be told.

Reads every genotype back once. Nothing here is about a study: the same checks, the same limits, for every data set.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequester.client.compute.genome import ancestry
from sequester.client.compute.genome.harmonise import oriented
from sequester.client.compute.genome.panel import POPULATIONS, Build, Panel
from sequester.client.compute.genome.plink import MISSING, PlinkFiles
from sequester.client.compute.genome.quality import (
    LIMITS,
    Limits,
    VariantCounts,
    differential_missingness,
    hardy_weinberg_each,
    inbreeding,
    joined,
    sex_of,
    variant_counts,
)
from sequester.client.compute.genome.relatives import relatives, to_drop
from sequester.client.compute.genome.variants import X
from sequester.client.ingest.isolated import Progress

# ends of the pseudo-autosomal regions of X (Genome Reference Consortium; UCSC for NCBI36)
_PAR: dict[Build, tuple[int, int]] = {
    "NCBI36": (2_709_520, 154_584_238),
    "GRCh37": (2_699_520, 154_931_044),
    "GRCh38": (2_781_479, 155_701_383),
}
# kinship and heterozygosity of a person want many variants that are not linked: on a short genome strangers share
# stretches as relatives do
_LEAST_VARIANTS, _MOST_VARIANTS, _LEAST_SPAN = 1000, 8192, 500_000_000
_X_VARIANTS, _GROUP = 50, 50


@dataclass(slots=True)
class Inspection:
    """Rows of people who leave, by reason; marks of variants, by rule; what was not done, and why."""

    removed: dict[str, list[int]] = field(default_factory=dict)
    marks: dict[str, NDArray[np.int64]] = field(default_factory=dict)  # entries of the store
    informed: dict[str, int] = field(default_factory=dict)  # rules that only say so
    not_done: dict[str, str] = field(default_factory=dict)
    ancestry: dict[str, int] = field(default_factory=dict)
    sexes: dict[str, int] = field(default_factory=dict)
    missing_rate: float = 0.0
    autosomal: int = 0
    kinship_variants: int = 0

    @property
    def marked(self) -> int:
        """Variants with any mark."""
        return len(np.unique(np.concatenate([np.zeros(0, np.int64), *self.marks.values()])))

    def as_json(self) -> dict[str, Any]:
        """Counts only: no row of a person, no name."""
        return {
            "people_removed": {reason: len(rows) for reason, rows in self.removed.items()},
            "variants_checked": self.autosomal,
            "variants_marked": {rule: len(entries) for rule, entries in self.marks.items()} | {"any": self.marked},
            "variants_informed": self.informed,
            "missing_rate": round(self.missing_rate, 6),
            "ancestry": self.ancestry,
            "sex": self.sexes,
            "kinship_variants": self.kinship_variants,
            "not_done": self.not_done,
        }


def inspect(
    store: PlinkFiles,
    panel: Panel,
    panel_row: NDArray[np.int64],
    build: Build,
    case: NDArray[np.int8] | None,
    progress: Progress,
    limits: Limits = LIMITS,
) -> Inspection:
    """Check a store; panel_row: (entries,) row of the panel or -1; case: (people,) 1, 0, or -9 unknown."""
    out = Inspection()
    n = len(store.samples)
    autosomal = np.flatnonzero((store.variants.code >= 1) & (store.variants.code <= 22))
    out.autosomal = len(autosomal)
    shares = _ancestry(store, panel, panel_row, out)
    controls = np.ones(n, bool) if case is None else case == 0
    group = _one_ancestry(shares, controls, out)
    missing = np.zeros(n, np.int64)
    parts: dict[str, list[VariantCounts]] = {"all": [], "group": [], "cases": [], "controls": []}
    for done, (_, block) in enumerate(store.blocks(autosomal)):
        progress("checking quality", done * 2048, len(autosomal))
        missing += np.count_nonzero(block == MISSING, axis=0)
        parts["all"].append(variant_counts(block))
        if group is not None:
            parts["group"].append(variant_counts(block[:, group]))
        if case is not None:
            parts["cases"].append(variant_counts(block[:, case == 1]))
            parts["controls"].append(variant_counts(block[:, case == 0]))
    if len(autosomal):
        _variants(out, autosomal, {name: joined(p) for name, p in parts.items() if p}, limits)
        out.missing_rate = float(missing.sum() / (n * len(autosomal)))
        _remove(out, "low_call_rate", np.flatnonzero(1 - missing / len(autosomal) < limits.sample_call_rate))
    _heterozygosity(store, panel, panel_row, build, shares, out, limits)
    _sex(store, build, out, progress)
    _relatives(store, panel_row, missing, out, limits, progress)
    return out


def _remove(out: Inspection, reason: str, rows: NDArray[np.int64]) -> None:
    gone = {row for rows_of in out.removed.values() for row in rows_of}
    out.removed[reason] = [int(row) for row in rows if int(row) not in gone]


def _variants(out: Inspection, entries: NDArray[np.int64], counts: dict[str, VariantCounts], limits: Limits) -> None:
    everybody = counts["all"]
    out.marks["low_call_rate"] = entries[everybody.call_rate < limits.variant_call_rate]
    if "group" in counts:
        out.marks["hardy_weinberg"] = entries[hardy_weinberg_each(counts["group"]) < limits.hardy_weinberg]
    if "cases" in counts:
        p = differential_missingness(counts["cases"], counts["controls"])
        out.marks["differential_missingness"] = entries[p < limits.differential_missingness]
    else:
        out.not_done["differential_missingness"] = "no case column was named"
    minor = np.minimum(everybody.frequency, 1 - everybody.frequency)
    copies = np.minimum(
        everybody.allele_count, 2 * (everybody.none + everybody.one + everybody.two) - everybody.allele_count
    )
    out.informed = {
        "monomorphic": int((copies == 0).sum()),
        f"minor_frequency_below_{limits.minor_frequency:g}": int((minor < limits.minor_frequency).sum()),
        f"minor_count_below_{limits.minor_count}": int((copies < limits.minor_count).sum()),
    }


def _panel_genotypes(
    store: PlinkFiles, panel: Panel, panel_row: NDArray[np.int64], rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """Panel rows that the store has among `rows`, and copies of their ALT, int8 (rows, people)."""
    entries = np.flatnonzero(np.isin(panel_row, rows))
    genotypes = np.ascontiguousarray(store.counts(entries.tolist()).T)
    for i, entry in enumerate(entries.tolist()):
        # the store is written with the panel's alleles; a panel row's ALT is what it counts
        genotypes[i] = oriented(genotypes[i], store.variants.counted[entry] != panel.alt[panel_row[entry]])
    return panel_row[entries], genotypes


def _ancestry(
    store: PlinkFiles, panel: Panel, panel_row: NDArray[np.int64], out: Inspection
) -> NDArray[np.float64] | None:
    here = np.full(panel.frequency.shape, np.nan, dtype=np.float32)
    present = panel_row[panel_row >= 0]
    here[present] = panel.frequency[present]
    rows, genotypes = _panel_genotypes(store, panel, panel_row, ancestry.informative(here))
    if len(rows) < ancestry.LEAST_VARIANTS:
        why = (
            f"{len(rows)} panel variants with public frequencies are in the files, {ancestry.LEAST_VARIANTS} are needed"
        )
        out.not_done["ancestry"] = why
        return None
    columns = ancestry.populations(panel.frequency)
    shares = ancestry.shares(genotypes, panel.frequency[np.ix_(rows, columns)])
    certain = shares.max(axis=1) >= ancestry.CERTAIN
    of = shares.argmax(axis=1)
    out.ancestry = {POPULATIONS[p]: int((certain & (of == k)).sum()) for k, p in enumerate(columns.tolist())}
    out.ancestry["uncertain"] = int((~certain).sum())
    return shares


def _one_ancestry(
    shares: NDArray[np.float64] | None, controls: NDArray[np.bool_], out: Inspection
) -> NDArray[np.bool_] | None:
    """The controls of the largest ancestry group: proportions never hold across groups."""
    if shares is None:
        out.not_done["hardy_weinberg"] = "ancestry could not be told, and the test holds within one ancestry only"
        return None
    member = (shares >= ancestry.CERTAIN) & controls[:, None]
    largest: NDArray[np.bool_] = member[:, int(member.sum(axis=0).argmax())]
    if int(largest.sum()) < _GROUP:
        out.not_done["hardy_weinberg"] = f"no ancestry has {_GROUP} controls"
        return None
    return largest


def _heterozygosity(
    store: PlinkFiles,
    panel: Panel,
    panel_row: NDArray[np.int64],
    build: Build,
    shares: NDArray[np.float64] | None,
    out: Inspection,
    limits: Limits,
) -> None:
    if shares is None:
        out.not_done["heterozygosity"] = out.not_done["ancestry"]
        return
    held = panel.frequency[:, ancestry.populations(panel.frequency)]
    known = np.flatnonzero(~np.isnan(held).any(axis=1))
    chosen = _evenly(np.intersect1d(known, panel_row), _MOST_VARIANTS)
    if why := _too_little(panel.code[chosen], panel.position[build][chosen]):
        out.not_done["heterozygosity"] = why
        return
    rows, genotypes = _panel_genotypes(store, panel, panel_row, chosen)
    f = inbreeding(genotypes, held[rows].astype(np.float64) @ shares.T)
    _remove(out, "heterozygosity", np.flatnonzero(np.abs(f) > limits.heterozygosity))


def _sex(store: PlinkFiles, build: Build, out: Inspection, progress: Progress) -> None:
    start, end = _PAR[build]
    position = store.variants.position
    rows = np.flatnonzero((store.variants.code == X) & (position > start) & (position < end))
    if len(rows) < _X_VARIANTS:
        out.not_done["sex"] = (
            f"{len(rows)} variants of chromosome X outside its ends are kept, {_X_VARIANTS} are needed"
        )
        return
    progress("checking sex", 0, 1)
    genotypes = np.ascontiguousarray(store.counts(_evenly(rows, _MOST_VARIANTS).tolist()).T)
    told = sex_of(inbreeding(genotypes, np.nan_to_num(variant_counts(genotypes).frequency)))
    mismatch = (told > 0) & (store.sex > 0) & (told != store.sex)
    out.sexes = {
        "male": int((told == 1).sum()), "female": int((told == 2).sum()), "not_told": int((told == 0).sum()),
        "not_recorded": int((store.sex == 0).sum()),
    }  # fmt: skip
    if (store.sex == 0).all():
        out.not_done["sex"] = "the files record nobody's sex"
    _remove(out, "sex_mismatch", np.flatnonzero(mismatch))


def _relatives(
    store: PlinkFiles,
    panel_row: NDArray[np.int64],
    missing: NDArray[np.int64],
    out: Inspection,
    limits: Limits,
    progress: Progress,
) -> None:
    entries = np.flatnonzero(panel_row >= 0)
    if why := _too_little(store.variants.code[entries], store.variants.position[entries]):
        out.not_done["relatives"] = why
        return
    progress("looking for relatives", 0, 1)
    entries = _evenly(entries, _MOST_VARIANTS)
    out.kinship_variants = len(entries)
    gone = {row for rows in out.removed.values() for row in rows}
    stay = np.array([i for i in range(len(store.samples)) if i not in gone], dtype=np.int64)
    genotypes = np.ascontiguousarray(store.counts(entries.tolist()).T)[:, stay]
    dropped = to_drop(relatives(genotypes, limits.second_degree), missing[stay])
    for reason, near in (("duplicate", True), ("relative", False)):
        rows = [int(stay[row]) for row, kinship in dropped.items() if (kinship > limits.duplicate) == near]
        _remove(out, reason, np.array(sorted(rows), dtype=np.int64))


def _too_little(code: NDArray[np.uint8], position: NDArray[np.int64]) -> str:
    """Why these panel variants are too few or too close together for a check of people; empty where they are not."""
    span = sum(int(np.ptp(position[code == c])) for c in np.unique(code))
    if len(code) >= _LEAST_VARIANTS and span >= _LEAST_SPAN:
        return ""
    return (
        f"{len(code)} panel variants over {span / 1e6:.0f} million bases are kept; {_LEAST_VARIANTS} over "
        f"{_LEAST_SPAN / 1e6:.0f} million are needed"
    )


def _evenly(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most so many rows, spread over all."""
    if len(rows) <= most:
        return rows
    return np.asarray(rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)])
