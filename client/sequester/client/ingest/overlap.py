"""Which patients of a cohort stand in the hospital's other data sets: a new name for a data set is no new budget.

Each data set names patients by a key of its own, so the ids are named again under every other data set's key and looked
up in the lists that its studies left on this disk. The counts stay there.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from pathlib import Path

NAME_BYTES = 32


def also_in(folder: Path, ids: Sequence[str]) -> dict[str, int]:
    """Patients of `ids` that studies of each other data set beside `folder` have used, by data set; none is left out."""
    found = {}
    for other in sorted(path for path in folder.parent.iterdir() if path.is_dir() and path != folder):
        key, lists = other / "patients.key", list((other / "cohorts").glob("*/patients.bin"))
        if not key.is_file() or not lists:
            continue
        secret, used = key.read_bytes(), set()
        for path in lists:
            data = path.read_bytes()
            used |= {data[i : i + NAME_BYTES] for i in range(0, len(data), NAME_BYTES)}
        count = sum(hmac.digest(secret, name.encode(), "sha256") in used for name in ids)
        if count:
            found[other.name] = count
    return found
