"""What one patient can change, for every head and mode: the sum by at most C, the integers by at most C_int.

Patients are added and taken away at the front, in the middle and at the end, with records and weights far outside any
sensible range. The bound holds whatever the exchange broadcasts (spec/privacy.md, 8: PT).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sequester.protocols import privacy
from sequester.protocols.analyses.training import TRAINING, TrainingPlan, bounded, closed_form
from sequester.protocols.quantise import Codec
from training_cases import HEADS, gradient, name, patients, study

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
STUDIES = {(name(head), d): study(d, {**head, "clip": "0.6"}) for head in HEADS for d in (4, 40)}


@pytest.mark.parametrize("head", HEADS, ids=name)
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10**6),
    d=st.sampled_from([4, 40]),
    n=st.sampled_from([1, 2, 7, 300, 600]),  # below, at and beyond one physical batch
    size=st.sampled_from([0.0, 1.0, 1e4, 1e25]),
    spread=st.sampled_from([0.0, 1.0, 1e3, 1e30]),
    place=st.sampled_from(["front", "middle", "end"]),
)
def test_one_patient_moves_the_sum_by_at_most_c_and_the_integers_by_at_most_c_int(
    head: dict[str, Any], seed: int, d: int, n: int, size: float, spread: float, place: str
) -> None:
    of = STUDIES[name(head), d]
    plan = of.analyses[0]
    rng = np.random.default_rng(seed)
    x, y = patients(n, d, seed)
    odd = {"front": 0, "middle": n // 2, "end": n - 1}[place]
    x[odd] *= size
    y[odd] = 1e6 if size > 1e3 else 1.0  # rare class, or far outside the public bounds
    broadcast = bounded(
        {k: w + spread * rng.standard_normal(w.shape) for k, w in TRAINING.start(plan, of, {}).broadcast.items()}
    )
    layout = privacy.layout(of, plan, 0)
    whole = layout.flatten(gradient(of, x, y, broadcast))
    less = layout.flatten(gradient(of, np.delete(x, odd, 0), np.delete(y, odd), broadcast))
    assert np.linalg.norm(whole - less) <= float(plan.clip) * (1 + privacy.CLIP_SLACK)
    integers = (privacy.codec(of).encode(whole) - privacy.codec(of).encode(less)).astype(np.float64)
    assert np.linalg.norm(integers) <= privacy.clip_int(of, plan, layout)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e308])
@pytest.mark.parametrize("head", HEADS, ids=name)
def test_any_broadcast_gives_a_finite_sum(head: dict[str, Any], value: float) -> None:
    of = STUDIES[name(head), 4]
    plan = of.analyses[0]
    x, y = patients(50, 4)
    broken = {k: np.full(w.shape, value) for k, w in TRAINING.start(plan, of, {}).broadcast.items()}
    privacy.layout(of, plan, 0).flatten(gradient(of, x, y, bounded(broken)))  # it refuses what is not finite


def test_sums_of_a_hundred_thousand_records_hold_their_bound_wherever_one_is_taken_away() -> None:
    of = STUDIES["logistic-closed-0", 4]
    plan = of.analyses[0]
    x, y = patients(100_000, 4, 3)
    layout, codec = privacy.layout(of, plan, 0), privacy.codec(of)
    whole = codec.encode(layout.flatten(gradient(of, x, y)))
    for odd in (0, 1, 50_000, 99_999):
        less = codec.encode(layout.flatten(gradient(of, np.delete(x, odd, 0), np.delete(y, odd))))
        assert np.linalg.norm((whole - less).astype(float)) <= privacy.clip_int(of, plan, layout)


@pytest.mark.parametrize("d", [1_000, 100_000])
def test_wide_models_hold_their_bound_too(d: int) -> None:
    """Rounding may add half a step to each coordinate: the square root of d stands in C_int for that."""
    plan = TrainingPlan.model_validate({"name": "fit", "gradients": "closed", "clip": "0.6"})
    rng = np.random.default_rng(d)
    rows = rng.standard_normal((40, d + 1)) / np.sqrt(d)
    rows[3] *= 1e6
    y, w = (rng.random(40) < 0.3).astype(float), rng.standard_normal(d + 1)
    codec = Codec(32, 16)
    bound = math.ceil(0.6 * (1 + privacy.CLIP_SLACK) * 2**16 + math.sqrt(d + 1))
    whole = codec.encode(closed_form(plan, rows, y, w))
    for odd in (0, 3, 20, 39):
        less = codec.encode(closed_form(plan, np.delete(rows, odd, 0), np.delete(y, odd), w))
        assert np.linalg.norm((whole - less).astype(float)) <= bound
