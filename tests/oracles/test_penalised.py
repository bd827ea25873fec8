"""Penalised models against scikit-learn and a slow twin; wide ridge against the dual solve, on real mice too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import ElasticNet, LogisticRegression, Ridge

import contracts
import plain_loop
from oracles import table
from oracles.test_structure import variants
from sequester.client.compute.genome.plink import PlinkFiles
from sequester.protocols.analyses.registry import analysis_of
from sequester.protocols.errors import StudyError
from sequester.protocols.study import Study

EXACT = {"mode": "strict", "ring_bits": 64, "fraction_bits": 28}
BINARY = {"name": "case", "kind": "binary", "values": ["0", "1"]}
HEIGHT = {"name": "height", "kind": "quantitative", "lower": "-10", "upper": "10", "centre": "0", "scale": "1"}
ROOT = Path(__file__).resolve().parents[2]
MICE = Path(os.environ.get("SEQUESTER_DATA", str(ROOT.parent / "shared/data"))) / "mouse_hs1940"
SIZES = [500, 200, 80, 20]
ALL = sum(SIZES)


def study_of(count: int, phenotype: dict[str, Any], columns: int = 0, **plan: Any) -> Study:
    return contracts.study(
        phenotype=phenotype, variants=variants(count), cohort={}, aggregation=EXACT,
        covariates=[
            {"name": f"c{j}", "kind": "quantitative", "lower": "-9", "upper": "9", "centre": "0", "scale": "1"}
            for j in range(columns)
        ],
        analyses=[{"kind": "penalised", "name": "fit", "mode": "exact", "part": "all"} | plan],
    )  # fmt: skip


def people(v: int, seed: int, n: int = ALL) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Raw copies with linkage between neighbours, standardised, case status, height."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((n, v))
    for j in range(1, v):
        normal[:, j] = 0.6 * normal[:, j - 1] + 0.8 * normal[:, j]
    g = (normal > 0.5).astype(float) + (normal > 1.4)
    x = (g - 0.6) / 0.42**0.5
    liability = x[:, ::7] @ rng.normal(0, 0.4, len(x[0, ::7]))
    y = (rng.random(n) < 1 / (1 + np.exp(-(liability - 1)))).astype(float)
    return g, x, y, np.clip(liability + rng.standard_normal(n), -10, 10)


def fit(study: Study, y: np.ndarray, g: np.ndarray, raw: np.ndarray | None = None, sizes: list[int] = SIZES) -> Any:
    whole = plain_loop.patients(study, y, dosage=g, table=raw)
    return plain_loop.run(study, plain_loop.split(whole, sizes))["fit"]


def objective(family: str, x: np.ndarray, y: np.ndarray, w: np.ndarray, b: float, strength: float, l1: float) -> float:
    z = x @ w + b
    loss = np.logaddexp(0, z) - y * z if family == "logistic" else 0.5 * (y - z) ** 2
    return float(loss.mean() + strength * (l1 * np.abs(w).sum() + (1 - l1) / 2 * (w @ w)))


@pytest.mark.parametrize("scheme", ["newton", "gram"])
@pytest.mark.parametrize("l1", ["1", "0.5"])
def test_lasso_and_elastic_net_reach_the_objective_of_sklearn(scheme: str, l1: str) -> None:
    g, x, y, height = people(60, 1)
    for family, phenotype, outcome in (("logistic", BINARY, y), ("linear", HEIGHT, height)):
        done = fit(study_of(60, phenotype, scheme=scheme, l1=l1, fraction="0.1", rounds=60), outcome, g)
        strength, ratio = done.result["strength"], float(l1)
        if family == "logistic":
            other = LogisticRegression(
                solver="saga", C=1 / (ALL * strength), l1_ratio=ratio, tol=1e-12, max_iter=100_000, random_state=0
            ).fit(x, y)  # fmt: skip
            w, b = other.coef_[0], float(other.intercept_[0])
        else:
            other = ElasticNet(alpha=strength, l1_ratio=ratio, tol=1e-14, max_iter=100_000).fit(x, height)
            w, b = other.coef_, float(other.intercept_)
        ours = objective(family, x, outcome, done.state["w"], float(done.state["b"][0]), strength, ratio)
        theirs = objective(family, x, outcome, w, b, strength, ratio)
        label = f"penalised {family} ({scheme})"
        table.within(label, "sklearn", "objective above theirs, relative", max(ours - theirs, 0.0) / theirs, 1e-6)
        table.within(
            label, "sklearn", "1 - correlation of weights", 1 - float(np.corrcoef(w, done.state["w"])[0, 1]), 1e-4
        )
        assert done.result["objective"] == pytest.approx(ours, rel=1e-10) and done.result["converged"]
        assert 0 < done.result["variants_used"] < 60


@pytest.mark.parametrize("l1", ["1", "0.5", "0"])
def test_the_strength_of_a_grid_is_the_one_sklearn_chooses_on_the_same_folds(l1: str) -> None:
    g, x, _, height = people(60, 5)
    grid = ["1", "0.3", "0.1", "0.05", "0.02", "0.01", "0.003"]
    study = study_of(60, HEIGHT, scheme="folds", l1=l1, grid=grid)
    whole = plain_loop.patients(study, height, dosage=g)
    done = plain_loop.run(study, plain_loop.split(whole, SIZES))["fit"]
    error = np.zeros(len(grid))
    for at, strength in enumerate(map(float, grid)):
        for fold in range(study.cohort.folds):
            rest, out = whole.fold != fold, whole.fold == fold
            other = (
                ElasticNet(alpha=strength, l1_ratio=float(l1), tol=1e-14, max_iter=100_000)
                if l1 != "0"
                else Ridge(alpha=strength * rest.sum(), solver="cholesky")
            ).fit(x[rest], height[rest])
            error[at] += float(((height[out] - other.predict(x[out])) ** 2).sum())
    label = "penalised linear, strength by cross-validation"
    ours = [row["mean_squared_error"] for row in done.result["grid"]]
    table.record(label, "sklearn", "error of left-out people, relative", ours, error / ALL, rtol=1e-8)
    assert done.result["strength"] == float(grid[int(error.argmin())]) not in (1.0, 0.003)
    best = done.result["strength"]
    final = (
        ElasticNet(alpha=best, l1_ratio=float(l1), tol=1e-14, max_iter=100_000)
        if l1 != "0"
        else Ridge(alpha=best * ALL, solver="cholesky")
    ).fit(x, height)
    table.record(label, "sklearn", "weights", done.state["w"], final.coef_, atol=1e-8)
    assert not analysis_of(study.analyses[0]).is_iterative(study.analyses[0], study)


@pytest.mark.parametrize("scheme", ["newton", "gram"])
def test_ridge_equals_sklearn(scheme: str) -> None:
    g, x, y, height = people(60, 2)
    study = study_of(60, BINARY, scheme=scheme, l1="0", strength="0.05", rounds=60)
    other = LogisticRegression(C=1 / (ALL * 0.05), solver="newton-cholesky", tol=1e-12).fit(x, y)
    table.record(
        f"ridge, logistic ({scheme})", "sklearn", "weights", fit(study, y, g).state["w"], other.coef_[0], atol=1e-5
    )
    study = study_of(60, HEIGHT, scheme=scheme, l1="0", strength="0.05", rounds=4)
    ridge = Ridge(alpha=0.05 * ALL, solver="cholesky").fit(x, height)
    table.record(
        f"ridge, linear ({scheme})", "sklearn", "weights", fit(study, height, g).state["w"], ridge.coef_, atol=1e-8
    )


def slow_twin(x: np.ndarray, free: np.ndarray, y: np.ndarray, strength: float) -> float:
    """Objective of a lasso with free columns by plain proximal gradient, many steps."""
    full = np.column_stack([np.ones(len(y)), free, x])
    k = 1 + free.shape[1]
    beta = np.zeros(full.shape[1])
    size = 4 * len(y) / np.linalg.eigvalsh(full.T @ full)[-1]
    lookahead, t = beta.copy(), 1.0
    for _ in range(20_000):
        gradient = full.T @ (1 / (1 + np.exp(-(full @ lookahead))) - y) / len(y)
        new = lookahead - size * gradient
        new[k:] = np.sign(new[k:]) * np.maximum(np.abs(new[k:]) - size * strength, 0)
        faster = (1 + np.sqrt(1 + 4 * t * t)) / 2
        lookahead, beta, t = new + (t - 1) / faster * (new - beta), new, faster
    z = full @ beta
    return float((np.logaddexp(0, z) - y * z).mean() + strength * np.abs(beta[k:]).sum())


def test_covariates_are_not_penalised() -> None:
    g, x, y, _ = people(30, 3)
    raw = np.random.default_rng(3).standard_normal((ALL, 2)) * 2
    done = fit(study_of(30, BINARY, columns=2, l1="1", strength="0.03", rounds=80), y, g, raw)
    theirs = slow_twin(x, raw, y, 0.03)
    gap = abs(done.result["objective"] - theirs) / theirs
    table.within(
        "penalised logistic (gram)", "proximal gradient", "objective with free covariates, relative", gap, 1e-6
    )


@pytest.mark.slow
def test_wide_ridge_equals_the_dual_solve() -> None:
    g, x, _, height = people(1500, 4)
    raw = np.random.default_rng(4).standard_normal((ALL, 2))
    study = study_of(1500, HEIGHT, columns=2, scheme="conjugate_gradient", l1="0", strength="1.5", rounds=200)
    done = fit(study, height, g, raw)
    free = np.column_stack([np.ones(ALL), raw])
    kernel = x @ x.T / (1.5 * ALL) + np.eye(ALL)
    alpha_free = np.linalg.solve(free.T @ np.linalg.solve(kernel, free), free.T @ np.linalg.solve(kernel, height))
    w = x.T @ np.linalg.solve(kernel, height - free @ alpha_free) / (1.5 * ALL)
    gap = np.linalg.norm(done.state["w"][2:] - w) / np.linalg.norm(w)
    table.within("ridge by conjugate gradients", "the dual solve", "weights, relative in norm", float(gap), 1e-6)
    assert done.result["converged"]
    full, beta = np.column_stack([raw, x]), done.state["w"]
    value = float((0.5 * (height - full @ beta - done.state["b"][0]) ** 2).mean() + 0.75 * beta[2:] @ beta[2:])
    assert done.result["objective"] == pytest.approx(value, rel=1e-8)


@pytest.mark.nightly  # a minute: sixty rounds over 10,783 variants
@pytest.mark.skipif(not MICE.exists(), reason="SEQUESTER_DATA has no mouse_hs1940")
def test_ridge_of_real_mice_in_five_groups_of_families_equals_pooling_and_predicts_held_out_families() -> None:
    files = PlinkFiles(str(MICE / "mouse_hs1940"))
    counts = files.counts(range(len(files.variants))).astype(float)
    g = np.where(counts < 0, np.nan, counts)
    cd8 = np.array([line.split()[0] for line in (MICE / "mouse_hs1940.pheno.txt").read_text().splitlines()])
    family = np.array([line.split()[0] for line in (MICE / "mouse_hs1940.fam").read_text().splitlines()])
    known = cd8 != "NA"
    g, y, family = g[known], cd8[known].astype(float), family[known]
    f = np.nanmean(g, axis=0) / 2
    use = np.flatnonzero((f > 0.01) & (f < 0.99))
    g, f = g[:, use], f[use].round(4)
    names, sizes = np.unique(family, return_counts=True)
    group = {name: k % 5 for k, name in enumerate(names[np.argsort(-sizes)])}
    site = np.array([group[name] for name in family])
    order = np.argsort(site, kind="stable")
    g, y, site = g[order], y[order], site[order]
    x = np.nan_to_num((g - 2 * f) / np.sqrt(2 * f * (1 - f)))
    strength = len(use) * (1 - 0.6) / 0.6 / len(y)
    listed = [{**v, "frequency": str(p)} for v, p in zip(variants(len(use)), f, strict=True)]
    study = contracts.study(
        phenotype=HEIGHT, variants=listed, covariates=[], cohort={}, aggregation=EXACT,
        analyses=[{
            "kind": "penalised", "name": "fit", "mode": "exact", "part": "train", "scheme": "conjugate_gradient", "l1": "0",
            "strength": f"{strength:.6f}", "rounds": 120,
        }],
    )  # fmt: skip
    held_out = site == 4
    whole = plain_loop.Patients(
        study, np.zeros((len(y), 0)), g, y, held_out, np.zeros(len(y), np.int64), np.zeros(len(y), np.int64)
    )  # fmt: skip
    done = plain_loop.run(study, [whole.only(np.flatnonzero(site == s)) for s in range(5)])["fit"]
    xt, yt = x[~held_out], y[~held_out]
    n, lam = len(yt), float(study.analyses[0].strength)
    kernel = xt @ xt.T / (lam * n) + np.eye(n)
    one = np.linalg.solve(kernel, np.ones(n))
    intercept = float(one @ yt / one.sum())
    w = xt.T @ np.linalg.solve(kernel, yt - intercept) / (lam * n)
    gap = float(np.linalg.norm(done.state["w"] - w) / np.linalg.norm(w))
    table.within("ridge by conjugate gradients", "the dual solve", "weights on real mice, relative in norm", gap, 1e-6)
    r = [float(np.corrcoef(x[held_out] @ v, y[held_out])[0, 1]) for v in (done.state["w"], w)]
    table.within(
        "ridge by conjugate gradients", "the dual solve", "r of held-out families, below", max(r[1] - r[0], 0), 0.005
    )
    assert r[0] > 0.3


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"mode": "private"}, "exact only"),
        ({"strength": None}, "either `strength` or `fraction`"),
        ({"l1": "0", "strength": None, "fraction": "0.1"}, "ridge"),
        ({"l1": "0", "scheme": "conjugate_gradient"}, "scheme gram takes a binary outcome"),
        ({"strength": "-1"}, "above 0"),
        ({"scheme": "folds", "grid": ["1", "0.1"]}, "`grid` of at least two strengths, and only it"),
        ({"strength": None, "scheme": "folds", "grid": ["1"]}, "`grid` of at least two strengths"),
        ({"strength": None, "scheme": "folds", "grid": ["1", "0.1"]}, "scheme folds is least squares"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyError, match=said):
        study_of(3, BINARY, **{"l1": "1", "strength": "0.1", **changed})


def test_too_many_variants_for_a_scheme_are_refused_with_the_way_out() -> None:
    with pytest.raises(StudyError, match="clump them first"):
        study_of(1001, BINARY, scheme="newton", l1="1", strength="0.1")


def test_no_cases_anywhere_is_said_and_a_constant_variant_keeps_weight_0() -> None:
    g, _, y, _ = people(20, 5)
    g[:, 3] = 0.6
    study = study_of(20, BINARY, l1="1", strength="0.01")
    assert fit(study, np.zeros(ALL), g).result["not_fitted"] == "one outcome only"
    assert fit(study, y, g).state["w"][3] == 0.0
