"""Cochran's Q and I2 against a meta-analysis of the hospitals' own fits; its level; what its consent says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.stats import chi2
from statsmodels.stats.meta_analysis import combine_effects

import contracts
import plain_loop
from oracles import table
from oracles.test_structure import variants
from sequester.client.config import SiteConfig
from sequester.client.gate import approval
from sequester.client.policy import Policy
from sequester.protocols.analyses import heterogeneity
from sequester.protocols.errors import StudyError
from sequester.protocols.study import Study

EXACT = {"mode": "strict", "ring_bits": 64, "fraction_bits": 28}
BINARY = {"name": "case", "kind": "binary", "values": ["0", "1"]}
HEIGHT = {"name": "height", "kind": "quantitative", "lower": "-10", "upper": "10", "centre": "0", "scale": "1"}
SIZES = [1500, 1000, 900, 800]
ALL = sum(SIZES)
LABEL = "heterogeneity"


def study_of(phenotype: dict[str, Any] = BINARY, first: Any = (), v: int = 4, **plan: Any) -> Study:
    return contracts.study(
        phenotype=phenotype, variants=variants(v), cohort={}, aggregation=EXACT,
        covariates=[{"name": "c0", "kind": "quantitative", "lower": "-9", "upper": "9", "centre": "0", "scale": "1"}],
        analyses=[*first, {"kind": "heterogeneity", "name": "apart", "mode": "exact"} | plan],
    )  # fmt: skip


def people(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Variant 0 works in the first hospital only, variant 1 everywhere."""
    rng = np.random.default_rng(seed)
    x, g = rng.standard_normal((ALL, 1)), rng.binomial(2, 0.3, (ALL, 4)).astype(float)
    first = np.arange(ALL) < SIZES[0]
    z = 0.4 * x[:, 0] + 0.8 * g[:, 0] * first + 0.5 * g[:, 1]
    y = (rng.random(ALL) < 1 / (1 + np.exp(0.8 - z))).astype(float)
    return x, g, y, np.clip(z + rng.standard_normal(ALL), -10, 10)


def run(study: Study, x: np.ndarray, g: np.ndarray, y: np.ndarray, sizes: list[int] = SIZES) -> dict[str, Any]:
    whole = plain_loop.patients(study, y, table=x, dosage=g)
    rows = plain_loop.run(study, plain_loop.split(whole, sizes))["apart"].result["terms"]
    return {row["term"]: row for row in rows}


def own_fits(design: list[np.ndarray], y: np.ndarray, linear: bool) -> tuple[np.ndarray, np.ndarray]:
    """Estimate and variance of the last column at each hospital."""
    fits = []
    for rows in np.split(np.arange(ALL), np.cumsum(SIZES)[:-1]):
        matrix = sm.add_constant(np.column_stack(design)[rows])
        fit = sm.OLS(y[rows], matrix).fit() if linear else sm.Logit(y[rows], matrix).fit(disp=0, tol=1e-14)
        fits.append((fit.params[-1], fit.bse[-1] ** 2))
    return np.array(fits)[:, 0], np.array(fits)[:, 1]


@pytest.mark.parametrize("linear", [False, True])
def test_q_is_that_of_a_meta_analysis_of_the_hospitals_own_fits(linear: bool) -> None:
    x, g, y, height = people(1)
    outcome = height if linear else y
    rows = run(study_of(HEIGHT if linear else BINARY, terms=["c0", "v0", "v1"]), x, g, outcome)
    for term, design in {"c0": [x], "v0": [x, g[:, 0]], "v1": [x, g[:, 1]]}.items():
        effects, variances = own_fits(design, outcome, linear)
        other = combine_effects(effects, variances, method_re="chi2")
        row = rows[term]
        table.record(LABEL, "statsmodels", "Q, relative", row["q"], other.q, rtol=1e-8)
        table.record(LABEL, "statsmodels", "I2", row["i2"], max(other.i2, 0.0), atol=1e-8)
        table.record(LABEL, "statsmodels", "p", row["p"], chi2.sf(other.q, 3), atol=1e-8)
        table.record(LABEL, "statsmodels", "mean effect, relative", row["effect"], other.mean_effect_fe, rtol=1e-8)
        table.record(LABEL, "statsmodels", "its standard error, relative", row["se"], other.sd_eff_w_fe, rtol=1e-8)
        assert row["hospitals"] == 4 and row["df"] == 3
    assert rows["v0"]["p"] < 1e-4 < rows["v1"]["p"] and rows["v0"]["i2"] > 0.6


