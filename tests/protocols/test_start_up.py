"""Commands start light: what takes long to load is loaded by the command that uses it."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("scipy", "dp_accounting", "torch", "opacus", "flwr", "grpc", "matplotlib", "polars", "pandas", "sklearn")


@pytest.mark.parametrize("app", ["sequester.client.cli.app", "sequester.server.cli.app"])
def test_a_command_line_loads_nothing_heavy_before_it_knows_its_verb(app: str) -> None:
    program = f"import sys, {app}; print(*sorted({{m.split('.')[0] for m in sys.modules}} & set({HEAVY!r})))"
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    heavy = set(said.stdout.split())
    assert heavy == set()


def test_a_compute_process_for_a_linear_model_loads_neither_torch_nor_opacus() -> None:
    program = (
        "import sys, sequester.client.compute.worker; print(*{'torch', 'opacus', 'grpc', 'flwr'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    assert said.stdout.split() == []
