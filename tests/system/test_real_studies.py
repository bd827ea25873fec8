"""The examples as a person runs them: real processes, real data, every analysis beside other programs; minutes each.

Short forms in the default suite: `test_every_analysis.py` (real exchange and gates), `oracles/test_warfarin.py` and
`oracles/test_all_on_real_genomes.py` (plain loop).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import real_studies
from examples.compared import Compared

pytestmark = [pytest.mark.nightly, pytest.mark.system, pytest.mark.timeout(1800)]
STUDIES = {"hapmap": ("exact", "time", "count", "private"), "mice": ("cd8", "mch"), "warfarin": ("private", "exact")}


@pytest.mark.parametrize("name", STUDIES)
def test_an_example_ends_with_every_comparison_within_its_tolerance(name: str, tmp_path: Path) -> None:
    if reason := real_studies.missing(name):
        pytest.skip(reason)
    script = str(real_studies.ROOT / "deploy/examples/run.py")
    command = [sys.executable, script, name, "--data", str(real_studies.DATA), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    for study in STUDIES[name]:
        found = json.loads((tmp_path / f"{name}-{study}" / "comparison.json").read_text("utf-8"))["compared"]
        assert found and all(row.pop("within") for row in found)
        real_studies.record(f"real processes, {name}, {study}", [Compared(**row) for row in found])