def test_the_strongest_variants_of_a_scan_with_components() -> None:
    x, g, y, _ = people(2)
    first = [
        {"kind": "structure", "name": "ancestry", "mode": "exact", "components": 1, "iterations": 4},
        {"kind": "association", "name": "scan", "mode": "exact", "follow": 0},
    ]
    study = study_of(first=first, of="scan", top=2, components="ancestry")
    rows = run(study, x, g, y)
    assert set(rows) == {"v0", "v1"} and rows["v0"]["p"] < 0.01  # the one component holds part of v0
    assert heterogeneity.HETEROGENEITY.is_iterative(study.analyses[-1], study)
    alone = study_of(terms=["v0"])
    assert not heterogeneity.HETEROGENEITY.is_iterative(alone.analyses[-1], alone)


def test_a_hospital_that_cannot_estimate_a_term_adds_nothing_to_it() -> None:
    x, g, y, _ = people(3)
    y[SIZES[0] : SIZES[0] + SIZES[1]] = 0.0  # no case in the second hospital
    g[-SIZES[3] :, 2] = np.nan  # the last does not carry v2
    g[:, 3] = np.random.default_rng(3).random(ALL) < 0.002  # a handful of carriers
    x[: SIZES[0]] = 1.0  # constant in the first
    rows = run(study_of(terms=["c0", "v1", "v2", "v3"]), x, g, y)
    assert [rows[t]["hospitals"] for t in ("c0", "v1", "v2", "v3")] == [2, 3, 2, 0]
    assert rows["v3"] == {"term": "v3", "hospitals": 0, "not_tested": "fewer than 3 hospitals can estimate it"}
    assert "p" in rows["v1"] and "q" not in rows["c0"] and "effect" not in rows["v2"]


def test_what_opens_is_three_sums_and_a_count_a_term() -> None:
    study = study_of(terms=["c0", "v0"])
    layout = heterogeneity.HETEROGENEITY.layout(study.analyses[0], study, 0)
    assert [name for name, _ in layout.fields] == ["hospitals", "w", "wb", "wbb"] and layout.coordinates == 8


def test_a_hospital_fitted_without_an_error_is_left_out_and_does_not_refuse() -> None:
    x, g, _, height = people(4)
    height[: SIZES[0]] = 2.0 * x[: SIZES[0], 0]  # fitted without an error: infinite weight
    row = run(study_of(HEIGHT, terms=["c0"]), x, g, height)["c0"]
    assert row["hospitals"] == 3 and np.isfinite(row["q"])


def test_the_consent_names_what_is_compared() -> None:
    study = study_of(terms=["c0", "v0"])
    digest = contracts.privacy.study_digest(study)
    config = SiteConfig.model_validate({"site": {"id": "north"}})
    text = approval.text(study, digest, config, contracts.PINNED)
    assert (
        "estimates of c0, v0 lie apart (heterogeneity)" in text
        and "where only one can, they are its own estimate" in text
        and "solve for each one's" in text
    )
    assert [o.name for o in Policy(analyses=("heterogeneity",)).objections(study)] == ["EXACT"]
    assert not Policy(analyses=("heterogeneity",), exact=("heterogeneity",)).objections(study)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"mode": "private", "terms": ["c0"]}, "exact only, under a consent that names it"),
        ({"terms": ["v9"]}, "`v9` is no covariate, score or variant"),
        ({"terms": ["v1", "v1"]}, "named twice"),
        ({}, "name `terms`, or the scan"),
        ({"of": "scan"}, "no association scan before it"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(plan: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyError, match=said):
        study_of(**plan)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("sizes", "prevalence", "frequency"),
    [([2000, 1200, 800, 700, 300], 0.2, 0.3), ([1300] * 4, 0.1, 0.4), ([4500, 3500, 3500, 500], 0.3, 0.03)],
)
def test_hospitals_that_agree_are_rejected_at_the_level(sizes: list[int], prevalence: float, frequency: float) -> None:
    study = study_of(terms=["v0"])
    rng = np.random.default_rng(1)
    p = []
    while len(p) < 2000:
        sums = np.zeros(4)
        for n in sizes:
            x = np.column_stack([np.ones(n), rng.standard_normal(n), rng.binomial(2, frequency, n) - 2 * frequency])
            z = np.log(prevalence / (1 - prevalence)) + 0.3 * x[:, 1] + 0.2 * x[:, 2]
            y = (rng.random(n) < 1 / (1 + np.exp(-z))).astype(float)
            b, w = (found[-1] for found in heterogeneity.local_fit(study, x, y))
            sums += [w > 0, w, w * b, w * b * b]
        row = heterogeneity.cochran(*(float(s) for s in sums))
        p += [row["p"]] if "p" in row else []
    level = float((np.array(p) < 0.05).mean())
    table.within(LABEL, "2,000 null simulations", "type I error at 5 %, from .05", abs(level - 0.05), 0.01)
