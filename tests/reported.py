"""Studies that ran in a plain loop, with everything a coordinator would hold afterwards: results, receipts, documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

import contracts
import plain_loop
import released
from sequester.protocols import privacy
from sequester.protocols.release import Release, judge
from sequester.protocols.signing import raw_public, sign_document
from sequester.protocols.study import Study, study_json
from sequester.server.rounds import results_bytes

GROUPS = ["AFR", "EAS", "EUR"]
FREQUENCIES = (0.12, 0.21, 0.35, 0.48, 0.09, 0.3, 0.27, 0.44)
VARIANTS = [
    {"id": f"rs{1000 + 37 * j}", "chromosome": str(1 + 2 * j), "position": 1_000_000 + 12345 * j, "effect": "A",
     "other": "G", "frequency": str(f)}
    for j, f in enumerate(FREQUENCIES)
]  # fmt: skip


def private_study(**changed: Any) -> Study:
    """A risk score on eight variants, age and sex, by ancestry, at epsilon 3."""
    fields = {
        "title": {"en": "A risk score for coronary artery disease"},
        "summary": {"en": "A logistic model on eight published variants, age and sex, trained on all hospitals together."},
        "question": "How well do published variants predict the disease in patients that did not train the model?",
        "covariates": [
            {"name": "age", "kind": "quantitative", "unit": "years", "lower": "20", "upper": "90"},
            {"name": "sex", "kind": "binary", "values": ["0", "1"], "centre": "0.5", "scale": "0.5"},
        ],
        "variants": VARIANTS,
        "cohort": {
            "where": ["age >= 20"], "test_fraction": "0.3", "subgroup": "ancestry", "subgroup_values": GROUPS,
            "subgroup_shares": ["0.25", "0.15", "0.59"],
        },
        "analyses": [
            {"kind": "glm", "name": "score", "rounds": 10, "budget": "0.8", "prevalence": "0.2"},
            {"kind": "evaluation", "name": "held_out", "of": "score", "budget": "0.2"},
        ],
        "n0": 30000,
        "n_max": 40000,
    }  # fmt: skip
    return contracts.study(**{**fields, **changed})


def exact_study(**changed: Any) -> Study:
    """The same as exact logistic regression, by Newton's method."""
    analyses = [
        {"kind": "glm", "name": "score", "mode": "exact", "solver": "newton", "rounds": 12},
        {"kind": "evaluation", "name": "held_out", "of": "score", "mode": "exact"},
    ]
    fields = {"analyses": analyses, "aggregation": {"mode": "strict", "ring_bits": 64, "fraction_bits": 28}}
    return private_study(**{**fields, **changed})


