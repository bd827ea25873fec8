"""Six awkward situations in every exact analysis: each ends, says what it left out by name, and does not tell on a hospital.

Separation, no cases at a hospital, a constant covariate, collinear covariates, a hospital without one variant, a subgroup of
three people. What comes out is what one hospital with everybody would give (but for what is by hospital in its definition).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm

import contracts
import plain_loop
from oracles.test_structure import variants
from sequester.protocols.study import Study

SIZES = [420, 260, 120]
ALL, V = sum(SIZES), 8
SITE = np.repeat(np.arange(3), SIZES)
PHENOTYPES: dict[str, dict[str, Any]] = {
    "binary": {"name": "case", "kind": "binary", "values": ["0", "1"]},
    "quantity": {"name": "height", "kind": "quantitative", "lower": "-10", "upper": "10", "centre": "0", "scale": "1"},
    "time": {"name": "years", "kind": "time", "unit": "years", "lower": "0", "upper": "12", "event": "died"},
}
NEWTON = {"kind": "glm", "solver": "newton", "rounds": 60, "features": "table"}
JUDGED: list[dict[str, Any]] = [{"kind": "evaluation", "name": "held_out", "of": "fit", "part": "all", "bins": 100}]
PLANS: dict[str, list[dict[str, Any]]] = {
    "binary": [
        {"kind": "counts", "name": "grid", "axes": [{"column": "case"}, {"column": "ancestry"}]},
        {"kind": "quality", "name": "quality", "frequencies": True, "minor_count": "1"},
        {"kind": "structure", "name": "components", "components": 2, "iterations": 40},
        {**NEWTON, "name": "fit"},
        {**NEWTON, "name": "firth", "firth": "if_separated", "rounds": 200},
        {"kind": "association", "name": "scan", "follow": 2, "follow_below": "0.05", "follow_rounds": 60},
        {"kind": "burden", "name": "genes", "genes": [{"name": "G", "variants": ["v0", "v1", "v2", "v3"]}]},
        {"kind": "heterogeneity", "name": "apart", "terms": ["c0", "v0"]},
        {"kind": "penalised", "name": "lasso", "l1": "1", "strength": "0.01", "rounds": 80},
        {"kind": "prs", "name": "one_shot", "prevalence": "0.3"},
        {"kind": "heads", "name": "heads", "of": "fit", "columns": "table", "part": "all"},
        *JUDGED,
        {"kind": "calibration", "name": "right", "of": "lasso", "part": "all"},
        {
            "kind": "reclassification",
            "name": "moved",
            "of": "lasso",
            "against": "fit",
            "thresholds": ["0.3"],
            "part": "all",
        },
    ],
    "quantity": [
        {"kind": "linear", "name": "fit", "features": "table"},
        {"kind": "linear", "name": "wide"},
        {**NEWTON, "name": "again", "family": "linear"},
        {"kind": "heads", "name": "heads", "of": "wide", "columns": "table", "part": "all"},
        {"kind": "association", "name": "scan"},
        {
            "kind": "penalised",
            "name": "ridge",
            "l1": "0",
            "strength": "0.1",
            "scheme": "conjugate_gradient",
            "rounds": 60,
        },
        *JUDGED,
    ],
    "time": [
        {"kind": "survival", "name": "curves", "model": "kaplan_meier", "bins": 48, "by_subgroup": True, "part": "all"},
        {
            "kind": "survival",
            "name": "fit",
            "model": "cox",
            "bins": 120,
            "features": "table",
            "part": "all",
            "rounds": 60,
        },
        {"kind": "survival", "name": "hazard", "model": "hazard", "features": "table", "part": "all", "rounds": 60},
        *JUDGED,
    ],
}
BY_HOSPITAL = {"apart"}  # the analyses that are about hospitals


class People:
    """Table, copies, liability and groups of everybody; a situation changes them before outcomes are drawn, or after."""

    def __init__(self) -> None:
        rng = np.random.default_rng(11)
        self.table = rng.standard_normal((ALL, 3))
        self.copies = rng.binomial(2, 0.3, (ALL, V)).astype(float)
        self.strata = rng.integers(0, 2, ALL)
        z = 0.6 * self.table[:, 0] + 0.5 * self.copies[:, 0] - 1.2
        self.case = (rng.random(ALL) < 1 / (1 + np.exp(-z))).astype(float)
        self.height = np.clip(z + rng.standard_normal(ALL), -10, 10)
        time, end = rng.exponential(8 * np.exp(-z - 0.6)), rng.uniform(2, 12, ALL)
        self.years, self.died = np.minimum(time, end), (time <= end).astype(float)


def separation(p: People) -> None:
    p.table[:, 1] = np.random.default_rng(1).random(ALL) < 0.08
    p.case[p.table[:, 1] == 1] = p.died[p.table[:, 1] == 1] = 0.0  # no carrier ever falls ill


def no_cases_at_a_hospital(p: People) -> None:
    p.case[SITE == 2] = p.died[SITE == 2] = 0.0


def a_constant_covariate(p: People) -> None:
    p.table[:, 1] = 0.7
    p.copies[:, 5] = 2.0


def collinear_covariates(p: People) -> None:
    p.table[:, 2] = 2 * p.table[:, 0] - p.table[:, 1]
    p.copies[:, 5] = 0.0
    p.copies[p.table[:, 1] > 0, 5] = 1.0
    p.table[:, 1] = np.where(p.copies[:, 5] > 0, 0.5, -0.5)  # a covariate that is a variant
    p.table[:, 2] = 2 * p.table[:, 0] - p.table[:, 1]


def a_hospital_without_one_variant(p: People) -> None:
    p.copies[SITE == 1, 0] = np.nan


def a_subgroup_of_three(p: People) -> None:
    p.strata[:3] = 2


SITUATIONS: dict[str, Callable[[People], None]] = {
    "separation": separation, "no cases at a hospital": no_cases_at_a_hospital, "constant": a_constant_covariate,
    "collinear": collinear_covariates, "a hospital without one variant": a_hospital_without_one_variant,
    "a subgroup of three": a_subgroup_of_three,
}  # fmt: skip


def study_of(kind: str) -> Study:
    return contracts.study(
        phenotype=PHENOTYPES[kind], variants=variants(V), n0=ALL, n_max=1000,
        cohort={"subgroup": "ancestry", "subgroup_values": ["AFR", "EUR"], "test_fraction": "0"},
        covariates=[
            {"name": f"c{j}", "kind": "quantitative", "lower": "-9", "upper": "9", "centre": "0", "scale": "1"}
            for j in range(3)
        ],
        analyses=[{"mode": "exact", **plan} for plan in PLANS[kind]],
        aggregation={"mode": "strict", "ring_bits": 64, "fraction_bits": 30},
    )  # fmt: skip


def results(kind: str, people: People, sizes: list[int]) -> dict[str, Any]:
    """What the study prints, through JSON: nothing that is not a number is let through."""
    study = study_of(kind)
    y = {"binary": people.case, "quantity": people.height, "time": people.years}[kind]
    whole = plain_loop.patients(
        study, y, table=people.table, dosage=people.copies, strata=people.strata, event=people.died
    )
    finished = plain_loop.run(study, plain_loop.split(whole, sizes))
    assert list(finished) == [plan.name for plan in study.analyses]
    found: dict[str, Any] = json.loads(
        json.dumps({name: done.result for name, done in finished.items()}, allow_nan=False)
    )
    return found


def figures(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves of a result by path."""
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in figures(inner, f"{path}.{name}").items()}
    if isinstance(value, list):
        return {k: v for i, inner in enumerate(value) for k, v in figures(inner, f"{path}.{i}").items()}
    return {path: value}


