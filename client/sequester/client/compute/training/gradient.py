"""One round's clipped sum of a training plan: sample, prepare records, gradient by closed form or Opacus, add.

Everything is float64, the torch model too: a float32 sum moves by more than its bound when a record at the front is
removed (spec/privacy.md, 2.3). With 53 bits a sum of 100,000 records of norm C moves by less than C 1e-5 of rounding,
which C_int holds; no cap on the records of one sum is needed, and none is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

from sequester.client.compute.training.sampling import ByteSource, poisson_mask
from sequester.protocols.analyses.cohort import Block
from sequester.protocols.analyses.training import TrainingPlan, closed_form, outcomes, records
from sequester.protocols.study import Study

Vector = NDArray[np.float64]
CHUNK_NUMBERS = 1 << 22  # of per-patient gradients held at once, 32 MB


def clipped_sum(
    plan: TrainingPlan,
    study: Study,
    blocks: Iterable[Block],
    weights: Mapping[str, Vector],
    source: ByteSource,
    device: str = "cpu",
) -> dict[str, Vector]:
    """Named as `weights` are, float64, norm of each patient's part at most the plan's clip."""
    parts = []
    for block in blocks:
        kept = poisson_mask(len(block.y), Decimal(plan.rate), source)
        parts.append((records(plan, study, block.x[kept]), outcomes(plan, block.y[kept])))
    if plan.gradients == "closed":
        w = weights["head.weight"][0]
        total = np.zeros_like(w)
        for rows, y in parts:
            total += closed_form(plan, rows, y, w)
        return {"head.weight": total[None, :]}

    from sequester.client.compute.training.round import Round  # torch and opacus, only where a plan asks for them

    step = Round(plan, len(study.features()), weights, device)
    numbers = sum(int(w.size) for w in weights.values())
    step.begin(_chunks(parts, max(1, min(256, CHUNK_NUMBERS // numbers))))
    vector = step.vector()
    step.skip()
    return step.named(vector)


def _chunks(parts: list[tuple[Vector, Vector]], rows_each: int) -> list[tuple[Vector, Vector]]:
    """Records in physical batches; one without a record where nobody was sampled, so that the round is the same."""
    chunks = [(x[i : i + rows_each], y[i : i + rows_each]) for x, y in parts for i in range(0, len(y), rows_each)]
    return chunks or [(parts[0][0][:0], parts[0][1][:0])]
