"""A small valid study and a hospital's folder around it, for tests about the contract."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from sequester.client.config import Home
from sequester.protocols import privacy
from sequester.protocols.signing import raw_public, sign_document
from sequester.protocols.study import Study, study_json, validated

COORDINATOR = Ed25519PrivateKey.from_private_bytes(bytes([9]) * 32)
SITES = {
    name: Ed25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i, name in enumerate(("harbor", "lake", "north"), 1)
}
PINNED = frozenset(raw_public(key) for key in SITES.values())

FIELDS: dict[str, Any] = {
    "format": 1,
    "consortium": "example",
    "lineage": "risk",
    "title": {"en": "A risk score", "nl": "Een risicoscore"},
    "summary": {"en": "One line.\nAnother line."},
    "question": "Does it predict?",
    "purpose": ["DUO:0000007"],
    "ethics": [{"reference": "vote 1", "expires": "2999-01-01T00:00:00Z"}],
    "agreement": [{"reference": "agreement 1", "expires": "2999-01-01T00:00:00Z"}],
    "contact": "coordinator@example.org",
    "retention_days": 365,
    "phenotype": {"name": "case", "kind": "binary", "values": ["0", "1"]},
    "covariates": [{"name": "age", "kind": "quantitative", "unit": "years", "lower": "20", "upper": "90"}],
    "variants": [
        {"id": "rs1", "chromosome": "1", "position": 1000, "effect": "A", "other": "G", "frequency": "0.2"},
        {"id": "rs2", "chromosome": "22", "position": 2000, "effect": "T", "other": "C", "frequency": "0.4"},
    ],
    "cohort": {"where": ["age >= 20"]},
    "analyses": [
        {"kind": "glm", "name": "score", "rounds": 5, "budget": "0.9", "prevalence": "0.1"},
        {"kind": "evaluation", "name": "held_out", "of": "score", "budget": "0.1"},
    ],
    "privacy": {"epsilon": "3", "delta": "0.000001", "order": "8.9"},
    "n0": 10000,
    "n_max": 12000,
    "aggregation": {"mode": "strict"},
    "sites": [{"id": name, "key": raw_public(key).hex()} for name, key in SITES.items()],
    "bundle": "ab" * 32,
    "expires": "2999-01-01T00:00:00Z",
}


def fields(**changed: Any) -> dict[str, Any]:
    """The study's fields, some replaced; `a__b=value` replaces field b of field a."""
    value = deepcopy(FIELDS)
    for name, new in changed.items():
        *path, last = name.split("__")
        inner: Any = value
        for part in path:
            inner = inner[int(part) if part.isdigit() else part]
        inner[int(last) if last.isdigit() else last] = new
    return value


def study(**changed: Any) -> Study:
    """The study, validated and calibrated as `study sign` does."""
    return validated(study_json(privacy.calibrate(validated(fields(**changed)))))


def exact_study(kind: str = "linear") -> Study:
    """One exact analysis of a quantitative outcome."""
    plan = {"kind": kind, "name": "fit", "mode": "exact"}
    if kind == "glm":
        plan |= {"family": "linear", "solver": "newton", "rounds": 5}
    return study(
        phenotype={"name": "dose", "kind": "quantitative", "lower": "1", "upper": "100"},
        analyses=[plan],
        aggregation={"mode": "strict", "ring_bits": 64, "fraction_bits": 28},
    )


def hospital(root: Path, of: Study, site: str = "north", policy: str = "") -> tuple[Home, str]:
    """A hospital enrolled in `example`, all peers pinned, the study published to it; and the study's digest."""
    home = Home(root)
    folder = home.consortium("example")
    (folder / "studies").mkdir(parents=True)
    home.site_toml.write_text(f'[site]\nid = "{site}"\n[policy]\n{policy}\n', "utf-8")
    (folder / "identity.key").write_bytes(SITES[site].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (folder / "coordinator.pub").write_text(raw_public(COORDINATOR).hex(), "ascii")
    digest = privacy.study_digest(of)
    (folder / "studies" / f"{digest}.json").write_bytes(sign_document("study", study_json(of), COORDINATOR))
    return home, digest


def freeze(home: Home, digest: str, version: str = "11" * 32, exclusions: int = 0, ready: bool = True) -> None:
    """A frozen cohort's manifest, as ingest leaves it for the gate."""
    folder = home.dataset("main") / "cohorts" / digest
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {"data_set": "main", "data_set_version": version, "exclusions_version": exclusions, "ready": ready}
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
