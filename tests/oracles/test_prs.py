"""A score in one round: the pooled sum, the published recipe, and what one patient can move."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import contracts
import plain_loop
from oracles import table
from oracles.test_structure import variants
from sequester.protocols.analyses.prs import PRS, shrunk
from sequester.protocols.errors import StudyError
from sequester.protocols.study import Study


def study_of(count: int, **changed: Any) -> Study:
    plan = {"kind": "prs", "name": "score", "prevalence": "0.2", "budget": "1"} | changed
    exact = plan.get("mode") == "exact"
    if exact:
        del plan["budget"]
    return contracts.study(
        covariates=[], cohort={}, variants=variants(count), analyses=[plan], n0=10_000, n_max=12_000,
        aggregation={"mode": "strict", "ring_bits": 64, "fraction_bits": 28} if exact else {"mode": "strict"},
    )  # fmt: skip


def people(n: int, p: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Independent standardised variants, 100 causal, liability h2 .5, prevalence .2, as in spec/privacy.md section 5."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p))
    effect = np.zeros(p)
    effect[rng.choice(p, 100, replace=False)] = rng.standard_normal(100)
    genetic = x @ effect
    liability = genetic / genetic.std() * 0.5**0.5 + rng.normal(0, 0.5**0.5, n)
    return x, (liability > norm.isf(0.2)).astype(float)


def test_the_exact_sum_is_the_pooled_score_at_the_null() -> None:
    x, y = people(2000, 150, 1)
    cohorts = [plain_loop.rows(x[a:b], y[a:b], test=0.0) for a, b in ((0, 1500), (1500, 1900), (1900, 2000))]
    result = plain_loop.run(study_of(150, mode="exact", shrinkage="none"), cohorts)["score"].result
    table.record("one-shot score", "numpy", "sum", [r["score"] for r in result["weights"]], x.T @ (y - 0.2), rtol=1e-10)


def test_shrinkage_finds_the_mixture_it_was_drawn_from() -> None:
    rng = np.random.default_rng(2)
    slab = rng.random(20_000) < 0.05
    z = rng.normal(0, np.where(slab, 5.0, 1.0))
    w, share = shrunk(z, 0.0)
    assert share == pytest.approx(0.05, abs=0.01)
    truth = slab * z * 24 / 25  # the posterior mean if one knew who has an effect
    assert np.mean((w - truth) ** 2) < 0.5 * np.mean((z - truth) ** 2)
    assert (np.abs(w) <= np.abs(z)).all()


@pytest.mark.parametrize("seed", [3, 4])
def test_one_round_at_epsilon_3_stays_within_0_04_of_the_pooled_ridge(seed: int) -> None:
    # spec/privacy.md, section 5, target T4: p = 1,000, n = 10,000, eps 3
    n, p = 10_000, 1000
    x, y = people(n + 4000, p, seed)
    cohorts = [plain_loop.rows(x[a:b], y[a:b], test=0.0) for a, b in ((0, 5000), (5000, 8000), (8000, n))]
    done = plain_loop.run(study_of(p), cohorts, np.random.default_rng(seed))["score"]
    ridge = LogisticRegression(C=1 / 2000, solver="lbfgs", max_iter=500).fit(x[:n], y[:n])
    private = roc_auc_score(y[n:], x[n:] @ done.state["w"])
    pooled = roc_auc_score(y[n:], x[n:] @ ridge.coef_[0])
    table.within(
        "one-shot score", "sklearn", "AUC below the pooled ridge at epsilon 3", max(float(pooled - private), 0), 0.04
    )
    assert done.result["noise_sd"] > 0 and all("se" not in row for row in done.result["weights"])


@pytest.mark.parametrize("seed", range(6))
def test_one_patient_moves_the_sum_by_at_most_the_clip(seed: int) -> None:
    rng = np.random.default_rng(seed)
    study = study_of(30)
    plan = study.analyses[0]
    x, y = rng.standard_normal((5, 30)) * 10.0 ** rng.integers(-1, 9), rng.integers(0, 2, 5).astype(float) * 1e6
    a, b = (PRS.contribution(plan, study, plain_loop.rows(x[k:], y[k:], test=0.0), {}, 0)["score"] for k in (0, 1))
    assert np.linalg.norm(a - b) <= PRS.sensitivity(plan, study) * (1 + 1e-9)


def test_a_quantitative_outcome_is_refused() -> None:
    with pytest.raises(StudyError, match="binary was expected"):
        contracts.study(
            phenotype={"name": "dose", "kind": "quantitative", "lower": "1", "upper": "9"},
            analyses=[{"kind": "prs", "name": "score"}],
        )
