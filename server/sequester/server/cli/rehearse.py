"""`sequester-server study rehearse`: a study on made-up or public people, through the real processes, before patients pay."""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sequester.protocols.errors import SiteError, StudyError
from sequester.server.cli.study import StudyArgument, read, verbs
from sequester.server.forecast import require_worth

BUILDS = ("NCBI36", "GRCh37", "GRCh38")
SOCKET_NAME = 107  # characters of a unix socket's name, on Linux
NEEDED = ("sequester.client", "torch", "pgenlib", "msprime", "psutil", "jinja2")


def register(app: typer.Typer) -> None:
    """Add the verb to `study`."""
    verbs.command("rehearse")(rehearse)


def rehearse(
    path: StudyArgument,
    out: Annotated[Path, typer.Option("--out", help="Reports and figures; a new or empty folder.")] = Path("rehearsal"),
    people: Annotated[
        int | None,
        typer.Option(
            "--people",
            min=150,
            help="In all hospitals together; n0 and n_max in proportion. Quicker, and rougher than the study.",
        ),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option("--size", help="SITE=N, people at one hospital; the others share the rest equally."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="SITE=FOLDER with phenotypes.csv and genotypes.*, for data that may be used openly. People at more than one "
            "such hospital are looked for.",
        ),
    ] = None,
    build: Annotated[
        list[str] | None, typer.Option("--build", help="SITE=NCBI36, GRCh37 or GRCh38: of --data in another build.")
    ] = None,
    heritability: Annotated[
        float,
        typer.Option(
            "--heritability", help="What the listed variants and scores explain of the liability: an assumption."
        ),
    ] = 0.2,
    covariates: Annotated[
        float, typer.Option("--covariates", help="What the covariates explain: an assumption.")
    ] = 0.2,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="The same seed makes up the same people; noise never repeats.")
    ] = 7,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the working folder: homes, genotypes, logs.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Answer in JSON, for machines; progress on standard error.")
    ] = False,
) -> None:
    """Run a study on made-up people of its declared sizes, through the real processes on this machine.

    Exchange, gates, compute, secure sum and noise are the real ones; hospitals, keys and ledgers exist for the rehearsal
    alone. It says what the model is worth with and without noise beside what `study plan` predicts, what each hospital
    sends, how long it takes, and what the real study would cost in epsilon. Needs about 1 GB of memory for each hospital.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise StudyError(
            f"a rehearsal runs hospitals too, and {missing[0]} is not installed",
            hint="pip install 'sequester[site,server,simulate]'",
        )
    from sequester.one_machine.phases import Phases
    from sequester.one_machine.processes import INTERRUPTS, Failed
    from sequester.server import rehearsal
    from sequester.server.report.rehearsal import rehearsal_html
    from sequester.simulate.participants import Assumed

    study = read(path)
    if people is not None:
        study = rehearsal.resized(study, people)
    require_worth(study)
    builds = _pairs("--build", build)
    for name, said in builds.items():
        if said not in BUILDS:
            raise StudyError(f"--build {name}={said}", hint=f"one of {', '.join(BUILDS)}")
    given = {
        name: rehearsal.Given(Path(folder).resolve(), builds.get(name, study.genome_build))
        for name, folder in _pairs("--data", data).items()
    }
    asked = rehearsal.Rehearsal(
        study, _sizes(rehearsal.sizes(study, people), size), given, seed, Assumed(heritability, covariates)
    )
    rehearsal.require_people(asked)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StudyError(f"{out} is not an empty folder", hint="name a new one with --out: nothing is written over")
    INTERRUPTS.install()
    phases = Phases(Console(stderr=as_json, highlight=False, markup=False, soft_wrap=True))
    work = _working_folder(study.site_ids)
    kept = keep
    try:
        content = rehearsal.rehearse(asked, out, work, phases, people_to=2 if as_json else None)
    except Failed as error:
        kept = True
        raise SiteError(
            f"the rehearsal did not end: {error.message}" + (f"\n{error.tail()}" if error.tail() else ""),
            hint=f"everything it wrote lies in {work}",
        ) from None
    except KeyboardInterrupt:
        phases.interrupted()
        phases.line("interrupted; everything that was started has been stopped.")
        raise SystemExit(130) from None
    finally:
        if kept:
            phases.line(f"the working folder stays: {work}")
        else:
            shutil.rmtree(work, ignore_errors=True)
    try:
        (out / "rehearsal.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        (out / "rehearsal.html").write_bytes(rehearsal_html(content))
    except OSError as error:
        raise StudyError(f"{out}: {error.strerror}", hint="free disk space, and rehearse again") from None
    if as_json:
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        _print(content, out)


def _working_folder(sites: tuple[str, ...]) -> Path:
    """A new folder; `SiteError` where the sockets of its hospitals would have longer names than the system takes."""
    from sequester.server.rehearsal import CONSORTIUM

    base = Path(tempfile.gettempdir())
    longest = base / "rehearsal-12345678" / "hospitals" / max(sites, key=len) / "run" / f"{CONSORTIUM}.door"
    if len(str(longest).encode()) > SOCKET_NAME:
        raise SiteError(
            f"names of sockets below {base} would have more than {SOCKET_NAME} characters",
            hint="set TMPDIR to a folder with a shorter name, such as /tmp",
        )
    return Path(tempfile.mkdtemp(prefix="rehearsal-", dir=base))


def _pairs(option: str, given: list[str] | None) -> dict[str, str]:
    found = {}
    for word in given or []:
        name, equals, value = word.partition("=")
        if not equals or not value or name in found:
            raise StudyError(f"{option} {word[:60]}", hint=f"{option} NAME=VALUE, once for each hospital")
        found[name] = value
    return found


def _sizes(equal: dict[str, int], given: list[str] | None) -> dict[str, int]:
    """The sizes that were named; the other hospitals share what is left of the total equally, at least 50 each."""
    named = _pairs("--size", given)
    if bad := [name for name, value in named.items() if not value.isdecimal() or int(value) < 50]:
        raise StudyError(f"--size {bad[0]}={named[bad[0]][:20]}", hint="a whole number of people, at least 50")
    rest = [name for name in equal if name not in named]
    left = sum(equal.values()) - sum(map(int, named.values()))
    each = {name: max(50, left // len(rest)) for name in rest}
    return {**each, **{name: int(value) for name, value in named.items()}}


def _print(content: dict[str, Any], out: Path) -> None:
    from sequester.server.report.rehearsal import tables, verdict, words

    console = Console(highlight=False, markup=False)
    console.print()
    console.print(verdict(content), soft_wrap=True)
    for table in tables(content):
        shown = Table(*table.head, title=table.caption, title_justify="left", caption=table.note or None)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    for line in words(content):
        console.print(line, soft_wrap=True)
    console.print(f"the report: {(out / 'rehearsal.html').resolve()}", soft_wrap=True)
    console.print(f"what the study itself would write: {(out / 'report.html').resolve()}", soft_wrap=True)
