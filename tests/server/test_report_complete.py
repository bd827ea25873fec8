"""Every figure of results.json stands on the page, or is in the list of those that are left out, with its reason."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import contracts
import pictured
import plain_loop
import reported
from oracles.test_templates import made_up
from pages import Page, table_of
from sequester.protocols.analyses.registry import ANALYSES
from sequester.protocols.study import Study
from sequester.server.report import scans
from sequester.server.report.page import report_html
from sequester.server.report.pieces import digits, p_value, percent
from sequester.server.report.results_folder import scoring_files, write
from sequester.server.report.scoring_file import scoring_file

DOSE = {"name": "dose", "kind": "quantitative", "unit": "mg", "lower": "1", "upper": "100"}
COUNT = {"name": "visits", "kind": "quantitative", "lower": "0", "upper": "20", "centre": "0", "scale": "1"}
GRID = {"axes": [{"column": "case"}, {"column": "sex"}, {"column": "ancestry"}]}
# Where a figure is when it is not on the page; a group's or a row's name is `*`.
LEFT_OUT = {
    "association.table.*": "one row a variant: the strongest are on the page, all in the table beside it",
    "association.saddlepoint.*": "the p of its row in the table",
    "burden.genes.*.skat_q": "has no unit; its p is on the page",
    "burden.genes.*.rho": "in the gene table beside the page",
    "evaluation.groups.*": "AUC, C-index or error on the page; every measure of a group in the model card",
    "evaluation.roc": "drawn; five of its points in a table",
    "calibration.groups.*.bins": "drawn for everybody; a group's slope and ratio are on the page",
    "calibration.groups.*.expected_calibration_error": "the same",
    "calibration.*.se": "its interval is on the page",
    "calibration.*.statistic": "its interval is on the page",
    "calibration.*.p": "its interval is on the page",
    "calibration.groups.*.slope": "its interval is on the page",
    "calibration.groups.*.intercept": "its interval is on the page",
    "reclassification.groups.*.net_benefit": "drawn for everybody",
    "survival.curves.*.points": "drawn; survival and numbers at risk at some of the times in tables",
    "survival.intercept_raw": "a Cox model has none; of a hazard model it is on the page",
    "survival.weights.*.se": "its interval is on the page",
    "heterogeneity.terms.*.df": "hospitals less one",
    "heads.groups.*.intercept_raw": "the standardised one is on the page",
    "heads.groups.*.intercept_moved": "its intercept and the pooled one are on the page",
    "heads.groups.*.weights.*.per_unit": "in its scoring file, and standardised on the page",
    "heads.groups.*.weights.*.moved": "its weight and the pooled one are on the page",
    "*.weights.*.se": "its interval is on the page",
    "*.weights.*.per_unit_se": "its interval is on the page, standardised",
    "quality.frequencies.*": "one row a variant",
    "structure.loadings.*": "one row a variant",
    "training.network.*": "weights of a network say nothing one by one",
}


def genes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"name": f"GENE{k + 1}", "variants": [v["id"] for v in rows[4 * k : 4 * k + 4]]} for k in range(3)]


def exact(phenotype: dict[str, Any] | None, *analyses: dict[str, Any], **more: Any) -> Study:
    fields = {"covariates": pictured.COVARIATES, "variants": pictured.variants(12), "aggregation": pictured.EXACT}
    fields |= {"cohort": {"test_fraction": "0.3", **pictured.GROUPS}, **more}
    fields |= {} if phenotype is None else {"phenotype": phenotype}
    return contracts.study(**fields, analyses=[{"mode": "exact", **plan} for plan in analyses])


def studies() -> dict[str, Study]:
    folds = {
        "kind": "penalised",
        "name": "penal",
        "scheme": "folds",
        "l1": "1",
        "grid": ["0.1", "0.03", "0.01", "0.003"],
    }
    tested = {"kind": "burden", "name": "genes", "genes": genes(pictured.variants(12))}
    spent = {"budget": "0.5"}
    return {
        "scan": pictured.scan_study(n=60, chromosomes=2),
        "linear scan": exact(DOSE, {"kind": "association", "name": "scan"}, tested),
        "models": pictured.model_study(exact=True),
        "private models": pictured.model_study(exact=False),
        "heads": pictured.heads_study(exact=True),
        "private heads": pictured.heads_study(exact=False),
        "time": pictured.survival_study(exact=True),
        "private time": pictured.survival_study(exact=False),
        "quantity": exact(
            DOSE, {"kind": "linear", "name": "fit"}, folds,
            {"kind": "evaluation", "name": "held_out", "of": "penal", "error_bound": "100", "bands": ["20", "60"]},
        ),
        "counts of visits": exact(COUNT, {"kind": "glm", "name": "rates", "family": "poisson", "solver": "newton"}),
        "look": exact(
            None, {"kind": "quality", "name": "good", "frequencies": True}, {"kind": "structure", "name": "pcs", "components": 3},
            {"kind": "counts", "name": "grid", **GRID}, {"kind": "penalised", "name": "ridge", "l1": "0", "strength": "0.05"},
        ),
        "one round": contracts.study(
            covariates=pictured.COVARIATES, variants=pictured.variants(12),
            analyses=[{"kind": "prs", "name": "sums", **spent},
                      {"kind": "training", "name": "shot", "recipe": "one-shot", "rounds": 1, "gradients": "closed", **spent}],
        ),
    }  # fmt: skip


@cache
def pictures() -> dict[str, tuple[Study, dict[str, Any], bytes]]:
    found = {}
    for name, study in studies().items():
        people = made_up(study, 6000, 1)
        if name == "counts of visits":
            people = plain_loop.patients(
                study, np.random.default_rng(2).poisson(2.0, 6000).astype(float), table=people.table,
                dosage=people.dosage, strata=people.strata, seed=1, test=0.3,
            )  # fmt: skip
        cohorts = plain_loop.split(people, [3000, 2000, 1000])
        results = reported.results(study, plain_loop.run(study, cohorts, np.random.default_rng(3)))
        page = report_html(study, results, reported.receipt_bodies(study), reported.standing(study))
        found[name] = study, results, page
    return found


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, float]]:
    """(path, figure) of all numbers below a result; a row, a group or a name is `*`."""
    if isinstance(value, dict):
        inner = path and path[-1] in ("groups", "curves", "table", "saddlepoint", "loadings", "network")
        for key, of in value.items():
            yield from leaves(of, (*path, "*" if inner else key))
    elif isinstance(value, list):
        for of in value:
            yield from leaves(of, (*path, "*") if isinstance(of, dict) else path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield ".".join(path), float(value)


def written(value: float) -> set[str]:
    """How a page may write a figure, with three digits at least where it has them."""
    forms = {digits(value, n) for n in (3, 4, 5)} | {f"{value:.{n}f}" for n in (3, 4)} | {f"{value:,.0f}"}
    forms |= {percent(value, n) for n in (1, 2)} | {f"{100 * value:+.1f}\u00a0%"}
    forms |= {digits(int(value))} if value == int(value) else set()
    forms |= {p_value(value)} if 0 <= value <= 1 else set()
    return {form.replace("-", "−") for form in forms}


def is_left_out(kind: str, path: str) -> bool:
    whole = f"{kind}.{path}"
    for pattern in LEFT_OUT:
        start = re.escape(pattern).replace(r"\*", r"[^.]+")
        if re.fullmatch(rf"{start}(\..*)?", whole):
            return True
    return False


@pytest.mark.parametrize("name", list(studies()))
def test_every_figure_of_the_results_stands_on_the_page_or_is_left_out_by_name(name: str) -> None:
    study, results, data = pictures()[name]
    words = " ".join(Page(data).words.split()) + html.unescape(
        " ".join(re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", data.decode()))
    )
    cells = set(re.split(r"[\s();|]+", words.replace("\u00a0%", "_%").replace(",", "")))
    missing = []
    for plan in study.analyses:
        by_path: dict[str, list[float]] = {}
        for path, value in leaves(results["analyses"][plan.name]["result"]):
            by_path.setdefault(path, []).append(value)
        for path, values in by_path.items():
            telling = [v for v in values if v != 0 and math.isfinite(v)]
            forms = {f.replace("\u00a0%", "_%").replace(",", "").rstrip(".") for v in telling for f in written(v)}
            if telling and not forms & {c.rstrip(".") for c in cells} and not is_left_out(plan.kind, path):
                missing.append(f"{plan.kind}.{path} {telling[0]}")
    assert not missing, "\n".join(missing)


def test_the_studies_here_have_every_kind_of_analysis() -> None:
    assert {plan.kind for study in studies().values() for plan in study.analyses} == set(ANALYSES)


def test_the_strength_that_was_chosen_by_folds_is_marked_in_its_grid() -> None:
    _, results, data = pictures()["quantity"]
    of = results["analyses"]["penal"]["result"]
    table = table_of(data, "Strength of the penalty")
    rows = re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td><td class="words">(.*?)</td>', table)
    assert [row[0] for row in rows] == [digits(row["strength"]) for row in of["grid"]]
    best = min(of["grid"], key=lambda row: row["mean_squared_error"])
    assert [row[0] for row in rows if row[2] == "chosen"] == [digits(best["strength"])] == [digits(of["strength"])]
    assert "The chosen strength is the end of the grid" in data.decode()  # 0.003 is the weakest that was declared
    assert '<title id="strengths-penal-title">' in data.decode()
    assert "Lasso in one round, strength chosen from 4 declared ones by cross-validation in 5 folds" in Page(data).words


def test_a_poisson_model_has_rate_ratios_and_an_odds_ratio_stands_beside_every_model_of_a_case() -> None:
    _, results, data = pictures()["counts of visits"]
    table = table_of(data, "Weights")
    assert "Rate ratio per unit" in table and "Poisson regression by Newton" in Page(data).words
    row = max(results["analyses"]["rates"]["result"]["weights"], key=lambda row: abs(row["standardised"]))
    assert f"<td>{math.exp(row['per_unit']):.2f}</td>" in table and f"<td>{digits(row['statistic'], 3)}</td>" in table
    assert "Odds ratio per unit" in table_of(pictures()["one round"][2], "Weights")
    assert "Sum before shrinkage" in table_of(pictures()["one round"][2], "Weights")
    assert "ratio" not in table_of(pictures()["quantity"][2], "Weights")


def test_genes_that_were_not_tested_are_counted_by_reason_and_a_scan_without_a_fit_is_no_crash() -> None:
    study, results, _ = pictures()["scan"]
    changed = deepcopy(results)
    rows = changed["analyses"]["genes"]["result"]["genes"]
    for k, why in ((0, "too few carriers"), (3, "too few carriers"), (5, "no variance beside the covariates")):
        rows[k] = {"gene": rows[k]["gene"], "variants": 4, "carriers": "<10", "not_tested": why}
    page = report_html(study, changed, reported.receipt_bodies(study), reported.standing(study))
    table = table_of(page, "Genes not tested")
    assert re.findall(r">([^<>]+)</th><td>(\d+)</td>", table) == [
        ("Too few carriers", "2"), ("No variance beside the covariates", "1")
    ]  # fmt: skip
    assert f"{len(rows) - 3} of {len(rows)} genes tested" in page.decode()
    assert "p combines burden and SKAT by SKAT-O." in Page(page).words
    for row in rows:
        row.pop("rho", None)
    del changed["analyses"]["genes"]["result"]["combined"]  # as results were before
    page = report_html(study, changed, reported.receipt_bodies(study), reported.standing(study))
    assert "p combines burden and SKAT by the Cauchy rule." in Page(page).words
    changed["analyses"]["genes"]["result"] = {"people": 6000, "not_fitted": "one outcome only"}
    page = report_html(study, changed, reported.receipt_bodies(study), reported.standing(study))
    assert "Not fitted: one outcome only" in Page(page).words
    assert "genes.case.genes.tsv" not in scans.tables(study, changed["analyses"])


def test_a_model_that_was_not_fitted_shows_no_weights_and_leaves_no_scoring_file() -> None:
    study, results, _ = pictures()["models"]
    changed = deepcopy(results)
    changed["analyses"]["genetic"]["result"] |= {"not_fitted": "one outcome only", "converged": False}
    page = report_html(study, changed, reported.receipt_bodies(study), reported.standing(study))
    assert "Not fitted: one outcome only" in Page(page).words and "forest-genetic" not in page.decode()
    digest = changed["study"]
    # clinical has columns alone, genetic is not fitted
    assert len(scoring_files(study, digest, results)) == 1 and scoring_files(study, digest, changed) == {}


def test_the_page_names_the_files_beside_it_and_joint_weights_that_were_made_later(tmp_path: Path) -> None:
    study, results, _ = pictures()["scan"]
    held = reported.held_by_coordinator(study, results)
    write(tmp_path, **held)
    before = (tmp_path / "report.html").read_bytes()
    assert "scan.case.glm.logistic.hybrid" in Page(before).words and "receipts/" in Page(before).words
    digest, weights = results["study"], {v.id: 0.1 for v in study.variants}
    made = scoring_file(study, digest, weights, "none", ["#method=lassosum (Mak et al. 2017); of=scan"])
    other = scoring_file(study, "0" * 64, weights, "none", ["#method=lassosum; of=elsewhere"])
    assert made is not None and other is not None
    (tmp_path / "joint.txt.gz").write_bytes(made)
    (tmp_path / "foreign.txt.gz").write_bytes(other)
    (tmp_path / "broken.txt.gz").write_bytes(b"no gzip")
    write(tmp_path, **held, overwrite=True)
    words = Page((tmp_path / "report.html").read_bytes()).words
    assert "joint.txt.gzJoint weights by lassosum (Mak et al. 2017); of=scan" in words
    assert "foreign" not in words and "broken" not in words
