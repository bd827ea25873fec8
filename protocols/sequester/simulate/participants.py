"""Made-up patients who fit a study: its variants at their declared frequencies, its columns within their bounds, its outcome.

    FOLDER/<hospital>/genotypes.*       in the hospital's own notation: .bed or .pgen, swapped, flipped, or `chr` names
    FOLDER/<hospital>/phenotypes.csv    patient, and every column the study names

Each variant of the study takes the place of a simulated one of the same frequency, so ancestries differ and neighbours are
linked as in people; where no simulated one is like it, it is drawn independently. What is assumed is said in `Assumed`:
nobody knows before a study how much its variants explain.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sequester.protocols.analyses.cohort import Block, Columns, Dosages, Part, standardised
from sequester.protocols.analyses.training import TrainingPlan, closed_form, outcomes, records
from sequester.protocols.errors import StudyError
from sequester.protocols.study import Study
from sequester.simulate.genomes import POPULATIONS, genomes
from sequester.simulate.hospitals import HOSPITALS
from sequester.simulate.patients import CORRELATION, STRATIFICATION
from sequester.simulate.plink import Line, write_bed, write_pgen
from sequester.simulate.table import Table

Vector = NDArray[np.float64]
CHROMOSOMES = 10
LOCI_PER_MB = 2000  # simulated variants, at least; twice as many as the study's are made
MOST_VARIANTS = 5000
CAUSAL = 100  # variants with an effect, where the study lists more
MISSING = 0.005  # of genotypes
_FLIP = str.maketrans("ACGT", "TGCA")


@dataclass(frozen=True, slots=True)
class Assumed:
    """Shares of the variance of the liability (or of the outcome) that the listed variants and scores, and covariates explain."""

    heritability: float = 0.2
    covariates: float = 0.2

    def __post_init__(self) -> None:
        if min(self.heritability, self.covariates) < 0 or self.heritability + self.covariates >= 1:
            raise StudyError(
                f"{self.heritability} by variants and {self.covariates} by covariates leave nothing to chance",
                hint="shares of the variance, together below 1",
            )


@dataclass(frozen=True, slots=True)
class Participants:
    """A cohort in memory. `cells`: the table as a hospital would write it; `hospital`: int64 (people,), -1 in none.

    `raw`: scores and covariates as a frozen cohort holds them, NaN missing; `dosage`: int8 copies of the effect allele, -1
    missing; `y` on the study's scale, `event` of a time.
    """

    study: Study
    cells: Mapping[str, Sequence[str]]
    raw: Vector  # (people, scores and covariates)
    dosage: NDArray[np.int8]  # (people, variants)
    y: Vector  # (people,)
    event: Vector | None  # (people,)
    strata: NDArray[np.int64]  # (people,)
    fold: NDArray[np.int64]  # (people,)
    held_out: NDArray[np.bool_]  # (people,)
    hospital: NDArray[np.int64]  # (people,)

    def of(self, hospital: int) -> Participants:
        """Those of one hospital, by its place in the roster; -1: those of none."""
        rows = np.flatnonzero(self.hospital == hospital)
        return Participants(
            self.study, {name: [column[int(i)] for i in rows] for name, column in self.cells.items()}, self.raw[rows],
            self.dosage[rows], self.y[rows], None if self.event is None else self.event[rows], self.strata[rows],
            self.fold[rows], self.held_out[rows], self.hospital[rows],
        )  # fmt: skip

    # ---- the typing protocol `Cohort` -------------------------------------------------------------------------------

    def blocks(self, part: Part) -> Iterator[Block]:
        rows = self._rows(part)
        return (self._block(some) for some in np.array_split(rows, 1 + len(rows) // 4096))

    def columns(self, part: Part) -> Columns:
        rows = self._rows(part)
        return Columns(self.raw[rows], self.y[rows], self.fold[rows], self.strata[rows], self._event(rows))

    def dosages(self, part: Part) -> Iterator[Dosages]:
        rows = self._rows(part)
        for first in range(0, self.dosage.shape[1], 1024):
            yield Dosages(first, self._copies(rows, slice(first, first + 1024)))

    def some(self, part: Part, variants: Sequence[int]) -> Vector:
        return self._copies(self._rows(part), list(variants))

    def gradient(self, plan: TrainingPlan, weights: Mapping[str, Vector]) -> dict[str, Vector]:
        """By closed form, full batch: a network's gradients need torch, which lives at hospitals."""
        total = sum(
            (closed_form(plan, records(plan, self.study, block.x), outcomes(plan, block.y), weights["head.weight"][0])
             for block in self.blocks(plan.part)), np.zeros(weights["head.weight"].size),
        )  # fmt: skip
        return {"head.weight": np.asarray(total)[None, :]}

    def everybody(self, part: Part) -> Block:
        """The patients of one part at once."""
        return self._block(self._rows(part))

    def _block(self, rows: NDArray[np.int64]) -> Block:
        x = standardised(np.hstack([self.raw[rows], self._copies(rows)]), self.study.features())
        return Block(x, self.y[rows], self.fold[rows], self.strata[rows], self._event(rows))

    def _rows(self, part: Part) -> NDArray[np.int64]:
        keep = np.ones_like(self.held_out) if part == "all" else self.held_out if part == "test" else ~self.held_out
        return np.flatnonzero(keep)

    def _copies(self, rows: NDArray[np.int64], variants: slice | list[int] = slice(None)) -> Vector:
        copies = self.dosage[rows][:, variants].astype(np.float64)
        copies[copies < 0] = np.nan
        return copies

    def _event(self, rows: NDArray[np.int64]) -> Vector | None:
        return None if self.event is None else self.event[rows]


