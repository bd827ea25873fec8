"""From a hospital's files to a frozen cohort: what is refused, what is counted, what is written."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import contracts
from sequester.client.cli import data
from sequester.client.compute.cohort import StoredCohort
from sequester.client.config import Home
from sequester.client.ingest import freeze as ingest
from sequester.protocols.errors import SiteError
from sequester.protocols.study import Study
from sequester.simulate.plink import Line, write_bed
from small_hospital import N, hospital, study


def change(folder: Path, old: str, new: str) -> None:
    path = folder / "phenotypes.csv"
    path.write_text(path.read_text("utf-8").replace(old, new), "utf-8")


def refused(home: Home, of: Study) -> SiteError:
    with pytest.raises(SiteError) as caught:
        ingest.freeze(home, home.config(), of, "cd" * 32)
    assert "p0" not in caught.value.message + caught.value.hint  # never a patient's id
    assert not (home.dataset("main") / "cohorts" / ("cd" * 32)).exists()
    return caught.value


def test_a_frozen_cohort_gives_standardised_features_in_the_study_order(tmp_path: Path) -> None:
    home, of = hospital(tmp_path), study()
    account = ingest.freeze(home, home.config(), of, "cd" * 32)
    assert account.ready and account.patients == N
    assert account.variants["direct"] == 1 and account.variants["swapped"] == 1
    cohort = StoredCohort(home.dataset("main") / "cohorts" / ("cd" * 32), of)
    blocks = list(cohort.blocks("all"))
    x = np.vstack([b.x for b in blocks])
    assert [f.name for f in of.features()] == ["age", "smoke=now", "smoke=other", "rs1", "rs2"]
    counts = np.random.default_rng(1).integers(0, 3, (N, 2))
    assert x[0, 3] == 0.0  # missing: the public mean
    np.testing.assert_allclose(x[1:, 3], (counts[1:, 0] - 0.4) / 0.32**0.5)
    np.testing.assert_allclose(x[:, 4], ((2 - counts[:, 1]) - 0.8) / 0.48**0.5)
    np.testing.assert_allclose(x[:4, 0], (np.arange(20, 24) - 55) / 35)
    assert x[:4, 1].tolist() == [0, 1, 0, 0] and x[:4, 2].tolist() == [0, 0, 1, 0]  # `NA` is the centre, not `other`
    held_out = sum(len(b.y) for b in cohort.blocks("test"))
    assert held_out + sum(len(b.y) for b in cohort.blocks("train")) == N and 8 < held_out < 45


def test_freezing_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    home, of = hospital(tmp_path), study()
    folder = home.dataset("main") / "cohorts" / ("cd" * 32)
    ingest.freeze(home, home.config(), of, "cd" * 32)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    ingest.freeze(home, home.config(), of, "cd" * 32)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert stat.S_IMODE((home.dataset("main") / "patients.key").stat().st_mode) == 0o600


def test_a_changed_byte_in_the_store_is_refused_by_compute(tmp_path: Path) -> None:
    home, of = hospital(tmp_path), study()
    ingest.freeze(home, home.config(), of, "cd" * 32)
    folder = home.dataset("main") / "cohorts" / ("cd" * 32)
    for name in ("dosage.npy", "outcome.npy", "table.npy", "split.npy"):
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(SiteError, match="changed since"):
            StoredCohort(folder, of)
        (folder / name).write_bytes(good)
    StoredCohort(folder, of)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("patient,case", "patient,status", "no column `case`"),
        ("patient,case", "person,case", "no column `patient` among its "),
        ("p003,1", "p002,1", "are the same patient"),
        ("p003,1,", "p003,2,", "row 5: a value that is neither"),
        ("p003,1,23", "p003,1,2_3", "row 5: not a number"),
        ("p003,1,23", 'p003,1,"23,5"', "row 5: not a number"),
        ("p003,1,23", "p003,1,inf", "row 5: not a number"),
        ("p003,1,23", "p003,1,23,9", "line 5: 5 columns"),
    ],
)
def test_a_damaged_table_is_refused_with_its_row(tmp_path: Path, old: str, new: str, said: str) -> None:
    home = hospital(tmp_path)
    change(tmp_path, old, new)
    error = refused(home, study())
    assert said in error.message and error.hint is not None


def test_another_unit_is_refused_by_the_public_bounds(tmp_path: Path) -> None:
    home = hospital(tmp_path)
    change(tmp_path, ",21,", ",252,")
    assert "outside 20..90 years" in refused(home, study()).message


def test_patients_who_do_not_join_with_the_genotypes_are_refused_below_half(tmp_path: Path) -> None:
    home = hospital(tmp_path)
    change(tmp_path, "\np", "\nq")
    assert "0 of 120 patients" in refused(home, study()).message


def test_another_build_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    assert "GRCh37" in refused(hospital(tmp_path), study(genome_build="GRCh37")).message


def test_too_few_patients_is_a_store_that_is_not_ready(tmp_path: Path) -> None:
    home = hospital(tmp_path, "minimum_cohort = 500")
    account = ingest.freeze(home, home.config(), study(), "cd" * 32)
    assert not account.ready
    manifest = json.loads((home.dataset("main") / "cohorts" / ("cd" * 32) / "manifest.json").read_text("utf-8"))
    assert manifest["ready"] is False
    assert not any(isinstance(v, int) and v >= 100 for v in manifest.values())  # no count of patients


def test_an_excluded_patient_leaves_at_the_next_freeze_and_conditions_are_counted(tmp_path: Path) -> None:
    home, of = hospital(tmp_path), study(cohort={"where": ["age >= 30"]})
    (tmp_path / "list.txt").write_text("p015\np016\n", "utf-8")
    assert ingest.exclude(home, home.config(), tmp_path / "list.txt", "opted out") == 1
    account = ingest.freeze(home, home.config(), of, "cd" * 32)
    assert account.counts["excluded"] == 2 and account.counts["not_age >= 30"] == 20
    assert account.patients == N - 2 - 20


def test_a_variant_that_the_files_lack_is_missing_for_everybody_and_too_many_of_them_are_not_ready(
    tmp_path: Path,
) -> None:
    listed = study().model_dump(mode="json")["variants"]
    lacking = [{**listed[0], "id": f"rs9{j}", "position": 900_000 + j} for j in range(2)]
    more = [{**listed[0], "id": f"rs8{j}", "position": 1000 + j} for j in range(1, 6)]
    home = hospital(tmp_path)
    files = tmp_path / "wide"
    counts = np.random.default_rng(2).integers(0, 3, (N, 7)).astype(np.int8)
    lines = [Line("1", f"v{j}", 1000 + j, "A", "G") for j in range(6)] + [Line("22", "b", 2000, "C", "T")]
    write_bed(files, [f"p{i:03d}" for i in range(N)], lines, counts)
    home.site_toml.write_text(home.site_toml.read_text("utf-8").replace(str(tmp_path / "g"), str(files)), "utf-8")
    folder = home.dataset("main") / "cohorts" / ("cd" * 32)
    account = ingest.freeze(home, home.config(), study(variants=[*listed, *more, lacking[0]]), "cd" * 32)
    assert account.ready and account.variants["absent"] == 1
    stored = np.load(folder / "dosage.npy")
    assert (stored[:, -1] < 0).all() and (stored[:, :-1] >= 0).all()  # never 0 copies
    account = ingest.freeze(home, home.config(), study(variants=[*listed, *lacking]), "cd" * 32)
    assert not account.ready and "2 of 4 variants are not in the files" in account.sentences[0]


def test_families_are_held_out_and_folded_whole_and_whoever_has_none_is_one(tmp_path: Path) -> None:
    home, of = hospital(tmp_path), study(cohort={"family": "litter", "test_fraction": "0.4"})
    path = tmp_path / "phenotypes.csv"
    head, *rows = path.read_text("utf-8").splitlines()
    litter = [f"L{i % 12}" if i < 96 else "NA" for i in range(N)]  # the last 24 patients have no family
    lines = [f"{row},{of_row}" for row, of_row in zip(rows, litter, strict=True)]
    path.write_text("\n".join([f"{head},litter", *lines]) + "\n", "utf-8")
    assert ingest.freeze(home, home.config(), of, "cd" * 32).patients == N
    split = np.load(home.dataset("main") / "cohorts" / ("cd" * 32) / "split.npy")[:, :2]
    kinds = {name: {tuple(row) for row in split[[i for i in range(N) if litter[i] == name]]} for name in set(litter)}
    assert all(len(kinds[f"L{k}"]) == 1 for k in range(12)) and len(kinds["NA"]) > 2
    assert len({next(iter(kinds[f"L{k}"])) for k in range(12)}) > 2


def test_a_published_score_is_computed_from_dosages_and_clamped(tmp_path: Path) -> None:
    score = {"name": "pgs", "weights": [["rs1", "1"], ["rs2", "0.5"]], "mean": "0.8", "sd": "0.2"}
    home, of = hospital(tmp_path), study(scores=[score])
    ingest.freeze(home, home.config(), of, "cd" * 32)
    cohort = StoredCohort(home.dataset("main") / "cohorts" / ("cd" * 32), of)
    x = np.vstack([b.x for b in cohort.blocks("all")])
    counts = np.random.default_rng(1).integers(0, 3, (N, 2))
    raw = counts[1:, 0] + 0.5 * (2 - counts[1:, 1])
    np.testing.assert_allclose(x[1:, 0], np.clip((raw - 0.8) / 0.2, -3, 3))


def test_the_commands_say_what_to_do_next_and_show_what_lies_there(tmp_path: Path) -> None:
    import typer

    home, of = hospital(tmp_path), study()
    place, digest = contracts.hospital(tmp_path / "other", of)
    place.site_toml.write_text(home.site_toml.read_text("utf-8"), "utf-8")
    app = typer.Typer()
    data.register(app)
    runner = CliRunner(env={"SEQUESTER_HOME": str(place.root)})
    frozen = runner.invoke(app, ["data", "freeze", digest[:10]])
    assert frozen.exit_code == 0, frozen.output
    assert f"approve {digest[:12]}" in frozen.output
    shown = json.loads(runner.invoke(app, ["data", "show", "--json"]).output)
    assert shown["cohorts"][0]["study"] == digest and shown["cohorts"][0]["ready"] is True
    (tmp_path / "l").write_text("p001\n", "utf-8")
    assert "version 1" in runner.invoke(app, ["data", "exclude", "--list", str(tmp_path / "l"), "--reason", "x"]).output
