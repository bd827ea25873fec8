"""Hospitals out of one seed: each with its own mixture of ancestries, share of cases, array, file habits and gaps.

FOLDER/<site>/genotypes.*        what the hospital's array gave, in its own notation: .bed, .pgen or .vcf.gz
FOLDER/<site>/phenotypes.csv     patient,case,age,sex,ancestry,null_trait,time,event
FOLDER/study.json                the public part: variants with frequencies of a reference panel, columns
FOLDER/panel.tsv                 a marker panel of all variants, with positions in two builds
FOLDER/truth/                    effects, liabilities, who is where: no hospital and no study reads it
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sequester.simulate import surplus
from sequester.simulate.genomes import POPULATIONS, Genomes, Locus, genomes
from sequester.simulate.patients import Patients, patients
from sequester.simulate.plink import Line, write_bed, write_pgen, write_vcf

_FLIP = str.maketrans("ACGT", "TGCA")
_CATEGORY = {
    (False, False): "direct", (True, False): "swapped", (False, True): "flipped", (True, True): "flipped_swapped",
}  # fmt: skip
REFERENCE_PEOPLE = 300  # of each population, in the public panel; none of them is a patient


@dataclass(frozen=True, slots=True)
class Hospital:
    """One hospital: `people` are relative numbers by population (AFR, EUR, EAS), `case_weight` how much likelier a case
    is to come here than a healthy person (0: no cases), `coverage` the share of other variants on its array. Habits:
    `mixed` swaps the alleles of some rows and the strand of others, and both of a few."""

    name: str
    people: tuple[int, int, int]
    case_weight: float = 1.0
    coverage: float = 1.0
    missing: float = 0.01
    habit: Literal["plain", "swapped", "flipped", "chr", "mixed"] = "plain"
    format: Literal["bed", "pgen", "vcf"] = "bed"
    age_unit: Literal["years", "months"] = "years"


HOSPITALS = (
    Hospital("north", (50, 1400, 50), 1.0, 1.00, 0.002),
    Hospital("lake", (300, 700, 100), 1.0, 0.90, 0.010, "swapped"),
    Hospital("metro", (550, 500, 150), 3.0, 0.85, 0.015, "flipped"),
    Hospital("harbor", (50, 150, 650), 1.0, 0.80, 0.020, "chr"),
    Hospital("valley", (50, 250, 50), 5.0, 0.60, 0.030, "swapped"),
)


# as real hospitals send them: one VCF, one bed, the others pgen; one counts age in months; one has no cases and
# misses fewer calls than in HOSPITALS: 3 % of a few people's would fail the call rate of too many variants by chance
ROUGH = (
    Hospital("north", (50, 1400, 50), 1.0, 1.00, 0.002, "plain", "pgen"),
    Hospital("lake", (300, 700, 100), 1.0, 0.90, 0.010, "swapped", "vcf"),
    Hospital("metro", (550, 500, 150), 3.0, 0.85, 0.015, "mixed", "pgen"),
    Hospital("harbor", (50, 150, 650), 1.0, 0.80, 0.020, "chr", "bed", "months"),
    Hospital("valley", (50, 250, 50), 0.0, 0.60, 0.010, "flipped", "pgen"),
)
OTHER_BUILD = "north-grch37"  # a copy of the first hospital of ROUGH at the positions of another build


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
    rough: bool = False,
) -> Simulated:
    """Write every hospital's files below `folder`; the same arguments write the same bytes.

    `rough` adds surplus rows and people (surplus.py) and a copy of the first hospital in another build.

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
    by_population = np.array(
        [everyone.dosages[is_reference & (everyone.population == i)].mean(axis=0) / 2 for i in range(len(POPULATIONS))]
    )  # (populations, loci)
    frequency = weight @ by_population
    cohort = Genomes(everyone.loci, everyone.dosages[~is_reference], everyone.population[~is_reference])
    del everyone
    pairs = surplus.siblings(rng.spawn(1)[0], cohort) if rough else None
    who = patients(rng, cohort, causal, heritability, prevalence)
    public = _published(cohort, who, frequency, published)
    assigned = _admissions(rng, cohort, who, sites, wanted)

    if pairs is not None:
        surplus.together(pairs, assigned, cohort.population)
    everywhere = Everyone(cohort, who, public, rough, length_bp)
    truth: list[str] = []
    at: list[NDArray[np.int64]] = []
    for index, site in enumerate(sites):
        rows = rng.permutation(np.flatnonzero(assigned == index))
        if rough and index == len(sites) - 2:  # people of the first hospital who were here too
            rows = np.concatenate([rows, at[0][: surplus.COPIES]])
        at.append(rows)
        _write_site(rng, folder, site, everywhere, rows, truth)
    _write_panel(folder / "panel.tsv", cohort.loci, by_population, length_bp)
    if pairs is not None:
        np.savez_compressed(folder / "truth/dosages.npz", dosages=cohort.dosages, siblings=pairs)
    study = _study_part(cohort.loci, public, who, frequency, n_total, prevalence)
    _write_truth(folder / "truth", cohort, who, truth)
    (folder / "study.json").write_text(json.dumps(study, indent=1), "utf-8")
    people = {site.name: len(rows) for site, rows in zip(sites, at, strict=True)}
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
    """Which hospital each person goes to; who takes no cases chooses first, then who draws most of them."""
    assigned = np.full(len(who.case), -1, dtype=np.int64)
    for index in sorted(range(len(sites)), key=lambda i: (sites[i].case_weight > 0, -sites[i].case_weight)):
        for population in range(len(POPULATIONS)):
            free = np.flatnonzero((assigned < 0) & (cohort.population == population))
            odds = np.where(who.case[free] == 1, sites[index].case_weight, 1.0)
            size = min(int(wanted[index, population]), int(np.count_nonzero(odds)))
            assigned[rng.choice(free, size=size, replace=False, p=odds / odds.sum())] = index
    return assigned


