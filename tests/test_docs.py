"""What the pages tell people to type exists: every command and every option of the fenced examples, and units that name them."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer.main

from sequester.client.cli.app import app as client
from sequester.client.config import ComputeSection, NetworkSection, SiteConfig
from sequester.client.policy import Policy
from sequester.server.cli.app import app as server

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "client/README.md", "server/README.md", "deploy/README.md", "SECURITY.md")
APPS = {"sequester-client": typer.main.get_command(client), "sequester-server": typer.main.get_command(server)}


def _examples() -> Iterator[tuple[str, str]]:
    """(page, command line) of everything that a page shows as typed, in a block or between backticks."""
    for page in PAGES:
        text = (ROOT / page).read_text("utf-8")
        fenced = re.findall(
            r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE
        )  # a fence with a language closes too
        blocks = "\n".join(block for language, block in fenced if not language)
        lines = [line.split("#")[0] for line in blocks.splitlines()]
        for line in [*lines, *re.findall(r"`([^`\n]+)`", text)]:
            if found := re.search(r"\b(sequester-(?:client|server) .*)", line):
                yield page, found[1].strip()


EXAMPLES = sorted(set(_examples()))


@pytest.mark.parametrize(("page", "line"), EXAMPLES, ids=[f"{page}: {line}" for page, line in EXAMPLES])
def test_a_command_that_a_page_shows_exists_with_its_options(page: str, line: str) -> None:
    words = shlex.split(line)
    command: click.Command = APPS[words.pop(0)]
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        if words[0] not in command.commands:
            break
        command = command.commands[words.pop(0)]
    if isinstance(command, click.Group) and not command.invoke_without_command:
        assert not words, f"{page}: `{line}`: no command `{words[0]}`"
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    wrong = [word for word in words if word.startswith("--") and word != "--help" and word.split("=")[0] not in options]
    assert not wrong, f"{page}: `{line}` has no option {wrong[0]}"


def test_the_settings_that_the_page_shows_are_all_there_are_and_are_the_defaults() -> None:
    text = (ROOT / "client/README.md").read_text("utf-8")
    (block,) = [b for b in re.findall(r"^```toml\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if "[policy]" in b]
    shown = tomllib.loads(block)
    assert shown.keys() | {"scoring"} == SiteConfig.model_fields.keys()  # scoring has a page of its own
    read = SiteConfig.model_validate(shown)
    for name, section in shown.items():
        assert section.keys() == type(getattr(read, name)).model_fields.keys()
    assert read.policy == Policy(analyses=read.policy.analyses)
    assert (read.network, read.compute) == (NetworkSection(), ComputeSection())
    said = re.search(r"Left out, these and: (.*?)\n\w", block, re.DOTALL)
    assert said is not None
    assert {*read.policy.analyses, *re.findall(r"[a-z]+", said[1])} == set(Policy().analyses)


def test_enough_is_checked_to_mean_something() -> None:
    assert len(EXAMPLES) > 25


@pytest.mark.parametrize("unit", sorted((ROOT / "deploy/systemd").glob("*.service")), ids=lambda path: path.name)
def test_a_unit_starts_what_is_installed_and_lets_nothing_call_home(unit: Path) -> None:
    text = unit.read_text("utf-8")
    command = re.search(r"^ExecStart=/opt/sequester/bin/(\S+) (.*)$", text, re.MULTILINE)
    assert command is not None
    if command[1] == "python":
        module = ROOT / "client" / (command[2].split()[1].replace(".", "/") + ".py")
        declared = set(re.findall(r'add_argument\("(--[a-z-]+)"', module.read_text("utf-8")))
        assert set(re.findall(r"--[a-z-]+", command[2])) == declared
        assert "IPAddressDeny=any" in text and "DynamicUser=yes" in text
    else:
        words = command[2].split()
        found = APPS[command[1]]
        assert isinstance(found, click.Group)
        options = {option for parameter in found.commands[words[0]].params for option in parameter.opts}
        assert set(words[1:]) <= options and "FLWR_TELEMETRY_ENABLED=0" in text
    for line in ("NoNewPrivileges=yes", "ProtectSystem=strict", "ProtectHome=yes", "CapabilityBoundingSet=\n"):
        assert line in text
