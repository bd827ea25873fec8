"""`audit release`, `countersign`: whether this installation keeps a study's promise, tried on made-up patients."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from sequester.client.cli.ledger import audit
from sequester.client.cli.studies import ConsortiumOption, HomeOption, JsonOption, Published, pick
from sequester.client.config import Home
from sequester.client.config import home as home_of
from sequester.protocols import release as rule
from sequester.protocols.errors import PrivacyError, SiteError, StudyError
from sequester.protocols.release import Form
from sequester.protocols.study import Study

POLL_S = 0.5
Tell = Callable[[str, float], None]


def register(app: typer.Typer) -> None:
    """Add the commands about the release gate."""
    audit.command("release")(release)
    app.command("countersign")(countersign)


def release(
    study: Annotated[str, typer.Argument(help="A published study's digest, or a file: study.yaml or study.json.")],
    full: Annotated[bool, typer.Option("--full", help="The full form, whatever the plan's size.")] = False,
    short: Annotated[bool, typer.Option("--short", help="The short form: three trainings instead of five.")] = False,
    consortium: ConsortiumOption = "",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Try this installation on made-up patients of a study's size: does it keep the epsilon that the study promises?

    What one patient can change, the noise, and canaries whose presence is guessed from sums and model. No patient is read
    and no budget is spent. For a published study the outcome is signed, written into the ledger and sent: pass or fail,
    the figures stay here. For a file nothing is signed, so that a coordinator can run it too. It takes seconds for a small
    plan, up to some minutes on two cores for a large one.

    Exit status: 0 passed; 40 failed; 20 it came to no end here.
    """
    if full and short:
        raise StudyError("--full and --short", hint="say one of them, or neither: the plan's size decides")
    asked: Form | None = "full" if full else "short" if short else None
    if Path(study).is_file():
        digest, rows = _of_file(Path(study), asked, as_json)
        signed: dict[str, Any] = {}
    else:
        place = home_of(home)
        found = pick(place, study, consortium)
        _require_models(found.study)
        signed = {"sent": _of_study(place, found, asked or rule.form_of(found.study), as_json)}
        from sequester.client.gate.release import figures

        digest, rows = found.digest, figures(place, found.consortium, found.digest)
    passed = all(row["passed"] for row in rows)
    if as_json:
        said = {"format": 1, "study": digest, "passed": passed, "models": rows, **signed}
        typer.echo(json.dumps(said, indent=2))
    else:
        _print(rows)
        if signed:
            typer.echo(
                f"Signed and in the ledger; the exchange {'has it' if signed['sent'] else 'is told when it answers'}."
            )
    if not passed:
        raise PrivacyError(
            "this installation fails the release gate: it does not keep what the study promises",
            hint="it joins no study with this model; install the released version again, and report what failed above",
        )
    if not as_json:
        typer.echo("passed: no gross fault was found. A pass is evidence, not proof, of epsilon.")


