"""The release gate passes what keeps its promise and stops what does not; its bounds are those of the papers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

import contracts
from sequester.client.gate.contribution import noise_share
from sequester.client.release import ENTRIES, FEWEST, FULL, SHORT, Size, Verdict, release_gate, size_for
from sequester.protocols import privacy
from sequester.protocols.accounting import Event, epsilon_pld
from sequester.protocols.evidence import (
    check_padding,
    gaussian_epsilon,
    gdp_auc_bound,
    one_run_bound,
    padding_limits,
    pooled_ratio,
    short_rounds,
)
from sequester.protocols.study import Study
from training_cases import study

DELTA = 1e-6
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def promised(epsilon: str, order: str, **plan: Any) -> Study:
    return study(
        40, {"gradients": "closed", "prevalence": "0.2", **plan},
        privacy={"epsilon": epsilon, "delta": "0.000001", "order": order}, n0=2000, n_max=4000,
    )  # fmt: skip


def checks(verdict: Verdict) -> dict[str, bool]:
    return {check.name: check.passed for check in verdict.checks}


def again_if_failed(of: Study, size: Any, **more: Any) -> Verdict:
    """The trial's verdict; a failed one is tried once more, as a hospital would.

    The noise is the operating system's: one trial in some hundreds is a false alarm by the levels of its checks, two in a
    row are one in some hundred thousand, and what is wrong fails again.
    """
    (verdict,) = release_gate(of, size, **more)
    return verdict if verdict.passed else release_gate(of, size, **more)[0]


def divided(by: float) -> Any:
    def share(*asked: Any) -> Any:
        drawn = noise_share(*asked)
        assert drawn is not None
        return np.rint(drawn / by).astype(np.int64)

    return share


@pytest.mark.parametrize(("epsilon", "order"), [("1", "22"), ("3", "8.9"), ("8", "4.4")])
def test_what_this_program_does_passes_its_own_gate(epsilon: str, order: str) -> None:
    of = promised(epsilon, order)
    verdict = again_if_failed(of, SHORT)
    assert verdict.passed, verdict.json()
    assert verdict.claim == pytest.approx(privacy.promise(of).pld_without_spares)  # type: ignore[union-attr]


def test_a_fifth_of_the_noise_is_found_in_the_model_alone() -> None:
    (verdict,) = release_gate(promised("3", "8.9"), SHORT, share=divided(5))
    assert not verdict.passed
    assert checks(verdict)["canaries"] is False and checks(verdict)["padding"] is False
    assert checks(verdict)["noise_moments"]  # the sampler itself is sound: what it drew was not used


def test_a_model_without_privacy_is_found_by_model_and_sums() -> None:
    (verdict,) = release_gate(promised("3", "8.9"), SHORT, share=divided(1e9))
    found = checks(verdict)
    assert not (found["canaries"] or found["white_box"] or found["padding"])


def test_a_share_taken_for_the_whole_noise_is_found_by_the_padding() -> None:
    # spec/privacy.md, trap 23: what canaries find of noise over sqrt(5) lies about the claim, so that they cannot be asked
    (verdict,) = release_gate(promised("3", "8.9"), SHORT, share=divided(math.sqrt(5)))
    assert not verdict.passed and not checks(verdict)["padding"]


OTHERS: dict[str, dict[str, Any]] = {
    "one-shot": {"analyses": [{"kind": "prs", "name": "m", "prevalence": "0.2"}]},
    "newton": {"analyses": [{"kind": "glm", "name": "m", "solver": "newton", "rounds": 4}], "covariates": []},
    "linear": {
        "analyses": [{"kind": "linear", "name": "m"}],
        "phenotype": {"name": "dose", "kind": "quantitative", "lower": "1", "upper": "100"},
    },
    "poisson": {
        "analyses": [{"kind": "glm", "name": "m", "family": "poisson", "rounds": 5, "prevalence": "0.5"}],
        "phenotype": {
            "name": "visits",
            "kind": "quantitative",
            "lower": "0",
            "upper": "20",
            "centre": "0",
            "scale": "1",
        },
    },
    "hazard": {
        "analyses": [{"kind": "survival", "name": "m", "model": "hazard"}],
        "phenotype": {"name": "age_at_event", "kind": "time", "lower": "0", "upper": "10", "event": "died"},
    },
    "heads": {
        "analyses": [
            {"kind": "glm", "name": "pooled", "mode": "exact", "solver": "newton"},
            {"kind": "heads", "name": "m", "of": "pooled"},
        ],
        "cohort": {"subgroup": "ancestry", "subgroup_values": ["AFR", "EUR"]},
        "aggregation": {"mode": "strict", "ring_bits": 64, "fraction_bits": 20},
    },
    "table": {"analyses": [{"kind": "glm", "name": "m", "features": "table", "rounds": 5, "prevalence": "0.2"}]},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_every_kind_of_private_model_passes_and_is_stopped_without_noise(kind: str) -> None:
    of = contracts.study(**OTHERS[kind])
    verdict = again_if_failed(of, "short")
    assert verdict.passed, verdict.json()
    (bad,) = release_gate(of, "short", share=divided(1e9))
    found = checks(bad)
    assert not found["padding"] and not found["white_box"] and found["sensitivity"], bad.json()
    # sums of products open few columns: no canary of a model is a score of many
    assert kind in ("newton", "linear", "heads") or not found["canaries"], bad.json()


def test_the_simulated_cohort_is_the_plans_own_as_far_as_minutes_allow() -> None:
    small, large = promised("3", "8.9"), contracts.study(n0=1_000_000, n_max=1_200_000, privacy__delta="0.0000001")
    assert size_for(small, small.analyses[0], "full").patients == small.n0 == 2000
    assert size_for(small, small.analyses[0], "short").width == len(small.features()) == 40
    cut = size_for(large, large.analyses[0], "full")
    assert cut.patients * (cut.width + cut.own + cut.dirac) <= ENTRIES["full"] and cut.patients > 10_000
    long = contracts.study(analyses__0__rounds=500)
    assert size_for(long, long.analyses[0], "short").patients == FEWEST


def test_the_trial_says_how_far_it_is() -> None:
    heard: list[tuple[str, float]] = []
    small = Size(patients=200, width=10, own=30, dirac=30, runs=2, neighbours=4, draws=10_000)
    release_gate(promised("3", "8.9"), small, tell=lambda what, part: heard.append((what, part)))
    assert [part for _, part in heard] == sorted(part for _, part in heard) and 0 <= heard[0][1] < heard[-1][1] < 1
    assert heard[-1][0] == "fit: canaries, training 2 of 2"


def test_the_gate_looks_at_opacus_networks_and_local_steps_too() -> None:
    # one run of 30 canaries is a false alarm in 1 of 200, the median of three in 1 of 10,000
    small = Size(patients=200, width=20, own=30, dirac=30, runs=3, neighbours=12, draws=10_000)
    for plan, changed in (
        ({"gradients": "hooks"}, {}),
        ({"gradients": "ghost", "hidden": 4, "step": "1"}, {}),
        ({"gradients": "closed", "local_steps": 2}, {"privacy__mechanism": "local"}),
    ):
        of = study(30, {"rounds": 3, **plan}, n0=2000, n_max=4000, **changed)
        verdict = again_if_failed(of, small)
        assert verdict.passed, verdict.json()


@pytest.mark.slow  # 25 s for the five: too long for `make check`, not for `make test`
@pytest.mark.parametrize(("epsilon", "order", "by"), [
    ("1", "22", 1), ("3", "8.9", 1), ("8", "4.4", 1), ("3", "8.9", 5), ("3", "8.9", 1e9),
])  # fmt: skip
def test_the_full_audit_of_a_thousand_variants(epsilon: str, order: str, by: float) -> None:
    verdict = again_if_failed(promised(epsilon, order), FULL, share=divided(by) if by > 1 else noise_share)
    assert checks(verdict)["canaries"] == (by == 1) and verdict.passed == (by == 1)


# ---- the bounds -----------------------------------------------------------------------------------------------------


def test_padding_limits_are_the_published_ones() -> None:
    for count, low, high in ((1024, 0.919, 1.083), (8192, 0.971, 1.029), (10_240, 0.974, 1.026)):
        assert padding_limits(count) == pytest.approx((low, high), abs=6e-4)  # spec/privacy.md 8, three decimals


def test_padding_with_five_percent_too_little_is_blocked_and_too_much_is_said() -> None:
    rng = np.random.default_rng(1)
    blocked = sum(not check_padding([rng.normal(0, 0.95, 1024) for _ in range(10)], 1.0).passed for _ in range(200))
    assert blocked > 190  # power 99.8 % at 8,192 coordinates, more at these 10,240
    right = [check_padding([rng.normal(0, 1.0, 1024) for _ in range(10)], 1.0).passed for _ in range(200)]
    assert all(right)  # level 2e-4: four false alarms in 100,000 such runs of 200
    loud = check_padding([rng.normal(0, 1.1, 1024) for _ in range(10)], 1.0)
    assert loud.passed and "more noise" in loud.sentence
    one = [rng.normal(0, 1.0, 1024) for _ in range(10)]
    one[3] *= 0.8
    assert "round 4" in check_padding(one, 1.0).sentence


def test_rounds_on_different_scales_are_pooled_each_on_its_own_and_a_short_one_is_found() -> None:
    rng = np.random.default_rng(2)
    measured = [[float((rng.normal(0, sd, 1024) ** 2).sum()), 1024.0, sd**2] for sd in (1.0, 100.0) * 6]
    assert pooled_ratio(measured) == pytest.approx(1, abs=0.04) and short_rounds(measured) == []
    measured[4][0] *= 0.8**2  # small beside the others, and a fifth too little
    assert short_rounds(measured) == [4]


@pytest.mark.parametrize(("sigma", "epsilon"), [(4.225, 1), (1.544, 3), (0.653, 8)])
def test_epsilon_of_a_gaussian_is_the_analytic_one(sigma: float, epsilon: float) -> None:
    assert gaussian_epsilon(1 / sigma, DELTA) == pytest.approx(epsilon, rel=2e-3)  # spec/privacy.md 2.2, rounded sigma
    assert gaussian_epsilon(1 / sigma, DELTA) == pytest.approx(epsilon_pld([Event("", sigma, 1)], DELTA), abs=2e-3)


def test_perfect_guesses_give_the_published_bounds() -> None:
    scores = np.concatenate([np.arange(280.0), np.arange(1000.0, 1320.0)])
    is_in = np.arange(600) >= 280
    assert one_run_bound(scores, is_in, DELTA) == pytest.approx(4.42, abs=0.01)  # spec/privacy.md 8, five times
    assert gdp_auc_bound(scores, is_in, DELTA) == pytest.approx(23.3, abs=0.05)


def test_scores_of_a_gaussian_mechanism_bound_it_from_below() -> None:
    rng = np.random.default_rng(4)
    too_high = 0
    for _ in range(200):
        is_in = rng.random(600) < 0.5
        scores = is_in + rng.normal(0, 1.544, 600)  # epsilon 3 exactly
        too_high += one_run_bound(scores, is_in, DELTA) > 3 or gdp_auc_bound(scores, is_in, DELTA) > 3
    assert too_high <= 12  # both levels together allow 6 %: 12 of 200
    assert np.mean([gdp_auc_bound(s + rng.normal(0, 0.3, 600), s, DELTA) for s in [rng.random(600) < 0.5]]) > 8


def test_guesses_that_know_nothing_bound_nothing() -> None:
    rng = np.random.default_rng(5)
    found = [one_run_bound(rng.normal(size=600), rng.random(600) < 0.5, DELTA) > 0 for _ in range(200)]
    assert np.mean(found) <= 0.05 + 0.045  # level 5 %, three standard errors of 200


def test_the_one_run_bound_is_the_least_epsilon_that_explains_the_guesses() -> None:
    scores = np.concatenate([np.zeros(100), np.ones(100)])
    is_in = np.arange(200) >= 115  # 85 of the 100 highest were in, everybody of the 100 lowest was out
    bound = one_run_bound(scores, is_in, 0.0)

    def p_value(epsilon: float, k: int, right: int) -> float:
        return float(binom.sf(right - 1, 2 * k, 1 / (1 + math.exp(-epsilon))))

    order = np.argsort(scores, kind="stable")
    best = 0.0
    for k in (10, 25, 50, 100):
        right = int(is_in[order[-k:]].sum() + (~is_in[order[:k]]).sum())
        grid = np.arange(0, 8, 0.001)
        tails = np.array([p_value(e, k, right) for e in grid])
        best = max(best, float(grid[tails <= 0.05 / 4].max(initial=0.0)))
    assert bound == pytest.approx(best, abs=0.002)
