"""A peer's side of the pipe: says its version, then answers one JSON line for each request."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def serve(load: Callable[[], tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]]) -> None:
    """`load` imports the library and returns its version and what answers a request; a missing one is said by name."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is not an answer

    def say(answer: dict[str, Any]) -> None:
        pipe.write(json.dumps(answer) + "\n")
        pipe.flush()

    try:
        version, answer = load()
    except ImportError as error:
        say({"missing": f"{error.name or error} cannot be imported in the peers' environment"})
        return
    say({"version": version})
    for line in sys.stdin:
        say(answer(json.loads(line)))
