"""One piece of reading in a process of its own: libraries written in C can crash or hang on a damaged file.

The child's error stream is closed, since htslib quotes sample ids and genotypes there. What comes back is the result, a
`SiteError` of the child, or a `SiteError` that says how the child ended.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from sequester.protocols.errors import SiteError

T = TypeVar("T")
Progress = Callable[[str, int, int], None]  # what is being done, how far, of how much
QUIET_S = 900.0


def isolated(task: Callable[..., T], *arguments: Any, what: str, progress: Progress, quiet_s: float = QUIET_S) -> T:
    """`task(*arguments, progress)` in a child process. A child that says nothing for `quiet_s` seconds is ended."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(theirs, task, arguments), daemon=True)
    child.start()
    theirs.close()
    try:
        while True:
            if not ours.poll(quiet_s):
                raise SiteError(
                    f"reading {what} made no progress for {quiet_s:g} seconds",
                    hint="the disk hangs, or the file is damaged in a way that stops its reader: copy it again",
                )
            try:
                kind, *said = ours.recv()
            except EOFError:
                child.join()
                raise _ended(what, child.exitcode) from None
            if kind == "progress":
                progress(*said)
            elif kind == "error":
                raise SiteError(said[0], hint=said[1])
            else:
                result: T = said[0]
                return result
    finally:
        if child.is_alive():
            child.join(0.5)
        if child.is_alive():
            child.kill()
        child.join()
        ours.close()


def _ended(what: str, status: int | None) -> SiteError:
    how = f"status {status}"
    if status is not None and status < 0:
        how = signal.Signals(-status).name
    return SiteError(
        f"the reader of {what} ended with {how}",
        hint="the file is damaged in a way its library does not survive, or memory ran out: copy the file again",
    )


def _child(pipe: Connection, task: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)
    try:
        result = task(*arguments, lambda *said: pipe.send(("progress", *said)))
    except SiteError as error:
        pipe.send(("error", error.message, error.hint))
    except MemoryError:
        pipe.send(("error", "there is not enough memory to read the file", "its sizes may be damaged: copy it again"))
    except OSError as error:
        pipe.send(("error", f"{error.filename or 'a file'}: {error.strerror}", "check disk space and who may read it"))
    else:
        pipe.send(("done", result))
    pipe.close()
