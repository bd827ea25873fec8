"""Studies with one analysis of every kind, run on made-up patients in a plain loop: what a report has to show."""

from __future__ import annotations

from typing import Any

import numpy as np

import contracts
import plain_loop
import reported
from oracles.test_templates import made_up
from sequester.protocols.study import Study

EXACT = {"mode": "strict", "ring_bits": 64, "fraction_bits": 28}
GROUPS = {"subgroup": "ancestry", "subgroup_values": ["AFR", "EUR"], "subgroup_shares": ["0.34", "0.33"]}
COVARIATES = [
    {"name": "age", "kind": "quantitative", "unit": "years", "lower": "20", "upper": "90"},
    {"name": "sex", "kind": "binary", "values": ["0", "1"], "centre": "0.5", "scale": "0.5"},
]
YEARS = {"name": "years", "kind": "time", "unit": "years", "lower": "0", "upper": "10", "event": "died"}


def variants(n: int, chromosomes: int = 22) -> list[dict[str, Any]]:
    """`n` variants spread over the chromosomes, common ones."""
    rng = np.random.default_rng(9)
    rows = []
    for j in range(n):
        c, f = 1 + j * chromosomes // n, rng.uniform(0.05, 0.5)
        rows.append(
            {"id": f"rs{j + 1}", "chromosome": str(c), "position": 10_000 + 60_000 * (j + 1), "effect": "A", "other": "G",
             "frequency": f"{f:.3f}"}
        )  # fmt: skip
    return rows


def scan_study(linear: bool = False, n: int = 3000, chromosomes: int = 22) -> Study:
    """A scan of `n` variants, gene tests and heterogeneity of its strongest variants; exact."""
    rows = variants(n, chromosomes)
    genes = [{"name": f"GENE{k + 1}", "variants": [v["id"] for v in rows[4 * k : 4 * k + 4]]} for k in range(12)]
    dose = {"name": "dose", "kind": "quantitative", "unit": "mg", "lower": "1", "upper": "100"}
    return contracts.study(
        title={"en": "A scan for a made-up disease"}, question="Which variants go with the disease?",
        phenotype=dose if linear else {"name": "case", "kind": "binary", "values": ["0", "1"]},
        covariates=COVARIATES, variants=rows, cohort={"test_fraction": "0"}, aggregation=EXACT,
        analyses=[
            {"kind": "association", "name": "scan", "mode": "exact", "part": "all"},
            {"kind": "burden", "name": "genes", "mode": "exact", "part": "all", "genes": genes},
            {"kind": "heterogeneity", "name": "apart", "mode": "exact", "part": "all", "terms": ["age"], "of": "scan", "top": 3},
        ],
    )  # fmt: skip


def _logistic(exact: bool, budget: str) -> dict[str, Any]:
    if exact:
        return {"kind": "glm", "mode": "exact", "solver": "newton", "rounds": 12}
    return {"kind": "glm", "rounds": 10, "prevalence": "0.25", "budget": budget}


def model_study(exact: bool) -> Study:
    """Two models of a disease, evaluation, calibration and reclassification by ancestry."""
    fit = _logistic(exact, "0.2")
    of: dict[str, Any] = {"mode": "exact"} if exact else {"budget": "0.2"}
    return contracts.study(
        title={"en": "A risk score beside age and sex"}, question="What does the score add to age and sex?",
        covariates=COVARIATES, variants=variants(8), n0=24000, n_max=30000,
        cohort={"test_fraction": "0.5", **GROUPS}, aggregation=EXACT if exact else {"mode": "strict"},
        analyses=[
            fit | {"name": "clinical", "features": "table"},
            fit | {"name": "genetic"},
            {"kind": "evaluation", "name": "held_out", "of": "genetic", "bins": 20, **of},
            {"kind": "calibration", "name": "right", "of": "genetic", **of},
            {"kind": "reclassification", "name": "gained", "of": "genetic", "against": "clinical",
             "thresholds": ["0.1", "0.2", "0.3", "0.4"], **of},
        ],
    )  # fmt: skip


def heads_study(exact: bool) -> Study:
    """A model on a published score, variants and covariates, its heads by ancestry, and an evaluation of each."""
    fit = _logistic(exact, "0.4")
    of: dict[str, Any] = {"mode": "exact"} if exact else {"budget": "0.2"}
    rows = variants(8)
    published = {"name": "published", "weights": [[v["id"], "0.2"] for v in rows[:4]], "mean": "0.5", "sd": "0.3"}
    return contracts.study(
        title={"en": "A risk score with heads by ancestry"}, question="Does the score mean the same in every ancestry?",
        covariates=COVARIATES, variants=rows, scores=[published], n0=24000, n_max=30000,
        cohort={"test_fraction": "0.4", **GROUPS}, aggregation=EXACT if exact else {"mode": "strict"},
        analyses=[
            fit | {"name": "genetic"},
            {"kind": "heads", "name": "heads", "of": "genetic", **of},
            {"kind": "evaluation", "name": "before", "of": "genetic", **of},
            {"kind": "evaluation", "name": "after", "of": "heads", **of},
        ],
    )  # fmt: skip


def survival_study(exact: bool) -> Study:
    """Kaplan-Meier curves by ancestry and a hazard model with its C-index."""
    of: dict[str, Any] = {"mode": "exact"} if exact else {}
    cox = {"kind": "survival", "name": "model", "model": "cox_by_site" if exact else "hazard", "rounds": 12}
    return contracts.study(
        title={"en": "Survival after a diagnosis"}, question="Who dies early?", phenotype=YEARS, covariates=COVARIATES,
        variants=variants(4), n0=9000, n_max=12000, cohort={"test_fraction": "0.3", **GROUPS},
        aggregation=EXACT if exact else {"mode": "strict"},
        analyses=[
            {"kind": "survival", "name": "curves", "model": "kaplan_meier", "part": "all", "bins": 60 if exact else 20,
             "by_subgroup": True, **of},
            cox | of,
            {"kind": "evaluation", "name": "held_out", "of": "model", "times": 8, "bins": 8, **of},
        ],
    )  # fmt: skip


def run(study: Study, people: int = 9000, seed: int = 1) -> dict[str, Any]:
    """results.json's value of the study on made-up patients in three hospitals, with noise where it is private."""
    cohorts = plain_loop.split(
        made_up(study, people, seed), [people // 2, people // 3, people - people // 2 - people // 3]
    )
    return reported.results(study, plain_loop.run(study, cohorts, np.random.default_rng(seed + 1)))
