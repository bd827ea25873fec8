"""Every measure of a model against scikit-learn, statsmodels, lifelines or its formula on the patients themselves."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
from lifelines.utils import concordance_index
from scipy.stats import norm
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

import contracts
import plain_loop
from oracles import table
from oracles.test_survival import TIME, followed
from sequester.protocols import noise, privacy
from sequester.protocols.analyses.metrics import average_precision, concordance, deciles, liability
from sequester.protocols.analyses.registry import analysis_of
from sequester.protocols.errors import StudyError
from sequester.protocols.study import Study

EXACT = {"mode": "strict", "ring_bits": 64, "fraction_bits": 28}
SIZES = [4000, 2500, 1000, 500]
ALL = sum(SIZES)
HEIGHT = {"name": "height", "kind": "quantitative", "lower": "-10", "upper": "10", "centre": "0", "scale": "1"}
FIT = {"kind": "glm", "name": "fit", "mode": "exact", "solver": "newton", "rounds": 20}


def study_of(plans: list[dict[str, Any]], columns: int = 4, **changed: Any) -> Study:
    private = any(plan.get("mode", "private") == "private" for plan in plans)
    return contracts.study(**{
        "variants": [], "cohort": {"subgroup": "ancestry", "subgroup_values": ["AFR", "EUR"]},
        "covariates": [
            {"name": f"c{j}", "kind": "quantitative", "lower": "-9", "upper": "9", "centre": "0", "scale": "1"}
            for j in range(columns)
        ],
        "analyses": plans, "n0": ALL, "n_max": 2 * ALL,
        "aggregation": EXACT if not private else {"mode": "strict"}, **changed,
    })  # fmt: skip


def people(seed: int, prevalence: float = -1.5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((ALL, 4))
    strata = rng.choice(3, ALL, p=[0.3, 0.65, 0.05])
    z = x @ [0.8, -0.5, 0.3, 0.0] + prevalence + 0.4 * (strata == 0)
    return x, (rng.random(ALL) < 1 / (1 + np.exp(-z))).astype(float), strata


def run(study: Study, x: np.ndarray, y: np.ndarray, strata: np.ndarray, event: np.ndarray | None = None) -> Any:
    whole = plain_loop.patients(study, y, table=x, strata=strata, event=event, seed=1, test=0.4)
    finished = plain_loop.run(study, plain_loop.split(whole, SIZES))
    return finished, whole.test


def test_measures_of_a_yes_or_no_outcome_overall_and_by_group() -> None:
    x, y, strata = people(1)
    study = study_of([
        FIT, {"kind": "evaluation", "name": "held_out", "of": "fit", "mode": "exact", "bins": 1000,
              "population_prevalence": "0.01"},
    ])  # fmt: skip
    finished, test = run(study, x, y, strata)
    w, b = finished["fit"].state["w"], float(finished["fit"].state["b"][0])
    result = finished["held_out"].result
    for found, rows in (
        (result, test),
        *((result["groups"][n], test & (strata == g)) for g, n in enumerate(("AFR", "EUR", "other"))),
    ):
        z, yy = x[rows] @ w + b, y[rows]
        p = 1 / (1 + np.exp(-z))
        table.record("evaluation", "sklearn", "AUC, 1,000 bins", found["auc"]["value"], roc_auc_score(yy, z), atol=5e-4)
        table.record("evaluation", "sklearn", "Brier score", found["brier"], brier_score_loss(yy, p), atol=1e-8)
        null = sm.Logit(yy, np.ones(len(yy))).fit(disp=0).llf
        ll = float((yy * np.log(p) + (1 - yy) * np.log(1 - p)).sum())
        theirs = (1 - np.exp(2 * (null - ll) / len(yy))) / (1 - np.exp(2 * null / len(yy)))
        table.record("evaluation", "statsmodels", "Nagelkerke R2", found["nagelkerke_r2"], theirs, atol=1e-8)
        r2 = float(np.corrcoef(z, yy)[0, 1] ** 2)
        table.record("evaluation", "numpy", "R2 on the observed scale", found["observed_r2"], r2, atol=1e-8)
        assert found["liability_r2"] == pytest.approx(liability(r2, 0.01, float(yy.mean())), rel=1e-8)
        assert found["observed_over_expected"] == pytest.approx(yy.sum() / p.sum(), rel=1e-8)
    ap = average_precision_score(y[test], x[test] @ w)
    table.record("evaluation", "sklearn", "average precision, 1,000 bins", result["average_precision"], ap, atol=1e-3)
    z = x[test] @ w
    tenth = np.argsort(np.argsort(z)) * 10 // len(z)
    theirs = [y[test][tenth == k].mean() for k in range(10)]
    table.record("evaluation", "numpy", "share of cases by decile, 1,000 bins", result["deciles"], theirs, atol=5e-3)


def test_liability_r2_recovers_what_was_simulated() -> None:
    # a score that explains 20 % of liability, cases over-sampled: Lee et al. 2012 undoes both the scale and the sampling
    rng = np.random.default_rng(2)
    n, k = 4_000_000, 0.01
    score = rng.standard_normal(n) * 0.2**0.5
    case = score + rng.normal(0, 0.8**0.5, n) > norm.isf(k)
    keep = case | (rng.random(n) < 0.01)
    r2 = float(np.corrcoef(score[keep], case[keep])[0, 1] ** 2)
    assert liability(r2, k, float(case[keep].mean())) == pytest.approx(0.2, abs=0.01)
    # with the sample as in the population it is Dempster and Lerner's r2 K (1 - K) / z^2
    z = norm.pdf(norm.isf(0.1))
    table.record(
        "evaluation", "the formula", "liability R2", liability(0.05, 0.1, 0.1), 0.05 * 0.1 * 0.9 / z**2, atol=1e-8
    )


def test_average_precision_of_a_constant_score_is_the_prevalence() -> None:
    assert average_precision(np.array([[0.0, 90.0, 0.0], [0.0, 10.0, 0.0]])) == pytest.approx(0.1)
    assert deciles(np.array([[5.0, 20.0], [5.0, 20.0]]), 10) == {}  # tenths below the floor


def test_average_precision_is_the_mean_over_every_order_inside_a_bin() -> None:
    cells = np.array([[1.0, 1.0, 1.0], [0.0, 2.0, 1.0]])  # bins of 1, 3 and 2 people, lowest first
    people = [(b, y) for b in range(3) for y in (0, 1) for _ in range(int(cells[y, b]))]
    bins, outcome = np.array([b for b, _ in people]), np.array([y for _, y in people])
    orders = []
    for within in itertools.permutations(range(len(people))):
        scores = bins + np.array(within) / len(people)
        orders.append(average_precision_score(outcome, scores))
    assert average_precision(cells) == pytest.approx(np.mean(orders), rel=1e-12)


def test_the_c_index_of_a_survival_model() -> None:
    x, years, event = followed(ALL, 3)
    x = np.column_stack([x, np.zeros(ALL)])
    strata = np.random.default_rng(3).choice(3, ALL, p=[0.3, 0.65, 0.05])
    study = study_of([
        {"kind": "survival", "name": "fit", "mode": "exact", "model": "cox_by_site", "rounds": 10},
        {"kind": "evaluation", "name": "held_out", "of": "fit", "mode": "exact", "bins": 200, "times": 240},
    ], phenotype=TIME)  # fmt: skip
    finished, test = run(study, x, years, strata, event)
    w, result = finished["fit"].state["w"], finished["held_out"].result
    for found, rows in ((result, test), (result["groups"]["EUR"], test & (strata == 1))):
        theirs = concordance_index(years[rows], -(x @ w)[rows], event[rows])
        table.record("evaluation", "lifelines", "C-index, 240 x 200", found["c_index"], theirs, atol=1e-3)


def test_concordance_by_hand() -> None:
    cells = np.zeros((2, 3, 2))
    cells[0, 2, 1] = 1  # an event, highest score
    cells[0, 0, 0] = 1  # censored in the same interval: later
    cells[1, 2, 1] = 1  # later, same score: half
    cells[1, 1, 0] = 2  # later, lower
    assert concordance(cells) == (pytest.approx((1 + 0.5 + 2 + 2) / 6), 6.0)


def test_measures_of_a_quantity_overall_and_by_group() -> None:
    x, _, strata = people(4)
    y = np.clip(x @ [1, 0.5, 0, 0] + np.random.default_rng(4).standard_normal(ALL), -10, 10)
    study = study_of([
        {"kind": "linear", "name": "fit", "mode": "exact", "part": "train"},
        {"kind": "evaluation", "name": "held_out", "of": "fit", "mode": "exact", "error_bound": "10"},
    ], phenotype=HEIGHT)  # fmt: skip
    finished, test = run(study, x, y, strata)
    fitted = x @ finished["fit"].state["w"] + finished["fit"].state["b"][0]
    for found, rows in (
        (finished["held_out"].result, test),
        (finished["held_out"].result["groups"]["AFR"], test & (strata == 0)),
    ):
        r2 = 1 - ((y - fitted)[rows] ** 2).sum() / ((y[rows] - y[rows].mean()) ** 2).sum()
        table.record("evaluation, quantitative", "numpy", "R2", found["r2"], r2, atol=1e-8)
        line = sm.OLS(y[rows], sm.add_constant(fitted[rows])).fit()
        table.record(
            "evaluation, quantitative",
            "statsmodels",
            "calibration slope",
            found["calibration_slope"],
            line.params[1],
            atol=1e-8,
        )
        assert found["correlation"] == pytest.approx(np.corrcoef(fitted[rows], y[rows])[0, 1], abs=1e-10)
        assert found["calibration_intercept"] == pytest.approx(line.params[0], abs=1e-8)
        assert found["mean_absolute_error"] == pytest.approx(np.abs(y - fitted)[rows].mean(), rel=1e-10)


def test_calibration_slope_and_intercept_equal_statsmodels_overall_and_by_group() -> None:
    x, y, strata = people(5)
    study = study_of([FIT, {"kind": "calibration", "name": "right", "of": "fit", "mode": "exact"}])
    finished, test = run(study, x, y, strata)
    z = x @ finished["fit"].state["w"] + finished["fit"].state["b"][0]
    result = finished["right"].result
    for found, rows in (
        (result, test),
        (result["groups"]["AFR"], test & (strata == 0)),
        (result["groups"]["EUR"], test & (strata == 1)),
    ):
        oracle = sm.Logit(y[rows], sm.add_constant(z[rows])).fit(disp=0, tol=1e-14)
        ours = [found["intercept"]["value"], found["slope"]["value"]]
        table.record("calibration", "statsmodels", "intercept and slope, relative", ours, oracle.params, rtol=1e-8)
        errors = [found["intercept"]["se"], found["slope"]["se"]]
        table.record("calibration", "statsmodels", "standard errors, relative", errors, oracle.bse, rtol=1e-8)
    p = 1 / (1 + np.exp(-z[test]))
    assert np.mean([row[1] for row in result["bins"]]) == pytest.approx(p.mean(), abs=0.03)


def test_reclassification_and_decision_curve_equal_counting_patients() -> None:
    x, y, strata = people(6)
    study = study_of([
        FIT | {"name": "new"},
        {"kind": "penalised", "name": "old", "mode": "exact", "l1": "0", "strength": "0.5", "scheme": "newton"},
        {"kind": "reclassification", "name": "moved", "of": "new", "against": "old", "mode": "exact",
         "thresholds": ["0.1", "0.2", "0.4"]},
    ], variants=[{"id": "v0", "chromosome": "1", "position": 1, "effect": "A", "other": "G", "frequency": "0.3"}])  # fmt: skip
    rng = np.random.default_rng(6)
    whole = plain_loop.patients(
        study, y, table=x, dosage=rng.binomial(2, 0.3, (ALL, 1)) * 1.0, strata=strata, seed=1, test=0.4
    )
    finished = plain_loop.run(study, plain_loop.split(whole, SIZES))
    block = np.vstack([b.x for b in whole.blocks("test")]), np.concatenate([b.y for b in whole.blocks("test")])
    risk = [1 / (1 + np.exp(-(block[0] @ finished[m].state["w"] + finished[m].state["b"][0]))) for m in ("old", "new")]
    old, new = (np.digitize(r, [0.1, 0.2, 0.4]) for r in risk)
    case = block[1] == 1
    theirs = [
        (new > old)[case].mean() - (new < old)[case].mean(),
        (new < old)[~case].mean() - (new > old)[~case].mean(),
    ]  # fmt: skip
    result = finished["moved"].result
    table.record(
        "reclassification", "numpy", "net reclassification", [result["events"], result["non_events"]], theirs, atol=1e-8
    )
    for row in result["net_benefit"]:
        for name, r in zip(("old", "new"), risk, strict=True):
            flagged = r >= row["threshold"]
            benefit = (flagged & case).mean() - (flagged & ~case).mean() * row["threshold"] / (1 - row["threshold"])
            table.record("reclassification", "numpy", "net benefit", row[name], benefit, atol=1e-8)


@pytest.mark.parametrize("kind", ["evaluation", "calibration", "reclassification"])
def test_three_people_of_a_group_are_hidden_with_the_smallest_group_beside_them(kind: str) -> None:
    x, y, strata = people(7)
    strata = np.where(strata == 2, 1, strata)
    y[:3], strata[:3] = [1.0, 0.0, 1.0], 2
    plan = {"kind": kind, "name": "seen", "of": "fit", "mode": "exact", "part": "all"}
    if kind == "reclassification":
        plan |= {"against": "fit", "thresholds": ["0.2"]}
    finished, _ = run(study_of([FIT, plan]), x, y, strata)
    groups = finished["seen"].result["groups"]
    assert groups["other"] == {"suppressed": "<10"} and groups["AFR"] == {"suppressed": "complement"}
    assert "suppressed" not in groups["EUR"]


@pytest.mark.parametrize("kind", ["calibration", "reclassification"])
def test_one_patient_moves_a_private_table_by_its_sensitivity_at_most(kind: str) -> None:
    plan = {"kind": kind, "name": "seen", "of": "fit"}
    if kind == "reclassification":
        plan |= {"against": "fit", "thresholds": ["0.2"]}
    study = study_of([{"kind": "glm", "name": "fit", "rounds": 2}, plan])
    x, y, strata = people(8)
    whole = plain_loop.patients(study, y, table=x, strata=strata, test=1.0).only(np.arange(30))
    analysis = analysis_of(study.analyses[1])
    w = {"w": np.array([np.inf, 1.0, -1e300, 0.5]), "b": np.array([np.nan, 0.0])}
    if kind == "reclassification":
        w["w"] = np.array([w["w"], w["w"]])
    a, b = (analysis.contribution(study.analyses[1], study, c, w, 0) for c in (whole, whole.only(np.arange(1, 30))))
    moved = np.sqrt(sum(float(((a[n] - b[n]) ** 2).sum()) for n in a))
    assert 0 < moved <= analysis.sensitivity(study.analyses[1], study) * (1 + 1e-9)


def test_the_private_c_index_stays_within_0_01_of_the_exact_one() -> None:
    # spec/genomics.md, section 7: 24 x 20 within .003 without noise; 8,000 people at a tenth of epsilon 3
    x, years, event = followed(ALL, 9)
    plans = [
        {"kind": "survival", "name": "fit", "model": "hazard", "budget": "0.8"},
        {"kind": "evaluation", "name": "held_out", "of": "fit", "part": "all", "budget": "0.2"},
    ]
    study = study_of(plans, phenotype=TIME, cohort={})
    w = np.array([0.6, -0.4, 0.2, 0.0])
    whole = plain_loop.patients(study, years, table=np.column_stack([x, np.zeros(ALL)]), event=event)
    plan = study.analyses[1]
    analysis = analysis_of(plan)
    layout = privacy.layout(study, plan, 0)
    opened = analysis.contribution(plan, study, whole, {"w": w[None], "b": np.zeros(1)}, 0)
    share = privacy.sigma_int(study, plan, layout)
    step = 2**study.aggregation.fraction_bits
    found = []
    for seed in range(5):
        drawn = sum(
            noise.discrete_gaussian(share, layout.coordinates, noise.aes_stream(bytes([seed]) * 32, bytes([site]) * 16))
            for site in range(3)
        )
        cells = opened["cells"] + drawn.reshape(opened["cells"].shape) / step
        found.append(
            analysis.combine(plan, study, {"w": w[None], "b": np.zeros(1)}, {"cells": cells}, 0).result["c_index"]
        )
    truth = concordance_index(years, -(x @ w[:3]), event)
    assert abs(np.mean(found) - truth) < 0.01


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"kind": "evaluation", "of": "n"}, "leaves no model"),
        ({"kind": "calibration", "of": "n"}, "no model with weights before it"),
        (
            {"kind": "reclassification", "of": "fit", "against": "fit", "thresholds": ["0.2", "0.1"]},
            "rising probabilities",
        ),
        ({"kind": "evaluation", "of": "fit", "population_prevalence": "1.5"}, "not between 0 and 1"),
    ],
)
def test_a_measure_of_what_is_no_model_is_refused(plan: dict[str, Any], said: str) -> None:
    counted = {"kind": "counts", "name": "n", "axes": [{"column": "case"}]}
    with pytest.raises(StudyError, match=said):
        study_of([counted, {"kind": "glm", "name": "fit"}, {"name": "seen", **plan}])
