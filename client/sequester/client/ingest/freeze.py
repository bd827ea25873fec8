"""From the hospital's files to the frozen cohort of one study: one row a patient, checked, hashed, written once.

Checks that depend on patients happen here and only here; their one outcome towards the consortium is join or not. The
store is written into a temporary folder, read back, synced and renamed: there is a whole store or none. What a person
at the hospital should know is printed here, at the hospital.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import operator
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from sequester.client.compute.genome.harmonise import match
from sequester.client.compute.training import constants
from sequester.client.config import Home, SiteConfig
from sequester.client.ingest.cohort_genotypes import Genotypes, of_study
from sequester.client.ingest.overlap import also_in
from sequester.client.ingest.phenotypes.tables import MISSING_TEXT, one_row_each, read_table
from sequester.protocols.errors import SiteError, StudyError
from sequester.protocols.signing import canonical, sha256
from sequester.protocols.study import CONDITION, Column, Score, Study, standardisation, transformed

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq, "!=": operator.ne, ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Account:
    """What the operator is told, locally: counts by reason and by category of variant."""

    ready: bool
    patients: int
    counts: dict[str, int]
    variants: dict[str, int]
    sentences: tuple[str, ...]


def freeze(home: Home, config: SiteConfig, study: Study, digest: str) -> Account:
    """Write the frozen cohort of a study and say what went in; refuses with the file, line or column at fault."""
    folder = home.dataset(config.data.id)
    ids, table = patients_table(config)
    one_row_each(config.data.id_column, ids)
    keep, counts = _belongs(study, table, _exclusions(folder, ids))
    genotypes: Genotypes | None = None
    genotype_row: dict[str, int] = {}
    if study.variants:
        genotypes = of_study(home, config, study)
        genotype_row = {sample: i for i, sample in enumerate(genotypes.files.samples)}
        joined = sum(1 for i in ids if i in genotype_row)
        if joined < 0.5 * min(len(ids), len(genotype_row)):
            raise SiteError(
                f"{joined} of {len(ids)} patients of the table are among the {len(genotype_row)} of the genotypes",
                hint=f"is `{config.data.id_column}` the sample id of the genotype files?",
            )
        before = int(keep.sum())
        keep &= np.array([i in genotype_row for i in ids], dtype=bool)
        counts["no_genotypes"] = before - int(keep.sum())
        if genotypes.removed:
            before = int(keep.sum())
            keep &= np.array([genotype_row.get(i) not in genotypes.removed for i in ids], dtype=bool)
            counts["quality"] = before - int(keep.sum())
    outcome, event = _outcome(study.phenotype, table)
    before = int(keep.sum())
    keep &= ~np.isnan(outcome)
    counts["no_outcome"] = before - int(keep.sum())
    rows = np.flatnonzero(keep)
    rows = rows[np.argsort([ids[i] for i in rows])] if len(rows) else rows
    categories: dict[str, int] = {}
    dosage: NDArray[Any] = np.zeros((len(rows), 0), dtype=np.int8)
    if genotypes is not None:
        found = match(genotypes.wanted, genotypes.files.variants)
        categories = {name: count for name, count in found.categories.items() if name != "palindromic"}
        read = genotypes.files.dosages([row for row in found.row if row >= 0])
        dosage = found.dosage(read[[genotype_row[ids[i]] for i in rows]])
    features = _features(study, table, rows, dosage)
    key = _patients_key(folder)
    names = [hmac.digest(key, ids[i].encode(), "sha256") for i in rows]
    split = _split(study, key, names, table, rows)
    sentences = []
    ready = len(rows) >= config.policy.minimum_cohort
    if not ready:
        sentences.append(f"{len(rows)} patients are fewer than this site's minimum of {config.policy.minimum_cohort}.")
    absent = categories.get("absent", 0) + categories.get("allele_mismatch", 0)
    if categories and absent > 0.25 * len(study.variants):
        ready = False
        sentences.append(
            f"{absent} of {len(study.variants)} variants are not in the files: is the build {study.genome_build}?"
        )
    arrays: dict[str, NDArray[Any]] = {
        "dosage": dosage,
        "table": features,
        "outcome": _scaled(study.phenotype, outcome[rows]),
        "split": split,
    }
    if event is not None:
        arrays["event"] = event[rows]
    if constants.are_used_by(study):
        arrays |= constants.constants(study.features(), dosage).arrays()
    shared = also_in(folder, [ids[i] for i in rows])
    for name, count in shared.items():
        sentences.append(f"{count} of these patients are in data set {name} as well: what was spent there counts here.")
    _write(folder, study, digest, config, arrays, names, ready, shared)
    return Account(ready, len(rows), counts, categories, tuple(sentences))


def exclude(home: Home, config: SiteConfig, listed: Path, reason: str) -> int:
    """Add the ids in a file (one a line) to the versioned exclusion list; the new version's number."""
    folder = home.dataset(config.data.id) / "exclusions"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    version = len(list(folder.glob("*.json"))) + 1
    try:
        ids = sorted({line.strip() for line in listed.read_text("utf-8").splitlines() if line.strip()})
    except (OSError, UnicodeDecodeError):
        raise SiteError(f"{listed} cannot be read", hint="one id a line, UTF-8") from None
    path = folder / f"{version:06d}.json"
    path.write_text(json.dumps({"version": version, "reason": reason, "ids": ids}), "utf-8")
    path.chmod(0o600)
    return version


