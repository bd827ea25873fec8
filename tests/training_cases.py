"""Studies and patients for tests of private training."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

import contracts
from sequester.client.compute.training.gradient import clipped_sum
from sequester.protocols.analyses.cohort import Block
from sequester.protocols.analyses.training import TRAINING, TrainingPlan
from sequester.protocols.study import Study

HEADS: list[dict[str, Any]] = [
    {"family": family, "gradients": gradients, "hidden": hidden}
    for family in ("logistic", "linear")
    for gradients in ("closed", "hooks", "ghost")
    for hidden in (0, 8)
    if not (gradients == "closed" and hidden)
]


def name(head: dict[str, Any]) -> str:
    return "-".join(str(v) for v in head.values())


def study(features: int, plan: dict[str, Any], **changed: Any) -> Study:
    variants = [
        {"id": f"v{j}", "chromosome": "1", "position": 1000 + j, "effect": "A", "other": "G", "frequency": "0.3"}
        for j in range(features)
    ]
    if plan.get("family") == "linear":
        changed |= {"phenotype": {"name": "dose", "kind": "quantitative", "lower": "1", "upper": "100"}}
    plan = {"kind": "training", "name": "fit", **plan}
    return contracts.study(**{"covariates": [], "cohort": {}, "variants": variants, "analyses": [plan], **changed})


def block(x: NDArray[np.float64], y: NDArray[np.float64]) -> Block:
    zeros = np.zeros(len(y), dtype=np.int64)
    return Block(x, y, zeros, zeros)


def gradient(of: Study, x: NDArray[np.float64], y: NDArray[np.float64], weights: Any = None) -> dict[str, Any]:
    """The clipped sum as compute answers it, at the plan's first weights where none are given."""
    plan = of.analyses[0]
    assert isinstance(plan, TrainingPlan)
    at = weights if weights is not None else TRAINING.start(plan, of, {}).broadcast
    return clipped_sum(plan, of, [block(x, y)], at, os.urandom)


def patients(n: int, p: int, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p))
    y = (rng.random(n) < 1 / (1 + np.exp(-(x[:, 0] - 1)))).astype(float)
    return x, y
