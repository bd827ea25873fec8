"""Least squares in one round against statsmodels, its folds, and its private form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st

import contracts
import plain_loop
from sequester.protocols.analyses.linear import LINEAR
from sequester.protocols.errors import StudyError
from sequester.protocols.study import Study

DOSE = {"name": "dose", "kind": "quantitative", "lower": "1", "upper": "100"}
VARIANTS = [
    {"id": f"v{j}", "chromosome": "1", "position": 1000 + j, "effect": "A", "other": "G", "frequency": "0.3"}
    for j in range(5)
]


def study_of(mode: str, **changed: Any) -> Study:
    exact = mode == "exact"
    return contracts.study(**{
        "phenotype": DOSE, "covariates": [], "cohort": {}, "variants": VARIANTS,
        "analyses": [{"kind": "linear", "name": "fit", "mode": mode}],
        "aggregation": {"mode": "strict", "ring_bits": 64, "fraction_bits": 28} if exact else {"mode": "strict"},
        **changed,
    })  # fmt: skip


def hospitals(n: int, seed: int) -> list[plain_loop.Rows]:
    rng = np.random.default_rng(seed)
    out = []
    for site in range(4):
        x = rng.standard_normal((n // 4, 5)) * 0.6
        out.append(plain_loop.rows(x, x @ [0.3, -0.2, 0.1, 0, 0.05] + 0.1 + rng.normal(0, 0.2, n // 4), seed + site))
    return out


def test_the_exact_fit_and_every_left_out_fold_equal_the_pooled_fits() -> None:
    cohorts = hospitals(800, 2)
    finished = plain_loop.run(study_of("exact"), cohorts)["fit"]
    x, y = np.vstack([c.x for c in cohorts]), np.concatenate([c.y for c in cohorts])
    fold = np.concatenate([c.fold for c in cohorts])
    oracle = sm.OLS(y, sm.add_constant(x)).fit()
    # 1e-8 relative: rounding of the normal equations
    np.testing.assert_allclose(finished.state["w"], oracle.params[1:], rtol=1e-8)
    np.testing.assert_allclose([r["se"] for r in finished.result["weights"]], oracle.bse[1:], rtol=1e-8)
    assert finished.result["r2"] == pytest.approx(oracle.rsquared, rel=1e-8)
    assert finished.result["n"] == 800
    for k in range(5):
        left_out = sm.OLS(y[fold != k], sm.add_constant(x[fold != k])).fit()
        np.testing.assert_allclose(finished.state["fold_w"][k], left_out.params[1:], rtol=1e-8)


def test_a_fit_without_the_variants_or_a_named_column_is_the_pooled_fit_of_what_is_left() -> None:
    rng = np.random.default_rng(5)
    table, copies = rng.standard_normal((600, 3)), rng.binomial(2, 0.3, (600, 5)).astype(float)
    y = table @ [0.3, -0.2, 0.1] + 0.1 * copies[:, 0] + rng.normal(0, 0.2, 600)
    columns = [
        {"name": f"c{j}", "kind": "quantitative", "lower": "-9", "upper": "9", "centre": "0", "scale": "1"}
        for j in range(3)
    ]
    exact = {"kind": "linear", "mode": "exact"}
    of = study_of("exact", covariates=columns, analyses=[
        exact | {"name": "table", "features": "table"}, exact | {"name": "less", "leave_out": ["c1"]},
        {"kind": "evaluation", "name": "seen", "mode": "exact", "of": "less", "part": "all", "folds": True},
    ])  # fmt: skip
    sites = plain_loop.split(plain_loop.patients(of, y, table=table, dosage=copies), [300, 200, 100])
    finished = plain_loop.run(of, sites)
    x = np.column_stack([table, (copies - 0.6) / 0.42**0.5])
    for name, kept in (("table", [0, 1, 2]), ("less", [0, 2, 3, 4, 5, 6, 7])):
        expected = np.zeros(8)
        expected[kept] = sm.OLS(y, sm.add_constant(x[:, kept])).fit().params[1:]
        np.testing.assert_allclose(finished[name].state["w"], expected, rtol=1e-8)
        assert len(finished[name].result["weights"]) == len(kept)
        assert not finished[name].state["fold_w"][:, [j for j in range(8) if j not in kept]].any()
    # judged by the fits that left each fold out: a little worse than the fit on everybody
    assert finished["less"].result["r2"] - 0.03 < finished["seen"].result["r2"] < finished["less"].result["r2"]


def test_least_squares_of_thousands_of_columns_is_refused_with_what_to_do() -> None:
    many = [{**VARIANTS[0], "id": f"v{j}", "position": 1000 + j} for j in range(1001)]
    with pytest.raises(StudyError, match="kind penalised"):
        study_of("exact", variants=many)
    with pytest.raises(StudyError, match="leaves out `age`"):
        study_of("exact", analyses=[{"kind": "linear", "name": "fit", "mode": "exact", "leave_out": ["age"]}])


def test_the_private_fit_at_epsilon_3_is_near_the_pooled_one() -> None:
    cohorts = hospitals(10_000, 3)
    finished = plain_loop.run(study_of("private"), cohorts, np.random.default_rng(4))["fit"]
    x, y = np.vstack([c.x for c in cohorts]), np.concatenate([c.y for c in cohorts])
    oracle = sm.OLS(y, sm.add_constant(x)).fit()
    explained = 1 - np.var(y - x @ finished.state["w"]) / np.var(y)
    assert explained > oracle.rsquared - 0.02  # ridge of the noise's size shrinks; seeded, no false alarms
    assert "se" not in finished.result["weights"][0]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), magnitude=st.floats(0, 1e6))
def test_one_patient_never_changes_the_private_sums_by_more_than_the_bound(seed: int, magnitude: float) -> None:
    rng = np.random.default_rng(seed)
    study = study_of("private")
    x, y = rng.standard_normal((4, 5)) * magnitude, rng.standard_normal(4) * magnitude
    a = LINEAR.contribution(study.analyses[0], study, plain_loop.rows(x, y), {}, 0)
    b = LINEAR.contribution(study.analyses[0], study, plain_loop.rows(x[1:], y[1:]), {}, 0)
    moved = np.sqrt(sum(float(((a[name] - b[name]) ** 2).sum()) for name in a))
    assert moved <= LINEAR.sensitivity(study.analyses[0], study) * (1 + 1e-9)
