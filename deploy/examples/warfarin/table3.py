"""How many predicted doses lie within 20 % of the actual one, by actual dose: beside table 3 of the paper.

International Warfarin Pharmacogenetics Consortium, NEJM 2009;360:753 (PMC2722908), table 3, derivation and validation
cohort together: 5,052 patients. Ours are those of them with age, height and weight in the file at hospitals of at least
50 such patients, 4,267 at all sixteen; the paper filled in missing heights and weights. Both algorithms are fitted to the
patients they are judged on (the paper's to four fifths of them).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

BANDS = ("21.000001", "49")  # 21 mg a week and less, between, 49 and more
GROUPS = ("21 mg a week and less", "between", "49 and more")
APPROACHES = ("pharmacogenetic", "clinical", "fixed 35 mg a week")
PATIENTS = (1711, 2716, 625)
# within 20 %, under and over by more than that: per cent of the patients of each group
PAPER: Mapping[str, Sequence[tuple[float, float, float]]] = {
    "pharmacogenetic": ((35.0, 5.4, 59.7), (55.9, 25.9, 18.2), (32.8, 66.7, 0.5)),
    "clinical": ((24.0, 1.2, 74.8), (53.3, 31.0, 15.6), (13.3, 86.2, 0.5)),
    "fixed 35 mg a week": ((0.0, 0.0, 100.0), (53.7, 8.9, 37.4), (0.0, 100.0, 0.0)),
}
GENOTYPES = ["vkorc1", "cyp2c9"]


def tolerance(per_cent: float, patients: int) -> float:
    """Two standard errors, in per cent, of the paper's share among so many patients of ours, at least 1.

    The two sets of patients are not the same, ours being a seventh fewer and not by chance: what sampling alone does to one
    share is the least that can be asked of them. At least one per cent: a share of 0 has no standard error.
    """
    share = per_cent / 100
    return max(200 * (share * (1 - share) / patients) ** 0.5, 1.0)


def plans(folds: bool = False) -> list[dict[str, Any]]:
    """Both algorithms and the three approaches judged: one round each; with `folds` by the fit that left a patient out."""
    fit = {"kind": "linear", "mode": "exact"}
    judged = {
        "kind": "evaluation",
        "mode": "exact",
        "part": "all",
        "error_bound": 400,
        "bands": list(BANDS),
        "folds": folds,
    }
    return [
        fit | {"name": "genetic"}, fit | {"name": "clinical", "leave_out": GENOTYPES},
        judged | {"name": "with_genotypes", "of": "genetic"}, judged | {"name": "without", "of": "clinical"},
        judged | {"name": "fixed_dose", "of": "clinical", "fixed": 35},
    ]  # fmt: skip


NAMES = dict(zip(APPROACHES, ("with_genotypes", "without", "fixed_dose"), strict=True))


def shares(result: Mapping[str, Any]) -> list[tuple[float, float, float]]:
    """(within, under, over) in per cent of each group of one evaluation."""
    return [(100 * row["within_20_percent"], 100 * row["under"], 100 * row["over"]) for row in result["bands"]]


def lines(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The table for people: ours and the paper's; `results` are of the three evaluations by name."""
    yield f"{'within 20 % (under, over), per cent':<22}{'':14}{'here':>22}{'the paper':>24}"
    for g, group in enumerate(GROUPS):
        for approach in APPROACHES:
            ours, theirs = shares(results[NAMES[approach]])[g], PAPER[approach][g]
            yield f"{group:<22}{approach:<20}" + "".join(
                f"{a:10.1f} ({u:4.1f}, {o:5.1f})" for a, u, o in (ours, theirs)
            )
