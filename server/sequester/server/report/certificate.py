"""The privacy certificate of a study's release: everything spec/privacy.md, section 1, says a release must carry.

One JSON value, from the signed study, the results, and the hospitals' verified receipts and verdicts. The page prints it;
nothing in it is about a single hospital except the charges that its own ledger counted and the pass or fail it signed. A
figure that is not known says so and why.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

from sequester.protocols import accounting, privacy, release, session
from sequester.protocols.accounting import DELTA_SLACK, Event
from sequester.protocols.analyses.registry import Plan, analysis_of
from sequester.protocols.evidence import PADDING_LEVEL
from sequester.protocols.evidence import padding_limits as limits_of
from sequester.protocols.release import Release
from sequester.protocols.study import Study
from sequester.server.report.bounds import Bounds
from sequester.server.report.receipts import Receipt

NOT_COVERED = (
    "correctness against a hospital that sends wrong numbers",
    "a hospital's own compute and gate: they are its custodian",
    "the names of the hospitals, the definition of the cohort, the model's form, timing, message sizes and failures",
    "that a hospital joined or did not join: data are checked once, before approval, and the outcome is seen",
    "relatives: each person is a unit of their own, and what a family shares is not protected",
    "that a patient is at one hospital only: nobody looks for the same person at two; the figure for two is printed",
    "that raw DNA stays at the hospital: a statement about where data flow, not about differential privacy",
)

IMPLEMENTATION: dict[str, str] = {
    "random_source": "AES-CTR streams seeded by the operating system at each hospital's gate",
    "noise": "exact discrete Gaussian in integers, added before the modulus, by the gate and by nothing else",
    "sums": "float64 over clipped patients, rounded to fixed point; the bound on one patient includes the rounding",
    "timing": "rounds start when the exchange says so; a hospital's answer time is not padded, but where patients are "
    "sampled contributions leave at the plan's own times",
    "refusals": "none depends on patients after approval: data are checked once, at ingest; later a hospital is in or out",
    "message_sizes": "fixed by the signed study, the same at every hospital",
    "logs": "counts, positions in files and variant names only",
    "access": "keys and genotypes are held by two processes that share a socket and nothing else",
}


TESTS = (
    "at every hospital, before it joined: what one patient changes, noise moments, padding, canaries in sums and model "
    "(release_gate)",
    "in this study: the noise on padding coordinates of every opened sum (noise_on_padding)",
    "of the program: one test for each claim, listed in tests/README.md of the version that is named here",
)
ADJACENCY = {
    "add-remove": "the promise compares the study with and without any one patient",
    "replace-one": "the promise compares the study with any one patient exchanged for another: a size was published",
}
UNAUDITED: dict[str, Any] = {
    "value": None,
    "because": "a hospital publishes pass or fail of its audit and no figure (release_gate); the coordinator, who may, ran "
    "none: `sequester-client audit release study.json --json`, then `study results --audit`",
}
NO_MODEL: dict[str, Any] = {"value": None, "because": "the study has no private model for canaries to be in"}


def certificate(
    study: Study,
    digest: str,
    results: Mapping[str, Any],
    receipts: Mapping[str, Receipt],
    standing: Release,
    audit: Bounds | None = None,
) -> dict[str, Any]:
    """The certificate as a JSON value; sites without a receipt are listed with the whole reservation.

    `standing` is where the release gate stands, judged from the hospitals' own signatures; `audit` is the coordinator's own
    trial of the same program, from which lower bounds on epsilon may be told.
    """
    private = [plan for plan in study.analyses if plan.mode == "private"]
    exact = [plan.name for plan in study.analyses if plan.mode == "exact"]
    promise = privacy.promise(study)
    return {
        "format": 1,
        "study": digest,
        "lineage": study.lineage,
        "rehearsal": study.rehearsal,
        "unit": {"name": study.privacy.unit, "means": "one patient's whole record at one hospital: every visit, row and variant"},
        "adjacency": study.privacy.adjacency,
        "adjacency_means": ADJACENCY[study.privacy.adjacency],
        "sizes": "of hospitals, cohorts and case counts: never published exactly; n0 and n_max are declared in the study, "
        "from sources outside the cohorts",
        "epsilon": {
            "contract": None if promise is None else str(study.privacy.epsilon),
            "filter": None if promise is None else promise.filter,
            "reported": None if promise is None else promise.pld,
            "without_spare_attempts": None if promise is None else promise.pld_without_spares,
            "copies": 2,
            "two_copies": None if promise is None else promise.two_copies,
            "all_others_collude": None if promise is None else promise.all_others_collude,
            "covers": "all planned rounds and spare attempts of the private analyses, at every hospital",
        },
        "delta": {
            "contract": str(study.privacy.delta),
            "stated": float(study.privacy.delta) * DELTA_SLACK,
            "slack": DELTA_SLACK,
            "slack_because": "the noise is a discrete Gaussian, accounted as a continuous one",
            "one_over_n_max": 1 / study.n_max,
            "means": "one delta for a whole ledger, never added up over studies; below one over the network's n_max",
        },
        "life": _life(study, exact),
        "exact": exact,
        "exact_trusts_broadcasts": [
            p.name for p in study.analyses if p.mode == "exact" and analysis_of(p).is_iterative(p, study)
        ],
        "releases": [_release(study, plan) for plan in study.analyses],
        "sites": _sites(study, private, receipts),
        "accountant": {
            "decides": "Renyi filter at one order", "order": str(study.privacy.order),
            "reports": "privacy loss distributions, pessimistic", "library": "dp-accounting",
            "version": version("dp-accounting"),
        },
        "contributions_per_patient": "one record; rows are merged by patient at ingest, a second row is refused",
        "trust": trust(study, promise),
        "not_covered": list(NOT_COVERED),
        "budget_policy": "each hospital's own policy and ledger, for the life of its data; never refreshed by this study",
        "implementation": IMPLEMENTATION,
        "public_inputs": public_inputs(study),
        "hyper_parameters": {
            "values": {plan.name: _settings(plan) for plan in study.analyses},
            "chosen": "fixed in the signed study before any patient was read; nothing was tuned on these patients",
            "charged": "0: no search ran on these patients in this study",
        },
        "release_gate": release_gate(standing),
        "groups": groups(study, results),
        "evidence": evidence(study, results, audit),
        "versions": {"sequester": version("sequester")},
    }  # fmt: skip


def trust(study: Study, promise: privacy.Promise | None) -> dict[str, Any]:
    """The letters of spec/secure-aggregation.md, section 2, for the smallest round the study allows."""
    params = privacy.session_params(study)
    n, c = len(params.roster), params.max_corrupt
    h = privacy.noise_adders(study)
    exact = {plan.mode == "exact" for plan in study.analyses}
    kind = {
        frozenset({False}): "computational differential privacy",
        frozenset({True}): "masks without differential privacy",
    }.get(
        frozenset(exact), "computational differential privacy for the private analyses, masks alone for the exact ones"
    )
    return {
        "kind": f"{kind}: the exchange sees masked integers and one opened sum a round",
        "N": n,
        "S": n,
        "c": c,
        "t": session.threshold(n, c),
        "a": params.max_absent,
        "u": min(session.floor(params, active) for active in range(params.min_active, n + 1)),
        "h": h,
        "f": n - h,
        "mode": params.mode,
        "mechanism": study.privacy.mechanism,
        "key_holders": "each hospital holds its own keys; the coordinator's signing key is not on the exchange",
        "exchange": f"may be malicious, together with up to {c} of the {n} hospitals",
        "worst_case_epsilon": None if promise is None else promise.all_others_collude,
        "broadcasts": "on private lines the bound holds whatever weights the exchange sends; each gate counts its own charges "
        "and refuses any beyond T + R",
        "holders": "whoever holds the published figures or the model: (epsilon, delta), with no trust in anybody else",
    }


def public_inputs(study: Study) -> dict[str, Any]:
    """What entered from outside the cohorts: sizes, frequencies, bounds, published scores, how far heads may lie apart."""
    priors = {p.name: str(p.prior_sd) for p in study.analyses if p.kind == "heads"}
    return {
        "n0": study.n0,
        "n_max": study.n_max,
        "variant_frequencies": len(study.variants),
        "published_scores": [score.name for score in study.scores],
        "bounded_columns": [c.name for c in (study.phenotype, *study.covariates) if c.kind == "quantitative"],
        "prevalence": {
            p.name: str(p.prevalence)
            for p in study.analyses
            if p.kind in ("glm", "training") and p.family == "logistic"
        },
        **({"prior_sd": priors} if priors else {}),
    }


def release_gate(standing: Release) -> dict[str, Any]:
    """What each hospital's trial of its own installation came to, and what let the models out."""
    waiver = standing.waiver
    return {
        "rule": "a pass of every hospital of the signed roster, or a waiver of the coordinator that each has countersigned",
        "granted_by": standing.granted_by or "nothing: no model may be exported",
        "sites": {
            site: {"verdict": word} | (asdict(standing.verdicts[site]) if site in standing.verdicts else {})
            for site, word in standing.words.items()
        },
        "waiver": None if waiver is None else asdict(waiver) | {"countersigned": list(standing.countersigned)},
        "means": "pass: no gross fault was found on made-up patients; evidence, not proof, of epsilon",
    }  # fmt: skip


