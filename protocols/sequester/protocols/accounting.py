"""What a mechanism costs: the RDP filter that decides, the PLD figure that is reported (spec/privacy.md, section 7).

An event is what happened; its cost is computed here and nowhere else. The filter adds Renyi costs at ONE order, fixed
when a ledger is founded (Feldman and Zrnic 2021: adaptive composition is free at a fixed order); PLD by dp-accounting
reports what was spent, and needs the parameters fixed in advance, which a signed study does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from sequester.protocols.errors import PrivacyError

if TYPE_CHECKING:
    import dp_accounting  # otherwise where it is used: it takes 0.6 s to load, and most commands count nothing

DELTA_SLACK = 1.001  # discrete against continuous Gaussian (spec/privacy.md, 2.3)


@dataclass(frozen=True, slots=True)
class Event:
    """`count` Gaussian releases with noise multiplier `sigma` and Poisson rate `q`, of one analysis of one study."""

    analysis: str
    sigma: float
    count: int
    q: float = 1.0

    def json(self) -> dict[str, object]:
        """The event as the ledger keeps it; the multiplier as text, all its digits."""
        return {
            "type": "gaussian", "analysis": self.analysis, "sigma": repr(self.sigma), "count": self.count, "q": repr(self.q)
        }  # fmt: skip

    @classmethod
    def from_json(cls, row: dict[str, object]) -> Event:
        """The event of a ledger entry."""
        return cls(str(row["analysis"]), float(str(row["sigma"])), int(str(row["count"])), float(str(row["q"])))


def cap(epsilon: float, delta: float, order: float) -> float:
    """cap_alpha: what may be spent at `order` for (epsilon, delta). Negative caps are refused, never clamped.

    Canonne, Kamath, Steinke 2020, proposition 12, solved for the RDP side.
    """
    value = epsilon - (math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1))
    if value <= 0:
        raise PrivacyError(
            f"order {order} cannot hold epsilon {epsilon} at delta {delta}",
            hint="choose a larger order: 22, 8.9 and 4.4 suit epsilon 1, 3 and 8 at delta 0.000001",
        )
    return value


def cost(event: Event, order: float) -> float:
    """The event's RDP at `order`; an order that does not converge is refused."""
    if event.q == 1.0:
        return event.count * order / (2 * event.sigma**2)
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(orders=[order])
    accountant.compose(_dp_event(event))
    value = float(accountant.rdp[0]) if len(accountant.rdp) == 1 else math.nan
    if not math.isfinite(value):
        raise PrivacyError(f"the filter's order {order} gives no cost for q {event.q}, sigma {event.sigma}")
    return value


def sigma_for(budget: float, count: int, order: float, q: float = 1.0) -> float:
    """The noise multiplier with which `count` releases at Poisson rate `q` cost `budget` at `order`, not more.

    Exact for a full batch; for q < 1 the smallest that the filter admits, to 1e-9.
    """
    full = math.sqrt(count * order / (2 * budget))
    if q == 1.0:
        return full
    low, high = full * q / 8, full  # sampling never costs more; q -> 0 needs about q times the noise
    while cost(Event("", low, count, q), order) < budget:
        low /= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        if cost(Event("", middle, count, q), order) > budget:
            low = middle
        else:
            high = middle
    return high


def epsilon_pld(events: Iterable[Event], delta: float) -> float:
    """epsilon at `delta` by privacy loss distributions, pessimistic rounding; 0 for no events."""
    return _epsilon_pld(tuple(events), delta)


@lru_cache(maxsize=256)
def _epsilon_pld(events: tuple[Event, ...], delta: float) -> float:
    # a pure function that takes tenths of a second: forecast, results and certificate ask for the same figures
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant()
    composed = False
    for event in events:
        if event.count:
            accountant.compose(_dp_event(event))
            composed = True
    return float(accountant.get_epsilon(delta)) if composed else 0.0


def epsilon_rdp(spent: float, delta: float, order: float) -> float:
    """The epsilon that a spent RDP at `order` stands for."""
    return spent + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)


def _dp_event(event: Event) -> dp_accounting.DpEvent:
    import dp_accounting

    single: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(event.sigma)
    if event.q < 1.0:
        single = dp_accounting.PoissonSampledDpEvent(event.q, single)
    return dp_accounting.SelfComposedDpEvent(single, event.count)
