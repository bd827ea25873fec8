"""Simulated genotypes of three human populations: the demography of Gutenkunst et al. 2009, run by msprime.

Recombination lies in hot spots, mutations follow HKY with kappa 12, which gives the share of palindromic variants of a
real array (7 %; the usual JC69 gives 33 %). One seed, one genome: the same seed makes the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

POPULATIONS = ("AFR", "EUR", "EAS")
MUTATION_RATE, RECOMBINATION_RATE, GENERATION_YEARS = 1.25e-8, 1e-8, 25
MINOR_FREQUENCY = 0.005
_FIRST_BASE = 1_000_000  # real files do not begin at base 1
_BIN = 10_000


@dataclass(frozen=True, slots=True)
class Locus:
    """One simulated variant: `alternative` is the derived allele, whose copies are counted."""

    chromosome: str
    position: int
    reference: str
    alternative: str

    @property
    def id(self) -> str:
        """A name that says nothing more than the place."""
        return f"v{self.chromosome}_{self.position}"

    @property
    def is_palindromic(self) -> bool:
        """True for A/T and C/G: both strands read the same pair."""
        return {self.reference, self.alternative} in ({"A", "T"}, {"C", "G"})


@dataclass(frozen=True, slots=True)
class Genomes:
    """`dosages`: int8 (people, loci), copies of the alternative allele; `population`: int64 (people,) of POPULATIONS."""

    loci: tuple[Locus, ...]
    dosages: NDArray[np.int8]  # (people, loci)
    population: NDArray[np.int64]  # (people,)


def demography() -> Any:
    """Out of Africa with two later splits (Gutenkunst et al. 2009, table 1; one generation is 25 years)."""
    import msprime

    t_af, t_b, t_eu_as = (years / GENERATION_YEARS for years in (220e3, 140e3, 21.2e3))
    r_eu, r_as = 0.004, 0.0055
    model = msprime.Demography()
    model.add_population(name="AFR", initial_size=12_300)
    model.add_population(name="EUR", initial_size=1_000 / math.exp(-r_eu * t_eu_as), growth_rate=r_eu)
    model.add_population(name="EAS", initial_size=510 / math.exp(-r_as * t_eu_as), growth_rate=r_as)
    model.add_population(name="OOA", initial_size=2_100)
    model.add_population(name="AMH", initial_size=12_300)
    model.add_population(name="ANC", initial_size=7_300)
    for pair, rate in ((("AFR", "EUR"), 3e-5), (("AFR", "EAS"), 1.9e-5), (("EUR", "EAS"), 9.6e-5)):
        model.set_symmetric_migration_rate(list(pair), rate)
    model.add_population_split(time=t_eu_as, derived=["EUR", "EAS"], ancestral="OOA")
    model.add_symmetric_migration_rate_change(time=t_eu_as, populations=["AFR", "OOA"], rate=25e-5)
    model.add_population_split(time=t_b, derived=["OOA", "AFR"], ancestral="AMH")
    model.add_population_split(time=t_af, derived=["AMH"], ancestral="ANC")
    return model


def genomes(seed: int, people: Mapping[str, int], chromosomes: int, length_bp: int) -> Genomes:
    """Genotypes of so many people of each population at every biallelic variant with minor allele frequency >= 0.005.

    `length_bp` is the length of each chromosome. People are ordered by population.
    """
    import msprime

    rng = np.random.default_rng(seed)
    model = demography()
    samples = {name: people.get(name, 0) for name in POPULATIONS if people.get(name, 0)}
    total = sum(samples.values())
    loci: list[Locus] = []
    columns: list[NDArray[np.int8]] = []
    for chromosome in range(1, chromosomes + 1):
        trees = msprime.sim_ancestry(
            samples=samples,
            demography=model,
            recombination_rate=_hot_spots(rng, length_bp),
            random_seed=int(rng.integers(1, 2**31)),
        )
        mutated = msprime.sim_mutations(
            trees, rate=MUTATION_RATE, model=msprime.HKY(kappa=12.0), random_seed=int(rng.integers(1, 2**31))
        )
        for variant in mutated.variants(copy=False):
            if len(variant.alleles) != 2 or None in variant.alleles:
                continue
            haplotypes = variant.genotypes
            frequency = int(haplotypes.sum()) / (2 * total)
            if min(frequency, 1 - frequency) < MINOR_FREQUENCY:
                continue
            position = _FIRST_BASE + int(variant.site.position)
            loci.append(Locus(str(chromosome), position, variant.alleles[0], variant.alleles[1]))
            columns.append((haplotypes[0::2] + haplotypes[1::2]).astype(np.int8))
    order = np.repeat([POPULATIONS.index(name) for name in samples], list(samples.values()))
    dosages = np.column_stack(columns) if columns else np.zeros((total, 0), dtype=np.int8)
    return Genomes(tuple(loci), dosages, order.astype(np.int64))


def _hot_spots(rng: np.random.Generator, length_bp: int) -> Any:
    """A rate map in bins of 10 kb: one bin in five recombines 16 times as much as the others, mean 1e-8."""
    import msprime

    bins = max(1, -(-length_bp // _BIN))
    relative = np.where(rng.random(bins) < 0.2, 4.0, 0.25)
    rates = relative / relative.mean() * RECOMBINATION_RATE
    return msprime.RateMap(position=np.append(np.arange(bins) * float(_BIN), float(length_bp)), rate=rates)
