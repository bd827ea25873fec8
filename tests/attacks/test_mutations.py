"""`tests/mutate.py` itself, and the table of claims: what is named there exists, and a deleted check is noticed."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mutate

TESTS = Path(mutate.__file__).parent
CHECKS = [f"C{i}" for i in range(1, 31)]

HARMLESS = """
import json, sys
from dataclasses import replace
sys.path.insert(0, sys.argv[1])
import mutate
mutant = next(m for m in mutate.all_mutants() if m.check == "C13")
source = (mutate.ROOT / mutant.file).read_text("utf-8")
with mutate.copies(1) as made:
    whole, = mutate.judge([replace(mutant, source=source + "# nothing was deleted")], made, mutate.tests_by_check())
    print(json.dumps(whole.is_well))
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=240, check=False)


def test_every_check_has_a_mutation_and_an_attack_named_after_it() -> None:
    mutants = mutate.all_mutants()  # raises where a numbered line has no mutation, or a named text is gone
    assert {m.check for m in mutants} == set(CHECKS)
    attacks = mutate.tests_by_check()
    assert all(any("attacks" in file for file in attacks.get(check, [])) for check in CHECKS)
    for mutant in mutants:
        ast.parse(mutant.source)
        assert mutant.source != (mutate.ROOT / mutant.file).read_text("utf-8")


@pytest.mark.slow
def test_a_deleted_check_is_noticed_and_a_harmless_change_is_not() -> None:
    deleted = run(str(TESTS / "mutate.py"), "C13", "C18", "--json")
    assert deleted.returncode == 0, deleted.stdout + deleted.stderr
    said = json.loads(deleted.stdout)
    assert {row["check"] for row in said["mutants"]} == {"C13", "C18"}
    assert all(f"test_{row['check']}_" in row["failed"] for row in said["mutants"])
    harmless = run("-c", HARMLESS, str(TESTS))
    assert json.loads(harmless.stdout) is False, harmless.stderr


def test_every_test_that_the_table_of_claims_names_exists() -> None:
    named = re.findall(r"`(\S+\.py)::(test_\w+)`", (TESTS / "README.md").read_text("utf-8"))
    assert len(named) >= 40
    for file, name in named:
        tree = ast.parse((TESTS / file).read_text("utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"
