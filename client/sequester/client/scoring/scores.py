"""The sum of weights over a file's genotypes, as PLINK 2's --score: effect alleles on either side, missing = 2 AF.

A missing genotype is what is expected at the allele's frequency: 2f copies; of a dominant effect 1 - (1 - f)^2, of a
recessive one f^2. The variance that this leaves unknown is carried beside the sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequester.client.compute.genome.harmonise import (
    MATCHED,
    WANTED_CATEGORIES,
    Match,
    Palindromic,
    Wanted,
    match,
    oriented,
)
from sequester.client.compute.genome.plink import PlinkFiles
from sequester.client.compute.genome.variants import COMPLEMENT, Variants, places
from sequester.client.scoring.scoring_file import ScoreRow, ScoringFile
from sequester.protocols.errors import SiteError

_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Matched:
    """Which rows of a score are in a file. `entry` and `swapped` by row of the score, entry -1 where it is not there."""

    entry: NDArray[np.int64]
    swapped: NDArray[np.bool_]
    categories: dict[str, int]
    by_effect_allele: int  # rows without another allele, matched on the effect allele alone
    missing: tuple[tuple[str, str], ...]  # name and category of each row that is not there

    @property
    def found(self) -> NDArray[np.int64]:
        """Rows of the score that are in the file."""
        return np.flatnonzero(self.entry >= 0)


def wanted_of(rows: Sequence[ScoreRow]) -> Wanted:
    """The rows of a score as a list of variants; the wanted allele is the effect allele."""
    return Wanted(
        np.array([row.code for row in rows], dtype=np.uint8),
        np.array([row.position for row in rows], dtype=np.int64),
        [row.effect for row in rows],
        [row.other for row in rows],
    )


def matched(score: ScoringFile, wanted: Wanted, variants: Variants, palindromic: Palindromic = "drop") -> Matched:
    """The rows of a score found among a file's variants; `wanted` are their places in the file's build."""
    completed, alone = _other_alleles(wanted, variants)
    found: Match = match(completed, variants, palindromic)
    entry = np.array(found.row, dtype=np.int64)
    missing = tuple(
        (score.rows[j].name or f"line {score.rows[j].line}", WANTED_CATEGORIES[found.wanted_category[j]])
        for j in np.flatnonzero(entry < 0).tolist()
    )
    by_effect = int((entry[alone] >= 0).sum()) if len(alone) else 0
    return Matched(entry, np.array(found.swapped, dtype=bool), found.categories, by_effect, missing)


def _other_alleles(wanted: Wanted, variants: Variants) -> tuple[Wanted, NDArray[np.int64]]:
    """Rows without another allele take that of the file's row at their place which has the effect allele."""
    alone = np.array([j for j, other in enumerate(wanted.other) if not other], dtype=np.int64)
    if not len(alone):
        return wanted, alone
    key = variants.key
    at: dict[int, list[int]] = {}
    there = places(wanted.code, wanted.position)
    for i in np.flatnonzero(np.isin(key, there[alone])).tolist():
        at.setdefault(int(key[i]), []).append(i)
    other = list(wanted.other)
    for j in alone.tolist():
        effect = wanted.counted[j]
        other[j] = "N"  # matches nothing
        for i in at.get(int(there[j]), ()):
            pair = (variants.counted[i], variants.other[i])
            if effect in pair:
                other[j] = pair[1 - pair.index(effect)]
                break
            turned = tuple(a.translate(COMPLEMENT) for a in pair)
            if len(effect) == 1 and effect in turned and all(len(a) == 1 for a in pair):
                other[j] = turned[1 - turned.index(effect)]
                break
    return Wanted(wanted.code, wanted.position, wanted.counted, other), alone


def check_overlap(score: ScoringFile, found: Matched, minimum: float) -> None:
    """Refuse where fewer than `minimum` of the score's rows are in the files, with the counts."""
    total = len(score.rows) + len(score.set_aside)
    here = len(found.found)
    if here < minimum * total or not here:
        kinds = ", ".join(f"{n} {c.replace('_', ' ')}" for c, n in found.categories.items() if c not in MATCHED and n)
        aside = f", {len(score.set_aside)} that cannot be scored" if score.set_aside else ""
        raise SiteError(
            f"{here} of {total} variants of {score.id} are in the files ({kinds or 'none else'}{aside}); "
            f"{minimum:.0%} were expected",
            hint="is the build right? `--min-overlap` accepts fewer, at the price of what the score is worth",
        )


@dataclass(frozen=True, slots=True)
class Sums:
    """float64 (people,): the score, and the variance that missing genotypes leave; and the share of genotypes missing."""

    score: NDArray[np.float64]
    variance: NDArray[np.float64]
    missing: NDArray[np.float64]


