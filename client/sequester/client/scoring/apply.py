"""One score over this hospital's patients: match, sum, compare with the public reference, and write what stays here."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sequester.client.compute.genome.harmonise import case_of, in_build
from sequester.client.compute.genome.panel import Build, Panel, load
from sequester.client.compute.genome.variants import is_palindromic
from sequester.client.config import Home, SiteConfig
from sequester.client.ingest.cohort_genotypes import Genotypes, of_variants
from sequester.client.ingest.durable import folder_in_place, write_json
from sequester.client.ingest.freeze import patients_table
from sequester.client.scoring import normalise, risk
from sequester.client.scoring.model import scoring_file_of
from sequester.client.scoring.patient import About, Patient, Risk, Standing, page, risk_assessment
from sequester.client.scoring.reference import ancestry, open_reference
from sequester.client.scoring.scores import (
    Matched,
    Sums,
    afreq,
    check_overlap,
    chosen_frequencies,
    cohort_frequency,
    matched,
    sums,
    wanted_of,
)
from sequester.client.scoring.scoring_file import ScoringFile, check_complex
from sequester.protocols.errors import SequesterError, SiteError

COLUMNS = (
    "id", "page", "score", "missing", "z_norm1", "z_norm2", "population", "probability", "percentile", "low", "high",
    "risk", "risk_low", "risk_high",
)  # fmt: skip
QUALITY = ("low_call_rate", "heterozygosity", "sex_mismatch")  # reasons for which a genome is not scored


@dataclass(frozen=True, slots=True)
class Wish:
    """What the operator asks for. `frequencies`: a .afreq file, `cohort`, or None for public ones only."""

    score: Path
    out: Path
    min_overlap: float = 0.75
    rest: bool = False
    strand: bool = False
    build: Build | None = None
    analysis: str = ""
    group: str = ""
    frequencies: str | None = None
    patients: Path | None = None
    incidence: Path | None = None
    effect: str = ""
    years: int = 10
    age_column: str = "age"
    sex_column: str = "sex"


@dataclass(frozen=True, slots=True)
class _Compared:
    """Standing of everybody, the SD of each Z from missing genotypes; or why there is none."""

    standing: list[Standing] | None
    sd: NDArray[np.float64]
    account: dict[str, Any]
    not_done: tuple[str, ...] = ()


def apply(home: Home, config: SiteConfig, wish: Wish, now: datetime) -> dict[str, Any]:
    """Write scores, pages and FHIR resources into `out`; counts come back, nothing of a person."""
    settings = config.scoring
    if not settings.enabled:
        raise SiteError(
            "scoring single patients is switched off",
            hint="`sequester-client score --about` says what the law asks; then `enabled = true` and `signer` under "
            "[scoring] in site.toml",
        )
    if not settings.signer:
        raise SiteError(
            "nobody answers for these reports", hint="`signer` under [scoring] in site.toml: a name and a role"
        )
    if wish.out.exists():
        raise SiteError(f"{wish.out} is there already", hint="name a new folder; nothing is written over")
    score, covariates = scoring_file_of(wish.score, config.data.build, wish.build, wish.analysis, wish.group)
    check_complex(score, wish.rest)
    genotypes = of_variants(home, config, wanted_of(score.rows), score.build, f"the score {score.id}")
    files = genotypes.files
    found = matched(score, genotypes.wanted, files.variants, "strand" if wish.strand else "drop")
    check_overlap(score, found, wish.min_overlap)
    rows = found.found
    frequency, origin = _frequencies(score, found, genotypes, wish)
    total = sums(score, rows, found, files, frequency)
    compared = _compare(config, score, genotypes, found, frequency, wish)
    chosen, left = _patients(home, config, files.samples, wish.patients)
    risks, why_not = _risks(config, wish, files.samples, chosen, compared)
    weights = np.array([abs(row.weight) for row in score.rows])
    aside = [
        f"{n} {reason.replace('_', ' ')}" for reason, n in sorted(Counter(s.reason for s in score.set_aside).items())
    ]
    not_done = [*compared.not_done, *why_not]
    if covariates:
        not_done.append("The model also uses " + ", ".join(covariates) + "; this is its genetic part.")
    if "group" in score.header:
        column, group = score.header.get("group_column", "group"), score.header["group"]
        not_done.append(
            f"These are the weights for {column} {group}: for patients of that group alone, whom `--patients` names."
        )
    about = About(
        score.id, score.sha256, score.trait, score.citation, len(rows), len(score.rows) + len(score.set_aside),
        float(weights[rows].sum() / weights.sum()) if weights.sum() else 0.0, tuple(aside), settings.signer,
        now.strftime("%Y-%m-%dT%H:%M:%SZ"), tuple(not_done),
    )  # fmt: skip
    account: dict[str, Any] = {
        "score": score.id, "sha256": score.sha256, "build": score.build, "rows": about.of, "matched": about.matched,
        "weight_share": round(about.weight_share, 6), "categories": found.categories,
        "by_effect_allele": found.by_effect_allele, "kinds": dict(Counter(score.rows[j].kind for j in rows.tolist())),
        "indels": sum(len(score.rows[j].effect) > 1 or len(score.rows[j].other) > 1 for j in rows.tolist()),
        "set_aside": [{"line": s.line, "name": s.name, "reason": s.reason} for s in score.set_aside],
        "not_found": [{"name": name, "reason": reason} for name, reason in found.missing],
        "frequencies": origin, "patients": len(chosen), "left_out": left, "reference": compared.account,
        "not_done": not_done,
    }  # fmt: skip
    _write(
        wish.out, about, files.samples, chosen, total, compared, risks, account, score.header.get("study_digest", "")
    )
    return account


def _frequencies(
    score: ScoringFile, found: Matched, genotypes: Genotypes, wish: Wish
) -> tuple[NDArray[np.float64], dict[str, int]]:
    """Frequency of each row's effect allele, and how many came from where."""
    given: dict[int, float] = {}
    last: dict[int, float] = {}
    if wish.frequencies == "cohort":
        last = cohort_frequency(found, genotypes.files, found.found)
    elif wish.frequencies is not None:
        path = Path(wish.frequencies)
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            raise SiteError(f"{path} cannot be read", hint="a table as `plink2 --freq` writes it") from None
        given = afreq(text, path.name, score, found, genotypes.files.variants)
    own = {j: row.frequency for j, row in enumerate(score.rows) if row.frequency is not None}
    panel = load()
    public = _panel_frequencies(score, panel) if len(own) < len(score.rows) else {}
    origin: Counter[str] = Counter()
    for j in found.found.tolist():
        for name, source in (("given", given), ("scoring file", own), ("panel", public), ("this cohort", last)):
            if j in source:
                origin[name] += 1
                break
        else:
            origin["none"] += 1
    return chosen_frequencies(score, given, own, public, last), dict(origin)