def awkward(situation: str) -> People:
    people = People()
    SITUATIONS[situation](people)
    return people


@pytest.mark.parametrize("kind", PHENOTYPES)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_every_analysis_ends_and_gives_what_one_hospital_with_everybody_would_give(situation: str, kind: str) -> None:
    people = awkward(situation)
    apart, together = (figures(results(kind, people, sizes)) for sizes in (SIZES, [ALL]))
    for path in apart.keys() | together.keys():
        name = path.split(".")[1]
        if name in BY_HOSPITAL or (name == "quality" and situation == "a hospital without one variant"):
            continue  # the share of calls is of those hospitals that carry a variant
        ours, theirs = apart[path], together[path]
        if isinstance(ours, float) or isinstance(theirs, float):
            # float64 sums in another order, through as many as 200 rounds
            assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-7), path
        else:
            assert ours == theirs, path


def test_a_separated_covariate_is_named_has_no_error_and_the_others_keep_theirs() -> None:
    people = awkward("separation")
    found = results("binary", people, SIZES)
    assert found["fit"]["separated"] == ["c1"] and not found["fit"]["converged"]
    assert [row.get("not_estimated") for row in found["fit"]["weights"]] == [None, "separated", None]
    # by Firth, where the plan allows it, it has an estimate; penalised models and scores stay finite without
    assert found["firth"]["firth"] and found["firth"]["converged"] and found["firth"]["weights"][1]["standardised"] < 0
    timed = results("time", people, SIZES)
    for name in ("fit", "hazard"):
        assert timed[name]["separated"] == ["c1"] and "se" in timed[name]["weights"][0]


