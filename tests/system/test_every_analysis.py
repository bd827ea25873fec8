"""All kinds of analysis in one study, between a real exchange and real gates: what the plain loop and other programs say.

The exact studies are those of `deploy/examples/hapmap` with fewer variants; whole, and through all processes, they are run by
`test_real_studies.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import loopback
import plain_loop
import real_studies
from loopback import Loopback, enrolled
from sequester.client.compute.cohort import StoredCohort
from sequester.one_machine.consortium import Site
from sequester.protocols.analyses.registry import ANALYSES
from sequester.protocols.study import study_json
from sequester.simulate.hospitals import Hospital, hospitals

pytestmark = pytest.mark.system

SITES = (
    Hospital("harbor", (50, 150, 650), 1.0, 0.9, 0.01, "chr"),
    Hospital("lake", (300, 700, 100), 1.0, 0.9, 0.01, "swapped"),
    Hospital("metro", (550, 500, 150), 2.0, 0.9, 0.01, "flipped"),
)
POLICY = f"""
exact = {json.dumps(sorted(set(ANALYSES) - {"training"}))}
exact_iterative = true
analyses = {json.dumps(sorted(ANALYSES))}
allow_unisolated = true
"""


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return hospitals(7, tmp_path_factory.mktemp("data"), SITES, 900, chromosomes=2, length_bp=100_000, published=12)


@pytest.fixture
def alps(tmp_path: Path, simulated: Any) -> Loopback:
    return enrolled(tmp_path, {site.name: simulated.site(site.name) for site in SITES}, POLICY)


def fields(simulated: Any, plans: list[dict[str, Any]]) -> dict[str, Any]:
    part = dict(simulated.study)
    del part["prevalence"]
    cohort = {"subgroup": part.pop("subgroup"), "subgroup_values": part.pop("subgroup_values")}
    return {
        **part, "cohort": cohort, "analyses": plans, "privacy": {"epsilon": "3", "delta": "0.000001", "order": "8.9"},
        "aggregation": {"mode": "strict", "round_deadline_s": 30},
    }  # fmt: skip


def numbers(value: Any, path: str = "") -> dict[str, float]:
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in numbers(inner, f"{path}.{name}").items()}
    if isinstance(value, list):
        return {k: v for i, inner in enumerate(value) for k, v in numbers(inner, f"{path}.{i}").items()}
    return {path: float(value)} if isinstance(value, int | float) and not isinstance(value, bool) else {}


def through_real_rounds(alps: Loopback, asked: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Path]]:
    """The study, its results.json, and the cohorts that the hospitals froze, by hospital."""
    found: list[Any] = []

    async def main() -> None:
        async with alps.serving() as exchange:
            study = alps.study(asked)
            digest = await alps.publish_and_approve(study)
            exchange.start(digest)
            assert set((await alps.call(digest)).values()) == {("joined", "")}
            status = await alps.ended(digest, within_s=240)
            assert status["state"] == "done", status
            homes = {name: hospital.home for name, hospital in alps.hospitals.items()}
            stores = {name: home.dataset("main") / "cohorts" / digest for name, home in homes.items()}
            found.extend([study, alps.results(digest), stores])

    loopback.run(main)
    return found[0], found[1], found[2]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Site], Mapping[str, Mapping[str, Any]]]:
    folder = tmp_path_factory.mktemp("hapmap")
    return folder, *real_studies.prepared("hapmap", folder, "--panel", "100")


@pytest.mark.skipif(bool(real_studies.missing("hapmap")), reason=real_studies.missing("hapmap"))
@pytest.mark.parametrize("name", ["exact", "time", "count"])
def test_an_exact_study_of_every_kind_is_what_the_plain_loop_and_other_programs_say(
    tmp_path: Path, real: Any, name: str
) -> None:
    _, sites, studies = real
    valid = study_json(real_studies.study_of("hapmap", sites, studies[name]))
    alps = enrolled(tmp_path, {site.name: site.phenotypes.parent for site in sites}, POLICY, "GRCh37")
    study, results, stores = through_real_rounds(alps, {key: valid[key] for key in studies[name]})
    assert results["exact"] == [plan.name for plan in study.analyses]
    plain = plain_loop.run(study, [StoredCohort(path, study) for path in stores.values()], fixed_point=True)
    for plan in study.analyses:
        ours, theirs = numbers(results["analyses"][plan.name]["result"]), numbers(plain[plan.name].result)
        assert ours.keys() == theirs.keys() and ours
        for key, value in ours.items():  # integers added in the ring against float64: rounding alone
            assert value == pytest.approx(theirs[key], rel=1e-7, abs=1e-9), (plan.name, key)
    real_studies.check("hapmap", name, real_studies.ran("hapmap", study, results, stores, sites, tmp_path))


def test_a_private_study_of_every_private_kind_runs_to_its_end(alps: Loopback, simulated: Any) -> None:
    plans: list[dict[str, Any]] = [
        {"kind": "counts", "name": "grid", "axes": [{"column": simulated.study["phenotype"]["name"]}]},
        {"kind": "quality", "name": "passing"},
        {"kind": "glm", "name": "small", "rounds": 3, "features": "table", "prevalence": "0.2"},
        {"kind": "prs", "name": "one_shot", "prevalence": "0.2"},
        {"kind": "heads", "name": "heads", "of": "small", "columns": "table"},
        {"kind": "evaluation", "name": "held_out", "of": "heads"},
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
