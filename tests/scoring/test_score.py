"""`sequester-client score` as a hospital uses it: switched off, refusals by name, reports of patients, and no way out."""

from __future__ import annotations

import ast
import gzip
import json
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from scipy import stats
from typer.testing import CliRunner

import contracts
from genome.files import DATA, needs_data
from genome.sites import ingested
from scoring.hospital import NOW, applied, hospital, scoring_text
from sequester.client.cli import score as command
from sequester.client.compute.genome.panel import load
from sequester.client.compute.genome.plink import PlinkFiles
from sequester.client.config import Home
from sequester.client.ingest.freeze import exclude
from sequester.client.scoring.apply import Wish, apply
from sequester.client.scoring.scoring_file import check_complex, read
from sequester.protocols.errors import SequesterError, SiteError, StudyError
from sequester.protocols.signing import open_document, sign_document
from sequester.protocols.study import parse_study, study_json
from sequester.simulate.plink import Line, write_bed

PGS = DATA / "pgs_catalog"
ROOT = Path(__file__).resolve().parents[2]
PEOPLE = [f"Jansen-{i:03d}" for i in range(60)]
PLACES = [Line("1", f"v{j}", 1000 + 10 * j, "AC"[j % 2], "GT"[j % 2]) for j in range(20)]  # A/G and C/T


def counts(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).choice(
        np.array([0, 1, 2, -9], np.int8), (len(PEOPLE), 20), p=[0.5, 0.3, 0.15, 0.05]
    )


def small(root: Path, **scoring: str) -> tuple[Home, np.ndarray]:
    """A hospital of 60 people and 20 variants."""
    root.mkdir(parents=True)
    matrix = counts()
    write_bed(root / "g", PEOPLE, PLACES, matrix)
    return hospital(root, root / "g", "GRCh37", **scoring), matrix


def refused(home: Home, score: Path, out: Path, **wish: Any) -> SequesterError:
    with pytest.raises(SequesterError) as caught:
        apply(home, home.config(), Wish(score, out, **wish), NOW)
    assert "Jansen" not in caught.value.message + caught.value.hint and not out.exists()
    return caught.value


def additive(path: Path, **changed: Any) -> Path:
    """A score of all 20 variants, with frequencies; every third on the other strand, every second of the other allele."""
    turn = str.maketrans("ACGT", "TGCA")
    rows = []
    for j, v in enumerate(PLACES):
        effect, other = (v.counted, v.other) if j % 2 else (v.other, v.counted)
        if j % 3 == 0:
            effect, other = effect.translate(turn), other.translate(turn)
        rows.append((v.chromosome, v.position, effect, other, round(0.1 + 0.01 * j, 2), 0.3))
    path.write_text(scoring_text(rows, more=("allelefrequency_effect",), **changed))
    return path


def test_it_is_off_until_the_site_says_otherwise_and_somebody_answers(tmp_path: Path) -> None:
    home, _ = small(tmp_path / "h")
    score = additive(tmp_path / "s.txt")
    text = home.site_toml.read_text()
    home.site_toml.write_text(text.replace("enabled = true\n", ""))
    assert "switched off" in refused(home, score, tmp_path / "out").message
    home.site_toml.write_text(text.replace('signer = "Dr A. Keeper"\n', ""))
    assert "nobody answers" in refused(home, score, tmp_path / "out").message
    home.site_toml.write_text(text)
    apply(home, home.config(), Wish(score, tmp_path / "out"), NOW)
    with pytest.raises(SiteError, match="is there already"):
        apply(home, home.config(), Wish(score, tmp_path / "out"), NOW)


def test_strands_sides_and_missing_genotypes_give_the_sum_worked_out_by_hand(tmp_path: Path) -> None:
    home, matrix = small(tmp_path / "h")
    account, ours = applied(home, additive(tmp_path / "s.txt"), tmp_path / "out")
    x = np.where(matrix < 0, np.nan, matrix.astype(float))
    x[:, ::2] = 2 - x[:, ::2]  # rows of even j weigh the other allele
    wanted = np.where(np.isnan(x), 0.6, x) @ np.round(0.1 + 0.01 * np.arange(20), 2)
    np.testing.assert_allclose([float(ours[p]["score"]) for p in PEOPLE], wanted, rtol=1e-9)
    np.testing.assert_allclose([float(ours[p]["missing"]) for p in PEOPLE], (matrix < 0).mean(axis=1), atol=1e-6)
    assert {k: v for k, v in account["categories"].items() if v} == {
        "direct": 7,
        "swapped": 6,
        "flipped": 3,
        "flipped_swapped": 4,
    }
    assert account["frequencies"] == {"scoring file": 20} and account["weight_share"] == 1


