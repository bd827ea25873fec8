"""Genotype counts and Hardy-Weinberg over hospitals against PLINK 2 on all of them together."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import contracts
import plain_loop
from oracles import table
from sequester.protocols.analyses.quality import QUALITY, hardy_weinberg
from sequester.protocols.errors import StudyError
from sequester.protocols.study import Study
from sequester.simulate.plink import Line, write_bed

V = 300


def variants(count: int) -> list[dict[str, Any]]:
    return [
        {"id": f"v{j}", "chromosome": "1", "position": 1000 + j, "effect": "A", "other": "G", "frequency": "0.3"}
        for j in range(count)
    ]


def study_of(count: int = V, mode: str = "exact", **plan: Any) -> Study:
    return contracts.study(
        covariates=[], variants=variants(count), cohort={"subgroup": "ancestry", "subgroup_values": ["AFR", "EUR"]},
        analyses=[{"kind": "quality", "name": "check", "mode": mode} | plan],
        aggregation={"mode": "strict", "ring_bits": 64, "fraction_bits": 28} if mode == "exact" else {"mode": "strict"},
    )  # fmt: skip


def genotypes(n: int, count: int, seed: int) -> np.ndarray:
    """Copies with inbreeding in some variants, rare ones, and 0..10 % missing."""
    rng = np.random.default_rng(seed)
    f = rng.choice([0.002, 0.05, 0.3, 0.5], count)
    inbred = rng.random(count) < 0.2
    two = rng.random((n, count, 2)) < f[None, :, None]
    copies = two.sum(axis=2).astype(float)
    copies[:, inbred] = np.where(rng.random((n, int(inbred.sum()))) < 0.4, 2.0 * two[:, inbred, 0], copies[:, inbred])
    copies[rng.random((n, count)) < rng.uniform(0, 0.1, count)] = np.nan
    return copies


def read(path: Path) -> list[dict[str, str]]:
    head, *body = [line.split() for line in path.read_text().splitlines()]
    return [dict(zip(head, row, strict=True)) for row in body]


@pytest.mark.skipif(shutil.which("plink2") is None, reason="no plink2")
def test_counts_missingness_and_hardy_weinberg_equal_plink2(tmp_path: Path) -> None:
    g = genotypes(2000, V, 1)
    study = study_of(frequencies=True)
    whole = plain_loop.patients(study, np.zeros(2000), dosage=g)
    rows = plain_loop.run(study, plain_loop.split(whole, [1500, 400, 100]))["check"].result["frequencies"]
    lines = [Line("1", f"v{j}", 1000 + j, "A", "G") for j in range(V)]
    write_bed(tmp_path / "g", [f"p{i}" for i in range(2000)], lines, np.where(np.isnan(g), -1, g).astype(np.int8))
    subprocess.run(
        ["plink2", "--bfile", "g", "--freq", "counts", "--missing", "--hardy", "--out", "o", "--threads", "1"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    for row in read(tmp_path / "o.acount"):
        ours = rows[int(row["ID"][1:])]
        counted = ours["effect_frequency"] * 2 * ours["called"]
        theirs = float(row["ALT_CTS"]) if row["ALT"] == "A" else float(row["OBS_CT"]) - float(row["ALT_CTS"])
        table.within("variant quality", "PLINK 2", "allele counts", abs(counted - theirs), 1e-6)
    for row in read(tmp_path / "o.vmiss"):
        table.within(
            "variant quality",
            "PLINK 2",
            "missing calls",
            abs(rows[int(row["ID"][1:])]["missing"] - int(row["MISSING_CT"])),
            0.0,
        )
    ours = [rows[int(row["ID"][1:])]["hardy_weinberg_p"] for row in read(tmp_path / "o.hardy")]
    theirs = [float(row["P"]) for row in read(tmp_path / "o.hardy")]
    table.record("variant quality", "PLINK 2", "Hardy-Weinberg p, relative", ours, theirs, rtol=1e-5)
    assert min(theirs) < 1e-50  # far into the tail too


def test_what_passes_leaves_as_a_list_and_no_frequency_leaves_unasked() -> None:
    rng = np.random.default_rng(2)
    g = (rng.random((3000, 6, 2)) < 0.3).sum(axis=2).astype(float)
    g[rng.random(3000) < 0.2, 0] = np.nan  # v0: called in 80 %
    g[:, 1] = rng.random(3000) < 0.004  # v1: rare
    g[:, 2] = 2 * (rng.random(3000) < 0.3)  # v2: no heterozygotes
    g[:1000, 3] = np.nan  # v3: the first hospital does not carry it
    g[:, 4] = np.nan  # v4: nobody carries it
    study = study_of(6)
    found = plain_loop.run(
        study, plain_loop.split(plain_loop.patients(study, np.zeros(3000), dosage=g), [1000, 1500, 500])
    )
    result = found["check"].result
    assert result["passing"] == ["v3", "v5"]
    assert result["failed"] == {
        "absent": 1,
        "call_rate": 1,
        "minor_frequency": 1,
        "minor_count": 0,
        "hardy_weinberg": 1,
    }
    assert set(result) == {"variants", "passing", "failed"}


def test_hardy_weinberg_is_tested_in_controls_and_within_each_ancestry() -> None:
    rng = np.random.default_rng(3)
    n = 4000
    strata = (rng.random(n) < 0.5).astype(np.int64)
    g = (rng.random((n, 1, 2)) < np.where(strata, 0.9, 0.1)[:, None, None]).sum(axis=2).astype(float)
    found = {}
    for split in ("none", "subgroup"):  # two ancestries together are far from the proportions, each alone is not
        study = study_of(1, split=split)
        whole = plain_loop.patients(study, np.zeros(n), dosage=g, strata=strata)
        found[split] = plain_loop.run(study, plain_loop.split(whole, [2000, 1000, 1000]))["check"].result
    assert found["none"]["passing"] == [] and found["subgroup"]["passing"] == ["v0"]
    y = (rng.random(n) < 0.3).astype(float)
    g = (rng.random((n, 1, 2)) < 0.3).sum(axis=2).astype(float)
    g[y == 1] = 1.0  # an excess of heterozygotes among cases is a finding, not an error
    study = study_of(1, split="outcome")
    assert plain_loop.run(study, plain_loop.split(plain_loop.patients(study, y, dosage=g), [2000, 1000, 1000]))[
        "check"
    ].result["passing"] == ["v0"]


def test_hardy_weinberg_by_hand() -> None:
    # 3 people, 3 rare alleles: het counts 1 and 3 have 2^1 3!/(1!1!1!) = 12 and 2^3 3!/(3!) = 8 of 20 ways
    assert hardy_weinberg(1, 1, 1) == pytest.approx(1.0)
    assert hardy_weinberg(0, 3, 0) == pytest.approx(0.4)
    assert hardy_weinberg(10, 0, 0) == 1.0


def test_one_patient_is_one_cell_of_each_variant_in_private_mode_whoever_else_is_missing() -> None:
    study = study_of(20, "private")
    plan = study.analyses[0]
    g = np.full((6, 20), np.nan)
    g[0] = 1.0  # the only one with calls: without them the variant must not change its place for the others
    whole = plain_loop.patients(study, np.zeros(6), dosage=g)
    one, two = (QUALITY.contribution(plan, study, c, {}, 0)["genotypes"] for c in (whole, whole.only(np.arange(1, 6))))
    assert np.linalg.norm(one - two) <= QUALITY.sensitivity(plan, study) * (1 + 1e-12)


def test_private_counts_of_thousands_of_variants_are_refused() -> None:
    with pytest.raises(StudyError, match="are noise"):
        study_of(2001, "private")
