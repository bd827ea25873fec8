"""The IWPC warfarin file as sixteen frozen hospitals, for whoever needs real doses of real people."""

from __future__ import annotations

import importlib.util
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

import contracts
from sequester.client.compute.cohort import StoredCohort
from sequester.client.config import Home
from sequester.client.ingest.freeze import freeze
from sequester.protocols.study import Study

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "deploy/examples/warfarin"
SOURCE = (
    Path(os.environ.get("SEQUESTER_DATA", str(ROOT.parent / "shared/data"))) / "iwpc_warfarin/iwpc_subject_data.csv"
)
MISSING = "" if SOURCE.exists() else "SEQUESTER_DATA has no iwpc_warfarin"
EXACT: list[dict[str, Any]] = [
    {"kind": "linear", "name": "fit", "mode": "exact"},
    {"kind": "evaluation", "name": "left_out", "of": "fit", "mode": "exact", "part": "all", "folds": True,
     "error_bound": 400},
]  # fmt: skip


def prepare() -> Any:
    spec = importlib.util.spec_from_file_location("warfarin_prepare", EXAMPLE / "prepare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fields(**changed: Any) -> dict[str, Any]:
    skeleton = YAML(typ="safe").load((EXAMPLE / "study.yaml").read_text("utf-8"))

    def exact(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: exact(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [exact(inner) for inner in value]
        return Decimal(str(value)) if isinstance(value, float) else value

    return {**contracts.fields(), "variants": [], **exact(skeleton), **changed}


def frozen(root: Path, study: Study) -> dict[str, StoredCohort]:
    """The cohorts of `study` by hospital, through the same door as a hospital's own."""
    cohorts = {}
    for name, people in prepare().hospitals(SOURCE).items():
        home = Home(root / name)
        (root / name).mkdir()
        table = [",".join(people[0])] + [",".join(p.values()) for p in people]
        (root / name / "phenotypes.csv").write_text("\n".join(table), "utf-8")
        home.site_toml.write_text(
            f'[site]\nid = "{name}"\n[data]\nphenotypes = "{root / name / "phenotypes.csv"}"\n', "utf-8"
        )
        account = freeze(home, home.config(), study, "ab" * 32)
        assert account.ready and account.patients == len(people)
        cohorts[name] = StoredCohort(home.dataset("main") / "cohorts" / ("ab" * 32), study)
    assert len(cohorts) == 16
    return cohorts
