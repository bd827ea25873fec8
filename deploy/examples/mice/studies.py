"""Two real traits of 1,940 mice: every kind of analysis of a quantity, whole families held out, ridge on all variants."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from examples.compared import Compared, absolute
from examples.example import EXACT_SUM, Studies
from examples.of_models import dual_ridge
from examples.ran import Ran

HERITABILITY = {"cd8": 0.60, "mch": 0.63}  # GEMMA's estimates: what a ridge penalty follows from
MCH = {"name": "mch", "kind": "quantitative", "lower": "-5", "upper": "5", "centre": "0", "scale": "1"}
WINDOW = 10  # neighbouring variants of chromosome 17 that stand for a gene
BEHIND = 0.005  # of r on held-out families: what federated ridge may lie below pooled ridge
CD8: list[dict[str, Any]] = [
    {
        "kind": "counts",
        "name": "feasibility",
        "axes": [{"column": "sex"}, {"column": "cd8", "edges": ["-1", "0", "1"]}],
    },
    {"kind": "quality", "name": "variants", "frequencies": True},
    {"kind": "structure", "name": "relatedness", "components": 4, "iterations": 12},
    {"kind": "linear", "name": "sexes", "features": "table"},
    {"kind": "glm", "name": "sexes_again", "family": "linear", "solver": "newton", "rounds": 4, "features": "table"},
    {"kind": "association", "name": "scan"},
    {"kind": "association", "name": "within_structure", "components": "relatedness"},
    {"kind": "burden", "name": "windows"},
    {"kind": "heterogeneity", "name": "apart", "terms": ["sex"], "of": "scan", "top": 5},
    {"kind": "penalised", "name": "ridge", "l1": "0", "scheme": "conjugate_gradient", "rounds": 150},
    {"kind": "evaluation", "name": "held_out", "of": "ridge", "error_bound": "5"},
]
WIDE = ("linear", "penalised", "evaluation")  # what the second trait is asked for too


def studies(skeleton: Mapping[str, Any], folder: Path, people: int) -> Studies:
    """Everything for CD8; ridge, judged on held-out families, for MCH."""
    panel = json.loads((folder / "panel.json").read_text("utf-8"))
    mhc = [row["id"] for row in panel if row["chromosome"] == "17"]
    windows = [
        {"name": f"chr17_{k}", "variants": mhc[WINDOW * k : WINDOW * (k + 1)]} for k in range(len(mhc) // WINDOW)
    ]
    of = {"burden": {"genes": windows}}
    made = {}
    for trait, phenotype in (("cd8", skeleton["phenotype"]), ("mch", MCH)):
        h2, n0 = HERITABILITY[trait], int(skeleton["n0"])
        of["penalised"] = {"strength": f"{len(panel) * (1 - h2) / h2 / (0.8 * n0):.4f}"}
        plans = [
            {"mode": "exact", **plan, **of.get(plan["kind"], {})}
            for plan in CD8
            if trait == "cd8" or plan["kind"] in WIDE
        ]
        bits = 29 if trait == "cd8" else 34  # components of 2,000 mice and 7,991 variants leave room for no more
        made[trait] = {**skeleton, "lineage": f"mice-{trait}", "phenotype": phenotype, "variants": panel,
                       "analyses": plans, "aggregation": {**EXACT_SUM, "fraction_bits": bits}}  # fmt: skip
    return made


def findings(name: str, ran: Ran) -> Iterator[Compared | str]:
    """Chromosome 17 leads for CD8; federated ridge predicts held-out families as pooled ridge does."""
    chromosome = {v.id: v.chromosome for v in ran.study.variants}
    if name == "cd8":
        for scan in ("scan", "within_structure"):
            t = ran.result(scan)["table"]
            top = min((j for j in range(len(t["id"])) if not t["error"][j]), key=lambda j: t["p"][j])
            place = chromosome[t["id"][top]]
            yield absolute(scan, "Valdar et al. 2006", "chromosome of the strongest variant", int(place), 17, 0)
            yield Compared(scan, "Valdar et al. 2006", "p of the strongest variant", t["p"][top], 1e-20)
    train, test = ran.people("train"), ran.people("test")
    strength = float(ran.result("ridge")["strength"])
    w, b = dual_ridge(train, strength)
    pooled = float(np.corrcoef(test.x @ w + b, test.y)[0, 1])
    federated = float(ran.result("held_out")["correlation"])
    yield Compared(
        "ridge", "the dual solve", "r of held-out families, below pooled", max(pooled - federated, 0.0), BEHIND
    )
    yield (
        f"ridge on {len(ran.study.variants):,} variants, {ran.result('ridge')['steps']} steps: r {federated:.3f} on "
        f"{len(test.y)} mice of held-out families, pooled {pooled:.3f}"
    )
