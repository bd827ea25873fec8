"""`sequester-client data phenotypes`: from a table, OMOP or FHIR records to one row per patient. Nothing leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sequester.client.config import home as home_of
from sequester.protocols.errors import StudyError


def phenotypes(
    source: Annotated[
        str, typer.Option("--source", help="omop:FOLDER, omop:URL, omop:env:NAME, fhir:FOLDER or table:FILE.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The table to write: .parquet, .csv or .tsv.")],
    definition: Annotated[Path | None, typer.Option("--definition", help="A definition, JSON.")] = None,
    study: Annotated[str, typer.Option("--study", help="Take the definition of this signed study.")] = "",
    consortium: Annotated[str, typer.Option("--consortium", help="Only needed where a digest is in two.")] = "",
    id: Annotated[
        str,
        typer.Option("--id", help="The patient's id: a column of OMOP's person, or the system of a FHIR identifier."),
    ] = "",
    phecode_map: Annotated[
        Path | None, typer.Option("--phecode-map", help="The public table from ICD to phecode.")
    ] = None,
    join: Annotated[
        list[Path] | None, typer.Option("--join", help="Add the columns of this table (lifestyle, wearables).")
    ] = None,
    home: Annotated[
        Path | None, typer.Option("--home", help="The site's folder; default SEQUESTER_HOME, else ~/.sequester.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer in JSON, for machines.")] = False,
) -> None:
    """Derive phenotypes and covariates from records, one row per patient, and show how many people each step leaves.

    Then name the table in site.toml (`phenotypes` under `data`) and freeze.
    """
    from sequester.client.cli.studies import pick
    from sequester.client.ingest.phenotypes import definitions
    from sequester.client.ingest.phenotypes.produce import Wish, produce

    place = home_of(home)
    config = place.config()
    wanted = None if definition is None else definitions.read(definition)
    if study:
        found = pick(place, study, consortium)
        if wanted is not None or found.study.definition is None:
            raise StudyError(
                f"study {found.digest[:12]} carries no definition"
                if wanted is None
                else "a definition and a study are named",
                hint="name one of them",
            )
        wanted = found.study.definition
    account = produce(Wish(source, out, wanted, id, phecode_map, tuple(join or ())), config.data.id_column)
    if as_json:
        typer.echo(json.dumps(account, indent=2))
        return
    _print(account)
    typer.echo(f"the table: {out}; these numbers: {out}.flow.json")
    typer.echo(f'next: `phenotypes = "{out}"` under [data] in site.toml, then sequester-client data freeze STUDY')


def _print(account: dict[str, Any]) -> None:
    console = Console(highlight=False, markup=False)
    table = Table("step", "people left", "left here", title="kept at this site: these numbers do not leave")
    before = None
    for name, count in account["flow"]:
        table.add_row(name, f"{count:,}", "" if before is None else f"{before - count:,}")
        before = count
    console.print(table)
    if account.get("columns"):
        columns = Table("column", "values")
        for name, counts in account["columns"].items():
            columns.add_row(name, ", ".join(f"{value}: {n:,}" for value, n in counts.items()))
        console.print(columns)
    for title, key in (("records that do not count", "left_out"), ("codes of systems without a map", "unmapped")):
        if account.get(key):
            left = Table(title, "count")
            for name, count in account[key].items():
                left.add_row(name, f"{count:,}")
            console.print(left)
    for name, counts in account.get("joined", {}).items():
        console.print(f"{name}: " + ", ".join(f"{n:,} {what}" for what, n in counts.items()))
