"""What every kind of analysis looks like in the report, and the files beside it: scans, curves, risks, cards."""

from __future__ import annotations

import gzip
import io
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pgscatalog.core.lib.models import CatalogScoreHeader
from scipy.stats import chi2

import pictured
import reported
from pages import Page, first_page, table_of
from sequester.protocols.study import Study
from sequester.server.report import plots, scans
from sequester.server.report.page import report_html
from sequester.server.report.results_folder import write

Ran = tuple[Study, dict[str, Any], bytes]


def ran(study: Study, people: int) -> Ran:
    results = pictured.run(study, people)
    return study, results, report_html(study, results, reported.receipt_bodies(study), reported.standing(study))


@pytest.fixture(scope="module")
def scan() -> Ran:
    return ran(pictured.scan_study(n=400), 3000)


@pytest.fixture(scope="module")
def curves() -> Ran:
    return ran(pictured.survival_study(exact=True), 4000)


@pytest.fixture(scope="module")
def risks() -> Ran:
    return ran(pictured.model_study(exact=True), 6000)


def test_pages_of_every_kind_stand_alone_are_well_formed_and_the_same_twice(scan: Ran, curves: Ran, risks: Ran) -> None:
    noisy = ran(pictured.survival_study(exact=False), 4000)
    for study, results, data in (scan, curves, risks, noisy):
        page = Page(data)
        assert page.faults == []
        ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
        assert len(ids) == len(set(ids)) > 0
        assert not {"script", "img", "image", "link"} & {tag for tag, _ in page.tags}
        again = report_html(study, deepcopy(results), reported.receipt_bodies(study), reported.standing(study))
        assert again == data


def test_a_scan_is_drawn_with_its_lambda_and_its_strongest_variant_first(scan: Ran) -> None:
    _, results, data = scan
    result, text = results["analyses"]["scan"]["result"], data.decode()
    p = np.array(result["table"]["p"])
    inflation = float(np.median(np.square(result["table"]["statistic"]))) / chi2.ppf(0.5, 1)
    assert f"{inflation:.3f}" in table_of(data, "Calibration of the tests") and f"Lambda {inflation:.3f}" in first_page(
        data
    )
    strongest = result["table"]["id"][int(p.argmin())]
    rows = re.findall(r'<th scope="row">(rs\d+)</th>', table_of(data, "The 20 smallest p values"))
    assert rows[0] == strongest == "rs1" and len(rows) == 20  # the one variant with an effect
    assert [result["table"]["id"][j] for j in np.argsort(p, kind="stable")[:20]] == rows
    assert f"{int((p < 5e-8).sum())} of 400 variants went with the outcome" in first_page(data)
    for picture in ("manhattan-scan", "quantiles-scan"):
        assert f'<title id="{picture}-title">' in text
    assert "GENE1" in table_of(data, "Genes") and "age" in table_of(data, "Heterogeneity between hospitals")