def sums(
    score: ScoringFile, rows: NDArray[np.int64], found: Matched, files: PlinkFiles, frequency: NDArray[np.float64]
) -> Sums:
    """The score of everybody in a file over `rows` of the score; `frequency`: (rows of the score,) of the effect allele."""
    order = rows[np.argsort(found.entry[rows], kind="stable")]
    n = len(files.samples)
    total, variance, missing = np.zeros(n), np.zeros(n), np.zeros(n)
    position = 0
    for _, block in files.blocks(found.entry[order], _BLOCK, hard_calls=not files.has_dosages):
        for genotypes in block:
            j = int(order[position])
            position += 1
            row, f = score.rows[j], float(frequency[j])
            copies: NDArray[Any] = oriented(genotypes, bool(found.swapped[j])).astype(np.float64)
            unknown = copies < 0
            match row.kind:
                case "additive":
                    value, expected, spread = copies, 2 * f, 2 * f * (1 - f)
                case "dominant":
                    value, expected = np.minimum(copies, 1.0), 1 - (1 - f) ** 2
                    spread = expected * (1 - expected)
                case "recessive":
                    value, expected = np.maximum(copies - 1.0, 0.0), f * f
                    spread = expected * (1 - expected)
            if unknown.any():
                if np.isnan(f):
                    raise SiteError(
                        f"{row.name or f'line {row.line}'}: genotypes are missing and its allele has no frequency",
                        hint="`--frequencies FILE.afreq` gives public ones; `--frequencies cohort` takes this site's own",
                    )
                value = np.where(unknown, expected, value)
                variance[unknown] += row.weight**2 * spread
                missing[unknown] += 1
            total += row.weight * value
    return Sums(total, variance, missing / max(1, len(rows)))


def cohort_frequency(found: Matched, files: PlinkFiles, rows: NDArray[np.int64]) -> dict[int, float]:
    """Frequency of the effect allele among the people of the file, by row of the score; rows nobody is called at are left out."""
    out: dict[int, float] = {}
    order = rows[np.argsort(found.entry[rows], kind="stable")]
    position = 0
    for _, block in files.blocks(found.entry[order], _BLOCK, hard_calls=not files.has_dosages):
        for genotypes in block:
            j = int(order[position])
            position += 1
            called = genotypes[genotypes >= 0]
            if len(called):
                f = float(called.mean(dtype=np.float64)) / 2
                out[j] = 1 - f if found.swapped[j] else f
    return out


def chosen_frequencies(score: ScoringFile, *sources: Mapping[int, float]) -> NDArray[np.float64]:
    """(rows,) of the effect allele: from the first source that has it, then the scoring file's own; NaN where none has."""
    out = np.full(len(score.rows), np.nan)
    for j, row in enumerate(score.rows):
        for source in sources:
            if j in source:
                out[j] = source[j]
                break
        else:
            if row.frequency is not None:
                out[j] = row.frequency
    return out


def afreq(text: str, name: str, score: ScoringFile, found: Matched, variants: Variants) -> dict[int, float]:
    """Frequencies from a PLINK 2 .afreq table (ID, REF, ALT, ALT_FREQS), by row of the score that is in the file."""
    lines = text.splitlines()
    head = lines[0].lstrip("#").split("\t") if lines else []
    if not {"ID", "REF", "ALT", "ALT_FREQS"} <= set(head):
        raise SiteError(f"{name} has no columns ID, REF, ALT and ALT_FREQS", hint="as `plink2 --freq` writes them")
    column = {c: head.index(c) for c in ("ID", "REF", "ALT", "ALT_FREQS")}
    by_id: dict[tuple[str, str, str], float] = {}
    for number, line in enumerate(lines[1:], 2):
        cells = line.split("\t")
        try:
            frequency = float(cells[column["ALT_FREQS"]])
            by_id[cells[column["ID"]], cells[column["ALT"]], cells[column["REF"]]] = frequency
        except (IndexError, ValueError):
            raise SiteError(f"{name} line {number}: a frequency of one ALT allele was expected") from None
    out = {}
    for j in found.found.tolist():
        i = int(found.entry[j])
        pair = (variants.counted[i], variants.other[i])
        frequency_of = by_id.get((str(variants.id[i]), *pair))
        if frequency_of is None and (reverse := by_id.get((str(variants.id[i]), pair[1], pair[0]))) is not None:
            frequency_of = 1 - reverse
        if frequency_of is not None:
            out[j] = 1 - frequency_of if found.swapped[j] else frequency_of
    return out