def participants(study: Study, sizes: Mapping[str, int], extra: int, seed: int, assumed: Assumed) -> Participants:
    """So many people at each hospital and `extra` ones at none; the same arguments give the same people."""
    if len(study.variants) > MOST_VARIANTS:
        raise StudyError(
            f"{len(study.variants)} variants are more than the {MOST_VARIANTS} that made-up people are given",
            hint="rehearse a shorter list, or give every hospital files that may be used openly",
        )
    rng = np.random.default_rng([seed, 3])
    counts = [sizes[name] for name in study.site_ids]
    hospital = np.repeat(np.append(np.arange(len(counts)), -1), [*counts, extra])
    population = _populations(rng, hospital, len(counts))
    dosage = _dosage(rng, seed, study, population)
    genetic = _genetic(rng, study, dosage, population)
    table = Table(study, rng, genetic)
    known = _covariates(
        rng, standardised(table.raw[:, len(study.scores) :], study.table_features()[len(study.scores) :])
    )
    sure = assumed.heritability**0.5 * genetic + assumed.covariates**0.5 * known
    sure += np.asarray(STRATIFICATION)[population]
    rest = 1 - assumed.heritability - assumed.covariates
    y, event = table.outcome(sure, sure + rng.normal(0.0, rest**0.5, len(sure)))
    dosage[rng.random(dosage.shape, dtype=np.float32) < np.float32(MISSING)] = -1
    table.scores(dosage)
    return Participants(
        study, table.cells, table.raw, dosage, y, event, table.strata(population),
        rng.integers(0, study.cohort.folds, len(y)), rng.random(len(y)) < float(study.cohort.test_fraction), hospital,
    )  # fmt: skip


