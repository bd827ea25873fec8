"""The score to apply: a scoring file as it is, or the one of a results folder that a coordinator handed over."""

from __future__ import annotations

import json
from pathlib import Path

from sequester.client.compute.genome.panel import Build
from sequester.client.scoring.scoring_file import ScoringFile, header_of, read
from sequester.protocols.errors import SiteError, StudyError
from sequester.protocols.signing import open_document


def scoring_file_of(
    path: Path, site_build: Build, declared: Build | None, analysis: str, group: str = ""
) -> tuple[ScoringFile, tuple[str, ...]]:
    """The score, and the names of covariates that the model uses beside it.

    Of a folder: the scoring file must be of the signed study that lies there, and results.json too. `group` asks for the
    head of that group, by the file's header; without it the heads in a folder are passed over.
    """
    if not path.is_dir():
        score = read(path, site_build, declared)
        if group and score.header.get("group") != group:
            raise SiteError(
                f"{path.name} is no head of group `{group}`", hint="name its results folder, or leave `--group` out"
            )
        return score, ()
    every = {file: header_of(file) for file in sorted(path.glob("*_scoring_file.txt.gz"))}
    files = [file for file, header in every.items() if header.get("group", "") == group]
    if group:
        files = [f for f in files if analysis in ("", every[f].get("analysis"))]
        if not files:
            groups = ", ".join(sorted({h["group"] for h in every.values() if "group" in h})) or "none"
            raise SiteError(f"{path.name} holds no head of group `{group}`", hint=f"there are heads of: {groups}")
    elif analysis:
        files = [f for f in files if f.name.endswith(f"_{analysis}_scoring_file.txt.gz")] or (
            files if len(files) == 1 else []
        )
    if len(files) != 1:
        names = ", ".join(f.name for f in files) or "none"
        raise SiteError(f"{path.name} holds {len(files)} scoring files ({names})", hint="`--analysis NAME` picks one")
    try:
        document = open_document((path / "study.json").read_bytes(), "study", None)
        results = json.loads((path / "results.json").read_text("utf-8"))
        analyses = results["analyses"]
        of = results["study"]
    except (OSError, ValueError, KeyError, TypeError):
        raise SiteError(
            f"{path.name} is no results folder", hint="study.json, results.json and scoring files together"
        ) from None
    score = read(files[0], site_build, declared)
    if not document.digest == of == score.header.get("study_digest"):
        raise StudyError(
            f"{files[0].name}, results.json and study.json are not of one study", hint="fetch the folder again"
        )
    models = {name: a["result"] for name, a in analyses.items() if "weights" in a.get("result", {})}
    named = analysis or (next(iter(models)) if len(models) == 1 else "")
    weights = models.get(named, {}).get("weights", [])
    if group:
        weights = analyses.get(score.header.get("analysis"), {}).get("result", {}).get("groups", {}).get(group, {})
        weights = weights.get("weights", [])
    return score, tuple(w["name"] for w in weights if w["kind"] == "covariate" and w["per_unit"])
