"""`make bench` and `make bench-quick`: every group of figures in a process of its own, one after another.

    python -m bench [--quick] [--only GROUP ...] [--out bench-out]

A group that fails or takes too long is recorded as failed by its name, and the rest goes on. bench.json and bench.html are
written after each group; where a bench.json of the same kind lay there, each ratio is compared with that run's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from bench import page, peer
from bench.frame import Bench, load, machine, sentence

GROUPS = {"secagg": 900, "noise": 120, "training": 240, "genomes": 400, "rounds": 900, "growth": 400}
QUICK_S = 170
AGREES = 0.25


def _child(arguments: argparse.Namespace) -> int:
    """One group, in this process."""
    bench = Bench(arguments.quick, Path(arguments.rows), arguments.out / ".peers", arguments.group)
    try:
        importlib.import_module(f"bench.{arguments.group}").run(bench)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _group(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a group as a process; its rows, its seconds, and why it failed where it did."""
    rows = arguments.out / f"rows-{name}.jsonl"
    rows.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench", "--group", name, "--rows", str(rows), "--out", str(arguments.out)]
    command += ["--quick"] if arguments.quick else []
    print(f"{name} (load {load()})", file=sys.stderr, flush=True)
    start, failed = time.perf_counter(), None
    limit = QUICK_S if arguments.quick else GROUPS[name]
    process = subprocess.Popen(command, env=os.environ | peer.THREADS, start_new_session=True)
    before = load()
    try:
        if (status := process.wait(limit)) != 0:
            failed = f"ended with status {status}"
    except subprocess.TimeoutExpired:
        failed = f"took more than {limit} s"
    finally:
        _end(process)
    found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    rows.unlink(missing_ok=True)
    if failed:
        print(f"  {name} FAILED: {failed}", file=sys.stderr, flush=True)
    return {
        "group": name, "seconds": round(time.perf_counter() - start, 1), "load": [before, load()], "failed": failed,
        "rows": found,
    }  # fmt: skip


def _end(process: subprocess.Popen[bytes]) -> None:
    """The group and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def _write(out: Path, result: dict[str, Any], name: str) -> None:
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / f"{name}.html").write_text(page.html(result))


def _repeated(rows: list[dict[str, Any]], earlier: list[dict[str, Any]]) -> None:
    """Each row's ratio over the last run's, where there was one."""
    before = {(r["name"], r["cell"]): r["ratio"]["median"] for r in earlier if r["ratio"]}
    for row in rows:
        if row["ratio"] and (row["name"], row["cell"]) in before:
            row["to_last_run"] = row["ratio"]["median"] / before[row["name"], row["cell"]]


def main() -> int:
    """Run what was asked for; 1 where a group failed, 0 else, met or not."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small cells, at most three minutes")
    parser.add_argument("--only", action="append", choices=list(GROUPS), help="this group; may be given again")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    parser.add_argument("--group", help=argparse.SUPPRESS)
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.group:
        return _child(arguments)
    arguments.out.mkdir(exist_ok=True)
    name = "bench-quick" if arguments.quick else "bench"
    last = arguments.out / f"{name}.json"
    earlier = json.loads(last.read_text()).get("figures", []) if last.exists() else []
    print("the peers' environment", file=sys.stderr, flush=True)
    missing = peer.install(arguments.out / ".peers")
    for line, why in missing.items():
        print(f"  {line} could not be installed: {why}", file=sys.stderr, flush=True)
    result: dict[str, Any] = {
        "format": 2, "quick": arguments.quick, "machine": machine(), "peers_missing": missing, "groups": [], "figures": [],
    }  # fmt: skip
    for group in arguments.only or GROUPS:
        done = _group(group, arguments)
        rows = done.pop("rows")
        _repeated(rows, earlier)
        result["groups"].append(done)
        result["figures"] += rows
        _write(arguments.out, result, name)
    _summary(result)
    print(f"{arguments.out / name}.json, {arguments.out / name}.html: {len(result['figures'])} figures")
    return 1 if any(g["failed"] for g in result["groups"]) else 0


def _summary(result: dict[str, Any]) -> None:
    for row in result["figures"]:
        if row["met"] is False or row["ours"] is None:
            print(sentence(row))
        change = row.get("to_last_run")
        if change is not None and not 1 / (1 + AGREES) <= change <= 1 + AGREES:
            print(f"{row['name']} {row['cell']}: the ratio is {change:.2f} times that of the last run")
    for group in result["groups"]:
        if group["failed"]:
            print(f"group {group['group']} failed: {group['failed']}")


if __name__ == "__main__":
    sys.exit(main())