def write(folder: Path, people: Participants) -> None:
    """Each hospital's files below `folder`, in habits that differ from one to the next; people of no hospital stay here."""
    study = people.study
    for place, site in enumerate(study.site_ids):
        rng = np.random.default_rng([place, 4])
        own, habit = people.of(place), HOSPITALS[place % len(HOSPITALS)].habit
        names = [f"{site}-{number:06d}" for number in range(1, len(own.y) + 1)]
        (folder / site).mkdir(parents=True, exist_ok=True)
        with (folder / site / "phenotypes.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["patient", *own.cells])
            table.writerows(zip(names, *own.cells.values(), strict=True))
        if not study.variants:
            continue
        odd = rng.random(len(study.variants)) < 0.3
        lines, counts = [], own.dosage.copy()
        for j, v in enumerate(study.variants):
            counted, other = v.effect, v.other
            if odd[j] and habit == "swapped":
                counted, other = other, counted
                counts[:, j] = np.where(counts[:, j] < 0, -1, 2 - counts[:, j])
            elif odd[j] and habit == "flipped" and len(counted) == len(other) == 1:
                counted, other = counted.translate(_FLIP), other.translate(_FLIP)
            lines.append(Line(("chr" if habit == "chr" else "") + v.chromosome, v.id, v.position, counted, other))
        (write_pgen if place % 2 else write_bed)(folder / site / "genotypes", names, lines, counts)


# ---- genes ----------------------------------------------------------------------------------------------------------


def _populations(rng: np.random.Generator, hospital: NDArray[np.int64], hospitals: int) -> NDArray[np.int64]:
    """Each person's population: every hospital has a mixture of its own, people of none have all hospitals' together."""
    shares = np.array([HOSPITALS[i % len(HOSPITALS)].people for i in range(hospitals)], dtype=np.float64)
    shares /= shares.sum(axis=1, keepdims=True)
    weight = np.bincount(hospital[hospital >= 0], minlength=hospitals).astype(np.float64)
    mixed = np.vstack([shares, (weight / weight.sum()) @ shares])  # the last row for -1
    edges = np.cumsum(mixed[hospital], axis=1)
    found: NDArray[np.int64] = (rng.random(len(hospital))[:, None] > edges[:, :-1]).sum(axis=1)
    return found


def _dosage(rng: np.random.Generator, seed: int, study: Study, population: NDArray[np.int64]) -> NDArray[np.int8]:
    """int8 (people, variants), copies of the effect allele, of the study's frequencies."""
    wanted = np.array([float(v.frequency) for v in study.variants])
    found = np.zeros((len(population), len(wanted)), dtype=np.int8)
    if not len(wanted):
        return found
    length = max(100_000, 2_000_000 * len(wanted) // (LOCI_PER_MB * CHROMOSOMES))
    number = {name: int((population == i).sum()) for i, name in enumerate(POPULATIONS)}
    everyone = genomes(seed, number, CHROMOSOMES, length)
    back = np.argsort(np.argsort(population, kind="stable"), kind="stable")  # genomes come ordered by population
    frequency = everyone.dosages.mean(axis=0) / 2
    free = np.ones(len(frequency), dtype=bool)
    for j in rng.permutation(len(wanted)):
        f = wanted[j]
        off = np.minimum(np.abs(frequency - f), np.abs(1 - frequency - f))
        off[~free] = np.inf
        locus = int(np.argmin(off))
        if off[locus] > 0.1 * min(f, 1 - f):
            found[:, j] = rng.binomial(2, f, len(population))
            continue
        free[locus] = False
        copies = everyone.dosages[:, locus][back]
        found[:, j] = copies if abs(frequency[locus] - f) <= abs(1 - frequency[locus] - f) else 2 - copies
    return found


def _genetic(rng: np.random.Generator, study: Study, dosage: NDArray[np.int8], population: NDArray[np.int64]) -> Vector:
    """The genetic value, mean 0 within each population and variance 1: mostly along published weights where there are any."""
    if not study.variants:
        return rng.standard_normal(len(population))
    f = np.array([float(v.frequency) for v in study.variants])
    effect = rng.standard_normal(len(f)) * np.maximum(2 * f * (1 - f), 1e-4) ** -0.19
    if len(f) > CAUSAL:
        effect[rng.permutation(len(f))[CAUSAL:]] = 0.0
    place = {v.id: j for j, v in enumerate(study.variants)}
    for score in study.scores:
        listed = [(place[name], float(weight)) for name, weight in score.weights if name in place]
        if not listed:
            continue
        at, weights = (np.array(part) for part in zip(*listed, strict=True))
        own = rng.standard_normal(len(at)) * weights.std()
        effect[at] = CORRELATION * weights + (1 - CORRELATION**2) ** 0.5 * own
        break
    genetic = dosage.astype(np.float64) @ effect
    for index in range(len(POPULATIONS)):
        here = population == index
        if here.any():
            genetic[here] -= genetic[here].mean()
    return np.asarray(genetic / max(float(genetic.std()), 1e-9))


def _covariates(rng: np.random.Generator, x: Vector) -> Vector:
    """What the covariates do to the liability, mean 0 and variance 1; 0 where there are none."""
    if not x.shape[1]:
        return np.zeros(len(x))
    scaled = (x - x.mean(axis=0)) / np.maximum(x.std(axis=0), 1e-9)
    known = scaled @ rng.choice((-1.0, 1.0), x.shape[1])
    return np.asarray(known / max(float(known.std()), 1e-9))
