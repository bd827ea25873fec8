"""What a new model changes for patients: their risk category by the old and the new model, by outcome, in one table.

Categories lie between public risk thresholds. Net reclassification and the decision curve of both models are sums over
the table; one patient is one cell: sensitivity 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from sequester.protocols.analyses.analysis import Broadcast, Finished, Layout, Next, State, Sums
from sequester.protocols.analyses.cohort import Cohort, Part, Result
from sequester.protocols.analyses.counts import noise_sd
from sequester.protocols.analyses.evaluation import subgroups
from sequester.protocols.analyses.metrics import by_group
from sequester.protocols.analyses.plan import AnalysisPlan, Number
from sequester.protocols.analyses.weights import judged, sent, sigmoid

if TYPE_CHECKING:
    from sequester.protocols.study import Study

Vector = NDArray[np.float64]


class ReclassificationPlan(AnalysisPlan):
    """`of` is the new model, `against` the old one; `thresholds` are probabilities, rising."""

    kind: Literal["reclassification"] = "reclassification"
    of: str
    against: str
    thresholds: tuple[Number, ...] = Field(min_length=1, max_length=9)
    part: Part = "test"


class Reclassification:
    """See the module."""

    kind = "reclassification"

    def rounds(self, plan: ReclassificationPlan, study: Study) -> int:
        return 1

    def layout(self, plan: ReclassificationPlan, study: Study, step: int) -> Layout:
        k = len(plan.thresholds) + 1
        return Layout((("cells", (len(subgroups(study)), k, k, 2)),))

    def sensitivity(self, plan: ReclassificationPlan, study: Study) -> float:
        return 1.0

    def is_iterative(self, plan: ReclassificationPlan, study: Study) -> bool:
        return True

    def start(self, plan: ReclassificationPlan, study: Study, earlier: Mapping[str, Finished]) -> Next:
        models = [sent(earlier[name].state) for name in (plan.against, plan.of)]
        most = max(
            len(model["b"]) for model in models
        )  # more than one of heads: the other model is repeated beside them
        w = np.array([np.broadcast_to(m["w"], (most, m["w"].shape[-1])) if most > 1 else m["w"] for m in models])
        b = np.array([np.broadcast_to(m["b"], most) if most > 1 else m["b"][0] for m in models])
        return Next({}, {"w": w, "b": b})

    def contribution(
        self, plan: ReclassificationPlan, study: Study, cohort: Cohort, broadcast: Broadcast, step: int
    ) -> Sums:
        w, b = np.asarray(broadcast["w"], dtype=np.float64), np.asarray(broadcast["b"], dtype=np.float64)
        thresholds = np.array([float(t) for t in plan.thresholds])
        cells = np.zeros(self.layout(plan, study, step).fields[0][1])
        for block in cohort.blocks(plan.part):
            old, new = (
                np.searchsorted(thresholds, sigmoid(judged(block, w[m], np.atleast_1d(b[m]))), side="right")
                for m in (0, 1)
            )
            np.add.at(cells, (block.strata, old, new, (block.y > 0.5).astype(np.int64)), 1.0)
        return {"cells": cells}

    def combine(self, plan: ReclassificationPlan, study: Study, state: State, sums: Sums, step: int) -> Next | Finished:
        cells, names, floor = sums["cells"], subgroups(study), study.publication_floor
        noise = noise_sd(plan, study)

        def measure(table: Vector, groups: int) -> Result:
            margin = 2 * noise * np.sqrt(groups * table[:, :, 0].size)
            if min(float(table[:, :, 0].sum()), float(table[:, :, 1].sum())) < floor + margin:
                return {"suppressed": f"<{floor}"}
            return changes(table, [float(t) for t in plan.thresholds])

        result = measure(cells.sum(axis=0), len(cells))
        if len(names) > 1:
            place = {name: g for g, name in enumerate(names)}
            size = {name: float(cells[g].sum()) for name, g in place.items()}
            result["groups"] = by_group(size, lambda name: measure(cells[place[name]], 1))
        return Finished(result, {})


def changes(table: Vector, thresholds: list[float]) -> Result:
    """Net reclassification and the decision curves of a table (old, new, outcome)."""
    k = len(thresholds) + 1
    up, down = np.triu(np.ones((k, k)), 1), np.tril(np.ones((k, k)), -1)
    controls, cases = table[:, :, 0], table[:, :, 1]
    n, n1, n0 = float(table.sum()), float(cases.sum()), float(controls.sum())
    events = float((cases * (up - down)).sum()) / n1
    others = float((controls * (down - up)).sum()) / n0
    curve = []
    for j, threshold in enumerate(thresholds):
        odds = threshold / (1 - threshold)
        row: Result = {"threshold": threshold, "treat_all": n1 / n - n0 / n * odds}
        for name, axis in (("old", 1), ("new", 0)):
            true = float(cases.sum(axis=axis)[j + 1 :].sum()) / n
            false = float(controls.sum(axis=axis)[j + 1 :].sum()) / n
            row[name] = true - false * odds
        curve.append(row)
    return {"net_reclassification": events + others, "events": events, "non_events": others, "net_benefit": curve}


def faults(study: Study, plan: ReclassificationPlan, earlier: Mapping[str, Any]) -> Iterator[str]:
    """What a plan says against its study."""
    from sequester.protocols.analyses.registry import leaves_a_model  # the registry knows this file at import

    for name in (plan.of, plan.against):
        of = earlier.get(name)
        if of is None or not leaves_a_model(of) or of.kind == "training":
            yield f"analysis {plan.name} is of `{name}`, which is no model with weights before it"
    if study.phenotype.kind != "binary":
        yield f"analysis {plan.name}: reclassification of a {study.phenotype.kind} phenotype; binary was expected"
    if any(not 0 < t < 1 for t in plan.thresholds) or any(b <= a for a, b in pairwise(plan.thresholds)):
        yield f"analysis {plan.name}: thresholds are rising probabilities between 0 and 1"


RECLASSIFICATION = Reclassification()
