"""Exact regressions against statsmodels, Firth against a direct maximum and PLINK 2, and what cannot be estimated."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.optimize import minimize

import contracts
import plain_loop
from oracles import table
from sequester.protocols.errors import StudyError
from sequester.protocols.study import Study

EXACT = {"mode": "strict", "ring_bits": 64, "fraction_bits": 28}
BINARY = {"name": "case", "kind": "binary", "values": ["0", "1"]}
COUNT = {"name": "visits", "kind": "quantitative", "lower": "0", "upper": "60", "centre": "0", "scale": "1"}


def study_of(columns: int, phenotype: dict[str, Any], **plan: Any) -> Study:
    return contracts.study(
        phenotype=phenotype, variants=[], cohort={}, aggregation=EXACT,
        covariates=[{"name": f"c{j}", "kind": "quantitative", "lower": "-1", "upper": "1"} for j in range(columns)],
        analyses=[{"kind": "glm", "name": "fit", "mode": "exact", "solver": "newton", "part": "all"} | plan],
    )  # fmt: skip


def fit(study: Study, x: np.ndarray, y: np.ndarray, sizes: list[int], fixed_point: bool = False) -> dict[str, Any]:
    cohorts = plain_loop.split(plain_loop.patients(study, y, table=x), sizes)
    return plain_loop.run(study, cohorts, fixed_point=fixed_point)["fit"].result


def logistic(rng: np.random.Generator, n: int, p: int, intercept: float = -1.5) -> tuple[np.ndarray, np.ndarray]:
    x = rng.standard_normal((n, p))
    y = (rng.random(n) < 1 / (1 + np.exp(-(x @ rng.normal(0, 0.4, p) + intercept)))).astype(float)
    return x, y


SIZES = [900, 350, 150, 60, 40]


@pytest.mark.parametrize("family", ["logistic", "poisson", "linear"])
def test_coefficients_errors_tests_and_intervals_equal_statsmodels(family: str) -> None:
    rng = np.random.default_rng(1)
    x, y = logistic(rng, sum(SIZES), 5)
    phenotype = BINARY
    if family == "poisson":
        phenotype, y = COUNT, rng.poisson(np.exp(x @ rng.normal(0, 0.3, 5) + 0.7)).clip(0, 60).astype(float)
    if family == "linear":
        phenotype, y = (
            {"name": "z", "kind": "quantitative", "lower": "-9", "upper": "9"},
            x[:, 0] + rng.normal(0, 1, len(y)),
        )
    study = study_of(5, phenotype, family=family, rounds=25)
    result = fit(study, x, y, SIZES)
    design = sm.add_constant(x)
    oracle = {
        "logistic": lambda: sm.Logit(y, design).fit(disp=0, tol=1e-14, maxiter=100, method="newton"),
        "poisson": lambda: sm.Poisson(y, design).fit(disp=0, tol=1e-14, maxiter=100, method="newton"),
        "linear": lambda: sm.OLS(y, design).fit(),
    }[family]()
    rows = result["weights"]
    label = f"{family} regression"
    table.record(
        label, "statsmodels", "coefficient, relative", [r["standardised"] for r in rows], oracle.params[1:], rtol=1e-8
    )
    table.record(label, "statsmodels", "standard error, relative", [r["se"] for r in rows], oracle.bse[1:], rtol=1e-8)
    table.record(label, "statsmodels", "p value, relative", [r["p"] for r in rows], oracle.pvalues[1:], rtol=1e-6)
    ends = [[r["low"], r["high"]] for r in rows]
    table.record(label, "statsmodels", "95 % interval, absolute", ends, oracle.conf_int()[1:], atol=1e-8)
    table.record(label, "statsmodels", "log-likelihood, relative", result["log_likelihood"], oracle.llf, rtol=1e-8)
    assert result["converged"] and result["n"] == len(y)
    if family == "logistic":
        assert result["null_log_likelihood"] == pytest.approx(oracle.llnull, rel=1e-9)
        assert result["cases"] == y.sum()


def test_fixed_point_of_a_real_round_moves_a_coefficient_by_less_than_a_millionth_of_its_error() -> None:
    x, y = logistic(np.random.default_rng(2), sum(SIZES), 5)
    study = study_of(5, BINARY, rounds=25)
    plain, rounded = fit(study, x, y, SIZES), fit(study, x, y, SIZES, fixed_point=True)
    assert rounded["converged"]
    for a, b in zip(plain["weights"], rounded["weights"], strict=True):
        assert abs(a["standardised"] - b["standardised"]) < 1e-6 * a["se"]


def penalised_maximum(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Firth's estimate by a general optimiser of the penalised likelihood."""
    design = sm.add_constant(x)

    def value(beta: np.ndarray) -> float:
        z = design @ beta
        mu = 1 / (1 + np.exp(-z))
        information = design.T @ (design * (mu * (1 - mu))[:, None])
        return -float((y * z - np.logaddexp(0, z)).sum() + 0.5 * np.linalg.slogdet(information)[1])

    found = minimize(value, np.zeros(design.shape[1]), method="BFGS", options={"gtol": 1e-9})
    return minimize(value, found.x, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14, "maxiter": 20000}).x


