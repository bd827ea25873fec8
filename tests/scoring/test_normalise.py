"""Z scores along ancestry, percentiles and absolute risk against other libraries and closed forms."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import optimize, stats

from sequester.client.scoring.normalise import fit, percentile, percentile_interval
from sequester.client.scoring.risk import Effect, Incidence, absolute_risk, effect_of, read_incidence, risk_interval
from sequester.protocols.errors import SiteError


def invented(seed: int, n: int = 1_500, k: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """A score whose mean and spread both move along components."""
    rng = np.random.default_rng(seed)
    pcs = rng.normal(size=(n, k)) * [3.0, 2.0, 1.0, 0.5][:k] + rng.integers(0, 3, (n, 1)) * 4.0
    score = 0.3 * pcs[:, 0] - 0.1 * pcs[:, 1] + rng.normal(size=n) * np.exp(0.15 * pcs[:, 0])
    return score * 40 + 700, pcs


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_z_norm1_equals_least_squares_and_z_norm2_the_joint_gaussian_likelihood(seed: int) -> None:
    score, pcs = invented(seed)
    fitted = fit(score, pcs)
    x = sm.add_constant((pcs - pcs.mean(axis=0)) / pcs.std(axis=0))
    y = score - score.mean()
    ols = sm.OLS(y, x).fit()
    np.testing.assert_allclose(fitted.z1(score, pcs), ols.resid / ols.resid.std(), atol=1e-9)

    # as pgsc_calc: from the linear fit and a gamma regression of the squared residual, then both at once
    gamma = sm.GLM(ols.resid**2, x, family=sm.families.Gamma(link=sm.families.links.Log())).fit()
    scale = ols.resid.std()

    def loss(theta: np.ndarray) -> float:
        mean, log_v = x @ theta[:5], x @ theta[5:]
        return float(np.sum(log_v + (y / scale - mean) ** 2 * np.exp(-log_v)) / 2)

    def slope(theta: np.ndarray) -> np.ndarray:
        mean, log_v = x @ theta[:5], x @ theta[5:]
        r = y / scale - mean
        return np.concatenate([-(x.T @ (r * np.exp(-log_v))), x.T @ (1 - r**2 * np.exp(-log_v)) / 2])

    start = np.concatenate([ols.params / scale, gamma.params - [2 * np.log(scale), 0, 0, 0, 0]])
    best = optimize.minimize(loss, start, jac=slope, method="BFGS", options={"gtol": 1e-9, "maxiter": 2_000})
    theirs = (y / scale - x @ best.x[:5]) * np.exp(-0.5 * (x @ best.x[5:]))
    np.testing.assert_allclose(fitted.z2(score, pcs), theirs, atol=1e-6)  # spec/genomics.md, section 6
    z = fitted.z2(score, pcs)
    spread_low, spread_high = z[pcs[:, 0] < np.median(pcs[:, 0])].std(), z[pcs[:, 0] >= np.median(pcs[:, 0])].std()
    assert abs(spread_low - spread_high) < 0.1  # of Z_norm1 the two differ by more than that
    z = fitted.z1(score, pcs)
    assert abs(z[pcs[:, 0] < np.median(pcs[:, 0])].std() - z[pcs[:, 0] >= np.median(pcs[:, 0])].std()) > 0.3


def test_percentiles_equal_scipy_and_their_interval_covers() -> None:
    rng = np.random.default_rng(4)
    reference = rng.normal(size=400).round(1)  # with ties
    for score in (*reference[:50], -9.0, 9.0, 0.05):
        assert percentile(float(score), reference) == pytest.approx(
            stats.percentileofscore(reference, score, kind="rank"), abs=1e-9
        )
    hits = 0
    for _ in range(1_000):  # the true percentile of z = 0.7, from references of 100
        low, high = percentile_interval(0.7, 0.0, rng.normal(size=100))
        hits += low <= 100 * stats.norm.cdf(0.7) <= high
    assert 0.93 <= hits / 1_000 <= 0.98  # Wilson's interval at n = 100; false alarm below 1e-4
    narrow, wide = percentile_interval(0.7, 0.0, reference), percentile_interval(0.7, 0.5, reference)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_what_cannot_be_fitted_is_refused() -> None:
    score, pcs = invented(5)
    with pytest.raises(SiteError, match="the same for everybody"):
        fit(np.ones_like(score), pcs)
    with pytest.raises(SiteError, match="component is the same"):
        fit(score, np.column_stack([pcs, np.ones(len(pcs))]))


def flat(rate: float, death: float = 0.0) -> Incidence:
    return Incidence({("f", a): rate for a in range(40, 90)}, {("f", a): death for a in range(40, 90)})


def test_absolute_risk_equals_the_closed_form_of_constant_rates_and_averages_to_the_population() -> None:
    case, death, years, ratio = 0.004, 0.01, 10, 1.6
    b = math.log(ratio)
    for z, age in ((-2.0, 50.0), (0.0, 50.5), (1.5, 61.25)):
        rate = case * math.exp(b * z - b * b / 2)
        wanted = rate / (rate + death) * (1 - math.exp(-(rate + death) * years))
        assert absolute_risk(flat(case, death), "f", age, years, ratio, z) == pytest.approx(wanted, rel=1e-12)
    # Gauss-Hermite over the population: its mean is that of a person of mean hazard, but for the curvature of survival
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    risks = [absolute_risk(flat(1e-5), "f", 50.0, years, ratio, z) or math.nan for z in nodes]
    mean = float(np.dot(weights / weights.sum(), risks))
    assert mean == pytest.approx(1 - math.exp(-1e-5 * years), rel=1e-3)
    assert absolute_risk(flat(case), "f", 85.0, years, ratio, 0.0) is None  # beyond the table
    assert absolute_risk(flat(case), "m", 50.0, years, ratio, 0.0) is None


def test_rates_that_change_with_age_are_taken_year_by_year() -> None:
    table = Incidence({("f", a): 0.001 * (a - 39) for a in range(40, 60)}, {("f", a): 0.0 for a in range(40, 60)})
    hazard = 0.5 * 0.002 + 0.003 + 0.004 + 0.5 * 0.005  # from 41.5 to 44.5
    assert absolute_risk(table, "f", 41.5, 3, 1.0, 0.0) == pytest.approx(1 - math.exp(-hazard), rel=1e-12)


def test_the_interval_of_a_risk_holds_that_of_the_effect_and_of_missing_genotypes() -> None:
    effect = Effect(1.6, 1.5, 1.7)
    found = risk_interval(flat(0.004), "f", 50.0, 10, effect, 1.0, 0.0)
    assert found is not None
    value, low, high = found
    ends = [absolute_risk(flat(0.004), "f", 50.0, 10, r, 1.0) for r in (1.5, 1.7)]
    assert (low, high) == (min(e for e in ends if e), max(e for e in ends if e)) and low < value < high
    wide = risk_interval(flat(0.004), "f", 50.0, 10, effect, 1.0, 0.3)
    assert wide is not None and wide[1] < low < high < wide[2]


@pytest.mark.parametrize("text", ["1.6", "1.6,1.7,1.5", "a,b,c", "1.6,0,1.7", "nan,1,2"])
def test_an_effect_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SiteError):
        effect_of(text)


def test_a_table_of_rates_is_read_or_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rates.csv"
    path.write_text("sex,age,incidence,mortality\nf,40,0.001,0.002\n")
    assert read_incidence(path) == Incidence({("f", 40): 0.001}, {("f", 40): 0.002})
    path.write_text("sex,age,incidence\nf,40,120\n")
    with pytest.raises(SiteError, match=r"line 2: a rate that is not in 0\.\.1"):
        read_incidence(path)
    path.write_text("age,incidence\n40,0.1\n")
    with pytest.raises(SiteError, match="no columns sex"):
        read_incidence(path)