def test_a_row_without_another_allele_is_matched_on_its_effect_allele_and_counted(tmp_path: Path) -> None:
    home, matrix = small(tmp_path / "h")
    rows = [
        ("1", 1000, "A", "", 1, 0.3),
        ("1", 1010, "G", "", 1, 0.3),
        ("1", 1020, "T", "", 1, 0.3),
        ("1", 1030, "A", "", 1, 0.3),
    ]
    (tmp_path / "s.txt").write_text(scoring_text(rows, more=("allelefrequency_effect",)))
    account, ours = applied(home, tmp_path / "s.txt", tmp_path / "out")
    # 1000 A/G: A is counted. 1010 C/T: G is C on the other strand. 1020 A/G: T is A. 1030 C/T: A is T, the other allele.
    x = np.where(matrix < 0, np.nan, matrix.astype(float))
    wanted = sum(np.where(np.isnan(c), 0.6, c) for c in (x[:, 0], x[:, 1], x[:, 2], 2 - x[:, 3]))
    np.testing.assert_allclose([float(ours[p]["score"]) for p in PEOPLE], wanted)
    assert account["by_effect_allele"] == account["matched"] == 4


def test_every_row_of_a_score_is_matched_or_named_with_its_reason(tmp_path: Path) -> None:
    home, _ = small(tmp_path / "h")
    rows = [
        ("1", 1000, "A", "G", 1, "False"), ("1", 1000, "A", "G", 1, "False"), ("1", "", "A", "G", 1, "False"),
        ("X", 1000, "A", "G", 1, "False"), ("1", 1010, "A", "G", 1, "False"), ("1", 999, "A", "G", 1, "False"),
        ("1", 1020, "A", "T", 1, "False"), ("1", 1030, "P", "N", 1, "False"), ("1", 1040, "A", "G", "", "False"),
        ("6", 1, "HLA-B*57:01", "", 2, "True"),
    ]  # fmt: skip
    path = tmp_path / "s.txt"
    path.write_text(scoring_text(rows, more=("is_haplotype",)))
    error = refused(home, path, tmp_path / "out")
    assert "2 of 10 rows" in error.message and "HLA-B*57:01" in error.message and "line 15" in error.message
    assert "2 of 10 variants" in refused(home, path, tmp_path / "out", rest=True).message
    account, _ = applied(home, path, tmp_path / "out", rest=True, min_overlap=0.05, frequencies="cohort")
    named = Counter(row["reason"] for row in [*account["set_aside"], *account["not_found"]])
    assert named == {
        "repeated": 1, "no_position": 1, "not_autosomal": 1, "allele_mismatch": 1, "absent": 1, "unreadable_alleles": 1,
        "no_weight": 1, "haplotype": 1,
    }  # fmt: skip
    assert account["matched"] + sum(named.values()) == account["rows"] == 10
    page = (tmp_path / "out/patients/000001.html").read_text()
    assert "1 haplotype" in page and "2 of 10 found here" in page


@needs_data
def test_eight_of_33_rows_of_pgs000021_are_complex_and_without_positions_it_is_refused_anyhow(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="does not say which build"):
        read(PGS / "complex_variants_PGS000021.txt", "GRCh37")
    lines = (PGS / "complex_variants_PGS000021.txt").read_text().splitlines()
    placed = ["#pgs_id=PGS000021", "#genome_build=GRCh37", lines[0] + "\tchr_name\tchr_position"]
    placed += [
        line + "\t" * (lines[0].count("\t") - line.count("\t")) + f"\t1\t{1000 + j}" for j, line in enumerate(lines[1:])
    ]
    (tmp_path / "s.txt").write_text("\n".join(placed) + "\n")
    score = read(tmp_path / "s.txt", "GRCh37")
    assert Counter(row.reason for row in score.complex) == {"diplotype": 5, "haplotype": 3} and len(score.rows) == 25
    with pytest.raises(SiteError, match=r"8 of 33 rows of PGS000021 .*HLA-DRB1\*15"):
        check_complex(score, rest=False)
    check_complex(score, rest=True)