def test_a_hospital_without_cases_counts_as_any_other_and_is_not_spoken_of() -> None:
    people = awkward("no cases at a hospital")
    found = results("binary", people, SIZES)
    oracle = sm.Logit(people.case, sm.add_constant(people.table)).fit(disp=0, tol=1e-14)
    weights = [row["standardised"] for row in found["fit"]["weights"]]
    np.testing.assert_allclose(weights, oracle.params[1:], rtol=1e-8)
    assert found["fit"]["n"] == ALL and found["scan"]["people"] == ALL
    # heterogeneity has its own consent: it says how many hospitals can estimate a term
    assert all(row["hospitals"] <= 2 for row in found["apart"]["terms"])
    names = {"site", "hospital", "alpha", "beta", "gamma"}
    assert not names & {
        part for path in figures({k: v for k, v in found.items() if k != "apart"}) for part in path.split(".")
    }


@pytest.mark.parametrize("kind", PHENOTYPES)
@pytest.mark.parametrize(("situation", "why"), [("constant", "constant"), ("collinear", "collinear")])
def test_a_column_without_anything_of_its_own_is_named_and_the_rest_is_the_fit_without_it(
    kind: str, situation: str, why: str
) -> None:
    people = awkward(situation)
    found = results(kind, people, SIZES)
    out = {"constant": 1, "collinear": 2}[situation]
    kept = [j for j in range(3) if j != out]
    for name in {"binary": ("fit",), "quantity": ("fit", "again"), "time": ("fit", "hazard")}[kind]:
        rows = found[name]["weights"]
        assert [row.get("not_estimated") for row in rows] == [why if j == out else None for j in range(3)]
        assert rows[out]["standardised"] == 0.0
    design = sm.add_constant(people.table[:, kept])
    if kind == "time":
        grid = np.ceil(people.years * 10)
        oracle = sm.PHReg(grid, design[:, 1:], status=people.died, ties="breslow").fit(
            disp=0, method="newton", tol=1e-14
        )
        np.testing.assert_allclose([found["fit"]["weights"][j]["standardised"] for j in kept], oracle.params, rtol=1e-7)
        return
    fit = (
        sm.Logit(people.case, design).fit(disp=0, tol=1e-14)
        if kind == "binary"
        else sm.OLS(people.height, design).fit()
    )
    np.testing.assert_allclose([found["fit"]["weights"][j]["standardised"] for j in kept], fit.params[1:], rtol=1e-7)
    # the same of a variant that nobody varies in, or that is a covariate
    expected = {"constant": "CONST_ALLELE", "collinear": "RANK_DEFICIENT"}[situation]
    assert found["scan"]["table"]["error"][5] == expected and found["scan"]["table"]["p"][5] == 1.0
    if kind == "quantity":
        assert found["wide"]["weights"][3 + 5]["not_estimated"] == why


