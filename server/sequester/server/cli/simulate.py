"""`sequester-server simulate`: made-up hospitals with a known truth, for rehearsals, training of staff and tests.

Needs the extra `simulate` (msprime). No person in it is real; nothing is sent anywhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sequester.protocols.errors import StudyError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("simulate")(simulate)


def simulate(
    folder: Annotated[Path, typer.Argument(help="A new folder; each hospital's files go into one of its own.")],
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed writes the same bytes.")] = 7,
    people: Annotated[int, typer.Option("--people", min=200, help="In all hospitals together.")] = 2000,
    chromosomes: Annotated[int, typer.Option("--chromosomes", min=1, max=22, help="How many.")] = 10,
    length_kb: Annotated[int, typer.Option("--length-kb", min=50, max=10_000, help="Of each chromosome.")] = 200,
    causal: Annotated[int, typer.Option("--causal", min=1, help="Variants that change the risk.")] = 60,
    prevalence: Annotated[
        float, typer.Option("--prevalence", min=0.001, max=0.5, help="Share of people who are cases.")
    ] = 0.15,
    rough: Annotated[
        bool,
        typer.Option("--rough", help="Files as real ones are: VCF and PLINK, repeated rows and people, another build."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer in JSON, for machines.")] = False,
) -> None:
    """Write five made-up hospitals of three ancestries: genotypes, phenotypes, survival times, and the truth apart."""
    try:
        import msprime  # noqa: F401
    except ImportError:
        raise StudyError("msprime is not installed", hint="pip install 'sequester[simulate]'") from None
    from sequester.simulate.hospitals import HOSPITALS, ROUGH, hospitals

    if folder.exists() and any(folder.iterdir()):
        raise StudyError(f"{folder} is not empty", hint="name a new folder: nothing is written over")
    with Console(stderr=True).status("simulating genomes"):
        made = hospitals(
            seed, folder, ROUGH if rough else HOSPITALS, people, chromosomes=chromosomes, length_bp=length_kb * 1000,
            causal=causal, prevalence=prevalence, rough=rough,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "people": made.people, "variants": len(made.study["variants"])}))
        return
    table = Table("hospital", "people", title=f"seed {seed}: no person is real")
    for name, count in made.people.items():
        table.add_row(name, f"{count:,}")
    Console(highlight=False, markup=False).print(table)
    typer.echo(f"the public part of a study: {folder / 'study.json'}; a marker panel: {folder / 'panel.tsv'}")
    typer.echo(f"the truth, which no hospital reads: {folder / 'truth'}")
