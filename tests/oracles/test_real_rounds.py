"""Every exact analysis as a real round carries it: head-room checked, each number rounded to the study's fixed point."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import contracts
import plain_loop
from oracles import table
from oracles.test_structure import variants
from sequester.protocols import privacy
from sequester.protocols.study import Study

BINARY = {"name": "case", "kind": "binary", "values": ["0", "1"]}
HEIGHT = {"name": "height", "kind": "quantitative", "lower": "-10", "upper": "10", "centre": "0", "scale": "1"}
TIME = {"name": "years", "kind": "time", "unit": "years", "lower": "0", "upper": "12", "event": "died"}
V, SIZES = 40, [900, 400, 150, 50]
LARGE = [1200, 900, 600, 50]  # three hospitals that can estimate a term themselves, as heterogeneity asks
STRUCTURE = {"kind": "structure", "name": "ancestry", "components": 3, "iterations": 8}
CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "logistic": (BINARY, [{"kind": "glm", "solver": "newton", "rounds": 20, "features": "table"}]),
    "firth": (BINARY, [{"kind": "glm", "solver": "newton", "rounds": 60, "features": "table", "firth": "always"}]),
    "linear": (HEIGHT, [{"kind": "linear"}]),
    "association": (BINARY, [STRUCTURE, {"kind": "association", "components": "ancestry", "follow_below": "0.05"}]),
    "quantitative": (HEIGHT, [{"kind": "association"}]),
    "burden": (BINARY, [{"kind": "burden", "genes": [{"name": "A", "variants": ["v0", "v1", "v2"]}]}]),
    "heterogeneity": (BINARY, [{"kind": "heterogeneity", "terms": ["c0", "v0", "v1"]}]),
    "heads": (
        BINARY,
        [
            {"kind": "glm", "name": "pooled", "solver": "newton", "rounds": 20, "features": "table"},
            {"kind": "heads", "of": "pooled", "columns": "table"},
        ],
    ),
    "cox": (TIME, [{"kind": "survival", "model": "cox", "bins": 240, "features": "table"}]),
    "cox_by_site": (TIME, [{"kind": "survival", "model": "cox_by_site", "features": "table"}]),
    "hazard": (TIME, [{"kind": "survival", "model": "hazard", "features": "table"}]),
    "lasso": (BINARY, [{"kind": "penalised", "l1": "1", "fraction": "0.2", "rounds": 60}]),
    "folds": (HEIGHT, [{"kind": "penalised", "scheme": "folds", "l1": "0.5", "grid": ["0.3", "0.1", "0.03"]}]),
    "ridge": (
        HEIGHT,
        [{"kind": "penalised", "l1": "0", "strength": "0.1", "scheme": "conjugate_gradient", "rounds": 80}],
    ),
}


def study_of(name: str) -> Study:
    phenotype, plans = CASES[name]
    named = [{"name": "last", "mode": "exact", "part": "all", **plan} for plan in plans]
    return contracts.study(
        phenotype=phenotype, variants=variants(V), analyses=named,
        cohort={"subgroup": "ancestry", "subgroup_values": ["AFR", "EUR"]} if name == "heads" else {},
        covariates=[
            {"name": f"c{j}", "kind": "quantitative", "lower": "-9", "upper": "9", "centre": "0", "scale": "1"} for j in range(2)
        ],
        aggregation={"mode": "strict", "ring_bits": 64, "fraction_bits": 28},
    )  # fmt: skip


def numbers(value: Any, path: str = "") -> dict[str, float]:
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in numbers(inner, f"{path}.{name}").items()}
    if isinstance(value, list):
        return {k: v for i, inner in enumerate(value) for k, v in numbers(inner, f"{path}.{i}").items()}
    return {path: float(value)} if isinstance(value, int | float) and not isinstance(value, bool) else {}


@pytest.mark.parametrize("name", CASES)
def test_fixed_point_leaves_every_number_of_the_result_where_it_was(name: str) -> None:
    study = study_of(name)
    privacy.check_headroom(study)
    rng, sizes = np.random.default_rng(1), LARGE if name == "heterogeneity" else SIZES
    n = sum(sizes)
    x, g = rng.standard_normal((n, 2)), rng.binomial(2, 0.3, (n, V)).astype(float)
    z = 0.6 * x[:, 0] + 0.4 * g[:, 0] - 1
    event = None
    if study.phenotype.kind == "binary":
        y = (rng.random(n) < 1 / (1 + np.exp(-z))).astype(float)
    elif study.phenotype.kind == "quantitative":
        y = np.clip(z + rng.standard_normal(n), -10, 10)
    else:
        time, end = rng.exponential(8 * np.exp(-z)), rng.uniform(1, 12, n)
        y, event = np.minimum(time, end), (time <= end).astype(float)
    strata = rng.integers(0, 3, n) if name == "heads" else None
    whole = plain_loop.patients(study, y, table=x, dosage=g, event=event, strata=strata)
    cohorts = plain_loop.split(whole, sizes)
    plain, rounded = (
        numbers({n: done.result for n, done in plain_loop.run(study, cohorts, fixed_point=fixed).items()})
        for fixed in (False, True)
    )
    assert plain.keys() == rounded.keys()
    assert name != "heterogeneity" or any(key.endswith(".i2") for key in plain)  # else nothing of it is compared
    for key, value in plain.items():
        if key.endswith(("residual", "steps")):
            continue
        # 28 fraction bits: 2^-29 a number and hospital, against sums of hundreds; relative to 1 where a value is small
        difference = abs(value - rounded[key]) / max(abs(value), 1.0)
        table.within("fixed point of a real round", "float64", f"{name}: any number, relative", difference, 1e-6)