def test_a_variant_that_a_hospital_lacks_is_its_mean_there_and_takes_no_part_in_its_call_rate() -> None:
    people = awkward("a hospital without one variant")
    found, height = results("binary", people, SIZES), results("quantity", people, SIZES)
    row = found["quality"]["frequencies"][0]
    assert (row["called"], row["missing"]) == (ALL - SIZES[1], 0) and "v0" in found["quality"]["passing"]
    assert found["scan"]["table"]["called"][0] == ALL - SIZES[1]
    mean = np.where(
        np.isnan(people.copies), np.nanmean(people.copies, axis=0), people.copies
    )  # of a scan: the pooled one
    ols = sm.OLS(people.height, sm.add_constant(np.column_stack([people.table, mean[:, 0]]))).fit()
    assert height["scan"]["table"]["statistic"][0] == pytest.approx(ols.tvalues[-1], rel=1e-8)
    public = np.where(np.isnan(people.copies), 0.6, people.copies)  # of a model: the public one
    ols = sm.OLS(people.height, sm.add_constant(np.column_stack([people.table, (public - 0.6) / 0.42**0.5]))).fit()
    weights = [row["standardised"] for row in height["wide"]["weights"]]
    np.testing.assert_allclose(weights, ols.params[1:], rtol=1e-8)
    z = ((public - 0.6) / 0.42**0.5).T @ (people.case - 0.3)
    np.testing.assert_allclose([row["score"] for row in found["one_shot"]["weights"]][3:], z, rtol=1e-8)


def test_three_people_of_a_subgroup_are_hidden_everywhere_and_another_group_with_them() -> None:
    people = awkward("a subgroup of three")
    binary, height, timed = (results(kind, people, SIZES) for kind in ("binary", "quantity", "time"))
    cells = {tuple(cell["levels"]): cell["people"] for cell in binary["grid"]["cells"]}
    assert cells["0", "other"] == cells["1", "other"] == "<10"
    assert sum(value == "<10" for value in cells.values()) > 2 or binary["grid"]["people"] == "<10"
    for found in (binary["held_out"], binary["right"], binary["moved"], height["held_out"], timed["held_out"]):
        hidden = [name for name, group in found["groups"].items() if "suppressed" in group]
        assert "other" in hidden and len(hidden) == 2  # with one alone, total minus the shown gives it away
    assert timed["curves"]["curves"]["other"] == {"suppressed": "<10"}
    assert "suppressed" in timed["curves"]["curves"]["EUR"] or "suppressed" in timed["curves"]["curves"]["AFR"]


@pytest.mark.parametrize("situation", SITUATIONS)
def test_private_analyses_stay_finite_and_leave_nothing_out_by_name(situation: str) -> None:
    # what separates or is constant is a fact about patients: a private model shrinks it and does not speak of it
    people = awkward(situation)
    of = {"of": "fit", "part": "all"}
    study = contracts.study(
        phenotype=PHENOTYPES["binary"], variants=variants(V), n0=ALL, n_max=1000, covariates=study_of("binary").model_dump()[
            "covariates"
        ],
        cohort={"subgroup": "ancestry", "subgroup_values": ["AFR", "EUR"], "test_fraction": "0"},
        analyses=[
            PLANS["binary"][0], {"kind": "quality", "name": "quality"}, {"kind": "glm", "name": "fit", "rounds": 8},
            {"kind": "prs", "name": "one_shot"}, {"kind": "heads", "name": "heads", **of},
            {"kind": "evaluation", "name": "held_out", **of},
            {"kind": "calibration", "name": "right", **of},
            {"kind": "reclassification", "name": "moved", **of, "against": "one_shot", "thresholds": ["0.3"]},
        ],
        aggregation={"mode": "strict"},
    )  # fmt: skip
    whole = plain_loop.patients(study, people.case, table=people.table, dosage=people.copies, strata=people.strata)
    finished = plain_loop.run(study, plain_loop.split(whole, SIZES), np.random.default_rng(3))
    found = json.loads(json.dumps({name: done.result for name, done in finished.items()}, allow_nan=False))
    text = json.dumps(found)
    assert not any(word in text for word in ("separated", "not_estimated", "constant", "collinear"))
    assert all(abs(row["standardised"]) < 15 for row in found["fit"]["weights"])
    for name in ("held_out", "right", "moved"):
        assert "suppressed" in found[name] or "suppressed" in found[name]["groups"]["other"]
