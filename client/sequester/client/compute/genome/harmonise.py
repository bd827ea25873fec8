"""Which row of a file is which variant of a list, and how its count becomes the wanted allele's dosage.

Identity is chromosome, position and allele pair, never an id (spec/genomics.md, section 3): direct, swapped, flipped, or
both. Every row of the file and every variant of the list ends in exactly one named category; `match` asserts it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sequester.client.compute.genome.panel import Build, Panel
from sequester.client.compute.genome.plink import MISSING
from sequester.client.compute.genome.source import REASONS
from sequester.client.compute.genome.variants import (
    COMPLEMENT,
    XY,
    Variants,
    X,
    chromosome_code,
    is_palindromic,
    places,
)
from sequester.protocols.study import Variant

Palindromic = Literal["drop", "strand", "frequency"]
MATCHED = ("direct", "swapped", "flipped", "flipped_swapped")
# of a row of the file; those of EXCLUDED are in no store
EXCLUDED = (
    *REASONS, "symbolic", "spanning_deletion", "monomorphic_coding", "unreadable_alleles", "bad_position",
    "other_contig", "duplicate", "palindromic", "allele_mismatch",
)  # fmt: skip
KEPT = ("indel", "chromosome_x", "not_in_list")
ROW_CATEGORIES = (*MATCHED, *EXCLUDED, *KEPT)
WANTED_CATEGORIES = (*MATCHED, "palindromic", "allele_mismatch", "absent")
_SEQUENCE = re.compile(r"[ACGT]+")
_STRAND_ROWS, _STRAND_FLIPS = 1000, 0.001  # from which number of matched rows a file's strand is taken as known


@dataclass(frozen=True, slots=True)
class Wanted:
    """A list of variants in one build: `counted` is the allele whose copies are wanted. Position 0: none in this build."""

    code: NDArray[np.uint8]
    position: NDArray[np.int64]
    counted: Sequence[str]
    other: Sequence[str]

    def __len__(self) -> int:
        return len(self.code)


@dataclass(frozen=True, slots=True)
class Match:
    """For each variant of the list: the file's row or -1, and whether the file counts the other allele.

    `categories` counts the variants of the list, `rows` those of the file; `row_category` is an index of ROW_CATEGORIES.
    """

    row: tuple[int, ...]
    swapped: tuple[bool, ...]
    categories: dict[str, int]
    wanted_category: NDArray[np.uint8]  # (wanted,) of WANTED_CATEGORIES
    ambiguous: tuple[tuple[int, int, bool], ...]  # row, wanted, swapped by its letters, of the palindromic ones
    row_category: NDArray[np.uint8]  # (rows,) of ROW_CATEGORIES
    rows: dict[str, int]

    def dosage(self, counts: NDArray[Any]) -> NDArray[Any]:
        """Copies of the wanted allele (samples, variants), -9 missing, from those of the matched rows in order."""
        out = np.full((counts.shape[0], len(self.row)), MISSING, dtype=counts.dtype)
        column = 0
        for j, row in enumerate(self.row):
            if row < 0:
                continue
            out[:, j] = oriented(counts[:, column], self.swapped[j])
            column += 1
        return out


def oriented(counts: NDArray[Any], swapped: bool) -> NDArray[Any]:
    """Copies of the other allele where `swapped`; missing stays -9.

    >>> oriented(np.array([0, 2, -9], np.int8), True).tolist()
    [2, 0, -9]
    """
    if not swapped:
        return counts
    return np.where(counts < 0, counts.dtype.type(MISSING), (2 - counts).astype(counts.dtype))


def of_study(variants: Sequence[Variant]) -> Wanted:
    """The variants of a study, in its own build."""
    return Wanted(
        np.array([chromosome_code(v.chromosome) for v in variants], dtype=np.uint8),
        np.array([v.position for v in variants], dtype=np.int64),
        [v.effect for v in variants],
        [v.other for v in variants],
    )


def of_panel(panel: Panel, build: Build) -> Wanted:
    """The rows of a panel; the wanted allele is ALT."""
    return Wanted(panel.code, panel.position[build], panel.alt, panel.ref)


def in_build(wanted: Wanted, of: Build, panel: Panel, build: Build) -> Wanted:
    """The same variants at their positions in another build, through the panel; 0 where the panel has none.

    Nothing is lifted: only rows that the panel lists in both builds, with the same pair of alleles, are found.
    """
    if of == build:
        return wanted
    there = places(panel.code, panel.position[of])
    rows: dict[int, list[int]] = {}
    for row in np.flatnonzero(np.isin(there, places(wanted.code, wanted.position)) & (panel.position[of] > 0)).tolist():
        rows.setdefault(int(there[row]), []).append(row)
    position = np.zeros(len(wanted), dtype=np.int64)
    for j, place in enumerate(places(wanted.code, wanted.position).tolist()):
        pair = (wanted.counted[j], wanted.other[j])
        for row in rows.get(place, ()):
            if case_of(panel.alt[row], panel.ref[row], *pair) is not None:
                position[j] = panel.position[build][row]
    return Wanted(wanted.code, position, wanted.counted, wanted.other)


def case_of(counted: str, other: str, wanted: str, wanted_other: str) -> str | None:
    """How a file's pair of alleles reads the wanted one, or None where it is another variant.

    >>> case_of("T", "C", "A", "G"), case_of("C", "T", "A", "G"), case_of("A", "C", "A", "G")
    ('flipped', 'flipped_swapped', None)
    """
    if (counted, other) == (wanted, wanted_other):
        return "direct"
    if (counted, other) == (wanted_other, wanted):
        return "swapped"
    if len(wanted) == len(wanted_other) == 1:
        flipped = (counted.translate(COMPLEMENT), other.translate(COMPLEMENT))
        if flipped == (wanted, wanted_other):
            return "flipped"
        if flipped == (wanted_other, wanted):
            return "flipped_swapped"
    return None


def unusable(rows: Variants) -> NDArray[np.uint8]:
    """The category of each row that no list can want, by its own alleles and place; `not_in_list` for all others."""
    category = np.full(len(rows), ROW_CATEGORIES.index("not_in_list"), dtype=np.uint8)
    by_pair: dict[tuple[str, str], int] = {}
    for index, pair in enumerate(zip(rows.counted, rows.other, strict=True)):
        if (code := by_pair.get(pair)) is None:
            code = by_pair[pair] = ROW_CATEGORIES.index(_kind_of(*pair))
        category[index] = code
    usable = category >= len(MATCHED) + len(EXCLUDED)
    category[usable & ((rows.code == X) | (rows.code == XY))] = ROW_CATEGORIES.index("chromosome_x")
    category[((rows.code == 0) | (rows.code > X)) & (rows.code != XY)] = ROW_CATEGORIES.index("other_contig")
    category[rows.position <= 0] = ROW_CATEGORIES.index("bad_position")
    return category


def _kind_of(counted: str, other: str) -> str:
    for allele in (counted, other):
        if allele.startswith("<") or allele.endswith(">") or "[" in allele or "]" in allele:
            return "symbolic"
        if allele == "*":
            return "spanning_deletion"
    if counted in (".", "0") or other in (".", "0") or counted == other:
        return "monomorphic_coding"
    if not _SEQUENCE.fullmatch(counted) or not _SEQUENCE.fullmatch(other):
        return "unreadable_alleles"
    return "not_in_list" if len(counted) == len(other) == 1 else "indel"


def match(
    wanted: Wanted | Sequence[Variant],
    rows: Variants,
    palindromic: Palindromic = "drop",
    reasons: NDArray[np.uint8] | None = None,
    on_strand: Mapping[int, bool] | None = None,
) -> Match:
    """The variants of a list found in a file. Several rows at one place: each by its own allele pair, first in file wins.

    `palindromic="strand"` keeps A/T and C/G variants where at least 1,000 others matched and at most one in a thousand of
    them was on the other strand; it reads no genotype. `"frequency"` keeps those of `on_strand`: wanted variant to whether
    its row is on the list's strand (frequencies.py). `reasons`: what the reader found, 0 or 1 + an index of REASONS.
    """
    if not isinstance(wanted, Wanted):
        wanted = of_study(wanted)
    category = unusable(rows)
    if reasons is not None:
        category = np.where(reasons > 0, len(MATCHED) + reasons - 1, category).astype(np.uint8)
    found = np.full(len(wanted), -1, dtype=np.int64)
    how = np.full(len(wanted), WANTED_CATEGORIES.index("absent"), dtype=np.uint8)
    at: dict[int, list[int]] = {}
    for j, (place, position) in enumerate(
        zip(places(wanted.code, wanted.position).tolist(), wanted.position, strict=True)
    ):
        if position > 0:
            at.setdefault(place, []).append(j)
    key = rows.key
    candidates = np.flatnonzero(
        np.isin(key, np.fromiter(at, dtype=np.int64, count=len(at))) & (category >= _FIRST_KEPT)
    )
    ambiguous: list[tuple[int, int]] = []
    for i in candidates.tolist():
        case, j = _best(rows, i, wanted, at[int(key[i])], found)
        if case is None:
            if category[i] != ROW_CATEGORIES.index("indel"):
                category[i] = ROW_CATEGORIES.index("allele_mismatch")
            for k in at[int(key[i])]:
                if how[k] == WANTED_CATEGORIES.index("absent"):
                    how[k] = WANTED_CATEGORIES.index("allele_mismatch")
        elif found[j] >= 0:
            category[i] = ROW_CATEGORIES.index("duplicate")
        else:
            found[j] = i
            category[i], how[j] = ROW_CATEGORIES.index(case), WANTED_CATEGORIES.index(case)
            if is_palindromic(rows.counted[i], rows.other[i]):
                ambiguous.append((i, j))
    _duplicates(rows, category)
    clear = [int((how == c).sum()) for c in range(len(MATCHED))]
    for _, j in ambiguous:
        clear[how[j]] -= 1
    known_strand = sum(clear) >= _STRAND_ROWS and clear[2] + clear[3] <= _STRAND_FLIPS * sum(clear)
    pairs = tuple((i, j, WANTED_CATEGORIES[how[j]] == "swapped") for i, j in ambiguous)
    for i, j, swapped in pairs:
        case = WANTED_CATEGORIES[how[j]]
        if palindromic == "frequency" and on_strand is not None and j in on_strand:
            if not on_strand[j]:
                case = "flipped" if swapped else "flipped_swapped"
        elif palindromic != "strand" or not known_strand:
            case, found[j] = "palindromic", -1
        category[i], how[j] = ROW_CATEGORIES.index(case), WANTED_CATEGORIES.index(case)
    counted = np.bincount(how, minlength=len(WANTED_CATEGORIES)).tolist()
    of_rows = np.bincount(category, minlength=len(ROW_CATEGORIES)).tolist()
    assert sum(counted) == len(wanted) and sum(of_rows) == len(rows), "a variant in no category, or in two"
    assert sum(counted[: len(MATCHED)]) == sum(of_rows[: len(MATCHED)]) == int((found >= 0).sum())
    turned = (WANTED_CATEGORIES.index("swapped"), WANTED_CATEGORIES.index("flipped_swapped"))
    return Match(
        tuple(found.tolist()), tuple(np.isin(how, turned).tolist()), dict(zip(WANTED_CATEGORIES, counted, strict=True)),
        how, pairs, category, dict(zip(ROW_CATEGORIES, of_rows, strict=True)),
    )  # fmt: skip


_FIRST_KEPT = ROW_CATEGORIES.index(KEPT[0])


def _best(
    rows: Variants, i: int, wanted: Wanted, candidates: list[int], found: NDArray[np.int64]
) -> tuple[str | None, int]:
    """The wanted variant that a row is, one that is still free before one that is taken."""
    best: tuple[str | None, int] = (None, -1)
    for j in candidates:
        case = case_of(rows.counted[i], rows.other[i], wanted.counted[j], wanted.other[j])
        if case is not None and found[j] < 0:
            return case, j
        if case is not None and best[0] is None:
            best = (case, j)
    return best


def _duplicates(rows: Variants, category: NDArray[np.uint8]) -> None:
    """Mark rows outside the list that repeat an earlier row's place and allele pair, on either strand."""
    kept = np.flatnonzero(category >= _FIRST_KEPT)
    key = rows.key[kept]
    order = np.argsort(key, kind="stable")
    same = np.flatnonzero(np.diff(key[order]) == 0)
    seen: dict[int, set[frozenset[str]]] = {}
    for position in sorted({*same.tolist(), *(same + 1).tolist()}):
        i = int(kept[order[position]])
        pair = frozenset((rows.counted[i], rows.other[i]))
        if all(len(a) == 1 for a in pair):
            pair = min(pair, frozenset(a.translate(COMPLEMENT) for a in pair), key=sorted)
        here = seen.setdefault(int(key[order[position]]), set())
        if pair in here:
            category[i] = ROW_CATEGORIES.index("duplicate")
        here.add(pair)
