"""What `data freeze` keeps of closed-form records: equal to the records themselves, and refused or made anew where not theirs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import small_hospital
import training_cases
from sequester.client.compute.cohort import StoredCohort
from sequester.client.compute.training import closed
from sequester.client.compute.training.constants import Constants, constants
from sequester.client.ingest.freeze import freeze
from sequester.protocols.analyses.training import TrainingPlan, closed_form, outcomes, records
from sequester.protocols.errors import SiteError
from sequester.protocols.study import Study

DIGEST = "ab" * 32
FIT = {"kind": "training", "name": "fit", "gradients": "closed"}
NAMES = ("scales", "squares", "absent", "uncalled", "uncalled_from")


def frozen(folder: Path, plan: dict[str, Any]) -> tuple[Path, Study]:
    home, study = small_hospital.hospital(folder), small_hospital.study(analyses=[plan])
    freeze(home, home.config(), study, DIGEST)
    return home.dataset("main") / "cohorts" / DIGEST, study


def again(place: Path, but: tuple[str, ...] = ()) -> None:
    """The manifest of what lies there now, some files left out."""
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in place.glob("*.npy") if p.stem not in but}
    manifest = json.loads((place / "manifest.json").read_text("utf-8"))
    (place / "manifest.json").write_text(json.dumps(manifest | {"files": files}), "utf-8")


def sum_of(cohort: StoredCohort, study: Study) -> np.ndarray:
    weights = np.random.default_rng(2).standard_normal((1, len(study.features()) + 1))
    return cohort.gradient(study.analyses[0], {"head.weight": weights})["head.weight"]  # type: ignore[arg-type]


def test_a_frozen_store_knows_its_records_norms_and_missing_calls(tmp_path: Path) -> None:
    place, study = frozen(tmp_path, FIT)
    found = Constants.load(place, {f"{name}.npy" for name in NAMES}, study.features())
    assert found is not None
    dosage = np.load(place / "dosage.npy")
    x = np.vstack([b.x for b in StoredCohort(place, study).blocks("all")])[:, -dosage.shape[1] :]
    np.testing.assert_allclose(found.squares, (x * x).sum(1) / len(study.features()), rtol=0, atol=1e-14)
    for i, row in enumerate(dosage):
        lacks = found.uncalled[found.uncalled_from[i] : found.uncalled_from[i + 1]]
        assert set(lacks.tolist()) | set(found.absent.tolist()) == set(np.flatnonzero(row < 0).tolist())
    assert len(found.uncalled) > 0


def test_only_studies_with_closed_form_gradients_have_them(tmp_path: Path) -> None:
    for plan, expected in ((FIT, True), (FIT | {"gradients": "hooks"}, False)):
        place, _ = frozen(tmp_path / plan["gradients"], plan)
        assert all((place / f"{name}.npy").exists() == expected for name in NAMES)


def test_a_store_of_an_earlier_release_gives_the_same_sum(tmp_path: Path) -> None:
    place, study = frozen(tmp_path, FIT)
    expected = sum_of(StoredCohort(place, study), study)
    for name in NAMES:
        (place / f"{name}.npy").unlink()
    again(place)
    np.testing.assert_array_equal(sum_of(StoredCohort(place, study), study), expected)


def test_a_file_that_the_manifest_does_not_name_is_not_looked_at(tmp_path: Path) -> None:
    place, study = frozen(tmp_path, FIT)
    expected = sum_of(StoredCohort(place, study), study)
    again(place, but=("squares",))
    np.save(place / "squares.npy", np.zeros(small_hospital.N))  # a norm of 0 would clip nobody
    np.testing.assert_array_equal(sum_of(StoredCohort(place, study), study), expected)
    again(place)
    place_of_squares = place / "squares.npy"
    place_of_squares.write_bytes(place_of_squares.read_bytes()[:-1] + b"\1")
    with pytest.raises(SiteError, match="changed since"):
        StoredCohort(place, study)


def test_norms_under_other_public_scales_are_not_used(tmp_path: Path) -> None:
    place, study = frozen(tmp_path, FIT)
    variants = [v.model_dump() | {"frequency": "0.05"} for v in study.variants]
    other = small_hospital.study(analyses=[FIT], variants=variants)
    assert Constants.load(place, {f"{name}.npy" for name in NAMES}, other.features()) is None
    cohort = StoredCohort(place, other)
    got = sum_of(cohort, other)
    for name in NAMES:
        (place / f"{name}.npy").unlink()
    again(place)
    np.testing.assert_array_equal(got, sum_of(StoredCohort(place, other), other))


def test_a_number_of_copies_below_0_that_is_not_the_missing_one_is_refused() -> None:
    study = training_cases.study(3, {"gradients": "closed"})
    with pytest.raises(SiteError, match="below 0"):
        constants(study.features(), np.array([[0, 1, -1]], dtype=np.int8))


@pytest.mark.parametrize(("group", "block"), [(closed.GROUP, closed.BLOCK), (1 << 16, 1 << 14), (1, 1)])
def test_any_rows_sum_is_that_of_their_records(monkeypatch: pytest.MonkeyPatch, group: int, block: int) -> None:
    monkeypatch.setattr(closed, "GROUP", group)  # one group, several of blocks that are not full, patients one by one
    monkeypatch.setattr(closed, "BLOCK", block)
    rng, n, p = np.random.default_rng(7), 150, 2100
    study = training_cases.study(p, {"gradients": "closed", "clip": "0.3"})
    plan = study.analyses[0]
    assert isinstance(plan, TrainingPlan)
    dosage = rng.binomial(2, 0.3, (n, p)).astype(np.int8)
    dosage[rng.random((n, p)) < 0.02] = -9
    dosage[:, [5, 77]] = -9  # called in nobody
    dosage[3] = -9
    y = (rng.random(n) < 0.4).astype(float)
    features = study.features()
    linear = closed.Linear(features, dosage, np.zeros((n, 0)), y, constants(features, dosage))
    copies = np.where(dosage < 0, 0.6, dosage)
    x = records(plan, study, (copies - 0.6) / np.array([f.scale for f in features]))
    w = rng.standard_normal(p + 1)
    for rows in (np.arange(n), np.flatnonzero(rng.random(n) < 0.5), np.arange(40, 90), np.array([3]), np.arange(0)):
        expected = closed_form(plan, x[rows], outcomes(plan, y[rows]), w)
        got = linear.clipped_sum(plan, rows, {"head.weight": w[None]})["head.weight"][0]
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-11)
