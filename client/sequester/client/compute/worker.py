"""The compute process: holds one frozen cohort, answers with contributions, knows no key and no network.

Started by the gate with one end of a socket pair. It gives up its network before anything else is imported; what goes
wrong later leaves as the name of a fault, and the text, which may name files and lines, stays in this site's own log.
"""

from __future__ import annotations

import argparse
import socket
import sys
import traceback
from pathlib import Path

from sequester.client import isolation


def main() -> None:
    """Answer letters until the gate closes the socket."""
    parser = argparse.ArgumentParser(prog="compute", description="Started by the gate; not for people.")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--unisolated", action="store_true")
    arguments = parser.parse_args()
    isolation.die_with_parent()
    isolation.no_core_dumps()
    isolation.leave_network()  # whether it worked is the gate's to see, from outside

    from sequester.client.compute.cohort import StoredCohort
    from sequester.client.socket import Channel
    from sequester.protocols import arrays
    from sequester.protocols.analyses.registry import analysis_of
    from sequester.protocols.errors import PeerError, SequesterError
    from sequester.protocols.study import Study, parse_study

    channel = Channel(socket.socket(fileno=arguments.fd))
    channel.send("started")
    study: Study | None = None
    cohort: StoredCohort | None = None
    while True:
        try:
            letter = channel.receive()
        except PeerError:
            return
        try:
            match letter.kind:
                case "load":
                    study = parse_study(letter.header["study"].encode())
                    cohort = StoredCohort(Path(letter.header["cohort"]), study, letter.header.get("device", "cpu"))
                    channel.send("loaded")
                case "contribute" if study is not None and cohort is not None:
                    plan = study.analysis(letter.header["analysis"])
                    sums = analysis_of(plan).contribution(plan, study, cohort, letter.arrays(), letter.header["step"])
                    channel.send("contribution", payload=arrays.encode(sums))
                case "stop":
                    return
                case _:
                    channel.send("failed", {"fault": "ORDER"})
        except SequesterError as error:
            print(f"{type(error).__name__}: {error.message}", file=sys.stderr, flush=True)  # noqa: T201  # this site's log
            channel.send("failed", {"fault": type(error).__name__})
        except Exception:  # the outermost loop of compute: a fault of the code must not take its data along
            traceback.print_exc(limit=-4)
            channel.send("failed", {"fault": "CODE"})


if __name__ == "__main__":
    main()
