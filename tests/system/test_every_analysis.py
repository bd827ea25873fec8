"""All kinds of analysis in one study, between a real exchange and real gates: the same results as the plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import loopback
import plain_loop
from loopback import Loopback, enrolled
from sequester.client.compute.cohort import StoredCohort
from sequester.simulate.hospitals import Hospital, hospitals

pytestmark = pytest.mark.system

SITES = (
    Hospital("harbor", (50, 150, 650), 1.0, 0.9, 0.01, "chr"),
    Hospital("lake", (300, 700, 100), 1.0, 0.9, 0.01, "swapped"),
    Hospital("metro", (550, 500, 150), 2.0, 0.9, 0.01, "flipped"),
)
POLICY = """
exact = ["counts", "quality", "structure", "glm", "association", "burden", "penalised", "evaluation", "calibration",
         "reclassification", "prs"]
exact_iterative = true
analyses = ["counts", "quality", "structure", "glm", "association", "burden", "penalised", "evaluation", "calibration",
            "reclassification", "prs"]
allow_unisolated = true
"""


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return hospitals(7, tmp_path_factory.mktemp("data"), SITES, 900, chromosomes=2, length_bp=100_000, published=12)


@pytest.fixture
def alps(tmp_path: Path, simulated: Any) -> Loopback:
    return enrolled(tmp_path, {site.name: simulated.site(site.name) for site in SITES}, POLICY)


def fields(simulated: Any, plans: list[dict[str, Any]], **changed: Any) -> dict[str, Any]:
    part = dict(simulated.study)
    del part["prevalence"]
    cohort = {"subgroup": part.pop("subgroup"), "subgroup_values": part.pop("subgroup_values")}
    return {
        **part, "cohort": cohort, "analyses": plans, "privacy": {"epsilon": "3", "delta": "0.000001", "order": "8.9"},
        "aggregation": {"mode": "strict", "round_deadline_s": 30}, **changed,
    }  # fmt: skip


def numbers(value: Any, path: str = "") -> dict[str, float]:
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in numbers(inner, f"{path}.{name}").items()}
    if isinstance(value, list):
        return {k: v for i, inner in enumerate(value) for k, v in numbers(inner, f"{path}.{i}").items()}
    return {path: float(value)} if isinstance(value, int | float) and not isinstance(value, bool) else {}


def through_real_rounds(alps: Loopback, asked: dict[str, Any]) -> tuple[Any, dict[str, Any], list[StoredCohort]]:
    """The study, its results.json, and the cohorts that the hospitals froze."""
    found: list[Any] = []

    async def main() -> None:
        async with alps.serving() as exchange:
            study = alps.study(asked)
            digest = await alps.publish_and_approve(study)
            exchange.start(digest)
            assert set((await alps.call(digest)).values()) == {("joined", "")}
            status = await alps.ended(digest, within_s=240)
            assert status["state"] == "done", status
            homes = [hospital.home for hospital in alps.hospitals.values()]
            cohorts = [StoredCohort(home.dataset("main") / "cohorts" / digest, study) for home in homes]
            found.extend([study, alps.results(digest), cohorts])

    loopback.run(main)
    return found[0], found[1], found[2]


def test_an_exact_study_of_every_kind_gives_what_the_plain_loop_gives(alps: Loopback, simulated: Any) -> None:
    ids = [v["id"] for v in simulated.study["variants"]]
    plans: list[dict[str, Any]] = [
        {"kind": "counts", "name": "grid", "axes": [{"column": simulated.study["phenotype"]["name"]}]},
        {"kind": "quality", "name": "passing", "split": "subgroup"},
        {"kind": "structure", "name": "ancestry", "components": 2, "oversampling": 4, "iterations": 5},
        {"kind": "glm", "name": "table_model", "solver": "newton", "rounds": 15, "features": "table"},
        {"kind": "association", "name": "scan", "components": "ancestry", "follow_below": "0.05", "follow_rounds": 12},
        {"kind": "burden", "name": "genes", "genes": [{"name": "A", "variants": ids[:4]}]},
        {"kind": "penalised", "name": "lasso", "l1": "0.9", "fraction": "0.1", "rounds": 30},
        {"kind": "prs", "name": "one_shot", "prevalence": "0.2"},
        {"kind": "evaluation", "name": "held_out", "of": "lasso", "bins": 200},
        {"kind": "calibration", "name": "right", "of": "lasso"},
        {
            "kind": "reclassification",
            "name": "moved",
            "of": "lasso",
            "against": "table_model",
            "thresholds": ["0.1", "0.3"],
        },
    ]
    asked = fields(simulated, [{"mode": "exact", **plan} for plan in plans], aggregation={
        "mode": "strict", "ring_bits": 64, "fraction_bits": 28, "round_deadline_s": 30,
    })  # fmt: skip
    study, results, cohorts = through_real_rounds(alps, asked)
    assert results["exact"] == [plan["name"] for plan in plans]
    plain = plain_loop.run(study, cohorts, fixed_point=True)
    for plan in plans:
        ours, theirs = numbers(results["analyses"][plan["name"]]["result"]), numbers(plain[plan["name"]].result)
        assert ours.keys() == theirs.keys() and ours
        for key, value in ours.items():  # integers added in the ring against float64: rounding alone
            assert value == pytest.approx(theirs[key], rel=1e-7, abs=1e-9), (plan["name"], key)


def test_a_private_study_of_every_private_kind_runs_to_its_end(alps: Loopback, simulated: Any) -> None:
    plans: list[dict[str, Any]] = [
        {"kind": "counts", "name": "grid", "axes": [{"column": simulated.study["phenotype"]["name"]}]},
        {"kind": "quality", "name": "passing"},
        {"kind": "glm", "name": "small", "rounds": 3, "features": "table", "prevalence": "0.2"},
        {"kind": "prs", "name": "one_shot", "prevalence": "0.2"},
        {"kind": "evaluation", "name": "held_out", "of": "one_shot"},
        {"kind": "calibration", "name": "right", "of": "one_shot"},
        {
            "kind": "reclassification",
            "name": "moved",
            "of": "one_shot",
            "against": "small",
            "thresholds": ["0.1", "0.3"],
        },
    ]
    _, results, _ = through_real_rounds(alps, fields(simulated, plans))
    assert results["exact"] == [] and results["epsilon"] <= 3
    assert set(results["analyses"]) == {plan["name"] for plan in plans}
    assert 0.9 < results["noise_on_padding"] < 1.1
