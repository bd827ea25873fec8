"""The folder a coordinator takes away: results, report, scoring files, certificate, the study and every receipt.

Everything is checked and built before the first byte is written; each file appears whole or not at all. What is already
there with other bytes is left alone unless the caller says to overwrite it.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sequester.protocols import privacy, release
from sequester.protocols.analyses.evaluation import subgroups
from sequester.protocols.analyses.heads import HeadsPlan
from sequester.protocols.analyses.registry import Plan
from sequester.protocols.errors import PrivacyError, RefusalCode, StudyError
from sequester.protocols.release import Documents
from sequester.protocols.signing import open_document
from sequester.protocols.study import Study, parse_study, study_json
from sequester.server.report import bounds, heads, model_card, outputs, prs_rs, receipts, scans
from sequester.server.report.certificate import certificate, padding_limits
from sequester.server.report.page import render
from sequester.server.report.scoring_file import scoring_file


def write(
    folder: Path,
    study: Study,
    digest: str,
    results_json: bytes,
    receipt_documents: Mapping[str, bytes],
    study_document: bytes,
    release_documents: Documents,
    *,
    audit: bytes | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """The paths written, in order; files that are there already with the same bytes count as written.

    Raises `StudyError` where study, results or a receipt (which is named) do not belong together, or a file of another
    content is in the way; `PrivacyError` where the release gate holds a private model back, or the noise measured on the
    padding is less than promised.
    """
    results = _checked(study, digest, results_json, study_document)
    # a waiver is by whoever signed the study
    standing = release.judge(study, digest, open_document(study_document, "study", None).signer, release_documents)
    standing.require()
    bodies = receipts.opened(study, digest, receipt_documents)
    limits, ratio = padding_limits(study, results), results.get("noise_on_padding")
    if limits is not None and (ratio is None or ratio < limits[0]):
        raise PrivacyError(
            f"the noise measured on the padding is {ratio or 0:.4f} of what was promised, at least {limits[0]:.4f} was expected",
            hint="nothing is exported: ask every hospital for its version and its log; do not publish this model",
            code=RefusalCode.BUDGET,
        )
    if results.get("noise_short_rounds"):
        raise PrivacyError(
            f"too little noise on the padding of {'; '.join(results['noise_short_rounds'])}",
            hint="nothing is exported: ask every hospital for its version and its log; do not publish this model",
            code=RefusalCode.BUDGET,
        )
    known = {site: receipts.read(study, digest, site, body) for site, body in bodies.items()}
    own = None if audit is None else bounds.read(study, digest, audit)
    statement = certificate(study, digest, results, known, standing, own)
    files = {
        "results.json": results_json,
        "certificate.json": _json(statement),
        "prs_rs.json": _json({item.name: {"answer": item.answer, "done": item.done} for item in prs_rs.items(study, results)}),
        "study.json": study_document,
        **scoring_files(study, digest, results),
        **scans.tables(study, results["analyses"]),
        **model_card.cards(study, digest, results, statement),
        **{f"receipts/{site}.json": data for site, data in sorted(receipt_documents.items())},
        **({"release.json": _json(release_documents.json())} if standing.words else {}),
        **({"audit.json": audit} if audit is not None else {}),
    }  # fmt: skip
    page = render(study, digest, results, known, statement, outputs.rows(files, folder, digest))
    files = {"report.html": page, **files}
    paths = {folder / name: data for name, data in files.items()}
    if not overwrite:
        for path, data in paths.items():
            if path.exists() and path.read_bytes() != data:
                raise StudyError(
                    f"{path} is there already with other content",
                    hint="name an empty folder, or say --overwrite; nothing was changed",
                )
    try:
        for path, data in paths.items():
            _write_whole(path, data)
    except OSError as error:
        raise StudyError(
            f"{folder}: {error.strerror}", hint="name a folder that can be written to, with room"
        ) from None
    return list(paths)


def read(folder: Path) -> tuple[Study, str, dict[str, Any]]:
    """Study, digest and results of a folder that `write` wrote; `StudyError` where they do not belong together."""
    try:
        document, results_json = ((folder / name).read_bytes() for name in ("study.json", "results.json"))
    except OSError as error:
        raise StudyError(f"{folder}: {error.strerror}", hint="`study results --out` writes the folder") from None
    body = open_document(document, "study", None)
    study = parse_study(body.body_bytes)
    return study, body.digest, _checked(study, body.digest, results_json, document)


def scoring_files(study: Study, digest: str, results: Mapping[str, Any]) -> dict[str, bytes]:
    """File name -> scoring file of each model on the study's variants, and of each group's head; more than one: by analysis."""
    found: dict[str, bytes] = {}
    of = {p.name: results["analyses"][p.name]["result"] for p in study.analyses}
    models = [p for p in study.analyses if "weights" in of[p.name] and "not_fitted" not in of[p.name]]
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", study.lineage).strip(".-") or "study"
    promise = privacy.promise(study)  # from the signed study: results.json is the exchange's word

    def epsilon_of(plan: Plan) -> str:
        return "none, exact" if plan.mode == "exact" or promise is None else f"{promise.pld:.4g}"

    by_group = [plan for plan in study.analyses if isinstance(plan, HeadsPlan)]
    for plan in models:
        epsilon = epsilon_of(plan)
        weights = variant_weights(study, results["analyses"][plan.name]["result"])
        data = scoring_file(study, digest, weights, epsilon) if weights else None
        if data is not None:
            name = stem if len(models) == 1 and not by_group else f"{stem}_{plan.name}"
            found[f"{name}_scoring_file.txt.gz"] = data
    for plan in by_group:
        for group, rows in heads.rows_of(study, plan, results["analyses"]).items():
            weights = variant_weights(study, {"weights": rows})
            more = [
                f"#analysis={plan.name}",
                f"#group_column={study.cohort.subgroup}",
                f"#group={' '.join(group.split())}",
            ]
            data = scoring_file(study, digest, weights, epsilon_of(plan), more) if weights else None
            if data is not None:
                place = subgroups(study).index(group)
                slug = re.sub(r"[^A-Za-z0-9-]+", "-", group).strip("-") or str(place)
                name = f"{stem}_{plan.name}_{slug}_scoring_file.txt.gz"
                found[name if name not in found else f"{stem}_{plan.name}_{slug}-{place}_scoring_file.txt.gz"] = data
    return found


def variant_weights(study: Study, result: Mapping[str, Any]) -> dict[str, float]:
    """Weight per copy of each variant's effect allele: its own, and its part in the published scores the model uses.

    Empty where the model uses neither.
    """
    per_unit = {row["name"]: float(row["per_unit"]) for row in result["weights"]}
    weights = {variant.id: per_unit.get(variant.id, 0.0) for variant in study.variants}
    scored = [
        (score, v, w) for score in study.scores if score.name in per_unit for v, w in score.weights if v in weights
    ]
    if not scored and not any(variant in per_unit for variant in weights):
        return {}
    for score, variant, weight in scored:
        weights[variant] += per_unit[score.name] * float(weight)
    return weights


def _checked(study: Study, digest: str, results_json: bytes, study_document: bytes) -> dict[str, Any]:
    document = open_document(study_document, "study", None)
    if privacy.study_digest(study) != digest or document.digest != digest or document.body != study_json(study):
        raise StudyError(
            f"the signed study is {document.digest[:12]}, these results are of {digest[:12]}",
            hint="fetch study and results again; a changed byte is another study",
        )
    try:
        results = json.loads(results_json)
        analyses = results["analyses"]
        complete = set(analyses) == {plan.name for plan in study.analyses} and results["study"] == digest
    except (ValueError, KeyError, TypeError, RecursionError):
        raise StudyError("results.json is not what the exchange writes", hint="fetch it again") from None
    if not complete:
        raise StudyError(
            f"results.json is of study {str(results['study'])[:12]}, analyses {', '.join(sorted(analyses))}",
            hint=f"study {digest[:12]} and all of its analyses were expected",
        )
    return dict(results)


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _write_whole(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
