"""Any JSON where FHIR has another, any bytes where a table or a score should be: an answer or a fault with its place."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phenotypes.generated import facts, fhir_resources
from phenotypes.test_cohorts import DATED
from scoring.hospital import scoring_text
from sequester.client.ingest.phenotypes import phecodes
from sequester.client.ingest.phenotypes.definitions import expand
from sequester.client.ingest.phenotypes.derive import derive
from sequester.client.ingest.phenotypes.fhir import Fhir
from sequester.client.scoring.scoring_file import read
from sequester.protocols.errors import SequesterError

RESOURCES = fhir_resources(facts(6, 8))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("2015-13-01"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**9), JSON, st.booleans())
def test_any_kind_of_value_in_a_resource_is_an_answer_or_a_fault_with_its_line(
    seed: int, value: Any, bundled: bool
) -> None:
    chosen = random.Random(seed)
    resources = json.loads(json.dumps(RESOURCES))
    for _ in range(3):
        victim = chosen.choice(resources)
        *path, last = chosen.choice(places(victim))
        inner = victim
        for key in path:
            inner = inner[key]
        inner[last] = json.loads(json.dumps(value))
        resources = [r for r in resources if isinstance(r, dict)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("a.json" if bundled else "a.ndjson")
        if bundled:
            entries: Any = value if seed % 5 == 0 else [{"resource": r} for r in resources]
            path.write_text(json.dumps({"resourceType": "Bundle", "entry": entries}))
        else:
            path.write_text("".join(json.dumps(r) + "\n" for r in resources))
        expanded = expand(DATED, None)
        try:
            derive(Fhir(path).read(expanded), expanded, "patient")
        except SequesterError as error:
            assert "a." in error.message and "00" not in error.message.replace(
                "a.", ""
            )  # place, and no id of the generator


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(0, 10**9),
    st.binary(max_size=6) | st.sampled_from([b"\t", b"\n", b'"', b"\0", b"1_0", "²".encode(), b"\r"]),
)
def test_random_bytes_in_a_score_or_a_phecode_map_are_an_answer_or_a_fault_of_the_file(seed: int, piece: bytes) -> None:
    rows = [("1", 1000 + j, "A", "G", 0.5, 0.3, "False") for j in range(5)]
    score = scoring_text(rows, more=("allelefrequency_effect", "is_haplotype")).encode()
    codes = b"ICD10,PheCode,Excl. Phecodes\nE11,250.2,249-250.99\nE10,250.1,249-250.99\n"
    with tempfile.TemporaryDirectory() as folder:
        for name, data in (("s.txt", score), ("m.csv", codes)):
            at = seed % len(data)
            path = Path(folder) / name
            path.write_bytes(data[:at] + piece + data[at + seed % 3 :])
            try:
                if name == "s.txt":
                    found = read(path, "GRCh37")
                    assert all(row.position > 0 and set(row.effect) <= set("ACGT") for row in found.rows)
                else:
                    found_map = phecodes.load(path)
                    found_map.codes("250.2")
                    found_map.exclusion("250.2")
            except SequesterError as error:
                assert name in error.message


@pytest.mark.parametrize("data", [b"", b"\x1f\x8b", b"\x1f\x8bnot gzip", b"\xff\xfe", b"#only=a header\n"])
def test_a_file_that_is_no_score_at_all_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "s.txt").write_bytes(data)
    with pytest.raises(SequesterError, match=r"s\.txt"):
        read(tmp_path / "s.txt", "GRCh37")
