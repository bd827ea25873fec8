"""`sequester-client data ingest|report|freeze|show|exclude|phenotypes`: from the hospital's files to the cohort a study will use.

Run by hospital IT, before approval. What these commands print stays at the hospital; the consortium learns only whether
the site joins.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from sequester.client.cli.phenotypes import phenotypes
from sequester.client.cli.studies import pick
from sequester.client.config import home as home_of
from sequester.protocols.errors import SiteError

HomeOption = Annotated[
    Path | None, typer.Option("--home", help="The site's folder; default SEQUESTER_HOME, else ~/.sequester.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Answer in JSON, for machines.")]

_REASONS = {
    "in_table": "rows in the table",
    "excluded": "on this site's exclusion list",
    "no_genotypes": "without genotypes",
    "quality": "left out by the quality checks of `data ingest`",
    "no_outcome": "without an outcome",
}


def register(app: typer.Typer) -> None:
    """Add the commands about this site's data."""
    data = typer.Typer(no_args_is_help=True, help="Prepare this site's patients for a study; nothing leaves.")
    data.command("ingest")(ingest)
    data.command("report")(report)
    data.command("freeze")(freeze)
    data.command("show")(show)
    data.command("exclude")(exclude)
    data.command("phenotypes")(phenotypes)
    app.add_typer(data, name="data")


