"""What `--help` prints teaches: every argument and option is explained, and no word of the text is taken for markup."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import pytest
import typer.main
from typer.testing import CliRunner

from sequester.client.cli.app import app as client
from sequester.server.cli.app import app as server

APPS = {"sequester-client": client, "sequester-server": server}


def _commands(path: tuple[str, ...], command: click.Command) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from _commands((*path, name), below)


COMMANDS = [found for name, app in APPS.items() for found in _commands((name,), typer.main.get_command(app))]


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=[" ".join(path) for path, _ in COMMANDS])
def test_help_shows_what_every_argument_and_option_means(path: tuple[str, ...], command: click.Command) -> None:
    said = CliRunner().invoke(APPS[path[0]], [*path[1:], "--help"], env={"COLUMNS": "400", "TERM": "dumb"})
    assert said.exit_code == 0
    assert command.help and command.help.split("\n")[0] in said.stdout
    for parameter in command.params:
        meaning = getattr(parameter, "help", None)
        assert meaning, f"{' '.join(path)}: {parameter.name} is not explained"
        for word in re.findall(r"[\w`~/.\[\]-]+", meaning):
            assert word in said.stdout, f"{' '.join(path)}: {parameter.name}: `{word}` is not shown"


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=[" ".join(path) for path, _ in COMMANDS])
def test_no_word_of_a_command_s_description_is_lost(path: tuple[str, ...], command: click.Command) -> None:
    said = CliRunner().invoke(APPS[path[0]], [*path[1:], "--help"], env={"COLUMNS": "400", "TERM": "dumb"})
    lost = [word for word in (command.help or "").split() if word not in said.stdout]
    assert not lost


def test_a_terminal_of_80_columns_fills_the_lines_of_a_long_description() -> None:
    said = CliRunner().invoke(APPS["sequester-server"], ["study", "waive", "--help"], env={"COLUMNS": "80"}).stdout
    lines = [line.strip() for line in said.split("╭")[0].splitlines()]
    start = next(n for n, line in enumerate(lines) if line.startswith("It counts once"))
    paragraph = lines[start : lines.index("", start)]
    following = [line.split()[0] for line in paragraph[1:]]
    assert all(len(line) + 1 + len(word) > 78 for line, word in zip(paragraph, following, strict=False))


@pytest.mark.parametrize("name", APPS)
def test_the_version_is_said(name: str) -> None:
    said = CliRunner().invoke(APPS[name], ["--version"])
    assert said.exit_code == 0 and re.fullmatch(r"sequester \d+\.\d+\.\d+\S*\n", said.stdout)
