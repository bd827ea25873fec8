"""`run`, `status`, `stop`, `answer`: the site at work."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sequester.client.config import home as home_of

HomeOption = Annotated[
    Path | None, typer.Option("--home", help="The site's folder; default SEQUESTER_HOME, else ~/.sequester.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Answer in JSON, for machines.")]


def register(app: typer.Typer) -> None:
    """Add the commands of a running site."""
    app.command("run")(run)
    app.command("status")(status)
    app.command("stop")(stop)
    app.command("answer")(answer)


def run(
    units: Annotated[
        bool, typer.Option("--units", help="SuperNode and executor run as units of their own (deploy/systemd).")
    ] = False,
    home: HomeOption = None,
) -> None:
    """Run this site: gate, SuperNode and executor, until SIGTERM. Log lines are JSON on standard error.

    The gate takes up studies that were under way, waits for new ones that you approved, and refuses all others.
    """
    from sequester.client.gate.serve import serve

    asyncio.run(serve(home_of(home), units))


def status(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Show the studies that run here now: state, step, rounds, bytes that left."""
    rows = _ask(home, {"ask": "status"})["studies"]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("study", "consortium", "state", "analysis", "rounds", "bytes up")
    for row in rows:
        said = (str(row[key]) for key in ("consortium", "state", "analysis", "rounds", "bytes_up"))
        table.add_row(str(row["study"])[:12], *said)
    Console().print(table if rows else "No study runs here now.")


def stop(
    study: Annotated[str, typer.Argument(help="The study's digest or its first letters.")], home: HomeOption = None
) -> None:
    """Leave a running study for good, at once: compute ends, the session's keys are erased, the charge stays."""
    typer.echo(_ask(home, {"ask": "withdraw", "study": study})["said"])


def answer(
    study: Annotated[str, typer.Argument(help="The study's digest or its first letters.")],
    yes: Annotated[bool, typer.Option("--yes/--no", help="Let the held round go out, or refuse it.")],
    home: HomeOption = None,
) -> None:
    """Answer a round that your policy holds for a person. You decide on plan, sizes and charges, never on values."""
    typer.echo(_ask(home, {"ask": "answer", "study": study, "yes": yes})["said"])


def _ask(home: Path | None, request: dict[str, Any]) -> dict[str, Any]:
    from sequester.client.gate.control import ask

    return ask(home_of(home).run / "gate.sock", request)
