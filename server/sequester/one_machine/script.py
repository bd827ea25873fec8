"""A script that runs a consortium on this machine, from its working folder to its exit status."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from sequester.one_machine.phases import Phases
from sequester.one_machine.processes import INTERRUPTS, Failed


def carried_out(name: str, act: Callable[[Path, Phases], bool], keep: bool, hint: str = "") -> int:
    """Exit status of `act(working folder, phases)`: 0 where it is True, 1 with one error otherwise, 130 if interrupted.

    The folder goes, unless it is to be kept or something failed there. `hint` says what to do then; `{work}` is the folder.
    """
    INTERRUPTS.install()
    phases = Phases()
    work = Path(tempfile.mkdtemp(prefix=f"sequester-{name}-"))
    try:
        return 0 if act(work, phases) else 1
    except Failed as error:
        keep = True
        phases.line(f"error: {error.message}")
        if tail := error.tail():
            phases.line(f"the end of {error.log}:\n{tail}")
        if hint:
            phases.line("hint: " + hint.format(work=work))
        return 1
    except KeyboardInterrupt:
        phases.interrupted()
        phases.line("interrupted; everything that was started has been stopped.")
        return 130
    finally:
        if keep:
            phases.line(f"the working folder stays: {work}")
        else:
            shutil.rmtree(work, ignore_errors=True)