@needs_data
def test_a_file_of_no_build_is_refused_and_its_harmonised_copy_is_read_in_that_build() -> None:
    with pytest.raises(SiteError, match="genome_build=NR"):
        read(PGS / "PGS000001.txt.gz", "GRCh38")
    for build in ("GRCh37", "GRCh38"):
        score = read(PGS / f"PGS000001_hmPOS_{build}.txt.gz", "GRCh38")
        assert (score.build, score.id, len(score.rows), score.set_aside) == (build, "PGS000001", 77, ())
    with pytest.raises(SiteError, match="does not say which build"):
        read(PGS / "PGS001229_hmPOS_GRCh38.txt.gz", "GRCh38")


def test_real_files_are_read_as_pgscatalog_core_reads_them() -> None:
    if not PGS.exists():
        pytest.skip("SEQUESTER_DATA is not there")
    from pgscatalog.core import ScoringFile as Theirs

    for name in ("PGS000001_hmPOS_GRCh38.txt.gz", "PGS000802_hmPOS_GRCh37.txt"):
        ours = read(PGS / name, "GRCh38")
        theirs = list(Theirs(str(PGS / name)).variants)
        assert len(ours.rows) == len(theirs)
        for a, b in zip(ours.rows, theirs, strict=True):
            assert (a.effect, a.other, a.weight) == (str(b.effect_allele), str(b.other_allele), float(b.effect_weight))
            assert a.kind == ("dominant" if b.is_dominant else "recessive" if b.is_recessive else "additive")


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.words = ""

    def handle_data(self, text: str) -> None:
        self.words += text

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]


@pytest.fixture(scope="module")
def real(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Home, Path, dict[str, Any], dict[str, dict[str, str]], Path]:
    """HapMap 3 (NCBI36) as the hospital, 1000 Genomes phase 1 (GRCh37) as the public reference, a score in GRCh37."""
    if not DATA.exists():
        pytest.skip("SEQUESTER_DATA is not there")
    root = tmp_path_factory.mktemp("real")
    data = DATA / "hapmap3_1kg"
    hm3 = PlinkFiles(str(data / "HM3_thinned_autosomal_overlap"))
    (root / "h").mkdir()
    table = root / "p.csv"
    table.write_text(
        "patient,age,sex\n" + "".join(f"{s},{40 + i % 30},{'fm'[i % 2]}\n" for i, s in enumerate(hm3.samples))
    )
    home = hospital(
        root / "h", data / "HM3_thinned_autosomal_overlap", "NCBI36", f'phenotypes = "{table}"\n',
        reference=str(data / "1kg.ref.phase1_release_v3.20101123_thinned_autosomal_overlap"),
        reference_labels=str(data / "sample_labels.csv"), reference_build="GRCh37",
    )  # fmt: skip
    ingested(home)
    panel = load()
    rng = np.random.default_rng(7)
    usable = np.flatnonzero((panel.position["NCBI36"] > 0) & ~panel.palindromic)
    rows = []
    for r in np.sort(rng.choice(usable, 500, replace=False)):
        pair = (panel.alt[r], panel.ref[r]) if rng.random() < 0.5 else (panel.ref[r], panel.alt[r])
        rows.append((int(panel.code[r]), int(panel.position["GRCh37"][r]), *pair, f"{rng.normal() * 0.05:.4f}"))
    score = root / "s.txt"
    score.write_text(scoring_text(rows))
    rates = root / "rates.csv"
    rates.write_text(
        "sex,age,incidence,mortality\n" + "".join(f"{s},{a},0.004,0.002\n" for s in "fm" for a in range(30, 90))
    )
    account, ours = applied(home, score, root / "out", incidence=rates, effect="1.6,1.5,1.7", years=10)
    return home, score, account, ours, root / "out"


