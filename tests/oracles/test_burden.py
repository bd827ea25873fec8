"""Gene tests against the pooled formulas, the mixture tail against known distributions and simulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.stats import beta, chi2, norm

import contracts
import plain_loop
from oracles import table
from oracles.test_structure import variants
from sequester.protocols.analyses.burden import cauchy, mixture_tail
from sequester.protocols.errors import StudyError
from sequester.protocols.study import Study

EXACT = {"mode": "strict", "ring_bits": 64, "fraction_bits": 28}
BINARY = {"name": "case", "kind": "binary", "values": ["0", "1"]}
HEIGHT = {"name": "height", "kind": "quantitative", "lower": "-10", "upper": "10", "centre": "0", "scale": "1"}
SIZES = [3000, 1500, 400, 100]
ALL = sum(SIZES)
F = np.array([0.001, 0.002, 0.004, 0.008, 0.01, 0.02, 0.995, 0.003, 0.006, 0.012, 0.0004, 0.0004])
GENES = [
    {"name": "ONE", "variants": [f"v{j}" for j in range(7)]},
    {"name": "TWO", "variants": ["v7", "v8"]},
    {"name": "SOLE", "variants": ["v9"]},
    {"name": "FEW", "variants": ["v10", "v11"]},
]


def study_of(phenotype: dict[str, Any] = BINARY, **plan: Any) -> Study:
    return contracts.study(
        phenotype=phenotype, cohort={}, aggregation=EXACT,
        variants=[{**v, "frequency": str(f)} for v, f in zip(variants(12), F, strict=True)],
        covariates=[{"name": "c0", "kind": "quantitative", "lower": "-9", "upper": "9", "centre": "0", "scale": "1"}],
        analyses=[{"kind": "burden", "name": "genes", "mode": "exact", "genes": GENES} | plan],
    )  # fmt: skip


def people(seed: int, effect: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((ALL, 1))
    g = rng.binomial(2, F, (ALL, 12)).astype(float)
    g[rng.random(g.shape) < 0.01] = np.nan
    g[:, 10:] = 0.0
    g[:4, 10] = 1.0
    load = np.nan_to_num(g[:, :6]).sum(axis=1)
    z = 0.3 * x[:, 0] + effect * load
    y = (rng.random(ALL) < 1 / (1 + np.exp(-(z - 1.5)))).astype(float)
    return x, g, y, np.clip(z + rng.standard_normal(ALL), -10, 10)


def run(study: Study, x: np.ndarray, g: np.ndarray, y: np.ndarray) -> list[dict[str, Any]]:
    whole = plain_loop.patients(study, y, table=x, dosage=g)
    return plain_loop.run(study, plain_loop.split(whole, SIZES))["genes"].result["genes"]


def pooled(
    x: np.ndarray, g: np.ndarray, y: np.ndarray, places: list[int], linear: bool
) -> tuple[float, float, np.ndarray]:
    """Burden z, SKAT Q and its eigenvalues, from patients, by the formulas of Wu et al. 2011."""
    design = sm.add_constant(x)
    filled = np.where(np.isnan(g), 2 * F, g)[:, places]
    if linear:
        null = sm.OLS(y, design).fit()
        r, w = y - null.fittedvalues, np.full(len(y), 1 / null.scale)
        r = r / null.scale
    else:
        mu = sm.Logit(y, design).fit(disp=0, tol=1e-14).predict()
        r, w = y - mu, mu * (1 - mu)
    minor = np.minimum(F, 1 - F)[places]
    weight = beta.pdf(minor, 1, 25) * np.where(F[places] > 0.5, -1, 1)
    gw = filled * weight
    cross = gw.T @ (design * w[:, None])
    v = gw.T @ (gw * w[:, None]) - cross @ np.linalg.solve(design.T @ (design * w[:, None]), cross.T)
    u = gw.T @ r
    return float(u.sum() / np.sqrt(v.sum())), float(u @ u), np.linalg.eigvalsh(v)


@pytest.mark.parametrize("linear", [False, True])
def test_gene_tests_equal_the_pooled_formulas(linear: bool) -> None:
    x, g, y, height = people(1, 0.3)
    outcome = height if linear else y
    rows = run(study_of(HEIGHT if linear else BINARY), x, g, outcome)
    for row, places in zip(rows, (list(range(7)), [7, 8], [9]), strict=False):
        z, q, values = pooled(x, g, outcome, places, linear)
        table.record("gene tests", "statsmodels", "burden z, relative", row["burden_z"], z, rtol=1e-8)
        drawn = np.random.default_rng(2).chisquare(1, (400_000, len(values))) @ values
        p = float((drawn > q).mean())
        error = 4 * np.sqrt(max(p * (1 - p), 2.5e-6) / 400_000)
        assert abs(row["skat_p"] - p) < error  # 4 standard errors of a simulation of 400,000 draws
    assert rows[2]["skat_p"] == pytest.approx(rows[2]["burden_p"], rel=1e-6)  # one variant: the same test
    assert rows[3] == {"gene": "FEW", "variants": 2, "carriers": "<10", "not_tested": "too few carriers"}


def test_the_mixture_tail_of_equal_weights_is_a_chi_squared() -> None:
    for m in (1, 2, 3, 5, 30):
        for p in (0.999, 0.5, 0.05, 1e-3, 1e-6, 1e-12, 1e-40):
            found = mixture_tail(3 * float(chi2.isf(p, m)), np.full(m, 3.0))
            table.record("gene tests", "scipy.stats", "tail of a mixture, relative", found, p, rtol=1e-8)


def test_two_unequal_weights_are_the_convolution() -> None:
    rng = np.random.default_rng(3)
    drawn = rng.chisquare(1, (2_000_000, 2)) @ [1.0, 0.2]
    for q in (0.5, 2.0, 6.0):
        p = float((drawn > q).mean())
        assert mixture_tail(q, np.array([0.2, 1.0])) == pytest.approx(p, abs=4 * (p * (1 - p) / 2e6) ** 0.5)


def test_the_cauchy_rule() -> None:
    assert cauchy([0.03, 0.03]) == pytest.approx(0.03)
    assert cauchy([1e-20, 0.5]) == pytest.approx(2e-20, rel=1e-6)
    assert cauchy([1.0, 1e-4]) > 1e-4


@pytest.mark.slow
def test_null_genes_are_rejected_at_their_level() -> None:
    # 400 null traits: at 5 % the estimate's sd is 1.1 %
    rng = np.random.default_rng(40)
    x, g, _, _ = people(4)
    study = study_of(HEIGHT)
    whole = plain_loop.patients(study, np.zeros(ALL), table=x, dosage=g)
    rejected = np.zeros(2)
    for _ in range(400):
        y = rng.standard_normal(ALL).clip(-10, 10)
        cohort = plain_loop.Patients(study, whole.table, whole.dosage, y, whole.test, whole.fold, whole.strata)
        row = plain_loop.run(study, [cohort])["genes"].result["genes"][0]
        rejected += [row["burden_p"] < 0.05, row["skat_p"] < 0.05]
    assert (np.abs(rejected / 400 - 0.05) < 0.035).all()


def test_a_gene_with_an_effect_is_found() -> None:
    x, g, y, _ = people(5, 0.8)
    rows = run(study_of(), x, g, y)
    assert (
        rows[0]["p"] < 1e-4
        and rows[0]["burden_z"] > 0
        and norm.isf(rows[0]["burden_p"] / 2) == pytest.approx(rows[0]["burden_z"])
    )


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"mode": "private"}, "exact only"),
        ({"genes": [{"name": "A", "variants": ["v99"]}]}, "names v99, which the study does not list"),
        ({"genes": [{"name": "A", "variants": ["v1"]}, {"name": "A", "variants": ["v2"]}]}, "named twice"),
        ({"beta": ["0", "25"]}, "above 0"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(plan: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyError, match=said):
        study_of(**plan)
