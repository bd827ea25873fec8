"""Hospitals out of one seed: each with its own mixture of ancestries, share of cases, array, file habits and gaps.

FOLDER/<site>/genotypes.bed .bim .fam      what the hospital's array gave, in the hospital's own notation
FOLDER/<site>/phenotypes.csv               patient,case,age,sex,ancestry,null_trait
FOLDER/study.json                          the public part: variants with frequencies of a reference panel, columns
FOLDER/truth/                              effects, liabilities, who is where: no hospital and no study reads it
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sequester.simulate.genomes import POPULATIONS, Genomes, Locus, genomes
from sequester.simulate.patients import Patients, patients
from sequester.simulate.plink import Line, write_bed

_FLIP = str.maketrans("ACGT", "TGCA")
REFERENCE_PEOPLE = 300  # of each population, in the public panel; none of them is a patient


@dataclass(frozen=True, slots=True)
class Hospital:
    """One hospital: `people` are relative numbers by population (AFR, EUR, EAS), `case_weight` how much likelier a case
    is to come here than a healthy person, `coverage` the share of other variants on its array."""

    name: str
    people: tuple[int, int, int]
    case_weight: float = 1.0
    coverage: float = 1.0
    missing: float = 0.01
    habit: Literal["plain", "swapped", "flipped", "chr"] = "plain"


HOSPITALS = (
    Hospital("north", (50, 1400, 50), 1.0, 1.00, 0.002),
    Hospital("lake", (300, 700, 100), 1.0, 0.90, 0.010, "swapped"),
    Hospital("metro", (550, 500, 150), 3.0, 0.85, 0.015, "flipped"),
    Hospital("harbor", (50, 150, 650), 1.0, 0.80, 0.020, "chr"),
    Hospital("valley", (50, 250, 50), 5.0, 0.60, 0.030, "swapped"),
)


@dataclass(frozen=True, slots=True)
class Simulated:
    """What was written: `study` is the public part of a study on these hospitals, as its YAML fields."""

    folder: Path
    sites: tuple[str, ...]
    people: dict[str, int]
    study: dict[str, Any]

    def site(self, name: str) -> Path:
        """The folder of one hospital."""
        return self.folder / name


def hospitals(
    seed: int,
    folder: Path,
    sites: Sequence[Hospital] = HOSPITALS,
    n_total: int = 10_000,
    *,
    chromosomes: int = 10,
    length_bp: int = 200_000,
    causal: int = 60,
    published: int = 16,
    heritability: float = 0.4,
    prevalence: float = 0.15,
) -> Simulated:
    """Write every hospital's files below `folder`; the same arguments write the same bytes.

    `published` causal variants, those that explain most and are not palindromic, are the study's public list, with the
    frequencies of a reference panel whose people are in no hospital.
    """
    rng = np.random.default_rng([seed, 2])
    shares = np.array([site.people for site in sites], dtype=np.float64)  # (sites, populations)
    wanted = np.maximum(np.rint(shares / shares.sum() * n_total), 1).astype(np.int64)
    per_population = wanted.sum(axis=0)
    everyone = genomes(
        seed,
        {name: int(per_population[i]) + REFERENCE_PEOPLE for i, name in enumerate(POPULATIONS)},
        chromosomes,
        length_bp,
    )
    is_reference = np.zeros(len(everyone.population), dtype=bool)
    for index in range(len(POPULATIONS)):
        is_reference[np.flatnonzero(everyone.population == index)[:REFERENCE_PEOPLE]] = True
    # people of all hospitals together are as mixed as the panel is read: by the hospitals' declared shares
    weight = shares.sum(axis=0) / shares.sum()
    frequency = np.zeros(len(everyone.loci))
    for index in range(len(POPULATIONS)):
        panel = everyone.dosages[is_reference & (everyone.population == index)]
        frequency += weight[index] * panel.mean(axis=0) / 2
    cohort = Genomes(everyone.loci, everyone.dosages[~is_reference], everyone.population[~is_reference])
    del everyone
    who = patients(rng, cohort, causal, heritability, prevalence)
    public = _published(cohort, who, frequency, published)
    assigned = _admissions(rng, cohort, who, sites, wanted)

    truth: list[str] = []
    for index, site in enumerate(sites):
        rows = rng.permutation(np.flatnonzero(assigned == index))
        _write_site(rng, folder / site.name, site, cohort, who, rows, public, truth)
    study = _study_part(cohort.loci, public, who, frequency, n_total, prevalence)
    _write_truth(folder / "truth", cohort, who, truth)
    (folder / "study.json").write_text(json.dumps(study, indent=1), "utf-8")
    people = {site.name: int((assigned == index).sum()) for index, site in enumerate(sites)}
    return Simulated(folder, tuple(site.name for site in sites), people, study)


def _published(cohort: Genomes, who: Patients, frequency: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Loci of the public list, in genome order: causal, not palindromic, common in the panel, by variance explained."""
    f = frequency[who.causal]
    explained = (who.effects.mean(axis=1) ** 2) * 2 * f * (1 - f)
    order = who.causal[np.argsort(-explained, kind="stable")]
    fit = [j for j in order if not cohort.loci[j].is_palindromic and 0.01 < frequency[j] < 0.99]
    return np.sort(np.array(fit[:count], dtype=np.int64))


