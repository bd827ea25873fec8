"""`sequester-client score`: a published score or a study's model over this hospital's patients. Off by default."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from sequester.client.config import home as home_of
from sequester.protocols.errors import SiteError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("score")(score)


def score(
    file: Annotated[Path | None, typer.Argument(help="A PGS Catalog file, or a study's results folder.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="A new folder; what is in it stays at this site.")] = None,
    about: Annotated[bool, typer.Option("--about", help="Say what medical-device law asks, and stop.")] = False,
    min_overlap: Annotated[
        float, typer.Option("--min-overlap", min=0, max=1, help="Least share of the score's variants in the files.")
    ] = 0.75,
    score_rest: Annotated[
        bool, typer.Option("--score-rest", help="Score what is left when rows are haplotypes or interactions.")
    ] = False,
    palindromic: Annotated[
        Literal["drop", "strand"],
        typer.Option("--palindromic", help="`strand` keeps A/T and C/G where the file's strand is beyond doubt."),
    ] = "drop",
    build: Annotated[
        Literal["NCBI36", "GRCh37", "GRCh38"] | None,
        typer.Option("--build", help="The build of a table that does not say its own."),
    ] = None,
    analysis: Annotated[str, typer.Option("--analysis", help="Which model of a results folder.")] = "",
    group: Annotated[
        str, typer.Option("--group", help="The head of this group (ancestry): for its patients, whom --patients names.")
    ] = "",
    frequencies: Annotated[
        str | None,
        typer.Option("--frequencies", help="FILE.afreq of public frequencies, or `cohort`: this site's own."),
    ] = None,
    patients: Annotated[Path | None, typer.Option("--patients", help="Only these ids, one a line.")] = None,
    incidence: Annotated[
        Path | None, typer.Option("--incidence", help="CSV sex,age,incidence,mortality: gives absolute risk.")
    ] = None,
    effect_per_sd: Annotated[str, typer.Option("--effect-per-sd", help="RATIO,LOW,HIGH as published.")] = "",
    years: Annotated[int, typer.Option("--years", min=1, max=80, help="Horizon of the absolute risk.")] = 10,
    age_column: Annotated[str, typer.Option("--age-column", help="Column of the phenotype table.")] = "age",
    sex_column: Annotated[str, typer.Option("--sex-column", help="Column of the phenotype table.")] = "sex",
    home: Annotated[
        Path | None, typer.Option("--home", help="The site's folder; default SEQUESTER_HOME, else ~/.sequester.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer in JSON, for machines.")] = False,
) -> None:
    """Score this hospital's patients, for their physicians. Nothing is sent: what is written stays in the folder named.

    Needs `enabled = true` and a `signer` under `scoring` in site.toml. Every row of the score is matched, or named with
    its reason.
    """
    if about:
        typer.echo((Path(__file__).parents[1] / "scoring" / "README.md").read_text("utf-8"))
        return
    if file is None or out is None:
        raise SiteError("a score and a folder were expected", hint="sequester-client score FILE --out FOLDER")
    place = home_of(home)
    config = place.config()
    from sequester.client.scoring.apply import Wish, apply

    wish = Wish(
        file, out, min_overlap, score_rest, palindromic == "strand", build, analysis, group, frequencies, patients,
        incidence, effect_per_sd, years, age_column, sex_column,
    )  # fmt: skip
    account = apply(place, config, wish, datetime.now(UTC))
    if as_json:
        typer.echo(json.dumps(account, indent=2))
        return
    table = Table("what", "count", title="kept at this site: these numbers do not leave")
    table.add_row("patients scored", f"{account['patients']:,}")
    for reason, count in account["left_out"].items():
        if count:
            table.add_row(f"people left out: {reason.replace('_', ' ')}", f"{count:,}")
    table.add_row("variants of the score", f"{account['rows']:,}")
    table.add_row("of these found here", f"{account['matched']:,} ({account['weight_share']:.1%} of the weight)")
    reasons: dict[str, int] = {}
    for row in [*account["set_aside"], *account["not_found"]]:
        reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
    for reason, count in sorted(reasons.items()):
        table.add_row(f"not used: {reason.replace('_', ' ')}", f"{count:,}")
    if account["by_effect_allele"]:
        table.add_row("matched on the effect allele alone", f"{account['by_effect_allele']:,}")
    Console(highlight=False, markup=False).print(table)
    for sentence in account["not_done"]:
        typer.echo(sentence)
    typer.echo(f"the folder: {out}. Rows that were not used are named in {out / 'account.json'}.")
