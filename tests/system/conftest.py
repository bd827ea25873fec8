"""One founded consortium of three small hospitals for all tests that type commands; nothing of it runs between them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lowlands import Lowlands, founded


@pytest.fixture(scope="session")
def lowlands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lowlands]:
    """Enrolled and pinned; exchange and gates are started by who needs them."""
    made = founded(tmp_path_factory.mktemp("lowlands"))
    try:
        yield made
    finally:
        made.consortium.processes.end()
    assert made.consortium.processes.left_behind == []
