"""The report: one file that stands alone, says the same thing twice the same way, and prints nothing that it must not."""

from __future__ import annotations

import re
from copy import deepcopy
from typing import Any

import pytest

import reported
from pages import Page, first_page, table_of
from sequester.protocols import privacy
from sequester.protocols.analyses.analysis import Finished
from sequester.protocols.errors import StudyError
from sequester.protocols.study import Study
from sequester.server.report.page import report_html


@pytest.fixture(scope="module")
def private() -> tuple[Study, dict[str, Any], bytes]:
    study = reported.private_study()
    results = reported.run(study)
    return study, results, report_html(study, results, reported.receipt_bodies(study), reported.standing(study))


@pytest.fixture(scope="module")
def exact() -> tuple[Study, dict[str, Any], bytes]:
    study = reported.exact_study()
    results = reported.run(study)
    return study, results, report_html(study, results, reported.receipt_bodies(study), reported.standing(study))


def test_the_page_is_well_formed_and_every_id_is_used_once(private: Any, exact: Any) -> None:
    for _, _, data in (private, exact):
        page = Page(data)
        assert page.faults == []
        ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
        assert len(ids) == len(set(ids)) > 0


def test_two_evaluations_of_one_study_share_no_id_and_the_first_is_the_headline() -> None:
    study = reported.private_study(
        analyses=[
            {"kind": "glm", "name": "score", "rounds": 10, "budget": "0.8", "prevalence": "0.2"},
            {"kind": "evaluation", "name": "held_out", "of": "score", "budget": "0.15"},
            {"kind": "evaluation", "name": "training", "of": "score", "part": "train", "budget": "0.05"},
        ]
    )
    results = reported.run(study)
    page = Page(data := report_html(study, results, reported.receipt_bodies(study), reported.standing(study)))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) and page.faults == []
    assert {"roc-held_out-title", "roc-training-title"} <= set(ids)
    assert f"{results['analyses']['held_out']['result']['auc']['value']:.3f}" in first_page(data)
    assert "the patients that trained the model" in page.words


def test_the_page_fetches_nothing_and_runs_nothing(private: Any, exact: Any) -> None:
    for _, _, data in (private, exact):
        page = Page(data)
        assert not {"script", "link", "iframe", "object", "img", "form", "a", "base"} & {tag for tag, _ in page.tags}
        for _, attributes in page.tags:
            for name, value in attributes.items():
                assert not name.startswith("on")
                assert name not in ("src", "srcset", "action") and "://" not in value
                assert not name.endswith("href") or value.startswith("#")
        text = data.decode()
        assert "@import" not in text and re.search(r"url\((?!#)", text) is None


def test_the_same_input_gives_the_same_bytes(private: Any) -> None:
    study, results, data = private
    assert report_html(study, deepcopy(results), reported.receipt_bodies(study), reported.standing(study)) == data


def test_the_first_page_says_what_was_asked_what_was_found_and_what_it_cost(private: Any) -> None:
    study, results, data = private
    first = first_page(data)
    auc, promise = results["analyses"]["held_out"]["result"]["auc"], privacy.promise(study)
    assert promise is not None
    assert study.question in first
    assert f"{auc['value']:.3f}" in first and f"{auc['low']:.3f} to {auc['high']:.3f}" in first
    assert f"epsilon {promise.pld:.2f}" in first and "0.000001001" in first and "add-remove" in first
    assert f"{promise.two_copies:.2f}" in first and f"{promise.all_others_collude:.2f}" in first
    assert "one patient's whole record" in first.replace("&#39;", "'") and "Not for diagnosis" in first


def test_the_equity_gap_is_the_largest_difference_between_groups_that_are_shown(private: Any) -> None:
    _, results, data = private
    groups = results["analyses"]["held_out"]["result"]["groups"]
    shown = [group["auc"]["value"] for group in groups.values() if "auc" in group]
    assert len(shown) >= 2
    assert f"Equity gap in AUC {max(shown) - min(shown):.3f}" in first_page(data)
    by = first_page(data).split("AUC by ancestry: ")[1].split("For the private")[0]
    assert re.findall(r"(?:^|; )(\w+) (0\.\d{3})", by) == [
        (name, f"{group['auc']['value']:.3f}") for name, group in groups.items() if "auc" in group
    ]


