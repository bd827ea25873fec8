"""Whatever is done to the bytes of a genotype file: a named error or the right matrix, never a crash, a hang, a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from genome.fuzz import KINDS, corpus, fuzz, judge, prepare

pytestmark = pytest.mark.slow  # in child processes, since readers written in C can crash
INPUTS = 10_500


def test_the_clean_files_are_read(tmp_path: Path) -> None:
    corpus(tmp_path)
    for name, kind in (
        ("g", "bed"), ("h", "pgen"), ("g.vcf", "vcf"), ("z.vcf.gz", "vcf.gz"), ("y.vcf.gz", "plain.gz"), ("g.bcf", "bcf"),
        ("g.bgen", "bgen"), ("d.vcf", "dosage-vcf"),
    ):  # fmt: skip
        assert judge(kind, tmp_path / name, tmp_path) == "read", name


def test_ten_thousand_damaged_files_end_in_a_named_error_or_in_the_right_matrix(tmp_path: Path) -> None:
    tally = fuzz(0, INPUTS, tmp_path)
    assert tally.wrong == []
    assert sum(tally.ends.values()) == INPUTS
    for kind in KINDS:  # each format was both refused and read: neither answer is the only one
        assert tally.ends[f"{kind} refused"] > INPUTS / len(KINDS) / 4
        assert tally.ends[f"{kind} read"] > 0


def test_the_judge_finds_a_wrong_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus(tmp_path)
    from sequester.client.compute.genome import vcf

    monkeypatch.setattr(vcf, "MISSING", 0)  # a reader that takes missing for no copies
    assert judge("vcf", tmp_path / "g.vcf", tmp_path).startswith("WRONG")


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(10))
def test_a_million_damaged_files(tmp_path: Path, part: int) -> None:
    tally = fuzz(1_000_000 + part * 100_000, 100_000, tmp_path)
    assert tally.wrong == [] and sum(tally.ends.values()) == 100_000


@pytest.mark.nightly
def test_inputs_that_grow_towards_lines_not_yet_reached(tmp_path: Path) -> None:
    tally = fuzz(5_000_000, 100_000, tmp_path, guided=True)
    assert tally.wrong == [] and sum(tally.ends.values()) == 100_000


def test_guided_inputs_reach_lines_that_the_clean_files_do_not(tmp_path: Path) -> None:
    tally = fuzz(5_000_000, 600, tmp_path, guided=True)
    assert tally.wrong == []
    assert len(list((tmp_path / "pool").iterdir())) > 2 * len(KINDS)


def test_the_same_number_is_the_same_input(tmp_path: Path) -> None:
    clean, a, b = (tmp_path / n for n in "cab")
    for folder in (clean, a, b):
        folder.mkdir()
    corpus(clean)
    for number in range(30):
        (kind, one), (_, two) = prepare(number, clean, a), prepare(number, clean, b)
        assert {p.name: p.read_bytes() for p in a.iterdir()} == {p.name: p.read_bytes() for p in b.iterdir()}, kind
        assert one.name == two.name
