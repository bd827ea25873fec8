"""Scores from scan sums and a public panel: the solver against scikit-learn, the panel against bed-reader, held-out r."""

from __future__ import annotations

import gzip
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bed_reader import open_bed
from scipy.linalg import cholesky, solve_triangular
from sklearn.linear_model import Lasso, Ridge
from typer.testing import CliRunner

import contracts
import plain_loop
from oracles import table
from oracles.test_structure import REAL, SOURCE
from sequester.client.compute.genome.plink import PlinkFiles
from sequester.protocols import privacy
from sequester.protocols.errors import StudyError
from sequester.protocols.signing import sign_document
from sequester.protocols.study import Study, Variant, study_json
from sequester.server.cli.app import app
from sequester.server.summary import lassosum, scores
from sequester.server.summary.reference import Reference
from sequester.simulate.plink import Line, write_bed

EXACT = {"mode": "strict", "ring_bits": 64, "fraction_bits": 28}
BINARY = {"name": "case", "kind": "binary", "values": ["0", "1"]}
HEIGHT = {"name": "height", "kind": "quantitative", "lower": "-10", "upper": "10", "centre": "0", "scale": "1"}
V, PANEL, TRAIN, HELD = 300, 500, 1500, 1500


def genotypes(n: int, seed: int) -> np.ndarray:
    """Copies with the linkage of neighbours, in windows of 30 that are independent; frequencies of .1 to .5."""
    rng = np.random.default_rng(seed)
    cut = np.random.default_rng(99).uniform(-1.2816, 0.0, V)
    copies = np.zeros((n, V))
    for _ in range(2):
        normal = rng.standard_normal((n, V))
        for j in range(V):
            if j % 30:
                normal[:, j] = 0.85 * normal[:, j - 1] + (1 - 0.85**2) ** 0.5 * normal[:, j]
        copies += normal < cut
    return copies


