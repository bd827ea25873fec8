"""What hospitals of unequal size gain: one alone, a meta-analysis of all, the federation, and all files pooled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

import contracts
import plain_loop
from oracles import table
from oracles.test_structure import variants

EXACT = {"mode": "strict", "ring_bits": 64, "fraction_bits": 28}
SIZES = [3000, 1200, 500, 200, 100]
SHARES = [0.08, 0.15, 0.3, 0.05, 0.03]  # of cases: referral centres and general hospitals
CAUSAL = 12


def hospitals(seed: int, v: int) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """Copies and case status at five hospitals, a test set of the population, and the true effects."""
    rng = np.random.default_rng(seed)
    f = rng.uniform(0.05, 0.5, v)
    effect = np.zeros(v)
    effect[:CAUSAL] = rng.choice([-1, 1], CAUSAL) * rng.uniform(0.15, 0.4, CAUSAL)

    def draw(n: int, share: float) -> tuple[np.ndarray, np.ndarray]:
        g = rng.binomial(2, f, (40 * n, v)).astype(np.int8)
        z = g @ effect - 2 * f @ effect - 2.5
        y = rng.random(40 * n) < 1 / (1 + np.exp(-z))
        cases = max(int(share * n), 3)
        rows = np.concatenate([np.flatnonzero(y)[:cases], np.flatnonzero(~y)[: n - cases]])
        rng.shuffle(rows)
        return g[rows].astype(float), y[rows].astype(float)

    sites = [draw(n, share) for n, share in zip(SIZES, SHARES, strict=True)]
    test = draw(1500, 0.1)
    return [s[0] for s in sites], [s[1] for s in sites], *test, effect


def study_of(v: int, plan: dict[str, Any]) -> Any:
    return contracts.study(
        variants=variants(v), covariates=[], cohort={}, aggregation=EXACT,
        analyses=[{"name": "last", "mode": "exact", "part": "all", **plan}],
    )  # fmt: skip


def run(v: int, plan: dict[str, Any], g: list[np.ndarray], y: list[np.ndarray]) -> Any:
    study = study_of(v, plan)
    whole = plain_loop.patients(study, np.concatenate(y), dosage=np.vstack(g))
    return plain_loop.run(study, plain_loop.split(whole, list(map(len, y))))["last"]


def per_copy(done: Any) -> tuple[np.ndarray, np.ndarray]:
    rows = done.result["weights"]
    return np.array([r["per_unit"] for r in rows]), np.array([r.get("per_unit_se", np.inf) for r in rows])


def weighted(estimates: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Inverse-variance meta-analysis of (estimate, standard error) of each hospital; inf carries no weight."""
    w = np.array([1 / se**2 for _, se in estimates])
    b = np.array([np.where(np.isfinite(se), b, 0.0) for b, se in estimates])
    return (w * b).sum(axis=0) / w.sum(axis=0), w.sum(axis=0) ** -0.5


@pytest.mark.slow
def test_regression_scan_power_and_auc_of_one_hospital_meta_analysis_federation_and_pooling() -> None:
    errors: dict[str, list[float]] = {name: [] for name in ("largest hospital", "meta-analysis", "federated", "pooled")}
    power = {name: [] for name in errors}  # type: dict[str, list[float]]
    auc = {name: [] for name in errors}  # type: dict[str, list[float]]
    fit = {"kind": "glm", "solver": "newton", "rounds": 25}
    ridge = {"kind": "penalised", "l1": "0", "strength": "0.02", "rounds": 40}
    for seed in range(4):
        v = 30
        g, y, tg, ty, effect = hospitals(seed, v)
        alone = [per_copy(run(v, fit, [a], [b])) for a, b in zip(g, y, strict=True) if b.sum() > 40]
        federated = per_copy(run(v, fit, g, y))
        pooled = sm.Logit(np.concatenate(y), sm.add_constant(np.vstack(g))).fit(disp=0, tol=1e-14)
        found = {"largest hospital": alone[0], "meta-analysis": weighted(alone), "federated": federated}
        found["pooled"] = (pooled.params[1:], pooled.bse[1:])
        for name, (b, se) in found.items():
            errors[name].append(float(np.sqrt(np.mean((b - effect) ** 2))))
            p = 2 * norm.sf(np.abs(b / se))
            power[name].append(float((p[:CAUSAL] < 1e-5).mean()))
        one, all_ = run(v, ridge, g[:1], y[:1]), run(v, ridge, g, y)
        parts = [run(v, ridge, [a], [b]) for a, b in zip(g, y, strict=True) if b.sum() > 40]
        sizes = np.array([len(b) for b in y if b.sum() > 40], dtype=float)
        mean = sum(n * part.state["w"] for n, part in zip(sizes, parts, strict=True)) / sizes.sum()
        x = (tg - 0.6) / 0.42**0.5  # every frequency of the study is .3
        pooled_w = run(v, ridge, [np.vstack(g)], [np.concatenate(y)]).state["w"]
        for name, w in zip(auc, (one.state["w"], mean, all_.state["w"], pooled_w), strict=True):
            auc[name].append(float(roc_auc_score(ty, x @ w)))
    for name in errors:
        table.figure("Five hospitals of 3,000 to 100 people, mean of four draws", name, {
            "error of a log odds": float(np.mean(errors[name])),
            "share of 12 true variants at p < 1e-5": float(np.mean(power[name])),
            "AUC of a ridge score": float(np.mean(auc[name])),
        })  # fmt: skip
    table.record("federation", "statsmodels", "error of a log odds", errors["federated"], errors["pooled"], atol=1e-8)
    table.record("federation", "the pooled fit", "AUC of a ridge score", auc["federated"], auc["pooled"], atol=1e-6)
    assert np.mean(errors["federated"]) < 0.8 * np.mean(errors["largest hospital"])
    assert np.mean(errors["federated"]) <= np.mean(errors["meta-analysis"])
    assert np.mean(power["federated"]) > np.mean(power["largest hospital"]) + 0.1
    assert np.mean(auc["federated"]) > np.mean(auc["largest hospital"])
