"""A model card for each model of a study, in Markdown: what it is for, whom it learnt from, how it does in each group.

After Mitchell et al., "Model Cards for Model Reporting" (FAT* 2019). Everything is from the signed study, the results and
the certificate; what they do not say is said not to be known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sequester.protocols.analyses.registry import Plan, leaves_a_model
from sequester.protocols.study import Study
from sequester.server.report import findings, heads, prs_rs
from sequester.server.report.pieces import Result, digits, percent, sentence, withheld
from sequester.server.report.scoring_file import licence

# Measures of a group, as a card names them; an AUC comes with its interval where there is one.
MEASURES = {
    "auc": "AUC (95 %)", "c_index": "C-index", "average_precision": "Average precision", "brier": "Brier",
    "observed_r2": "R² (observed)", "liability_r2": "R² (liability)", "observed_over_expected": "Observed / expected",
    "mean_absolute_error": "Mean absolute error", "within_20_percent": "Within 20 %", "r2": "R²",
}  # fmt: skip
NOT_FOR = (
    "diagnosis, or any decision about one patient: the model has no clearance as a medical device",
    "people of an ancestry or age that is not among the groups below",
    "insurance, employment, or finding out who took part",
)


def cards(study: Study, digest: str, results: Mapping[str, Any], statement: Mapping[str, Any]) -> dict[str, bytes]:
    """File name -> card of each model that was fitted; the name carries the analysis where there are more."""
    analyses = results["analyses"]
    models = [
        plan for plan in study.analyses if leaves_a_model(plan) and "not_fitted" not in analyses[plan.name]["result"]
    ]
    return {
        "model_card.md" if len(models) == 1 else f"model_card_{plan.name}.md": card(
            study, digest, plan, analyses, statement
        )
        for plan in models
    }


def card(study: Study, digest: str, plan: Plan, analyses: Mapping[str, Any], statement: Mapping[str, Any]) -> bytes:
    """The card of one model, UTF-8."""
    result: Result = analyses[plan.name]["result"]
    title = study.title.get("en") or next(iter(study.title.values()))
    took_part = "; the true number is not published"
    if plan.mode == "exact" and isinstance(result.get("n"), int) and result["n"] >= study.publication_floor:
        took_part = f"; {result['n']:,} were fitted to"
    ethics = (f"{_text(r.reference)} (until {r.expires[:10]})" for r in study.ethics)
    lines = [
        f"# Model card: {_text(title)}",
        "",
        *(["**REHEARSAL: no real patient's data may have taken part.**", ""] if study.rehearsal else []),
        "## The model",
        f"* **Analysis**: `{plan.name}` of study `{digest}`",
        f"* **Method**: {sentence(prs_rs.method(study, plan.name))}",
        f"* **Predicts**: {_text(sentence(prs_rs.column_words(study.phenotype)))}",
        f"* **From**: {_features(study, result)}; all of them, with their weights, are in `results.json`",
        f"* **Licence**: {_text(sentence(licence(study)))}",
        f"* **Consortium**: {_text(study.consortium)}, {len(study.sites)} hospitals; contact {_text(study.contact)}",
        f"* **Ethics**: {'; '.join(ethics) or 'none named'}",
        "",
        "## Intended use",
        f"Research. {_text(study.question)} Purposes agreed to: {_text(', '.join(study.purpose)) or 'none named'}.",
        "",
        "Not for:",
        "",
        *(f"* {line}" for line in NOT_FOR),
        "",
        "## Whom it learnt from",
        f"* **Patients**: declared size {study.n0:,}, from sources outside the cohorts{took_part}",
        f"* **Included**: {_text('; '.join(study.cohort.where)) or 'every patient of the table of each hospital'}",
        f"* **Trained on**: {_trained_on(study, plan)}",
        f"* **By group**: {_groups(study, analyses)}",
        "",
        "## How it does",
        *_evaluations(study, plan, analyses),
        "## Privacy",
        *_privacy(plan, statement),
        "## Limits",
        *(f"* {line}" for line in _limits(study, plan, analyses)),
        "",
    ]
    return "\n".join(lines).encode()


def _text(words: str) -> str:
    """Words of a study as text: on one line, nothing that Markdown or HTML would take for markup."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(words.split()))


def _features(study: Study, result: Result) -> str:
    kinds = [row["kind"] for row in result["weights"]] if "weights" in result else [f.kind for f in study.features()]
    return ", ".join(f"{kinds.count(kind)} {kind}s" for kind in ("score", "covariate", "variant") if kind in kinds)


def _trained_on(study: Study, plan: Plan) -> str:
    part = getattr(plan, "part", "train")
    return {
        "train": f"all but the {float(study.cohort.test_fraction):.0%} that a keyed hash held out",
        "test": "the held-out patients", "all": "all patients",
    }[part]  # fmt: skip


