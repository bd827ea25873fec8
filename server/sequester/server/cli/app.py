"""`sequester-server`: the commands, one module for each subject, and the one place where errors become words."""

from __future__ import annotations

import errno
import inspect
import sqlite3
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer
import typer.core
import typer.main
from rich.console import Console

from sequester.protocols.errors import SequesterError, SiteError
from sequester.server.cli import exchange, identity, rehearse, release, simulate, study, weights


class Argument(typer.core.TyperArgument):
    """An argument that keeps its help: click 8.5 sets `help` of its own after typer 0.20 did, and so clears it."""

    def __init__(self, *, help: str | None = None, **rest: Any) -> None:
        super().__init__(help=help, **rest)
        self.help = help


typer.main.TyperArgument = Argument  # type: ignore[attr-defined]  # typer has no other way in

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Anywhere on the line: `--debug` shows where an error came from.",
)
for subject in (identity, study, exchange, release, weights, simulate, rehearse):
    subject.register(app)


def _reflow(under: typer.Typer) -> None:
    """Let a terminal break the lines of every description: docstrings break theirs at 120 columns."""
    for command in under.registered_commands:
        paragraphs = (inspect.getdoc(command.callback) or "").split("\n\n")
        command.help = "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)
    for group in under.registered_groups:
        if group.typer_instance is not None:
            _reflow(group.typer_instance)


_reflow(app)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sequester {version('sequester')}")
        raise typer.Exit


@app.callback()
def described(
    wanted: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    """The consortium: found it, write studies, run them, receive their results."""


def main() -> None:
    """Run the command line; a `SequesterError` ends as `error:` and `hint:` lines and its own exit status."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except (SequesterError, OSError, sqlite3.Error) as found:
        if debug:
            raise
        error = found if isinstance(found, SequesterError) else of_this_machine(found)
        console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
        console.print(f"error: {error.message}")
        if error.hint:
            console.print(f"hint: {error.hint}")
        raise SystemExit(error.exit_status) from None


def of_this_machine(found: OSError | sqlite3.Error) -> SiteError:
    """What the operating system or a database said, as one of our errors: the file and the system's own word for it."""
    if isinstance(found, sqlite3.Error):
        return SiteError(
            f"a database cannot be used: {found}", hint="free disk space, and check who may write to its folder"
        )
    where = f"{found.filename}: " if found.filename else ""
    is_full = found.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = (
        "free disk space; nothing half-written counts"
        if is_full
        else "check that this account may use it; --debug says where"
    )
    return SiteError(f"{where}{found.strerror or type(found).__name__}", hint=hint)


if __name__ == "__main__":
    main()