@needs_data
def test_real_people_get_percentiles_in_their_own_population_from_a_public_reference(real: Any) -> None:
    home, _, account, ours, _ = real
    assert account["matched"] == 500 == account["reference"]["shared"] and account["reference"]["components"] == 2
    assert account["left_out"]["quality"] + account["patients"] == 957 and account["patients"] > 900
    labels = {}
    for line in (DATA / "hapmap3_1kg/sample_labels.csv").read_text().splitlines()[1:]:
        dataset, _, iid, _, superpopulation = line.split(",")
        if dataset == "HM3":
            labels[iid] = superpopulation
    reference = set(PlinkFiles(home.config().scoring.reference).samples)  # type: ignore[arg-type]
    new = [p for p in ours if p not in reference and labels.get(p) not in (None, "", "SAS")]
    right = np.mean([ours[p]["population"] == labels[p] for p in new])
    assert (
        len(new) > 200 and right > 0.93
    )  # two components separate four populations, not five; South Asians have no one
    z = np.array([[float(ours[p][c]) for c in ("z_norm1", "z_norm2")] for p in ours])
    assert np.abs(z.mean(axis=0)).max() < 0.2 and np.abs(z.std(axis=0) - 1).max() < 0.15
    raw = np.array([float(ours[p]["score"]) for p in ours])
    groups = np.array([ours[p]["population"] for p in ours])
    raw_spread = np.std([raw[groups == g].mean() for g in ("AFR", "EUR", "EAS")]) / raw.std()
    z_spread = np.std([z[groups == g, 1].mean() for g in ("AFR", "EUR", "EAS")])
    assert z_spread < raw_spread / 2  # what ancestry alone explains is taken away
    percentiles = np.array([float(ours[p]["percentile"]) for p in ours])
    assert stats.kstest(percentiles / 100, "uniform").statistic < 0.12
    for row in ours.values():
        assert float(row["low"]) <= float(row["percentile"]) <= float(row["high"])


@needs_data
def test_scores_through_the_store_equal_a_plain_sum_over_the_raw_file(real: Any) -> None:
    """The file is in NCBI36, the score in GRCh37: joined here by the rs id that both .bim files carry, and nowhere else."""
    home, score, _, ours, _ = real
    raw = PlinkFiles(home.config().data.genotypes)  # type: ignore[arg-type]
    new = (DATA / "hapmap3_1kg/1kg.ref.phase1_release_v3.20101123_thinned_autosomal_overlap.bim").read_text()
    name_at = {(f[0], f[3]): f[1] for f in (line.split() for line in new.splitlines())}
    entry = {str(v.id): j for j, v in enumerate(raw.variants)}
    panel = load()
    frequency = {name: float(f) for name, f in zip(panel.id, panel.mean_frequency, strict=True) if name}
    alt = dict(zip(panel.id, panel.alt, strict=True))
    total = np.zeros(len(raw.samples))
    for line in read(score, "GRCh37").rows:
        name = name_at[str(line.code), str(line.position)]
        v = raw.variants[entry[name]]
        g = raw.counts([entry[name]])[:, 0].astype(float)
        f = frequency[name] if alt[name] == line.effect else 1 - frequency[name]
        copies = g if v.counted == line.effect else 2 - g
        total += line.weight * np.where(g < 0, 2 * f, copies)
    plain = dict(zip(raw.samples, total, strict=True))
    for person, row in ours.items():
        assert float(row["score"]) == pytest.approx(plain[person], abs=1e-7)


@needs_data
def test_the_page_of_a_patient_has_no_sum_loads_nothing_and_says_what_it_is_not(real: Any) -> None:
    _, _, account, ours, out = real
    person, row = next(iter(ours.items()))
    page = _Page()
    page.feed((out / row["page"]).read_text())
    assert page.links == [] and "script" not in page.tags
    for words in (person, "Not for diagnosis", "PGS999999", "500 of 500", row["population"], "Dr A. Keeper", "95 % interval",
                  "often disagree", "within 10 years", "2026-11-24T12:00:00Z"):  # fmt: skip
        assert words in page.words, words
    assert row["score"][:6] not in page.words  # percentiles on paper, never the sum
    others = [p for p in list(ours)[1:] if len(p) > 5]
    assert not any(p in page.words for p in others)
    for path in out.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0 or path.is_dir()
    text = (out / "account.json").read_text()
    assert not any(p in text for p in ours) and account["patients"] == len(ours)


