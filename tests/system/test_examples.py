"""The studies that the demo and the examples ask for: valid, worth their cost, and with figures a second opinion confirms."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

import real_studies
from examples import of_models, run, second_opinions
from examples.compared import Compared, absolute, lines, relative
from examples.example import policy
from examples.people import People
from examples.ran import Ran
from sequester.one_machine.consortium import edited
from sequester.protocols import privacy
from sequester.protocols.analyses.evaluation import EvaluationPlan, verified
from sequester.protocols.analyses.registry import ANALYSES
from sequester.protocols.study import Study, read_study
from sequester.server.cli.study import templates
from sequester.server.forecast import forecast
from sequester.simulate.genomes import POPULATIONS

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


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
        "subgroup": "ancestry",
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


def test_the_demo_declares_groups_large_enough_for_intervals_and_one_that_nobody_belongs_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    demo = script("demo/demo.py", monkeypatch)
    people = np.array([hospital.people for hospital in demo.simulation.FOUR]).sum(axis=0)
    lived = dict(zip(POPULATIONS, people / people.sum(), strict=True))
    assert {name: float(share) for name, share in demo.ANCESTRIES.items()} == pytest.approx(
        {"AMR": 0.005, **lived}, abs=0.01
    )
    sites = [{"id": hospital.name, "key": f"{i:064x}"} for i, hospital in enumerate(demo.simulation.FOUR, 1)]
    fields = demo.study_fields(public_part(demo.simulation.PUBLISHED), demo.PEOPLE)
    asked = study("risk-score", {**fields, "sites": sites})
    held_out = asked.analysis("held_out")
    assert isinstance(held_out, EvaluationPlan)
    said = {group: verified(held_out, asked, group).why for group in (None, *demo.ANCESTRIES)}
    assert [group for group, why in said.items() if why] == ["AMR"]


@pytest.fixture
def skeletons(tmp_path: Path) -> dict[str, tuple[Any, Path]]:
    """What each example's `prepare.py` would hand to its studies, with a panel of sixty variants."""
    panel = [{**row, "chromosome": "17"} for row in public_part(60)["variants"]]
    (tmp_path / "panel.json").write_text(json.dumps(panel), "utf-8")
    found = {}
    for name in run.EXAMPLES:
        fields = YAML().load((DEPLOY / "examples" / name / "study.yaml").read_text("utf-8"))
        if name != "mice":
            fields["variants"] = public_part(12)["variants"]
        found[name] = (fields, tmp_path)
    return found


@pytest.mark.parametrize("name", list(run.EXAMPLES))
def test_an_examples_studies_hold_together(name: str, skeletons: dict[str, tuple[Any, Path]]) -> None:
    example = run.EXAMPLES[name]
    studies = example.studies(*skeletons[name], 3000)
    asked = {key: study(example.template, dict(fields)) for key, fields in studies.items()}
    for valid in asked.values():
        forecast(valid)  # raises what a hospital would refuse for: noise, head-room
        assert len({plan.mode for plan in valid.analyses}) == 1
    exact = {plan.kind for valid in asked.values() for plan in valid.analyses if plan.mode == "exact"}
    assert set(policy(studies)["exact"]) == exact <= set(second_opinions.OPINIONS)


def test_the_examples_together_run_every_kind_of_analysis(skeletons: dict[str, tuple[Any, Path]]) -> None:
    found = {
        plan["kind"]
        for name, example in run.EXAMPLES.items()
        for fields in example.studies(*skeletons[name], 3000).values()
        for plan in fields["analyses"]
    }
    assert found == set(ANALYSES)


@pytest.mark.skipif(bool(real_studies.missing("warfarin")), reason=real_studies.missing("warfarin"))
def test_the_largest_hospitals_are_taken(tmp_path: Path) -> None:
    prepare = [sys.executable, str(DEPLOY / "examples/warfarin/prepare.py")]
    source = str(real_studies.DATA / run.EXAMPLES["warfarin"].source)
    subprocess.run([*prepare, source, str(tmp_path)], check=True, capture_output=True, timeout=60)
    sites = run.largest(tmp_path, 5, "GRCh38")
    assert len(sites) == 5 and all(site.genotypes is None for site in sites)
    smallest = min(run.patients(site.phenotypes) for site in sites)
    others = {path.parent.name for path in tmp_path.glob("*/phenotypes.csv")} - {site.name for site in sites}
    assert all(run.patients(tmp_path / name / "phenotypes.csv") <= smallest for name in others) and len(others) == 11


def test_another_optimiser_and_the_dual_solve_find_what_other_programs_find() -> None:
    from sklearn.linear_model import LogisticRegression, Ridge

    rng = np.random.default_rng(3)
    copies = rng.binomial(2, 0.3, (500, 12)).astype(float)
    of = study("risk-score", {"variants": public_part(12)["variants"], "covariates": []})
    y = (rng.random(500) < 1 / (1 + np.exp(1 - copies[:, 0]))).astype(float)
    none, zeros = np.zeros((500, 0)), np.zeros(500, dtype=np.int64)
    people = People(of, none, copies, y, zeros, zeros, zeros, None)
    ran = Ran(of, {}, {}, {}, None, Path())
    plan = SimpleNamespace(l1="1")
    found = of_models.other_optimum(ran, plan, people, 0.02)
    lasso = LogisticRegression(
        C=1 / (500 * 0.02), l1_ratio=1.0, solver="saga", tol=1e-10, max_iter=20_000, random_state=1
    )
    theirs = lasso.fit(people.variants, y)
    assert np.abs(found - np.append(theirs.intercept_, theirs.coef_[0])).max() < 1e-4  # two optimisers' own tolerances
    w, b = of_models.dual_ridge(people, 0.5)
    ridge = Ridge(alpha=250.0).fit(people.variants, y)
    np.testing.assert_allclose(np.append(w, b), np.append(ridge.coef_, ridge.intercept_), rtol=1e-9)


def test_a_difference_that_is_not_a_number_or_too_large_is_outside() -> None:
    rows = [relative("a", "numpy", "x", [1.0, 2.0], [1.0, 1.0], 0.5), Compared("a", "b", "c", float("nan"), 1.0)]
    assert [row.is_within for row in rows] == [False, False] and "OUTSIDE" in "\n".join(lines(rows))
    assert absolute("a", "numpy", "x", 2.0, 2.0, 0).is_within
    with pytest.raises(ValueError, match="figures beside"):
        absolute("a", "numpy", "x", [1.0], [1.0, 2.0], 1)
