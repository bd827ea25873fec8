"""What a coordinator sees while a study runs, on a terminal and in a log."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from sequester.server.report.progress import follow

STANDING = {"harbor": "standing", "lake": "standing", "north": "standing"}


def status(state: str = "running", **more: Any) -> dict[str, Any]:
    base = {"digest": "ab" * 32, "title": "A risk score", "state": state, "reason": "", "phase": "rounds", "of": 10}
    return {**base, "analysis": "score", "step": 1, "round": 1, "sites": STANDING, **more}


def told(statuses: list[dict[str, Any]], *, terminal: bool) -> tuple[str, dict[str, Any], int]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None)
    left = iter(statuses)
    pauses: list[float] = []
    last = follow(lambda: next(left), console, pauses.append)
    return out.getvalue(), last, len(pauses)


def test_a_log_gets_one_line_for_each_change_and_none_for_time_going_by() -> None:
    statuses = [
        status(phase="set-up", analysis="", sites=STANDING | {"north": "called"}),
        status(phase="set-up", analysis="", sites=STANDING | {"north": "called"}, seconds=2.5),
        status(seconds=3.0),
        status(seconds=3.2),
        status(step=2, round=3, sites=STANDING | {"lake": "away"}),
        status("done"),
    ]
    text, last, pauses = told(statuses, terminal=False)
    lines = text.splitlines()
    assert len(lines) == 4 and last["state"] == "done" and pauses == 5
    assert "agree on keys" in lines[0] and "2 of 3 hospitals standing (north called)" in lines[0]
    assert "score, step 1 of 10, round 1" in lines[1] and "3 of 3" in lines[1]
    assert "step 2 of 10, round 3" in lines[2] and "lake away" in lines[2]
    assert lines[3] == "study abababababab: done"


@pytest.mark.parametrize("state", ["done", "abandoned", "withdrawn", "expired", "suspended", "refused"])
def test_it_ends_with_the_study_and_says_why(state: str) -> None:
    text, last, pauses = told([status(), status(state, reason="too few hospitals")], terminal=False)
    assert last["state"] == state and pauses == 1 and text.splitlines()[-1].endswith(f"{state}, too few hospitals")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_study_that_is_done_is_watched_until_its_receipts_are_there(terminal: bool) -> None:
    waits = [status("done", awaits_receipts=["lake", "north"]), status("done", awaits_receipts=["north"])]
    text, last, pauses = told([status(), *waits, status("done", awaits_receipts=[])], terminal=terminal)
    assert last["awaits_receipts"] == [] and pauses == 3
    assert terminal or "done, waits for the receipt of lake, north" in text


def test_a_held_study_is_still_watched() -> None:
    text, last, _ = told([status(), status("held"), status("done")], terminal=False)
    assert last["state"] == "done" and ": held" in text


def test_a_terminal_shows_analysis_step_seconds_and_every_hospital() -> None:
    running = status(step=4, round=5, closed=3, seconds=12.4, sites=STANDING | {"lake": "refused: BUDGET"})
    text, last, _ = told([running, status("done")], terminal=True)
    for words in ("A risk score", "score, step 4 of 10, round 5", "12 s", "harbor", "refused: BUDGET"):
        assert words in text
    assert last["state"] == "done" and "study abababababab: done" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_words_of_others_are_shown_as_they_are_not_as_markup(terminal: bool) -> None:
    odd = status(sites={"harbor": "refused: [link=x]STUDY[/link]", "north": ["research", "data-protection"]})
    text, _, _ = told([odd, status("done", reason="a [bold] word")], terminal=terminal)
    assert "[link=x]STUDY[/link]" in text and "a [bold] word" in text and "research, data-protection" in text


def test_who_stops_watching_is_told_that_the_study_goes_on() -> None:
    out = io.StringIO()

    def interrupted() -> Callable[[], dict[str, Any]]:
        def ask() -> dict[str, Any]:
            raise KeyboardInterrupt

        return ask

    with pytest.raises(KeyboardInterrupt):
        follow(interrupted(), Console(file=out, width=100))
    assert "the study goes on" in out.getvalue()
