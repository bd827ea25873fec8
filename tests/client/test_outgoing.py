"""A contribution that becomes ring words as it arrives: the words of the whole vector, the same refusals, little memory."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import contracts
from answering import answering
from sequester.client.gate import contribution, reckoning
from sequester.client.gate.contribution import Outgoing, noise_share, ring_vector
from sequester.client.gate.reckoning import Life
from sequester.protocols import arrays, noise, privacy
from sequester.protocols.accounting import Event
from sequester.protocols.errors import PrivacyError, SiteError
from sequester.protocols.memory import Room
from sequester.protocols.study import Study
from training_cases import study as training_study

PRIVATE = training_study(150_000, {"gradients": "closed"})
EXACT = contracts.exact_study()


def sums_of(of: Study) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {name: rng.standard_normal(shape) * 9 for name, shape in privacy.layout(of, of.analyses[0], 0).fields}


def outgoing(of: Study, room: Room | None = None) -> Outgoing:
    return Outgoing(of, of.analyses[0], 0, privacy.noise_adders(of), room or Room())


def arriving(sums: dict[str, Any], take: Callable[[arrays.Part], None]) -> None:
    data = memoryview(arrays.encode(sums))

    def fill(view: memoryview) -> None:
        nonlocal data
        view[:], data = data[: len(view)], data[len(view) :]

    for part in arrays.parts(len(data), fill):
        take(part)


@pytest.mark.parametrize("of", [PRIVATE, EXACT], ids=["private, 32 bits", "exact, 64 bits"])
def test_words_are_those_of_the_whole_vector_under_the_same_noise(of: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contribution, "_fresh_stream", lambda: noise.aes_stream(bytes(32), bytes(16)))
    plan, sums = of.analyses[0], sums_of(of)
    expected = ring_vector(
        of, plan, privacy.layout(of, plan, 0), sums, noise_share(of, plan, 0, privacy.noise_adders(of))
    )
    room = Room()
    for _ in range(2):  # the second time in memory that holds the first one's words
        mine = outgoing(of, room)
        mine.draw()
        arriving(sums, mine.take)
        words = mine.words()
        np.testing.assert_array_equal(words, expected)
        assert words.dtype == expected.dtype
        del words


def test_every_contribution_has_noise_of_its_own() -> None:
    seen = []
    for _ in range(2):
        mine = outgoing(PRIVATE)
        mine.draw()
        arriving(sums_of(PRIVATE), mine.take)
        seen.append(mine.words().astype(np.int32))
    assert np.count_nonzero(seen[0] == seen[1]) < 100


def test_numbers_wait_for_the_noise() -> None:
    mine = outgoing(PRIVATE)
    taking = threading.Thread(target=arriving, args=(sums_of(PRIVATE), mine.take))
    taking.start()
    taking.join(0.2)
    assert taking.is_alive()
    mine.draw()
    taking.join(20)
    assert not taking.is_alive()
    mine.words()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s | {"other": np.zeros(1)}, "names other"),
        (lambda s: {}, "the contribution names"),
        (lambda s: {"head.weight": s["head.weight"][:, 1:]}, "has shape"),
        (lambda s: {"head.weight": np.where(np.arange(150_001) == 149_000, np.nan, s["head.weight"])}, "not finite"),
        (lambda s: {"head.weight": np.where(np.arange(150_001) == 7, np.inf, s["head.weight"])}, "not finite"),
        (lambda s: {"head.weight": np.where(np.arange(150_001) == 7, 1e300, s["head.weight"])}, "too large"),
    ],
)
def test_what_the_plan_does_not_say_never_becomes_words(change: Callable[[Any], Any], said: str) -> None:
    mine = outgoing(PRIVATE)
    mine.draw()
    with pytest.raises(SiteError, match=said):
        arriving(change(sums_of(PRIVATE)), mine.take)
        mine.words()


def test_a_part_that_comes_twice_is_refused() -> None:
    mine = outgoing(PRIVATE)
    mine.draw()
    part = arrays.Part("head.weight", (1, 150_001), 0, np.zeros(10))
    mine.take(part)
    with pytest.raises(SiteError, match="out of order"):
        mine.take(part)


def test_too_few_honest_shares_give_no_noise_and_no_words() -> None:
    mine = Outgoing(PRIVATE, PRIVATE.analyses[0], 0, privacy.noise_adders(PRIVATE) - 1, Room())
    with pytest.raises(PrivacyError, match="honest noise shares"):
        mine.draw()
    with pytest.raises(PrivacyError, match="honest noise shares"):
        arriving(sums_of(PRIVATE), mine.take)
    with pytest.raises(SiteError):
        mine.words()


def test_what_is_erased_holds_nothing_and_takes_nothing() -> None:
    room = Room()
    mine = outgoing(EXACT, room)
    mine.draw()
    sums = sums_of(EXACT)
    arriving(sums, mine.take)
    mine.erase()
    length = privacy.layout(EXACT, EXACT.analyses[0], 0).length
    assert not room.array(length, np.uint64).any()
    with pytest.raises(SiteError, match="nobody waits"):
        arriving(sums, mine.take)
    with pytest.raises(SiteError):
        mine.words()


def test_a_contribution_takes_its_words_and_some_blocks_of_memory() -> None:
    sums, length = sums_of(PRIVATE), privacy.layout(PRIVATE, PRIVATE.analyses[0], 0).length
    data = arrays.encode(sums)
    tracemalloc.start()
    mine = outgoing(PRIVATE)
    mine.draw()
    drawn = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    view = memoryview(data)

    def fill(into: memoryview) -> None:
        nonlocal view
        into[:], view = view[: len(into)], view[len(into) :]

    for part in arrays.parts(len(data), fill):
        mine.take(part)
    taken = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert drawn < 4 * length + 8_000_000  # the words, and working memory of 65,536 draws
    assert taken < 3_000_000  # blocks of half a megabyte: nothing grows with the vector


# ---- over the socket ------------------------------------------------------------------------------------------------


def test_a_contribution_that_is_refused_half_way_leaves_the_next_one_whole() -> None:
    async def main() -> None:
        compute = answering("np.arange(300_000.0)")
        taken: list[int] = []

        def refuse(part: arrays.Part) -> None:
            taken.append(part.at)
            if part.at:
                raise SiteError("no more of this")

        try:
            with pytest.raises(SiteError, match="no more of this"):
                await compute.contribution_to(refuse, "score", 0, b"")
            assert taken == [0, 65_536]
            found: list[np.ndarray] = []
            await compute.contribution_to(lambda part: found.append(part.values.copy()), "score", 1, b"")
            np.testing.assert_array_equal(np.concatenate(found), np.arange(300_000.0))
            np.testing.assert_array_equal((await compute.contribution("score", 2, b""))["step"], np.arange(300_000.0))
        finally:
            compute.kill()

    asyncio.run(main())


# ---- the receipt's figures ------------------------------------------------------------------------------------------


def test_a_life_is_reckoned_in_another_process_to_the_same_figures() -> None:
    life = Life((Event("", 4.5, 11), Event("", 2.25, 3, 0.01)), "0.000001", ("ab/fit",))
    code = (
        "import json, sys\n"
        "from sequester.client.gate.ledger import Life\n"
        "from sequester.client.gate.reckoning import reckoned\n"
        "from sequester.protocols.accounting import Event\n"
        "life = Life((Event('', 4.5, 11), Event('', 2.25, 3, 0.01)), '0.000001', ('ab/fit',))\n"
        "print(json.dumps([reckoned(life), 'dp_accounting' in sys.modules, 'scipy' in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout) == [life.json(), False, False]


def test_where_no_process_can_be_started_the_gate_reckons_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    life = Life((Event("", 4.5, 11),), "0.000001", ())
    expected = life.json()
    monkeypatch.delitem(sys.modules, "dp_accounting")
    asked: list[object] = []

    def no_process(*command: object, **_: object) -> None:
        asked.append(command)
        raise OSError("no memory")

    monkeypatch.setattr(reckoning.subprocess, "run", no_process)
    assert reckoning.reckoned(life) == expected and asked