def test_a_scan_of_a_hundred_thousand_variants_stays_a_small_picture_with_every_strong_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(4)
    score = -np.log10(rng.uniform(size=100_000))
    score[[5, 50_000]] = 12.0, 45.0
    chromosome, position = np.repeat(np.arange(1, 21), 5000), np.tile(np.arange(5000) * 1000, 20)
    drawn: list[int] = []
    kept = plots._dots

    def counted(axes: Any, x: Any, y: Any, *rest: Any) -> None:
        before = len(axes.patches)
        kept(axes, x, y, *rest)
        drawn.append(len(axes.patches[before].get_path().vertices) // 2)
        assert set(np.flatnonzero(y > 8)) <= {5} and (y <= plots.MOST_SCORE).all()

    monkeypatch.setattr(plots, "_dots", counted)
    svg = plots.manhattan("many", chromosome, position, score)
    assert len(drawn) == 20 and 2_000 < sum(drawn) < 40_000 and len(svg) < 1_500_000
    assert svg == plots.manhattan("many", chromosome, position, score)


def test_the_table_of_a_scan_has_the_columns_of_plink2_and_the_numbers_of_the_results(
    scan: Ran, tmp_path: Path
) -> None:
    study, results, _ = scan
    write(tmp_path, **reported.held_by_coordinator(study, results))
    text = (tmp_path / "scan.case.glm.logistic.hybrid").read_text()
    assert text.startswith("##mode=exact")
    found = pd.read_csv(io.StringIO(text.split("\n", 1)[1]), sep="\t")
    assert list(found.columns) == [
        "#CHROM", "POS", "ID", "REF", "ALT", "A1", "A1_FREQ", "FIRTH?", "TEST", "OBS_CT", "OR", "LOG(OR)_SE", "Z_STAT", "P",
        "ERRCODE",
    ]  # fmt: skip
    of = results["analyses"]["scan"]["result"]["table"]
    assert found["ID"].tolist() == of["id"] and (found["ERRCODE"] == ".").all()
    np.testing.assert_allclose(found["P"], of["p"], rtol=1e-5)
    np.testing.assert_allclose(np.log(found["OR"]), of["effect"], atol=1e-5)
    genes = pd.read_csv(tmp_path / "genes.case.genes.tsv", sep="\t")
    assert genes["gene"].tolist() == [f"GENE{k + 1}" for k in range(12)] and genes["p"].between(0, 1).all()
    linear = pictured.scan_study(linear=True, n=60, chromosomes=1)
    files = scans.tables(linear, pictured.run(linear, 1500)["analyses"])
    assert b"\tBETA\tSE\tT_STAT\tP\t" in files["scan.dose.glm.linear"]


def test_curves_have_numbers_at_risk_and_a_group_that_is_withheld_has_neither(curves: Ran) -> None:
    study, results, data = curves
    of = results["analyses"]["curves"]["result"]["curves"]
    at_risk = table_of(data, "Numbers at risk after … years")
    for group, curve in of.items():
        point = [p for p in curve["points"] if p["time"] <= 2.0][-1]
        row = re.search(rf'<th scope="row">{group}</th>(.*?)</tr>', at_risk, flags=re.DOTALL)
        assert row is not None and f"<td>{round(point['at_risk']):,}</td>" in row[1]
        assert all(p["at_risk"] >= study.publication_floor for p in curve["points"])
    hidden = deepcopy(results)
    hidden["analyses"]["curves"]["result"]["curves"] |= {
        "AFR": {"suppressed": "<10"},
        "EUR": {"suppressed": "complement"},
    }
    page = report_html(study, hidden, reported.receipt_bodies(study), reported.standing(study))
    assert (
        "AFR" not in table_of(page, "Numbers at risk after … years") and "No curve of AFR: withheld" in Page(page).words
    )
    assert "C-index" in first_page(data) and "Equity gap in C-index" in first_page(data)


def test_at_risk_under_noise_is_close_to_what_it_is_without() -> None:
    study = pictured.survival_study(exact=False)
    noisy = pictured.run(study, 9000)["analyses"]["curves"]["result"]["curves"]["EUR"]["points"]
    exact = pictured.run(pictured.survival_study(exact=True), 9000)["analyses"]["curves"]["result"]["curves"]["EUR"][
        "points"
    ]
    at = {round(p["time"], 6): p["at_risk"] for p in exact}
    both = [(p["at_risk"], at[round(p["time"], 6)]) for p in noisy if round(p["time"], 6) in at]
    # the noisy grid is three times as wide: its patients at risk are those of the start of a wider interval
    assert len(both) >= 5 and all(a >= 0.95 * b for a, b in both) and "low" not in noisy[0]


def test_calibration_and_decision_curves_print_what_was_released(risks: Ran) -> None:
    _, results, data = risks
    right, gained = (results["analyses"][name]["result"] for name in ("right", "gained"))
    groups = table_of(data, "By group")
    slope = right["slope"]
    assert f"{slope['value']:.3g} ({slope['low']:.3g} to {slope['high']:.3g})" in groups and "AFR" in groups
    assert f"{100 * gained['net_reclassification']:+.1f}\u00a0%" in table_of(data, "genetic against clinical")
    assert f"{gained['net_benefit'][0]['new']:.4f}" in table_of(data, "Net benefit")
    tenths = results["analyses"]["held_out"]["result"]["deciles"]
    assert f"{100 * tenths[9]:.1f}\u00a0%" in table_of(data, "Cases by tenth of the score")
    assert "Equity gap in AUC" in first_page(data)


def test_each_model_has_a_card_with_its_groups_and_its_limits(risks: Ran, tmp_path: Path) -> None:
    study, results, _ = risks
    write(tmp_path, **reported.held_by_coordinator(study, results))
    assert {p.name for p in tmp_path.glob("model_card*")} == {"model_card_clinical.md", "model_card_genetic.md"}
    card = (tmp_path / "model_card_genetic.md").read_text("utf-8")
    groups = results["analyses"]["held_out"]["result"]["groups"]
    for name, group in groups.items():
        assert f"| {name} | {group['auc']['value']:.3f} (" in card
    assert "AFR 34 %, EUR 33 %" in card and "no promise of differential privacy" in card and "Not for:" in card
    assert "did not evaluate this model" in (tmp_path / "model_card_clinical.md").read_text("utf-8")


def test_words_of_a_study_are_text_in_a_card_and_its_licence_reaches_the_scoring_file(tmp_path: Path) -> None:
    study = reported.exact_study(
        licence="CC-BY-4.0", question="Is <script>alert(1)</script> [a](http://b) a *question*?"
    )
    write(tmp_path, **reported.held_by_coordinator(study, reported.run(study, n=1000)))
    card = (tmp_path / "model_card.md").read_text("utf-8")
    assert not re.search(r"(?<!\\)[<\[*]", card.split("## Intended use\n")[1].split("\n")[0])
    assert "CC-BY-4.0" in card and r"\<script\>alert" in card
    scored = next(tmp_path.glob("*_scoring_file.txt.gz"))
    lines = gzip.decompress(scored.read_bytes()).decode().splitlines()
    head = dict(line[1:].split("=", 1) for line in lines if re.match(r"#\w+=", line))
    accessions = {"pgs_id": "PGS000000", "pgp_id": "PGP000000"}  # given by the catalogue, to what stands in it
    known = {k: v for k, v in head.items() if k in CatalogScoreHeader.model_fields} | accessions
    assert CatalogScoreHeader(**known).license == "CC-BY-4.0"


def test_the_scoring_file_passes_the_catalogues_own_formatter(risks: Ran, tmp_path: Path) -> None:
    # pgscatalog-format checks every variant against the catalogue's data models, as pgsc_calc does first
    study, results, _ = risks
    write(tmp_path, **reported.held_by_coordinator(study, results))
    (tmp_path / "formatted").mkdir()
    tool = Path(sys.executable).parent / "pgscatalog-format"
    file = tmp_path / "risk_genetic_scoring_file.txt.gz"
    subprocess.run(
        [tool, "-s", file, "-t", "GRCh38", "-o", tmp_path / "formatted"], check=True, capture_output=True, timeout=120
    )
    found = pd.read_csv(tmp_path / "formatted" / f"normalised_{file.name}", sep="\t")
    weights = {row["name"]: row["per_unit"] for row in results["analyses"]["genetic"]["result"]["weights"]}
    assert found["chr_position"].tolist() == [v.position for v in study.variants]
    assert found["effect_allele"].tolist() == [v.effect for v in study.variants]
    np.testing.assert_allclose(found["effect_weight"], [weights[v.id] for v in study.variants], rtol=5e-4)