def _panel_frequencies(score: ScoringFile, panel: Panel) -> dict[int, float]:
    """Of the panel's rows at the score's places, for the effect allele."""
    at: dict[tuple[int, int], list[int]] = {}
    for r in np.flatnonzero(~np.isnan(panel.mean_frequency) & (panel.position[score.build] > 0)).tolist():
        at.setdefault((int(panel.code[r]), int(panel.position[score.build][r])), []).append(r)
    out = {}
    for j, row in enumerate(score.rows):
        for r in at.get((row.code, row.position), ()):
            if not row.other or is_palindromic(row.effect, row.other):
                continue
            case = case_of(panel.alt[r], panel.ref[r], row.effect, row.other)
            if case is not None:
                f = float(panel.mean_frequency[r])
                out[j] = f if case in ("direct", "flipped") else 1 - f
    return out


def _compare(
    config: SiteConfig,
    score: ScoringFile,
    genotypes: Genotypes,
    found: Matched,
    frequency: NDArray[np.float64],
    wish: Wish,
) -> _Compared:
    """Everybody's place in the public reference, over the variants both have."""
    files = genotypes.files
    nothing = np.zeros(len(files.samples))
    try:
        reference = open_reference(config.scoring)
        if reference is None:
            return _Compared(None, nothing, {}, ("No percentile: site.toml names no public reference.",))
        panel = load(genotypes.panel)
        place = ancestry(files, config.data.build, reference, panel)
        wanted = in_build(wanted_of(score.rows), score.build, panel, reference.build)
        there = matched(score, wanted, reference.files.variants, "strand" if wish.strand else "drop")
        shared = np.flatnonzero((found.entry >= 0) & (there.entry >= 0))
        if len(shared) < wish.min_overlap * len(found.found):
            sentence = f"No percentile: {len(shared)} of the {len(found.found)} variants found here are in the public reference."
            return _Compared(None, nothing, {"shared": len(shared)}, (sentence,))
        public = cohort_frequency(there, reference.files, shared)
        f = np.array([public.get(j, frequency[j]) for j in range(len(score.rows))])
        ours, theirs = sums(score, shared, found, files, f), sums(score, shared, there, reference.files, f)
        labelled = np.array([bool(p) for p in reference.population])
        fitted = normalise.fit(theirs.score[labelled], place.reference_pcs[labelled])
    except SequesterError as error:
        if wish.incidence is not None:
            raise
        return _Compared(None, nothing, {}, (f"No percentile: {error.message}.",))
    z1, z2 = fitted.z1(ours.score, place.pcs), fitted.z2(ours.score, place.pcs)
    own_sd = np.sqrt(ours.variance)
    groups = {
        name: theirs.score[[p == name for p in reference.population]] for name in set(reference.population) if name
    }
    standing = []
    for i, name in enumerate(place.similar):
        low, high = normalise.percentile_interval(float(ours.score[i]), float(own_sd[i]), groups[name])
        standing.append(
            Standing(
                float(z1[i]), float(z2[i]), normalise.percentile(float(ours.score[i]), groups[name]), low, high, name,
                float(place.probability[i]), len(groups[name]),
            )
        )  # fmt: skip
    account = {
        "people": int(labelled.sum()), "shared": len(shared), "components": place.pcs.shape[1],
        "populations": dict(sorted(Counter(place.similar).items())), "uncertain": sum(s.uncertain for s in standing),
    }  # fmt: skip
    return _Compared(standing, own_sd / fitted.sd2(place.pcs), account)


