"""A model trained by Opacus is reported, certified and exported as any other; too little noise in one round stops it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import plain_loop
import reported
from sequester.protocols import privacy
from sequester.protocols.errors import PrivacyError
from sequester.protocols.study import Study
from sequester.server.report.results_folder import write

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def trained(**plan: Any) -> tuple[Study, dict[str, Any]]:
    of = reported.private_study(
        analyses=[
            {"kind": "training", "name": "score", "prevalence": "0.2", "budget": "0.8", **plan},
            {"kind": "evaluation", "name": "held_out", "of": "score", "budget": "0.2"},
        ]
    )
    cohorts = [replace(c, study=of) for c in reported.cohorts(of, n=3000)]
    return of, reported.results(of, plain_loop.run(of, cohorts, np.random.default_rng(1)))


def written(folder: Path, of: Study, results: dict[str, Any]) -> dict[str, Any]:
    write(folder, **reported.held_by_coordinator(of, results))
    return dict(json.loads((folder / "certificate.json").read_text("utf-8")))


@pytest.mark.parametrize("plan", [{"gradients": "hooks"}, {"gradients": "ghost", "hidden": 4, "step": "4"}])
def test_a_trained_model_has_its_certificate_and_its_page(tmp_path: Path, plan: dict[str, Any]) -> None:
    of, results = trained(**plan)
    statement = written(tmp_path, of, results)
    release = next(row for row in statement["releases"] if row["name"] == "score")
    assert release["q"] == 1 and release["T"] == 10
    assert b"Opacus" in (tmp_path / "report.html").read_bytes()


def test_a_sampled_release_is_certified_at_its_own_rate(tmp_path: Path) -> None:
    of, results = trained(gradients="hooks", rate="0.1", send_slot_s=5, rounds=5)
    statement = written(tmp_path, of, results)
    release = next(row for row in statement["releases"] if row["name"] == "score")
    assert release["q"] == 0.1
    assert release["epsilon"] <= 3.001
    promise = privacy.promise(of)
    assert promise is not None  # what hospitals spent is counted at that rate, too
    assert statement["sites"]["lake"]["epsilon"] == pytest.approx(promise.pld_without_spares)
    page = re.sub(r"<[^>]+>", " ", (tmp_path / "report.html").read_text("utf-8"))
    assert re.search(r"\s0\.1\s+5\s+1\s", page)  # q, T and R of the release


def test_too_little_noise_in_one_round_stops_the_export(tmp_path: Path) -> None:
    of, results = trained(gradients="closed")
    results["noise_short_rounds"] = ["score, step 3"]
    with pytest.raises(PrivacyError, match="score, step 3"):
        written(tmp_path, of, results)
    assert not list(tmp_path.iterdir())
