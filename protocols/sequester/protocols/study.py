"""The study contract: what `study.yaml` may say, validated, and what both sides derive from it.

The bytes that are signed are RFC 8785 of the validated model (`signing.py`); numbers that matter are decimal strings.
Everything a site or the exchange needs to run a round (features, threshold, noise, layout) is derived here or in
`privacy.py` from the signed study alone, never received.
"""

from __future__ import annotations

import json
import math
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from functools import wraps
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, DuplicateKeyError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

from sequester.protocols.analyses.plan import Number
from sequester.protocols.analyses.registry import Plan
from sequester.protocols.definition import Definition
from sequester.protocols.errors import RefusalCode, StudyError
from sequester.protocols.faults import CONDITION as CONDITION
from sequester.protocols.faults import INSTANT, faults
from sequester.protocols.profiles import expanded
from sequester.protocols.signing import canonical

Value = TypeVar("Value")


def remembered(make: Callable[[Study], Value]) -> Callable[[Study], Value]:
    """`make`, whose answers are kept for the last few studies, each by its identity: a study never changes.

    With thousands of variants features and digest take a tenth of a second, and every round asks for them several times.
    """
    kept: deque[tuple[Study, Value]] = deque(maxlen=8)

    @wraps(make)
    def found(study: Study) -> Value:
        for of, value in tuple(kept):
            if of is study:
                return value
        value = make(study)
        kept.append((study, value))
        return value

    return found


Hex32 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
SiteId = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{1,31}$")]
ColumnName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,63}$")]
Language = Annotated[str, StringConstraints(pattern=r"^[a-z]{2}(-[A-Z]{2})?$")]
Instant = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z$")]


class Strict(BaseModel):
    """Unknown fields are refused, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Reference(Strict):
    """An ethics approval or a data agreement, and until when it holds (UTC)."""

    reference: str
    expires: Instant


class Column(Strict):
    """One phenotype or covariate column with its public bounds.

    `kind` binary takes exactly the two `values` (other, one); quantitative is clamped to [lower, upper]; category takes
    the closed list `values`, the first being the reference. `transform` applies before `centre` and `scale`, which
    default to the middle and half the width of the (transformed) bounds. A missing covariate is its centre. `time`, for
    the phenotype only, is follow-up in `unit` with the column `event` (1 where it ended with the event, else 0); who is
    followed beyond `upper` is censored there.
    """

    name: ColumnName
    kind: Literal["binary", "quantitative", "category", "time"]
    unit: str = ""
    lower: Number | None = None
    upper: Number | None = None
    transform: Literal["none", "sqrt", "log"] = "none"
    centre: Number | None = None
    scale: Number | None = None
    values: tuple[str, ...] = ()
    event: ColumnName | None = Field(default=None, exclude_if=lambda event: event is None)


class Variant(Strict):
    """A panel row: forward-strand alleles, the counted (effect) allele is `effect`; `frequency` is the public one."""

    id: Annotated[str, StringConstraints(pattern=r"^[!-~]{1,80}$")]
    chromosome: Annotated[str, StringConstraints(pattern=r"^([1-9]|1[0-9]|2[0-2])$")]
    position: int = Field(gt=0, lt=2**31)
    effect: Annotated[str, StringConstraints(pattern=r"^[ACGT]+$")]
    other: Annotated[str, StringConstraints(pattern=r"^[ACGT]+$")]
    frequency: Number


class Score(Strict):
    """A published score as one feature: weights per copy of each variant's effect allele, public mean and SD."""

    name: ColumnName
    weights: tuple[tuple[str, Number], ...]
    mean: Number
    sd: Number


class CohortRule(Strict):
    """Who belongs: `where` are column conditions; `test_fraction` of the patients, by keyed hash, are held out.

    With a column of `family`, families are held out and put into folds whole: relatives of those who trained a score make
    it look better than it is. `subgroup_shares`: public shares of the patients in the values, for whether a group is large
    enough for an interval; the rest are `other`.
    """

    where: tuple[str, ...] = ()
    test_fraction: Number = Decimal("0.2")
    folds: int = Field(default=5, ge=2, le=20)
    family: ColumnName | None = Field(default=None, exclude_if=lambda column: column is None)
    subgroup: ColumnName | None = None
    subgroup_values: tuple[str, ...] = ()
    subgroup_shares: tuple[Number, ...] = Field(default=(), exclude_if=lambda shares: not shares)


class Privacy(Strict):
    """What is promised, for the whole study. `order` is the RDP order of the filter (spec/privacy.md, section 7)."""

    epsilon: Number
    delta: Number
    order: Number
    unit: Literal["patient"] = "patient"
    adjacency: Literal["add-remove", "replace-one"] = "add-remove"
    mechanism: Literal["distributed", "local"] = "distributed"