def _patients(
    home: Home, config: SiteConfig, samples: list[str], listed: Path | None
) -> tuple[list[int], dict[str, int]]:
    """Rows to score: those listed, without opt-outs and genomes that failed their quality checks; and counts of the rest."""
    left = {"not_listed": 0, "excluded": 0, "quality": 0}
    folder = home.dataset(config.data.id)
    wanted: set[str] | None = None
    if listed is not None:
        try:
            wanted = {line.strip() for line in listed.read_text("utf-8").splitlines() if line.strip()}
        except (OSError, UnicodeDecodeError):
            raise SiteError(f"{listed} cannot be read", hint="one id a line, UTF-8") from None
        if unknown := len(wanted - set(samples)):
            raise SiteError(f"{unknown} of {len(wanted)} listed patients have no genotypes", hint="check the list")
    out: set[str] = set()
    for path in sorted((folder / "exclusions").glob("*.json")):
        out.update(json.loads(path.read_text("utf-8"))["ids"])
    failed: set[int] = set()
    removed = folder / "genotypes" / "removed.json"
    if removed.exists():
        by_reason = json.loads(removed.read_text("utf-8"))
        failed = {row for reason in QUALITY for row in by_reason.get(reason, ())}
    chosen = []
    for i, sample in enumerate(samples):
        if wanted is not None and sample not in wanted:
            left["not_listed"] += 1
        elif sample in out:
            left["excluded"] += 1
        elif i in failed:
            left["quality"] += 1
        else:
            chosen.append(i)
    return chosen, left


