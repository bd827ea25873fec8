"""`data ingest`: the genotype files a site names, to its store and a report. Run by the operator; nothing leaves.

Each VCF, BCF or BGEN file is converted once and kept under HOME/datasets/<id>/parts; one that was finished before, by its
SHA-256, is not read again. PLINK files are read where they lie.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sequester.client.compute.genome.harmonise import Palindromic
from sequester.client.compute.genome.source import Reading
from sequester.client.config import ONE_PASS, Home, SiteConfig, genotype_files
from sequester.client.ingest.convert import convert, finished
from sequester.client.ingest.durable import sha256_of
from sequester.client.ingest.freeze import patients_table
from sequester.client.ingest.isolated import Progress, isolated
from sequester.client.ingest.store import Assembled, Given, Order, assemble
from sequester.protocols.errors import SiteError

DEFAULT_READING = Reading()


@dataclass(frozen=True, slots=True)
class Choices:
    """What the operator may choose; every one of them is in the manifest."""

    panel: Path | None = None
    only_panel: bool = False
    palindromic: Palindromic = "drop"
    reading: Reading = DEFAULT_READING
    case_column: str | None = None


def ingest(home: Home, config: SiteConfig, choices: Choices, progress: Progress) -> dict[str, Any]:
    """Write the store and the report of this site's data set; the report's content comes back.

    Files that cannot be used end as a `SiteError`; the report then says so too, and no store is left.
    """
    folder = home.dataset(config.data.id)
    paths = genotype_files(config.data.genotypes)
    parts = folder / "parts"
    given = []
    for path in paths:
        if path.name.endswith(ONE_PASS):
            given.append(_converted(path, parts, choices.reading, progress))
        else:
            given.append(Given(str(path)))
    table, case = _patients(config, choices.case_column)
    order = Order(
        tuple(given), config.data.genotypes or "", config.data.build, choices.panel, choices.only_panel,
        choices.palindromic, None if table is None else tuple(table), case,
    )  # fmt: skip
    made: Assembled = isolated(assemble, order, folder, what="the genotype files", progress=progress)
    if made.problem is not None:
        message, hint = made.problem
        raise SiteError(message, hint=hint)
    for left in parts.glob("*"):
        if left.name not in {Path(g.prefix).parent.name for g in given}:
            shutil.rmtree(left, ignore_errors=True)
    return made.content


def _converted(path: Path, parts: Path, reading: Reading, progress: Progress) -> Given:
    if not path.is_file():
        raise SiteError(f"{path} is not a file", hint="check `genotypes` in site.toml and who may read it")
    progress(f"hashing {path.name}", 0, 1)
    try:
        sha256 = sha256_of(path)
    except OSError as error:
        raise SiteError(f"{path}: {error.strerror}", hint="check who may read it") from None
    target = parts / hashlib.sha256(f"{sha256}{reading}{path.suffix}".encode()).hexdigest()[:32]
    part = finished(target, sha256, reading)
    if part is None:
        part = isolated(convert, path, target, reading, what=path.name, progress=progress)
        if part["sha256"] != sha256:
            raise SiteError(
                f"{path.name} changed while it was read", hint="wait until it is written, and run this again"
            )
    return Given(str(target / "genotypes"), part)


def _patients(config: SiteConfig, case_column: str | None) -> tuple[list[str] | None, dict[str, int] | None]:
    """Ids of the phenotype table, and case status by id from a column of 0 and 1."""
    if config.data.phenotypes is None:
        if case_column:
            raise SiteError("site.toml names no phenotypes", hint="set `phenotypes` under [data]")
        return None, None
    ids, table = patients_table(config)
    if case_column is None:
        return ids, None
    if case_column not in table.columns:
        raise SiteError(
            f"the table has no column `{case_column}`", hint="name the column of cases (1) and controls (0)"
        )
    cells = [cell.strip() for cell in table[case_column].fill_null("").to_list()]
    return ids, {i: int(cell) for i, cell in zip(ids, cells, strict=True) if cell in ("0", "1")}