def ingest(
    panel: Annotated[
        Path | None, typer.Option("--panel", help="The consortium's marker panel; default the bundled one.")
    ] = None,
    only: Annotated[
        Literal["all", "panel"],
        typer.Option("--only", help="`panel` keeps the panel's variants only, for biobank files."),
    ] = "all",
    palindromic: Annotated[
        Literal["drop", "strand", "frequency"],
        typer.Option(
            "--palindromic",
            help="A/T and C/G variants: `strand` keeps them where the file's strand is beyond doubt; `frequency` where their "
            "frequencies tell it, which depends on patients: for exact studies only.",
        ),
    ] = "drop",
    min_r2: Annotated[
        float, typer.Option("--min-r2", min=0, max=1, help="Floor on imputation quality (INFO/R2).")
    ] = 0.0,
    keep_filtered: Annotated[
        bool, typer.Option("--keep-filtered", help="Keep VCF rows that failed their FILTER.")
    ] = False,
    case: Annotated[
        str | None, typer.Option("--case", help="Column of the phenotype table (1, 0): missingness by case status.")
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read the genotype files named in site.toml once, check and harmonise them, and write a store and a report.

    A file that was read before is not read again. Running it twice writes the same bytes.
    """
    from sequester.client.compute.genome.source import Reading
    from sequester.client.ingest import genotypes

    place = home_of(home)
    config = place.config()
    choices = genotypes.Choices(panel, only == "panel", palindromic, Reading(keep_filtered, min_r2), case)
    with Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            for name, task in tasks.items():
                if name != what:
                    bar.update(task, visible=False)
            if what not in tasks:
                tasks[what] = bar.add_task(what)
            bar.update(tasks[what], completed=done, total=total)

        content = genotypes.ingest(place, config, choices, progress)
    if as_json:
        typer.echo(json.dumps(content, indent=2))
        return
    _print_account(content)
    typer.echo(f"the whole account: {place.dataset(config.data.id) / 'report' / 'report.html'}")
    typer.echo("next: sequester-client data freeze STUDY")


def report(
    out: Annotated[Path | None, typer.Option("--out", help="Also copy the page to this file.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what the last `data ingest` kept and why: a page for people, or JSON. It stays at this site."""
    place = home_of(home)
    folder = place.dataset(place.config().data.id) / "report"
    try:
        content = json.loads((folder / "report.json").read_text("utf-8"))
        page = (folder / "report.html").read_text("utf-8")
    except (OSError, ValueError):
        raise SiteError("there is no report", hint="`sequester-client data ingest` writes one") from None
    if out is not None:
        try:
            out.write_text(page, "utf-8")
        except OSError as error:
            raise SiteError(f"{out}: {error.strerror}", hint="name a file that can be written") from None
    if as_json:
        typer.echo(json.dumps(content, indent=2))
        return
    _print_account(content)
    typer.echo(f"the page: {out or folder / 'report.html'}; lists of variants: {folder / 'variants'}")


def _print_account(content: dict[str, Any]) -> None:
    typer.echo(content["verdict"]["sentence"])
    counts = {**content["entry_categories"], "absent": content["panel_categories"]["absent"]}
    table = Table("variants", "count", title="kept at this site: these numbers do not leave")
    for name, count in counts.items():
        if count:
            table.add_row(name.replace("_", " "), f"{count:,}")
    for reason, count in content.get("quality", {}).get("people_removed", {}).items():
        if count:
            table.add_row(f"people left out: {reason.replace('_', ' ')}", f"{count:,}")
    Console(highlight=False, markup=False).print(table)
    for sentence in content["next"]:
        typer.echo(sentence)


def freeze(
    study: Annotated[str, typer.Argument(help="The study's digest or its first letters.")],
    consortium: Annotated[str, typer.Option("--consortium", help="Only needed where a digest is in two.")] = "",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read the files named in site.toml, check them, and write the cohort of a study. Comes before `approve`.

    Running it again with the same files writes the same bytes; with other files, approvals given before no longer count.
    """
    from sequester.client.ingest import freeze as ingest

    place = home_of(home)
    found = pick(place, study, consortium)
    account = ingest.freeze(place, place.config(), found.study, found.digest)
    if as_json:
        typer.echo(json.dumps(asdict(account), indent=2))
        return
    table = Table("what", "count", title="kept at this site: these numbers do not leave")
    for name, count in account.counts.items():
        table.add_row(_REASONS.get(name, name.replace("not_", "not ", 1)), str(count))
    table.add_row("patients in the cohort", str(account.patients))
    for name, count in account.variants.items():
        if count:
            table.add_row("variants " + name.replace("_", " "), str(count))
    Console(highlight=False, markup=False).print(table)
    for sentence in account.sentences:
        typer.echo(sentence)
    if account.ready:
        typer.echo(f"ready. next: sequester-client approve {found.digest[:12]}")
    else:
        typer.echo("not ready: this site will answer NOT_READY, without a reason.")


def show(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List the frozen cohorts of this site's data set: study, version, exclusion list, ready or not."""
    place = home_of(home)
    config = place.config()
    rows = []
    for path in sorted((place.dataset(config.data.id) / "cohorts").glob("*/manifest.json")):
        try:
            manifest = json.loads(path.read_text("utf-8"))
            rows.append({key: manifest[key] for key in ("study", "data_set_version", "exclusions_version", "ready")})
        except (OSError, ValueError, KeyError):
            raise SiteError(f"{path} is damaged", hint="freeze that study's cohort again") from None
    if as_json:
        typer.echo(json.dumps({"data_set": config.data.id, "cohorts": rows}, indent=2))
        return
    if not rows:
        typer.echo("No cohort is frozen. `sequester-client data freeze STUDY` makes one.")
        return
    table = Table("study", "data version", "exclusion list", "ready", title=f"data set {config.data.id}")
    for row in rows:
        ready = "yes" if row["ready"] else "no"
        table.add_row(row["study"][:12], row["data_set_version"][:12], str(row["exclusions_version"]), ready)
    Console(highlight=False, markup=False).print(table)


def exclude(
    listed: Annotated[Path, typer.Option("--list", help="A file of patient ids, one a line.")],
    reason: Annotated[str, typer.Option("--reason", help="Kept with the list, at this site.")],
    home: HomeOption = None,
) -> None:
    """Add patients to the exclusion list, as a new version. Applied at every later freeze.

    A cohort that is already frozen is not edited: leave that study with `sequester-client stop`, or freeze and approve again.
    """
    from sequester.client.ingest import freeze as ingest

    place = home_of(home)
    version = ingest.exclude(place, place.config(), listed, reason)
    typer.echo(f"exclusion list version {version}. It applies at the next `data freeze`.")
