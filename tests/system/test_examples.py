"""The studies that the demo and the examples ask for: valid, worth their cost, and with figures a second opinion confirms."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from sequester.one_machine.consortium import edited
from sequester.protocols import privacy
from sequester.protocols.study import Study, read_study
from sequester.server.cli.study import templates
from sequester.server.forecast import forecast

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DATA = Path(os.environ.get("SEQUESTER_DATA", str(DEPLOY.parents[1] / "shared/data")))


def script(path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of `deploy/`, loaded as if it were started there."""
    file = DEPLOY / path
    monkeypatch.syspath_prepend(str(file.parent))
    spec = importlib.util.spec_from_file_location(file.stem + "_script", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def study(template: str, fields: dict[str, Any]) -> Study:
    return privacy.calibrate(read_study(edited(templates()[template], fields)))


def public_part(variants: int) -> dict[str, Any]:
    """What a simulation writes of its own accord, small."""
    row = {"chromosome": "1", "effect": "A", "other": "G", "frequency": "0.3000"}
    return {
        "genome_build": "GRCh38",
        "phenotype": {"name": "case", "kind": "binary", "values": ["0", "1"]},
        "covariates": [{"name": "sex", "kind": "binary", "values": ["0", "1"]}],
        "variants": [{"id": f"v{j}", "position": j + 1, **row} for j in range(variants)],
        "prevalence": "0.15",
    }


def test_the_demo_asks_for_at_most_20_features_at_epsilon_3_and_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = script("demo/demo.py", monkeypatch)
    public = public_part(demo.simulation.PUBLISHED)
    public["covariates"].append({"name": "age", "kind": "quantitative", "lower": "20", "upper": "90"})
    asked = study("risk-score", demo.study_fields(public, demo.PEOPLE))
    said = forecast(asked)
    assert len(asked.features()) == 18 <= 20 and said.verdict == "good"
    assert said.promise is not None and float(asked.privacy.epsilon) == 3 and said.promise.pld <= 3
    assert len(demo.simulation.FOUR) == 4 and len({h.people for h in demo.simulation.FOUR}) == 4


@pytest.mark.parametrize("name", ["warfarin", "hapmap"])
def test_an_examples_studies_hold_together_in_both_modes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = script("examples/run.py", monkeypatch)
    example = run.EXAMPLES[name]
    skeleton = YAML().load((DEPLOY / "examples" / name / "study.yaml").read_text("utf-8"))
    skeleton.setdefault("variants", public_part(12)["variants"])
    fields = example.studies(skeleton, 3000)
    for mode in ("private", "exact"):
        asked = study(example.template, fields[mode])
        forecast(asked)  # raises what a hospital would refuse for: noise, head-room
        assert {plan.mode for plan in asked.analyses} == {mode}
    assert set(example.exact_policy["exact"]) == {
        plan.kind for plan in study(example.template, fields["exact"]).analyses
    }


@pytest.mark.skipif(not (DATA / "iwpc_warfarin").exists(), reason="SEQUESTER_DATA has no iwpc_warfarin")
def test_the_largest_hospitals_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = script("examples/run.py", monkeypatch)
    prepare = [sys.executable, str(DEPLOY / "examples/warfarin/prepare.py")]
    source = str(DATA / run.EXAMPLES["warfarin"].source)
    subprocess.run([*prepare, source, str(tmp_path)], check=True, capture_output=True, timeout=60)
    sites = run.largest(tmp_path, 5, "GRCh38")
    assert len(sites) == 5 and all(site.genotypes is None for site in sites)
    smallest = min(run.patients(site.phenotypes) for site in sites)
    others = {path.parent.name for path in tmp_path.glob("*/phenotypes.csv")} - {site.name for site in sites}
    assert all(run.patients(tmp_path / name / "phenotypes.csv") <= smallest for name in others) and len(others) == 11


def test_the_oracles_of_the_examples_agree_with_another_way_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.linear_model import LinearRegression, LogisticRegression

    oracles = script("examples/oracles.py", monkeypatch)
    rng = np.random.default_rng(3)
    x = rng.normal(size=(500, 4))
    y = x @ [1.0, -0.5, 0.25, 0.1] + rng.normal(size=500)
    rows = oracles.Pooled(x, y, np.arange(500) % 5)
    line = LinearRegression().fit(x, y)
    # two solvers of one least-squares problem: rounding only
    assert oracles.relative_difference(oracles.least_squares(rows), np.append(line.intercept_, line.coef_)) < 1e-9
    curve = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(x, y > 0)
    found = oracles.logistic(oracles.Pooled(x, (y > 0).astype(float), rows.fold))
    # sklearn stops at a gradient of 1e-10, weights differ by less than 1e-6 of their size
    assert oracles.relative_difference(found, np.append(curve.intercept_, curve.coef_[0])) < 1e-6
    assert oracles.relative_difference(np.array([1.0, -2.0]), np.array([1.0, -1.0])) == 1.0