def countersign(
    study: Annotated[str, typer.Argument(help="The study's digest or its first letters.")],
    person: Annotated[str, typer.Option("--person", help="Your name; only its hash leaves this site.")],
    role: Annotated[str, typer.Option("--role", help="One of the policy's approvers; default: the only one.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="You have read the waiver; do not ask.")] = False,
    consortium: ConsortiumOption = "",
    home: HomeOption = None,
) -> None:
    """Read the coordinator's waiver of the release gate for a study, and sign under it for this hospital.

    A waiver lets a private model out although a hospital's gate has no pass. It counts when every hospital has signed, and
    it is printed in the report. Whoever does not want that signs nothing.
    """
    from sequester.client.gate import approval, exchange
    from sequester.client.gate import release as gate

    place = home_of(home)
    config = place.config()
    found = pick(place, study, consortium)
    roles = config.policy.approvers
    if role not in roles and (role or len(roles) > 1):
        raise SiteError(f"role `{role}` approves nothing here", hint=f"say --role with one of: {', '.join(roles)}")
    raw = exchange.fetch_waiver(place, found.consortium, found.digest)
    if raw is None:
        raise StudyError(
            f"study {found.digest[:12]} has no waiver", hint="nothing is to be signed; ask the coordinator"
        )
    waiver = rule.read_waiver(found.study, found.digest, approval.coordinator_key(place, found.consortium), raw)
    stood = ", ".join(f"{site} {word}" for site, word in waiver.stood.items())
    typer.echo(f"Waiver of the release gate for study {found.digest[:12]}, signed by the coordinator at {waiver.time}.")
    typer.echo(f"Hospitals without a pass: {stood}.")
    typer.echo(f"Reason:\n  | {waiver.reason}")
    typer.echo("With it the private model may be exported; nothing has shown that those hospitals keep its epsilon.")
    if not yes and not typer.confirm(f"{person}, do you sign for this hospital as `{role or roles[0]}`?"):
        typer.echo("Nothing was signed.")
        raise typer.Exit(1)
    gate.countersign(place, found.consortium, config.site.id, found.study, found.digest, raw, person, role or roles[0])
    sent = _send(place, found)
    typer.echo(f"Signed; the exchange {'has it' if sent else 'is told when it answers'}.")


# ---- a trial, by the gate that runs or by this command --------------------------------------------------------------


def _of_file(path: Path, form: Form | None, quiet: bool) -> tuple[str, list[dict[str, Any]]]:
    from sequester.client.gate.release import try_out
    from sequester.protocols import privacy
    from sequester.protocols.signing import open_document
    from sequester.protocols.study import parse_study, read_study

    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        raise SiteError(f"{path} cannot be read as UTF-8", hint="a study.yaml or a signed study.json") from None
    if text.startswith('{"body":'):
        study = parse_study(open_document(text.encode(), "study", None).body_bytes)
    else:
        study = privacy.calibrate(read_study(text))
    _require_models(study)
    with _progress(quiet) as tell:
        rows = asyncio.run(try_out(study, form or rule.form_of(study), tell))
    for row in rows:
        row.pop("tried")
    return privacy.study_digest(study), rows


def _of_study(place: Home, found: Published, form: Form, quiet: bool) -> bool:
    """Whether the exchange has the outcome; the gate tries where it runs, since it alone may write the ledger then."""
    from sequester.client.gate import control

    at = place.run / "gate.sock"
    request = {"consortium": found.consortium, "study": found.digest}
    if not _runs(place):
        return _here(place, found, form, quiet)
    said = control.ask(at, {"ask": "try", "form": form, **request})
    with _progress(quiet) as tell:
        while said["running"]:
            tell(said["said"], said["part"])
            time.sleep(POLL_S)
            said = control.ask(at, {"ask": "trial", **request})
    return bool(control.ask(at, {"ask": "send", **request})["sent"])


def _here(place: Home, found: Published, form: Form, quiet: bool) -> bool:
    from sequester.client.gate.ledger import Ledger
    from sequester.client.gate.release import ReleaseGate

    config = place.config()
    ledger = Ledger(place.dataset(config.data.id))

    async def trial(tell: Tell) -> bool:
        gate = ReleaseGate(place, found.consortium, config.site.id, ledger)
        running = gate.start(found.study, found.digest, form)
        assert running.task is not None
        while not running.task.done():
            tell(running.said, running.part)
            await asyncio.wait([running.task], timeout=POLL_S)
        if running.error is not None:
            raise running.error
        return await gate.send(found.digest)

    try:
        with _progress(quiet) as tell:
            return asyncio.run(trial(tell))
    finally:
        ledger.close()


def _send(place: Home, found: Published) -> bool:
    from sequester.client.gate import control
    from sequester.client.gate.ledger import Ledger
    from sequester.client.gate.release import ReleaseGate

    if _runs(place):
        request = {"ask": "send", "consortium": found.consortium, "study": found.digest}
        return bool(control.ask(place.run / "gate.sock", request)["sent"])
    config = place.config()
    ledger = Ledger(place.dataset(config.data.id))
    try:
        return asyncio.run(ReleaseGate(place, found.consortium, config.site.id, ledger).send(found.digest))
    finally:
        ledger.close()


def _runs(place: Home) -> bool:
    from sequester.client.gate import control

    try:
        control.ask(place.run / "gate.sock", {"ask": "status"})
    except SiteError:
        return False
    return True


def _require_models(study: Study) -> None:
    if not rule.models(study):
        raise StudyError(
            "the study has no private model: its analyses are exact or leave none",
            hint="the release gate is about private models; nothing is held back",
        )


# ---- what a person sees ---------------------------------------------------------------------------------------------


@contextmanager
def _progress(quiet: bool) -> Iterator[Tell]:
    """A bar on the terminal, and nothing with --json or into a file."""
    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as bar:
        task = bar.add_task("release gate", total=1.0)
        yield lambda said, part: bar.update(task, description=said, completed=part)


def _print(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        size = row["size"]
        typer.echo(
            f"{row['analysis']}: claimed epsilon {row['claim']:.2f}, tried on {size['patients']:,} made-up patients, "
            f"{size['width']} columns, {size['own'] + size['dirac']} canaries, {size['runs']} trainings"
        )
        for check in row["checks"]:
            typer.echo(f"  {'passed' if check['passed'] else 'FAILED'}  {check['sentence']}")
