"""Which reference build a file's positions are in: told by positions and alleles of the panel, never by a header alone.

Only autosomal, non-palindromic single-base variants are evidence. Accepted: the best build matches at least 200 rows and
20 times the share of the second (spec/genomics.md, section 3, rule 2). Nothing is ever lifted over.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from sequester.client.compute.genome.harmonise import ROW_CATEGORIES, case_of, unusable
from sequester.client.compute.genome.panel import BUILDS, Build, Panel
from sequester.client.compute.genome.variants import Variants, places
from sequester.protocols.errors import SiteError

ROWS, RATIO = 200, 20.0
_CHROMOSOME_1 = {"247249719": "NCBI36", "249250621": "GRCh37", "248956422": "GRCh38"}


@dataclass(frozen=True, slots=True)
class Evidence:
    """Rows of the file that match the panel in each build, of the panel rows that carry it."""

    matched: dict[Build, int]
    carried: dict[Build, int]

    def share(self, build: Build) -> float:
        """Matched over carried, 0..1."""
        return self.matched[build] / self.carried[build] if self.carried[build] else 0.0

    @property
    def build(self) -> Build | None:
        """The build, or None where the evidence does not decide."""
        best, second, *_ = sorted(BUILDS, key=lambda b: -self.share(b))
        if self.matched[best] < ROWS or self.share(best) < RATIO * self.share(second):
            return None
        return best

    def words(self) -> str:
        """The three match rates, for a message or a report."""
        return ", ".join(f"{b} {self.share(b):.1%} ({self.matched[b]} of {self.carried[b]} rows)" for b in BUILDS)


def evidence(rows: Variants, panel: Panel) -> Evidence:
    """How many rows of a file are variants of the panel, in each build."""
    usable = unusable(rows) == ROW_CATEGORIES.index("not_in_list")
    key = rows.key
    clear = ~panel.palindromic & np.array([len(r) == len(a) == 1 for r, a in zip(panel.ref, panel.alt, strict=True)])
    matched: dict[Build, int] = {}
    carried: dict[Build, int] = {}
    for build in BUILDS:
        carrying = np.flatnonzero(clear & (panel.position[build] > 0))
        there = places(panel.code[carrying], panel.position[build][carrying])
        at: dict[int, list[int]] = {}
        for place, row in zip(there.tolist(), carrying.tolist(), strict=True):
            at.setdefault(place, []).append(row)
        hit: set[int] = set()
        for i in np.flatnonzero(np.isin(key, there) & usable).tolist():
            for row in at[int(key[i])]:
                if case_of(rows.counted[i], rows.other[i], panel.alt[row], panel.ref[row]) is not None:
                    hit.add(row)
        matched[build], carried[build] = len(hit), len(carrying)
    return Evidence(matched, carried)


def build_of_header(text: str) -> Build | None:
    """The build a VCF header speaks of, by the length of chromosome 1 or `##reference`; evidence that may only agree."""
    for length in re.findall(r"##contig=<[^>\n]*ID=(?:chr)?1,[^>\n]*length=(\d+)", text):
        if length in _CHROMOSOME_1:
            return next(b for b in BUILDS if b == _CHROMOSOME_1[length])
    reference = " ".join(re.findall(r"##(?:reference|assembly)=([^\n]*)", text)).lower()
    for names, build in (
        (("grch38", "hg38"), BUILDS[2]),
        (("grch37", "hg19", "hs37d5", "b37"), BUILDS[1]),
        (("ncbi36", "hg18"), BUILDS[0]),
    ):
        if any(name in reference for name in names):
            return build
    return None


def confirm(found: Evidence, declared: Build, headers: set[Build | None]) -> None:
    """Refuse a wrong or undecided build, with the match rates of all three and what to do."""
    build = found.build
    if build is None:
        raise SiteError(
            f"the build of these files cannot be told: {found.words()}; at least {ROWS} rows and {RATIO:.0f} times the "
            "next build were expected",
            hint="a file of few variants needs a panel that lists them: ask the consortium for one (`--panel FILE`)",
        )
    if build != declared:
        raise SiteError(
            f"these files are in {build}, site.toml declares {declared}: {found.words()}",
            hint=f'set `build = "{build}"` under [data] if that is so, or lift the files to {declared} with a tool you '
            "trust (`bcftools +liftover`, Picard LiftoverVcf); nothing is lifted here",
        )
    for said in headers - {None, build}:
        raise SiteError(
            f"a header speaks of {said}, the positions are those of {build}: {found.words()}",
            hint="the header is wrong or files are mixed: correct it, or ingest the files of one build",
        )