@needs_data
def test_a_risk_assessment_has_the_fields_of_r4_with_ranges_in_percent(real: Any) -> None:
    _, _, _, ours, out = real
    lines = (out / "RiskAssessment.ndjson").read_text().splitlines()
    assert len(lines) == len(ours)
    allowed = {
        "resourceType", "id", "contained", "identifier", "basedOn", "parent", "status", "method", "code", "subject",
        "encounter", "occurrenceDateTime", "occurrencePeriod", "condition", "performer", "reasonCode", "reasonReference",
        "basis", "prediction", "mitigation", "note",
    }  # fmt: skip  # https://hl7.org/fhir/R4/riskassessment.html
    for line, (person, row) in zip(lines, ours.items(), strict=True):
        resource = json.loads(line)
        assert (
            set(resource) <= allowed
            and resource["status"] == "final"
            and resource["subject"]["reference"] == f"Patient/{person}"
        )
        [prediction] = resource["prediction"]
        low, high = (prediction["probabilityRange"][end] for end in ("low", "high"))
        assert low["code"] == high["code"] == "%" and 0 <= low["value"] <= high["value"] <= 100  # ras-2, rng-2
        assert low["value"] <= 100 * float(row["risk"]) + 1e-3 and 100 * float(row["risk"]) <= high["value"] + 1e-3
        when = prediction["whenRange"]
        assert when["high"]["value"] - when["low"]["value"] == 10 and prediction["relativeRisk"] > 0
        assert resource["basis"] == [{"reference": "#score"}] and resource["contained"][0]["id"] == "score"
        values = [part["valueQuantity"]["value"] for part in resource["contained"][0]["component"]]
        assert values == pytest.approx([float(row[c]) for c in ("z_norm1", "z_norm2", "percentile")], abs=5e-3)
        assert "Not for diagnosis" in resource["note"][0]["text"]


def test_opt_outs_are_not_scored_and_a_list_chooses(tmp_path: Path) -> None:
    home, _ = small(tmp_path / "h")
    (tmp_path / "out.txt").write_text(PEOPLE[3] + "\n")
    exclude(home, home.config(), tmp_path / "out.txt", "withdrew")
    (tmp_path / "some.txt").write_text("\n".join(PEOPLE[:10]) + "\n")
    account, ours = applied(home, additive(tmp_path / "s.txt"), tmp_path / "o", patients=tmp_path / "some.txt")
    assert list(ours) == PEOPLE[:3] + PEOPLE[4:10]
    assert account["left_out"] == {"not_listed": 50, "excluded": 1, "quality": 0}
    (tmp_path / "some.txt").write_text("Jansen-999\n")
    assert "1 of 1 listed" in refused(home, tmp_path / "s.txt", tmp_path / "p", patients=tmp_path / "some.txt").message


def test_without_a_reference_there_is_a_sum_and_a_sentence_and_no_percentile(tmp_path: Path) -> None:
    home, _ = small(tmp_path / "h")
    account, ours = applied(home, additive(tmp_path / "s.txt"), tmp_path / "out")
    assert {row["percentile"] for row in ours.values()} == {""}
    percentile, risk = account["not_done"]
    assert percentile == "No percentile: site.toml names no public reference." and risk.startswith("No absolute risk")
    assert "no public reference" in (tmp_path / "out/patients/000001.html").read_text()
    resource = json.loads((tmp_path / "out/RiskAssessment.ndjson").read_text().splitlines()[0])
    assert "contained" not in resource and "probabilityRange" not in resource["prediction"][0]


def test_a_missing_genotype_without_a_frequency_is_refused_by_the_variant_s_name(tmp_path: Path) -> None:
    home, _ = small(tmp_path / "h")
    (tmp_path / "s.txt").write_text(scoring_text([("1", v.position, v.counted, v.other, 1) for v in PLACES]))
    assert "1:1000: genotypes are missing" in refused(home, tmp_path / "s.txt", tmp_path / "out").message