def separated_data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    x, y = logistic(rng, 400, 2)
    carrier = (rng.random(400) < 0.03).astype(float)
    y[carrier == 1] = 0.0  # every carrier is well: no maximum
    return np.column_stack([x, carrier]), y


def test_separation_is_named_by_column_and_the_other_columns_keep_their_errors() -> None:
    x, y = separated_data()
    result = fit(study_of(3, BINARY, rounds=40), x, y, [200, 100, 100])
    assert result["separated"] == ["c2"] and not result["converged"]
    assert result["weights"][2]["not_estimated"] == "separated" and "se" in result["weights"][0]


@pytest.mark.parametrize("when", ["always", "if_separated"])
def test_firth_equals_the_direct_maximum(when: str) -> None:
    x, y = separated_data()
    result = fit(study_of(3, BINARY, rounds=120, firth=when), x, y, [200, 100, 100])
    assert result["firth"] and result["converged"]
    beta = penalised_maximum(x, y)
    table.record(
        "Firth regression",
        "scipy.optimize",
        "coefficient",
        [r["standardised"] for r in result["weights"]],
        beta[1:],
        atol=1e-5,
    )


@pytest.mark.skipif(shutil.which("plink2") is None, reason="no plink2")
def test_firth_equals_plink2(tmp_path: Path) -> None:
    x, y = separated_data()
    result = fit(study_of(3, BINARY, rounds=120, firth="always"), x, y, [200, 100, 100])
    n = len(y)
    # the carrier as a variant: 0 or 2 copies in a .ped of homozygotes would double the effect, so one copy = A/G
    ped = [f"0 p{i} 0 0 1 {int(y[i]) + 1} {'A G' if x[i, 2] else 'G G'}" for i in range(n)]
    (tmp_path / "g.ped").write_text("\n".join(ped) + "\n")
    (tmp_path / "g.map").write_text("1 v 0 1000\n")
    lines = ["#IID\tc0\tc1"] + [f"p{i}\t{x[i, 0]:.17g}\t{x[i, 1]:.17g}" for i in range(n)]
    (tmp_path / "c.txt").write_text("\n".join(lines) + "\n")
    subprocess.run(
        ["plink2", "--pedmap", "g", "--covar", "c.txt", "--glm", "firth", "--out", "o", "--threads", "1"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    head, *body = [line.split() for line in next(tmp_path.glob("o.*firth")).read_text().splitlines()]
    rows = [dict(zip(head, line, strict=True)) for line in body]
    theirs = [float(np.log(float(row["OR"]))) for row in rows if row["TEST"] in ("ADD", "c0", "c1")]
    ours = [result["weights"][j]["standardised"] for j in (2, 0, 1)]
    table.record("Firth regression", "PLINK 2", "coefficient", ours, theirs, atol=1e-3)
    errors = [float(row["LOG(OR)_SE"]) for row in rows if row["TEST"] in ("ADD", "c0", "c1")]
    table.record(
        "Firth regression",
        "PLINK 2",
        "standard error",
        [result["weights"][j]["se"] for j in (2, 0, 1)],
        errors,
        atol=1e-3,
    )


def test_constant_and_collinear_columns_are_named_and_the_rest_equals_the_fit_without_them() -> None:
    x, y = logistic(np.random.default_rng(3), 600, 2)
    wide = np.column_stack([x[:, 0], np.full(600, 0.7), x[:, 1], 2 * x[:, 0] - x[:, 1] + 0.1, np.zeros(600)])
    result = fit(study_of(5, BINARY, rounds=25), wide, y, [300, 200, 100])
    reasons = [row.get("not_estimated") for row in result["weights"]]
    assert reasons == [None, "constant", None, "collinear", "constant"] and result["converged"]
    oracle = sm.Logit(y, sm.add_constant(x)).fit(disp=0, tol=1e-14)
    np.testing.assert_allclose([result["weights"][j]["standardised"] for j in (0, 2)], oracle.params[1:], rtol=1e-8)
    np.testing.assert_allclose([result["weights"][j]["se"] for j in (0, 2)], oracle.bse[1:], rtol=1e-8)


def test_a_hospital_without_cases_contributes_and_the_fit_equals_pooling() -> None:
    x, y = logistic(np.random.default_rng(4), 500, 3)
    y[400:] = 0.0
    result = fit(study_of(3, BINARY, rounds=25), x, y, [250, 150, 100])
    oracle = sm.Logit(y, sm.add_constant(x)).fit(disp=0, tol=1e-14)
    np.testing.assert_allclose([r["standardised"] for r in result["weights"]], oracle.params[1:], rtol=1e-8)


def test_no_cases_anywhere_is_said_and_not_fitted() -> None:
    x, _ = logistic(np.random.default_rng(4), 300, 3)
    result = fit(study_of(3, BINARY, rounds=25), x, np.zeros(300), [100, 100, 100])
    assert result["not_fitted"] == "one outcome only"


def test_more_columns_than_people_are_named_not_fitted_by_chance() -> None:
    rng = np.random.default_rng(6)
    phenotype = {"name": "z", "kind": "quantitative", "lower": "-9", "upper": "9"}
    result = fit(
        study_of(12, phenotype, family="linear", rounds=4),
        rng.standard_normal((9, 12)),
        rng.standard_normal(9),
        [3, 3, 3],
    )
    assert sum(row.get("not_estimated") == "collinear" for row in result["weights"]) == 4


def test_counts_without_their_own_scale_are_refused() -> None:
    with pytest.raises(StudyError, match="counts are modelled as they are"):
        study_of(2, {**COUNT, "scale": "30"}, family="poisson", rounds=10)


def test_a_private_poisson_model_without_noise_comes_close_to_the_pooled_fit_and_no_error_is_printed() -> None:
    rng = np.random.default_rng(7)
    x = np.clip(rng.standard_normal((6000, 3)) / 2, -1, 1)
    y = rng.poisson(np.exp(x @ [0.5, -0.4, 0.2] + 0.0)).clip(0, 60).astype(float)
    plan = {"kind": "glm", "name": "fit", "family": "poisson", "rounds": 100, "clip": "4", "step_scale": "4"}
    study = contracts.study(
        phenotype=COUNT, variants=[], cohort={}, n0=6000, n_max=7000, analyses=[plan | {"part": "all"}],
        covariates=[{"name": f"c{j}", "kind": "quantitative", "lower": "-1", "upper": "1"} for j in range(3)],
    )  # fmt: skip
    result = fit(study, x, y, [3000, 2000, 1000])
    oracle = sm.Poisson(y, sm.add_constant(x)).fit(disp=0)
    # a clipped gradient is biased; the private model is for prediction, and prints no error
    np.testing.assert_allclose([r["standardised"] for r in result["weights"]], oracle.params[1:], atol=0.15)
    assert all("se" not in row for row in result["weights"])


@pytest.mark.parametrize("mode", ["exact", "private"])
def test_a_left_out_column_is_not_in_the_fit_and_keeps_weight_0_in_its_place(mode: str) -> None:
    x, y = logistic(np.random.default_rng(8), sum(SIZES), 4)
    plan = {"kind": "glm", "name": "fit", "part": "all", "leave_out": ["c1"]}
    plan |= {"mode": "exact", "solver": "newton", "rounds": 25} if mode == "exact" else {"rounds": 5}
    study = contracts.study(
        phenotype=BINARY, variants=[], cohort={}, analyses=[plan], aggregation=EXACT if mode == "exact" else {"mode": "strict"},
        covariates=[
            {"name": f"c{j}", "kind": "quantitative", "lower": "-9", "upper": "9", "centre": "0", "scale": "1"} for j in range(4)
        ],
    )  # fmt: skip
    done = plain_loop.run(study, plain_loop.split(plain_loop.patients(study, y, table=x), SIZES))["fit"]
    assert [row["name"] for row in done.result["weights"]] == ["c0", "c2", "c3"]
    w = done.state["w"]
    assert w[1] == 0 and w[[0, 2, 3]].tolist() == [row["standardised"] for row in done.result["weights"]]
    if mode == "exact":
        oracle = sm.Logit(y, sm.add_constant(x[:, [0, 2, 3]])).fit(disp=0, tol=1e-14)
        np.testing.assert_allclose(w[[0, 2, 3]], oracle.params[1:], rtol=1e-8)


def test_leaving_out_what_is_not_there_is_refused() -> None:
    with pytest.raises(StudyError, match="no score or covariate"):
        study_of(2, BINARY, leave_out=["c9"])
