"""Whole studies on loopback: real exchange, gate and compute processes, mutual TLS, journals, ledgers; no Flower between.

Figures: round_vs_flower_message, rounds_per_second, study_phases, memory. A score histogram of many groups and bins is a
vector of any length, so one short model is followed by several evaluations; each is one round, timed by the exchange.
Each process writes what it knows at its end: seconds by phase and its peak memory.
"""

from __future__ import annotations

import asyncio
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.frame import Bench
from bench.hospital import gate, peak_mb
from bench.peer import Peer, PeerMissing
from loopback import Hospital as Site
from loopback import Loopback, enrolled
from sequester.client.config import Home
from sequester.simulate.hospitals import Hospital, hospitals

STARTS_S, ENDS_S = 1.5, 240


def exchange(root: Path, names: list[str], digest: str, out: Path) -> None:
    """The exchange's process: runs the study, writes its results and its report."""

    async def main() -> None:
        import consortium
        from sequester.protocols.release import Documents, judge
        from sequester.protocols.study import validated
        from sequester.server.config import Home as ServerHome
        from sequester.server.report.page import report_html

        founded = consortium.Exchange(ServerHome(root / "server"))
        place = Loopback(root, founded, {n: Site(n, Home(root / n)) for n in names})
        served = await place.open_exchange()
        start = time.perf_counter()
        served.start(digest)
        status = await place.ended(digest, ENDS_S)
        wall = time.perf_counter() - start
        results = place.results(digest)
        said: dict[str, Any] = {"status": status, "facts": served.store.facts(digest), "wall": wall}
        if status["state"] == "done":
            said["set_up"] = results["wall_seconds"]["set_up"]
            start = time.perf_counter()
            study = validated(json.loads((root / "study.json").read_text()))
            report_html(study, results, {}, judge(study, digest, bytes(32), Documents()))
            said["report"] = time.perf_counter() - start
        said["exchange_mb"] = peak_mb(os.getpid())
        out.write_text(json.dumps(said))
        await place.close_exchange()

    asyncio.run(main())