class Aggregation(Strict):
    """The secure sum (spec/secure-aggregation.md, section 2). None means that page's default for the roster size."""

    mode: Literal["strict", "double"]
    max_corrupt: int | None = Field(default=None, ge=0, le=1000)
    max_absent: int | None = Field(default=None, ge=0, le=1000)
    min_active: int | None = Field(default=None, ge=0, le=1000)
    ring_bits: Literal[32, 64] = 32
    fraction_bits: int = Field(default=16, ge=4, le=40)
    suite: Literal["x25519-aes256ctr-v1"] = "x25519-aes256ctr-v1"
    round_deadline_s: int = Field(default=60, ge=1, le=86400)


class StudySite(Strict):
    """One hospital: its name and its Ed25519 identity key (raw, hex). The fingerprint is the key's SHA-256."""

    id: SiteId
    key: Hex32


class Study(Strict):
    """One study. Two studies with the same canonical bytes are the same study; a changed byte is a new one.

    `licence` is under which the released model may be used; it goes into the scoring file and the model card.
    """

    format: Literal[1] = 1
    consortium: str
    lineage: str
    supersedes: Hex32 | None = None
    rehearsal: bool = False
    title: dict[Language, str]
    summary: dict[Language, str]
    question: str
    purpose: tuple[str, ...]
    ethics: tuple[Reference, ...]
    agreement: tuple[Reference, ...]
    contact: str
    licence: str | None = Field(default=None, exclude_if=lambda licence: licence is None)
    retention_days: int = Field(gt=0, le=10**9)
    publication_floor: int = Field(default=10, ge=5, le=10**9)
    genome_build: Literal["NCBI36", "GRCh37", "GRCh38"] = "GRCh38"
    phenotype: Column
    covariates: tuple[Column, ...] = ()
    variants: tuple[Variant, ...] = ()
    scores: tuple[Score, ...] = ()
    cohort: CohortRule = CohortRule()
    definition: Definition | None = Field(default=None, exclude_if=lambda definition: definition is None)
    analyses: tuple[Plan, ...]
    privacy: Privacy
    n0: int = Field(gt=0, le=10**9)
    n_max: int = Field(gt=0, le=10**9)
    spare_attempts: int | None = Field(default=None, ge=0, le=1000)
    aggregation: Aggregation
    sites: tuple[StudySite, ...]
    bundle: Hex32
    expires: Instant

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Study:
        for fault in faults(self):
            raise ValueError(fault)
        return self

    @property
    def site_ids(self) -> tuple[str, ...]:
        """Sites in roster order: ascending by name, index 0 first."""
        return tuple(sorted(site.id for site in self.sites))

    @property
    def roster(self) -> tuple[bytes, ...]:
        """Raw identity keys in roster order."""
        keys = {site.id: bytes.fromhex(site.key) for site in self.sites}
        return tuple(keys[name] for name in self.site_ids)

    @property
    def expires_at(self) -> datetime:
        """The study's last moment, UTC."""
        return datetime.strptime(self.expires, INSTANT).replace(tzinfo=UTC)

    def analysis(self, name: str) -> Plan:
        """The plan of that name; `KeyError` where there is none."""
        return {plan.name: plan for plan in self.analyses}[name]

    @remembered
    def features(self) -> tuple[Feature, ...]:
        """The columns of the design matrix, in order: scores, covariates (categories as indicators), variants."""
        rows = list(self.table_features())
        for v in self.variants:
            f = float(v.frequency)
            rows.append(Feature(v.id, "variant", v.id, 2 * f, max(2 * f * (1 - f), 1e-4) ** 0.5))
        return tuple(rows)

    @remembered
    def table_features(self) -> tuple[Feature, ...]:
        """Those of the table alone: scores and covariates. A scan lists many variants and needs none of them here."""
        rows: list[Feature] = [Feature(s.name, "score", s.name, float(s.mean), float(s.sd)) for s in self.scores]
        for column in self.covariates:
            rows.extend(_column_features(column))
        return tuple(rows)


@dataclass(frozen=True, slots=True)
class Feature:
    """One column of the design matrix: standardised value = (raw - centre) / scale, raw missing = 0 after that.

    `source` is the variant id, score name or covariate column; `level` the category value an indicator stands for.
    """

    name: str
    kind: Literal["score", "covariate", "variant"]
    source: str
    centre: float
    scale: float
    level: str = ""


def transformed(column: Column, value: float) -> float:
    """The column's value after clamping to its public bounds and its transform."""
    if column.lower is not None:
        value = max(value, float(column.lower))
    if column.upper is not None:
        value = min(value, float(column.upper))
    match column.transform:
        case "sqrt":
            return math.sqrt(value)
        case "log":
            return math.log(value)
        case "none":
            return value


def standardisation(column: Column) -> tuple[float, float]:
    """(centre, scale) of a column from its public declaration; binary columns are 0/1 unless declared otherwise."""
    if column.kind != "quantitative":
        return float(column.centre or 0), float(column.scale or 1)
    if column.lower is None or column.upper is None:
        raise ValueError(f"column {column.name} declares no bounds")
    low, high = transformed(column, float(column.lower)), transformed(column, float(column.upper))
    centre = float(column.centre) if column.centre is not None else (low + high) / 2
    scale = float(column.scale) if column.scale is not None else (high - low) / 2
    return centre, scale


