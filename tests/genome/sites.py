"""A hospital's home around genotype files that lie somewhere, and one call that ingests them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genome.files import quiet
from sequester.client.config import Home
from sequester.client.ingest.genotypes import Choices, ingest


def site(root: Path, genotypes: object, build: str, phenotypes: Path | None = None, policy: str = "") -> Home:
    """A home whose site.toml names these files."""
    home = Home(root)
    root.mkdir(parents=True, exist_ok=True)
    table = f'phenotypes = "{phenotypes}"\n' if phenotypes else ""
    home.site_toml.write_text(
        f'[site]\nid = "north"\n[data]\ngenotypes = "{genotypes}"\nbuild = "{build}"\n{table}[policy]\n{policy}\n',
        "utf-8",
    )
    return home


def ingested(home: Home, **choices: Any) -> dict[str, Any]:
    """The content of the report."""
    return ingest(home, home.config(), Choices(**choices), quiet)
