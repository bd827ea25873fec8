"""Who falls ill: a liability of causal variants, age, sex, ancestry and chance, with a threshold at the prevalence.

The truth (effects, liabilities) goes to a folder no hospital reads. A null trait, whose prevalence differs by ancestry
and has no genetics at all, is always there: whoever finds a variant for it has found ancestry.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from sequester.simulate.genomes import POPULATIONS, Genomes

CORRELATION = 0.9  # of a variant's effect between populations
STRATIFICATION = (0.0, 0.15, -0.10)  # liability by population that is not genetic
NULL_PREVALENCE = (0.25, 0.10, 0.04)
SEX_EFFECT, AGE_EFFECT = 0.2, 0.02
HAZARD, SHAPE = 0.02, 1.5  # of the time to the disease, a year


@dataclass(frozen=True, slots=True)
class Patients:
    """Arrays over people, in the order of the genomes; `causal` are columns of the dosages, `effects` (causal, populations).

    `time`: years until the disease or until observation ended, `event`: 1 where it was the disease.
    """

    age: NDArray[np.int64]
    sex: NDArray[np.int64]
    case: NDArray[np.int64]
    null_trait: NDArray[np.int64]
    time: NDArray[np.float64]
    event: NDArray[np.int64]
    genetic: NDArray[np.float64]
    liability: NDArray[np.float64]
    causal: NDArray[np.int64]
    effects: NDArray[np.float64]


def patients(
    rng: np.random.Generator, genomes: Genomes, causal: int, heritability: float, prevalence: float
) -> Patients:
    """Age, sex, disease and null trait of every person (spec: effects ~ N(0, 1) [2 f (1 - f)]^-0.19, centred within ancestry)."""
    n = len(genomes.population)
    frequency = genomes.dosages.mean(axis=0) / 2
    common = np.flatnonzero(np.minimum(frequency, 1 - frequency) >= 0.05)
    chosen = np.sort(rng.choice(common, size=min(causal, len(common)), replace=False))
    shared = rng.standard_normal(len(chosen))
    own = rng.standard_normal((len(chosen), len(POPULATIONS)))
    spread = (2 * frequency[chosen] * (1 - frequency[chosen])) ** -0.19
    effects = (CORRELATION**0.5 * shared[:, None] + (1 - CORRELATION) ** 0.5 * own) * spread[:, None]

    genetic = np.zeros(n)
    for index in range(len(POPULATIONS)):
        here = genomes.population == index
        if here.any():
            value = genomes.dosages[here][:, chosen].astype(np.float64) @ effects[:, index]
            genetic[here] = value - value.mean()
    scale = float(np.sqrt(heritability / max(float((genetic**2).mean()), 1e-12)))
    genetic *= scale

    age = np.clip(np.rint(rng.normal(55, 10, n)), 20, 90).astype(np.int64)
    sex = rng.integers(0, 2, n)
    liability = genetic + SEX_EFFECT * (sex - 0.5) + AGE_EFFECT * (age - 55)
    liability += np.asarray(STRATIFICATION)[genomes.population] + rng.normal(0, (1 - heritability) ** 0.5, n)
    threshold = float(norm.isf(prevalence)) * (1 + SEX_EFFECT**2 / 4 + (10 * AGE_EFFECT) ** 2) ** 0.5
    null_trait = rng.random(n) < np.asarray(NULL_PREVALENCE)[genomes.population]
    time, event = survival(rng.spawn(1)[0], genetic + SEX_EFFECT * (sex - 0.5) + AGE_EFFECT * (age - 55))
    return Patients(
        age, sex, (liability > threshold).astype(np.int64), null_trait.astype(np.int64), time, event,
        genetic, liability, chosen, effects * scale,
    )  # fmt: skip


def survival(rng: np.random.Generator, risk: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Weibull times with log hazard `risk`, censored between 2 and 12 years (spec/genomics.md, section 10)."""
    time = (rng.exponential(size=len(risk)) / (HAZARD * np.exp(risk))) ** (1 / SHAPE)
    censored = np.minimum(rng.uniform(2, 15, len(risk)), 12.0)
    return np.minimum(time, censored), (time <= censored).astype(np.int64)
