"""Draws follow the discrete Gaussian exactly. Seeds are fixed; alarm rates are those of one run with a fresh seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import mpmath  # type: ignore[import-untyped]  # it ships no types
import numpy as np
import opendp.prelude as dp
import pytest
from numpy.typing import NDArray
from scipy import stats

from sequester.protocols import noise, session
from sequester.protocols.errors import PrivacyError
from sequester.protocols.noise import aes_stream, discrete_gaussian


def seeded(seed: int) -> noise.ByteSource:
    return aes_stream(seed.to_bytes(32, "big"), bytes(16))


def pmf(sigma: int, reach: int) -> NDArray[np.float64]:
    weights = [mpmath.exp(-mpmath.mpf(x * x) / (2 * sigma * sigma)) for x in range(-reach, reach + 1)]
    total = mpmath.fsum(weights)
    return np.array([float(w / total) for w in weights])


def chi_square_p(draws: NDArray[np.int64], sigma: int) -> float:
    reach = 4 * sigma
    expected = pmf(sigma, 40 * sigma)
    middle = len(expected) // 2
    inner = expected[middle - reach : middle + reach + 1]
    probabilities = np.append(inner, 1 - inner.sum())
    counts = np.bincount(draws[np.abs(draws) <= reach] + reach, minlength=2 * reach + 1)
    observed = np.append(counts, len(draws) - counts.sum())
    return float(stats.chisquare(observed, probabilities * len(draws)).pvalue)


def test_small_sigma_follows_the_exact_probabilities() -> None:
    assert chi_square_p(discrete_gaussian(4, 500_000, seeded(1)), 4) > 1e-4  # one false alarm in 10,000


def test_the_chi_square_notices_a_sigma_that_is_two_percent_off() -> None:
    rounded = np.rint(stats.norm(scale=4.08).ppf((np.arange(500_000) + 0.5) / 500_000)).astype(np.int64)
    assert chi_square_p(rounded, 4) < 1e-4


@pytest.mark.parametrize("sigma", [4, 100, 20_000, 2**24])
def test_two_million_draws_have_the_right_moments(sigma: int) -> None:
    draws = discrete_gaussian(sigma, 2_000_000, seeded(sigma)).astype(np.float64)
    assert abs(draws.std() / sigma - 1) <= 0.003  # 6 standard errors: one false alarm in 5e8
    assert abs(draws.mean() / sigma) <= 6 / math.sqrt(2_000_000)
    assert abs(stats.kurtosis(draws)) <= 6 * math.sqrt(24 / 2_000_000)


def test_every_comparison_made_exactly_gives_the_same_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "_NEAR", 2.0)
    assert chi_square_p(discrete_gaussian(4, 4_000, seeded(2)), 4) > 1e-4


def test_exact_and_fast_comparisons_give_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = discrete_gaussian(1000, 1000, seeded(3))
    monkeypatch.setattr(noise, "_NEAR", 2.0)
    assert np.array_equal(discrete_gaussian(1000, 1000, seeded(3)), fast)


def test_a_comparison_that_64_bits_cannot_settle_takes_more_of_the_stream() -> None:
    def exponent() -> mpmath.mpf:  # a third has no end in binary: 53 bits of it would decide wrongly
        return mpmath.mpf(1) / 3

    with mpmath.workprec(400):
        first, rest = divmod(int(mpmath.floor(mpmath.exp(-exponent()) * mpmath.mpf(2) ** 128)), 2**64)
    given: list[int] = []

    def source(word: int) -> Callable[[int], bytes]:
        return lambda size: given.append(size) or word.to_bytes(8, "little")  # type: ignore[func-returns-value]

    assert noise._decide(first, exponent, source(rest - 1)) is True
    assert noise._decide(first, exponent, source(rest + 1)) is False
    assert given == [8, 8]
    assert noise._decide(first - 1, exponent, source(0)) is True and given == [8, 8]


@pytest.mark.parametrize("sites", [3, 5, 10, 30])
def test_shares_of_the_fewest_honest_sites_add_up_to_the_planned_noise(sites: int) -> None:
    corrupt = max(1, (sites - 1) // 3)
    floor = session.threshold(sites, corrupt)  # every tolerated absence happens
    honest = floor - corrupt
    target = 20_000.0
    share = math.ceil(target / math.sqrt(honest))
    size = 2_000_000 // honest
    total = sum(discrete_gaussian(share, size, seeded(100 + i)) for i in range(honest))
    assert abs(np.std(total) / target - 1) <= 0.01  # 6 standard errors at 11 shares of 181,818 draws


def test_streams_with_different_keys_differ_and_a_stream_goes_on() -> None:
    assert not np.array_equal(discrete_gaussian(100, 50, seeded(1)), discrete_gaussian(100, 50, seeded(2)))
    source = seeded(1)
    assert not np.array_equal(discrete_gaussian(100, 50, source), discrete_gaussian(100, 50, source))
    assert np.array_equal(discrete_gaussian(100, 50, seeded(1)), discrete_gaussian(100, 50, seeded(1)))


@pytest.mark.parametrize("sigma", [0, 3, 2**24 + 1, -5])
def test_a_scale_out_of_the_exact_range_is_refused(sigma: int) -> None:
    with pytest.raises(PrivacyError, match="noise scale"):
        discrete_gaussian(sigma, 1, seeded(1))


def test_a_histogram_has_the_noise_that_opendp_gives_it() -> None:
    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T=int)), dp.l2_distance(T=float)
    measurement = dp.m.make_gaussian(*space, scale=7.0)
    theirs = np.array(measurement([0] * 20_000), dtype=float)
    ours = discrete_gaussian(7, 20_000, seeded(4)).astype(float)
    assert stats.ks_2samp(theirs, ours).pvalue > 1e-6  # OpenDP takes no seed: one false alarm in a million


def test_a_draw_costs_less_than_a_microsecond() -> None:
    start = time.perf_counter()
    discrete_gaussian(1000, 500_000, seeded(5))
    assert (time.perf_counter() - start) / 500_000 < 1e-6  # 0.1 us alone; the rest is room for a busy machine