def groups(study: Study, results: Mapping[str, Any]) -> dict[str, Any]:
    """How good the model is in each ancestry group, as it was released; noise costs small groups most."""
    found = {}
    for plan in study.analyses:
        opened = results["analyses"].get(plan.name, {}).get("result", {}).get("groups")
        if plan.kind == "evaluation" and opened:
            found[plan.name] = {name: _measure(group) for name, group in opened.items()}
    if found:
        return {
            "by_evaluation": found,
            "because": "noise costs small groups most; a group that is too small is withheld",
        }
    named = study.cohort.subgroup is not None
    return {
        "by_evaluation": {},
        "because": "no evaluation opened one" if named else "the study names no groups to compare",
    }


def _measure(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's single figures; curves stand in results.json."""
    return {
        name: value
        for name, value in group.items()
        if isinstance(value, int | float | str) or (isinstance(value, dict) and "value" in value)
    }


def evidence(study: Study, results: Mapping[str, Any], audit: Bounds | None) -> dict[str, Any]:
    """What was measured in this run; what was not says so."""
    ratio = results.get("noise_on_padding")
    limits = padding_limits(study, results)
    if ratio is None or limits is None:
        verdict = "not measured: no private analysis ran"
    elif ratio < limits[0]:
        verdict = "too little noise: this release is blocked"
    elif ratio > limits[1]:
        verdict = "more noise than promised: privacy holds, usefulness suffers"
    else:
        verdict = "the noise that was promised"
    return {
        "noise_on_padding": {
            "ratio": ratio, "limits": None if limits is None else list(limits), "level_a_side": PADDING_LEVEL,
            "verdict": verdict,
        },
        "audit_lower_bound": (UNAUDITED if release.models(study) else NO_MODEL) if audit is None else audit.json(),
        "tests": list(TESTS),
        "accountant": "every hospital's ledger admitted each charge before its bytes left",
    }  # fmt: skip


def padding_limits(study: Study, results: Mapping[str, Any]) -> tuple[float, float] | None:
    """Limits of measured over promised standard deviation, chi-square at 1e-4 a side, pooled; None without padding."""
    attempts = results.get("attempts", {})
    count = sum(
        int(attempts.get(plan.name, 0)) * privacy.layout(study, plan, 0).padding
        for plan in study.analyses
        if plan.mode == "private"
    )
    if count == 0:
        return None
    return limits_of(count)


def _life(study: Study, exact: list[str]) -> dict[str, Any]:
    """Never one figure for hospitals whose epsilons differ: each hospital's own is under `sites`."""
    if exact:
        because = "exact analyses ran on these data: no epsilon for life can be stated for them any more"
        alone = "epsilon of the private releases alone" if len(exact) < len(study.analyses) else None
        return {"epsilon": None, "because": because, "instead": alone}
    because = "hospitals differ: each one's own is stated beside its charges, from its receipt"
    return {"epsilon": None, "because": because, "instead": None}


def _site_life(receipt: Receipt | None) -> dict[str, Any]:
    if receipt is None or receipt.life is None:
        because = "no receipt arrived" if receipt is None else "its program does not say it yet: ask for a newer one"
        return {"epsilon": None, "because": because}
    told = receipt.life
    row = {"two_copies": told.two_copies, "delta": told.delta * DELTA_SLACK}
    if told.exact:
        because = "exact releases of this data set: no epsilon for life can be stated any more"
        return row | {
            "epsilon": None, "private_releases_alone": told.epsilon, "exact": list(told.exact), "because": because
        }  # fmt: skip
    return row | {"epsilon": told.epsilon, "covers": "everything charged to the data set, running studies as reserved"}


def _release(study: Study, plan: Plan) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": plan.name, "kind": plan.kind, "mode": plan.mode, "T": privacy.rounds(study, plan),
        "R": privacy.spares(study, plan),
    }  # fmt: skip
    if plan.mode == "exact":
        return row | {"mechanism": "none: the opened sums are not protected by differential privacy", "epsilon": None}
    layout, delta = privacy.layout(study, plan, 0), float(study.privacy.delta)
    step = 2.0**study.aggregation.fraction_bits
    sigma, charges = privacy.multiplier(plan), privacy.charges(study, plan)
    share, q = privacy.sigma_int(study, plan, layout), privacy.rate(plan)
    how = f"Gaussian, {study.privacy.mechanism} discrete shares"
    if privacy.local_steps(plan) > 1:
        how += f", on each of {privacy.local_steps(plan)} local steps"
    return row | {
        "mechanism": how,
        "sigma": sigma,
        "C": analysis_of(plan).sensitivity(plan, study),
        "C_int": privacy.clip_int(study, plan, layout),
        "sigma_int_share": share,
        "noise_sd_of_sum": share * math.sqrt(len(study.sites)) / step,
        "q": q,
        "epsilon": accounting.epsilon_pld([Event(plan.name, sigma, charges, q)], delta),
        "delta": delta * DELTA_SLACK,
    }


