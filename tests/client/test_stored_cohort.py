"""One frozen cohort seen three ways: by patients, by columns, by variants; and an outcome that is a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import small_hospital
from sequester.client.compute.cohort import StoredCohort
from sequester.client.config import Home
from sequester.client.ingest.freeze import freeze
from sequester.protocols.analyses.cohort import designs, standardised
from sequester.protocols.errors import SiteError, StudyError
from sequester.protocols.study import Study

DIGEST = "ab" * 32


def stored(home: Home, study: Study) -> StoredCohort:
    freeze(home, home.config(), study, DIGEST)
    return StoredCohort(home.dataset("main") / "cohorts" / DIGEST, study)


@pytest.mark.parametrize("part", ["train", "test", "all"])
def test_columns_and_variants_together_are_the_blocks(tmp_path: Path, part: str) -> None:
    study = small_hospital.study()
    cohort = stored(small_hospital.hospital(tmp_path), study)
    blocks = list(cohort.blocks(part))  # type: ignore[arg-type]
    x, y = np.vstack([b.x for b in blocks]), np.concatenate([b.y for b in blocks])
    columns = cohort.columns(part)  # type: ignore[arg-type]
    copies = np.hstack([d.copies for d in cohort.dosages(part)])  # type: ignore[arg-type]
    np.testing.assert_array_equal(standardised(np.hstack([columns.raw, copies]), study.features()), x)
    np.testing.assert_array_equal(columns.y, y)
    np.testing.assert_array_equal(cohort.some(part, [1, 0]), copies[:, ::-1])  # type: ignore[arg-type]
    table = np.vstack([b.x for b in designs(study, cohort, part, "table")])  # type: ignore[arg-type]
    np.testing.assert_array_equal(table, x[:, : table.shape[1]])
    assert np.isnan(np.hstack([d.copies for d in cohort.dosages("all")])).any()  # a missing call stays missing


TIME = {"name": "years", "kind": "time", "unit": "years", "lower": "0", "upper": "10", "event": "died"}


def survivors(folder: Path, rows: list[str]) -> Home:
    home = small_hospital.hospital(folder)
    people = [line.split(",") for line in (folder / "phenotypes.csv").read_text("utf-8").splitlines()[1:]]
    lines = ["patient,age,smoke,years,died"]
    lines += [f"{p[0]},{p[2]},{p[3]},{row}" for p, row in zip(people, rows, strict=True)]
    (folder / "phenotypes.csv").write_text("\n".join(lines) + "\n", "utf-8")
    return home


def test_a_time_is_censored_at_its_bound_and_incomplete_follow_up_leaves(tmp_path: Path) -> None:
    study = small_hospital.study(
        phenotype=TIME, analyses=[{"kind": "counts", "name": "n", "axes": [{"column": "smoke"}]}]
    )
    rows = [f"{2 + i % 5},{i % 2}" for i in range(small_hospital.N)]
    rows[0], rows[1], rows[2] = "25.5,1", "NA,1", "3,NA"
    columns = stored(survivors(tmp_path, rows), study).columns("all")
    assert columns.event is not None and len(columns.y) == small_hospital.N - 2
    assert columns.y[0] == 10.0 and columns.event[0] == 0.0  # 25.5 years: known to be well at 10
    assert columns.y[1:].max() == 6.0 and set(columns.event.tolist()) == {0.0, 1.0}


def test_a_negative_time_is_refused_with_its_row(tmp_path: Path) -> None:
    study = small_hospital.study(
        phenotype=TIME, analyses=[{"kind": "counts", "name": "n", "axes": [{"column": "smoke"}]}]
    )
    rows = ["-1,1"] + ["2,1"] * (small_hospital.N - 1)
    with pytest.raises(SiteError, match="column years, row 2: not a time"):
        stored(survivors(tmp_path, rows), study)


@pytest.mark.parametrize(
    ("phenotype", "said"),
    [
        ({**TIME, "event": None}, "names the column of its `event`"),
        ({**TIME, "lower": "1"}, "lower 0"),
        ({"name": "case", "kind": "binary", "event": "died"}, "only a time does"),
    ],
)
def test_a_time_that_is_half_declared_is_refused(phenotype: dict[str, str], said: str) -> None:
    with pytest.raises(StudyError, match=said):
        small_hospital.study(phenotype=phenotype)