def _groups(study: Study, analyses: Mapping[str, Any]) -> str:
    """Ancestry, or whatever the study groups by: counted cells where the study counted, declared shares, or not known."""
    by = study.cohort.subgroup
    if by is None:
        return "not known: the study names no groups, so nobody can say whom the model may fail"
    for plan in study.analyses:
        if plan.kind == "counts" and [axis.column for axis in plan.axes] == [by]:
            cells = analyses[plan.name]["result"].get("cells", [])
            counted = ", ".join(f"{cell['levels'][0]} {cell['people']}" for cell in cells)
            return _text(f"by {by}, as {plan.name} counted: {counted}")
    if study.cohort.subgroup_shares:
        shares = zip(study.cohort.subgroup_values, study.cohort.subgroup_shares, strict=True)
        return _text(
            f"by {by}, declared shares: " + ", ".join(f"{name} {percent(float(share))}" for name, share in shares)
        )
    values = ", ".join(study.cohort.subgroup_values)
    return _text(f"by {by}: {values} and others; how many of each was neither declared nor counted")


def _evaluations(study: Study, plan: Plan, analyses: Mapping[str, Any]) -> list[str]:
    of = [p for p in study.analyses if p.kind in ("evaluation", "calibration") and getattr(p, "of", None) == plan.name]
    if not of:
        return ["Not known: the study did not evaluate this model.", ""]
    lines: list[str] = []
    for judged in of:
        result: Result = analyses[judged.name]["result"]
        lines += [f"### {_text(judged.name)}", "", f"On {prs_rs.part_words(study, judged.name)}.", ""]
        if "suppressed" in result:
            lines += [f"Withheld: {result['suppressed']} patients.", ""]
            continue
        rows = {"everybody": result, **result.get("groups", {})}
        named = [key for key in (*MEASURES, "slope", "intercept") if any(key in row for row in rows.values())]
        lines += ["| | " + " | ".join(MEASURES.get(key, sentence(key).rstrip(".")) for key in named) + " |"]
        lines += ["|---|" + "---|" * len(named)]
        for name, row in rows.items():
            cells = (
                [withheld(row), *("" for _ in named[1:])]
                if "suppressed" in row
                else [_cell(row.get(key)) for key in named]
            )
            lines.append(f"| {_text(name)} | " + " | ".join(cells) + " |")
        gap, words = findings.equity_gap(result["groups"]) if "auc" in result and "groups" in result else (None, "")
        lines += ["", *([f"Equity gap in AUC: {gap:.3f} ({_text(words)}).", ""] if gap is not None else [])]
    return lines


def _cell(value: object) -> str:
    if isinstance(value, Mapping):
        return findings.interval(value)
    return digits(value, 3) if isinstance(value, int | float) else "—"


def _privacy(plan: Plan, statement: Mapping[str, Any]) -> list[str]:
    if plan.mode == "exact":
        return ["Exact: fitted to sums without noise. There is no promise of differential privacy.", ""]
    epsilon = statement["epsilon"]
    return [
        f"The whole study is ({epsilon['reported']:.2f}, {statement['delta']['contract']})-differentially private for "
        f"{statement['unit']['means']} ({statement['adjacency']}); a patient at two hospitals: {epsilon['two_copies']:.2f}. "
        "The certificate (`certificate.json`) has the mechanism, who is trusted, and what is not covered.",
        "",
    ]


def _limits(study: Study, plan: Plan, analyses: Mapping[str, Any]) -> Sequence[str]:
    said = ["Measured in this consortium's patients; in other populations, ages or laboratories it may do worse."]
    if study.cohort.subgroup is None:
        said.append("No figure by ancestry, sex or age: do not use it where it was not measured.")
    for judged in study.analyses:
        if judged.kind == "evaluation" and judged.of == plan.name:
            groups: Mapping[str, Result] = analyses[judged.name]["result"].get("groups", {})
            hidden = [name for name, row in groups.items() if "suppressed" in row]
            if hidden:
                said.append(
                    f"Not known in {', '.join(map(_text, hidden))}: too few patients, or withheld to protect such a group."
                )
    if plan.kind == "heads":
        without = ", ".join(map(_text, heads.pooled_for(analyses[plan.name]["result"])))
        said.append(
            f"Each group of {_text(str(study.cohort.subgroup))} has weights of its own, in a scoring file of its own; "
            f"{without}: those of the pooled model, but for one factor."
        )
    if plan.mode == "private":
        said.append("Weights carry noise: no weight is evidence of its variant's effect.")
    return [
        *said,
        "A hospital that sends wrong numbers is not found out by the protocol.",
        "Associations are not causes.",
    ]
