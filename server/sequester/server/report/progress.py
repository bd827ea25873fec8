"""What `study start --wait` shows while a study runs: where it is, which hospitals stand, how long it has taken.

On a terminal one picture that redraws itself; elsewhere one line for each change. It asks and shows, nothing else: who
leaves it does not stop the study.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from sequester.protocols.states import FINAL, StudyState

POLL_S = 0.25
Status = dict[str, Any]

_STOPS = {state.value for state in (*FINAL, StudyState.SUSPENDED)}
_WIDTH = 44


def follow(ask_status: Callable[[], Status], console: Console, pause: Callable[[float], None] = time.sleep) -> Status:
    """The last status: of a study that ended or is suspended. `ask_status` is called about four times a second."""
    try:
        return _draw(ask_status, console, pause) if console.is_terminal else _tell(ask_status, console, pause)
    except KeyboardInterrupt:
        console.print(
            "You stopped watching; the study goes on. `sequester-server study status` shows it.", markup=False
        )
        raise


def _draw(ask_status: Callable[[], Status], console: Console, pause: Callable[[float], None]) -> Status:
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            status = ask_status()
            live.update(picture(status), refresh=True)
            if is_over(status):
                break
            pause(POLL_S)
    console.print(line(status), markup=False)
    return status


def _tell(ask_status: Callable[[], Status], console: Console, pause: Callable[[float], None]) -> Status:
    said = ""
    while True:
        status = ask_status()
        if (now := line(status)) != said:
            console.print(now, markup=False, soft_wrap=True)
            said = now
        if is_over(status):
            return status
        pause(POLL_S)


def is_over(status: Mapping[str, Any]) -> bool:
    """True where a study has ended or is suspended, and the exchange waits for no receipt any more."""
    return status["state"] in _STOPS and not status.get("awaits_receipts")


def line(status: Mapping[str, Any]) -> str:
    """The status in one line; two lines differ where something changed, not because time went by."""
    parts = [f"study {str(status['digest'])[:12]}: {status['state']}"]
    if status.get("reason"):
        parts.append(str(status["reason"]))
    if awaited := status.get("awaits_receipts"):
        parts.append(f"waits for the receipt of {', '.join(map(str, awaited))}")
    if status["state"] not in _STOPS:
        if where := _where(status):
            parts.append(where)
        parts.append(_sites(status))
    return ", ".join(parts)


def picture(status: Mapping[str, Any]) -> RenderableType:
    """The status as a few lines: state and seconds, a bar for the analysis, a row for each hospital."""
    seconds = status.get("seconds")
    head = f"[bold]{escape(str(status.get('title') or status['digest'][:12]))}[/bold]  {escape(str(status['state']))}"
    if seconds is not None:
        head += f"  [dim]{float(seconds):.0f} s[/dim]"
    rows: list[RenderableType] = [head]
    if status.get("reason"):
        rows.append(escape(str(status["reason"])))
    if where := _where(status):
        rows.append(escape(where))
    if status.get("of"):
        rows.append(ProgressBar(total=float(status["of"]), completed=float(_closed(status)), width=_WIDTH))
    table = Table.grid(padding=(0, 2))
    for name, word in status.get("sites", {}).items():
        told = _word(word)
        style = "green" if told == "standing" else "red" if told.startswith("refused") else "yellow"
        table.add_row(escape(name), f"[{style}]{escape(told)}[/{style}]")
    return Group(*rows, table)


def _where(status: Mapping[str, Any]) -> str:
    """`score, step 3 of 10, round 4`, or the phase before the first round."""
    if not status.get("analysis"):
        return {"set-up": "the hospitals agree on keys"}.get(str(status.get("phase", "")), str(status.get("phase", "")))
    return (
        f"{status['analysis']}, step {status.get('step', 0)} of {status.get('of', 0)}, round {status.get('round', 0)}"
    )


def _closed(status: Mapping[str, Any]) -> int:
    return int(status.get("closed", max(0, int(status.get("step", 1)) - 1)))


def _sites(status: Mapping[str, Any]) -> str:
    words = {name: _word(word) for name, word in status.get("sites", {}).items()}
    standing = sum(word == "standing" for word in words.values())
    others = [f"{name} {word}" for name, word in words.items() if word != "standing"]
    return f"{standing} of {len(words)} hospitals standing" + (f" ({', '.join(others)})" if others else "")


def _word(word: object) -> str:
    """A hospital's standing as text: a word, or the roles that decided before the study ran."""
    return ", ".join(map(str, word)) if isinstance(word, list | tuple) else str(word)