def _sites(study: Study, private: list[Plan], receipts: Mapping[str, Receipt]) -> dict[str, Any]:
    delta = float(study.privacy.delta)
    known: dict[tuple[int, ...], dict[str, Any]] = {}
    rows: dict[str, Any] = {}
    for site in study.site_ids:
        receipt = receipts.get(site)
        counts = tuple(
            privacy.charges(study, plan) if receipt is None else receipt.charges.get(plan.name, 0) for plan in private
        )
        if counts not in known:
            events = [
                Event(p.name, privacy.multiplier(p), n, privacy.rate(p)) for p, n in zip(private, counts, strict=True)
            ]
            known[counts] = _both(events, delta) | {"releases": {e.analysis: _both([e], delta) for e in events}}
        rows[site] = {
            "charges": dict(zip((plan.name for plan in private), counts, strict=True)),
            **(known[counts] if private else {"epsilon": None, "two_copies": None, "releases": {}}),
            "delta": delta * DELTA_SLACK,
            "life": _site_life(receipt),
            "from": "its receipt" if receipt is not None else "the reservation: no receipt arrived",
        }
    return rows


def _both(events: list[Event], delta: float) -> dict[str, float]:
    """epsilon of these charges for a patient of one hospital, and of two."""
    halved = [replace(event, sigma=event.sigma / 2) for event in events]
    return {"epsilon": accounting.epsilon_pld(events, delta), "two_copies": accounting.epsilon_pld(halved, delta)}


def _settings(plan: Plan) -> dict[str, str]:
    skipped = {"kind", "name", "mode", "noise_multiplier"}
    values = {
        key: value for key, value in plan.model_dump(mode="json").items() if key not in skipped and value is not None
    }
    return {
        key: json.dumps(value) if isinstance(value, bool | list | dict) else str(value) for key, value in values.items()
    }
