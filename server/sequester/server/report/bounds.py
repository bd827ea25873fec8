"""Lower bounds on epsilon from the coordinator's own trial of the program: `sequester-client audit release study.json --json`.

Hospitals send pass or fail and no figure (spec/privacy.md, section 8). The same trial on the coordinator's machine reads
nobody's patients either, and its figures are the coordinator's to publish.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from sequester.protocols import release
from sequester.protocols.errors import PrivacyError, StudyError
from sequester.protocols.study import Study


@dataclass(frozen=True, slots=True)
class Bound:
    """Of one model: bounds from the finished model and from the opened sums, medians over trainings; and the claim."""

    model: float
    sums: float
    claim: float
    patients: int
    runs: int


@dataclass(frozen=True, slots=True)
class Bounds:
    """One for each private model of the study."""

    by_model: dict[str, Bound]

    def json(self) -> dict[str, Any]:
        """For the certificate."""
        rows = {
            name: {"model": b.model, "opened_sums": b.sums, "claim": b.claim, "patients": b.patients, "runs": b.runs}
            for name, b in self.by_model.items()
        }
        return {
            "value": max(max(b.model, b.sums) for b in self.by_model.values()),
            "models": rows,
            "because": "the coordinator's own trial of the program, on made-up patients; each training's bound holds with "
            "95 % (one-run) or 99 % (Gaussian) confidence, and the median over trainings is told",
        }


def read(study: Study, digest: str, data: bytes) -> Bounds:
    """The bounds in what `audit release --json` printed of this study; a trial that failed is a `PrivacyError`."""
    try:
        said = json.loads(data)
        found = {str(row["analysis"]): _bound(row) for row in said["models"]}
        passed, of, named = said["passed"], said["study"], set(found) == {plan.name for plan in release.models(study)}
    except (ValueError, KeyError, TypeError):
        raise StudyError(
            "the audit is not what `sequester-client audit release study.json --json` prints", hint="run it again"
        ) from None
    if of != digest or not named:
        raise StudyError(
            f"the audit is of study {str(of)[:12]}, this is {digest[:12]}",
            hint="give `audit release` the signed study.json that was published",
        )
    if passed is not True:
        raise PrivacyError(
            "the coordinator's own trial failed: the program does not keep what the study promises",
            hint="nothing is exported: install the released version again, and ask every hospital for its own",
        )
    return Bounds(found)


def _bound(row: dict[str, Any]) -> Bound:
    medians = {
        check["check"]: float(check["figures"]["median"]) for check in row["checks"] if "median" in check["figures"]
    }
    size, claim = row["size"], float(row["claim"])
    if not all(0 <= value < 1e6 for value in (claim, *medians.values())):
        raise ValueError("a bound that is no figure")
    return Bound(medians["canaries"], medians["white_box"], claim, int(size["patients"]), int(size["runs"]))
