"""The benchmarks' frame: rows of one shape, a peer that is not there is said by name, the page holds every figure."""

from __future__ import annotations

import json
from pathlib import Path

from bench import noise, page, secagg
from bench.frame import Bench, interleaved

KEYS = {"name", "cell", "unit", "ours", "peer", "ratio", "at_least", "met", "note", "group"}


def test_rows_have_one_shape_and_the_page_shows_them(tmp_path: Path) -> None:
    bench = Bench(True, tmp_path / "rows.jsonl", tmp_path / "no-peers", "smoke")
    secagg.mask_limit(bench, 10_000, 2)
    noise.run(bench)
    bench.bounded("memory", "gate m=1k", 120.0, 150.0, unit="MB")
    bench.reached("rounds_per_second", "3 sites", [20.0, 40.0, 30.0], 35.0, unit="/s")
    bench.reported("growth_sites", "round sites=3", 0.2, unit="s")
    rows = [json.loads(line) for line in bench.out.read_text().splitlines()]
    assert rows == bench.rows and all(set(row) == KEYS for row in rows)
    mask, draws, memory, rounds, growth = rows
    assert mask["ratio"]["min"] <= mask["ratio"]["median"] <= mask["ratio"]["max"] and mask["at_least"] == 0.55
    assert draws["ours"] is None and "opendp_noise.py" in draws["note"]
    assert memory["met"] is True and memory["ratio"]["median"] == 1.25
    assert rounds["met"] is False and rounds["ours"] == 30.0
    assert growth["met"] is None and growth["ratio"] is None
    group = {"group": "smoke", "seconds": 1.0, "load": [0.1, 0.2], "failed": None}
    shown = page.html({"figures": rows, "machine": {"cores": 2}, "groups": [group]})
    assert all(row["name"] in shown for row in rows) and "<script" not in shown and "http-equiv" not in shown


def test_a_turn_is_the_same_number_of_calls_for_every_side() -> None:
    called: list[str] = []
    sides = {name: (lambda name=name: called.append(name) or 0.01) for name in ("ours", "peer")}
    taken = interleaved(sides, turns=3, turn_s=0.1)
    assert {name: len(seconds) for name, seconds in taken.items()} == {"ours": 3, "peer": 3}
    assert called.count("ours") == called.count("peer") == 1 + 3 * 5
    assert called[:4] == ["ours", "peer", "ours", "peer"]
