"""The committed vectors: ours still, and right in the eyes of a reader that shares no code with us."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vectors import make_secagg, read_secagg

HERE = make_secagg.FOLDER.parents[1]
READER = HERE / "read_secagg.py"
VERSIONS = sorted(
    path for path in make_secagg.FOLDER.parent.iterdir() if path.is_dir()
)  # each release replays them all


def read(folder: Path) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run([sys.executable, READER, folder], capture_output=True, text=True, env=clean, check=False)


def test_our_code_still_makes_the_same_vectors() -> None:
    made = make_secagg.vectors()
    assert {path.name for path in make_secagg.FOLDER.glob("*.json")} == set(made)
    for name, text in made.items():
        assert (make_secagg.FOLDER / name).read_text("utf-8") == text, name


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda path: path.name)
def test_the_independent_reader_agrees_with_every_vector(folder: Path) -> None:
    told = read(folder)
    assert told.returncode == 0, told.stdout + told.stderr
    n, of = [int(word) for word in told.stdout.split() if word.isdigit()]
    assert n == of > 150


def test_the_reader_is_short_and_imports_nothing_of_ours() -> None:
    lines = [
        line for line in READER.read_text("utf-8").splitlines() if line.strip() and not line.strip().startswith("#")
    ]
    assert len(lines) < 150
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    assert imports and not any("sequester" in line or "cryptography" in line for line in imports)


def agrees(folder: Path) -> bool:
    try:
        return all(read_secagg.check(folder))
    except ValueError:  # a tag that does not verify
        return False


def _changed(value: Any) -> Any:
    """The value with its first leaf off by one."""
    if isinstance(value, dict):
        key = next(iter(value))
        return {**value, key: _changed(value[key])}
    if isinstance(value, list):
        return [_changed(value[0]), *value[1:]]
    if isinstance(value, str):
        return ("1" if value[:1] == "0" else "0") + value[1:]
    return value + 1


@pytest.mark.parametrize(
    ("name", "field"),
    [("encoding", "good"), ("keys", "session_id"), ("keys", "roster_hash"), ("keys", "pairs"), ("keys", "ctx"),
     ("keys", "mask_keys"), ("keys", "seal"), ("keys", "survivors"), ("shamir", "good"), ("masks", "plus"),
     ("codec", "good"), ("transcript", "inputs"), ("transcript", "answers"), ("transcript", "sum"),
     ("transcript", "acks")],
)  # fmt: skip
def test_the_reader_rejects_vectors_with_a_wrong_value(name: str, field: str, tmp_path: Path) -> None:
    for path in make_secagg.FOLDER.glob("*.json"):
        value = json.loads(path.read_text("utf-8"))
        if path.stem == name:
            target = value[field]
            # of a list of rows the first one changes, in a field that is checked
            value[field] = _changed(target[1:]) if name == "encoding" else _changed(target)
        (tmp_path / path.name).write_text(json.dumps(value), "utf-8")
    assert not agrees(tmp_path)
