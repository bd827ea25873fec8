"""Five hospitals with every habit against the truth, real panels in two builds, and each rule by itself."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genome.files import DATA, bgzip, needs_data, vcf_text
from genome.sites import ingested, site
from sequester.client.compute.genome.build import build_of_header, confirm, evidence
from sequester.client.compute.genome.harmonise import (
    MATCHED,
    ROW_CATEGORIES,
    Wanted,
    in_build,
    match,
    of_panel,
    oriented,
)  # fmt: skip
from sequester.client.compute.genome.panel import load
from sequester.client.compute.genome.plink import PlinkFiles
from sequester.client.compute.genome.variants import Row, Variants, chromosome_code, is_palindromic
from sequester.client.config import Home
from sequester.protocols.errors import SiteError
from sequester.simulate.hospitals import OTHER_BUILD, ROUGH, Simulated, hospitals
from sequester.simulate.plink import Line, write_bed

SOURCES = {"bed": "genotypes", "pgen": "genotypes", "vcf": "genotypes.vcf.gz"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Simulated:
    return hospitals(
        3, tmp_path_factory.mktemp("sim"), ROUGH, 900, chromosomes=4, length_bp=150_000, causal=30, rough=True
    )


@pytest.fixture(scope="module")
def homes(made: Simulated, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Home, dict]]:
    out = {}
    for hospital in ROUGH:
        home = site(
            tmp_path_factory.mktemp(hospital.name) / "home",
            made.site(hospital.name) / SOURCES[hospital.format],
            "GRCh38",
        )
        out[hospital.name] = home, ingested(home, panel=made.folder / "panel.tsv")
    return out


def truth(made: Simulated, name: str) -> Counter[str]:
    with (made.folder / f"truth/variants-{name}.csv").open() as file:
        return Counter(c for row in csv.DictReader(file) for c in row["category"].split("+"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [h.name for h in ROUGH])
def test_every_category_of_a_rough_hospital_counts_what_was_put_there(
    made: Simulated, homes: dict[str, tuple[Home, dict]], name: str
) -> None:
    account = homes[name][1]
    expected = truth(made, name)
    assert {k: v for k, v in account["entry_categories"].items() if v} == dict(expected)
    assert sum(account["entry_categories"].values()) == account["entries"] == sum(expected.values())
    assert sum(account["panel_categories"].values()) == account["panel"]["rows"]
    assert account["build_found"] == "GRCh38" and account["verdict"]["ready"]
    # on genomes this short strangers look like relatives, so nobody may leave for that
    assert {"relatives", "heterozygosity"} <= account["quality"]["not_done"].keys()
    assert sum(account["quality"]["people_removed"].values()) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [h.name for h in ROUGH])
def test_every_matched_genotype_is_that_of_the_truth_with_its_sign(
    made: Simulated, homes: dict[str, tuple[Home, dict]], name: str
) -> None:
    home, account = homes[name]
    store = home.dataset("main") / "genotypes"
    files = PlinkFiles(str(store / "genotypes"))
    panel_row = np.load(store / "panel_row.npy")
    dosages = np.load(made.folder / "truth/dosages.npz")["dosages"]  # (people, loci), in the panel's order
    with (made.folder / "truth/people.csv").open() as file:
        person = {row["patient"]: int(row["person"]) for row in csv.DictReader(file)}
    entries = np.flatnonzero(panel_row >= 0)
    ours = files.counts(entries.tolist())
    expected = dosages[np.ix_([person[s] for s in files.samples], panel_row[entries])]
    called = ours >= 0
    assert called.mean() > 0.9 and len(entries) == sum(account["panel_categories"][c] for c in MATCHED)
    np.testing.assert_array_equal(ours[called], expected[called])
    panel = load(made.folder / "panel.tsv")
    assert [files.variants.counted[e] for e in entries] == [panel.alt[r] for r in panel_row[entries]]


@pytest.mark.slow
def test_another_build_is_refused_by_name_and_accepted_where_it_is_declared(made: Simulated, tmp_path: Path) -> None:
    files, panel = made.site(OTHER_BUILD) / "genotypes", made.folder / "panel.tsv"
    home = site(tmp_path / "h", files, "GRCh38")
    with pytest.raises(SiteError) as caught:
        ingested(home, panel=panel)
    assert "these files are in GRCh37, site.toml declares GRCh38" in caught.value.message
    assert all(build in caught.value.message for build in ("NCBI36", "GRCh37", "GRCh38"))
    assert not (home.dataset("main") / "genotypes").exists()
    declared = site(tmp_path / "i", files, "GRCh37")
    account = ingested(declared, panel=panel)
    assert account["build_found"] == "GRCh37"
    home_of_same = site(tmp_path / "j", made.site("north") / "genotypes", "GRCh38")
    assert ingested(home_of_same, panel=panel)["panel_categories"] == account["panel_categories"]


HM3 = DATA / "hapmap3_1kg/HM3_thinned_autosomal_overlap"
KG = DATA / "hapmap3_1kg/1kg.ref.phase1_release_v3.20101123_thinned_autosomal_overlap"


@pytest.mark.slow
@needs_data
def test_the_old_build_of_hapmap_is_refused_with_its_name_and_harmonises_once_it_is_declared(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match=r"these files are in NCBI36, site\.toml declares GRCh37"):
        ingested(site(tmp_path / "a", HM3, "GRCh37"))
    accounts, stores = [], []
    for name, files, build in (("b", HM3, "NCBI36"), ("c", KG, "GRCh37")):
        home = site(tmp_path / name, files, build)
        accounts.append(ingested(home, palindromic="strand"))
        stores.append(home.dataset("main") / "genotypes")
    for account in accounts:
        assert account["verdict"]["usable"] == 14_079 and account["entry_categories"]["palindromic"] == 0
    rows = [np.load(store / "panel_row.npy") for store in stores]
    np.testing.assert_array_equal(rows[0], rows[1])  # the same variants, in the same order
    old, new = (PlinkFiles(str(store / "genotypes")) for store in stores)
    assert old.variants.counted == new.variants.counted and old.variants.other == new.variants.other
    # people who are in both: their genotypes agree as the data's README says (99.2 %)
    both = sorted(set(old.samples) & set(new.samples))
    assert len(both) == 564
    a = old.counts(range(14_079))[[old.samples.index(s) for s in both]]
    b = new.counts(range(14_079))[[new.samples.index(s) for s in both]]
    called = (a >= 0) & (b >= 0)
    agreement = [(a[i] == b[i])[called[i]].mean() for i in range(564)]
    assert np.median(agreement) == pytest.approx(0.992, abs=0.001)


@pytest.mark.slow
@needs_data
def test_by_default_the_1015_palindromic_variants_are_dropped_by_name(tmp_path: Path) -> None:
    account = ingested(site(tmp_path / "h", KG, "GRCh37"))
    assert account["entry_categories"]["palindromic"] == 1015
    assert account["verdict"]["usable"] == 14_079 - 1015
    listed = (tmp_path / "h/datasets/main/report/variants/palindromic.txt").read_text().splitlines()
    assert len(listed) == 1 + 1015


@needs_data
def test_a_file_in_grch38_is_told_from_one_in_grch37() -> None:
    panel = load()
    rows = np.flatnonzero(panel.position["GRCh38"] > 0)
    for build in ("GRCh37", "GRCh38"):
        made = Variants.of(
            [Row(str(panel.code[r]), int(panel.position[build][r]), panel.alt[r], panel.ref[r]) for r in rows]
        )
        found = evidence(made, panel)
        assert found.build == build
        confirm(found, build, {None, build})
        with pytest.raises(SiteError, match=f"these files are in {build}"):
            confirm(found, "NCBI36", set())
        with pytest.raises(SiteError, match="a header speaks of NCBI36"):
            confirm(found, build, {"NCBI36"})


def test_few_variants_decide_nothing_and_are_refused_with_all_three_rates() -> None:
    panel = load()
    few = np.flatnonzero((panel.position["GRCh37"] > 0) & ~panel.palindromic)[:199]
    made = Variants.of(
        [Row(str(panel.code[r]), int(panel.position["GRCh37"][r]), panel.alt[r], panel.ref[r]) for r in few]
    )
    with pytest.raises(SiteError, match=r"cannot be told: NCBI36 .* GRCh37 .* \(199 of .* GRCh38"):
        confirm(evidence(made, panel), "GRCh37", set())


def test_a_study_in_one_build_finds_a_file_in_another_through_the_panel_and_nothing_beyond_it() -> None:
    panel = load()
    both = np.flatnonzero((panel.position["NCBI36"] > 0) & (panel.position["GRCh37"] > 0) & ~panel.palindromic)[:50]
    study = Wanted(
        panel.code[both], panel.position["GRCh37"][both] + np.where(np.arange(50) == 7, 1, 0),
        [panel.ref[r] for r in both], [panel.alt[r] for r in both],
    )  # fmt: skip
    there = in_build(study, "GRCh37", panel, "NCBI36")
    expected = np.where(np.arange(50) == 7, 0, panel.position["NCBI36"][both])
    np.testing.assert_array_equal(there.position, expected)
    assert in_build(study, "GRCh37", panel, "GRCh37") is study
    file = Variants.of(
        [Row(str(panel.code[r]), int(panel.position["NCBI36"][r]), panel.alt[r], panel.ref[r]) for r in both]
    )
    found = match(there, file)
    assert found.categories["swapped"] == 49 and found.categories["absent"] == 1


ONE = Wanted(np.array([1], np.uint8), np.array([100]), ["A"], ["G"])


@pytest.mark.parametrize(
    ("counted", "other", "position", "chromosome", "category"),
    [
        ("A", "G", 100, "1", "direct"), ("G", "A", 100, "chr1", "swapped"), ("T", "C", 100, "CHR1", "flipped"),
        ("C", "T", 100, "1", "flipped_swapped"), ("A", "C", 100, "1", "allele_mismatch"),
        ("A", "T", 100, "1", "allele_mismatch"), ("AT", "A", 100, "1", "indel"), ("<DEL>", "A", 100, "1", "symbolic"),
        ("*", "A", 100, "1", "spanning_deletion"), (".", "A", 100, "1", "monomorphic_coding"),
        ("0", "A", 100, "1", "monomorphic_coding"), ("A", "A", 100, "1", "monomorphic_coding"),
        ("D", "I", 100, "1", "unreadable_alleles"), ("A", "N", 100, "1", "unreadable_alleles"),
        ("A", "G", 0, "1", "bad_position"), ("A", "G", -5, "1", "bad_position"), ("A", "G", 100, "MT", "other_contig"),
        ("A", "G", 100, "GL000220.1", "other_contig"), ("A", "G", 100, "Y", "other_contig"),
        ("A", "G", 100, "23", "chromosome_x"), ("A", "G", 101, "1", "not_in_list"), ("A", "G", 100, "2", "not_in_list"),
    ],
)  # fmt: skip
def test_a_row_is_in_the_category_its_alleles_and_place_say(
    counted: str, other: str, position: int, chromosome: str, category: str
) -> None:
    found = match(ONE, Variants.of([Row(chromosome, position, counted, other)]))
    assert {k: v for k, v in found.rows.items() if v} == {category: 1}
    assert found.row == ((0,) if category in MATCHED else (-1,))


def test_ids_never_decide_and_missing_stays_missing_when_copies_are_turned() -> None:
    rows = Variants.of([Row("1", 100, "G", "A", "rs1"), Row("1", 101, "A", "G", "rsWanted")])
    assert match(ONE, rows).row == (0,)
    assert oriented(np.array([0, 1, 2, -9], np.int8), True).tolist() == [2, 1, 0, -9]
    assert oriented(np.array([0.25, -9], np.float32), True).tolist() == [1.75, -9]


def test_the_first_of_two_equal_rows_is_used_and_different_alleles_at_a_place_are_no_duplicates() -> None:
    place = [("A", "G"), ("C", "T"), ("A", "C"), ("T", "C"), ("A", "G")]
    rows = Variants.of([Row("1", 100, a, b) for a, b in place] + [Row("1", 200, a, b) for a, b in place])
    found = match(ONE, rows)
    names = [ROW_CATEGORIES[c] for c in found.row_category]
    assert names[:5] == ["direct", "duplicate", "allele_mismatch", "duplicate", "duplicate"]
    # outside the list, C/T and T/C are A/G on the other strand
    assert names[5:] == ["not_in_list", "duplicate", "not_in_list", "duplicate", "duplicate"]


def test_several_wanted_variants_at_one_place_are_each_matched_by_their_own_alleles() -> None:
    wanted = Wanted(np.array([1, 1], np.uint8), np.array([100, 100]), ["G", "T"], ["A", "A"])
    found = match(wanted, Variants.of([Row("1", 100, "T", "A"), Row("1", 100, "G", "A")]), "strand")
    assert found.row == (1, -1)  # A/T needs a file whose strand is known
    assert found.categories["palindromic"] == 1


def test_indels_match_exactly_and_never_by_complement() -> None:
    wanted = Wanted(np.array([1, 1], np.uint8), np.array([100, 200]), ["AT", "AT"], ["A", "A"])
    rows = Variants.of([Row("1", 100, "A", "AT"), Row("1", 200, "TA", "T")])
    found = match(wanted, rows)
    assert found.categories["swapped"] == 1 and found.categories["allele_mismatch"] == 1
    assert found.rows["indel"] == 1


def test_palindromic_variants_are_kept_only_where_the_strand_is_beyond_doubt() -> None:
    n = 1200
    wanted = Wanted(np.ones(n, np.uint8), np.arange(1, n + 1), ["A"] * n, ["T" if j < 100 else "G" for j in range(n)])
    rows = [Row("1", j + 1, "A", "T" if j < 100 else "G") for j in range(n)]
    assert match(wanted, Variants.of(rows)).categories["palindromic"] == 100
    assert match(wanted, Variants.of(rows), "strand").categories["direct"] == n
    for j in (500, 501):  # two in 1,100 are on the other strand: more than one in a thousand
        rows[j] = Row("1", j + 1, "T", "C")
    assert match(wanted, Variants.of(rows), "strand").categories["palindromic"] == 100
    assert match(wanted, Variants.of(rows[:1000]), "strand").categories["palindromic"] == 100  # 900 others: too few


base = st.sampled_from("ACGT")
rows_of = st.lists(
    st.tuples(
        st.sampled_from(["1", "chr1", "2", "X", "MT"]),
        st.integers(-1, 6),
        st.sampled_from("ACGT*0D") | st.just("AT"),
        base,
    ),
    max_size=30,
)


@settings(max_examples=200, deadline=None)
@given(rows_of, st.lists(st.tuples(st.integers(1, 6), base, base), max_size=10), st.sampled_from(["drop", "strand"]))
def test_every_row_and_every_wanted_variant_is_in_exactly_one_category(
    rows: list[tuple[str, int, str, str]], wanted: list[tuple[int, str, str]], palindromic: str
) -> None:
    wanted = [w for w in wanted if w[1] != w[2]]
    listed = Wanted(
        np.ones(len(wanted), np.uint8),
        np.array([w[0] for w in wanted], np.int64),
        [w[1] for w in wanted],
        [w[2] for w in wanted],
    )
    found = match(listed, Variants.of([Row(*row) for row in rows]), palindromic)  # type: ignore[arg-type]
    assert sum(found.rows.values()) == len(rows) and sum(found.categories.values()) == len(wanted)
    used = [row for row in found.row if row >= 0]
    assert len(used) == len(set(used)) == sum(found.categories[c] for c in MATCHED)
    for j, row in enumerate(found.row):  # the slow rule, once more: same place, same pair up to strand
        if row >= 0:
            chromosome, position, counted, other = rows[row]
            assert chromosome_code(chromosome) == 1 and position == wanted[j][0]
            flip = str.maketrans("ACGT", "TGCA")
            pairs = {frozenset(wanted[j][1:]), frozenset(a.translate(flip) for a in wanted[j][1:])}
            assert frozenset((counted, other)) in pairs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["north", "metro", "harbor"])
def test_the_strand_told_by_frequencies_is_the_true_one_at_hospitals_of_any_ancestry(
    made: Simulated, tmp_path: Path, name: str
) -> None:
    source = made.site(name) / SOURCES[{h.name: h.format for h in ROUGH}[name]]
    home = site(tmp_path / "h", source, "GRCh38")
    account = ingested(home, panel=made.folder / "panel.tsv", palindromic="frequency")
    store = home.dataset("main") / "genotypes"
    files, panel = PlinkFiles(str(store / "genotypes")), load(made.folder / "panel.tsv")
    panel_row = np.load(store / "panel_row.npy")
    kept = np.flatnonzero((panel_row >= 0) & panel.palindromic[panel_row])
    assert len(kept) > 0.5 * truth(made, name)["palindromic"]  # rare variants, of which most are
    assert len(kept) + account["panel_categories"]["palindromic"] == truth(made, name)["palindromic"]
    dosages = np.load(made.folder / "truth/dosages.npz")["dosages"]
    with (made.folder / "truth/people.csv").open() as file:
        person = {row["patient"]: int(row["person"]) for row in csv.DictReader(file)}
    ours = files.counts(kept.tolist())
    expected = dosages[np.ix_([person[s] for s in files.samples], panel_row[kept])]
    np.testing.assert_array_equal(ours[ours >= 0], expected[ours >= 0])


@needs_data
@pytest.mark.slow
def test_real_palindromic_variants_on_either_strand_get_their_sign_from_frequencies(tmp_path: Path) -> None:
    files = PlinkFiles(str(KG))
    counts = files.counts(range(len(files.variants)))
    rng = np.random.default_rng(1)
    lines, flipped = [], []
    for v in files.variants:
        turn = is_palindromic(v.counted, v.other) and rng.random() < 0.3
        a, b = (v.other, v.counted) if turn else (v.counted, v.other)  # the other strand's letters are each other's
        flipped.append(turn)
        lines.append(Line(v.chromosome, v.id, v.position, a, b))
    write_bed(tmp_path / "g", files.samples, lines, np.where(counts < 0, -1, counts))
    home = site(tmp_path / "h", tmp_path / "g", "GRCh37")
    account = ingested(home, palindromic="frequency")
    store = home.dataset("main") / "genotypes"
    kept = PlinkFiles(str(store / "genotypes"))
    original = {(v.chromosome, v.position): (j, v) for j, v in enumerate(files.variants)}
    wrong = right = 0
    ours = kept.counts(range(len(kept.variants)))
    for j, v in enumerate(kept.variants):
        entry, was = original[v.chromosome, v.position]
        if not is_palindromic(v.counted, v.other):
            continue
        g = counts[:, entry]
        expected = g if was.counted == v.counted else np.where(g < 0, -9, 2 - g)
        if (ours[:, j] == expected).all():
            right += 1
        else:
            wrong += 1
    panel = load()
    minor = np.minimum(panel.mean_frequency, 1 - panel.mean_frequency)[panel.palindromic]
    told = int(
        (minor < 0.40).sum()
    )  # 189 of 1,015: who thinned this set kept mostly the commonest palindromic variants
    assert wrong == 0 and abs(right - told) <= 2 and right + account["panel_categories"]["palindromic"] == 1015
    assert sum(flipped) > 250


def test_the_build_of_a_header_is_read_from_lengths_or_names() -> None:
    assert build_of_header("##contig=<ID=chr1,assembly=x,length=248956422>\n") == "GRCh38"
    assert build_of_header("##reference=file:///hs37d5.fa\n") == "GRCh37"
    assert build_of_header("##contig=<ID=1,length=247249719>") == "NCBI36"
    assert build_of_header("##contig=<ID=11,length=249250621>\n##source=x") is None


@pytest.mark.slow
def test_a_header_of_another_build_than_the_positions_is_refused(made: Simulated, tmp_path: Path) -> None:
    panel = load(made.folder / "panel.tsv")
    rows = [
        [
            str(panel.code[r]),
            str(panel.position["GRCh38"][r]),
            ".",
            panel.ref[r],
            panel.alt[r],
            ".",
            ".",
            "GT",
            "0/1",
            "0/0",
        ]
        for r in range(len(panel))
    ]
    text = vcf_text(["a", "b"], rows).replace("##contig=<ID=1>", "##contig=<ID=1,length=249250621>")
    (tmp_path / "v.vcf.gz").write_bytes(bgzip(text.encode()))
    with pytest.raises(SiteError, match="a header speaks of GRCh37, the positions are those of GRCh38"):
        ingested(site(tmp_path / "h", tmp_path / "v.vcf.gz", "GRCh38"), panel=made.folder / "panel.tsv")


def test_the_wanted_allele_of_a_panel_is_alt() -> None:
    panel = load()
    wanted = of_panel(panel, "GRCh37")
    assert wanted.counted is panel.alt and len(wanted) == 37_551
