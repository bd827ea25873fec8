"""People at more than one hospital of a rehearsal: the banded keyed check over all of them, on the one machine they share.

    python -m sequester.client.ingest.several HOME HOME ...

Prints JSON: how many people stand at more than one hospital, and how many pairs each two hospitals share. The key is made
here and never leaves this process; no digest is written anywhere. Whoever held it and somebody's genome could test whether
that person is here, so a home that belongs to any consortium but a rehearsal is refused (spec/genomics.md, section 4).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from sequester.client.compute.genome.bands import band_rows, digests, pairs
from sequester.client.compute.genome.harmonise import match, of_panel
from sequester.client.compute.genome.panel import Build, load
from sequester.client.compute.genome.plink import MISSING
from sequester.client.config import Home, SiteConfig
from sequester.client.ingest.cohort_genotypes import of_variants
from sequester.protocols.errors import SequesterError, SiteError

REHEARSAL = "rehearsal"
Digests = list[list[bytes | None]]


def several(found: Mapping[str, Digests]) -> dict[str, Any]:
    """{"people": at more than one hospital, "pairs": {"a, b": people they share}} of each hospital's band digests."""
    shared: dict[str, int] = {}
    person: dict[tuple[str, int], tuple[str, int]] = {}  # a person at a hospital -> the same one, where first met

    def first(one: tuple[str, int]) -> tuple[str, int]:
        while (earlier := person.get(one, one)) != one:
            one = earlier
        return one

    for here, there in combinations(sorted(found), 2):
        same = pairs(found[here], found[there])
        shared[f"{here}, {there}"] = len(same)
        for a, b in sorted(same):
            person[first((there, b))] = first((here, a))
    return {"people": len({first(one) for one in person if first(one) != one}), "pairs": shared}


def of_hospital(home: Home, config: SiteConfig, key: bytes) -> Digests:
    """The band digests of everybody in a hospital's genotype files, by the bundled panel in the build they are declared in."""
    panel = load()
    build: Build = config.data.build
    found = of_variants(home, config, of_panel(panel, build), build, "the check for people at several hospitals")
    matched = match(found.wanted, found.files.variants)
    rows = band_rows(panel).ravel()
    entries = [matched.row[r] for r in rows]
    if min(entries) < 0:
        raise SiteError(
            f"{sum(e < 0 for e in entries)} of the {len(rows)} variants of the check are not in {config.data.genotypes}",
            hint="the check needs an array that holds the bundled panel's common variants; rehearse without it",
        )
    counts = found.files.counts(entries)
    turned = np.array([matched.swapped[r] for r in rows])
    return digests(np.where(turned & (counts != MISSING), 2 - counts, counts).astype(np.int8), key)


def main(homes: Sequence[Path]) -> dict[str, Any]:
    """The check over these hospitals; each must belong to a rehearsal and to nothing else."""
    key = os.urandom(32)
    found = {}
    for path in homes:
        home = Home(path)
        if home.consortia() != [REHEARSAL]:
            raise SiteError(
                f"{path} belongs to {', '.join(home.consortia()) or 'no consortium'}, a rehearsal was expected",
                hint="people at two hospitals are looked for in rehearsals only, on data that may be used openly",
            )
        config = home.config()
        found[config.site.id] = of_hospital(home, config, key)
    return several(found)


if __name__ == "__main__":
    try:
        print(json.dumps(main([Path(word) for word in sys.argv[1:]])))  # noqa: T201
    except SequesterError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)  # noqa: T201
        raise SystemExit(error.exit_status) from None
