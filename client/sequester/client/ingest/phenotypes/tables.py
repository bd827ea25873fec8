"""The one table all sources end in: one row per patient, every cell text, CSV, TSV or Parquet by its extension.

Cells are read as text first, so that leading zeros of ids survive; the study's declaration gives them types at the freeze.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from sequester.client.ingest.durable import sync
from sequester.protocols.errors import SiteError

MISSING_TEXT = frozenset({"", "NA", "NaN", "NULL", "."})


def read_table(path: Path) -> pl.DataFrame:
    """All columns as text; a file that is not a table is a `SiteError` with its line."""
    try:
        if path.suffix == ".parquet":
            return pl.read_parquet(path).cast(pl.String)
        separator = "\t" if path.suffix in (".tsv", ".txt") else ","
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=separator, strict=True)
            header = next(reader, [])
            body = []
            for number, line in enumerate(reader, 2):
                if len(line) != len(header):
                    raise SiteError(
                        f"{path.name} line {number}: {len(line)} columns, {len(header)} were expected",
                        hint="quote cells that hold the separator, or export the table again",
                    )
                body.append(line)
        return pl.DataFrame(body, schema=dict.fromkeys(header, pl.String), orient="row")
    except OSError as error:
        raise SiteError(
            f"{path}: {error.strerror}", hint="check `phenotypes` in site.toml and who may read it"
        ) from None
    except (UnicodeDecodeError, csv.Error, pl.exceptions.PolarsError) as error:
        raise SiteError(
            f"{path.name} is not a table: {str(error).splitlines()[0]}", hint="CSV, TSV or Parquet, UTF-8"
        ) from None


def ids_of(path: Path, table: pl.DataFrame, id_column: str) -> list[str]:
    """The ids of a table, trimmed; one row each or a `SiteError` with row numbers."""
    if id_column not in table.columns:
        raise SiteError(
            f"{path.name} has no column `{id_column}` among its {len(table.columns)}",
            hint="set `id_column` under [data]: the patient's id",
        )
    ids = [i.strip() for i in table[id_column].fill_null("").to_list()]
    one_row_each(id_column, ids)
    return ids


def one_row_each(id_column: str, ids: Sequence[str]) -> None:
    """Refuse a row without an id, and two rows of one patient, by their numbers."""
    seen: dict[str, int] = {}
    for number, i in enumerate(ids, 2):
        if not i:
            raise SiteError(f"row {number} of the table has no `{id_column}`", hint="every patient has an id")
        if i in seen:
            raise SiteError(
                f"rows {seen[i]} and {number} of the table are the same patient",
                hint="one row a patient: merge the visits before ingest",
            )
        seen[i] = number


def joined(table: pl.DataFrame, id_column: str, path: Path) -> tuple[pl.DataFrame, dict[str, int]]:
    """The table with the columns of another file, and how many patients are in one of the two only."""
    other = read_table(path)
    ids = ids_of(path, other, id_column)
    twice = sorted((set(table.columns) & set(other.columns)) - {id_column})
    if twice:
        raise SiteError(f"{path.name} has the column `{twice[0]}`, which is there already", hint="rename one of them")
    place = {i: row for row, i in enumerate(ids)}
    rows = [place.get(i) for i in table[id_column].to_list()]
    both = sum(row is not None for row in rows)
    if both < 0.5 * min(len(rows), len(ids)):
        raise SiteError(
            f"{both} of {len(rows)} patients are among the {len(ids)} of {path.name}",
            hint=f"is `{id_column}` the same id in both?",
        )
    added = [
        pl.Series(name, [None if row is None else cells[row] for row in rows], dtype=pl.String)
        for name in other.columns
        if name != id_column
        for cells in [other[name].to_list()]
    ]
    return table.with_columns(added), {"in both": both, "only here": len(rows) - both, "only there": len(ids) - both}


def write_table(path: Path, table: pl.DataFrame, account: dict[str, Any]) -> None:
    """The table, readable by its owner only, and beside it `<name>.flow.json`; each whole or not at all."""
    if path.suffix not in (".parquet", ".csv", ".tsv"):
        raise SiteError(f"{path.name}: not a kind of table", hint="name it .parquet, .csv or .tsv")
    temporary = path.with_name(f".{path.name}.new")
    flow = path.with_name(path.name + ".flow.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
        if path.suffix == ".parquet":
            table.write_parquet(temporary)
        else:
            table.write_csv(temporary, separator="\t" if path.suffix == ".tsv" else ",")
        sync(temporary)
        temporary.replace(path)
        flow.write_text(json.dumps(account, indent=1) + "\n", "utf-8")
        flow.chmod(0o600)
    except OSError as error:
        raise SiteError(f"{path}: {error.strerror}", hint="name a file that can be written") from None
    finally:
        temporary.unlink(missing_ok=True)
