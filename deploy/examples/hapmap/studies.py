"""Every kind of analysis that a yes-or-no trait, a time to an event and a count can have: on 1,033 people in five regions."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from examples.compared import Compared, absolute
from examples.example import EXACT_SUM, PRIVATE_SUM, Studies
from examples.ran import Ran

YEARS = {"name": "years", "kind": "time", "unit": "years", "lower": "0", "upper": "12", "event": "died"}
EXACT: list[dict[str, Any]] = [
    {"kind": "counts", "name": "feasibility",
     "axes": [{"column": "case"}, {"column": "sex"}, {"column": "age", "edges": ["50", "55", "60", "65"]}]},
    {"kind": "quality", "name": "variants", "split": "outcome", "frequencies": True},
    {"kind": "structure", "name": "ancestry", "components": 4, "iterations": 20},
    {"kind": "glm", "name": "clinical", "solver": "newton", "rounds": 20, "features": "table"},
    {"kind": "glm", "name": "firth", "solver": "newton", "rounds": 60, "features": "table", "firth": "always"},
    {"kind": "association", "name": "scan", "components": "ancestry", "follow_below": "0.001"},
    {"kind": "burden", "name": "genes", "components": "ancestry"},
    {"kind": "heterogeneity", "name": "apart", "terms": ["age", "sex"], "of": "scan", "top": 5},
    {"kind": "penalised", "name": "lasso", "l1": "1", "fraction": "0.3", "rounds": 60},
    {"kind": "penalised", "name": "net", "l1": "0.5", "strength": "0.08", "scheme": "newton", "rounds": 20},
    {"kind": "prs", "name": "one_shot", "prevalence": "0.3", "shrinkage": "none"},
    {"kind": "heads", "name": "heads", "of": "clinical", "columns": "table"},
    {"kind": "evaluation", "name": "held_out", "of": "lasso", "bins": 1000},
    {"kind": "calibration", "name": "right", "of": "lasso"},
    {"kind": "reclassification", "name": "moved", "of": "lasso", "against": "clinical", "thresholds": ["0.25", "0.4"]},
]  # fmt: skip
TIME: list[dict[str, Any]] = [
    {"kind": "survival", "name": "curves", "model": "kaplan_meier", "bins": 240, "by_subgroup": True, "part": "all"},
    {"kind": "survival", "name": "cox_by_site", "model": "cox_by_site"},
    {"kind": "survival", "name": "cox", "model": "cox", "bins": 240},
    {"kind": "survival", "name": "hazard", "model": "hazard"},
    {"kind": "evaluation", "name": "held_out", "of": "cox", "times": 240, "bins": 1000},
]
VISITS = {
    "name": "visits", "kind": "quantitative", "unit": "visits", "lower": "0", "upper": "30", "centre": "0", "scale": "1",
}  # fmt: skip
COUNT: list[dict[str, Any]] = [
    {"kind": "glm", "name": "visits_fit", "family": "poisson", "solver": "newton", "rounds": 25, "prevalence": "2"},
    {"kind": "evaluation", "name": "held_out", "of": "visits_fit", "error_bound": "30"},
]
GENE = 8  # variants that stand for a gene: neighbours on the panel


def studies(skeleton: Mapping[str, Any], folder: Path, people: int) -> Studies:
    """Exact on the whole panel; time to the event, a count, and private, on the known loci."""
    panel = json.loads((folder / "panel.json").read_text("utf-8"))
    ids = [row["id"] for row in panel]
    genes = [{"name": f"GENE{k}", "variants": ids[GENE * k : GENE * (k + 1)]} for k in range(len(ids) // GENE)]
    exact = [{"mode": "exact", **plan, **({"genes": genes} if plan["kind"] == "burden" else {})} for plan in EXACT]
    # half held out: what a histogram takes from an average precision falls with the people in it
    by_sex = {"test_fraction": "0.5", "subgroup": "sex", "subgroup_values": ["women"]}
    return {
        "exact": {**skeleton, "lineage": "hapmap-exact", "cohort": by_sex, "variants": panel, "analyses": exact,
                  "aggregation": EXACT_SUM},
        "time": {**skeleton, "lineage": "hapmap-time", "cohort": by_sex, "phenotype": YEARS,
                 "analyses": [{"mode": "exact", **plan} for plan in TIME], "aggregation": EXACT_SUM},
        "count": {**skeleton, "lineage": "hapmap-count", "cohort": by_sex, "phenotype": VISITS,
                  "analyses": [{"mode": "exact", **plan} for plan in COUNT], "aggregation": EXACT_SUM},
        "private": {**skeleton, "lineage": "hapmap-private", "aggregation": PRIVATE_SUM},
    }  # fmt: skip


def findings(name: str, ran: Ran) -> Iterator[Compared | str]:
    """What was put into the trait is found; private counts lie where their noise says."""
    if name == "exact":
        with (next(iter(ran.tables.values())).parents[1] / "truth/effects.csv").open(encoding="utf-8") as file:
            causal = {row["variant"] for row in csv.DictReader(file)}
        scan = ran.result("scan")
        t = scan["table"]
        top = sorted(range(len(t["id"])), key=lambda j: t["p"][j])[: len(causal)]
        found = len(causal & {t["id"][j] for j in top})
        yield Compared("scan", "the truth", f"causal variants of {len(causal)} not among the top", 12.0 - found, 6)
        # two standard errors of the median of so many chi-squared: 2 x 1.06 / .455 over the root of their number
        chance = 4.66 / len(t["id"]) ** 0.5
        yield Compared("scan", "the null", "lambda with 4 components minus 1", abs(scan["lambda"] - 1), chance)
        yield f"AUC of the lasso on held-out people {ran.result('held_out')['auc']['value']:.3f}"
    if name == "private":
        yield from _private(ran)


def _private(ran: Ran) -> Iterator[Compared | str]:
    people = ran.people("all")
    result = ran.result("feasibility")
    cells = {tuple(cell["levels"]): cell["people"] for cell in result["cells"]}
    ours, theirs = [], []
    for (case, sex), found in cells.items():
        if isinstance(found, int):
            truth = (ran.table["case"] == case) & (ran.table["sex"] == sex)
            ours.append(found / result["noise_sd"])
            theirs.append(float(truth.sum()) / result["noise_sd"])
    # six standard deviations of the noise and of rounding: a false alarm in 5e8 cells
    yield absolute("feasibility", "pandas", "private cells, in standard deviations of their noise", ours, theirs, 6)
    epsilon = float(ran.results["epsilon"])
    yield Compared("all", "the study", "epsilon spent", epsilon, float(ran.study.privacy.epsilon))
    padding = abs(float(ran.results["noise_on_padding"]) - 1)
    yield Compared("all", "the padding", "noise over what was promised, minus 1", padding, 0.15)
    held_out = ran.people("test")
    w, b = ran.model("score")
    auc = _auc(held_out.y, held_out.x @ w + b)
    told = ran.result("held_out").get("auc")
    of = "too few people for its noise" if told is None else f"{told['value']:.3f}"
    yield f"private AUC on {len(held_out.y)} held-out of {len(people.y)} people {auc:.3f}; the study's histogram says {of}"


def _auc(y: np.ndarray, z: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(y, z))