def test_a_withheld_group_is_named_and_none_of_its_figures_is_printed(private: Any) -> None:
    study, results, data = private
    groups = results["analyses"]["held_out"]["result"]["groups"]
    hidden = [name for name, group in groups.items() if "suppressed" in group]
    assert len(hidden) >= 2  # one alone could be solved for
    assert f"No figures for {' and '.join(hidden)}" in first_page(data)
    for name in hidden:
        row = re.search(rf'<th scope="row">{name}</th><td[^>]*>(.*?)</td>', data.decode())
        assert row is not None and row[1].startswith("withheld") and not re.search(r"0\.\d", row[1])
    # a result that carries figures beside its suppression is not printed either
    careless = deepcopy(results)
    careless["analyses"]["held_out"]["result"] = {
        "suppressed": "<10",
        "auc": {"value": 0.77123},
        "roc": [[0, 0], [1, 1]],
    }
    page = report_html(study, careless, reported.receipt_bodies(study), reported.standing(study)).decode()
    assert "0.771" not in page and "&lt;10" in page


def test_a_band_of_fewer_patients_than_the_floor_prints_the_floor_only(private: Any) -> None:
    study, results, _ = private
    few = deepcopy(results)
    roc = [[1 - (i / 20), 1 - (i / 20)] for i in range(20, -1, -1)]
    roc[1] = [roc[0][0] + 0.0001, roc[0][1] + 0.0001]  # the top bin holds .01 % of each
    roc[2] = [0.0003, 0.0003]
    few["analyses"]["held_out"]["result"]["roc"] = roc
    page = report_html(study, few, reported.receipt_bodies(study), reported.standing(study)).decode()
    bands = table_of(page.encode(), "Score by outcome")
    row = re.search(r'<th scope="row">10</th><td[^>]*>(.*?)</td><td[^>]*>(.*?)</td>', bands)
    assert row is not None and row[1] == row[2] == "&lt;10 patients"


def test_exact_analyses_stand_on_the_first_page_by_name_and_no_life_epsilon_is_stated(exact: Any) -> None:
    study, _, data = exact
    first = first_page(data)
    assert "Exact analyses" in first and "score, held_out" in first and "not protected by differential privacy" in first
    assert "No epsilon for the life of these data" in first
    assert "no epsilon for life can be stated" in Page(data).words
    assert "a dishonest exchange can read single patients" in first and "computational" not in Page(data).words
    assert privacy.promise(study) is None and "ε spent" in data.decode()


def test_weights_have_intervals_in_exact_mode_only(private: Any, exact: Any) -> None:
    assert "95\u00a0% interval" in table_of(exact[2], "Weights")
    assert "interval" not in table_of(private[2], "Weights")
    rows = exact[1]["analyses"]["score"]["result"]["weights"]
    largest = max(rows, key=lambda row: abs(row["standardised"]))
    low = largest["standardised"] - 1.959964 * largest["se"]
    assert f"{low:.3g} to".replace("-", "−") in table_of(exact[2], "Weights")
    # a standard error under noise is not honest before its coverage is verified: it is not believed
    study, results, _ = private
    noisy = deepcopy(results)
    for row in noisy["analyses"]["score"]["result"]["weights"]:
        row["se"] = 0.0123456
    page = report_html(study, noisy, reported.receipt_bodies(study), reported.standing(study))
    assert "interval" not in table_of(page, "Weights")


def test_every_hospital_has_its_receipt_and_a_missing_one_is_said(private: Any) -> None:
    study, results, data = private
    bodies = reported.receipt_bodies(study)
    page = data.decode()
    for site, body in bodies.items():
        assert f'<th scope="row">{site}</th>' in table_of(data, "Charges by hospital")
        assert body["ledger"]["head"] in page and str(body["ledger"]["counter"]) in table_of(
            data, "Charges by hospital"
        )
    del bodies["lake"]
    page_without = report_html(study, results, bodies, reported.standing(study))
    assert "Receipts missing" in first_page(page_without) and "lake" in first_page(page_without)
    assert "no receipt" in table_of(page_without, "Charges by hospital")