def test_a_score_in_another_build_than_the_files_is_refused_and_not_lifted(tmp_path: Path) -> None:
    home, _ = small(tmp_path / "h")
    error = refused(home, additive(tmp_path / "s.txt", build="GRCh38"), tmp_path / "out")
    assert "the score PGS999999 is in GRCh38, site.toml declares GRCh37" in error.message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no table", "no columns effect_allele"),
        (scoring_text([("1", "x", "A", "G", 1)]), "line 6: the position"),
        (scoring_text([("1", 1000, "A", "G", "heavy")]), "line 6: the effect weight is not a number"),
        (scoring_text([("1", 1000, "A", "G", "nan")]), "line 6: the effect weight is not a number"),
        (scoring_text([("1", 1000, "A", "G", 1, 7)], more=("allelefrequency_effect",)), "line 6: the allele frequency"),
    ],
)  # fmt: skip
def test_a_wrong_scoring_file_is_refused_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    home, _ = small(tmp_path / "h")
    (tmp_path / "s.txt").write_text(text)
    assert said in refused(home, tmp_path / "s.txt", tmp_path / "out").message


def results(folder: Path, digest: str | None = None) -> Path:
    """A results folder as the exchange hands it over: the study, its results, and the model's scoring file."""
    study = contracts.study(
        genome_build="GRCh37",
        variants=[{"id": v.id, "chromosome": "1", "position": v.position, "effect": v.counted, "other": v.other,
                   "frequency": "0.3"} for v in PLACES],
    )  # fmt: skip
    from sequester.protocols import privacy
    from sequester.server.report.scoring_file import scoring_file

    own = privacy.study_digest(study)
    folder.mkdir()
    (folder / "study.json").write_bytes(sign_document("study", study_json(study), contracts.COORDINATOR))
    weights = [{"name": "age", "kind": "covariate", "standardised": 1, "per_unit": 0.1}]
    (folder / "results.json").write_text(
        json.dumps({"study": own, "analyses": {"score": {"result": {"weights": weights}}}})
    )
    data = scoring_file(study, digest or own, {v.id: 0.25 for v in PLACES}, "3")
    assert data is not None
    (folder / "risk_scoring_file.txt.gz").write_bytes(data)
    return folder


def test_a_study_s_own_model_is_applied_from_its_results_folder_and_covariates_are_named(tmp_path: Path) -> None:
    home, matrix = small(tmp_path / "h")
    account, ours = applied(home, results(tmp_path / "r"), tmp_path / "out")
    wanted = np.where(matrix < 0, 0.6, matrix) @ np.full(20, 0.25)
    np.testing.assert_allclose([float(ours[p]["score"]) for p in PEOPLE], wanted, rtol=1e-9)
    assert account["not_done"][-1] == "The model also uses age; this is its genetic part."
    error = refused(home, results(tmp_path / "other", "ab" * 32), tmp_path / "no")
    assert isinstance(error, StudyError) and "are not of one study" in error.message
    assert "is no results folder" in refused_without(home, tmp_path)


def test_a_head_is_applied_by_the_name_of_its_group_and_says_for_whom_it_is(tmp_path: Path) -> None:
    from sequester.server.report.scoring_file import scoring_file

    home, matrix = small(tmp_path / "h")
    folder = results(tmp_path / "r")
    study = parse_study(open_document((folder / "study.json").read_bytes(), "study", None).body_bytes)
    told = json.loads((folder / "results.json").read_text())
    own = [{"name": "age", "kind": "covariate", "standardised": 1, "per_unit": 0.2}]
    told["analyses"]["heads"] = {"result": {"groups": {"AFR": {"weights": own}, "EUR": {"weights": []}}}}
    (folder / "results.json").write_text(json.dumps(told))
    for group, weight in (("AFR", 0.1), ("EUR", 0.5)):
        more = ["#analysis=heads", "#group_column=ancestry", f"#group={group}"]
        data = scoring_file(study, told["study"], {v.id: weight for v in PLACES}, "3", more)
        assert data is not None
        (folder / f"risk_heads_{group}_scoring_file.txt.gz").write_bytes(data)
    copies = np.where(matrix < 0, 0.6, matrix).sum(axis=1)
    for wish, weight in (({}, 0.25), ({"group": "AFR"}, 0.1), ({"group": "EUR", "analysis": "heads"}, 0.5)):
        account, ours = applied(home, folder, tmp_path / f"out{weight}", **wish)
        np.testing.assert_allclose([float(ours[p]["score"]) for p in PEOPLE], weight * copies, rtol=1e-9)
        alone = "for patients of that group alone, whom `--patients` names."
        assert any(said.endswith(alone) for said in account["not_done"]) == ("group" in wish)
        assert any("also uses age" in said for said in account["not_done"]) == (weight < 0.5)
    error = refused(home, folder, tmp_path / "no", group="SAS")
    assert "no head of group `SAS`" in error.message and error.hint == "there are heads of: AFR, EUR"
    assert "is no head of group" in refused(home, additive(tmp_path / "s.txt"), tmp_path / "no", group="AFR").message