@dataclass(frozen=True, slots=True)
class Everyone:
    """All people and variants, from which each hospital's files are cut."""

    genomes: Genomes
    patients: Patients
    public: NDArray[np.int64]
    rough: bool
    length_bp: int


def _write_site(
    rng: np.random.Generator,
    folder: Path,
    site: Hospital,
    everyone: Everyone,
    people: NDArray[np.int64],
    truth: list[str],
) -> None:
    cohort, who = everyone.genomes, everyone.patients
    on_array = rng.random(len(cohort.loci)) < site.coverage
    on_array[everyone.public] = True  # every hospital's array carries the published variants
    columns = np.flatnonzero(on_array)
    counts = cohort.dosages[np.ix_(people, columns)]
    odd = rng.random(len(columns)) < (0.3 if site.habit in ("swapped", "flipped", "mixed") else 0.0)
    swapped = odd & (site.habit != "flipped")
    flipped = odd & (site.habit == "flipped")
    if site.habit == "mixed":
        flipped = rng.random(len(columns)) < 0.3
    prefix = "chr" if site.habit == "chr" else ""
    lines: list[Line] = []
    categories: list[tuple[str, ...]] = []
    for j, swap, flip in zip(columns, swapped, flipped, strict=True):
        locus = cohort.loci[j]
        counted, other = locus.alternative, locus.reference
        if swap:
            counted, other = other, counted
        if flip:
            counted, other = counted.translate(_FLIP), other.translate(_FLIP)
        lines.append(Line(prefix + locus.chromosome, locus.id, locus.position, counted, other))
        categories.append(("palindromic" if locus.is_palindromic else _CATEGORY[bool(swap), bool(flip)],))
    counts[:, swapped] = 2 - counts[:, swapped]
    counts[rng.random(counts.shape, dtype=np.float32) < site.missing] = -1
    names = [f"{site.name}-{number:05d}" for number in range(1, len(people) + 1)]
    rows = surplus.Rows(lines, counts, categories)
    if everyone.rough:
        off = [cohort.loci[j] for j in np.flatnonzero(~on_array)]
        rows = surplus.with_surplus(rng.spawn(1)[0], rows, off, prefix, several_alleles=site.format == "vcf")
        listed = [
            f"{v.chromosome},{v.position},{v.id},{'+'.join(c)}"
            for v, c in zip(rows.lines, rows.categories, strict=True)
        ]
        (folder / "truth").mkdir(parents=True, exist_ok=True)
        text = "chromosome,position,id,category\n" + "\n".join(listed) + "\n"
        (folder / f"truth/variants-{site.name}.csv").write_text(text, "utf-8")
    _write_genotypes(folder / site.name, site, names, rows.lines, rows.counts)
    if everyone.rough and site.name == ROUGH[0].name:
        old = [
            Line(v.chromosome, v.id, _other_build(v.position, everyone.length_bp), v.counted, v.other)
            for v in rows.lines
        ]
        _write_genotypes(folder / OTHER_BUILD, site, names, old, rows.counts)
    table = ["patient,case,age,sex,ancestry,null_trait,time,event"]
    for name, i in zip(names, people, strict=True):
        ancestry = POPULATIONS[cohort.population[i]]
        age = who.age[i] * (12 if site.age_unit == "months" else 1)
        table.append(
            f"{name},{who.case[i]},{age},{who.sex[i]},{ancestry},{who.null_trait[i]},{who.time[i]:.4f},{who.event[i]}"
        )
        truth.append(f"{site.name},{name},{ancestry},{who.genetic[i]:.6f},{who.liability[i]:.6f},{who.case[i]},{i}")
    for name in (site.name, OTHER_BUILD) if everyone.rough and site.name == ROUGH[0].name else (site.name,):
        (folder / name / "phenotypes.csv").write_text("\n".join(table) + "\n", "utf-8")