def _exclusions(folder: Path, ids: list[str]) -> tuple[int, NDArray[np.bool_]]:
    out: set[str] = set()
    paths = sorted((folder / "exclusions").glob("*.json"))
    for path in paths:
        out.update(json.loads(path.read_text("utf-8"))["ids"])
    return len(paths), np.array([i in out for i in ids], dtype=bool)


def patients_table(config: SiteConfig) -> tuple[list[str], pl.DataFrame]:
    if config.data.phenotypes is None:
        raise SiteError("site.toml names no phenotypes", hint="set `phenotypes` under [data]")
    if "://" in config.data.phenotypes:
        raise SiteError(
            f"{config.data.phenotypes} is not a path", hint="phenotypes are read from files of this machine only"
        )
    path = Path(config.data.phenotypes)
    table = read_table(path)
    if config.data.id_column not in table.columns:
        raise SiteError(
            f"{path.name} has no column `{config.data.id_column}` among its {len(table.columns)}",
            hint="set `id_column` under [data]: the patient's id; a table of one column is not separated by commas or tabs",
        )
    return [i.strip() for i in table[config.data.id_column].fill_null("").to_list()], table


def _belongs(
    study: Study, table: pl.DataFrame, excluded: tuple[int, NDArray[np.bool_]]
) -> tuple[NDArray[np.bool_], dict[str, int]]:
    keep = ~excluded[1]
    counts = {"in_table": len(keep), "excluded": int(excluded[1].sum())}
    for condition in study.cohort.where:
        matched = CONDITION.match(condition)
        assert matched is not None  # the study was validated
        name, sign, value = matched.groups()
        column = _strings(table, name)
        compare = _COMPARE[sign]
        if sign in ("==", "!="):
            hit = np.array([compare(c, value) for c in column], dtype=bool)
        else:
            hit = np.array([(v := _float(c)) is not None and compare(v, float(value)) for c in column], dtype=bool)
        counts[f"not_{condition}"] = int((keep & ~hit).sum())
        keep &= hit
    return keep, counts


def _strings(table: pl.DataFrame, name: str) -> list[str]:
    if name not in table.columns:
        raise SiteError(
            f"the table has no column `{name}`",
            hint="the study names it: rename yours, or refuse the study. Columns: " + ", ".join(table.columns[:20]),
        )
    return [c.strip() for c in table[name].fill_null("").to_list()]


def _float(cell: str) -> float | None:
    if cell in MISSING_TEXT:
        return None
    # ASCII digits and a point: Python's float would also take 1_000, inf and digits of other scripts
    if _NUMBER.fullmatch(cell) is None or not math.isfinite(value := float(cell)):
        return math.nan
    return value


