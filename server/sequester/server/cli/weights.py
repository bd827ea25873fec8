"""`sequester-server study weights`: a score from released sums and a public panel. Reads files, calls nobody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from sequester.protocols.errors import StudyError
from sequester.server.cli.study import JsonOption, verbs


def register(app: typer.Typer) -> None:
    """Add `weights` to the verbs of `study`."""
    verbs.command("weights")(weights)


def weights(
    folder: Annotated[Path, typer.Argument(help="The folder that `study results` wrote.")],
    of: Annotated[str, typer.Option("--of", help="The scan (association) or one-round score (prs) it is made from.")],
    reference: Annotated[str, typer.Option("--reference", help="A public panel: prefix of .bed, .bim and .fam.")],
    out: Annotated[Path, typer.Option("--out", help="The scoring file (.txt.gz); an existing one is left alone.")],
    as_json: JsonOption = False,
) -> None:
    """Make a score of joint weights (lassosum) from the study's sums and a public panel's linkage; no further round.

    How well it predicts is not known here: name it as a score in a second study, which evaluates it.
    """
    from sequester.server.report.results_folder import read
    from sequester.server.summary.scores import joint

    study, digest, results = read(folder)
    if of not in results["analyses"]:
        raise StudyError(f"no analysis `{of}` in {folder}", hint=f"there are {', '.join(results['analyses'])}")
    with Progress(console=Console(stderr=True), transient=True, disable=as_json) as bar:
        task = bar.add_task("blocks of linkage", total=None)
        score = joint(
            study, digest, of, results["analyses"][of]["result"], reference,
            lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    try:
        with out.open("xb") as file:
            file.write(score.file)
    except OSError as error:
        raise StudyError(f"{out}: {error.strerror}", hint="name a file that does not exist yet") from None
    if as_json:
        typer.echo(json.dumps({"file": str(out)} | score.said, indent=2))
        return
    s = score.said
    typer.echo(
        f"{out}: {s['used']} of {s['variants']} variants have a weight (s {s['s']:g}, lambda {s['lambda']:.3g}); "
        f"{s['matched']} are in the panel of {s['reference_people']} people, {s['not_tested']} were not tested."
    )
    typer.echo("next: name it as a score of a study with an evaluation; how well it predicts is not known yet.")
    if out.parent.resolve() == folder.resolve():
        typer.echo(f"`study results {digest[:12]} --out {folder} --overwrite` names it in the report.")