def refused_without(home: Home, tmp_path: Path) -> str:
    (tmp_path / "other/study.json").unlink()
    return refused(home, tmp_path / "other", tmp_path / "no").message


def test_the_command_prints_counts_and_nobody_and_about_says_what_the_law_asks(tmp_path: Path) -> None:
    home, _ = small(tmp_path / "h")
    app = typer.Typer()
    app.command("other")(lambda: None)
    command.register(app)
    runner = CliRunner(env={"SEQUESTER_HOME": str(home.root), "COLUMNS": "200"})
    about = runner.invoke(app, ["score", "--about"]).output
    assert "2017/745" in about and "Not for diagnosis" in about
    said = runner.invoke(app, ["score", str(additive(tmp_path / "s.txt")), "--out", str(tmp_path / "out")])
    assert said.exit_code == 0, said.output
    assert "20 (100.0% of the weight)" in said.output and "Jansen" not in said.output
    answer = json.loads(
        runner.invoke(app, ["score", str(tmp_path / "s.txt"), "--out", str(tmp_path / "o2"), "--json"]).output
    )
    assert answer["matched"] == 20 and "Jansen" not in json.dumps(answer)
    (tmp_path / "s.txt").with_suffix(".gz").write_bytes(gzip.compress(b"x")[:-4])
    cut = runner.invoke(app, ["score", str(tmp_path / "s.gz"), "--out", str(tmp_path / "o3")])
    assert isinstance(cut.exception, SiteError) and "cannot be read" in cut.exception.message


def test_a_name_that_looks_like_a_formula_or_a_tag_stays_text(tmp_path: Path) -> None:
    people = ["=1+1", "<script>x</script>", *PEOPLE[2:]]
    root = tmp_path / "h"
    root.mkdir()
    write_bed(root / "g", people, PLACES, counts())
    home = hospital(root, root / "g", "GRCh37")
    apply(home, home.config(), Wish(additive(tmp_path / "s.txt"), tmp_path / "out"), NOW)
    assert (tmp_path / "out/scores.tsv").read_text().splitlines()[1].startswith("'=1+1\t")
    assert "<script>x" not in (tmp_path / "out/patients/000002.html").read_text()


NETWORK = {"socket", "ssl", "http", "urllib", "smtplib", "ftplib", "asyncio", "grpc", "flwr", "httpx", "requests"}


def test_scoring_imports_no_network_and_neither_gate_nor_compute_imports_scoring() -> None:
    client = ROOT / "client/sequester/client"

    def imported(path: Path) -> set[str]:
        names = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module)
        return names

    for path in (client / "scoring").glob("*.py"):
        names = imported(path)
        assert not {name.split(".")[0] for name in names} & NETWORK, path.name
        assert not any(name.startswith(("sequester.client.gate", "sequester.client.socket")) for name in names), (
            path.name
        )
    for folder in ("gate", "compute", "ingest"):
        for path in (client / folder).rglob("*.py"):
            assert not any("scoring" in name.split(".") for name in imported(path)), path
    program = "import sys, sequester.client.scoring.apply; print(*{'grpc', 'flwr', 'torch', 'sequester.client.gate'} & "
    program += "set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    assert said.stdout.split() == []
