"""`sequester-server`: the commands, one module for each subject, and the one place where errors become words."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from sequester.protocols.errors import SequesterError
from sequester.server.cli import exchange, identity, simulate, study

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for subject in (identity, study, exchange, simulate):
    subject.register(app)


def main() -> None:
    """Run the command line; a `SequesterError` ends as `error:` and `hint:` lines and its own exit status."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except SequesterError as error:
        if debug:
            raise
        console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
        console.print(f"error: {error.message}")
        if error.hint:
            console.print(f"hint: {error.hint}")
        raise SystemExit(error.exit_status) from None


if __name__ == "__main__":
    main()
