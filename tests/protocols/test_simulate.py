"""Made-up hospitals: reproducible, in the formats and habits of real ones, with a truth that no hospital reads."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest

from sequester.client.compute.genome.harmonise import match
from sequester.client.compute.genome.plink import PlinkFiles
from sequester.protocols.study import Variant
from sequester.simulate.genomes import POPULATIONS, genomes
from sequester.simulate.hospitals import Simulated, hospitals


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Simulated:
    return hospitals(7, tmp_path_factory.mktemp("sim"), n_total=900, chromosomes=4, length_bp=200_000, causal=30)


def _hash(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        hospitals(seed, tmp_path / name, n_total=120, chromosomes=2, length_bp=100_000, causal=10, published=5)
    a, b, c = (_hash(tmp_path / name) for name in "abc")
    assert a == b
    assert a["north/genotypes.bed"] != c["north/genotypes.bed"]


def test_every_hospital_has_the_published_variants_whatever_its_habits(simulated: Simulated) -> None:
    variants = [Variant.model_validate(v) for v in simulated.study["variants"]]
    assert len(variants) == 16
    seen: set[str] = set()
    for name in simulated.sites:
        files = PlinkFiles(str(simulated.site(name) / "genotypes"))
        found = match(variants, files.variants)
        assert all(row >= 0 for row in found.row)
        assert len(files.samples) == simulated.people[name]
        seen |= {category for category, count in found.categories.items() if count}
        # the effect allele's frequency agrees with the panel's: swaps and flips were undone
        dosage = found.dosage(files.counts(found.row)).astype(float)
        dosage[dosage < 0] = np.nan
        panel = np.array([float(v.frequency) for v in variants])
        observed = np.nanmean(dosage, axis=0) / 2
        assert (
            np.mean(np.abs(observed - panel)) < 0.2
        )  # a wrong allele everywhere would miss by more (ancestry differs)
    assert seen >= {"direct", "swapped", "flipped"} or seen >= {"direct", "flipped_swapped"}


def test_the_public_part_of_a_study_names_no_palindrome_and_no_truth(simulated: Simulated) -> None:
    for v in simulated.study["variants"]:
        assert {v["effect"], v["other"]} not in ({"A", "T"}, {"C", "G"})
        assert set(v) == {"id", "chromosome", "position", "effect", "other", "frequency"}
    for name in simulated.sites:
        assert {p.name for p in simulated.site(name).iterdir()} == {
            "genotypes.bed", "genotypes.bim", "genotypes.fam", "phenotypes.csv",
        }  # fmt: skip


def test_cases_gather_where_they_are_referred_to(simulated: Simulated) -> None:
    share = {}
    for name in simulated.sites:
        with (simulated.site(name) / "phenotypes.csv").open() as file:
            rows = list(csv.DictReader(file))
        share[name] = float(np.mean([int(r["case"]) for r in rows]))
        assert {r["ancestry"] for r in rows} <= set(POPULATIONS)
    assert share["valley"] > 2 * share["north"]


def test_populations_differ_as_real_ones_do() -> None:
    # Hudson's Fst of the published demography: AFR-EUR .157, AFR-EAS .160, EUR-EAS .094; a short genome spreads by about .03
    made = genomes(3, {"AFR": 150, "EUR": 150, "EAS": 150}, 8, 150_000)
    f = [made.dosages[made.population == i].mean(axis=0) / 2 for i in range(3)]
    n = 300  # haplotypes of each population

    def fst(a: int, b: int) -> float:
        over = (f[a] - f[b]) ** 2 - f[a] * (1 - f[a]) / (n - 1) - f[b] * (1 - f[b]) / (n - 1)
        return float(over.sum() / (f[a] * (1 - f[b]) + f[b] * (1 - f[a])).sum())

    assert fst(0, 1) == pytest.approx(0.157, abs=0.05)
    assert fst(0, 2) == pytest.approx(0.160, abs=0.05)
    assert fst(1, 2) == pytest.approx(0.094, abs=0.05)
    palindromic = np.mean([locus.is_palindromic for locus in made.loci])
    assert 0.03 < palindromic < 0.12  # HKY, kappa 12: 7.2 %
