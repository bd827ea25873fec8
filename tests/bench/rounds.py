"""Rounds of a whole study, three hospitals on loopback: real exchange, gate and compute processes, journals, ledgers.

    python -m bench.rounds [--sites 3] [--values 1000] [--values 1000000]

A score histogram of many groups and bins is a vector of any length, so one short model is followed by several evaluations;
each is one round. Prints one JSON line for each case: median and 95th percentile of the exchange's own round seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from loopback import Hospital as Site
from loopback import Loopback, enrolled
from sequester.client.config import Home
from sequester.protocols.signing import sha256
from sequester.simulate.hospitals import Hospital, hospitals

ROUNDS = 12


def gate(home: Path, digest: str, bundle: str) -> None:
    """One hospital's gate process: joins and works until the study is over."""

    async def main() -> None:
        site = Site(home.name, Home(home))
        consortium = site.open()
        await consortium.join(digest, bundle)
        while consortium.outcome(digest) is None:
            await asyncio.sleep(0.2)
        await site.close()

    asyncio.run(main())


def exchange(root: Path, names: list[str], digest: str, out: Path) -> None:
    """The exchange's process: runs the study and writes its results."""

    async def main() -> None:
        import consortium
        from sequester.server.config import Home as ServerHome

        place = Loopback(
            root, consortium.Exchange(ServerHome(root / "server")), {n: Site(n, Home(root / n)) for n in names}
        )
        served = await place.open_exchange()
        served.start(digest)
        status = await place.ended(digest, 900)
        out.write_text(
            json.dumps({"status": status, "results": place.results(digest), "facts": served.store.facts(digest)})
        )
        await place.close_exchange()

    asyncio.run(main())


def study(data: Any, values: int, noise: bool) -> dict[str, Any]:
    """A model of one step and `ROUNDS` histograms of `values` cells."""
    part = dict(data.study)
    prevalence = part.pop("prevalence")
    part.pop("subgroup"), part.pop("subgroup_values")
    bins = min(1000, values // 2)
    groups = values // (2 * bins)
    mode = {} if noise else {"mode": "exact"}
    solver = {"rounds": 1, "prevalence": prevalence} if noise else {"solver": "newton", "rounds": 3}
    model = {"kind": "glm", "name": "score", **solver, **mode}
    shares = {"budget": "0.01"} if noise else {}
    ring = {"ring_bits": 64, "fraction_bits": 28} if not noise else {}
    return {
        **part,
        "cohort": {"subgroup": "ancestry", "subgroup_values": [f"g{i}" for i in range(groups - 1)]} if groups > 1 else {},
        "analyses": [model | shares]
        + [{"kind": "evaluation", "name": f"e{i}", "of": "score", "bins": bins, **mode, **shares} for i in range(ROUNDS)],
        "privacy": {"epsilon": "3", "delta": "0.000001", "order": "8.9"}, "spare_attempts": 0,
        "aggregation": {"mode": "strict", "round_deadline_s": 300, **ring},
    }  # fmt: skip


def measure(sites: int, values: int, noise: bool) -> dict[str, Any]:
    """Seconds of the rounds of one study."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        named = tuple(Hospital(f"site-{i:02d}", (100, 300, 100)) for i in range(sites))
        data = hospitals(3, root / "data", named, 200 * sites, chromosomes=2, length_bp=100_000, published=6)
        policy = "" if noise else 'exact = ["glm", "evaluation"]\nexact_iterative = true\n'
        place = enrolled(root, {s.name: data.site(s.name) for s in named}, policy)
        digests: list[str] = []

        async def approve() -> None:
            async with place.serving():
                digests.append(await place.publish_and_approve(place.study(study(data, values, noise))))

        asyncio.run(approve())
        fork = multiprocessing.get_context("spawn")
        out = root / "out.json"
        names = [s.name for s in named]
        processes = [fork.Process(target=exchange, args=(root, names, digests[0], out))]
        processes += [fork.Process(target=gate, args=(root / s.name, digests[0], sha256(_bundle()))) for s in named]
        for process in processes:
            process.start()
            if process is processes[0]:
                time.sleep(1.5)
        for process in processes:
            process.join(900)
        found = json.loads(out.read_text())
        assert found["status"]["state"] == "done", found["status"]
        seconds = [f["total_s"] for f in found["facts"] if f["analysis"].startswith("e")][2:]
        return {
            "sites": sites, "values": values, "noise": noise, "rounds": len(seconds),
            "median_s": round(statistics.median(seconds), 4), "p95_s": round(sorted(seconds)[int(0.95 * len(seconds))], 4),
        }  # fmt: skip


def _bundle() -> bytes:
    from loopback import BUNDLE

    return BUNDLE


def main() -> None:
    """Print one line a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--values", type=int, action="append")
    arguments = parser.parse_args()
    for values in arguments.values or [1000, 1_000_000]:
        for noise in (True, False):
            print(json.dumps(measure(arguments.sites, values, noise)), flush=True)


if __name__ == "__main__":
    main()
