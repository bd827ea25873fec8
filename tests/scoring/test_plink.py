"""Scores equal `plink2 --score` to its printed digits: real PGS Catalog files on real genomes of 1000 Genomes."""

from __future__ import annotations

import csv
import gzip
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genome.files import DATA, needs_data, needs_plink2
from scoring.hospital import applied, hospital, last_digit, plink_sums, scoring_text
from sequester.client.compute.genome.plink import PlinkFiles
from sequester.client.ingest.convert import GenotypeWriter

PGS = DATA / "pgs_catalog"
PAIR = {"A": "T", "T": "A", "C": "G", "G": "C"}
pytestmark = [needs_data, needs_plink2]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """tiny1000G as plink2 converts it; `holes`: the same with 3 % of genotypes missing; `f`: frequencies of the whole."""
    folder = tmp_path_factory.mktemp("tiny")
    run = lambda *words: subprocess.run(["plink2", *words], check=True, capture_output=True, timeout=120)  # noqa: E731
    run("--vcf", str(PGS / "tiny1000G.vcf.gz"), "--make-pgen", "--out", str(folder / "whole"))
    run("--pfile", str(folder / "whole"), "--freq", "--out", str(folder / "f"))
    whole = PlinkFiles(str(folder / "whole"))
    counts = whole.counts(range(len(whole.variants)))
    counts[np.random.default_rng(5).random(counts.shape) < 0.03] = -9
    with GenotypeWriter(folder / "holes.pgen", len(whole.samples), counts.shape[1], dosages=False) as writer:
        for column in counts.T:
            writer.add(np.ascontiguousarray(column))
    for suffix in (".pvar", ".psam"):
        shutil.copy(folder / f"whole{suffix}", folder / f"holes{suffix}")
    return {"whole": folder / "whole", "holes": folder / "holes", "f": folder / "f.afreq"}


def real_rows(name: str) -> list[dict[str, str]]:
    with gzip.open(PGS / name, "rt") as file:
        return list(csv.DictReader((line for line in file if not line.startswith("#")), delimiter="\t"))


def joined_plainly(rows: list[dict[str, str]], prefix: Path) -> list[tuple[str, str, str]]:
    """(variant id, effect allele as the file spells it, weight) of the rows that are in the file, by a plain join."""
    at: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
    for line in prefix.with_name(prefix.name + ".pvar").read_text().splitlines():
        if not line.startswith("#"):
            chromosome, position, id_, ref, alt = line.split("\t")[:5]
            at.setdefault((chromosome, position), []).append((id_, ref, alt))
    out, used = [], set()
    for row in rows:
        effect, other = row["effect_allele"], row["other_allele"]
        if not row["chr_name"].isdigit() or PAIR.get(effect) == other:
            continue
        for id_, ref, alt in at.get((row["chr_name"], row["chr_position"]), ()):
            for e, o in ((effect, other), (PAIR.get(effect, ""), PAIR.get(other, ""))):
                if {e, o} == {ref, alt} and id_ not in used:
                    out.append((id_, e, row["effect_weight"]))
                    used.add(id_)
    return out


def agree(ours: dict[str, dict[str, str]], theirs: dict[str, str], people: int) -> None:
    assert set(ours) == set(theirs) and len(ours) == people
    for person, row in ours.items():
        # half a unit of the last digit printed, and the rounding of frequencies to six digits does not enter: both read them
        assert abs(float(row["score"]) - float(theirs[person])) <= 0.5001 * last_digit(theirs[person]) + 1e-9, person


@pytest.mark.parametrize("genotypes", ["whole", "holes"])
def test_a_real_pgs_file_gives_what_plink2_prints_with_effect_alleles_on_either_side(
    tmp_path: Path, tiny: dict[str, Path], genotypes: str
) -> None:
    name = "PGS001229_hmPOS_GRCh38.txt.gz"
    rows = joined_plainly(real_rows(name), tiny[genotypes])
    (tmp_path / "rows.txt").write_text("ID\tA\tW\n" + "".join("\t".join(row) + "\n" for row in rows))
    theirs = plink_sums(tiny[genotypes], tmp_path / "rows.txt", tmp_path / "s", f"--read-freq={tiny['f']}")
    home = hospital(tmp_path / "h", tiny[genotypes], "GRCh38")
    account, ours = applied(
        home, PGS / name, tmp_path / "out", build="GRCh38", min_overlap=0.01, frequencies=str(tiny["f"])
    )
    agree(ours, theirs, 3202)
    assert (
        account["matched"] == len(rows) > 850
        and account["categories"]["direct"] > 50
        and account["categories"]["swapped"] > 0
    )
    assert (
        sum(account["categories"].values()) + len(account["set_aside"]) == account["rows"] == 51_209
    )  # nothing is lost
    assert len(account["not_found"]) + account["matched"] + len(account["set_aside"]) == 51_209
    reasons = [row["reason"] for row in account["set_aside"]]
    assert reasons.count("no_position") == 26 and reasons.count("not_autosomal") == 1967 + 2 + 2
    assert account["frequencies"] == {"given": len(rows)}
    missing = np.mean([float(row["missing"]) for row in ours.values()])
    assert missing == pytest.approx(0.03 if genotypes == "holes" else 0.0, abs=0.002)


