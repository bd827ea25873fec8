"""Heads by ancestry in the report and beside it: one row and one scoring file a group, the pooled model next to them."""

from __future__ import annotations

import gzip
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

import pictured
import reported
from pages import Page, table_of
from sequester.protocols.study import Study
from sequester.server.report.page import report_html
from sequester.server.report.results_folder import write

Ran = tuple[Study, dict[str, Any], bytes]


def ran(exact: bool) -> Ran:
    study = pictured.heads_study(exact)
    results = pictured.run(study, 9000)
    return study, results, report_html(study, results, reported.receipt_bodies(study), reported.standing(study))


@pytest.fixture(scope="module")
def exact() -> Ran:
    return ran(True)


@pytest.fixture(scope="module")
def private() -> Ran:
    return ran(False)


def test_the_page_has_a_row_for_each_head_and_the_pooled_model_first(exact: Ran, private: Ran) -> None:
    for study, results, data in (exact, private):
        page = Page(data)
        assert page.faults == []
        text, cells = data.decode(), table_of(data, "Heads")
        groups = results["analyses"]["heads"]["result"]["groups"]
        assert set(groups) == ({"AFR", "EUR"} if study is exact[0] else {"AFR", "EUR", "other"})
        assert "other: judged by the pooled model" in text
        for row in groups.values():
            assert f"{row['pooled_times']:.3g}" in cells and f"{100 * row['data_weight']:.0f}\u00a0%" in cells
        assert "95\u00a0%" not in cells and "Heads by ancestry: heads" in text
        assert "held near the pooled model (prior standard deviation 0.1)" in text  # among the reporting items too
        again = report_html(study, deepcopy(results), reported.receipt_bodies(study), reported.standing(study))
        assert again == data


def test_the_auc_of_the_pooled_model_and_of_the_heads_stand_side_by_side_by_group(exact: Ran) -> None:
    _, results, data = exact
    cells = table_of(data, "AUC of the pooled model and of the heads")
    before, after = (results["analyses"][name]["result"] for name in ("before", "after"))
    for old, new in ((before, after), *((before["groups"][g], after["groups"][g]) for g in ("AFR", "EUR", "other"))):
        assert f"{old['auc']['value']:.3f}" in cells and f"{new['auc']['value']:.3f}" in cells
    assert before["groups"]["AFR"]["auc"]["value"] != after["groups"]["AFR"]["auc"]["value"]
    # they keep the pooled model, in bins of another width
    assert before["groups"]["other"]["auc"]["value"] == pytest.approx(
        after["groups"]["other"]["auc"]["value"], abs=2e-3
    )


def test_a_group_without_a_head_has_no_row_of_figures_and_no_file(exact: Ran, tmp_path: Path) -> None:
    study, results, _ = exact
    fewer = deepcopy(results)
    fewer["analyses"]["heads"]["result"]["groups"]["AFR"] = {"suppressed": "<10"}
    data = report_html(study, fewer, reported.receipt_bodies(study), reported.standing(study))
    assert "AFR and other: judged by the pooled model" in data.decode()
    assert "withheld: &lt;10" in table_of(data, "Heads") or "withheld: <10" in table_of(data, "Heads")
    write(tmp_path, **reported.held_by_coordinator(study, fewer))
    assert {p.name for p in tmp_path.glob("*_scoring_file.txt.gz")} == {
        "risk_genetic_scoring_file.txt.gz", "risk_heads_EUR_scoring_file.txt.gz",
    }  # fmt: skip


def test_each_head_has_a_scoring_file_that_the_catalogue_reads_and_that_names_its_group(
    exact: Ran, tmp_path: Path
) -> None:
    study, results, _ = exact
    write(tmp_path, **reported.held_by_coordinator(study, results))
    (tmp_path / "formatted").mkdir()
    pooled = {row["name"]: row for row in results["analyses"]["genetic"]["result"]["weights"]}
    published = dict(study.scores[0].weights)
    for group, row in results["analyses"]["heads"]["result"]["groups"].items():
        file = tmp_path / f"risk_heads_{group}_scoring_file.txt.gz"
        lines = gzip.decompress(file.read_bytes()).decode().splitlines()
        head = dict(line[1:].split("=", 1) for line in lines if re.match(r"#\w+=", line))
        assert head["group"] == group and head["group_column"] == "ancestry" and head["analysis"] == "heads"
        accessions = {"pgs_id": "PGS000000", "pgp_id": "PGP000000"}  # given by the catalogue, to what stands in it
        CatalogScoreHeader(**{k: v for k, v in head.items() if k in CatalogScoreHeader.model_fields} | accessions)
        tool = Path(sys.executable).parent / "pgscatalog-format"
        subprocess.run(
            [tool, "-s", file, "-t", "GRCh38", "-o", tmp_path / "formatted"],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
        found = pd.read_csv(tmp_path / "formatted" / f"normalised_{file.name}", sep="\t")
        own = {w["name"]: w["per_unit"] for w in row["weights"]}
        theirs = [
            row["pooled_times"] * pooled[v.id]["per_unit"] + own["published"] * float(published.get(v.id, 0))
            for v in study.variants
        ]
        np.testing.assert_allclose(found["effect_weight"], theirs, rtol=5e-4, atol=1e-12)
    card = (tmp_path / "model_card_heads.md").read_text("utf-8")
    assert (
        "Each group of ancestry has weights of its own" in card
        and "other: those of the pooled model, but for one factor" in card
    )
    assert "### after" in card and "| AFR | " in card