def histograms(values: int, noise: bool, rounds: int) -> Callable[[Any], dict[str, Any]]:
    """A model of one step and `rounds` histograms of `values` cells."""

    def fields(data: Any) -> dict[str, Any]:
        part = dict(data.study)
        prevalence = part.pop("prevalence")
        part.pop("subgroup"), part.pop("subgroup_values")
        bins = min(1000, values // 2)
        groups = values // (2 * bins)
        mode = {} if noise else {"mode": "exact"}
        solver = {"rounds": 1, "prevalence": prevalence} if noise else {"solver": "newton", "rounds": 3}
        share = {"budget": str(round(0.5 / rounds, 4))} if noise else {}
        model = {"kind": "glm", "name": "score", **solver, **mode} | ({"budget": "0.01"} if noise else {})
        ring = {"ring_bits": 64, "fraction_bits": 28} if not noise else {}
        named = {"subgroup": "ancestry", "subgroup_values": [f"g{i}" for i in range(groups - 1)]} if groups > 1 else {}
        evaluations = [
            {"kind": "evaluation", "name": f"e{i}", "of": "score", "bins": bins, **mode, **share} for i in range(rounds)
        ]
        return {
            **part, "cohort": named, "analyses": [model, *evaluations], "spare_attempts": 0,
            "privacy": {"epsilon": "3", "delta": "0.000001", "order": "8.9"},
            "aggregation": {"mode": "strict", "round_deadline_s": 300, **ring},
        }  # fmt: skip

    return fields


def ten_rounds(data: Any) -> dict[str, Any]:
    """A private model of nine rounds and its evaluation."""
    part = dict(data.study)
    prevalence = part.pop("prevalence")
    part.pop("subgroup"), part.pop("subgroup_values")
    model = {"kind": "glm", "name": "score", "rounds": 9, "prevalence": prevalence, "budget": "0.8"}
    return {
        **part, "cohort": {}, "analyses": [model, {"kind": "evaluation", "name": "e0", "of": "score", "budget": "0.2"}],
        "privacy": {"epsilon": "3", "delta": "0.000001", "order": "8.9"}, "spare_attempts": 0,
        "aggregation": {"mode": "strict", "round_deadline_s": 300},
    }  # fmt: skip


def measure(sites: int, fields: Callable[[Any], dict[str, Any]], exact: bool = False) -> dict[str, Any]:
    """One study from its approval to its report: what the exchange wrote, and a list of what the gates wrote."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        named = tuple(Hospital(f"site-{i:02d}", (100, 300, 100)) for i in range(sites))
        data = hospitals(3, root / "data", named, 200 * sites, chromosomes=2, length_bp=100_000, published=6)
        policy = 'exact = ["glm", "evaluation"]\nexact_iterative = true\n' if exact else ""
        place = enrolled(root, {s.name: data.site(s.name) for s in named}, policy)
        digests: list[str] = []

        async def approve() -> None:
            from sequester.protocols.study import study_json

            study = place.study(fields(data))
            (root / "study.json").write_text(json.dumps(study_json(study)))
            async with place.serving():
                digests.append(await place.publish_and_approve(study))

        asyncio.run(approve())
        spawn = multiprocessing.get_context("spawn")
        out, digest = root / "out.json", digests[0]
        processes = [spawn.Process(target=exchange, args=(root, [s.name for s in named], digest, out))]
        processes += [spawn.Process(target=gate, args=(root / s.name, digest, root / f"{s.name}.json")) for s in named]
        try:
            for process in processes:
                process.start()
                if process is processes[0]:
                    time.sleep(STARTS_S)
            for process in processes:
                process.join(ENDS_S)
            if not out.exists():
                raise RuntimeError(f"the study of {sites} sites did not end within {ENDS_S} s")
            found: dict[str, Any] = json.loads(out.read_text())
            if found["status"]["state"] != "done":
                raise RuntimeError(f"the study of {sites} sites ended as {found['status']}")
            found["gates"] = [json.loads((root / f"{s.name}.json").read_text()) for s in named]
        finally:
            for process in processes:
                process.kill()
        found["rounds"] = [f["total_s"] for f in found["facts"] if f["analysis"].startswith("e")][2:]
        return found


def against_flower(bench: Bench, turns: int) -> None:
    """The median round of a study against one stock message, in turn, SuperLink and SuperNodes standing by."""
    cell = "3 sites, 1,000 values"
    try:
        with Peer(bench.peers, "flwr_message.py") as peer:
            ours, theirs = [], []
            for _ in range(turns):
                ours.append(statistics.median(measure(3, histograms(1000, True, 30))["rounds"]))
                answer = peer.ask()
                assert answer["replies"] == 3
                theirs.append(float(answer["seconds"]))
            bench.compared("round_vs_flower_message", cell, ours, theirs, at_least=300)
    except PeerMissing as missing:
        bench.absent("round_vs_flower_message", cell, str(missing))


def cell_of(bench: Bench, sites: int, values: int, noise: bool, at_least: float | None) -> None:
    """One row of rounds_per_second, and with 3 sites those of memory."""
    cell = f"{sites} sites, {values:,} values, {'noise' if noise else 'exact'}"
    try:
        found = measure(sites, histograms(values, noise, 30 if values <= 1000 else 12), exact=not noise)
    except (RuntimeError, AssertionError) as error:
        bench.absent("rounds_per_second", cell, f"failed: {error}")
        return
    rates = sorted(1 / s for s in found["rounds"])
    if at_least is None:
        note = f"reported; {rates[0]:.3g} to {rates[-1]:.3g}"
        bench.reported("rounds_per_second", cell, statistics.median(rates), unit="rounds/s", note=note)
    else:
        bench.reached("rounds_per_second", cell, rates, at_least, unit="rounds/s")
    if sites == 3:
        _memory(bench, cell, values, found)


def _memory(bench: Bench, cell: str, values: int, found: dict[str, Any]) -> None:
    gate_mb = max(g["gate_mb"] for g in found["gates"])
    bench.bounded("memory", f"gate, {cell}", gate_mb, 150 + 6 * values / 1e6, unit="MB")
    bench.reported("memory", f"compute, {cell}", max(g["compute_mb"] for g in found["gates"]), unit="MB")
    bench.reported("memory", f"exchange, {cell}", found["exchange_mb"], unit="MB")


def phases(bench: Bench) -> None:
    """Where the time of a ten-round study of five sites goes; a phase of the gates is the slowest gate's."""
    found = measure(5, ten_rounds)
    slowest = {
        phase: max(g["phases"].get(phase, 0.0) for g in found["gates"])
        for phase in ("dispatch", "compute", "noise", "masks")
    }
    rounds = math.fsum(f["total_s"] for f in found["facts"])
    said = {
        "the whole, start to receipts": found["wall"], "dispatch: a gate's join, without Flower": slowest["dispatch"],
        "key set-up, waiting for the last gate to start": found["set_up"], "rounds": rounds,
        "of these compute": slowest["compute"], "noise, beside compute": slowest["noise"],
        "quantise and mask": slowest["masks"],
        "wire, exchange and ledgers: the rest of the rounds": max(0.0, rounds - slowest["compute"] - slowest["masks"]),
        "report": found["report"],
    }  # fmt: skip
    for phase, seconds in said.items():
        bench.reported("study_phases", f"5 sites, 10 rounds: {phase}", seconds, unit="s")


def run(bench: Bench) -> None:
    """Every figure of this file."""
    against_flower(bench, 1 if bench.quick else 3)
    if bench.quick:
        return
    phases(bench)
    cell_of(bench, 3, 1_000, True, 35)
    cell_of(bench, 3, 1_000, False, None)
    cell_of(bench, 3, 1_000_000, True, 1.5)
    cell_of(bench, 3, 1_000_000, False, 5)
    cell_of(bench, 10, 1_000, True, None)
    cell_of(bench, 10, 1_000_000, True, None)
    cell_of(bench, 30, 1_000, True, None)
    cell_of(bench, 3, 10_000_000, False, None)