def _write_genotypes(
    folder: Path, site: Hospital, names: Sequence[str], lines: Sequence[Line], counts: NDArray[np.int8]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if site.format == "vcf":
        write_vcf(folder / "genotypes.vcf.gz", names, lines, counts)
    elif site.format == "pgen":
        write_pgen(folder / "genotypes", names, lines, counts)
    else:
        write_bed(folder / "genotypes", names, lines, counts)


def _other_build(position: int, length_bp: int) -> int:
    """A place that is no variant of the first build, so that a build is told by its places."""
    return position + length_bp + 100_003


def _write_panel(path: Path, loci: Sequence[Locus], frequency: NDArray[np.float64], length_bp: int) -> None:
    """All variants in GRCh38 and at made-up places in GRCh37, with frequencies of the reference people."""
    names = ["chromosome", "NCBI36", "GRCh37", "GRCh38", "ref", "alt", "ref_known", "id"]
    rows = ["\t".join([*names, *(f"af_{p}" for p in POPULATIONS)])]
    for j, v in enumerate(loci):
        places = ["", str(_other_build(v.position, length_bp)), str(v.position)]
        rows.append("\t".join([v.chromosome, *places, v.reference, v.alternative, "1", v.id,
                               *(f"{f:.4f}" for f in frequency[:, j])]))  # fmt: skip
    path.write_text("\n".join(rows) + "\n", "utf-8")


def _write_truth(folder: Path, cohort: Genomes, who: Patients, people: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["variant,chromosome,position,effect_allele,other_allele," + ",".join(f"effect_{p}" for p in POPULATIONS)]
    for j, effects in zip(who.causal, who.effects, strict=True):
        locus = cohort.loci[j]
        numbers = ",".join(f"{e:.6f}" for e in effects)
        rows.append(f"{locus.id},{locus.chromosome},{locus.position},{locus.alternative},{locus.reference},{numbers}")
    (folder / "effects.csv").write_text("\n".join(rows) + "\n", "utf-8")
    header = "site,patient,ancestry,genetic,liability,case,person"
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
