"""One SuperLink and real sites: what a `join` comes to, and what happens when a process on the way is gone."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from flower.stack import Stack, stack, until

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def flower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with stack(tmp_path_factory.mktemp("flower")) as running:
        running.site("bern")
        yield running


def test_a_site_that_approves_joins_within_seconds(flower: Stack) -> None:
    (bern,) = flower.sites
    digest = flower.study(1, bern)
    started = time.monotonic()
    run = flower.run(digest)
    assert flower.heard(digest, bern) == "joined"
    assert time.monotonic() - started < 20
    assert bern.gate.asked == [(digest, flower.exchange.bundle.hex())]
    assert bern.unpacked() == []
    flower.exchange.over.add(digest)
    until("the run ends", lambda: flower.status(run) == "finished:completed")