def _admissions(
    rng: np.random.Generator,
    cohort: Genomes,
    who: Patients,
    sites: Sequence[Hospital],
    wanted: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Which hospital each person goes to; the one that draws most cases chooses first."""
    assigned = np.full(len(who.case), -1, dtype=np.int64)
    for index in sorted(range(len(sites)), key=lambda i: -sites[i].case_weight):
        for population in range(len(POPULATIONS)):
            free = np.flatnonzero((assigned < 0) & (cohort.population == population))
            odds = np.where(who.case[free] == 1, sites[index].case_weight, 1.0)
            size = min(int(wanted[index, population]), len(free))
            assigned[rng.choice(free, size=size, replace=False, p=odds / odds.sum())] = index
    return assigned


def _write_site(
    rng: np.random.Generator,
    folder: Path,
    site: Hospital,
    cohort: Genomes,
    who: Patients,
    rows: NDArray[np.int64],
    public: NDArray[np.int64],
    truth: list[str],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    on_array = rng.random(len(cohort.loci)) < site.coverage
    on_array[public] = True  # every hospital's array carries the published variants
    columns = np.flatnonzero(on_array)
    counts = cohort.dosages[np.ix_(rows, columns)]
    odd = rng.random(len(columns)) < (0.3 if site.habit in ("swapped", "flipped") else 0.0)
    lines = []
    for j, strange in zip(columns, odd, strict=True):
        locus = cohort.loci[j]
        counted, other = locus.alternative, locus.reference
        if strange and site.habit == "swapped":
            counted, other = other, counted
        if strange and site.habit == "flipped":
            counted, other = counted.translate(_FLIP), other.translate(_FLIP)
        chromosome = f"chr{locus.chromosome}" if site.habit == "chr" else locus.chromosome
        lines.append(Line(chromosome, locus.id, locus.position, counted, other))
    if site.habit == "swapped":
        counts[:, odd] = 2 - counts[:, odd]
    counts[rng.random(counts.shape, dtype=np.float32) < site.missing] = -1
    names = [f"{site.name}-{number:05d}" for number in range(1, len(rows) + 1)]
    write_bed(folder / "genotypes", names, lines, counts)
    table = ["patient,case,age,sex,ancestry,null_trait"]
    for name, i in zip(names, rows, strict=True):
        ancestry = POPULATIONS[cohort.population[i]]
        table.append(f"{name},{who.case[i]},{who.age[i]},{who.sex[i]},{ancestry},{who.null_trait[i]}")
        truth.append(f"{site.name},{name},{ancestry},{who.genetic[i]:.6f},{who.liability[i]:.6f},{who.case[i]}")
    (folder / "phenotypes.csv").write_text("\n".join(table) + "\n", "utf-8")


def _write_truth(folder: Path, cohort: Genomes, who: Patients, people: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["variant,chromosome,position,effect_allele,other_allele," + ",".join(f"effect_{p}" for p in POPULATIONS)]
    for j, effects in zip(who.causal, who.effects, strict=True):
        locus = cohort.loci[j]
        numbers = ",".join(f"{e:.6f}" for e in effects)
        rows.append(f"{locus.id},{locus.chromosome},{locus.position},{locus.alternative},{locus.reference},{numbers}")
    (folder / "effects.csv").write_text("\n".join(rows) + "\n", "utf-8")
    header = "site,patient,ancestry,genetic,liability,case"
    (folder / "people.csv").write_text("\n".join([header, *people]) + "\n", "utf-8")


def _study_part(
    loci: Sequence[Locus],
    public: NDArray[np.int64],
    who: Patients,
    frequency: NDArray[np.float64],
    n_total: int,
    prevalence: float,
) -> dict[str, Any]:
    """The fields of a study that describe data, with nothing in them that was counted in a hospital."""
    effect = dict(zip(who.causal.tolist(), who.effects.mean(axis=1).tolist(), strict=True))
    variants = []
    for j in public.tolist():
        locus, f = loci[j], float(frequency[j])
        raises = effect[j] >= 0  # the effect allele is the one that raises the risk, as in a published list
        variants.append(
            {
                "id": locus.id,
                "chromosome": locus.chromosome,
                "position": locus.position,
                "effect": locus.alternative if raises else locus.reference,
                "other": locus.reference if raises else locus.alternative,
                "frequency": f"{f if raises else 1 - f:.4f}",
            }
        )
    return {
        "genome_build": "GRCh38",
        "phenotype": {"name": "case", "kind": "binary", "values": ["0", "1"]},
        "covariates": [
            {"name": "age", "kind": "quantitative", "unit": "years", "lower": "20", "upper": "90",
             "centre": "55", "scale": "10"},
            {"name": "sex", "kind": "binary", "values": ["0", "1"], "centre": "0.5", "scale": "0.5"},
        ],
        "variants": variants,
        "n0": n_total,
        "n_max": n_total * 6 // 5,
        "prevalence": f"{prevalence:g}",
        "subgroup": "ancestry",
        "subgroup_values": list(POPULATIONS),
    }  # fmt: skip
