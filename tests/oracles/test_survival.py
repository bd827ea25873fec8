"""Cox models against statsmodels and lifelines, Kaplan-Meier against lifelines, the hazard against a pooled logit."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from lifelines import CoxPHFitter, KaplanMeierFitter
from lifelines.utils import concordance_index

import contracts
import plain_loop
from oracles import table
from sequester.protocols.analyses.survival import SURVIVAL
from sequester.protocols.errors import StudyError
from sequester.protocols.study import Study

TIME = {"name": "years", "kind": "time", "unit": "years", "lower": "0", "upper": "12", "event": "died"}
SIZES = [700, 300, 150, 50]
ALL = sum(SIZES)


def study_of(model: str, columns: int = 3, mode: str = "exact", **plan: Any) -> Study:
    return contracts.study(
        phenotype=TIME, variants=[], cohort={"subgroup": "ancestry", "subgroup_values": ["AFR", "EUR"]},
        covariates=[
            {"name": f"c{j}", "kind": "quantitative", "lower": "-9", "upper": "9", "centre": "0", "scale": "1"}
            for j in range(columns)
        ],
        n0=ALL, n_max=2 * ALL,
        analyses=[{"kind": "survival", "name": "fit", "mode": mode, "model": model, "part": "all"} | plan],
        aggregation={"mode": "strict", "ring_bits": 64, "fraction_bits": 28} if mode == "exact" else {"mode": "strict"},
    )  # fmt: skip


def followed(n: int, seed: int, ties: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Covariates, years and event by a Weibull hazard, censored at random; `ties` rounds times up to its multiple."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 3))
    time = (rng.exponential(size=n) / (0.02 * np.exp(x @ [0.6, -0.4, 0.2]))) ** (1 / 1.5)
    end = np.minimum(rng.uniform(2, 15, n), 12)
    event = (time <= end).astype(float)
    years = np.minimum(time, end)
    return x, np.ceil(years / ties) * ties if ties else years, event


def fit(
    study: Study, x: np.ndarray, years: np.ndarray, event: np.ndarray, sizes: list[int] = SIZES, **more: Any
) -> Any:
    whole = plain_loop.patients(study, years, table=x, event=event, **more)
    return plain_loop.run(study, plain_loop.split(whole, sizes))["fit"]


SITE = np.repeat(np.arange(len(SIZES)), SIZES)


@pytest.mark.parametrize("ties", [0.0, 0.5])
def test_cox_by_site_equals_a_stratified_fit(ties: float) -> None:
    x, years, event = followed(ALL, 1, ties)
    result = fit(study_of("cox_by_site"), x, years, event).result
    oracle = sm.PHReg(years, x, status=event, strata=SITE, ties="efron").fit(disp=0, method="newton", tol=1e-14)
    beta, se = ([row[name] for row in result["weights"]] for name in ("standardised", "se"))
    table.record("Cox by hospital", "statsmodels", "coefficient, relative", beta, oracle.params, rtol=1e-8)
    table.record("Cox by hospital", "statsmodels", "standard error, relative", se, oracle.bse, rtol=1e-8)
    table.record(
        "Cox by hospital",
        "statsmodels",
        "log-likelihood, relative",
        result["log_partial_likelihood"],
        oracle.llf,
        rtol=1e-8,
    )
    frame = pd.DataFrame(x, columns=["a", "b", "c"]).assign(years=years, event=event, site=SITE)
    life = CoxPHFitter().fit(
        frame, "years", "event", strata=["site"], fit_options={"precision": 1e-12, "r_precision": 1e-14}
    )
    table.record("Cox by hospital", "lifelines", "coefficient, relative", beta, life.params_, rtol=1e-8)
    table.record("Cox by hospital", "lifelines", "standard error, relative", se, life.standard_errors_, rtol=1e-8)
    assert result["converged"] and result["events"] == event.sum()


def test_pooled_cox_on_a_shared_grid_equals_breslow_on_the_same_grid() -> None:
    x, years, event = followed(ALL, 2)
    result = fit(study_of("cox", bins=240), x, years, event).result
    grid = np.ceil(years / 0.05) * 0.05
    oracle = sm.PHReg(np.rint(grid * 20), x, status=event, ties="breslow").fit(disp=0, method="newton", tol=1e-14)
    beta, se = ([row[name] for row in result["weights"]] for name in ("standardised", "se"))
    label = "Cox on a shared grid"
    table.record(label, "statsmodels", "coefficient, relative", beta, oracle.params, rtol=1e-8)
    table.record(label, "statsmodels", "standard error, relative", se, oracle.bse, rtol=1e-8)
    table.record(
        label, "statsmodels", "log-likelihood, relative", result["log_partial_likelihood"], oracle.llf, rtol=1e-8
    )
    exact = sm.PHReg(years, x, status=event, ties="efron").fit(disp=0)
    assert np.abs((np.array(beta) - exact.params) / exact.bse).max() < 0.05  # the grid costs little: section 7


def test_kaplan_meier_and_its_interval_equal_lifelines_on_the_grid() -> None:
    x, years, event = followed(ALL, 3)
    result = fit(study_of("kaplan_meier", bins=240), x, years, event).result
    points = result["curves"]["all"]["points"]
    at = [round(point["time"], 6) for point in points]
    life = KaplanMeierFitter().fit(np.rint(np.ceil(years / 0.05)), event, timeline=range(241))
    rows = np.rint(np.array(at) / 0.05).astype(int)
    ours = [point["survival"] for point in points]
    table.record("Kaplan-Meier", "lifelines", "survival", ours, life.survival_function_.to_numpy()[rows, 0], atol=1e-8)
    ends = [[point["low"], point["high"]] for point in points]
    table.record(
        "Kaplan-Meier", "lifelines", "95 % interval", ends, life.confidence_interval_.to_numpy()[rows], atol=1e-8
    )
    events = np.diff([0, *(event[years <= time + 1e-9].sum() for time in at)])
    assert (events >= 10).all() and points[-1]["at_risk"] >= 10  # no single death can be read off


def test_curves_of_small_groups_are_hidden_with_their_complement() -> None:
    x, years, event = followed(ALL, 4)
    strata = np.zeros(ALL, dtype=np.int64)
    strata[:500] = 1
    strata[:3] = 2  # three people
    curves = fit(study_of("kaplan_meier", bins=120, by_subgroup=True), x, years, event, strata=strata).result["curves"]
    assert curves["other"] == {"suppressed": "<10"} and curves["EUR"] == {"suppressed": "complement"}
    assert "points" in curves["AFR"]


def expanded(x: np.ndarray, years: np.ndarray, event: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """One row an interval at risk, by hand."""
    rows, y = [], []
    width = 12 / bins
    for i in range(len(years)):
        for j in range(bins):
            inside = j * width < years[i] <= (j + 1) * width + 1e-12 or (j == 0 and years[i] == 0)
            if event[i] and inside:
                rows.append([*np.eye(bins)[j], *x[i]])
                y.append(1.0)
                break
            if years[i] < (j + 1) * width - 1e-9:
                break
            rows.append([*np.eye(bins)[j], *x[i]])
            y.append(0.0)
    return np.array(rows), np.array(y)


def test_the_exact_hazard_equals_a_pooled_logit_of_person_intervals() -> None:
    x, years, event = followed(ALL, 5)
    years[:20] = np.arange(20) % 12 + 1.0  # follow-up that ends at the end of an interval
    result = fit(study_of("hazard"), x, years, event).result
    rows, y = expanded(x, years, event, 12)
    oracle = sm.Logit(y, rows).fit(disp=0, tol=1e-14, maxiter=100)
    label = "discrete-time hazard"
    beta, se = ([row[name] for row in result["weights"]] for name in ("standardised", "se"))
    table.record(label, "statsmodels", "coefficient, relative", beta, oracle.params[12:], rtol=1e-8)
    table.record(label, "statsmodels", "standard error, relative", se, oracle.bse[12:], rtol=1e-8)
    theirs = 1 / (1 + np.exp(-oracle.params[:12]))
    table.record(label, "statsmodels", "baseline hazard, relative", result["baseline_hazard"], theirs, rtol=1e-8)


@pytest.mark.slow
def test_the_private_hazard_ranks_as_cox_does() -> None:
    # spec/privacy.md, 3.6: 100 features, n = 10,000, 12 intervals: eps 3 costs .002-.004 of the C-index; 20 features here
    rng = np.random.default_rng(6)
    n, p = 10_000, 20
    x = rng.standard_normal((n, p))
    beta = rng.normal(0, 0.25, p)
    time = (rng.exponential(size=n) / (0.03 * np.exp(x @ beta))) ** (1 / 1.5)
    end = np.minimum(rng.uniform(2, 15, n), 12)
    years, event = np.minimum(time, end), (time <= end).astype(float)
    study = contracts.study(
        phenotype=TIME, variants=[], cohort={}, n0=n, n_max=n + 2000,
        covariates=[
            {"name": f"c{j}", "kind": "quantitative", "lower": "-9", "upper": "9", "centre": "0", "scale": "1"} for j in range(p)
        ],
        analyses=[{"kind": "survival", "name": "fit", "model": "hazard", "part": "all"}],
    )  # fmt: skip
    whole = plain_loop.patients(study, years, table=x, event=event)
    sites = plain_loop.split(whole, [5000, 3000, 2000])
    done = plain_loop.run(study, sites, np.random.default_rng(1))["fit"]
    private = concordance_index(years, -(x @ done.state["w"]), event)
    pooled = concordance_index(years, -(x @ sm.PHReg(years, x, status=event).fit(disp=0).params), event)
    assert private > pooled - 0.02
    assert all("se" not in row for row in done.result["weights"])


@pytest.mark.parametrize("seed", range(8))
def test_one_patient_moves_the_private_hazard_by_at_most_the_clip(seed: int) -> None:
    rng = np.random.default_rng(seed)
    study = study_of("hazard", mode="private")
    plan = study.analyses[0]
    x, years, event = followed(6, seed)
    x *= 10.0 ** rng.integers(-2, 6)
    whole = plain_loop.patients(study, years, table=x, event=event)
    broadcast = {"w": rng.standard_normal(3) * 10.0 ** rng.integers(-2, 8), "b": rng.standard_normal(12) * 100}
    a, b = (SURVIVAL.contribution(plan, study, c, broadcast, 0) for c in (whole, whole.only(np.arange(1, 6))))
    moved = np.sqrt(sum(float(((a[name] - b[name]) ** 2).sum()) for name in a))
    assert moved <= SURVIVAL.sensitivity(plan, study) * (1 + 1e-9)


@pytest.mark.parametrize("model", ["cox_by_site", "cox", "hazard"])
def test_constant_and_collinear_columns_are_named(model: str) -> None:
    x, years, event = followed(ALL, 7)
    wide = np.column_stack([x[:, 0], np.full(ALL, 0.3), x[:, 0] * 2])
    rows = fit(study_of(model), wide, years, event).result["weights"]
    assert [row.get("not_estimated") for row in rows] == [None, "constant", "collinear"]


@pytest.mark.parametrize("model", ["cox_by_site", "cox", "hazard"])
def test_a_hospital_without_events_contributes_and_no_events_at_all_are_said(model: str) -> None:
    x, years, event = followed(ALL, 8)
    event[SITE == 3] = 0.0
    result = fit(study_of(model, bins=60, rounds=30), x, years, event).result
    assert result["converged"] and all("se" in row for row in result["weights"])
    assert fit(study_of(model), x, years, np.zeros(ALL)).result["not_fitted"] == "no events"


@pytest.mark.parametrize("model", ["cox_by_site", "cox", "hazard"])
def test_a_column_that_separates_is_named(model: str) -> None:
    x, years, event = followed(ALL, 9)
    x[:, 2] = (np.random.default_rng(1).random(ALL) < 0.05).astype(float)
    event[x[:, 2] == 1] = 0.0  # no carrier ever has the event
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fit(study_of(model, rounds=60), x, years, event).result
    assert result["separated"] == ["c2"] and result["weights"][2]["not_estimated"] == "separated"
    assert "se" in result["weights"][0]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": "cox", "mode": "private"}, "model hazard is the private one"),
        ({"model": "cox", "by_subgroup": True}, "by_subgroup is for Kaplan-Meier"),
        ({"model": "hazard", "mode": "private", "clip": "0"}, "above 0"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyError, match=said):
        study_of(**changed)


def test_survival_of_a_yes_or_no_outcome_is_refused() -> None:
    with pytest.raises(StudyError, match="a time with its event was expected"):
        contracts.study(analyses=[{"kind": "survival", "name": "fit", "model": "kaplan_meier"}])
