"""`init`, `invite`, `enrolments`, `admit`, `refuse`: the coordinator founds the consortium and vouches for hospitals."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from sequester.protocols import exchange_pb2 as pb
from sequester.protocols.enrolment import Token, clock_fault, read_fingerprint
from sequester.protocols.errors import StudyError
from sequester.protocols.signing import fingerprint, spoken
from sequester.server.cli.study import passphrase
from sequester.server.config import Home
from sequester.server.config import home as home_of

HomeOption = Annotated[
    Path | None,
    typer.Option("--home", help="The consortium's folder; default SEQUESTER_SERVER_HOME, else ~/.sequester-server."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Answer in JSON, for machines.")]
SiteArgument = Annotated[str, typer.Argument(help="The hospital's name, as studies will write it.")]
PortOption = Annotated[int, typer.Option(min=0, max=65535, help="Where it listens; 0: any free one, for a trial.")]


def register(app: typer.Typer) -> None:
    """Add the commands about who belongs to the consortium."""
    app.command("init")(init)
    app.command("invite")(invite)
    app.command("enrolments")(enrolments)
    app.command("admit")(admit)
    app.command("refuse")(refuse)


def init(
    consortium: Annotated[str, typer.Argument(help="The consortium's name: lower case, digits, hyphens.")],
    host: Annotated[str, typer.Option("--host", help="Name or address under which hospitals reach the exchange.")],
    enrolment_port: PortOption = 7441,
    exchange_port: PortOption = 7442,
    superlink_port: PortOption = 7443,
    control_port: PortOption = 7444,
    home: HomeOption = None,
) -> None:
    """Found a consortium: its authority, your signing key, the exchange's certificate. Never overwrites.

    SEQUESTER_PASSPHRASE encrypts your signing key and the authority's.
    """
    from sequester.server import authority

    place = home_of(home)
    ports = (enrolment_port, exchange_port, superlink_port, control_port)
    digest = authority.found(place, consortium, host, ports, passphrase())
    typer.echo(f"consortium {consortium}, authority {spoken(digest)}")
    typer.echo(f"{place.coordinator}: yours alone; keep a copy where the exchange cannot read it.")
    typer.echo(f"{place.exchange}: move it to the exchange's machine and account.")
    if passphrase() is None:
        typer.echo("The keys have no passphrase: set SEQUESTER_PASSPHRASE before `init` to give them one.")
    typer.echo("next: `sequester-server serve` at the exchange, then `sequester-server invite SITE`.")


def invite(
    site: SiteArgument,
    days: Annotated[int, typer.Option("--days", min=1, max=90, help="Days until the token expires.")] = 7,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print a one-time token for a hospital. Hand it over by another channel than the network."""
    from sequester.server import authority
    from sequester.server.coordinator import coordinator_stub, listening
    from sequester.server.enrolment import secret_digest

    place = home_of(home)
    config = listening(place)
    expires = int(time.time()) + days * 86400
    try:
        token = Token(
            consortium=config.consortium,
            site=site,
            host=config.host,
            enrolment_port=config.enrolment_port,
            exchange_port=config.exchange_port,
            superlink_port=config.superlink_port,
            authority=authority.authority_digest(place.coordinator),
            secret=os.urandom(32).hex(),
            expires=expires,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise StudyError(
            f"no token for `{site[:40]}`: {first['loc'][0]}: {first['msg']}",
            hint="a hospital's name is lower-case letters, digits and hyphens, 2 to 32 of them",
        ) from None
    with coordinator_stub(place) as ask:
        ask.call("Invite", pb.Invitation(site=site, secret_sha256=secret_digest(token.secret), expires_unix=expires))
    if as_json:
        typer.echo(json.dumps({"site": site, "token": token.text(), "expires_unix": expires}))
        return
    typer.echo(token.text())
    typer.echo(f"Good once, for {days} days. At the hospital: `sequester-client enrol`, then paste it.", err=True)


def enrolments(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List the hospitals that asked to join, with the fingerprint each of them reads to you."""
    from sequester.server import authority
    from sequester.server.enrolment import proof_fault

    place = home_of(home)
    digest = authority.authority_digest(place.coordinator)
    rows = [
        {
            "site": row.site,
            "state": row.state,
            "identity_key": row.identity_key.hex(),
            "fingerprint": fingerprint(row.identity_key),
            "clock_skew_s": row.clock_skew_ms / 1000,
            "fault": proof_fault(row, digest) or clock_fault(row.clock_skew_ms / 1000),
        }
        for row in _rows(place)
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        typer.echo("No hospital has asked to join yet.")
        return
    out = Console(soft_wrap=True, highlight=False, markup=False)
    table = Table("site", "state", "clock", "fingerprint")
    for row in rows:
        table.add_row(
            str(row["site"]), str(row["state"]), f"{row['clock_skew_s']:+.1f} s", _groups(str(row["fingerprint"]))
        )
    out.print(table)
    for row in rows:
        if row["fault"]:
            out.print(f"{row['site']}: {row['fault']}")
    if admitted := [row for row in rows if row["state"] == "admitted"]:
        out.print("For `sequester-server study new`:")
        for row in admitted:
            out.print(f"  --site {row['site']}={row['identity_key']}")
    out.print("Let each hospital read its fingerprint to you, then `sequester-server admit SITE --fingerprint ...`.")


def admit(
    site: SiteArgument,
    typed: Annotated[str, typer.Option("--fingerprint", help="As the hospital read it to you: all 64 digits.")],
    home: HomeOption = None,
) -> None:
    """Vouch for a hospital: sign its certificate and its keys, after its fingerprint was compared."""
    from sequester.server import authority
    from sequester.server.coordinator import coordinator_stub
    from sequester.server.enrolment import proof_fault

    place = home_of(home)
    row = next((row for row in _rows(place) if row.site == site), None)
    if row is None:
        raise StudyError(f"`{site}` has not asked to enrol", hint="`sequester-server enrolments` lists who has")
    if fingerprint(row.identity_key) != read_fingerprint(typed):
        raise StudyError(
            f"the fingerprint does not match: `{site}` asked with {spoken(fingerprint(row.identity_key))[:19]} ...",
            hint="do not admit it: have it read out again; if it still differs, somebody used its token: refuse it, "
            "and invite it again",
        )
    if fault := proof_fault(row, authority.authority_digest(place.coordinator)):
        raise StudyError(f"`{site}`: {fault}", hint="refuse it, and invite it again")
    certificate = authority.issue_site_certificate(place, row.tls_request_pem, site, passphrase())
    member = authority.member_document(place, site, row.identity_key, row.supernode_key, certificate, passphrase())
    with coordinator_stub(place) as ask:
        ask.call("Admit", pb.Admission(site=site, certificate_pem=certificate, member=pb.Document(json=member)))
    typer.echo(f"{site} is admitted; its certificate is good for a year.")


def refuse(site: SiteArgument, home: HomeOption = None) -> None:
    """Refuse a hospital that asked to join, or end the membership of one that was admitted."""
    from sequester.server.coordinator import coordinator_stub

    with coordinator_stub(home_of(home)) as ask:
        ask.call("Admit", pb.Admission(site=site, refused=True))
    typer.echo(f"{site} is refused.")


def _rows(place: Home) -> list[pb.EnrolmentRow]:
    from sequester.server.coordinator import coordinator_stub

    with coordinator_stub(place) as ask:
        return list(ask.call("Enrolments", pb.Empty()).rows)


def _groups(digest: str) -> str:
    """Sixteen groups on two lines."""
    text = spoken(digest)
    return f"{text[:39]}\n{text[40:]}"