def _column(column: Column, table: pl.DataFrame) -> NDArray[np.float64]:
    """float64 (rows,), NaN missing; values that are not what the study declares are refused with their row."""
    cells = _strings(table, column.name)
    if column.kind == "binary":
        other, one = column.values or ("0", "1")
        coded = {other: 0.0, one: 1.0}
        out = np.full(len(cells), math.nan)
        for number, cell in enumerate(cells):
            if cell in coded:
                out[number] = coded[cell]
            elif cell not in MISSING_TEXT:
                raise SiteError(
                    f"column {column.name}, row {number + 2}: a value that is neither `{other}` nor `{one}`",
                    hint="recode the column; PLINK's 1/2 is not 0/1",
                )
        return out
    values = np.full(len(cells), math.nan)
    for number, cell in enumerate(cells):
        value = _float(cell)
        if value is not None and math.isnan(value):
            raise SiteError(
                f"column {column.name}, row {number + 2}: not a number", hint="decimal point, no thousands separator"
            )
        values[number] = math.nan if value is None else value
    low, high = float(column.lower or 0), float(column.upper or 0)
    outside = int(((values < low) | (values > high)).sum())
    if outside > 0.01 * max(1, int((~np.isnan(values)).sum())):
        raise SiteError(
            f"column {column.name}: {outside} values outside {low:g}..{high:g} {column.unit}".rstrip(),
            hint="more than 1 %: another unit? Convert the column, or ask the coordinator about the bounds",
        )
    return np.array([v if math.isnan(v) else transformed(column, v) for v in values])


def _outcome(column: Column, table: pl.DataFrame) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """The phenotype, float64 (rows,), NaN missing; of a time, which is censored at its upper bound, the event too."""
    if column.kind != "time" or column.event is None:
        return _column(column, table), None
    event = _column(Column(name=column.event, kind="binary"), table)
    values = np.full(len(event), math.nan)
    for number, cell in enumerate(_strings(table, column.name)):
        value = _float(cell)
        if value is not None and (math.isnan(value) or value < 0):
            raise SiteError(
                f"column {column.name}, row {number + 2}: not a time", hint=f"{column.unit or 'a number'}, 0 or more"
            )
        values[number] = math.nan if value is None else value
    end = float(column.upper or 0)
    event = np.where(values > end, 0.0, event)
    values[np.isnan(event)] = math.nan
    return np.minimum(values, end), event


def _scaled(column: Column, values: NDArray[np.float64]) -> NDArray[np.float64]:
    centre, scale = standardisation(column)
    return (values - centre) / scale if column.kind == "quantitative" else values


def _features(study: Study, table: pl.DataFrame, rows: NDArray[np.int64], dosage: NDArray[Any]) -> NDArray[np.float64]:
    """float64 (rows, scores and covariates), in the order of `Study.features()`, NaN missing."""
    columns = [_score(score, study, table, rows, dosage) for score in study.scores]
    for column in study.covariates:
        if column.kind != "category":
            columns.append(_column(column, table)[rows])
            continue
        cells = _strings(table, column.name)
        known = set(column.values)
        for number, cell in enumerate(cells):
            if cell not in known and cell not in MISSING_TEXT and "other" not in known:
                raise SiteError(
                    f"column {column.name}, row {number + 2}: a value outside the study's list",
                    hint="allowed: " + ", ".join(column.values),
                )
        for level in column.values[1:]:
            columns.append(np.array([_indicator(cells[i], level, known) for i in rows], dtype=np.float64))
    return np.column_stack(columns) if columns else np.zeros((len(rows), 0))


def _indicator(cell: str, level: str, known: set[str]) -> float:
    """1 where the cell is of the level, NaN where it is missing (the public centre after standardising)."""
    if cell in MISSING_TEXT and cell not in known:
        return math.nan
    return 1.0 if cell == level or (level == "other" and cell not in known) else 0.0


