"""`doctor`: test everything that a study will need from this machine and from the way out."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sequester.client.config import home as home_of
from sequester.protocols.errors import SiteError


def register(app: typer.Typer) -> None:
    """Add `doctor`."""
    app.command("doctor")(doctor)


def doctor(
    home: Annotated[
        Path | None, typer.Option("--home", help="The site's folder; default SEQUESTER_HOME, else ~/.sequester.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer in JSON, for machines.")] = False,
) -> None:
    """Test isolation, disk, data, versions, keys, name, ports, TLS and clock. Changes nothing; exit 20 if one fails."""
    from sequester.client.gate.doctor import examine, firewall_lines

    place = home_of(home)
    out = Console(soft_wrap=True, highlight=False, markup=False)
    findings = []
    for finding in examine(place):
        findings.append(finding)
        if not as_json:
            out.print(f"{finding.verdict:4}  {finding.test}: {finding.found}")
            if finding.advice:
                out.print(f"      {finding.advice}")
    lines = firewall_lines(place)
    if as_json:
        typer.echo(json.dumps({"findings": [asdict(finding) for finding in findings], "firewall": lines}, indent=2))
    else:
        for line in lines:
            out.print(line)
    failed = [finding.test for finding in findings if finding.verdict == "fail"]
    if failed:
        raise SiteError(
            f"{len(failed)} of {len(findings)} tests fail: {', '.join(failed)}",
            hint="what to do stands under each of them above",
        )
