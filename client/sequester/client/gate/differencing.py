"""Whose cohorts may follow each other: exact ones that differ by few patients would tell on those few, and patients who
stand in another data set of this hospital have spent there what they cannot spend here again.

The frozen set of every study stands in the ledger as a keyed hash; the list of keyed names it was made from never leaves
the site's disk (spec/privacy.md, section 7).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sequester.client.gate.ledger import Ledger
from sequester.protocols.accounting import Event, cost
from sequester.protocols.errors import PrivacyError, RefusalCode, SiteError
from sequester.protocols.signing import sha256

NAME_BYTES = 32  # one keyed name in `patients.bin`


def join(
    ledger: Ledger,
    folder: Path,
    study: str,
    *,
    exact: bool,
    floor: int,
    roster: Sequence[bytes] = (),
    max_corrupt: int = 1,
    events: Sequence[Event] = (),
) -> None:
    """Record the frozen patients of `study` in the ledger, or refuse, saying only NOT_READY where it depends on patients.

    `folder` is the data set's; `floor` the cell floor; `roster` the hospitals' keys, of whom `max_corrupt` may collude;
    `events` what the study is about to reserve. An earlier list that is gone counts as too close.
    """
    manifest = json.loads((folder / "cohorts" / study / "manifest.json").read_text("utf-8"))
    patients, bitmap = manifest["patients_hash"], manifest["bitmap_sha256"]
    if exact:
        require_no_study_less_one(ledger, study, roster, max_corrupt)
    for earlier in ledger.recorded("cohort"):
        if earlier["study"] == study and earlier["patients"] == patients:
            return
        if not exact or not earlier["exact"]:
            continue
        if earlier["patients"] == patients:
            continue
        if _difference(folder, (study, bitmap), (earlier["study"], earlier["bitmap"])) < floor:
            raise SiteError(
                f"this exact cohort and that of study {earlier['study'][:12]} differ by fewer than {floor} patients",
                hint="two exact results would describe those few; ask for a private analysis",
                code=RefusalCode.NOT_READY,
            )
    _require_budget(ledger, folder, manifest.get("also_in", {}), events)
    keys = [key.hex() for key in roster]
    ledger.append("cohort", {"study": study, "patients": patients, "bitmap": bitmap, "exact": exact, "roster": keys})


def require_no_study_less_one(ledger: Ledger, study: str, roster: Sequence[bytes], max_corrupt: int) -> None:
    """`PrivacyError` where an exact study, whose hospitals are those of this one but for one, may open sums here or has.

    The difference of the two sums would be that hospital's own numbers. Hospitals that may collude know theirs, so they
    hide nobody: one that takes the place of another changes nothing of that.

    Asked when a study is joined, and again when it reserves: two that were joined before either began would open both.
    """
    own = {key.hex() for key in roster}
    for earlier in ledger.recorded("cohort"):
        if earlier["study"] == study or not earlier["exact"] or not earlier.get("roster"):
            continue
        alone = len(own ^ set(earlier["roster"]))
        if 0 < alone <= 1 + max_corrupt and ledger.is_committed(earlier["study"]):
            by = "one hospital" if alone == 1 else f"{alone} hospitals, of whom {max_corrupt} may collude"
            raise PrivacyError(
                f"this exact study and {earlier['study'][:12]} differ by {by}: two sums would open one hospital's numbers",
                hint="ask for a private analysis, or for the same hospitals as before; a study that has spent nothing "
                "stands in the way until it has ended here",
                code=RefusalCode.ROSTER,
            )


def shared_with(folder: Path) -> dict[str, int]:
    """The most patients that a frozen cohort of this data set shares with each other data set of the hospital."""
    shared: dict[str, int] = {}
    for path in (folder / "cohorts").glob("*/manifest.json"):
        for name, count in json.loads(path.read_text("utf-8")).get("also_in", {}).items():
            shared[name] = max(count, shared.get(name, 0))
    return dict(sorted(shared.items()))


def spent_elsewhere(folder: Path, names: Iterable[str]) -> list[Event]:
    """What the ledgers of other data sets beside `folder` hold; one that cannot be read is a `SiteError`."""
    events = []
    for name in names:
        other = Ledger(folder.parent / name, read_only=True)
        try:
            events += other.charged()
        finally:
            other.close()
    return events


def _require_budget(ledger: Ledger, folder: Path, also_in: Mapping[str, int], events: Sequence[Event]) -> None:
    """The life cap of this data set holds for its patients wherever they spent: all charges of all their data sets."""
    if not also_in:
        return
    now = ledger.balance()
    elsewhere = sum(cost(event, now.order) for event in spent_elsewhere(folder, also_in))
    if elsewhere + sum(cost(event, now.order) for event in events) > now.left * (1 + 1e-12):
        raise SiteError(
            f"patients of this cohort have spent {elsewhere:.4f} in data set {', '.join(also_in)}; {now.left:.4f} are left here",
            hint="the same patients under another name have one budget for life; exclude them, or ask for less",
            code=RefusalCode.NOT_READY,
        )


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
