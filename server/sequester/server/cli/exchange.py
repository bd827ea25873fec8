"""`serve` at the exchange; `bundle` and the verbs of `study` that reach it: publish, start, hold, withdraw, status, results."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sequester.protocols import exchange_pb2 as pb
from sequester.protocols.errors import RoundAbandoned, StudyError
from sequester.protocols.signing import open_document, sign_document
from sequester.protocols.states import StudyState
from sequester.server.cli.study import HomeOption, JsonOption, passphrase, verbs
from sequester.server.config import Home
from sequester.server.config import home as home_of

DigestArgument = Annotated[str, typer.Argument(help="The study's digest or its first letters (at least four).")]
POLL_S = 0.5


def register(app: typer.Typer) -> None:
    """Add `serve`, `bundle`, and the verbs of `study` that call the exchange."""
    app.command("serve")(serve)
    app.command("bundle")(bundle)
    verbs.command("publish")(publish)
    verbs.command("start")(start)
    verbs.command("hold")(hold)
    verbs.command("release")(release)
    verbs.command("withdraw")(withdraw)
    verbs.command("status")(status)
    verbs.command("results")(results)


def serve(home: HomeOption = None) -> None:
    """Run the exchange, its SuperLink and its SuperExec until SIGTERM. Log lines are JSON on standard error."""
    from sequester.server.serve import log_to_stderr
    from sequester.server.serve import serve as run

    log_to_stderr()
    asyncio.run(run(home_of(home)))


def bundle(output: Annotated[Path, typer.Argument(help="Where it goes; an existing file is refused.")]) -> None:
    """Write the Flower bundle that studies name: a label without a line of program."""
    from sequester.server.flower.bundle import standard_bundle

    data = standard_bundle()
    try:
        with output.open("xb") as file:
            file.write(data)
    except OSError as error:
        raise StudyError(f"{output}: {error.strerror}", hint="name a file that does not exist yet") from None
    typer.echo(f"{output}: {len(data)} bytes. next: `sequester-server study sign STUDY --bundle {output}`.")


def publish(
    path: Annotated[Path, typer.Argument(help="The signed study.json.")],
    bundle: Annotated[Path, typer.Option("--bundle", help="The file that `study sign --bundle` was given.")],
    home: HomeOption = None,
) -> None:
    """Hand a signed study and its bundle to the exchange, where its hospitals find it."""
    data = {}
    for file in (path, bundle):
        try:
            data[file] = file.read_bytes()
        except OSError as error:
            raise StudyError(f"{file}: {error.strerror}", hint="`study sign` and `bundle` write them") from None
    if not data[path].startswith(b'{"body":'):
        raise StudyError(f"{path} is not a signed study", hint="`sequester-server study sign` writes one")
    digest = open_document(data[path], "study", None).digest
    call(home, "Publish", pb.PublishRequest(study=pb.Document(json=data[path]), bundle=data[bundle]))
    typer.echo(f"study {digest} is published.")
    typer.echo(f"next: its hospitals approve; `sequester-server study status {digest[:12]}` shows who has.")


def start(
    study: DigestArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Show the rounds as they go, until the study ends.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run an approved study. One that was suspended goes on in a new key epoch, from the last closed round.

    With --wait: exit 0 when it is done, 50 when it ended otherwise.
    """
    digest = digest_of(home, study)
    row = json.loads(call(home, "Start", request_of(digest)).json)
    if wait:
        row = _follow(home, digest, quiet=as_json)
    if as_json:
        typer.echo(json.dumps(row, indent=2))
    elif row["state"] == StudyState.DONE:
        typer.echo(f"done. next: `sequester-server study results {digest[:12]} --out FOLDER`.")
    elif not wait:
        typer.echo(f"study {digest[:12]} runs; `sequester-server study status {digest[:12]}` shows how far it is.")
    if wait and row["state"] != StudyState.DONE:
        raise RoundAbandoned(f"the study is {row['state']}: {row['reason'] or 'no reason was given'}", hint=_hint(row))


def hold(study: DigestArgument, home: HomeOption = None) -> None:
    """Let no new round start; the open one ends."""
    _control(home, study, "hold")


def release(study: DigestArgument, home: HomeOption = None) -> None:
    """Let a held study go on."""
    _control(home, study, "release")


def withdraw(study: DigestArgument, home: HomeOption = None) -> None:
    """End a study for good, at every hospital, within seconds. What was spent stays spent."""
    _control(home, study, "withdraw")