def listed() -> list[dict[str, Any]]:
    """Ten windows on two chromosomes, 4 Mb apart."""
    f = genotypes(4000, 7).mean(axis=0) / 2
    return [
        {"id": f"v{j}", "chromosome": str(1 + j // 150), "position": 1000 + 4_000_000 * (j // 30) + 100 * (j % 30),
         "effect": "A", "other": "G", "frequency": f"{f[j]:.4f}"}
        for j in range(V)
    ]  # fmt: skip


def study_of(phenotype: dict[str, Any], **plan: Any) -> Study:
    plan = {"kind": "association", "name": "scan", "mode": "exact"} | plan
    return contracts.study(
        phenotype=phenotype, variants=listed(), cohort={}, covariates=[], analyses=[plan], n0=TRAIN, n_max=2 * TRAIN,
        aggregation=EXACT if plan["mode"] == "exact" else {"mode": "strict"},
    )  # fmt: skip


def traits(g: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A height that 12 variants explain in part, and being among its upper 30 %."""
    effects, rng = np.zeros(V), np.random.default_rng(5)
    effects[rng.choice(V, 12, replace=False)] = rng.standard_normal(12)
    genetic = (g - genotypes(4000, 7).mean(axis=0)) @ effects
    genetic *= 0.32
    height = genetic + np.random.default_rng(seed).standard_normal(len(g))
    return np.clip(height, -10, 10), (height > np.quantile(height, 0.7)).astype(float)


@pytest.fixture(scope="module")
def panel(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A panel of other people: every third row counts the other allele, every fifth is on the other strand."""
    folder = tmp_path_factory.mktemp("panel")
    g = genotypes(PANEL, 2)
    g[np.random.default_rng(2).random(g.shape) < 0.01] = -9
    lines, counts = [], g.copy()
    for j, v in enumerate(listed()):
        a, b = ("T", "C") if j % 5 == 0 else ("A", "G")
        if j % 3 == 0:
            a, b = b, a
            counts[:, j] = np.where(g[:, j] < 0, -9, 2 - g[:, j])
        lines.append(Line("chr" + v["chromosome"], f"rs{j}", v["position"], a, b))
    write_bed(folder / "panel", [f"p{i}" for i in range(PANEL)], lines, counts.astype(np.int8))
    return str(folder / "panel")


def test_the_panel_is_read_as_bed_reader_reads_it_in_the_studys_alleles(panel: str) -> None:
    study = study_of(HEIGHT)
    reference = Reference(panel, study.variants)
    theirs = open_bed(panel + ".bed", count_A1=True).read(dtype="float64")
    swapped = np.arange(V) % 3 == 0
    theirs[:, swapped] = 2 - theirs[:, swapped]
    assert reference.matched.all() and reference.people == PANEL
    table.record("summary score", "bed_reader", "copies in the panel", np.nan_to_num(reference.copies(np.arange(V)), nan=-9),
                 np.nan_to_num(theirs, nan=-9), atol=1e-12)  # fmt: skip


def test_the_solver_reaches_the_objective_of_sklearn_on_the_same_quadratic_form(panel: str) -> None:
    study = study_of(HEIGHT)
    g = genotypes(TRAIN, 3)
    height, _ = traits(g, 3)
    r = np.array([np.corrcoef(g[:, j], height)[0, 1] for j in range(V)])
    reference = Reference(panel, study.variants)
    for places in lassosum.blocks(study.variants, reference.matched)[:4]:
        x = reference.standardised(places)
        for s in (0.2, 0.9):
            matrix = (1 - s) * x.T @ x + s * np.eye(len(places))
            root = cholesky(matrix, lower=True)
            target = solve_triangular(root, r[places], lower=True)
            for strength in (0.1 * np.abs(r).max(), 0.02 * np.abs(r).max()):
                ours = lassosum.solve(r[places], x.T @ x, s, float(strength), np.zeros(len(places)))
                theirs = Lasso(alpha=strength / len(places), fit_intercept=False, tol=1e-14, max_iter=200_000)
                other = theirs.fit(root.T, target).coef_

                def objective(
                    b: np.ndarray, m: np.ndarray = matrix, p: np.ndarray = places, at: float = strength
                ) -> float:
                    return float(b @ m @ b / 2 - b @ r[p] + at * np.abs(b).sum())

                gap = max(objective(ours) - objective(other), 0.0) / abs(objective(other))
                table.within("summary score", "sklearn", "objective above theirs, relative", gap, 1e-6)
                warm = lassosum.solve(r[places], x.T @ x, s, float(strength), other + 0.01)
                assert np.abs(warm - ours).max() < 1e-8


def held_out_r(w: np.ndarray, seed: int, outcome: int) -> float:
    g = genotypes(HELD, seed)
    return float(np.corrcoef(g @ w, traits(g, seed)[outcome])[0, 1])


def weights_of(study: Study, score: scores.Score) -> np.ndarray:
    rows = [line.split("\t") for line in gzip.decompress(score.file).decode().splitlines() if not line.startswith("#")]
    by_id = {row[0]: float(row[5]) for row in rows[1:]}
    return np.array([by_id[v.id] for v in study.variants])


@pytest.mark.parametrize("binary", [False, True])
def test_joint_weights_predict_like_a_ridge_of_the_pooled_people_and_better_than_marginal_ones(
    panel: str, binary: bool
) -> None:
    study = study_of(BINARY if binary else HEIGHT, follow=0)
    g = genotypes(TRAIN, 3)
    outcome = traits(g, 3)[int(binary)]
    cohorts = plain_loop.split(plain_loop.patients(study, outcome, dosage=g), [800, 500, 200])
    result = plain_loop.run(study, cohorts)["scan"].result
    score = scores.joint(study, privacy.study_digest(study), "scan", result, panel)
    ours = weights_of(study, score)
    marginal = np.array(result["table"]["effect"])
    x = (g - g.mean(axis=0)) / g.std(axis=0)
    ridges = [Ridge(alpha=alpha).fit(x, outcome).coef_ / g.std(axis=0) for alpha in (100, 1000, 10000)]
    r = {
        "lassosum": held_out_r(ours, 11, int(binary)),
        "pooled ridge, the best of three": max(held_out_r(w, 11, int(binary)) for w in ridges),
        "marginal effects": held_out_r(marginal, 11, int(binary)),
    }
    table.figure(
        "A score from scan sums and a panel of 500 other people, 1,500 people trained, r in 1,500 others",
        "binary" if binary else "quantitative", r,
    )  # fmt: skip
    assert r["lassosum"] > r["marginal effects"] and r["lassosum"] > r["pooled ridge, the best of three"] - 0.02
    assert 0 < score.said["used"] < V and score.said["blocks"] == 10


def test_a_one_round_score_of_exact_sums_gives_the_weights_of_a_scan_but_for_its_scale(panel: str) -> None:
    g = genotypes(TRAIN, 3)
    outcome = traits(g, 3)[1]
    found = []
    for plan in ({"follow": 0}, {"kind": "prs", "prevalence": "0.3", "shrinkage": "none", "part": "all"}):
        study = study_of(BINARY, **plan)
        cohorts = plain_loop.split(plain_loop.patients(study, outcome, dosage=g), [800, 500, 200])
        result = plain_loop.run(study, cohorts)["scan"].result
        found.append(weights_of(study, scores.joint(study, privacy.study_digest(study), "scan", result, panel)))
    assert np.corrcoef(found[0], found[1])[0, 1] > 0.98
    assert held_out_r(found[1], 11, 1) == pytest.approx(held_out_r(found[0], 11, 1), abs=0.02)


def test_what_does_not_fit_is_said(panel: str, tmp_path: Path) -> None:
    study = study_of(HEIGHT)
    digest = privacy.study_digest(study)
    elsewhere = study.model_copy(
        update={"variants": tuple(v.model_copy(update={"position": 5 + v.position}) for v in study.variants)}
    )
    empty = {"table": {name: [0.0] * V for name in ("statistic", "se", "called")} | {"error": [""] * V}}
    with pytest.raises(StudyError, match="0 of the study's 300 variants"):
        scores.joint(elsewhere, digest, "scan", empty, panel)
    with pytest.raises(StudyError, match="No such file"):
        Reference(str(tmp_path / "none"), study.variants)
    for ending in (".bed", ".bim", ".fam"):
        (tmp_path / f"cut{ending}").write_bytes(Path(panel + ending).read_bytes()[: -1 if ending == ".bed" else None])
    with pytest.raises(StudyError, match="500 people and 300 variants, variant-major, need"):
        Reference(str(tmp_path / "cut"), study.variants)


def test_the_command_writes_a_file_that_says_how_it_was_made(panel: str, tmp_path: Path) -> None:
    study = study_of(HEIGHT)
    g = genotypes(TRAIN, 3)
    cohorts = plain_loop.split(plain_loop.patients(study, traits(g, 3)[0], dosage=g), [800, 500, 200])
    done = plain_loop.run(study, cohorts)["scan"].result
    (tmp_path / "study.json").write_bytes(sign_document("study", study_json(study), contracts.COORDINATOR))
    results = {"study": privacy.study_digest(study), "analyses": {"scan": {"result": done}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    command = [
        "study",
        "weights",
        str(tmp_path),
        "--of",
        "scan",
        "--reference",
        panel,
        "--out",
        str(tmp_path / "s.txt.gz"),
    ]
    said = CliRunner().invoke(app, [*command, "--json"])
    assert said.exit_code == 0, said.output
    assert json.loads(said.output)["matched"] == V
    text = gzip.decompress((tmp_path / "s.txt.gz").read_bytes()).decode()
    assert "#method=lassosum (Mak et al. 2017); s=" in text and "#epsilon=none, exact" in text
    again = CliRunner().invoke(app, command)
    assert isinstance(again.exception, StudyError) and "does not exist yet" in again.exception.hint


@pytest.mark.slow
@pytest.mark.skipif(not SOURCE.exists(), reason="SEQUESTER_DATA has no hapmap3_1kg")
def test_1000_genomes_is_a_panel_as_it_comes() -> None:
    rows = [line.split() for line in Path(f"{REAL}.bim").read_text().splitlines()]
    keep = [i for i, row in enumerate(rows) if {row[4], row[5]} not in ({"A", "T"}, {"C", "G"})]
    variants = [
        Variant(id=rows[i][1], chromosome=rows[i][0], position=int(rows[i][3]), effect=rows[i][4], other=rows[i][5],
                frequency=Decimal("0.3"))
        for i in keep
    ]  # fmt: skip
    reference = Reference(str(REAL), variants)
    theirs = PlinkFiles(str(REAL)).counts(keep).astype(float)
    ours = np.nan_to_num(reference.copies(np.arange(len(keep))), nan=-9)
    table.record("summary score", "pgenlib", "copies in 1000 Genomes", ours, theirs, atol=1e-12)