def test_frequencies_of_the_cohort_itself_give_what_plink2_prints_by_default(
    tmp_path: Path, tiny: dict[str, Path]
) -> None:
    name = "PGS001229_hmPOS_GRCh38.txt.gz"
    rows = joined_plainly(real_rows(name), tiny["holes"])
    (tmp_path / "rows.txt").write_text("ID\tA\tW\n" + "".join("\t".join(row) + "\n" for row in rows))
    theirs = plink_sums(tiny["holes"], tmp_path / "rows.txt", tmp_path / "s")
    home = hospital(tmp_path / "h", tiny["holes"], "GRCh38")
    _, ours = applied(home, PGS / name, tmp_path / "out", build="GRCh38", min_overlap=0.01, frequencies="cohort")
    agree(ours, theirs, 3202)


@pytest.mark.parametrize("kind", ["dominant", "recessive"])
def test_dominant_and_recessive_rows_give_what_plink2_prints(tmp_path: Path, tiny: dict[str, Path], kind: str) -> None:
    files = PlinkFiles(str(tiny["whole"]))
    rng = np.random.default_rng(1)
    rows, plain = [], []
    for j, v in enumerate(files.variants):
        if v.chromosome.isdigit() and len(v.counted) == len(v.other) == 1 and PAIR[v.counted] != v.other and j % 2:
            effect, other = (v.counted, v.other) if rng.random() < 0.5 else (v.other, v.counted)
            weight = f"{rng.normal():.4f}"
            rows.append((v.chromosome, v.position, effect, other, weight, kind == "dominant", kind == "recessive"))
            plain.append((v.id, effect, weight))
    (tmp_path / "s.txt").write_text(scoring_text(rows, "GRCh38", ("is_dominant", "is_recessive")))
    (tmp_path / "rows.txt").write_text("ID\tA\tW\n" + "".join("\t".join(row) + "\n" for row in plain))
    theirs = plink_sums(tiny["whole"], tmp_path / "rows.txt", tmp_path / "s", kind)
    home = hospital(tmp_path / "h", tiny["whole"], "GRCh38")
    account, ours = applied(home, tmp_path / "s.txt", tmp_path / "out")
    assert account["kinds"] == {kind: account["matched"]} and account["matched"] > 300
    agree(ours, theirs, 3202)


@pytest.mark.parametrize(
    "name", ["PGS000001_hmPOS_GRCh38.txt.gz", "PGS000002_hmPOS_GRCh38.txt.gz", "PGS000802_hmPOS_GRCh37.txt"]
)
def test_real_files_on_genomes_made_at_their_places_give_what_plink2_prints(tmp_path: Path, name: str) -> None:
    """tiny1000G holds none of these scores' variants; here are genotypes for each, half counted on the other side."""
    opened: Any = gzip.open if name.endswith(".gz") else open
    with opened(PGS / name, "rt") as file:
        real = list(csv.DictReader((line for line in file if not line.startswith("#")), delimiter="\t"))
    rng = np.random.default_rng(2)
    n, lines, plain = 200, [], []
    for row in real:
        effect, other = row["effect_allele"], row["other_allele"]
        ref, alt = (effect, other) if rng.random() < 0.5 else (other, effect)
        lines.append((row["hm_chr"], row["hm_pos"], row["rsID"], ref, alt))
        simple = "True" not in (row.get("is_dominant"), row.get("is_recessive"))
        if PAIR.get(effect) != other and simple:
            plain.append((row["rsID"], effect, row["effect_weight"]))
    lines.sort(key=lambda line: (int(line[0]), int(line[1])))  # plink2 wants chromosomes together
    prefix = tmp_path / "g"
    prefix.with_suffix(".pvar").write_text(
        "#CHROM\tPOS\tID\tREF\tALT\n" + "".join("\t".join(line) + "\n" for line in lines)
    )
    prefix.with_suffix(".psam").write_text("#IID\tSEX\n" + "".join(f"p{i}\t1\n" for i in range(n)))
    counts = rng.choice(np.array([0, 1, 2, -9], np.int8), (len(lines), n), p=[0.4, 0.35, 0.2, 0.05])
    with GenotypeWriter(prefix.with_suffix(".pgen"), n, len(lines), dosages=False) as writer:
        for column in counts:
            writer.add(np.ascontiguousarray(column))
    (tmp_path / "rows.txt").write_text("ID\tA\tW\n" + "".join("\t".join(row) + "\n" for row in plain))
    words = ["plink2", "--pfile", str(prefix), "--freq", "--out", str(tmp_path / "f")]
    subprocess.run(words, check=True, capture_output=True, timeout=120)
    frequencies = str(tmp_path / "f.afreq")
    theirs = plink_sums(prefix, tmp_path / "rows.txt", tmp_path / "s", f"--read-freq={frequencies}")
    home = hospital(tmp_path / "h", prefix, "GRCh37" if "37" in name else "GRCh38")
    if "000802" in name:  # 14 of 19 rows are dominant or recessive: compare the additive ones in a file of their own
        text = (PGS / name).read_text().splitlines()
        kept = [line for line in text if line.startswith("#") or "\tTrue\t" not in line]
        (tmp_path / "additive.txt").write_text("\n".join(kept) + "\n")
        account, ours = applied(
            home, tmp_path / "additive.txt", tmp_path / "out", min_overlap=0.5, frequencies=frequencies
        )
        whole, _ = applied(home, PGS / name, tmp_path / "all", min_overlap=0.5, frequencies=frequencies)
        assert whole["rows"] == 19 and set(whole["kinds"]) == {"additive", "dominant", "recessive"}
    else:
        account, ours = applied(home, PGS / name, tmp_path / "out", frequencies=frequencies)
        assert account["rows"] == 77 and account["categories"]["direct"] > 20 < account["categories"]["swapped"]
    assert account["matched"] == len(plain) and account["categories"]["palindromic"] == account["rows"] - len(plain)
    agree(ours, theirs, n)
