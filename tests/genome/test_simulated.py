"""Made-up hospitals are like real ones where it matters: populations, linkage, relatives, survival, files, and the command."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import contracts
from genome.files import twin_vcf
from genome.sites import ingested, site
from sequester.client.compute.genome.plink import PlinkFiles
from sequester.client.ingest import freeze
from sequester.protocols.errors import SiteError, StudyError
from sequester.server.cli.app import app
from sequester.simulate import surplus
from sequester.simulate.genomes import POPULATIONS, genomes
from sequester.simulate.hospitals import OTHER_BUILD, ROUGH, Simulated, hospitals


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Simulated:
    return hospitals(5, tmp_path_factory.mktemp("sim"), ROUGH, 600, chromosomes=3, length_bp=150_000, rough=True)


def people(made: Simulated) -> list[dict[str, str]]:
    with (made.folder / "truth/people.csv").open() as file:
        return list(csv.DictReader(file))


def test_twenty_people_are_at_two_hospitals_and_every_other_person_at_one(made: Simulated) -> None:
    seen: dict[str, set[str]] = {}
    for row in people(made):
        seen.setdefault(row["person"], set()).add(row["site"])
    twice = [sites for sites in seen.values() if len(sites) == 2]
    assert len(twice) == surplus.COPIES and all(sites == {"north", "harbor"} for sites in twice)
    assert max(map(len, seen.values())) == 2


def test_siblings_share_half_of_what_varies_and_are_at_one_hospital(made: Simulated) -> None:
    stored = np.load(made.folder / "truth/dosages.npz")
    dosages, pairs = stored["dosages"].astype(float), stored["siblings"]
    sites = {int(row["person"]): row["site"] for row in people(made)}
    assert len(pairs) == surplus.PAIRS and all(sites[a] == sites[b] for a, b in pairs.tolist())
    f = dosages.mean(axis=0) / 2
    common = (f > 0.1) & (f < 0.9)
    z = (dosages[:, common] - 2 * f[common]) / np.sqrt(2 * f[common] * (1 - f[common]))
    europeans = z[[int(r["person"]) for r in people(made) if r["ancestry"] == "EUR"]]
    unrelated = float((europeans @ europeans.T / z.shape[1])[np.triu_indices(len(europeans), 1)].mean())
    together = float(np.mean([z[a] @ z[b] / z.shape[1] for a, b in pairs]))
    assert together - unrelated == pytest.approx(0.5, abs=0.15)  # the correlation of full siblings


def test_one_hospital_has_no_cases_and_one_counts_age_in_months_which_the_bounds_notice(
    made: Simulated, tmp_path: Path
) -> None:
    cases = {}
    for name in made.sites:
        rows = list(csv.DictReader((made.site(name) / "phenotypes.csv").open()))
        cases[name] = sum(int(row["case"]) for row in rows)
        assert {"time", "event"} <= set(rows[0]) and all(0 < float(row["time"]) <= 12 for row in rows)
    assert cases["valley"] == 0 and all(count > 0 for name, count in cases.items() if name != "valley")
    home = site(tmp_path / "h", made.site("harbor") / "genotypes", "GRCh38", made.site("harbor") / "phenotypes.csv")
    columns = [{"name": "age", "kind": "quantitative", "unit": "years", "lower": "20", "upper": "90"}]
    study = contracts.study(covariates=columns, variants=made.study["variants"], cohort={})
    with pytest.raises(SiteError, match=r"outside 20\.\.90 years"):
        freeze.freeze(home, home.config(), study, "ab" * 32)


def test_people_with_a_higher_risk_fall_ill_earlier(made: Simulated) -> None:
    genetic = {row["patient"]: float(row["genetic"]) for row in people(made)}
    rows = [r for name in made.sites for r in csv.DictReader((made.site(name) / "phenotypes.csv").open())]
    ill = np.array([int(r["event"]) for r in rows]) == 1
    risk = np.array([genetic[r["patient"]] for r in rows])
    # hazard 0.02 a year, shape 1.5, at most 12 years: about half fall ill, and these have the higher genetic value
    assert 0.15 < ill.mean() < 0.6 and risk[ill].mean() > risk[~ill].mean() + 0.1


@pytest.mark.slow
def test_every_format_of_a_rough_hospital_is_read_and_the_other_build_holds_the_same_genotypes(
    made: Simulated, tmp_path: Path
) -> None:
    formats = {h.name: h.format for h in ROUGH}
    assert set(formats.values()) == {"bed", "pgen", "vcf"}
    for name, kind in formats.items():
        if kind != "vcf":
            assert len(PlinkFiles(str(made.site(name) / "genotypes")).samples) == made.people[name]
    keys, _ = twin_vcf(made.site("lake") / "genotypes.vcf.gz")
    assert len(keys) > 500
    here, there = (PlinkFiles(str(made.site(name) / "genotypes")) for name in ("north", OTHER_BUILD))
    n = len(here.variants)
    np.testing.assert_array_equal(here.counts(range(n)), there.counts(range(n)))
    account = ingested(
        site(tmp_path / "h", made.site("lake") / "genotypes.vcf.gz", "GRCh38"), panel=made.folder / "panel.tsv"
    )
    assert account["split"] > 0


@pytest.mark.slow
def test_a_study_freezes_the_same_dosages_from_every_format_and_from_the_other_build(
    made: Simulated, tmp_path: Path
) -> None:
    dosages = np.load(made.folder / "truth/dosages.npz")["dosages"]
    loci = [line.split("\t")[7] for line in (made.folder / "panel.tsv").read_text().splitlines()[1:]]
    alternative = {
        line.split("\t")[7]: line.split("\t")[5] for line in (made.folder / "panel.tsv").read_text().splitlines()[1:]
    }
    person = {row["patient"]: int(row["person"]) for row in people(made)}
    study = contracts.study(covariates=[], variants=made.study["variants"], cohort={})
    formats = {h.name: h.format for h in ROUGH if h.name != "valley"} | {OTHER_BUILD: "pgen"}  # valley is too small
    for name, kind in formats.items():
        files = made.site(name) / ("genotypes.vcf.gz" if kind == "vcf" else "genotypes")
        build = "GRCh37" if name == OTHER_BUILD else "GRCh38"
        home = site(tmp_path / name, files, build, made.site(name) / "phenotypes.csv")
        ingested(home, panel=made.folder / "panel.tsv")
        account = freeze.freeze(home, home.config(), study, "ab" * 32)
        assert account.ready and account.variants["absent"] == account.variants["allele_mismatch"] == 0
        frozen = np.load(home.dataset("main") / "cohorts" / ("ab" * 32) / "dosage.npy")
        table = list(csv.DictReader((made.site(name) / "phenotypes.csv").open()))
        removed = json.loads((home.dataset("main") / "genotypes/removed.json").read_text())
        gone = {f"{table[0]['patient'].rsplit('-', 1)[0]}-{row + 1:05d}" for rows in removed.values() for row in rows}
        rows = [person[patient] for patient in sorted(row["patient"] for row in table) if patient not in gone]
        assert len(rows) == account.patients > 0.9 * len(table)
        for j, variant in enumerate(study.variants):
            truth = dosages[rows, loci.index(variant.id)]
            truth = truth if variant.effect == alternative[variant.id] else 2 - truth
            called = frozen[:, j] >= 0
            assert called.mean() > 0.9
            np.testing.assert_array_equal(frozen[called, j], truth[called])


@pytest.mark.slow
def test_populations_and_frequencies_are_those_of_the_published_demography() -> None:
    seen = []
    for seed in range(4):
        drawn = genomes(seed, {"AFR": 500, "EUR": 1500, "EAS": 500}, 20, 150_000)
        f = [drawn.dosages[drawn.population == i].mean(axis=0) / 2 for i in range(len(POPULATIONS))]
        size = [1000, 3000, 1000]

        def fst(a: int, b: int, f: list[np.ndarray] = f, size: list[int] = size) -> float:
            over = (f[a] - f[b]) ** 2 - f[a] * (1 - f[a]) / (size[a] - 1) - f[b] * (1 - f[b]) / (size[b] - 1)
            return float(over.sum() / (f[a] * (1 - f[b]) + f[b] * (1 - f[a])).sum())

        whole = drawn.dosages.mean(axis=0) / 2
        rare = float(np.mean(np.minimum(whole, 1 - whole) < 0.05))
        palindromic = float(np.mean([locus.is_palindromic for locus in drawn.loci]))
        seen.append([fst(0, 1), fst(0, 2), fst(1, 2), rare, palindromic])
    # spec/genomics.md, section 10, +-.02; the mean of four short genomes has a standard error of about .007
    got = np.mean(seen, axis=0)
    np.testing.assert_allclose(got[:3], [0.157, 0.160, 0.094], atol=0.03)
    assert got[3] == pytest.approx(0.56, abs=0.06) and got[4] == pytest.approx(0.072, abs=0.02)


def test_linkage_of_europeans_falls_with_distance_as_in_the_specification() -> None:
    drawn = genomes(5, {"EUR": 500}, 8, 300_000)
    f = drawn.dosages.mean(axis=0) / 2
    sums, counts = np.zeros(4), np.zeros(4)
    bins = ((0, 1e3), (5e3, 2e4), (5e4, 1e5), (1e5, 3e5))
    for chromosome in range(1, 9):
        here = np.flatnonzero(
            (np.minimum(f, 1 - f) > 0.05) & np.array([locus.chromosome == str(chromosome) for locus in drawn.loci])
        )
        place = np.array([drawn.loci[j].position for j in here])
        x = drawn.dosages[:, here].astype(float)
        x = (x - x.mean(axis=0)) / x.std(axis=0)
        r2 = (x.T @ x / len(x)) ** 2
        apart = place[None, :] - place[:, None]
        for b, (low, high) in enumerate(bins):
            inside = (apart > low) & (apart <= high)
            sums[b] += r2[inside].sum()
            counts[b] += inside.sum()
    mean = sums / counts
    assert (np.diff(mean) < 0).all()
    # the specification's figures are of longer genomes; eight short ones spread by about a third. Its last bin ends at
    # 500 kb, further than these chromosomes reach, so it is compared with the others only
    np.testing.assert_allclose(mean[:3], [0.51, 0.31, 0.086], rtol=0.45)


def test_the_command_writes_the_same_bytes_twice_and_never_over_something(tmp_path: Path) -> None:
    runner = CliRunner()

    def run(name: str, *more: str) -> dict[str, str]:
        arguments = ["simulate", str(tmp_path / name), "--people", "250", "--chromosomes", "2", "--length-kb", "150"]
        ended = runner.invoke(app, [*arguments, "--json", *more])
        assert ended.exit_code == 0, ended.output
        answer = json.loads(ended.stdout.splitlines()[-1])
        assert set(answer["people"]) == {"north", "lake", "metro", "harbor", "valley"}
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file() and p.suffix != ".npz")
        return {str(p.relative_to(tmp_path / name)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    one, two, rough = run("a", "--rough"), run("b", "--rough"), run("c")
    assert one == two and "lake/genotypes.vcf.gz" in one and "lake/genotypes.bed" in rough
    refused = runner.invoke(app, ["simulate", str(tmp_path / "a")])
    assert isinstance(refused.exception, StudyError) and "not empty" in refused.exception.message