def _score(
    score: Score, study: Study, table: pl.DataFrame, rows: NDArray[np.int64], dosage: NDArray[Any]
) -> NDArray[np.float64]:
    """A published score, clamped to 3 public SD: from the study's variants, or, without weights, from its own column."""
    if not score.weights:
        reach = 10 * score.sd
        raw = Column(name=score.name, kind="quantitative", lower=score.mean - reach, upper=score.mean + reach)
        values = _column(raw, table)[rows]
    else:
        place = {v.id: j for j, v in enumerate(study.variants)}
        values = np.zeros(len(rows))
        for name, weight in score.weights:
            if name not in place:
                raise StudyError(f"score {score.name} weighs {name}, which the study does not list as a variant")
            j = place[name]
            copies = dosage[:, j].astype(np.float64)
            values += float(weight) * np.where(copies < 0, 2 * float(study.variants[j].frequency), copies)
    centre, reach_sd = float(score.mean), 3 * float(score.sd)
    return np.clip(values, centre - reach_sd, centre + reach_sd)


def _patients_key(folder: Path) -> bytes:
    """The data set's own key for patient names; made once, kept for every version of the data set."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / "patients.key"
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(os.urandom(32))
    return path.read_bytes()


def _split(
    study: Study, key: bytes, names: list[bytes], table: pl.DataFrame, rows: NDArray[np.int64]
) -> NDArray[np.int64]:
    """int64 (patients, 3): held out, fold, subgroup; by keyed hash of the patient or family, the same for every study."""
    out = np.zeros((len(rows), 3), dtype=np.int64)
    fraction = float(study.cohort.test_fraction)
    if study.cohort.family is not None:
        families = _strings(table, study.cohort.family)
        # whose family is not known is one by themselves
        names = [
            name if families[i] in MISSING_TEXT else hmac.digest(key, b"family" + families[i].encode(), "sha256")
            for i, name in zip(rows, names, strict=True)
        ]
    for i, name in enumerate(names):
        coin = int.from_bytes(hmac.digest(key, b"split" + name, "sha256")[:8], "big")
        out[i, 0] = coin / 2**64 < fraction
        out[i, 1] = int.from_bytes(hmac.digest(key, b"fold" + name, "sha256")[:8], "big") % study.cohort.folds
    if study.cohort.subgroup is not None:
        cells = _strings(table, study.cohort.subgroup)
        order = {value: g for g, value in enumerate(study.cohort.subgroup_values)}
        out[:, 2] = [order.get(cells[i], len(order)) for i in rows]
    return out


def _write(
    folder: Path,
    study: Study,
    digest: str,
    config: SiteConfig,
    arrays: dict[str, NDArray[Any]],
    names: list[bytes],
    ready: bool,
    shared: dict[str, int],
) -> None:
    target = folder / "cohorts" / digest
    temporary = target.with_name(digest + ".new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(mode=0o700, parents=True)
    try:
        files = {}
        for name, array in arrays.items():
            path = temporary / f"{name}.npy"
            with path.open("wb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            files[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        bitmap = b"".join(sorted(names))  # keyed names of the patients used: for differencing checks, local only
        _durable(temporary / "patients.bin", bitmap)
        manifest = {
            "format": 1,
            "study": digest,
            "data_set": config.data.id,
            "data_set_version": sha256(canonical(files)),
            "exclusions_version": len(list((folder / "exclusions").glob("*.json"))),
            "patients_hash": hmac.new(_patients_key(folder), bitmap, "sha256").hexdigest(),
            "bitmap": "patients.bin",
            "bitmap_sha256": sha256(bitmap),
            "also_in": shared,
            "files": files,
            "ready": ready,
            "minimum_cohort_met": ready,
        }
        _durable(temporary / "manifest.json", json.dumps(manifest, indent=1).encode())
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise SiteError(
            f"the frozen cohort cannot be written: {error.strerror}", hint="free disk space and run the command again"
        ) from None


def _durable(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
