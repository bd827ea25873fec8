"""What a person sees while a script works: a live line on a terminal, a plain log elsewhere; and how long each phase took."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.status import Status


@dataclass(slots=True)
class Phases:
    """Named parts of a run, in order; `seconds` of each."""

    _console: Console = field(default_factory=lambda: Console(highlight=False, markup=False, soft_wrap=True))
    seconds: dict[str, float] = field(default_factory=dict)
    _began: float = field(default_factory=time.monotonic)
    _status: Status | None = None
    _title: str = ""

    @property
    def is_live(self) -> bool:
        """True on a terminal, where lines may be drawn again."""
        return self._console.is_terminal

    @contextmanager
    def phase(self, name: str, title: str, live: bool = True) -> Iterator[None]:
        """One part of the run; its time is kept under `name`. `live` False: what runs inside draws by itself."""
        began = time.monotonic()
        self._title = title
        if self.is_live and live:
            self._status = self._console.status(title)
            self._status.start()
        elif not self.is_live:
            self.say(f"{title} ...")
        try:
            yield
        finally:
            self._end_status()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
        took = time.monotonic() - began
        self._console.print(f"{self._clock()}  {title}: {took:.1f} s")

    def say(self, text: str) -> None:
        """Something that happened within a phase."""
        if self._status is not None:
            self._status.update(f"{self._title}: {text}")
        else:
            self._console.print(f"{self._clock()}    {text}")
        sys.stdout.flush()

    def line(self, text: str = "") -> None:
        """A line that stays."""
        self._console.print(text)

    def interrupted(self) -> None:
        """Leave the terminal as it was, whatever drew on it last."""
        self._end_status()
        self._console.show_cursor(True)
        self._console.print()

    def _end_status(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _clock(self) -> str:
        return f"[{time.monotonic() - self._began:6.1f} s]"