def status(
    study: Annotated[str, typer.Argument(help="A digest or its first letters; without it, every study.")] = "",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show where studies stand: who approved, whose stream stands, how many rounds are closed, why one ended."""
    if study:
        rows = [_status(home, digest_of(home, study))]
    else:
        rows = json.loads(call(home, "Status", pb.StudyRequest()).json)
    if as_json:
        typer.echo(json.dumps(rows[0] if study else rows, indent=2))
        return
    console = Console(highlight=False, markup=False)
    if not rows:
        console.print("No study was published yet.")
    for row in rows:
        said = f"{row['digest'][:12]}  {row['state']}  {row['title']}"
        console.print(said + (f": {row['reason']}" if row["reason"] else ""), soft_wrap=True)
        if row.get("analysis"):
            console.print(
                f"  {row['analysis']}, step {row['step']} of {row['of']}, {row['rounds_closed']} rounds closed"
            )
        if study:
            table = Table("hospital", "stands", "release gate", "receipt")
            for name, word in row["sites"].items():
                tried = row["release"]["sites"].get(name, "not needed")
                table.add_row(name, word, tried, "yes" if name in row["receipts"] else "no")
            console.print(table)
            if waiver := row["release"].get("waiver"):
                names = ", ".join(waiver["countersigned"]) or "nobody"
                console.print(
                    f"waiver of the release gate, countersigned by {names}: {waiver['reason']}", soft_wrap=True
                )


def results(
    study: DigestArgument,
    out: Annotated[Path, typer.Option("--out", help="A folder for report, results, scoring file and receipts.")],
    audit: Annotated[
        Path | None,
        typer.Option(
            "--audit", help="What `sequester-client audit release study.json --json` printed on your machine."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of an earlier call.")] = False,
    home: HomeOption = None,
) -> None:
    """Fetch the results of a study that is done and write the report, the model and every hospital's receipt.

    A private model comes out when every hospital's release gate has passed, or under a waiver that every hospital has
    countersigned (`study waive`). Exit status 40 while neither is there.
    """
    from sequester.server.cli.release import fetched
    from sequester.server.report.results_folder import write

    digest = digest_of(home, study)
    signed, of, standing, documents = fetched(home_of(home), digest)
    if _status(home, digest)["state"] in (StudyState.DONE, StudyState.SUPERSEDED):
        standing.require()
    texts = json.loads(call(home, "Result", request_of(digest)).data)
    receipts = {site: raw.encode() for site, raw in texts["receipts"].items()}
    try:
        own = None if audit is None else audit.read_bytes()
    except OSError as error:
        raise StudyError(
            f"{audit}: {error.strerror}", hint="`sequester-client audit release study.json --json` writes one"
        ) from None
    paths = write(
        out, of, digest, texts["results"].encode(), receipts, signed.raw, documents, audit=own, overwrite=overwrite
    )
    for path in paths:
        typer.echo(str(path))


# ---- calls ----------------------------------------------------------------------------------------------------------


def call(home: Path | None, method: str, request: Any) -> Any:
    """The exchange's answer to one call of the coordinator."""
    from sequester.server.coordinator import coordinator_stub

    with coordinator_stub(home_of(home)) as ask:
        return ask.call(method, request)


def request_of(digest: str) -> pb.StudyRequest:
    """A question about one study."""
    return pb.StudyRequest(study_digest=bytes.fromhex(digest))


def _status(home: Path | None, digest: str) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(call(home, "Status", request_of(digest)).json)
    return row


def digest_of(home: Path | None, prefix: str) -> str:
    """The one published study whose digest starts with `prefix`."""
    if len(prefix) == 64:
        return prefix.lower()
    known = [row["digest"] for row in json.loads(call(home, "Status", pb.StudyRequest()).json)]
    found = [digest for digest in known if len(prefix) >= 4 and digest.startswith(prefix.lower())]
    if len(found) != 1:
        raise StudyError(
            f"{len(found)} published studies start with `{prefix[:64]}`, one was expected",
            hint="`sequester-server study status` lists them; give at least four letters",
        )
    return str(found[0])


def _control(home: Path | None, study: str, act: str) -> None:
    from sequester.server.authority import signing_key

    digest = digest_of(home, study)
    place: Home = home_of(home)
    order = sign_document("order", {"study": digest, "act": act}, signing_key(place, passphrase()))
    request = pb.StudyControl(study_digest=bytes.fromhex(digest), act=act, order=pb.Document(json=order))
    row = json.loads(call(home, "Control", request).json)
    typer.echo(f"study {digest[:12]} is {row['state']}.")


def _hint(row: dict[str, Any]) -> str:
    if row["state"] == StudyState.SUSPENDED:
        return "mend what is named, then `study start` again: it goes on with fresh keys from the last closed round"
    return "an amendment is a new study; what was spent stays spent"


def _follow(home: Path | None, digest: str, quiet: bool) -> dict[str, Any]:
    """The study's last status, after showing its rounds until it has ended and its receipts are there."""
    from sequester.server.coordinator import coordinator_stub
    from sequester.server.report.progress import follow, is_over

    with coordinator_stub(home_of(home)) as ask:

        def now() -> dict[str, Any]:
            row: dict[str, Any] = json.loads(_patiently(lambda: ask.call("Status", request_of(digest))).json)
            return row

        if not quiet:
            last: dict[str, Any] = follow(now, Console(stderr=True, highlight=False))
            return last
        while not is_over(row := now()):
            time.sleep(POLL_S)
        return row


def _patiently(call: Callable[[], Any], within_s: float = 120.0) -> Any:
    """The call's answer; an exchange that is being restarted is waited for."""
    until = time.monotonic() + within_s
    while True:
        try:
            return call()
        except StudyError as error:
            if "does not answer" not in error.message or time.monotonic() > until:
                raise
            time.sleep(1.0)
