"""One exact study that runs its analyses in order on 1,033 real people in five hospitals, through freeze and store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
from ruamel.yaml import YAML

import contracts
import plain_loop
from oracles import table
from sequester.client.compute.cohort import StoredCohort
from sequester.client.compute.genome.plink import PlinkFiles
from sequester.client.config import Home
from sequester.client.ingest.freeze import freeze
from sequester.protocols import privacy
from sequester.protocols.analyses.analysis import Finished
from sequester.protocols.study import Study

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(os.environ.get("SEQUESTER_DATA", str(ROOT.parent / "shared/data"))) / "hapmap3_1kg"
pytestmark = pytest.mark.skipif(not SOURCE.exists(), reason="SEQUESTER_DATA has no hapmap3_1kg")
PANEL = "HM3_thinned_autosomal_overlap"
POPULATIONS = ["CEU", "GBR", "FIN", "TSI", "IBS", "YRI", "LWK", "ASW", "MXL", "CLM", "PUR", "CHB", "CHS", "JPT"]
ANALYSES: list[dict[str, Any]] = [
    {"kind": "counts", "name": "feasibility", "axes": [{"column": "case"}]},
    {"kind": "quality", "name": "passing", "split": "outcome"},
    {"kind": "structure", "name": "ancestry", "components": 4, "iterations": 10},
    {"kind": "glm", "name": "by_population", "solver": "newton", "rounds": 20, "features": "table", "part": "all"},
    {"kind": "association", "name": "scan", "components": "ancestry", "follow_below": "0.0001"},
    {"kind": "penalised", "name": "lasso", "l1": "1", "fraction": "0.35", "rounds": 60},
    {"kind": "evaluation", "name": "held_out", "of": "lasso", "bins": 1000},
    {"kind": "calibration", "name": "right", "of": "lasso"},
    {"kind": "prs", "name": "one_shot", "prevalence": "0.3", "shrinkage": "none"},
]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, list[StoredCohort], dict[str, Finished], list[str]]:
    """The finished study, its frozen cohorts, and the names of the variants that carry the simulated trait."""
    root = tmp_path_factory.mktemp("genomes")
    script = ROOT / "deploy/examples/hapmap/prepare.py"
    subprocess.run([sys.executable, str(script), str(SOURCE), str(root)], check=True, timeout=120, capture_output=True)
    causal = YAML(typ="safe").load((root / "study.yaml").read_text("utf-8"))["variants"]
    rng = np.random.default_rng(1)
    panel = PlinkFiles(str(SOURCE / PANEL))
    ids = [line.split()[1] for line in (SOURCE / f"{PANEL}.bim").read_text("utf-8").splitlines()]
    place = {name: j for j, name in enumerate(ids)}
    people = [line.split() for line in (root / "africa/genotypes.bim").read_text("utf-8").splitlines()]
    named = {v["id"] for v in causal}
    listed = []
    for chromosome, name, _, position, counted, other in people:
        if name in named or rng.random() > 0.13 or {counted, other} in ({"A", "T"}, {"C", "G"}):
            continue
        copies = panel.counts([place[name]])[:, 0]
        f = float(copies[copies >= 0].mean() / 2)
        theirs = panel.variants[place[name]]
        f = f if theirs.counted == counted else 1 - f
        if 0.02 < f < 0.98:
            listed.append({"id": name, "chromosome": chromosome, "position": int(position), "effect": counted,
                           "other": other, "frequency": f"{f:.4f}"})  # fmt: skip
    listed += [{**v, "frequency": str(v["frequency"])} for v in causal]
    study = contracts.study(
        genome_build="GRCh37", variants=listed, analyses=[{"mode": "exact", **plan} for plan in ANALYSES],
        covariates=[{"name": "population", "kind": "category", "values": POPULATIONS}],
        cohort={"subgroup": "population", "subgroup_values": ["CEU", "YRI", "CHB"]}, n0=1000, n_max=1500,
        aggregation={"mode": "strict", "ring_bits": 64, "fraction_bits": 28},
    )  # fmt: skip
    privacy.check_headroom(study)
    cohorts = []
    for name in ("africa", "america", "east-asia", "europe-north", "europe-south"):
        home = Home(root / f"home-{name}")
        home.root.mkdir()
        home.site_toml.write_text(
            f'[site]\nid = "{name}"\n[data]\ngenotypes = "{root / name / "genotypes"}"\nbuild = "GRCh37"\n'
            f'phenotypes = "{root / name / "phenotypes.csv"}"\n',
            "utf-8",
        )
        assert freeze(home, home.config(), study, "cd" * 32).ready
        cohorts.append(StoredCohort(home.dataset("main") / "cohorts" / ("cd" * 32), study))
    finished = plain_loop.run(study, cohorts, fixed_point=True)
    return study, cohorts, finished, [v["id"] for v in causal]


@pytest.mark.slow
def test_every_analysis_ends_and_its_result_is_plain_json(done: Any) -> None:
    study, cohorts, finished, _ = done
    assert list(finished) == [plan["name"] for plan in ANALYSES]
    for name in finished:
        json.dumps(finished[name].result, allow_nan=False)
    assert finished["feasibility"].result["people"] == 1033 == sum(len(c.columns("all").y) for c in cohorts)
    assert len(finished["passing"].result["passing"]) > 0.7 * len(study.variants)


@pytest.mark.slow
def test_the_scan_with_components_finds_the_causal_variants_and_little_else(done: Any) -> None:
    study, cohorts, finished, causal = done
    t = finished["scan"].result["table"]
    p = dict(zip(t["id"], t["p"], strict=True))
    top = sorted(p, key=lambda name: p[name])[: len(causal)]
    assert len(set(top) & set(causal)) >= 6
    assert 0.9 < finished["scan"].result["lambda"] < 1.1
    # the same test for one variant, pooled: intercept, population, four components from one decomposition
    x = np.vstack([b.x for c in cohorts for b in c.blocks("all")])
    y = np.concatenate([b.y for c in cohorts for b in c.blocks("all")])
    copies = np.vstack([np.hstack([d.copies for d in c.dosages("all")]) for c in cohorts])
    state = finished["ancestry"].state
    z = np.nan_to_num((copies - state["mean"]) / np.where(state["scale"] > 0, state["scale"], np.inf))
    j = t["id"].index(top[0])
    filled = np.where(np.isnan(copies[:, j]), np.nanmean(copies[:, j]), copies[:, j])
    n_table = len(study.table_features())
    design = np.column_stack([np.ones(len(y)), x[:, :n_table], z @ state["loadings"], filled])
    oracle = sm.Logit(y, design).fit(disp=0, tol=1e-12, maxiter=100)
    table.record("association, hits refitted", "statsmodels", "z on real genomes, relative", t["statistic"][j],
                 oracle.tvalues[-1], rtol=1e-6)  # fmt: skip


@pytest.mark.slow
def test_the_lasso_ranks_held_out_people_and_every_measure_is_there(done: Any) -> None:
    _, _, finished, causal = done
    used = {
        row["name"] for row in finished["lasso"].result["weights"] if row["standardised"] and row["kind"] == "variant"
    }
    assert len(used & set(causal)) >= 6
    result = finished["held_out"].result
    assert result["auc"]["value"] > 0.6 and 0 < result["average_precision"] < 1 and result["brier"] < 0.25
    assert "slope" in finished["right"].result
