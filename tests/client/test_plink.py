"""PLINK files: the same genotypes as bed-reader reads, and every damage of the table refused in words."""

from __future__ import annotations

from pathlib import Path

import bed_reader
import numpy as np
import pgenlib
import pytest

from sequester.client.compute.genome.harmonise import match
from sequester.client.compute.genome.plink import PlinkFiles
from sequester.protocols.errors import SiteError
from sequester.protocols.study import Variant
from sequester.simulate.plink import Line, write_bed

N, V = 30, 40  # 30 people: two unused places in each variant's last byte


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 3, (N, V)).astype(np.int8)
    counts[rng.random((N, V)) < 0.02] = -1
    lines = [Line("1", f"v{j}", 1000 + j, "A", "G") for j in range(V)]
    write_bed(tmp_path / "g", [f"p{i}" for i in range(N)], lines, counts)
    np.save(tmp_path / "counts.npy", counts)
    return tmp_path / "g"


def test_genotypes_and_missing_codes_equal_bed_reader_and_what_was_written(prefix: Path) -> None:
    counts = PlinkFiles(str(prefix)).counts(range(V))
    written = np.load(prefix.with_name("counts.npy"))
    np.testing.assert_array_equal(np.where(counts < 0, -1, counts), written)
    with bed_reader.open_bed(prefix.with_suffix(".bed"), count_A1=True) as oracle:
        theirs = oracle.read(dtype="int8")
    np.testing.assert_array_equal(np.where(counts < 0, -127, counts), theirs)


def test_pgen_and_bed_of_the_same_people_give_the_same_counts(prefix: Path) -> None:
    counts = PlinkFiles(str(prefix)).counts(range(V))
    target = prefix.with_name("h")
    with pgenlib.PgenWriter(str(target.with_suffix(".pgen")).encode(), N, variant_ct=V, nonref_flags=False) as writer:
        for column in counts.T:
            writer.append_biallelic(np.ascontiguousarray(column))
    target.with_suffix(".psam").write_text("#IID\n" + "".join(f"p{i}\n" for i in range(N)))
    target.with_suffix(".pvar").write_text(
        "#CHROM\tPOS\tID\tREF\tALT\n" + "".join(f"chr1\t{1000 + j}\tv{j}\tg\ta\n" for j in range(V))
    )
    other = PlinkFiles(str(target))
    np.testing.assert_array_equal(other.counts(range(V)), counts)
    assert other.variants == PlinkFiles(str(prefix)).variants


def edit(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


def damaged(prefix: Path, how: str) -> None:
    bed, bim, fam = (prefix.with_suffix(s) for s in (".bed", ".bim", ".fam"))
    data = bed.read_bytes()
    match how:
        case "cut":
            bed.write_bytes(data[:-1])
        case "longer":
            bed.write_bytes(data + b"\0")
        case "empty":
            bed.write_bytes(b"")
        case "magic":
            bed.write_bytes(b"\x00" + data[1:])
        case "sample-major":
            bed.write_bytes(data[:2] + b"\x00" + data[3:])
        case "fam short":
            fam.write_text("".join(fam.read_text().splitlines(keepends=True)[:-1]))
        case "fam long":
            fam.write_text(fam.read_text() + "0 extra 0 0 0 -9\n")
        case "bim blank line":
            bim.write_text(bim.read_text() + "\n")
        case "bim five columns":
            edit(bim, "1\tv3\t0\t1003", "1\tv3\t1003")
        case "duplicate sample":
            edit(fam, "0 p3 ", "0 p2 ")
        case "NUL":
            edit(fam, "0 p3 ", "0 p\x003 ")
        case "position":
            edit(bim, "\t1003\t", "\t99999999999\t")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("cut", "bytes"),
        ("longer", "bytes"),
        ("empty", "does not begin as a .bed"),
        ("magic", "does not begin as a .bed"),
        ("sample-major", "sample-major"),
        ("fam short", "holds more people"),
        ("fam long", "two A1 alleles at all"),
        ("bim blank line", "g.bim line 41"),
        ("bim five columns", "g.bim line 4: 5 columns"),
        ("duplicate sample", "people 3 and 4 are the same"),
        ("NUL", "NUL"),
        ("position", "g.bim line 4"),
    ],
)
def test_damage_is_refused_with_file_and_line_and_no_person(prefix: Path, how: str, said: str) -> None:
    damaged(prefix, how)
    with pytest.raises(SiteError) as caught:
        PlinkFiles(str(prefix)).counts(range(V))
    assert said in caught.value.message
    assert not any(f"p{i}" in caught.value.message.split() for i in range(N))


def test_windows_line_ends_lower_case_and_further_columns_are_accepted(prefix: Path) -> None:
    bim, fam = prefix.with_suffix(".bim"), prefix.with_suffix(".fam")
    before = PlinkFiles(str(prefix))
    bim.write_bytes(bim.read_text().lower().replace("\n", "\r\n").encode())
    fam.write_bytes(fam.read_text().replace(" -9\n", " -9 more\r\n").encode())
    after = PlinkFiles(str(prefix))
    assert (after.samples, after.variants) == (before.samples, before.variants)


def test_a_url_is_not_a_path() -> None:
    with pytest.raises(SiteError, match="not a path"):
        PlinkFiles("https://example.org/g")


@pytest.mark.parametrize(
    ("counted", "other", "category", "first"),
    [
        ("A", "G", "direct", 2),
        ("G", "A", "swapped", 0),
        ("T", "C", "flipped", 2),
        ("C", "T", "flipped_swapped", 0),
        ("A", "C", "allele_mismatch", -9),
    ],
)
def test_a_variant_is_its_place_and_alleles_whatever_the_strand(
    tmp_path: Path, counted: str, other: str, category: str, first: int
) -> None:
    write_bed(tmp_path / "g", ["a", "b"], [Line("chr7", "x", 5, counted, other)], np.array([[2], [-1]], np.int8))
    files = PlinkFiles(str(tmp_path / "g"))
    fields = {"id": "rs1", "chromosome": "7", "position": 5, "effect": "A", "other": "G", "frequency": "0.2"}
    absent = {**fields, "id": "rs2", "position": 6}
    found = match([Variant.model_validate(absent), Variant.model_validate(fields)], files.variants)
    assert found.categories[category] == 1 and found.categories["absent"] == 1
    dosage = found.dosage(files.counts([row for row in found.row if row >= 0]))
    assert dosage[0].tolist() == [-9, first] and dosage[1].tolist() == [-9, -9]
