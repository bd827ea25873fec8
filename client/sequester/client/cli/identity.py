"""`enrol`, `peers`: this hospital joins a consortium, and learns who the others are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sequester.client.config import Home
from sequester.client.config import home as home_of
from sequester.protocols.errors import SiteError
from sequester.protocols.signing import raw_public, spoken

HomeOption = Annotated[
    Path | None, typer.Option("--home", help="The site's folder; default SEQUESTER_HOME, else ~/.sequester.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Answer in JSON, for machines.")]
ConsortiumOption = Annotated[str, typer.Option("--consortium", help="Needed where this site belongs to several.")]
SiteArgument = Annotated[str, typer.Argument(help="The other hospital's name.")]


def register(app: typer.Typer) -> None:
    """Add the commands about who this hospital is and who the others are."""
    app.command("enrol")(enrol)
    peers = typer.Typer(
        invoke_without_command=True, help="List the other hospitals; pin those whose fingerprint you heard."
    )
    peers.callback()(listing)
    peers.command("pin")(pin)
    peers.command("unpin")(unpin)
    app.add_typer(peers, name="peers")


def enrol(
    token: Annotated[
        str, typer.Argument(help="The coordinator's token; `-` or nothing: read it from standard input.")
    ] = "-",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the enrolment under way here.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the coordinator has decided.")] = True,
    home: HomeOption = None,
) -> None:
    """Join a consortium: keys are made here and stay here; only their public halves go out.

    A token on the command line can be seen by others on this machine: rather paste it when asked.
    """
    from sequester.client.gate import enrolment

    text: str | None = token
    if resume:
        text = None
    elif token == "-":
        typer.echo("Paste the coordinator's token:" if sys.stdin.isatty() else "", err=True, nl=sys.stdin.isatty())
        text = sys.stdin.readline()
    place = home_of(home)
    was_in = place.consortia()
    try:
        found = enrolment.enrol(place, text, wait, typer.echo)
    except KeyboardInterrupt:
        if not place.enrolling():
            raise
        typer.echo("\nYou stopped waiting; the request stands. `sequester-client enrol --resume` goes on with it.")
        raise typer.Exit(130) from None
    if not found.is_admitted and found.consortium in was_in:
        typer.echo(f"This site belongs to {found.consortium} already; this renews its certificate. Keys and pins stay.")
    if not found.is_admitted:
        typer.echo("next: when the coordinator has admitted you, `sequester-client enrol --resume`.")
        return
    typer.echo(f"this site belongs to {found.consortium}; its fingerprint is {spoken(found.fingerprint)}")
    typer.echo(
        "next: `sequester-client peers --refresh`, compare fingerprints by telephone, `sequester-client peers pin`."
    )


def listing(
    context: typer.Context,
    refresh: Annotated[bool, typer.Option("--refresh", help="Ask the exchange first.")] = False,
    consortium: ConsortiumOption = "",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the hospitals of the consortium: name, fingerprint, pinned or not."""
    if context.invoked_subcommand is not None:
        return
    from sequester.client.gate import approval, exchange, peers

    place = home_of(home)
    name = _one(place, consortium)
    if refresh:
        exchange.fetch_members(place, name)
    own = raw_public(approval.identity(place, name))
    pins = peers.pins(place, name)
    rows = []
    for member in peers.members(place, name):
        standing = "counts as a possible colluder"
        if member.identity_key == own:
            standing = "this site"
        elif pins.get(member.site) == member.identity_key:
            standing = "pinned"
        elif member.site in pins:
            standing = "ANOTHER KEY than the one pinned; counts as a possible colluder"
        rows.append({"site": member.site, "fingerprint": member.fingerprint, "standing": standing})
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        typer.echo("No hospital is known yet; `sequester-client peers --refresh` asks the exchange.")
        return
    table = Table("site", "standing")
    table.add_column("fingerprint", no_wrap=True)  # people read it aloud: each line as it is
    for row in rows:
        text = spoken(row["fingerprint"])
        table.add_row(row["site"], row["standing"], f"{text[:39]}\n{text[40:]}")
    Console(soft_wrap=True, highlight=False, markup=False).print(table)


def pin(
    site: SiteArgument,
    typed: Annotated[str, typer.Option("--fingerprint", help="As that hospital read it to you: all 64 digits.")],
    consortium: ConsortiumOption = "",
    home: HomeOption = None,
) -> None:
    """Pin a hospital whose fingerprint you heard from itself, over another channel."""
    from sequester.client.gate import peers

    place = home_of(home)
    if site == place.config().site.id:
        raise SiteError(f"`{site}` is this site", hint="pin the others; they pin you")
    member = peers.pin(place, _one(place, consortium), site, typed)
    typer.echo(f"{member.site} is pinned.")


def unpin(site: SiteArgument, consortium: ConsortiumOption = "", home: HomeOption = None) -> None:
    """Forget a pin: from the next study on the hospital counts as a possible colluder."""
    from sequester.client.gate import peers

    place = home_of(home)
    peers.unpin(place, _one(place, consortium), site)
    typer.echo(f"{site} is no longer pinned.")


def _one(place: Home, named: str) -> str:
    known = place.consortia()
    if named in known or (not named and len(known) == 1):
        return named or known[0]
    if not known:
        raise SiteError("this site belongs to no consortium", hint="`sequester-client enrol` joins one")
    raise SiteError(f"which consortium? {', '.join(known)}", hint="name it with --consortium")
