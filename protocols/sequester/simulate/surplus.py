"""What real files hold beyond the recipe: rows that no study wants, rows twice, people twice, brothers and sisters.

Each surplus row is written together with the category a reader must give it, so that a reader's account can be compared
with the truth, count by count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sequester.simulate.genomes import POPULATIONS, Genomes, Locus
from sequester.simulate.plink import Line

ROWS = 12  # of each kind, a site
PAIRS, COPIES = 10, 20  # of brothers and sisters; of people who are at two hospitals
_THIRD = {"A": "C", "C": "A", "G": "T", "T": "G"}


@dataclass(frozen=True, slots=True)
class Rows:
    """Lines of a file, int8 counts (people, lines), and the category of each ALT allele of each line."""

    lines: list[Line]
    counts: NDArray[np.int8]
    categories: list[tuple[str, ...]]


def with_surplus(
    rng: np.random.Generator, own: Rows, off_array: Sequence[Locus], prefix: str, *, several_alleles: bool
) -> Rows:
    """The rows of a site and 12 more of each kind, in genome order. `off_array`: loci of the panel that it does not carry."""
    lines, categories = list(own.lines), list(own.categories)
    people = own.counts.shape[0]
    extra: list[NDArray[np.int8]] = []

    def add(line: Line, *category: str) -> None:
        lines.append(line)
        categories.append(category)
        extra.append(np.asarray(rng.integers(0, 3, people), dtype=np.int8))

    used = {(line.chromosome, line.position) for line in own.lines} | {
        (prefix + locus.chromosome, locus.position) for locus in off_array
    }
    last = max(line.position for line in own.lines)
    matched = [i for i, c in enumerate(own.categories) if c[0] not in ("palindromic",)]
    for number, i in enumerate(sorted(rng.choice(matched, ROWS, replace=False).tolist())):
        original = own.lines[i]
        again = Line(
            original.chromosome, f"{original.id}.again{number}", original.position, original.counted, original.other
        )
        add(again, "duplicate")
        extra[-1] = own.counts[:, i].copy()
        place = last + 10 + 10 * number
        while (original.chromosome, place) in used:
            place += 1
        add(Line(original.chromosome, f"indel{number}", place, "AT", "A"), "indel")
        add(Line(original.chromosome, f"own{number}", place + 3, "A", "G"), "not_in_list")
        add(Line(prefix + "MT", f"mt{number}", 100 + number, "A", "G"), "other_contig")
        add(Line(prefix + "Un_gl0002", f"un{number}", 100 + number, "A", "G"), "other_contig")
        add(Line(original.chromosome, f"same{number}", place + 5, "A", "A"), "monomorphic_coding")
        if several_alleles:
            add(Line(original.chromosome, f"del{number}", place + 6, "<DEL>", "A"), "symbolic")
            add(Line(original.chromosome, f"star{number}", place + 7, "*", "A"), "spanning_deletion")
    for locus in list(off_array)[:ROWS]:
        wrong = Line(prefix + locus.chromosome, locus.id, locus.position, _THIRD[locus.reference], locus.reference)
        if {wrong.counted, wrong.other} != {locus.reference, locus.alternative}:
            add(wrong, "allele_mismatch")
    counts = np.column_stack([own.counts, *extra])
    if several_alleles:
        for i in sorted(rng.choice(matched, ROWS, replace=False).tolist()):
            line = own.lines[i]
            if own.categories[i] != ("direct",):
                continue
            third = next(b for b in "ACGT" if b not in (line.counted, line.other))
            lines[i] = Line(line.chromosome, line.id, line.position, f"{line.counted},{third}", line.other)
            categories[i] = ("direct", "allele_mismatch")
    order = sorted(range(len(lines)), key=lambda i: (lines[i].chromosome, lines[i].position, i))
    return Rows([lines[i] for i in order], np.ascontiguousarray(counts[:, order]), [categories[i] for i in order])


def siblings(rng: np.random.Generator, cohort: Genomes) -> NDArray[np.int64]:
    """Make 10 pairs of full siblings among the Europeans, by changing their dosages; int64 (pairs, 2) rows of the cohort.

    Each takes one allele of either parent at every locus; the parents are further people, who stay.
    """
    europeans = np.flatnonzero(cohort.population == POPULATIONS.index("EUR"))
    chosen = rng.choice(europeans, 4 * PAIRS, replace=False).reshape(PAIRS, 4)
    for one, two, mother, father in chosen.tolist():
        for child in (one, two):
            cohort.dosages[child] = sum(
                (rng.random(len(cohort.loci)) < cohort.dosages[parent] / 2).astype(np.int8)
                for parent in (mother, father)
            )
    return np.asarray(chosen[:, :2], dtype=np.int64)


def together(pairs: NDArray[np.int64], assigned: NDArray[np.int64], population: NDArray[np.int64]) -> None:
    """Have each pair go to one hospital, in exchange for another person of the same ancestry there; changes `assigned`."""
    kept = set(pairs.ravel().tolist())
    for one, two in pairs.tolist():
        if assigned[one] == assigned[two]:
            continue
        there = np.flatnonzero((assigned == assigned[one]) & (population == population[two]))
        other = next(int(i) for i in there if int(i) not in kept)
        assigned[other], assigned[two] = assigned[two], assigned[one]
