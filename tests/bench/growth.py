"""How cost grows: sites 3 to 100, values 1,000 to 10 million, patients 1,000 to 500,000, variants 1,000 to a million.

Each series ends with the exponent of a power law fitted to it (least squares on logarithms, over all points): 1 is linear.
Sites and values are the secure sum in one process (the product's state machines over frames, no sockets); patients and
variants are a round of a clipped-gradient model over a frozen store. `rounds_per_second` has the sites of a real exchange.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import store
from bench.frame import Bench, timed
from bench.rehearsal import rehearse
from bench.secagg import ALIKE, Ours
from sequester.client.compute.training.closed import Linear
from sequester.client.compute.training.constants import constants
from sequester.protocols.analyses.training import TrainingPlan
from sequester.protocols.study import Feature

REPEATS = 3
PLAN = TrainingPlan.model_validate({"name": "fit", "gradients": "closed", "clip": "0.3"})


def series(bench: Bench, name: str, label: str, axis: str, points: Mapping[int, float]) -> None:
    """Rows of one line of a plot, and its exponent."""
    for x, seconds in points.items():
        bench.reported(name, f"{label} {axis}={x}", seconds, unit="s")
    xs, ys = np.log(list(points)), np.log(list(points.values()))
    bench.reported(name, f"exponent, {label}", float(np.polyfit(xs, ys, 1)[0]), unit="")


def sums(bench: Bench, name: str, axis: str, cells: Sequence[tuple[int, int, int]]) -> None:
    """Site and server of one round; cells are (x, sites, values)."""
    site: dict[int, float] = {}
    server: dict[int, float] = {}
    for x, n, values in cells:
        ours = Ours(n, ALIKE, np.random.default_rng(1).standard_normal(values) * 0.1)
        ours.site()
        site[x] = min(ours.site() for _ in range(REPEATS))
        server[x] = min(ours.server(0) for _ in range(REPEATS))
        bench.say(f"{axis} {x}: site {site[x]:.4g} s, server {server[x]:.4g} s")
    series(bench, name, "a site's round", axis, site)
    series(bench, name, "the aggregator's round", axis, server)


def gradients(bench: Bench, name: str, axis: str, cells: Sequence[tuple[int, int, int]]) -> None:
    """A later round over a store of int8 genotypes; cells are (x, patients, variants)."""
    seconds: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for x, patients, variants in cells:
            place = store.frozen(Path(folder) / str(x), patients, variants)
            arrays: dict[str, Any] = {
                k: np.load(place / f"{k}.npy", mmap_mode="r") for k in ("dosage", "table", "outcome")
            }
            features = [Feature(f"v{j}", "variant", f"v{j}", 0.6, 0.42**0.5) for j in range(variants)]
            known = constants(features, arrays["dosage"])  # as `data freeze` keeps them
            linear = Linear(features, arrays["dosage"], arrays["table"], np.array(arrays["outcome"]), known)
            weights = {"head.weight": np.random.default_rng(3).standard_normal((1, variants + 1)) * 0.1}
            rows = np.arange(patients)
            linear.clipped_sum(PLAN, rows, weights)  # the file is in memory then
            again = functools.partial(linear.clipped_sum, PLAN, rows, weights)
            seconds[x] = min(timed(again) for _ in range(REPEATS))
            bench.say(f"{axis} {x}: {seconds[x]:.4g} s")
            del arrays, linear, again, known
            shutil.rmtree(place)
    series(bench, name, "a clipped-gradient round", axis, seconds)


def run(bench: Bench) -> None:
    """Four plots, and the rehearsal of many sites."""
    sites = (3, 10, 30) if bench.quick else (3, 5, 10, 20, 30, 50, 70, 100)
    sums(bench, "growth_sites", "sites", [(n, n, 1_000) for n in sites])
    values = (1_000, 10_000, 100_000) if bench.quick else (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
    sums(bench, "growth_values", "values", [(m, 5, m) for m in values])
    patients = (1_000, 5_000) if bench.quick else (1_000, 5_000, 20_000, 100_000, 500_000)
    gradients(bench, "growth_patients", "patients", [(n, n, 1_000) for n in patients])
    variants = (1_000, 10_000) if bench.quick else (1_000, 10_000, 100_000, 1_000_000)
    gradients(bench, "growth_variants", "variants", [(v, 500, v) for v in variants])
    if not bench.quick:
        rehearse(bench, 100)
