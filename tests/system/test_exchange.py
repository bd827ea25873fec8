"""Whole studies between a real exchange and real gates: gRPC, mutual TLS, compute processes, journals; without Flower."""

from __future__ import annotations

from pathlib import Path

import pytest

import loopback
from loopback import Loopback, enrolled
from sequester.simulate.hospitals import Hospital, hospitals

pytestmark = pytest.mark.system

SITES = (
    Hospital("harbor", (50, 150, 650), 1.0, 0.9, 0.01, "chr"),
    Hospital("lake", (300, 700, 100), 1.0, 0.9, 0.01, "swapped"),
    Hospital("metro", (550, 500, 150), 2.0, 0.9, 0.01, "flipped"),
)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> hospitals:  # type: ignore[valid-type]
    return hospitals(7, tmp_path_factory.mktemp("data"), SITES, 900, chromosomes=2, length_bp=100_000, published=6)


def risk(simulated: object, **changed: object) -> dict[str, object]:
    """The fields of a private risk study on the simulated hospitals."""
    part = dict(simulated.study)  # type: ignore[attr-defined]
    prevalence = part.pop("prevalence")
    cohort = {"subgroup": part.pop("subgroup"), "subgroup_values": part.pop("subgroup_values")}
    analyses = [
        {"kind": "glm", "name": "score", "rounds": 5, "prevalence": prevalence, "budget": "0.9"},
        {"kind": "evaluation", "name": "held_out", "of": "score", "budget": "0.1"},
    ]
    return {
        **part, "cohort": cohort, "analyses": analyses, "privacy": {"epsilon": "3", "delta": "0.000001", "order": "8.9"},
        "aggregation": {"mode": "strict", "round_deadline_s": 20}, **changed,
    }  # fmt: skip


@pytest.fixture
def alps(tmp_path: Path, simulated: object) -> Loopback:
    return enrolled(tmp_path, {site.name: simulated.site(site.name) for site in SITES})  # type: ignore[attr-defined]


def test_a_study_runs_to_its_results_and_every_site_has_a_receipt(alps: Loopback, simulated: object) -> None:
    async def main() -> None:
        async with alps.serving() as exchange:
            digest = await alps.publish_and_approve(alps.study(risk(simulated)))
            exchange.start(digest)
            assert set((await alps.call(digest)).values()) == {("joined", "")}
            status = await alps.ended(digest)
            assert status["state"] == "done", status
            assert status["receipts"] == ["harbor", "lake", "metro"]
            results = alps.results(digest)
            assert results["rounds"] == 6
            print(results["round_seconds"], results["wall_seconds"], results["bytes_up"])

    loopback.run(main)
