"""The public map from ICD codes to phecodes (Denny et al. 2013; Wu et al. 2019; Shuey et al. 2023 for X), as a table.

The file is the one its authors publish: one row for each ICD code, with its phecode, and in version 1.2 the range of
phecodes that excludes a control. Columns are found by the names those files use.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from dataclasses import dataclass
from pathlib import Path

from sequester.protocols.definition import CodeList
from sequester.protocols.errors import SiteError

_CODE = ("icd", "icd10", "icd9", "icd10cm", "icd9cm", "code")
_VOCABULARY = ("vocabulary_id", "vocabulary", "flag")
_PHECODE = ("phecode",)
_EXCLUSION = ("exclude_range", "excl. phecodes", "phecode_exclude_range")
_OF_COLUMN = {"icd10": "ICD10", "icd9": "ICD9CM", "icd10cm": "ICD10CM", "icd9cm": "ICD9CM"}
_OF_FLAG = {"9": "ICD9CM", "10": "ICD10CM"}
_SHAPE = re.compile(r"([A-Z]{2}_)?[0-9]{1,4}(\.[0-9]{1,4})?")
_ICD = re.compile(r"[!-~]{1,64}")
_PART = r"[0-9]{1,4}(\.[0-9]{1,4})?(\s*-\s*[0-9]{1,4}(\.[0-9]{1,4})?)?"
_RANGE = re.compile(rf"{_PART}([,;]\s*{_PART})*")


@dataclass(frozen=True, slots=True)
class PhecodeMap:
    """Rows (vocabulary, ICD code, phecode) and, by phecode, its exclusion range as the file writes it."""

    sha256: str
    rows: tuple[tuple[str, str, str], ...]
    ranges: dict[str, str]

    def codes(self, phecode: str) -> tuple[CodeList, ...]:
        """The ICD codes of a phecode and of all below it."""
        return self._lists({p for _, _, p in self.rows if _is_below(p, phecode)})

    def exclusion(self, phecode: str) -> tuple[CodeList, ...]:
        """The ICD codes of its exclusion range; none where the map gives it no range."""
        found: set[str] = set()
        for part in filter(None, re.split(r"[,;]\s*", self.ranges.get(phecode, ""))):
            low, _, high = (piece.strip() for piece in part.partition("-"))
            found |= {p for _, _, p in self.rows if "_" not in p and float(low) <= float(p) <= float(high or low)}
        return self._lists(found)

    def _lists(self, phecodes: set[str]) -> tuple[CodeList, ...]:
        by_vocabulary: dict[str, list[str]] = {}
        for vocabulary, code, phecode in self.rows:
            if phecode in phecodes:
                by_vocabulary.setdefault(vocabulary, []).append(code)
        return tuple(CodeList(vocabulary=v, codes=tuple(sorted(set(c)))) for v, c in sorted(by_vocabulary.items()))


def _is_below(phecode: str, above: str) -> bool:
    """True for the phecode itself and for those that refine it.

    >>> _is_below("250.21", "250.2"), _is_below("250.2", "250"), _is_below("2501", "250")
    (True, True, False)
    """
    if phecode == above:
        return True
    return phecode.startswith(above) and ("." in above or phecode[len(above)] == ".")


def load(path: Path) -> PhecodeMap:
    """The map in a CSV or TSV file; a wrong table is a `SiteError` with its line."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise SiteError(f"{path} cannot be read as a phecode map", hint="CSV or TSV, UTF-8") from None
    reader = csv.DictReader(io.StringIO(text), delimiter="\t" if path.suffix in (".tsv", ".txt") else ",")
    try:
        lines = list(reader)
    except csv.Error:
        raise SiteError(f"{path.name} is not a table", hint="CSV or TSV, UTF-8") from None
    names = {name.strip().lower(): name for name in reader.fieldnames or ()}
    code_of = _one(path, names, _CODE, "of ICD codes")
    phecode_of = _one(path, names, _PHECODE, "of phecodes")
    vocabulary_of = next((names[n] for n in _VOCABULARY if n in names), None)
    range_of = next((names[n] for n in _EXCLUSION if n in names), None)
    default = _OF_COLUMN.get(code_of.strip().lower())
    if vocabulary_of is None and default is None:
        raise SiteError(f"{path.name} does not say which ICD its codes are of", hint="a column `vocabulary_id`")
    rows, ranges = [], {}
    for number, line in enumerate(lines, 2):
        code, phecode = (line[code_of] or "").strip(), (line[phecode_of] or "").strip()
        if not phecode:  # codes that the authors left without one
            continue
        if not _SHAPE.fullmatch(phecode) or not _ICD.fullmatch(code):
            raise SiteError(f"{path.name} line {number}: an ICD code and a phecode were expected")
        vocabulary = (line[vocabulary_of] or "").strip() if vocabulary_of else default or ""
        vocabulary = _OF_FLAG.get(vocabulary, vocabulary)
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,31}", vocabulary):
            raise SiteError(f"{path.name} line {number}: the name of a vocabulary was expected, such as ICD10CM")
        rows.append((vocabulary, code, phecode))
        around = (line[range_of] or "").strip() if range_of else ""
        if around and not _RANGE.fullmatch(around):
            raise SiteError(f"{path.name} line {number}: an exclusion range is `249-250.99`")
        if around:
            ranges[phecode] = around
    return PhecodeMap(hashlib.sha256(data).hexdigest(), tuple(rows), ranges)


def _one(path: Path, names: dict[str, str], wanted: tuple[str, ...], what: str) -> str:
    for name in wanted:
        if name in names:
            return names[name]
    raise SiteError(f"{path.name} has no column {what}", hint="one of: " + ", ".join(wanted))
