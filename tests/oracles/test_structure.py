"""Federated components against one singular value decomposition and PLINK 2; projection as scores of a study."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.linalg import subspace_angles

import contracts
import plain_loop
from oracles import table
from sequester.client.compute.genome.plink import PlinkFiles
from sequester.protocols.analyses.structure import projection
from sequester.protocols.errors import StudyError
from sequester.protocols.study import Study, Variant

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(os.environ.get("SEQUESTER_DATA", str(ROOT.parent / "shared/data"))) / "hapmap3_1kg"
REAL = SOURCE / "1kg.ref.phase1_release_v3.20101123_thinned_autosomal_overlap"


def variants(count: int, f: float = 0.3) -> list[dict[str, Any]]:
    return [
        {"id": f"v{j}", "chromosome": "1", "position": 1000 + j, "effect": "A", "other": "G", "frequency": str(f)}
        for j in range(count)
    ]


def study_of(count: int, **plan: Any) -> Study:
    return contracts.study(
        covariates=[], variants=variants(count), cohort={},
        analyses=[{"kind": "structure", "name": "ancestry", "mode": "exact"} | plan],
        aggregation={"mode": "strict", "ring_bits": 64, "fraction_bits": 28}, n0=1000, n_max=1300,
    )  # fmt: skip


def populations(n: int, v: int, seed: int, fst: float = 0.15) -> np.ndarray:
    """Three populations of Balding and Nichols, sorted, so that hospitals differ as real ones do; 2 % missing."""
    rng = np.random.default_rng(seed)
    ancestral = rng.uniform(0.1, 0.9, v)
    a = ancestral * (1 - fst) / fst
    b = (1 - ancestral) * (1 - fst) / fst
    g = np.vstack([rng.binomial(2, rng.beta(a, b), (n // 3, v)) for _ in range(3)]).astype(float)
    g[rng.random(g.shape) < 0.02] = np.nan
    return g


def decomposed(g: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues of Z Z' / V and right singular vectors, by LAPACK on the pooled matrix."""
    f = np.nanmean(g, axis=0) / 2
    keep = (f > 0) & (f < 1)
    z = np.zeros(g.shape)
    z[:, keep] = np.nan_to_num((g[:, keep] - 2 * f[keep]) / np.sqrt(2 * f[keep] * (1 - f[keep])))
    _, s, v = np.linalg.svd(z, full_matrices=False)
    return s[:k] ** 2 / keep.sum(), v[:k].T


def test_components_equal_the_pooled_singular_vectors_where_the_gap_separates_them() -> None:
    g = populations(600, 400, 1)
    g[:, 7] = 0.0  # nobody varies
    g[:200, 9] = np.nan  # a hospital without this variant
    study = study_of(400, components=3, iterations=30)
    whole = plain_loop.patients(study, np.zeros(600), dosage=g)
    result = plain_loop.run(study, plain_loop.split(whole, [200, 250, 150]))["ancestry"].result
    values, vectors = decomposed(g, 2)
    ours = np.array([result["loadings"][f"PC{k}"] for k in (1, 2)]).T
    assert result["left_out"] == ["v7"]
    table.record(
        "components", "scipy.linalg", "eigenvalues 1-2, relative", result["eigenvalues"][:2], values, rtol=1e-3
    )
    angle = float(subspace_angles(ours, vectors).max())
    table.within("components", "scipy.linalg", "angle of the space of 1-2, radians", angle, 1e-3)
    assert all(max(column, key=abs) > 0 for column in ours.T.tolist())  # signs are fixed


@pytest.mark.slow
@pytest.mark.skipif(not SOURCE.exists() or shutil.which("plink2") is None, reason="no hapmap3_1kg or no plink2")
def test_real_people_of_five_regions_have_the_components_of_plink2(tmp_path: Path) -> None:
    files = PlinkFiles(str(REAL))
    v = len(files.variants)
    counts = files.counts(range(v)).astype(float)
    g = np.where(counts < 0, np.nan, counts)
    study = study_of(v, components=4, iterations=12)
    whole = plain_loop.patients(study, np.zeros(len(g)), dosage=g)
    sizes = [400, 300, 200, 100, len(g) - 1000]
    finished = plain_loop.run(study, plain_loop.split(whole, sizes))["ancestry"]
    command = ["plink2", "--bfile", str(REAL), "--pca", "10", "--out", "o", "--threads", "1"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    rows = [line.split() for line in (tmp_path / "o.eigenvec").read_text().splitlines()[1:]]
    theirs = np.array([[float(c) for c in row[-10:]] for row in rows])[:, :4]
    state = finished.state
    z = np.nan_to_num((g - state["mean"]) / np.where(state["scale"] > 0, state["scale"], np.inf))
    angle = float(subspace_angles(z @ state["loadings"], theirs).max())
    table.within("components", "PLINK 2", "angle of the space of 1-4 on 1000 Genomes, radians", angle, 0.03)
    values = [float(line) for line in (tmp_path / "o.eigenval").read_text().split()][:4]
    table.record(
        "components", "PLINK 2", "eigenvalues 1-4, relative", finished.result["eigenvalues"], values, rtol=1e-3
    )


def test_a_projected_component_is_a_score_of_the_study() -> None:
    rng = np.random.default_rng(3)
    f = rng.uniform(0.1, 0.9, 50).round(3)
    listed = [Variant.model_validate({**row, "frequency": str(p)}) for row, p in zip(variants(50), f, strict=True)]
    loadings = rng.standard_normal((50, 2))
    g = rng.binomial(2, f, (40, 50)).astype(float)
    formula = (g - 2 * f) / np.sqrt(2 * f * (1 - f)) @ loadings
    for k, score in enumerate(projection(listed, loadings, [1.0, 2.0])):
        raw = g @ [float(w) for _, w in score.weights]
        table.record("projection", "the formula", "component", raw - float(score.mean), formula[:, k], atol=1e-6)


def test_private_components_are_refused_with_the_way_out() -> None:
    with pytest.raises(StudyError, match="project on public loadings"):
        contracts.study(
            covariates=[], variants=variants(3), analyses=[{"kind": "structure", "name": "a", "components": 2}]
        )


def test_components_of_more_people_than_the_fixed_point_holds_are_refused_before_they_are_signed() -> None:
    asked = {"covariates": [], "variants": variants(300), "cohort": {}, "n0": 1_500_000, "n_max": 2_000_000,
             "privacy": {"epsilon": "3", "delta": "0.0000001", "order": "8.9"},
             "analyses": [{"kind": "structure", "name": "ancestry", "mode": "exact"}]}  # fmt: skip
    strict = {"mode": "strict", "ring_bits": 64}
    with pytest.raises(StudyError, match="leave room for 23 fraction_bits, found 28"):
        contracts.study(**asked, aggregation={**strict, "fraction_bits": 28})
    contracts.study(**asked, aggregation={**strict, "fraction_bits": 23})
