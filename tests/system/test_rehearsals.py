"""Whole rehearsals, as a coordinator types them: through the real processes, on made-up people and on given files."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from genome.files import needs_data
from genome.test_several import PANELS
from lowlands import SERVER
from sequester.one_machine.consortium import edited
from sequester.one_machine.processes import environment, python
from sequester.protocols.signing import open_document
from sequester.server.cli.study import templates

pytestmark = [pytest.mark.system, pytest.mark.timeout(7200)]
SITES = [{"id": name, "key": f"{i:064x}"} for i, name in enumerate(("harbor", "lake", "north"), 1)]


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short name: sockets lie below it."""
    return tmp_path_factory.mktemp("r")


def rehearsed(folder: Path, text: str, *words: str) -> dict[str, Any]:
    """rehearsal.json of the study, rehearsed in `folder`; what a real hospital or consortium has lies in no reach of it."""
    path, home = folder / "study.yaml", folder / "elsewhere"
    path.write_text(text, "utf-8")
    home.mkdir()
    env = environment() | {
        "SEQUESTER_HOME": str(home),
        "SEQUESTER_SERVER_HOME": str(home),
        "HOME": str(home),
        "TMPDIR": str(folder),
    }
    command = python("-m", SERVER, "study", "rehearse", str(path), "--out", str(folder / "out"), "--json", *words)
    ran = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=7000, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    said: dict[str, Any] = json.loads(ran.stdout)  # and nothing else stands on standard output
    assert said == json.loads((folder / "out" / "rehearsal.json").read_text("utf-8"))
    assert "4 of 4 hospitals standing" in ran.stderr or "3 of 3 hospitals standing" in ran.stderr  # progress is shown
    assert {path.name for path in home.iterdir()} <= {".cache", ".config"}  # matplotlib's; no ledger, no key
    assert not list(folder.glob("rehearsal-*")), "the working folder stayed"
    return said


@pytest.mark.nightly
def test_a_study_is_rehearsed_on_made_up_people_and_says_what_it_is_worth_and_costs(folder: Path) -> None:
    said = rehearsed(folder, edited(templates()["recipe-gradient"], {"sites": SITES}), "--people", "900", "--seed", "3")
    out = folder / "out"
    signed = open_document((out / "study.json").read_bytes(), "study", None).body
    assert signed["rehearsal"] is True and signed["consortium"] == "rehearsal" and signed["n0"] == 720
    assert {site["key"] for site in signed["sites"]}.isdisjoint(site["key"] for site in SITES)
    for page in ("report.html", "rehearsal.html"):
        assert "REHEARSAL" in (out / page).read_text("utf-8")
    (model,) = said["models"]
    assert model["measure"] == "AUC" and 0.5 < model["private"] < 1 and model["people"] == 5000
    assert said["epsilon"]["if_real"]["pld"] == pytest.approx(said["plan"]["promise"]["pld"])
    assert said["plan"]["promise"]["filter"] == pytest.approx(3, abs=1e-5) and said["rounds"] == 11
    for row in said["hospitals"].values():
        assert 270 < row["people_in_cohort"] <= 300
        # what left in masked sums is what the plan announced without its spares, and the frames' own bytes
        announced = sum(a["bytes_a_round"] * a["rounds"] for a in said["plan"]["analyses"])
        assert announced < row["bytes_sent"]["MaskedInput"] < announced * 1.1 + 3000
    assert said["people_at_several_hospitals"] is None and said["objections_of_a_default_policy"] == []


@needs_data
@pytest.mark.nightly
def test_a_rehearsal_on_both_panels_reads_the_old_build_and_finds_the_564_people_who_are_in_both(
    folder: Path,
) -> None:
    rng = np.random.default_rng(1)
    for build, prefix in PANELS.items():
        files = folder / build
        files.mkdir()
        for suffix in (".bed", ".bim", ".fam"):
            (files / f"genotypes{suffix}").symlink_to(prefix.with_name(prefix.name + suffix))
        people = [line.split()[1] for line in (files / "genotypes.fam").read_text("utf-8").splitlines()]
        table = ["patient,case,age,sex"]
        table += [f"{name},{int(rng.random() < 0.2)},{rng.integers(25, 85)},{rng.integers(0, 2)}" for name in people]
        (files / "phenotypes.csv").write_text("\n".join(table) + "\n", "utf-8")
    variants = []
    for line in (folder / "GRCh37" / "genotypes.bim").read_text("utf-8").splitlines()[::1500]:
        chromosome, name, _, position, counted, other = line.split()
        if {counted, other} not in ({"A", "T"}, {"C", "G"}):
            variants.append({"id": name, "chromosome": chromosome, "position": int(position), "effect": counted, "other": other,
                             "frequency": "0.3"})  # fmt: skip
    text = edited(templates()["risk-score"], {"sites": SITES, "genome_build": "GRCh37", "variants": variants, "n0": 2500,
                                              "n_max": 4000})  # fmt: skip
    said = rehearsed(
        folder, text, "--data", f"harbor={folder / 'NCBI36'}", "--build", "harbor=NCBI36",
        "--data", f"lake={folder / 'GRCh37'}", "--size", "north=400",
    )  # fmt: skip
    assert said["people_at_several_hospitals"] == {"people": 564, "pairs": {"harbor, lake": 564}}
    assert said["hospitals"]["harbor"]["data"] == str(folder / "NCBI36")
    cohorts = {name: row["people_in_cohort"] for name, row in said["hospitals"].items()}
    assert 800 < cohorts["harbor"] < 957 and cohorts["lake"] > 1000 and cohorts["north"] > 380  # relatives are left out
    assert "564 people stand at more than one hospital" in (folder / "out" / "rehearsal.html").read_text("utf-8")


def test_a_rehearsal_that_is_told_to_stop_ends_everything_and_leaves_no_folder(folder: Path) -> None:
    path = folder / "study.yaml"
    path.write_text(edited(templates()["risk-score"], {"sites": SITES}), "utf-8")
    command = python("-m", SERVER, "study", "rehearse", str(path), "--out", str(folder / "out"), "--people", "150")
    env = environment() | {"TMPDIR": str(folder)}
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    deadline = time.monotonic() + 120
    while not (family := psutil.Process(started.pid).children(recursive=True)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert family, "it started nothing"
    started.send_signal(signal.SIGTERM)
    text, _ = started.communicate(timeout=120)
    assert started.returncode == 130 and "interrupted" in text and "Traceback" not in text, text
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert {p.name for p in folder.iterdir()} == {"study.yaml"}