def test_a_hospital_without_isolation_is_named_on_the_first_page(private: Any) -> None:
    study, results, data = private
    bodies = reported.receipt_bodies(study)
    bodies["north"] |= {"allow_unisolated": True, "isolation": "compute shares this host's network"}
    page = report_html(study, results, bodies, reported.standing(study))
    assert "allow_unisolated" in first_page(page) and "north" in first_page(page)
    assert "allow_unisolated" not in data.decode()
    assert "Compute shares this host's network." in Page(page).words


def test_words_of_a_hospital_or_a_study_are_text_never_markup() -> None:
    study = reported.private_study(question="Is <script>alert(1)</script> & more a question?")
    bodies = reported.receipt_bodies(study, isolation='<img src="x" onerror="y">')
    results = reported.run(study, n=2000)
    page = Page(report_html(study, results, bodies, reported.standing(study)))
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert "<script>alert(1)</script> & more" in page.words


def test_no_hospital_is_spoken_of_but_for_bytes_charges_its_ledger_and_its_verdict(private: Any) -> None:
    study, _, data = private
    tables = (
        "Charges by hospital",
        "Bytes that left each hospital",
        "Release gate: each hospital&#39;s own installation, tried",
    )
    allowed = "".join(table_of(data, caption) for caption in tables)
    text = data.decode()
    for site in study.site_ids:
        receipt = re.search(rf'<div class="receipt"><strong>{site}</strong>.*?</div>', text, flags=re.DOTALL)
        assert receipt is not None
        assert len(re.findall(rf"\b{site}\b", text)) == len(re.findall(rf"\b{site}\b", allowed)) + 1


def test_a_quantitative_outcome_is_judged_in_its_own_unit() -> None:
    study = reported.private_study(
        phenotype={"name": "dose", "kind": "quantitative", "unit": "mg/week", "lower": "1", "upper": "400",
                   "transform": "sqrt", "centre": "5.5", "scale": "3"},
        analyses=[
            {"kind": "glm", "name": "dose_model", "family": "linear", "rounds": 10, "budget": "0.9"},
            {"kind": "evaluation", "name": "held_out", "of": "dose_model", "error_bound": "50", "budget": "0.1"},
        ],
        cohort={"test_fraction": "0.2"},
    )  # fmt: skip
    results = reported.run(study, n=3000)
    page = report_html(study, results, reported.receipt_bodies(study), reported.standing(study))
    error = results["analyses"]["held_out"]["result"]["mean_absolute_error"]
    assert f"{error:.3g} mg/week" in first_page(page) and "Mean absolute error" in first_page(page)
    assert Page(page).faults == []


def _with(study: Study, results: dict[str, Any], name: str, result: dict[str, Any]) -> bytes:
    changed = deepcopy(results)
    changed["analyses"][name]["result"] = result
    return report_html(study, changed, reported.receipt_bodies(study), reported.standing(study))


def test_a_grid_of_counts_is_printed_with_its_floor_and_its_noise() -> None:
    study = reported.private_study(
        analyses=[
            {"kind": "counts", "name": "grid", "axes": [{"column": "case"}, {"column": "ancestry"}], "budget": "1"}
        ]
    )
    promise = reported.results(study, {"grid": Finished({}, {})})
    cells = [{"levels": ["0", "AFR"], "people": 1234}, {"levels": ["1", "AFR"], "people": "<10"}]
    axes = [{"column": "case", "levels": ["0", "1"]}, {"column": "ancestry", "levels": ["AFR"]}]
    page = _with(
        study, promise, "grid", {"axes": axes, "cells": cells, "margins": [], "people": "<10", "noise_sd": 3.21}
    )
    table = table_of(page, "People in each cell")
    assert "1,234" in table and "&lt;10" in table and "ancestry" in table
    assert "standard deviation 3.21" in Page(page).words
    assert "evaluated no model" in first_page(page)


