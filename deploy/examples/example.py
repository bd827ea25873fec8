"""What tells one example from another: its data, its studies, and what is looked at beside the second opinions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.compared import Compared
from examples.ran import Ran
from sequester.protocols.analyses.registry import ANALYSES

EXACT_SUM = {"mode": "strict", "ring_bits": 64, "fraction_bits": 32, "round_deadline_s": 120}
PRIVATE_SUM = {"mode": "double", "ring_bits": 32, "fraction_bits": 16, "round_deadline_s": 120}
Studies = Mapping[str, Mapping[str, Any]]  # name -> fields of study.yaml


@dataclass(frozen=True, slots=True)
class Example:
    """`studies(skeleton, folder, people)`: the studies in order, from what `prepare.py` wrote into `folder`.

    `findings(name, ran)`: figures with a bound, and sentences without, that only this example has.
    """

    source: str  # below the folder of the data
    template: str
    build: str
    studies: Callable[[Mapping[str, Any], Path, int], Studies]
    findings: Callable[[str, Ran], Iterator[Compared | str]]
    genotypes: str | None = None  # prefix below the folder of the data, for PLINK 2


def policy(studies: Studies) -> dict[str, object]:
    """What a hospital's policy names so that all studies may run there."""
    exact = {plan["kind"] for study in studies.values() for plan in study["analyses"] if plan.get("mode") == "exact"}
    return {"analyses": sorted(ANALYSES), "exact": sorted(exact), "exact_iterative": True}