def _risks(
    config: SiteConfig, wish: Wish, samples: list[str], chosen: list[int], compared: _Compared
) -> tuple[dict[int, Risk], list[str]]:
    """Absolute risk by row, of those with age, sex and rates; and the sentence where there is none for anybody."""
    if wish.incidence is None:
        return {}, ["No absolute risk: no public incidence was given."]
    if compared.standing is None:
        raise SiteError("absolute risk needs a public reference", hint="`reference` under [scoring] in site.toml")
    effect, incidence = risk.effect_of(wish.effect), risk.read_incidence(wish.incidence)
    ids, table = patients_table(config)
    for column in (wish.age_column, wish.sex_column):
        if column not in table.columns:
            raise SiteError(f"the table has no column `{column}`", hint="`--age-column` and `--sex-column` name them")
    ages = dict(zip(ids, table[wish.age_column].fill_null("").to_list(), strict=True))
    sexes = dict(zip(ids, table[wish.sex_column].fill_null("").to_list(), strict=True))
    out = {}
    for i in chosen:
        try:
            age = float(ages.get(samples[i], ""))
        except ValueError:
            continue
        sex, z = sexes[samples[i]].strip(), compared.standing[i].z2
        if not math.isfinite(age) or age < 0:
            continue
        found = risk.risk_interval(incidence, sex, age, wish.years, effect, z, float(compared.sd[i]))
        if found is not None:
            b = math.log(effect.ratio)
            out[i] = Risk(wish.years, age, *found, relative=math.exp(b * z - b * b / 2))
    without = len(chosen) - len(out)
    return out, ["No absolute risk for patients without age, sex or rates at their age."] if without else []


def _write(
    out: Path,
    about: About,
    samples: list[str],
    chosen: list[int],
    total: Sums,
    compared: _Compared,
    risks: dict[int, Risk],
    account: dict[str, Any],
    study: str,
) -> None:
    """scores.tsv, patients/*.html, RiskAssessment.ndjson and account.json, for their owner's eyes only."""
    head = "\t".join(COLUMNS) + "\n"
    with folder_in_place(out) as folder:
        (folder / "patients").mkdir(mode=0o700)
        lines, resources = [head], []
        for number, i in enumerate(chosen, 1):
            standing = None if compared.standing is None else compared.standing[i]
            patient = Patient(samples[i], float(total.missing[i]), standing, risks.get(i))
            name = f"patients/{number:06d}.html"
            (folder / name).write_text(page(about, patient), "utf-8")
            resources.append(json.dumps(risk_assessment(about, patient, study), ensure_ascii=False) + "\n")
            cells: list[Any] = [_cell(samples[i]), name, f"{total.score[i]:.10g}", f"{total.missing[i]:.6g}"]
            if standing is None:
                cells += [""] * 7
            else:
                cells += [f"{standing.z1:.6f}", f"{standing.z2:.6f}", standing.population, f"{standing.probability:.2f}",
                          f"{standing.percentile:.2f}", f"{standing.low:.2f}", f"{standing.high:.2f}"]  # fmt: skip
            r = risks.get(i)
            cells += ["", "", ""] if r is None else [f"{r.value:.6f}", f"{r.low:.6f}", f"{r.high:.6f}"]
            lines.append("\t".join(cells) + "\n")
        (folder / "scores.tsv").write_text("".join(lines), "utf-8")
        (folder / "RiskAssessment.ndjson").write_text("".join(resources), "utf-8")
        write_json(folder / "account.json", account)
        for path in folder.rglob("*"):
            if path.is_file():
                path.chmod(0o600)


def _cell(text: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    return "'" + text if text[:1] in ("=", "+", "-", "@") else text
