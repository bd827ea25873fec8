"""`data phenotypes`: one source and one definition, to the table that site.toml names, with its flow chart."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from sequester.client.ingest.phenotypes import phecodes
from sequester.client.ingest.phenotypes.definitions import expand
from sequester.client.ingest.phenotypes.derive import derive
from sequester.client.ingest.phenotypes.fhir import Fhir
from sequester.client.ingest.phenotypes.omop import Omop
from sequester.client.ingest.phenotypes.omop_tables import Database, Folder
from sequester.client.ingest.phenotypes.records import Records
from sequester.client.ingest.phenotypes.tables import ids_of, joined, read_table, write_table
from sequester.protocols.definition import Definition
from sequester.protocols.errors import SiteError

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Wish:
    """`source` is `omop:`, `fhir:` or `table:` and a path; after `omop:` also a database URL, or `env:NAME` holding one."""

    source: str
    out: Path
    definition: Definition | None = None
    id: str = ""
    phecode_map: Path | None = None
    join: Sequence[Path] = ()


def produce(wish: Wish, id_column: str) -> dict[str, Any]:
    """Write the table; the account comes back: flow chart, columns, what was left out, and by whose definition."""
    kind, _, where = wish.source.partition(":")
    if kind not in ("omop", "fhir", "table") or not where:
        raise SiteError(
            f"a source of kind `{kind[:20]}`", hint="omop:FOLDER, omop:URL, omop:env:NAME, fhir:FOLDER or table:FILE"
        )
    account: dict[str, Any] = {"format": FORMAT, "source": kind}
    if kind == "table":
        if wish.definition is not None:
            raise SiteError("a table is taken as it is, and a definition was named", hint="leave one of them out")
        table = read_table(_path(where))
        ids = ids_of(_path(where), table, id_column)
        table = table.with_columns(pl.Series(id_column, ids))
        account["flow"] = [["rows of the table", len(ids)]]
    else:
        if wish.definition is None:
            raise SiteError(f"{kind} records need a definition", hint="--definition FILE, or --study DIGEST")
        maps = None if wish.phecode_map is None else phecodes.load(wish.phecode_map)
        expanded = expand(wish.definition, maps)
        records = _records(kind, where, wish, expanded)
        found = derive(records, expanded, id_column)
        table = pl.DataFrame(found.rows, schema=dict.fromkeys(found.names, pl.String), orient="row")
        account |= {
            "definition": wish.definition.digest,
            "phecode_map": None if maps is None else maps.sha256,
            "flow": [list(step) for step in found.flow],
            "columns": found.columns,
            "left_out": found.left_out,
            "unmapped": found.unmapped,
        }
    for path in wish.join:
        table, counts = joined(table, id_column, path)
        account.setdefault("joined", {})[path.name] = counts
    write_table(wish.out, table, account)
    return account


def _records(kind: str, where: str, wish: Wish, expanded: Any) -> Records:
    if kind == "fhir":
        return Fhir(_path(where), wish.id).read(expanded)
    if where.startswith("env:"):  # a password on a command line is seen by every account of the machine
        name = where[4:]
        if name not in os.environ:
            raise SiteError(f"the environment has no {name}", hint="set it to the database's URL")
        where = os.environ[name]
    if "://" not in where:
        return Omop(Folder(Path(where)), wish.id or "person_id").read(expanded)
    database = Database(where)
    try:
        return Omop(database, wish.id or "person_id").read(expanded)
    finally:
        database.close()


def _path(where: str) -> Path:
    if "://" in where:
        raise SiteError(
            "a URL is not a path", hint="records are read from files of this machine; only OMOP from a database"
        )
    return Path(where)
