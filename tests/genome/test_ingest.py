"""`data ingest` and `data report`: whole or absent, the same bytes twice, resumable by file, and the cohort that follows."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import contracts
from genome.files import DATA, bgzip, matrix_vcf, needs_data, quiet, twin_vcf, vcf_text
from genome.sites import ingested, site
from sequester.client.cli import data
from sequester.client.compute.cohort import StoredCohort
from sequester.client.compute.genome.panel import load
from sequester.client.compute.genome.plink import PlinkFiles
from sequester.client.config import Home, genotype_files
from sequester.client.ingest import freeze
from sequester.client.ingest.genotypes import Choices, ingest
from sequester.client.ingest.report import CATEGORIES
from sequester.protocols.errors import SiteError
from sequester.simulate.plink import Line

pytestmark = pytest.mark.slow  # every ingest starts processes
N = 120


def panel_lines(build: str, count: int, start: int = 0) -> tuple[list[Line], np.ndarray]:
    """Non-palindromic rows of the bundled panel as lines of a file that counts ALT, and their panel rows."""
    panel = load()
    rows = np.flatnonzero((panel.position[build] > 0) & ~panel.palindromic)[start : start + count]
    lines = [
        Line(f"chr{panel.code[r]}", f"v{r}", int(panel.position[build][r]), panel.alt[r], panel.ref[r]) for r in rows
    ]
    return lines, rows


def two_files(folder: Path, seed: int = 1) -> np.ndarray:
    """Two VCF files of 120 people in GRCh37, the second in another order of people; counts (people, variants)."""
    lines, _ = panel_lines("GRCh37", 600)
    counts = np.random.default_rng(seed).integers(0, 3, (N, 600)).astype(np.int8)
    people = [f"p{i:03d}" for i in range(N)]
    matrix_vcf(folder / "a.vcf.gz", people, lines[:300], counts[:, :300])
    matrix_vcf(folder / "b.vcf.gz", people[::-1], lines[300:], counts[::-1, 300:])
    return counts


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_many_files_become_one_store_and_the_same_files_the_same_bytes(tmp_path: Path) -> None:
    counts = two_files(tmp_path)
    home = site(tmp_path / "h", tmp_path / "*.vcf.gz", "GRCh37")
    account = ingested(home)
    files = PlinkFiles(str(home.dataset("main") / "genotypes/genotypes"))
    np.testing.assert_array_equal(files.counts(range(600)), counts)
    assert account["rows"] == account["entries"] == 600 and account["entry_categories"]["direct"] == 600
    before = tree(home.dataset("main"))
    ingested(home)
    assert tree(home.dataset("main")) == before
    other = site(tmp_path / "i", tmp_path / "*.vcf.gz", "GRCh37")
    ingested(other)
    assert tree(other.dataset("main") / "genotypes") == tree(home.dataset("main") / "genotypes")
    assert not list(home.dataset("main").rglob("*.new"))


def test_a_file_that_was_finished_is_not_read_again_and_a_changed_one_is(tmp_path: Path) -> None:
    two_files(tmp_path)
    home = site(tmp_path / "h", tmp_path / "*.vcf.gz", "GRCh37")
    good = (tmp_path / "b.vcf.gz").read_bytes()
    (tmp_path / "b.vcf.gz").write_bytes(good[:-28])
    seen: list[str] = []

    def watch(what: str, done: int, total: int) -> None:
        seen.append(what)

    with pytest.raises(SiteError, match=r"b\.vcf\.gz does not end"):
        ingest(home, home.config(), Choices(), watch)
    assert "reading a.vcf.gz" in seen
    (tmp_path / "b.vcf.gz").write_bytes(good)
    seen.clear()
    ingest(home, home.config(), Choices(), watch)
    assert "reading b.vcf.gz" in seen and "reading a.vcf.gz" not in seen
    two_files(tmp_path, seed=2)
    seen.clear()
    ingest(home, home.config(), Choices(), watch)
    assert "reading a.vcf.gz" in seen
    assert len(list((home.dataset("main") / "parts").iterdir())) == 2  # the old parts are gone
    part = next((home.dataset("main") / "parts").iterdir())
    (part / "genotypes.pvar").write_text("changed")
    seen.clear()
    ingest(home, home.config(), Choices(), watch)
    assert len([what for what in set(seen) if what.startswith("reading ") and "vcf" in what]) == 1


def test_an_ingest_that_is_killed_leaves_no_store_and_goes_on_where_it_was(tmp_path: Path) -> None:
    two_files(tmp_path)
    home = site(tmp_path / "h", tmp_path / "*.vcf.gz", "GRCh37")
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom sequester.client.config import Home\n"
        "from sequester.client.ingest.genotypes import Choices, ingest\n"
        "def stop(what, done, total):\n    if what.startswith('writing'):\n        os.killpg(0, signal.SIGKILL)\n"
        "if __name__ == '__main__':\n"
        "    home = Home(Path(sys.argv[1]))\n    ingest(home, home.config(), Choices(), stop)\n"
    )
    (tmp_path / "run.py").write_text(script)
    ended = subprocess.run(
        [sys.executable, tmp_path / "run.py", home.root], check=False, timeout=120, start_new_session=True
    )
    assert ended.returncode == -9 and not (home.dataset("main") / "genotypes").exists()
    assert len(list((home.dataset("main") / "parts").glob("*/part.json"))) == 2
    assert ingested(home)["verdict"]["ready"]


def test_files_of_other_people_are_refused_by_counts(tmp_path: Path) -> None:
    lines, _ = panel_lines("GRCh37", 300)
    counts = np.zeros((10, 300), np.int8)
    matrix_vcf(tmp_path / "a.vcf.gz", [f"p{i}" for i in range(10)], lines, counts)
    matrix_vcf(tmp_path / "b.vcf.gz", [f"p{i}" for i in range(1, 11)], lines, counts)
    with pytest.raises(SiteError, match="file 2 of 2 holds 10 people, the first 10; 9 are in both"):
        ingested(site(tmp_path / "h", tmp_path / "*.vcf.gz", "GRCh37"))


def test_only_the_panel_is_the_same_store_as_filtering_afterwards(tmp_path: Path) -> None:
    lines, _ = panel_lines("GRCh37", 400)
    others = [Line("1", f"own{j}", 500 + j, "A", "G") for j in range(50)]
    counts = np.random.default_rng(3).integers(0, 3, (N, 450)).astype(np.int8)
    matrix_vcf(tmp_path / "a.vcf", [f"p{i}" for i in range(N)], [*others, *lines], counts)
    stores = {}
    for only in (False, True):
        home = site(tmp_path / f"h{only}", tmp_path / "a.vcf", "GRCh37")
        account = ingested(home, only_panel=only)
        assert account["entry_categories"]["not_in_list"] == 50
        stores[only] = home.dataset("main") / "genotypes"
    whole, part = (PlinkFiles(str(stores[only] / "genotypes")) for only in (False, True))
    kept = np.flatnonzero(np.load(stores[False] / "panel_row.npy") >= 0)
    assert whole.variants.take(kept) == part.variants and len(whole.variants) == 450
    np.testing.assert_array_equal(whole.counts(kept.tolist()), part.counts(range(400)))


@needs_data
def test_the_23_real_files_of_1000_genomes_are_ingested_completely(tmp_path: Path) -> None:
    rows, seen = ["chromosome\tNCBI36\tGRCh37\tGRCh38\tref\talt\tref_known\tid"], 0
    for chromosome in range(1, 23):  # a panel of every third variant of the files themselves
        keys, _ = twin_vcf(DATA / f"kg_phase3_vcf/1KG_phase3_subset_chr{chromosome}.vcf.gz")
        seen += len(keys)
        for c, position, alt, ref in keys[::3]:
            if set(alt + ref) <= set("ACGT"):
                rows.append(f"{c}\t\t{position}\t\t{ref}\t{alt}\t1\t")
    (tmp_path / "panel.tsv").write_text("\n".join(rows) + "\n")
    home = site(tmp_path / "h", DATA / "kg_phase3_vcf/*.vcf.gz", "GRCh37")
    account = ingested(home, panel=tmp_path / "panel.tsv")
    x, _ = twin_vcf(DATA / "kg_phase3_vcf/1KG_phase3_subset_chrX.vcf.gz")
    assert account["entries"] == seen + len(x) == sum(account["entry_categories"].values())
    texts = [gzip.decompress(path.read_bytes()).decode() for path in DATA.glob("kg_phase3_vcf/*.vcf.gz")]
    alternatives = [
        line.split("\t", 5)[4].count(",") + 1 for text in texts for line in text.splitlines() if line[0] != "#"
    ]
    assert account["rows"] == len(alternatives) and account["split"] == sum(n for n in alternatives if n > 1)
    assert account["people"]["in_files"] == 100 and account["build_found"] == "GRCh37" and len(account["sources"]) == 23
    assert account["panel_categories"]["absent"] == 0 and account["panel_categories"]["allele_mismatch"] == 0
    assert (
        account["split"] > 0
        and account["entry_categories"]["symbolic"] > 0
        and account["entry_categories"]["indel"] > 0
    )
    files = PlinkFiles(str(home.dataset("main") / "genotypes/genotypes"))
    index = {(v.chromosome, v.position, v.counted, v.other): j for j, v in enumerate(files.variants)}
    for chromosome in (1, 7, 22):
        keys, copies = twin_vcf(DATA / f"kg_phase3_vcf/1KG_phase3_subset_chr{chromosome}.vcf.gz")
        here = [(index[key], j) for j, key in enumerate(keys) if key in index]
        assert len(here) > 0.8 * len(keys)
        np.testing.assert_array_equal(files.counts([a for a, _ in here]).T, copies[[b for _, b in here]])


@needs_data
def test_the_panel_decides_which_allele_of_a_real_bgen_file_is_the_reference(tmp_path: Path) -> None:
    tiny = DATA / "pgs_catalog/tiny1000G"
    keys, _ = twin_vcf(tiny.with_suffix(".vcf.gz"))
    rows = ["chromosome\tNCBI36\tGRCh37\tGRCh38\tref\talt\tref_known\tid"]
    rows += [f"{c}\t\t\t{p}\t{ref}\t{alt}\t1\t" for c, p, alt, ref in keys[::2] if c != "X"]
    (tmp_path / "panel.tsv").write_text("\n".join(rows) + "\n")
    stores = []
    for suffix in (".vcf.gz", ".bgen"):
        home = site(tmp_path / suffix, f"{tiny}{suffix}", "GRCh38")
        account = ingested(home, panel=tmp_path / "panel.tsv")
        assert account["people"]["in_files"] == 3202 and account["entries"] == 1004
        stores.append(PlinkFiles(str(home.dataset("main") / "genotypes/genotypes")))
    vcf, bgen = stores
    # half the variants are in no panel: their REF, too, is that of the VCF
    assert vcf.variants == bgen.variants and len(vcf.variants) > 950
    autosomal = np.flatnonzero(vcf.variants.code <= 22).tolist()
    np.testing.assert_array_equal(vcf.counts(autosomal), bgen.counts(autosomal))


def study_of(rows: np.ndarray, build: str, **changed: Any) -> Any:
    panel = load()
    listed = [
        {"id": f"s{r}", "chromosome": str(panel.code[r]), "position": int(panel.position[build][r]), "effect": panel.ref[r],
         "other": panel.alt[r], "frequency": "0.5"}
        for r in rows
    ]  # fmt: skip
    return contracts.study(**{"covariates": [], "cohort": {}, "variants": listed, "genome_build": build, **changed})


def table(path: Path, people: list[str]) -> Path:
    path.write_text("patient,case\n" + "".join(f"{p},{i % 2}\n" for i, p in enumerate(people)))
    return path


def dosages(home: Home, digest: str) -> np.ndarray:
    return np.load(home.dataset("main") / "cohorts" / digest / "dosage.npy")


@needs_data
def test_a_study_in_grch37_is_answered_from_a_declared_ncbi36_file_through_the_panel(tmp_path: Path) -> None:
    hm3 = DATA / "hapmap3_1kg/HM3_thinned_autosomal_overlap"
    raw = PlinkFiles(str(hm3))
    phenotypes = table(tmp_path / "p.csv", raw.samples)
    panel = load()
    rows = np.flatnonzero((panel.position["NCBI36"] > 0) & ~panel.palindromic)[100:130]
    study = study_of(rows, "GRCh37")
    home = site(tmp_path / "h", hm3, "NCBI36", phenotypes)
    with pytest.raises(SiteError, match=r"the study is in GRCh37, site\.toml declares NCBI36"):
        freeze.freeze(home, home.config(), study, "ab" * 32)
    account = ingested(home)
    assert account["people"] == {"in_files": 957, "in_table": 957, "in_both": 957}
    frozen = freeze.freeze(home, home.config(), study, "ab" * 32)
    removed = sum(account["quality"]["people_removed"].values())
    assert frozen.ready and frozen.patients == 957 - removed and frozen.counts["quality"] == removed > 0
    assert frozen.variants["swapped"] == 30  # the store counts ALT, the study REF
    place = {int(p): j for j, p in enumerate(raw.variants.position)}
    kept = json.loads((home.dataset("main") / "genotypes/removed.json").read_text())
    gone = {raw.samples[r] for reason in kept.values() for r in reason}
    people = sorted(set(raw.samples) - gone)
    entries = [place[int(panel.position["NCBI36"][r])] for r in rows]
    counts = raw.counts(entries)[[raw.samples.index(p) for p in people]]
    for column, (entry, r) in enumerate(zip(entries, rows, strict=True)):
        if raw.variants.counted[entry] != panel.ref[r]:
            counts[:, column] = np.where(counts[:, column] < 0, -9, 2 - counts[:, column])
    np.testing.assert_array_equal(dosages(home, "ab" * 32), counts)


def test_dosages_of_a_file_reach_the_cohort_without_being_rounded(tmp_path: Path) -> None:
    lines, rows = panel_lines("GRCh37", 300)
    values = np.round(np.random.default_rng(4).uniform(0, 2, (300, N)), 2)
    people = [f"p{i:03d}" for i in range(N)]
    vcf = [
        [v.chromosome, str(v.position), v.id, v.other, v.counted, ".", ".", "DS", *(f"{d:.2f}" for d in values[j])]
        for j, v in enumerate(lines)
    ]
    (tmp_path / "d.vcf.gz").write_bytes(bgzip(vcf_text(people, vcf, "##fileformat=VCFv4.2\n"
        '##FORMAT=<ID=DS,Number=A,Type=Float,Description="x">\n').encode()))  # fmt: skip
    home = site(tmp_path / "h", tmp_path / "d.vcf.gz", "GRCh37", table(tmp_path / "p.csv", people))
    # hard calls of dosages far from whole numbers are missing, so every variant would fail its call rate
    with pytest.raises(SiteError, match="variants are marked"):
        ingested(home)
    values = np.round(np.random.default_rng(5).integers(0, 3, (300, N)) * 0.96 + 0.02, 2)
    vcf = [[*row[:8], *(f"{d:.2f}" for d in values[j])] for j, row in enumerate(vcf)]
    (tmp_path / "d.vcf.gz").write_bytes(bgzip(vcf_text(people, vcf, "##fileformat=VCFv4.2\n"
        '##FORMAT=<ID=DS,Number=A,Type=Float,Description="x">\n').encode()))  # fmt: skip
    ingested(home)
    study = study_of(rows[:5], "GRCh37")
    freeze.freeze(home, home.config(), study, "ab" * 32)
    stored = dosages(home, "ab" * 32)
    assert stored.dtype == np.float32
    np.testing.assert_allclose(stored, 2 - values[:5].T, atol=1e-4)
    x = np.vstack([b.x for b in StoredCohort(home.dataset("main") / "cohorts" / ("ab" * 32), study).blocks("all")])
    np.testing.assert_allclose(x, (2 - values[:5].T - 1) / 0.5**0.5, atol=1e-3)


def test_a_store_that_changed_or_is_of_other_files_is_refused_at_freeze(tmp_path: Path) -> None:
    two_files(tmp_path)
    people = [f"p{i:03d}" for i in range(N)]
    home = site(tmp_path / "h", tmp_path / "*.vcf.gz", "GRCh37", table(tmp_path / "p.csv", people))
    ingested(home)
    _, rows = panel_lines("GRCh37", 5)
    study = study_of(rows, "GRCh37")
    freeze.freeze(home, home.config(), study, "ab" * 32)
    path = home.dataset("main") / "genotypes/genotypes.pgen"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(SiteError, match=r"genotypes\.pgen of the genotype store changed"):
        freeze.freeze(home, home.config(), study, "ab" * 32)
    path.write_bytes(good)
    home.site_toml.write_text(home.site_toml.read_text().replace("*.vcf.gz", "a.vcf.gz"))
    with pytest.raises(SiteError, match=r"was made from .*\*\.vcf\.gz"):
        freeze.freeze(home, home.config(), study, "ab" * 32)


def test_a_store_that_chose_by_frequencies_is_not_for_private_analyses(tmp_path: Path) -> None:
    two_files(tmp_path)
    people = [f"p{i:03d}" for i in range(N)]
    home = site(tmp_path / "h", tmp_path / "*.vcf.gz", "GRCh37", table(tmp_path / "p.csv", people))
    ingested(home, palindromic="frequency")
    _, rows = panel_lines("GRCh37", 5)
    with pytest.raises(SiteError, match="by their frequencies, and the study has a private analysis"):
        freeze.freeze(home, home.config(), study_of(rows, "GRCh37"), "ab" * 32)


def test_plink_files_in_another_build_than_declared_are_refused_at_freeze_too(tmp_path: Path) -> None:
    from sequester.simulate.plink import write_bed

    lines, rows = panel_lines("GRCh37", 300)
    people = [f"p{i:03d}" for i in range(N)]
    write_bed(tmp_path / "g", people, lines, np.ones((N, 300), np.int8))
    home = site(tmp_path / "h", tmp_path / "g", "GRCh38", table(tmp_path / "p.csv", people))
    panel = load()
    there = rows[panel.position["GRCh38"][rows] > 0][:5]
    with pytest.raises(SiteError, match=r"these files are in GRCh37, site\.toml declares GRCh38"):
        freeze.freeze(home, home.config(), study_of(there, "GRCh38"), "ab" * 32)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.links: list[str] = []

    def handle_data(self, text: str) -> None:
        self.words.append(text.strip())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]


def test_the_commands_print_a_verdict_and_the_page_says_it_in_the_order_of_the_specification(tmp_path: Path) -> None:
    two_files(tmp_path)
    people = [f"p{i:03d}" for i in range(N)]
    home = site(tmp_path / "h", tmp_path / "*.vcf.gz", "GRCh37", table(tmp_path / "p.csv", [*people[:100], "q1"]))
    app = typer.Typer()
    data.register(app)
    runner = CliRunner(env={"SEQUESTER_HOME": str(home.root)})
    none = runner.invoke(app, ["data", "report"])
    assert isinstance(none.exception, SiteError) and "there is no report" in none.exception.message
    made = runner.invoke(app, ["data", "ingest", "--case", "case"])
    assert made.exit_code == 0, made.output
    assert "Ready: 600 of 37,551 panel variants usable, 2%." in made.output and "data freeze STUDY" in made.output
    answer = json.loads(runner.invoke(app, ["data", "report", "--json"]).output)
    assert answer["people"] == {"in_files": N, "in_table": 101, "in_both": 100}
    assert "differential_missingness" not in answer["quality"]["not_done"]
    assert answer == json.loads((home.dataset("main") / "report/report.json").read_text())
    manifest = json.loads((home.dataset("main") / "genotypes/manifest.json").read_text())
    assert {k: manifest[k] for k in ("entry_categories", "build_match", "quality")} == {
        k: answer[k] for k in ("entry_categories", "build_match", "quality")
    }
    page = tmp_path / "out.html"
    assert runner.invoke(app, ["data", "report", "--out", str(page)]).exit_code == 0
    parsed = _Page()
    parsed.feed(page.read_text())
    order = [
        parsed.words.index(title) for title in ("People", "Reference build", "Variants", "Quality", "What to do next")
    ]
    assert order == sorted(order) and parsed.links == []
    assert any(word.startswith("Ready: 600") for word in parsed.words[: order[0]])
    assert "variants/direct.txt" in parsed.words and "600" in parsed.words
    assert not any(word in people for word in parsed.words)  # no person on the page
    assert {name for name, _, _ in CATEGORIES} == set(answer["entry_categories"]) | {"absent"}


def test_a_mixed_strand_file_is_called_one_and_names_are_escaped(tmp_path: Path) -> None:
    lines, _ = panel_lines("GRCh37", 400)
    flip = str.maketrans("ACGT", "TGCA")
    lines = [
        Line(v.chromosome, "<script>", v.position, v.counted.translate(flip), v.other.translate(flip))
        if j % 3 == 0
        else v
        for j, v in enumerate(lines)
    ]
    matrix_vcf(tmp_path / "a<b>.vcf", [f"p{i}" for i in range(20)], lines, np.ones((20, 400), np.int8))
    home = site(tmp_path / "h", tmp_path / "a<b>.vcf", "GRCh37")
    account = ingested(home)
    assert account["entry_categories"]["flipped"] == 134
    assert any("a mixed strand file" in sentence for sentence in account["next"])
    page = (home.dataset("main") / "report/report.html").read_text()
    assert "<script>" not in page and "a&lt;b&gt;.vcf" in page


def test_the_doctor_knows_every_kind_of_genotype_file(tmp_path: Path) -> None:
    from sequester.client.gate.doctor import _data

    two_files(tmp_path)
    for named, state, said in (
        ("*.vcf.gz", "ok", "a.vcf.gz, b.vcf.gz can be read"),
        ("a.vcf.gz", "ok", "a.vcf.gz can be read"),
        ("c.bgen", "fail", "c.bgen"),
        ("*.bed", "fail", "nothing matches"),
        ("g", "fail", "g.bed"),
    ):
        finding = next(
            f for f in _data(site(tmp_path / "h", tmp_path / named, "GRCh37").config()) if f.test == "genotypes"
        )
        assert finding.verdict == state and said in finding.found, finding


@pytest.mark.parametrize("named", ["https://example.org/x.vcf.gz", "s3://bucket/*.bed"])
def test_a_url_is_not_a_path_in_any_reader(named: str) -> None:
    with pytest.raises(SiteError, match="not a path"):
        genotype_files(named)


def test_names_are_found_by_pattern_and_nothing_else_is_taken(tmp_path: Path) -> None:
    for name in ("a.vcf.gz", "b.bed", "c.pgen", "d.bgen", "e.txt", "f.bcf", "b.bim"):
        (tmp_path / name).write_text("")
    found = genotype_files(str(tmp_path / "*"))
    assert [p.name for p in found] == ["a.vcf.gz", "b", "c", "d.bgen", "f.bcf"]
    with pytest.raises(SiteError, match="nothing matches"):
        genotype_files(str(tmp_path / "*.vcf"))
    home = site(tmp_path / "i", tmp_path / "a.vcf.gz", "GRCh38", table(tmp_path / "p.csv", ["p1"]))
    with pytest.raises(SiteError, match="was not ingested"):
        freeze.freeze(home, home.config(), study_of(panel_lines("GRCh38", 3)[1], "GRCh38"), "ab" * 32)
    with pytest.raises(SiteError, match="is not a file"):
        home = site(tmp_path / "h", tmp_path / "no.vcf", "GRCh37")
        ingest(home, home.config(), Choices(), quiet)