def _column_features(column: Column) -> Sequence[Feature]:
    centre, scale = standardisation(column)
    if column.kind != "category":
        return [Feature(column.name, "covariate", column.name, centre, scale)]
    return [
        Feature(f"{column.name}={level}", "covariate", column.name, centre, scale, level) for level in column.values[1:]
    ]


def is_study_digest(text: str) -> bool:
    """True for 64 lower-case hex digits."""
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None


class _CoreSchema(SafeConstructor):
    """YAML 1.2 core schema: `NO` is a string, a number with a point is read from its own digits as a Decimal."""


def _decimal_of(loader: _CoreSchema, node: ScalarNode) -> Decimal:
    try:
        return Decimal(node.value)
    except ArithmeticError:
        raise ConstructorError(None, None, f"`{node.value}` is not a decimal number", node.start_mark) from None


_CoreSchema.add_constructor("tag:yaml.org,2002:float", _decimal_of)
_CoreSchema.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


def read_study(text: str) -> Study:
    """The study in a `study.yaml`; a `StudyError` that names line and field, what was found and what was expected."""
    if text.lstrip("\ufeff").startswith("%"):
        raise StudyError(
            "line 1: a YAML directive", hint="leave it out: a study is read as YAML 1.2, where NO is a word"
        )
    try:
        value = _yaml().load(text)
        if not isinstance(value, dict):
            raise StudyError(
                "this YAML is not a study: a mapping was expected", hint="`sequester-server study new` writes one"
            )
        return validated(_with_numbers(value, text), text)
    except DuplicateKeyError as error:
        raise StudyError(f"a key stands twice: {_where(error)}", hint="keep one of the two") from None
    except YAMLError as error:
        raise StudyError(f"this is not YAML: {_where(error)}", hint="correct the line") from None
    except RecursionError:
        raise StudyError("this YAML is nested too deeply", hint="a study is at most six levels deep") from None


def _with_numbers(value: dict[str, Any], text: str) -> dict[str, Any]:
    """The study's value with the numbers of its privacy profile in place of the name, where it names one."""
    section = value.get("privacy")
    if not isinstance(section, dict) or "profile" not in section:
        return value
    try:
        return {**value, "privacy": expanded(section)}
    except ValueError as error:
        raise StudyError(
            f"{_line(text, ('privacy', 'profile'))}privacy.profile: {error}",
            hint="name a profile and nothing else, or leave it out and give epsilon, delta and order",
            code=RefusalCode.STUDY,
        ) from None


def _yaml() -> YAML:
    reader = YAML(typ="safe", pure=True)
    reader.version = (1, 2)
    reader.Constructor = _CoreSchema
    reader.allow_duplicate_keys = False
    return reader


def _where(error: YAMLError) -> str:
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {str(error.problem).split(' with value')[0]}"
    return str(error).splitlines()[0]


def _line(text: str, loc: tuple[int | str, ...]) -> str:
    """`line 12: ` of the innermost node of `loc` that stands in the text; the model's own tags are passed over."""
    node = _yaml().compose(text)
    for part in loc:
        if isinstance(node, MappingNode):
            node = next((value for key, value in node.value if key.value == str(part)), node)
        elif isinstance(node, SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
    return f"line {node.start_mark.line + 1}: "


def parse_study(canonical_json: bytes) -> Study:
    """The study of signed bytes; bytes that are not the one spelling of the study they mean are refused.

    Two spellings of one study would have two digests, and an approval of one would not cover the other.
    """
    try:
        value = json.loads(canonical_json)
    except (ValueError, RecursionError):
        raise StudyError("these bytes are not a study", hint="fetch it again", code=RefusalCode.STUDY) from None
    study = validated(value)
    if canonical(study_json(study)) != bytes(canonical_json):
        raise StudyError(
            "these bytes are not the canonical form of the study they hold",
            hint="`sequester-server study sign` writes it; a study signed by hand is not accepted",
            code=RefusalCode.STUDY,
        )
    return study


def validated(value: object, text: str = "") -> Study:
    """The study of a JSON-like value; its first fault as a `StudyError`, with the line where it was read from `text`."""
    try:
        return Study.model_validate(value)
    except UnicodeError:
        raise StudyError(
            "a text holds half a character", hint="plain UTF-8 was expected", code=RefusalCode.STUDY
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "study"
        message = str(first["msg"]).removeprefix("Value error, ")
        found = first["input"]
        if first["type"] not in ("value_error", "missing") and isinstance(found, str | int | Decimal | None):
            message += f"; found `{str(found)[:40]}`"
        line = _line(text, first["loc"]) if text and first["loc"] else ""
        more = f" ({error.error_count() - 1} more after it)" if error.error_count() > 1 else ""
        raise StudyError(
            f"{line}{where}: {message}",
            hint=f"correct it{more}; `sequester-server study check` reads the study again",
            code=RefusalCode.STUDY,
        ) from None


def study_json(study: Study) -> dict[str, Any]:
    """The JSON value whose RFC 8785 form is signed."""
    return study.model_dump(mode="json")
