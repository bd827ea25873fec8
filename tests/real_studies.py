"""The studies of `deploy/examples` on hospitals made of public data, for whoever runs them by another way than its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

import plain_loop
from examples import run
from examples.compared import Compared, lines
from examples.ran import Ran
from examples.second_opinions import of_study
from oracles import table
from sequester.client.compute.cohort import StoredCohort
from sequester.client.config import Home
from sequester.client.ingest.freeze import freeze
from sequester.one_machine.consortium import Site, edited
from sequester.protocols import privacy
from sequester.protocols.study import Study, read_study
from sequester.server.cli.study import templates

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("SEQUESTER_DATA", str(ROOT.parent / "shared/data")))
DIGEST = "ab" * 32


def missing(name: str) -> str:
    """Why an example cannot run here, "" where it can."""
    return "" if (DATA / run.EXAMPLES[name].source).exists() else f"SEQUESTER_DATA has no data for {name}"


def prepared(name: str, folder: Path, *words: str) -> tuple[list[Site], Mapping[str, Mapping[str, Any]]]:
    """The hospitals that `prepare.py` writes into a folder, and the fields of the studies on them."""
    example = run.EXAMPLES[name]
    script = [sys.executable, str(ROOT / "deploy/examples" / name / "prepare.py")]
    command = [*script, str(DATA / example.source), str(folder), *words]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    sites = run.largest(folder, 5, example.build)
    skeleton = YAML().load((folder / "study.yaml").read_text("utf-8"))
    return sites, example.studies(skeleton, folder, sum(run.patients(site.phenotypes) for site in sites))


def study_of(name: str, sites: list[Site], fields: Mapping[str, Any]) -> Study:
    """What `study new` and `study sign` make of the fields, with keys that nobody holds."""
    keys = [{"id": site.name, "key": f"{i:064x}"} for i, site in enumerate(sites, 1)]
    text = edited(templates()[run.EXAMPLES[name].template], {**fields, "sites": keys})
    study = privacy.calibrate(read_study(text))
    privacy.check_headroom(study)
    return study


def in_a_plain_loop(name: str, folder: Path, study: Study, sites: list[Site]) -> Ran:
    """The study run without exchange or gates, on cohorts that were frozen through the hospitals' own door."""
    stores = {}
    for site in sites:
        home = Home(folder / f"home-{study.lineage}-{site.name}")
        home.root.mkdir()
        home.site_toml.write_text(site.toml(), "utf-8")
        assert freeze(home, home.config(), study, DIGEST).ready
        stores[site.name] = home.dataset("main") / "cohorts" / DIGEST
    cohorts = [StoredCohort(path, study) for path in stores.values()]
    finished = plain_loop.run(study, cohorts, fixed_point=True)
    # as the exchange writes it and a coordinator reads it: plain JSON
    text = json.dumps({"analyses": {key: {"result": done.result} for key, done in finished.items()}}, allow_nan=False)
    return ran(name, study, json.loads(text), stores, sites, folder)


def ran(
    name: str, study: Study, results: Mapping[str, Any], stores: Mapping[str, Path], sites: list[Site], folder: Path
) -> Ran:
    """What second opinions ask of a study that ended."""
    prefix = run.EXAMPLES[name].genotypes
    tables = {site.name: site.phenotypes for site in sites}
    return Ran(study, results, stores, tables, DATA / prefix if prefix else None, folder / "plink")


def check(name: str, study_name: str, of: Ran) -> None:
    """Every comparison of the example must be within its tolerance."""
    rows = [row for row in [*of_study(of), *run.EXAMPLES[name].findings(study_name, of)] if isinstance(row, Compared)]
    assert len(rows) > 10
    outside = [row for row in rows if not row.is_within]
    assert not outside, "\n".join(lines(outside))


def record(where: str, rows: list[Compared]) -> None:
    """Into the table of `python -m oracles.table`; the first that is beyond its tolerance fails."""
    for row in rows:
        table.within(f"{where}: {row.analysis}", row.oracle, row.quantity, row.difference, row.tolerance)
