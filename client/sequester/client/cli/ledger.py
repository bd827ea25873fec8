"""`ledger`, `audit verify`, `audit export`: what a data set has spent, and whether its record of that is whole."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sequester.client.config import Home
from sequester.client.config import home as home_of
from sequester.protocols.errors import PrivacyError, SiteError

HomeOption = Annotated[
    Path | None, typer.Option("--home", help="The site's folder; default SEQUESTER_HOME, else ~/.sequester.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Answer in JSON, for machines.")]

audit = typer.Typer(
    no_args_is_help=True, help="Check the ledger and this installation, or hand the ledger to an auditor."
)


def register(app: typer.Typer) -> None:
    """Add the commands about the budget and its record."""
    audit.command("verify")(verify)
    audit.command("export")(export)
    app.command("ledger")(ledger)
    app.add_typer(audit, name="audit")


def ledger(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Show the budget of the data set, every charge and what left. Changes nothing; the client may be running."""
    from sequester.client.gate.differencing import shared_with, spent_elsewhere
    from sequester.client.gate.ledger import Ledger
    from sequester.protocols.accounting import epsilon_pld

    place = home_of(home)
    folder = _folder(place)
    held = Ledger(folder, read_only=True)
    try:
        now = held.balance()
        rows = [row.body for row in held.rows()]
        charged = held.charged()
    finally:
        held.close()
    shared = shared_with(folder)
    everywhere = epsilon_pld([*charged, *spent_elsewhere(folder, shared)], now.delta) if shared else now.epsilon_pld
    if as_json:
        balance = {**asdict(now), "left": now.left}
        also = {"data_sets": shared, "epsilon_pld_together": everywhere}
        typer.echo(json.dumps({"balance": balance, "shared_patients": also, "rows": rows}, ensure_ascii=False))
        return
    out = Console(highlight=False, markup=False)
    out.print(f"data set {held.data_set}: {len(rows)} entries, delta {now.delta:g}, filter at order {now.order:g}")
    out.print(f"cap {now.cap:.4f}: spent {now.spent:.4f}, reserved {now.reserved:.4f}, left {now.left:.4f}")
    if now.exact:
        out.print(f"epsilon of the private releases alone: {now.epsilon_pld:.2f}; exact: {', '.join(now.exact)}")
    else:
        out.print(f"epsilon, reservations included: {now.epsilon_pld:.2f} (PLD)")
    for name, count in shared.items():
        out.print(
            f"{count} patients are in data set {name} as well: epsilon {everywhere:.2f} (PLD) for those, together"
        )
    table = Table("study", "reserved", "spent", "frames out", "bytes out", "over")
    studies = list(dict.fromkeys(r["study"] for r in rows if "study" in r))
    for study in studies:
        own = [r for r in rows if r.get("study") == study]
        spent = Counter(r["analysis"] for r in own if r["kind"] == "spend")
        reserved = {e["analysis"]: e["count"] for r in own if r["kind"] == "reserve" for e in r["events"]}
        out_rows = [r for r in own if r["kind"] == "egress"]
        ended = [r["kind"] for r in own if r["kind"] in ("reserve", "settle")][-1:] == ["settle"]
        table.add_row(
            study[:12], _counts(reserved), _counts(spent), str(sum(r.get("times", 1) for r in out_rows)),
            str(sum(r["bytes"] * r.get("times", 1) for r in out_rows)), "yes" if ended else "no",
        )  # fmt: skip
    out.print(table)


def verify(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Check every entry, the ledger's head against what receipts and other hospitals hold of it, and approvals' texts.

    Exit status: 0 whole; 40 with the number of the first bad entry, or with the approval whose text is not as signed.
    """
    from sequester.client.gate import approval
    from sequester.client.gate import audit as of_ledger

    place = home_of(home)
    folder = _folder(place)
    heads = of_ledger.witnesses([place.consortium(name) for name in place.consortia()], folder.name)
    found = of_ledger.verify(folder, heads)
    changed = [sentence for name in place.consortia() for sentence in approval.changed_texts(place, name)]
    if as_json:
        typer.echo(json.dumps({**asdict(found), "approvals": changed}))
    if found.bad:
        raise PrivacyError(found.sentence, hint="stop the client; restore the newest ledger.db before anything runs")
    if changed:
        raise PrivacyError("; ".join(changed), hint="`sequester-client show` the study and approve it again")
    if not as_json:
        typer.echo(found.sentence)


def export(
    file: Annotated[Path, typer.Argument(help="Where the signed file goes; an existing file is refused.")],
    home: HomeOption = None,
) -> None:
    """Write every entry as one signed file that `deploy/verify_ledger.py` checks without this program."""
    from sequester.client.gate import audit as of_ledger
    from sequester.client.gate.ledger import Ledger, signing_key

    folder = _folder(home_of(home))
    held = Ledger(folder, read_only=True)
    try:
        data = of_ledger.export(held, signing_key(folder))
    finally:
        held.close()
    try:
        with file.open("xb") as out:
            out.write(data)
    except OSError as error:
        raise SiteError(f"{file} cannot be written: {error.strerror}", hint="name a new file") from None
    typer.echo(f"{file}: {len(data)} bytes. An auditor checks it with `python3 verify_ledger.py {file}` (deploy/).")


def _folder(place: Home) -> Path:
    folder = place.dataset(place.config().data.id)
    if not (folder / "ledger.db").is_file():
        raise SiteError(f"no ledger in {folder}", hint="`sequester-client enrol` founds one for the data set")
    return folder


def _counts(by_analysis: dict[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in by_analysis.items()) or "-"
