"""A hundred sites on one machine, each a virtual SuperNode of Flower's simulation engine (Ray)."""

from __future__ import annotations

import statistics
from pathlib import Path

from bench.frame import Bench
from bench.peer import Peer, PeerMissing

PROTOCOLS = Path(__file__).parents[2] / "protocols"


def rehearse(bench: Bench, sites: int) -> None:
    """Rows of one rehearsal; its sums are compared with the plain ones."""
    cell = f"{sites} sites, 1,000 values"
    try:
        with Peer(bench.peers, "flwr_rehearsal.py", PROTOCOLS) as peer:
            found = peer.ask(sites=sites)
    except PeerMissing as missing:
        bench.absent("ray_rehearsal", cell, str(missing))
        return
    assert found["sums_are_right"]
    bench.reported("ray_rehearsal", f"{cell}: the whole", found["wall_s"], unit="s")
    bench.reported("ray_rehearsal", f"{cell}: Ray's start and the first message", found["first_message_s"], unit="s")
    bench.reported("ray_rehearsal", f"{cell}: key set-up", found["set_up_s"], unit="s")
    bench.reported("ray_rehearsal", f"{cell}: a round", statistics.median(found["rounds_s"]), unit="s")
