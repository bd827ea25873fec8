"""The genotypes a cohort is frozen from: the store that `data ingest` wrote, or PLINK files where they lie.

A store's build was confirmed when it was made, so a study in another build can be answered through its panel, for the
variants that the panel lists in both. PLINK files without a store are taken as declared, unless the bundled panel
recognises another build in them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sequester.client.compute.genome.build import ROWS, evidence
from sequester.client.compute.genome.harmonise import Wanted, in_build
from sequester.client.compute.genome.harmonise import of_study as wanted_of
from sequester.client.compute.genome.panel import Build, load
from sequester.client.compute.genome.plink import PlinkFiles
from sequester.client.config import ONE_PASS, Home, SiteConfig, genotype_files
from sequester.client.ingest.durable import sha256_of
from sequester.protocols.errors import SiteError
from sequester.protocols.study import Study

_AGAIN = "run `sequester-client data ingest` again"


@dataclass(frozen=True, slots=True)
class Genotypes:
    """Open files, the study's variants at their places in them, and rows of people whom quality checks left out."""

    files: PlinkFiles
    wanted: Wanted
    removed: frozenset[int] = frozenset()
    palindromic: str = "drop"
    panel: Path | None = None  # the store's own; None is the bundled one


def of_study(home: Home, config: SiteConfig, study: Study) -> Genotypes:
    """The genotypes for a study's variants; refuses a build that does not fit and a store whose bytes changed."""
    found = of_variants(home, config, wanted_of(study.variants), study.genome_build, "the study")
    if found.palindromic == "frequency" and any(plan.mode == "private" for plan in study.analyses):
        raise SiteError(
            "the genotype store keeps A/T and C/G variants by their frequencies, and the study has a private analysis",
            hint="that choice depends on patients: ingest with `--palindromic drop` or `strand`",
        )
    return found


def of_variants(home: Home, config: SiteConfig, wanted: Wanted, build: Build, what: str) -> Genotypes:
    """The genotypes for variants of a list in `build`; `what` lists them, in words."""
    named = config.data.genotypes
    if not named:
        raise SiteError(f"{what} uses variants and site.toml names no genotypes", hint="set `genotypes` under [data]")
    store = home.dataset(config.data.id) / "genotypes"
    if (store / "manifest.json").exists():
        manifest = _manifest(store, config)
        own = next(iter(sorted(store.glob("panel.tsv*"))), None)
        removed = json.loads((store / "removed.json").read_text("utf-8"))
        return Genotypes(
            PlinkFiles(str(store / "genotypes")),
            in_build(wanted, build, load(own), manifest["build"]),
            frozenset(row for rows in removed.values() for row in rows),
            manifest["palindromic"],
            own,
        )
    if config.data.build != build:
        raise SiteError(
            f"{what} is in {build}, site.toml declares {config.data.build}",
            hint="`sequester-client data ingest` first, if the panel carries both builds; or lift the files over and "
            "declare their new build; nothing is lifted silently",
        )
    paths = genotype_files(named)
    if len(paths) > 1 or paths[0].name.endswith(ONE_PASS):
        raise SiteError(
            f"{named} was not ingested", hint="`sequester-client data ingest` reads such files once, then freeze"
        )
    files = PlinkFiles(str(paths[0]))
    if len(files.variants) < ROWS:  # too few for any evidence
        return Genotypes(files, wanted)
    found = evidence(files.variants, load())
    if found.build not in (None, config.data.build):
        raise SiteError(
            f"these files are in {found.build}, site.toml declares {config.data.build}: {found.words()}",
            hint=f'set `build = "{found.build}"` under [data] if that is so; nothing is lifted silently',
        )
    return Genotypes(files, wanted)


def _manifest(store: Path, config: SiteConfig) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((store / "manifest.json").read_text("utf-8"))
        files, of, build = manifest["files"], manifest["genotypes"], manifest["build"]
    except (OSError, ValueError, KeyError):
        raise SiteError("the manifest of the genotype store is damaged", hint=_AGAIN) from None
    if (of, build) != (config.data.genotypes, config.data.build):
        raise SiteError(
            f"the genotype store was made from {of} ({build}); site.toml names {config.data.genotypes} "
            f"({config.data.build})",
            hint=_AGAIN,
        )
    for name, expected in files.items():
        if not (store / name).is_file() or sha256_of(store / name) != expected:
            raise SiteError(f"{name} of the genotype store changed since it was written", hint=_AGAIN)
    return manifest