def test_a_weight_that_was_not_estimated_says_why_and_has_no_interval(exact: Any) -> None:
    study, results, _ = exact
    changed = deepcopy(results["analyses"]["score"]["result"])
    row = changed["weights"][0]
    for key in ("se", "per_unit_se", "statistic", "p", "low", "high"):
        row.pop(key)
    row["not_estimated"] = "constant"
    page = _with(study, results, "score", changed)
    cells = re.search(rf'<th scope="row">{row["name"]}</th>(.*?)</tr>', table_of(page, "Weights"))
    assert cells is not None and "not estimated: constant" in cells[1] and " to " not in cells[1]


def test_counts_of_an_exact_fit_below_the_floor_are_withheld_and_cannot_be_subtracted(exact: Any) -> None:
    study, results, _ = exact
    found = deepcopy(results["analyses"]["score"]["result"])
    few = _with(study, results, "score", found | {"n": 5555, "cases": 7})
    assert "5,555" in table_of(few, "Further measures") and "&lt;10" in table_of(few, "Further measures")
    few = _with(study, results, "score", found | {"n": 5555, "cases": 5550})
    assert not re.search("5,?55", table_of(few, "Further measures"))


def test_results_of_another_study_are_refused(private: Any) -> None:
    study, results, _ = private
    with pytest.raises(StudyError, match="these results are of study"):
        report_html(study, results | {"study": "0" * 64}, {}, reported.standing(study))


@pytest.mark.parametrize(
    ("phenotype", "measure", "title"),
    [
        (
            {"kind": "time", "unit": "years", "lower": "0", "upper": "12", "event": "died"},
            "c_index",
            "C index by ancestry",
        ),
        (
            {"kind": "quantitative", "lower": "0", "upper": "9"},
            "mean_absolute_error",
            "Mean absolute error by ancestry",
        ),
    ],
)
def test_groups_of_a_time_or_a_quantity_have_their_own_measure(
    phenotype: dict[str, Any], measure: str, title: str
) -> None:
    of_a_time = phenotype["kind"] == "time"
    model = (
        {"kind": "survival", "model": "cox"} if of_a_time else {"kind": "glm", "family": "linear", "solver": "newton"}
    )
    study = reported.exact_study(
        phenotype={"name": "outcome", **phenotype},
        analyses=[
            {"name": "fit", "mode": "exact", **model},
            {"kind": "evaluation", "name": "held_out", "of": "fit", "mode": "exact"},
        ],
    )
    groups = {"AFR": {measure: 0.6125}, "EUR": {"suppressed": "<10"}, "other": {"suppressed": "complement"}}
    result = {measure: 0.7, "root_mean_squared_error": 0.9, "groups": groups}
    blank = reported.results(study, {"fit": Finished({}, {}), "held_out": Finished(result, {})})
    page = _with(study, blank, "held_out", result)
    table = table_of(page, title)
    assert "0.613" in table and "withheld: &lt;10" in table and Page(page).faults == []


def test_every_kind_of_analysis_has_words_and_a_place_on_the_page() -> None:
    # a result this page knows nothing of is printed by its single figures, never left out and never a crash
    study = reported.private_study(
        analyses=[{"kind": "survival", "name": "time_model", "mode": "exact", "model": "cox"}],
        phenotype={"name": "months", "kind": "time", "unit": "months", "lower": "0", "upper": "120", "event": "death"},
        aggregation={"mode": "strict", "ring_bits": 64, "fraction_bits": 28},
    )
    rows = [
        {"name": f.name, "kind": f.kind, "standardised": 0.2, "per_unit": 0.5, "se": 0.1, "p": 0.0455, "low": 0.004,
         "high": 0.396}
        for f in study.features()
    ]  # fmt: skip
    result = {"weights": rows, "intercept": 0.0, "intercept_raw": 0.0, "concordance": 0.7123}
    page = _with(study, reported.results(study, {"time_model": Finished({}, {})}), "time_model", result)
    assert "Hazard ratio per unit" in table_of(page, "Weights") and "1.65" in table_of(page, "Weights")
    assert "0.7123" in page.decode() and Page(page).faults == []
    page = _with(
        study, reported.results(study, {"time_model": Finished({}, {})}), "time_model", {"steps": [1], "x": 2.5}
    )
    assert "In full in results.json: steps" in Page(page).words and "2.5" in page.decode()
