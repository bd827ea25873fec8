"""noise_draws: discrete Gaussian draws a second, ours against OpenDP's; both exact, in integers."""

from __future__ import annotations

import os

import numpy as np

from bench.frame import Bench, interleaved, timed
from bench.peer import Peer, PeerMissing
from sequester.protocols.noise import aes_stream, discrete_gaussian

OURS, THEIRS = 200_000, 5_000


def run(bench: Bench) -> None:
    """One row for each scale."""
    try:
        with Peer(bench.peers, "opendp_noise.py") as peer:
            for sigma in (1_000,) if bench.quick else (100, 1_000, 100_000, 4_000_000):
                _compare(bench, peer, sigma)
    except PeerMissing as missing:
        bench.absent("noise_draws", "", str(missing))


def _compare(bench: Bench, peer: Peer, sigma: int) -> None:
    tasks = {
        "ours": lambda: timed(lambda: discrete_gaussian(sigma, OURS, aes_stream(os.urandom(32), os.urandom(16)))),
        "opendp": lambda: float(peer.ask(sigma=sigma, size=THEIRS)["seconds"]),
    }
    taken = interleaved(tasks, 3 if bench.quick else 7)
    ours, theirs = [OURS / s for s in taken["ours"]], [THEIRS / s for s in taken["opendp"]]
    bench.compared("noise_draws", f"sigma={sigma}", ours, theirs, unit="draws/s", at_least=100, higher=True)
    spread = peer.ask(sigma=sigma, size=THEIRS)["square"] / sigma**2  # the peer draws what we think it draws
    assert 0.8 < spread < 1.25, spread
    mine = discrete_gaussian(sigma, OURS, aes_stream(os.urandom(32), os.urandom(16))).astype(np.float64)
    assert 0.97 < float(mine.var()) / sigma**2 < 1.03