def cohorts(study: Study, n: int = 10000, rare: int = 60, seed: int = 1) -> list[plain_loop.Rows]:
    """One cohort a site; the last group has about `rare` people in all, people outside the list are its complement."""
    rng = np.random.default_rng(seed)
    features = study.features()
    truth = np.array([0.35, 0.2, -0.3, 0.1, 0.4, 0.0, -0.15, 0.25])
    found = []
    for site in range(len(study.sites)):
        x = np.empty((n, len(features)))
        for j, feature in enumerate(features):
            if feature.kind == "variant":
                raw = rng.binomial(2, feature.centre / 2, n).astype(float)
            else:
                raw = rng.uniform(25, 85, n) if feature.name == "age" else rng.integers(0, 2, n).astype(float)
            x[:, j] = (raw - feature.centre) / feature.scale
        strata = rng.choice(len(GROUPS), n, p=[0.25, 0.15, 0.6])
        others = rng.choice(n, max(1, rare // len(study.sites)), replace=False)
        strata[others] = len(GROUPS)
        if study.cohort.subgroup is None:
            strata[:] = 0
        genetic = x[:, -len(truth) :] @ truth
        z = -1.7 + np.where(strata == 0, 0.55, 1.0) * genetic + 0.9 * x[:, 0] + 0.2 * x[:, 1]
        y = (rng.random(n) < 1 / (1 + np.exp(-z))).astype(float)
        rows = plain_loop.rows(x, y, seed + site, float(study.cohort.test_fraction))
        found.append(plain_loop.Rows(rows.x, rows.y, rows.test, rows.fold, strata))
    return found


def results(study: Study, found: Mapping[str, Any]) -> dict[str, Any]:
    """results.json's value as the exchange builds it, timings and padding made up, within what is promised."""
    promise = privacy.promise(study)
    attempts = {plan.name: privacy.rounds(study, plan) for plan in study.analyses}
    private = any(plan.mode == "private" for plan in study.analyses)
    return {
        "format": 1, "study": privacy.study_digest(study), "consortium": study.consortium, "title": dict(study.title),
        "rehearsal": study.rehearsal, "sites": list(study.site_ids), "rounds": sum(attempts.values()),
        "round_seconds": {"median": 0.0213, "p95": 0.0391}, "wall_seconds": {"set_up": 0.412, "rounds": 0.287},
        "bytes_up": {site: 81234 + 17 * i for i, site in enumerate(study.site_ids)},
        "epsilon": None if promise is None else promise.pld, "delta": str(study.privacy.delta),
        "promise": None if promise is None else asdict(promise),
        "exact": [plan.name for plan in study.analyses if plan.mode == "exact"],
        "noise_on_padding": 1.0031 if private else None, "attempts": attempts,
        "analyses": {
            plan.name: {"kind": plan.kind, "mode": plan.mode, "result": found[plan.name].result} for plan in study.analyses
        },
    }  # fmt: skip


def run(study: Study, seed: int = 3, **of_cohorts: Any) -> dict[str, Any]:
    """The results of the study on simulated cohorts, with noise in private mode."""
    return results(study, plain_loop.run(study, cohorts(study, **of_cohorts), np.random.default_rng(seed)))


def receipt_bodies(study: Study, **changed: Any) -> dict[str, dict[str, Any]]:
    """What each site would sign."""
    charges = {plan.name: privacy.rounds(study, plan) for plan in study.analyses}
    return {
        site: {
            "study": privacy.study_digest(study), "site": site, "data_set": "main", "state": "done",
            "rounds": sum(charges.values()), "bytes_up": 81234 + 17 * i, "charges": charges,
            "isolation": "compute has a network namespace of its own (net:[4026532417]) with no usable interface",
            "allow_unisolated": False, "exact": [p.name for p in study.analyses if p.mode == "exact"],
            "ledger": {"counter": 311 + i, "head": f"{i + 1:x}" * 64}, "time": "2026-11-24T20:15:00Z",
            "life": {
                "epsilon": 4.2 + i / 10, "two_copies": 9.1 + i, "delta": "0.000001",
                "exact": [f"{privacy.study_digest(study)[:12]}/{p.name}" for p in study.analyses if p.mode == "exact"],
            },
            **changed,
        }
        for i, site in enumerate(study.site_ids)
    }  # fmt: skip


def signed(bodies: Mapping[str, dict[str, Any]]) -> dict[str, bytes]:
    """The receipts as documents, each by its own site's key."""
    return {site: sign_document("receipt", body, contracts.SITES[site]) for site, body in bodies.items()}


def standing(study: Study) -> Release:
    """Every hospital's release gate has passed."""
    digest = privacy.study_digest(study)
    return judge(study, digest, raw_public(contracts.COORDINATOR), released.passes(study))


def held_by_coordinator(study: Study, of: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `results_folder.write` but for the folder."""
    return {
        "study": study, "digest": privacy.study_digest(study), "results_json": results_bytes(of),
        "receipt_documents": signed(receipt_bodies(study)),
        "study_document": sign_document("study", study_json(study), contracts.COORDINATOR),
        "release_documents": released.passes(study),
    }  # fmt: skip
