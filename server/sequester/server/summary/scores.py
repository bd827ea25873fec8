"""From a study's released sums to a scoring file: which correlations they hold, and what a joint weight is per copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequester.protocols import privacy
from sequester.protocols.errors import StudyError
from sequester.protocols.study import Study
from sequester.server.report.scoring_file import scoring_file
from sequester.server.summary import lassosum
from sequester.server.summary.reference import Reference

Vector = NDArray[np.float64]
LEAST_MATCHED = 0.75  # of the study's variants, as a scoring file's overlap (spec/genomics.md, section 3)


@dataclass(frozen=True, slots=True)
class Score:
    """The scoring file and what a coordinator is told of it."""

    file: bytes
    said: dict[str, Any]


def correlations(study: Study, name: str, result: dict[str, Any]) -> tuple[Vector, Vector, float]:
    """(correlation with the outcome, weight per copy of a unit of it, noise in it) of each variant; NaN: not tested.

    Of a scan by z / sqrt(n - 2 + z^2), of a one-round score by its sum over n0 sqrt(K (1 - K)).
    """
    plan = study.analysis(name)
    if plan.kind == "association" and "table" in result:
        t = result["table"]
        z, se, n = (np.array(t[column], dtype=np.float64) for column in ("statistic", "se", "called"))
        tested = np.array([error == "" for error in t["error"]]) & (se > 0)
        root = np.sqrt(np.maximum(n - 2 + z * z, 1.0))
        return np.where(tested, z / root, np.nan), se * root, 0.0
    if plan.kind == "prs":
        rows = {row["name"]: row for row in result["weights"]}
        variants = [f for f in study.features() if f.kind == "variant"]
        k = float(plan.prevalence)
        # private records were divided by the root of their number of features (analyses/prs.py)
        unit = (len(study.features()) ** 0.5 if plan.mode == "private" else 1.0) / (study.n0 * (k * (1 - k)) ** 0.5)
        score = np.array([rows[f.name]["score"] for f in variants])
        per_copy = np.array([1 / (f.scale * (k * (1 - k)) ** 0.5) for f in variants])
        return score * unit, per_copy, float(result.get("noise_sd", 0.0)) * unit
    raise StudyError(
        f"`{name}` holds no sums of single variants", hint="name a scan (association) or a one-round score (prs)"
    )


def joint(
    study: Study, digest: str, name: str, result: dict[str, Any], prefix: str,
    told: Callable[[int, int], None] = lambda done, of: None,
) -> Score:  # fmt: skip
    """Weights by lassosum from analysis `name` and the panel at `prefix`, as a PGS Catalog file and figures about it."""
    r, per_copy, noise = correlations(study, name, result)
    reference = Reference(prefix, study.variants)
    matched = int(reference.matched.sum())
    if matched < LEAST_MATCHED * len(study.variants):
        raise StudyError(
            f"{matched} of the study's {len(study.variants)} variants are in {prefix}; {LEAST_MATCHED:.0%} were expected",
            hint=f"the panel must be in {study.genome_build}, and hold the study's variants",
        )
    fit = lassosum.fit(r, noise, study.variants, reference, told)
    weights = {v.id: float(w) for v, w in zip(study.variants, fit.b * per_copy, strict=True)}
    promise = privacy.promise(study)
    mode = study.analysis(name).mode
    said = {
        "of": name, "method": "lassosum (Mak et al. 2017)", "s": fit.s, "lambda": fit.strength,
        "pseudo_validation": fit.value, "variants": len(study.variants), "matched": matched,
        "not_tested": int(np.isnan(r).sum()), "used": int((fit.b != 0).sum()), "blocks": fit.blocks,
        "reference_people": reference.people,
    }  # fmt: skip
    more = [f"#method={said['method']}; s={fit.s:g}; lambda={fit.strength:.4g}; of={name}; mode={mode}"]
    more.append(f"#linkage_reference={reference.people} people, {matched} variants matched")
    epsilon = "none, exact" if mode == "exact" or promise is None else f"{promise.pld:.4g}"
    data = scoring_file(study, digest, weights, epsilon, more)
    if data is None:
        raise StudyError("the study lists no variants", hint="a score is of variants")
    return Score(data, said)
