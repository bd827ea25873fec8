"""The process of a trial: the release gate on made-up patients, without network, key or any path of this site.

Started by the gate or by `audit release`. A study and a form come in on standard input; what is being done, the verdicts
with their figures, or a fault go out as JSON lines. It yields to everything else on the machine.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from sequester.client import isolation

NICE = 10


def main() -> None:
    """Try once; standard error is the caller's log."""
    isolation.die_with_parent()
    isolation.no_core_dumps()
    isolation.leave_network()  # nothing here is a patient's: where the host does not allow it, the trial goes on
    os.nice(NICE)

    from sequester.client.release import release_gate
    from sequester.protocols.errors import SequesterError
    from sequester.protocols.study import parse_study

    def say(row: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()

    request = json.loads(sys.stdin.readline())
    try:
        study = parse_study(request["study"].encode())
        found = release_gate(study, request["form"], tell=lambda what, part: say({"said": what, "part": part}))
    except SequesterError as error:
        say({"error": error.message, "hint": error.hint})
        return
    rows = [verdict.json() | {"tried": verdict.size.tried(verdict.analysis).json()} for verdict in found]
    say({"verdicts": rows})


if __name__ == "__main__":
    main()
