"""What both sides derive from a study: noise that the study's own filter admits, shares that cover the worst legal sum."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from contracts import exact_study, study
from sequester.protocols import arrays, privacy
from sequester.protocols.analyses.registry import analysis_of
from sequester.protocols.errors import PeerError, PrivacyError, StudyError
from sequester.protocols.signing import raw_public
from sequester.protocols.study import Study

STUDY = study()
FIT = STUDY.analysis("score")


def roster(n: int, mode: str = "strict", **changed: Any) -> Study:
    keys = [raw_public(Ed25519PrivateKey.from_private_bytes(bytes([100 + i]) * 32)).hex() for i in range(n)]
    return study(
        sites=[{"id": f"site-{i:02d}", "key": key} for i, key in enumerate(keys)],
        aggregation={"mode": mode},
        n_max=8000,
        n0=5000,
        **changed,
    )


def test_a_study_calibrated_to_epsilon_3_is_admitted_by_a_cap_of_3_and_uses_it_up() -> None:
    spent = privacy.check_calibrated(STUDY)
    figures = privacy.promise(STUDY)
    assert figures is not None
    assert spent > 0 and 2.999 <= figures.filter <= 3.0
    assert figures.pld_without_spares < figures.pld < figures.filter < figures.two_copies
    assert figures.pld < figures.all_others_collude


def test_less_noise_than_calibrated_is_refused() -> None:
    assert FIT.noise_multiplier is not None
    thinner = FIT.model_copy(update={"noise_multiplier": FIT.noise_multiplier - Decimal("0.01")})
    with pytest.raises(PrivacyError, match="the analyses cost"):
        privacy.check_calibrated(STUDY.model_copy(update={"analyses": (thinner, *STUDY.analyses[1:])}))


def test_the_multiplier_is_the_one_shot_figure_times_the_root_of_the_charges() -> None:
    alone = study(analyses=[{"kind": "glm", "name": "score", "rounds": 10, "prevalence": "0.1"}])
    plan = alone.analysis("score")
    assert (privacy.rounds(alone, plan), privacy.spares(alone, plan), privacy.charges(alone, plan)) == (10, 2, 12)
    assert privacy.multiplier(plan) == pytest.approx(1.6441 * math.sqrt(12), rel=3e-4)


@pytest.mark.parametrize(
    ("n", "mode", "c", "absent", "adders"),
    [  # secure-aggregation.md 2; in strict mode the smallest active set is t, so h = t - c there too
        (3, "strict", 1, 0, 2), (3, "double", 1, 0, 2), (5, "double", 1, 1, 3), (10, "double", 3, 3, 4),
        (30, "double", 9, 10, 11),
    ],
)  # fmt: skip
def test_defaults_follow_the_roster(n: int, mode: str, c: int, absent: int, adders: int) -> None:
    of = roster(n, mode)
    params = privacy.session_params(of)
    assert (params.max_corrupt, params.max_absent) == (c, absent)
    assert privacy.noise_adders(of) == adders


def test_the_share_covers_the_noise_with_the_fewest_honest_adders() -> None:
    of = privacy.layout(STUDY, FIT, 0)
    whole = privacy.multiplier(FIT) * privacy.clip_int(STUDY, FIT, of)
    share = privacy.sigma_int(STUDY, FIT, of)
    h = privacy.noise_adders(STUDY)
    assert whole <= share * math.sqrt(h) < whole + math.sqrt(h)
    local = study(privacy__mechanism="local")
    assert privacy.sigma_int(local, local.analysis("score"), of) >= whole


def test_replace_one_adjacency_doubles_the_sensitivity() -> None:
    of = privacy.layout(STUDY, FIT, 0)
    both = study(privacy__adjacency="replace-one")
    single = privacy.clip_int(STUDY, FIT, of)
    sensitivity = analysis_of(FIT).sensitivity(FIT, STUDY)
    assert single == math.ceil(sensitivity * (1 + 1e-5) * 2**16 + math.sqrt(of.coordinates))
    assert privacy.clip_int(both, both.analysis("score"), of) == 2 * single


def test_padding_is_pooled_to_8192_coordinates_and_absent_from_exact_sums() -> None:
    for plan in STUDY.analyses:
        padding = privacy.layout(STUDY, plan, 0).padding
        assert padding >= 1024 and padding * privacy.rounds(STUDY, plan) >= 8192
    exact = exact_study()
    assert privacy.layout(exact, exact.analyses[0], 0).padding == 0
    assert privacy.events(exact) == [] and privacy.spares(exact, exact.analyses[0]) == 0


def test_a_noise_share_outside_the_samplers_range_names_bits_clip_and_sigma() -> None:
    coarse = STUDY.model_copy(update={"aggregation": STUDY.aggregation.model_copy(update={"fraction_bits": 4})})
    with pytest.raises(StudyError, match=r"steps with 4 fraction bits, C .*, sigma "):
        privacy.sigma_int(coarse, FIT, privacy.layout(coarse, FIT, 0))


def test_sums_that_could_leave_the_ring_are_refused() -> None:
    privacy.check_headroom(STUDY)
    crowd = STUDY.model_copy(update={"n_max": 10**6})
    with pytest.raises(StudyError, match="words of 32 bits"):
        privacy.check_headroom(crowd)


def test_the_task_changes_with_whatever_a_site_must_agree_on() -> None:
    task = privacy.task_for(STUDY, FIT, 0, 0, b"weights")
    others = [
        privacy.task_for(STUDY, FIT, 1, 0, b"weights"),
        privacy.task_for(STUDY, FIT, 0, 1, b"weights"),
        privacy.task_for(STUDY, FIT, 0, 0, b"other"),
        privacy.task_for(study(n0=9999), FIT, 0, 0, b"weights"),
    ]
    assert task == privacy.task_for(STUDY, FIT, 0, 0, b"weights") and task not in others
    assert task.event.startswith("gaussian sigma=") and task.noise.startswith("discrete-gaussian/")


def test_budget_shares_beyond_the_whole_are_refused() -> None:
    fat = FIT.model_copy(update={"budget": Decimal("0.95")})
    with pytest.raises(StudyError, match=r"add up to 1\.05"):
        privacy.calibrate(STUDY.model_copy(update={"analyses": (fat, *STUDY.analyses[1:])}))


@pytest.mark.parametrize("name", ["score", "held_out"])
def test_a_broadcast_of_another_shape_than_the_plan_is_refused_before_it_meets_a_patient(name: str) -> None:
    # an array of n rows would fit a hospital of n patients and no other: its answer would tell n
    plan = STUDY.analysis(name)
    p = len(STUDY.features())
    right = {"w": np.zeros(p) if name == "score" else np.zeros((1, p)), "b": np.zeros(1)}
    privacy.check_broadcast(STUDY, plan, 0, arrays.encode(right))
    for wrong in (
        {"w": np.zeros((1234, p))}, {"w": np.zeros(p + 1)}, {"w": np.full(right["w"].shape, np.nan)},
        {"b": np.full(1, np.inf)}, {"b": np.zeros(1, dtype=np.int64)}, {"more": np.zeros(1)},
    ):  # fmt: skip
        with pytest.raises(PeerError):
            privacy.check_broadcast(STUDY, plan, 0, arrays.encode(right | wrong))
    with pytest.raises(PeerError):
        privacy.check_broadcast(STUDY, plan, 0, b"not arrays")


def test_a_broadcast_of_an_exact_analysis_has_the_shapes_of_its_step_and_finite_numbers() -> None:
    of = exact_study("glm")
    plan = of.analyses[0]
    p = len(of.features())
    right, inverse = {"w": np.zeros(p), "b": np.zeros(1)}, {"inverse": np.zeros((p + 1, p + 1))}
    for step, sent in ((0, right), (1, right), (3, right | inverse)):
        privacy.check_broadcast(of, plan, step, arrays.encode(sent))
    for step, wrong in (
        (0, right | inverse), (1, {"w": np.zeros((1234, p)), "b": np.zeros(1)}), (1, {"w": np.zeros(p)}), (2, {}),
        (1, right | {"w": np.full(p, np.nan)}), (1, right | {"b": np.full(1, -np.inf)}),
        (3, right | {"inverse": np.zeros((p, p))}), (3, right | {"more": np.zeros(1)}),
    ):  # fmt: skip
        with pytest.raises(PeerError, match="broadcast"):
            privacy.check_broadcast(of, plan, step, arrays.encode(wrong))
