"""The filter's figures are those of the literature, and an independent accountant agrees with what is reported."""

from __future__ import annotations

import math

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from sequester.protocols.accounting import Event, cap, cost, epsilon_pld, epsilon_rdp, sigma_for
from sequester.protocols.errors import PrivacyError

DELTA = 1e-6


def exact_epsilon(sigma: float, count: int, delta: float = DELTA) -> float:
    """The exact epsilon of composed Gaussians (Balle and Wang 2018): a second opinion that composes nothing."""
    mu = math.sqrt(count) / sigma
    return float(
        brentq(
            lambda e: norm.cdf(mu / 2 - e / mu) - math.exp(e) * norm.cdf(-mu / 2 - e / mu) - delta, 1e-9, 200, xtol=1e-10
        )
    )  # fmt: skip


@pytest.mark.parametrize(("epsilon", "order", "sigma"), [(1, 22, 4.531), (3, 8.9, 1.644), (8, 4.4, 0.689)])
def test_the_filter_calibrates_the_published_multipliers(epsilon: float, order: float, sigma: float) -> None:
    assert sigma_for(cap(epsilon, DELTA, order), 1, order) == pytest.approx(sigma, abs=6e-4)  # printed to 3 decimals


def test_an_order_that_cannot_hold_the_cap_is_refused_not_clamped() -> None:
    with pytest.raises(PrivacyError, match="cannot hold"):
        cap(3, DELTA, 4.7)
    assert cap(3, DELTA, 4.9) > 0  # privacy.md 7: negative below 4.8 at cap 3


def test_what_the_cap_allows_stands_for_its_epsilon() -> None:
    assert epsilon_rdp(cap(3, DELTA, 8.9), DELTA, 8.9) == pytest.approx(3, abs=1e-12)


@pytest.mark.parametrize(("sigma", "count"), [(20.0, 10), (8.0, 10), (5.0, 1), (1.644, 1), (0.689, 1)])
def test_the_reported_epsilon_is_the_exact_one_from_above(sigma: float, count: int) -> None:
    reported, exact = epsilon_pld([Event("fit", sigma, count)], DELTA), exact_epsilon(sigma, count)
    assert -1e-9 <= reported - exact <= 2e-3 * max(1.0, exact)  # PLD rounds losses up on a grid of 1e-4


def test_ten_studies_of_epsilon_one_cost_far_less_than_ten() -> None:
    ten = [Event("fit", 4.531, 1)] * 10
    assert epsilon_pld(ten, DELTA) == pytest.approx(3.26, abs=0.01) and epsilon_pld(ten, DELTA) <= 3.6
    assert epsilon_rdp(sum(cost(e, 8.9) for e in ten), DELTA, 8.9) <= 3.8


@pytest.mark.parametrize(
    ("sigma", "parts", "epsilon"),
    [  # privacy.md 1, two copies of a patient (4 parts), and 2.2, everybody else colludes (h = 2, 3, 4, 11 parts)
        (4.531, 4, 1.97), (1.644, 4, 6.12), (0.689, 4, 17.4), (1.644, 2, 4.12), (1.644, 3, 5.19), (1.644, 11, 11.1),
    ],
)  # fmt: skip
def test_two_copies_and_colluding_others_cost_the_published_figures(sigma: float, parts: int, epsilon: float) -> None:
    assert epsilon_pld([Event("fit", sigma / math.sqrt(parts), 1)], DELTA) == pytest.approx(epsilon, rel=4e-3)


def test_sampled_releases_cost_less_and_no_events_cost_nothing() -> None:
    whole, sampled = Event("fit", 2.0, 200), Event("fit", 2.0, 200, q=0.05)
    assert 0 < cost(sampled, 8.9) < cost(whole, 8.9)
    assert epsilon_pld([sampled], DELTA) == pytest.approx(1.792, abs=0.002)  # privacy.md 7, table
    assert epsilon_pld([], DELTA) == 0.0 == epsilon_pld([Event("fit", 2.0, 0)], DELTA)


def test_an_order_without_a_finite_cost_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dropped:
        rdp: tuple[float, ...] = ()

        def __init__(self, orders: list[float]) -> None: ...

        def compose(self, event: object) -> None: ...

    monkeypatch.setattr("dp_accounting.rdp.RdpAccountant", Dropped)
    with pytest.raises(PrivacyError, match="gives no cost"):
        cost(Event("fit", 0.5, 1, q=0.05), 1.1)


def test_an_event_survives_the_ledger_with_all_its_digits() -> None:
    event = Event("fit", 1 / 3, 7, 0.1)
    assert Event.from_json(event.json()) == event
