"""One matrix through five formats, and every real file read to its end against a second opinion."""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from genome.files import (
    CALLS,
    DATA,
    bgzip,
    converted,
    matrix_bgen,
    matrix_vcf,
    needs_data,
    needs_plink2,
    read,
    to_bcf,
    twin_vcf,
    vcf_text,
)  # fmt: skip
from sequester.client.compute.genome.plink import PlinkFiles
from sequester.client.compute.genome.source import Reading, open_source
from sequester.simulate.plink import Line, write_bed

TINY = DATA / "pgs_catalog/tiny1000G"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[tuple[str, int, str, str]], np.ndarray, list[str]]:
    """tiny1000G as the plain text reader reads it."""
    if not DATA.exists():
        pytest.skip("SEQUESTER_DATA is not there")
    keys, copies = twin_vcf(TINY.with_suffix(".vcf.gz"))
    return keys, copies, list(open_source(TINY.with_suffix(".vcf.gz"), Reading()).scan().samples)


def test_a_file_with_two_per_cent_missing_has_the_same_matrix_in_every_format(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    counts = rng.integers(0, 3, (70, 300)).astype(np.int8)  # (people, variants)
    counts[rng.random(counts.shape) < 0.02] = -9
    lines = [Line("1", f"v{j}", 1000 + j, "G", "A") for j in range(300)]
    people = [f"p{i}" for i in range(70)]
    write_bed(tmp_path / "g", people, lines, counts)
    matrix_vcf(tmp_path / "g.vcf", people, lines, counts)
    matrix_vcf(tmp_path / "z.vcf.gz", people, lines, counts)
    to_bcf(tmp_path / "g.vcf", tmp_path / "g.bcf")
    matrix_bgen(tmp_path / "g.bgen", people, lines, counts)
    prefixes = [str(tmp_path / "g")]
    for name in ("g.vcf", "z.vcf.gz", "g.bcf", "g.bgen"):
        prefixes.append(converted(tmp_path / name, tmp_path / f"from-{name}"))
    total = int(np.where(counts < 0, 0, counts).sum())
    for prefix in prefixes:
        files = PlinkFiles(prefix)
        assert files.samples == people and not files.has_dosages
        np.testing.assert_array_equal(files.counts(range(300)), counts)
        assert files.variants == PlinkFiles(prefixes[0]).variants
        blocks = np.concatenate([b.copy() for _, b in files.blocks(size=64)])
        np.testing.assert_array_equal(blocks.T, counts)
        assert int(np.where(blocks < 0, 0, blocks).sum(dtype=np.int64)) == total


def test_real_genotypes_are_identical_through_vcf_bcf_pgen_and_bed(
    tiny: tuple[list[tuple[str, int, str, str]], np.ndarray, list[str]], tmp_path: Path
) -> None:
    keys, copies, samples = tiny
    autosomal = np.array([key[0] != "X" for key in keys])
    found, genotypes, reasons = read(TINY.with_suffix(".vcf.gz"))
    assert (found, set(reasons)) == (keys, {""})
    np.testing.assert_array_equal(genotypes[autosomal], copies[autosomal])
    to_bcf(TINY.with_suffix(".vcf.gz"), tmp_path / "t.bcf")
    again, same, _ = read(tmp_path / "t.bcf")
    assert again == keys
    np.testing.assert_array_equal(same, genotypes)  # on X too: one reader, one rule
    pgen = PlinkFiles(converted(tmp_path / "t.bcf", tmp_path / "part"))
    assert (pgen.samples, len(pgen.variants)) == (samples, 1004)
    np.testing.assert_array_equal(pgen.counts(range(1004)).T, genotypes)
    lines = [Line(c, f"v{j}", p, a, r) for j, (c, p, a, r) in enumerate(keys)]
    write_bed(tmp_path / "b", samples, lines, genotypes.T.astype(np.int8))
    np.testing.assert_array_equal(PlinkFiles(str(tmp_path / "b")).counts(range(1004)), genotypes.T)


def test_real_bgen_equals_its_vcf_on_the_autosomes_and_differs_in_21_calls_of_x(
    tiny: tuple[list[tuple[str, int, str, str]], np.ndarray, list[str]],
) -> None:
    keys, copies, _ = tiny
    found, genotypes, _ = read(TINY.with_suffix(".bgen"))
    # this file's second allele is REF (`ref-last`): its copies are turned round, as harmonisation would
    assert [(c, p, other, counted) for c, p, counted, other in found] == keys
    turned = np.where(genotypes < 0, -9, 2 - genotypes)
    autosomal = np.array([key[0] != "X" for key in keys])
    np.testing.assert_array_equal(turned[autosomal], copies[autosomal])
    _, ours, _ = read(TINY.with_suffix(".vcf.gz"))
    differing = np.argwhere(turned != ours)
    assert len(differing) == 21  # spec/genomics.md, section 2: 21 of 3.2 M calls
    assert {keys[j][0] for j, _ in differing} == {"X"}


@needs_data
@needs_plink2
def test_our_reading_of_bgen_and_vcf_equals_plink2_on_the_autosomes(tmp_path: Path) -> None:
    commands = {
        "vcf": ["--vcf", f"{TINY}.vcf.gz"],
        "bgen": ["--bgen", f"{TINY}.bgen", "ref-last", "--sample", f"{TINY}.sample"],
    }
    for name, source in commands.items():
        subprocess.run(
            ["plink2", *source, "--autosome", "--make-pgen", "--out", name, "--threads", "1"],
            cwd=tmp_path, check=True, capture_output=True,
        )  # fmt: skip
        theirs = PlinkFiles(str(tmp_path / name))
        keys, genotypes, _ = read(TINY.with_suffix(".vcf.gz" if name == "vcf" else ".bgen"))
        ours = {key[:2] + tuple(sorted(key[2:])): (key[2], g) for key, g in zip(keys, genotypes, strict=True)}
        counts = theirs.counts(range(len(theirs.variants)))
        assert len(theirs.variants) == sum(key[0] != "X" for key in keys)
        for j, v in enumerate(theirs.variants):
            counted, g = ours[v.chromosome, v.position, *sorted((v.counted, v.other))]
            expected = g if counted == v.counted else np.where(g < 0, -9, 2 - g)
            np.testing.assert_array_equal(counts[:, j], expected)


@needs_data
@pytest.mark.parametrize("chromosome", [*range(1, 23), "X"])
def test_every_real_vcf_file_is_read_as_its_text_says(chromosome: object) -> None:
    path = DATA / f"kg_phase3_vcf/1KG_phase3_subset_chr{chromosome}.vcf.gz"
    keys, copies = twin_vcf(path)
    found, genotypes, reasons = read(path, Reading(keep_filtered=True))
    assert found == keys and set(reasons) == {""} and genotypes.shape == (len(keys), 100)
    if chromosome != "X":
        np.testing.assert_array_equal(genotypes, copies)
    else:  # half a call on X is one copy of a chromosome: two of its allele
        called = copies >= 0
        np.testing.assert_array_equal(genotypes[called], copies[called])
        assert set(np.unique(genotypes[~called])) <= {-9, 0, 2}


@needs_data
def test_filtered_rows_are_left_out_by_name_unless_the_site_keeps_them() -> None:
    path = DATA / "kg_phase3_vcf/1KG_phase3_subset_chrX.vcf.gz"
    _, genotypes, reasons = read(path)
    counts = Counter(reasons)
    assert counts["filtered"] > 0 and counts[""] > 0
    assert (genotypes[np.array(reasons) == "filtered"] == -9).all()


def test_calls_are_counted_by_allele_and_what_is_no_diploid_call_is_missing_and_counted(tmp_path: Path) -> None:
    people = ["a", "b", "c", "d"]
    rows = [
        ["1", "10", "two", "A", "G,T", "PASS", ".", "GT", "0/2", "1/2", "2/2", "0|1"],
        ["1", "11", "half", "A", "G", ".", ".", "GT", "./1", "0/.", "1", "1/1"],
        ["1", "12", "odd", "A", "G", ".", ".", "GT", "0/1/1", "0/0", "0/1", "1/1"],
        ["X", "13", "x", "A", "G", ".", ".", "GT", "1/.", "0/.", "1", "0/1"],
        ["1", "14", "late", "A", "G", ".", ".", "DS:GT", "0.5:0/0", "1:0/1", "2:1/1", ".:0/1"],
    ]
    (tmp_path / "v.vcf").write_text(vcf_text(people, rows))
    source = open_source(tmp_path / "v.vcf", Reading())
    entries = list(source.entries(source.scan()))
    got = [e.genotypes.tolist() for e in entries]
    assert got[0] == [0, 1, 0, 1] and got[1] == [1, 1, 2, 0] and entries[0].is_split
    assert got[2] == [-9, -9, -9, 2]
    assert got[3] == [-9, 0, 1, 2]
    assert got[4] == [2, 0, 2, 1]
    assert got[5] == [0.5, 1.0, 2.0, 1.0]
    assert {k: v for k, v in source.calls.items() if v} == {
        "half_call": 2,
        "haploid_call": 1,
        "more_than_two_alleles": 1,
    }


@pytest.mark.parametrize("ending", ["vcf", "bcf"])
def test_a_row_whose_genotypes_cannot_be_decoded_is_not_filed_as_one_without_any(tmp_path: Path, ending: str) -> None:
    rows = [
        ["1", "10", "with", "A", "G", ".", ".", "GT", "1", "0"],
        ["1", "11", "without", "A", "G", ".", ".", "XX", "1", "0"],
        ["1", "12", "dosage", "A", "G", ".", ".", "DS:GT", "0.5:1", "1.5:0"],
    ]
    text = vcf_text(["a", "b"], rows)
    declared = "##FORMAT=<ID=GT,Number=1,Type=String"
    assert declared in text
    odd = text.replace(
        declared, "##FORMAT=<ID=XX,Number=1,Type=Integer,Description=x>\n##FORMAT=<ID=GT,Number=1,Type=Integer"
    )
    path = tmp_path / "v.vcf"
    path.write_text(odd)
    if ending == "bcf":
        to_bcf(path, tmp_path / "v.bcf")
        path = tmp_path / "v.bcf"
    _, genotypes, reasons = read(path)
    assert reasons == ["undecodable_genotypes", "no_genotypes", ""]
    assert (genotypes[:2] == -9).all() and genotypes[2].tolist() == [0.5, 1.5]


def test_dosages_are_kept_as_the_file_has_them_and_read_back_in_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    dosages = np.round(rng.uniform(0, 2, (20, 50)), 3)  # (variants, people)
    dosages[rng.random(dosages.shape) < 0.1] = np.nan
    rows = [
        ["1", str(100 + j), f"v{j}", "A", "C", ".", f"R2={0.2 if j < 5 else 0.9}", "DS",
         *["." if np.isnan(d) else f"{d:.3f}" for d in dosages[j]]]
        for j in range(20)
    ]  # fmt: skip
    path = tmp_path / "d.vcf.gz"
    path.write_bytes(bgzip(vcf_text([f"p{i}" for i in range(50)], rows).encode()))
    files = PlinkFiles(converted(path, tmp_path / "part"))
    assert files.has_dosages
    stored = files.dosages(range(20)).T
    np.testing.assert_array_equal(stored == -9, np.isnan(dosages))
    # .pgen keeps dosages in units of 1/16384 (PGEN specification)
    np.testing.assert_allclose(stored[stored >= 0], dosages[~np.isnan(dosages)], atol=0.5 / 16384 + 1e-6)
    blocks = np.concatenate([b.copy() for _, b in files.blocks(size=7, hard_calls=False)])
    np.testing.assert_array_equal(blocks, stored)
    _, _, reasons = read(path, Reading(r2_floor=0.3))
    assert reasons == ["low_imputation_quality"] * 5 + [""] * 15


@needs_plink2
def test_a_pgen_with_several_alternative_alleles_gives_an_entry_for_each(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    rows = []
    for j in range(60):
        alleles = 3 if j % 3 == 0 else 2
        cells = [f"{a}/{b}" for a, b in rng.integers(0, alleles, (30, 2))]
        cells[j % 30] = "./."
        rows.append(["1", str(100 + j), f"v{j}", "A", "G,T" if alleles == 3 else "G", ".", ".", "GT", *cells])
    path = tmp_path / "m.vcf"
    path.write_text(vcf_text([f"p{i}" for i in range(30)], rows))
    subprocess.run(
        ["plink2", "--vcf", "m.vcf", "--make-pgen", "--out", "m", "--threads", "1"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    files = PlinkFiles(str(tmp_path / "m"))
    keys, copies = twin_vcf(path)
    assert [(v.chromosome, v.position, v.counted, v.other) for v in files.variants] == keys
    np.testing.assert_array_equal(files.counts(range(len(keys))).T, copies)
    assert int(files.is_multiallelic.sum()) == 40 and CALLS[0] == "0/0"
