"""What masks and noise look like in numbers: uniform bytes, and never less variance than the study promised."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import chi2

from attacks.adversary import Adversary
from sequester.protocols import noise, session
from sequester.protocols.secagg.messages import MaskedInput
from sequester.protocols.session import SessionParams, threshold

# Each chi-square below alarms falsely once in a million draws; the seeds are fixed, so no run raises a false alarm.
ALARM = 1e-6


def p_value(data: NDArray[np.uint8]) -> float:
    counts = np.bincount(data, minlength=256)
    expected = len(data) / 256
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum(), 255))


def masked(mode: str, length: int = 100_000) -> dict[int, NDArray[np.uint32]]:
    """Masked vectors of a round, and what stood under them: small numbers, the least uniform thing there is."""
    adversary = Adversary(5, 1, mode=mode, corrupt=(), seed=3)  # type: ignore[arg-type]
    plain = adversary.entropy
    adversary.entropy = lambda size: bytes(size) if size == 4 * length else plain(size)  # x = 0
    ctx = adversary.play(adversary.begin(1, length=length))
    assert all(not adversary.put_in(ctx, i).any() for i in range(5))
    inputs: list[MaskedInput] = [adversary.inputs[ctx, i] for i in range(5)]
    return {sent.index: np.asarray(sent.y) for sent in inputs}


@pytest.mark.parametrize("mode", ["double", "strict"])
def test_masked_bytes_are_uniform_alone_and_in_every_sum_that_is_not_whole(mode: str) -> None:
    vectors = masked(mode)
    for size in range(1, 6 if mode == "double" else 5):
        for some in combinations(range(5), size):
            total = np.sum([vectors[i] for i in some], axis=0, dtype=np.uint32)
            assert p_value(total.view(np.uint8)) > ALARM, f"sites {some}"
            assert p_value(np.unpackbits(total.view(np.uint8)).reshape(-1, 32)[:, ::4].reshape(-1, 8).dot(
                1 << np.arange(8)).astype(np.uint8)) > ALARM  # fmt: skip
    whole = np.sum(list(vectors.values()), axis=0, dtype=np.uint32)
    assert whole.any() == (mode == "double")  # strict: pair masks alone cancel; double: self masks remain


def test_the_test_itself_sees_a_mask_of_a_byte_too_few() -> None:
    vector = masked("double")[0] & np.uint32(0x00FFFFFF)
    assert p_value(vector.view(np.uint8)) < 1e-300


@pytest.mark.parametrize("length", [1, 1000])
def test_masks_of_two_rounds_and_of_two_sites_do_not_agree(length: int) -> None:
    adversary = Adversary(4, 1, corrupt=())
    first, second = (adversary.play(adversary.begin(number, length=length)) for number in (1, 2))
    words = [adversary.inputs[ctx, i].y.tobytes() for ctx in (first, second) for i in range(4)]
    assert len(set(words)) == 8


def cells() -> list[tuple[int, int, int, int]]:
    """(N, c, a, n) of every legal session up to ten sites, and every active set's size."""
    return [
        (big, c, a, n)
        for big in range(3, 11)
        for c in range(1, big - 1)
        for a in range(big - threshold(big, c) + 1)
        for n in range(threshold(big, c), big + 1)
    ]


def test_the_smallest_honest_part_of_every_legal_survivor_set_carries_the_whole_noise() -> None:
    for big, c, a, n in cells():
        t = threshold(big, c)
        roster = tuple(bytes([i]) * 32 for i in range(big))
        params = SessionParams(bytes(32), 0, roster, c, t, a, 32, "double")
        session.check_params(params)
        target = 900_000.0  # sigma C_int, in ring units
        share = int(np.ceil(target / np.sqrt(session.noise_adders(params, n))))
        for survivors in range(max(t, n - a), n + 1):
            assert (survivors - c) * share**2 >= target**2, (big, c, a, n, survivors)
        assert session.floor(params, n) == max(t, n - a)
        assert (session.floor(params, n) - c - 1) * share**2 < target**2  # one site fewer, and the promise is broken


@pytest.mark.parametrize(("n", "c", "a"), [(5, 1, 1), (7, 2, 2)])
def test_drawn_shares_of_every_legal_survivor_set_less_c_sites_add_up_to_the_target_variance(
    n: int, c: int, a: int
) -> None:
    h, target, size = max(threshold(n, c), n - a) - c, 5000.0, 20_000
    share = int(np.ceil(target / np.sqrt(h)))
    draws = [noise.discrete_gaussian(share, size, noise.aes_stream(bytes([i]) * 32, bytes(16))) for i in range(n)]
    # a sample variance of 20,000 draws has a relative sd of 1 %: five of them below is once in three million, and the
    # keys are fixed. The variances themselves are h share^2 >= target^2.
    least = target**2 * (1 - 5 * np.sqrt(2 / size))
    for survivors in range(h + c, n + 1):
        for some in combinations(range(n), survivors):
            for corrupt in combinations(some, c):
                left = np.sum([draws[i] for i in some if i not in corrupt], axis=0)
                assert left.var() >= least, (some, corrupt)
    too_few = np.sum(draws[: h - 1], axis=0)
    assert too_few.var() < least
