"""Whose exact cohorts may follow each other: two that differ by few patients would tell on those few.

The frozen set of every study stands in the ledger as a keyed hash; the list of keyed names it was made from never leaves
the site's disk (spec/privacy.md, section 7).
"""

from __future__ import annotations

import json
from pathlib import Path

from sequester.client.gate.ledger import Ledger
from sequester.protocols.errors import RefusalCode, SiteError
from sequester.protocols.signing import sha256

NAME_BYTES = 32  # one keyed name in `patients.bin`


def join(ledger: Ledger, folder: Path, study: str, *, exact: bool, floor: int) -> None:
    """Record the frozen patients of `study` in the ledger, or refuse, saying only NOT_READY: it depends on patients.

    `folder` is the data set's; `floor` the cell floor. An earlier list that is gone counts as too close.
    """
    manifest = json.loads((folder / "cohorts" / study / "manifest.json").read_text("utf-8"))
    patients, bitmap = manifest["patients_hash"], manifest["bitmap_sha256"]
    for row in ledger.rows("cohort"):
        earlier = row.body
        if earlier["study"] == study and earlier["patients"] == patients:
            return
        if not exact or not earlier["exact"] or earlier["patients"] == patients:
            continue
        if _difference(folder, (study, bitmap), (earlier["study"], earlier["bitmap"])) < floor:
            raise SiteError(
                f"this exact cohort and that of study {earlier['study'][:12]} differ by fewer than {floor} patients",
                hint="two exact results would describe those few; ask for a private analysis",
                code=RefusalCode.NOT_READY,
            )
    ledger.append("cohort", {"study": study, "patients": patients, "bitmap": bitmap, "exact": exact})


def _difference(folder: Path, one: tuple[str, str], other: tuple[str, str]) -> int:
    """Patients in just one of two lists; 0 where a list is missing or is not the one the ledger names."""
    sets = []
    for study, digest in (one, other):
        path = folder / "cohorts" / study / "patients.bin"
        data = path.read_bytes() if path.is_file() else b""
        if sha256(data) != digest or len(data) % NAME_BYTES:
            return 0
        sets.append({data[i : i + NAME_BYTES] for i in range(0, len(data), NAME_BYTES)})
    return len(sets[0] ^ sets[1])
