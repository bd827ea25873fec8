"""What a study may say: read digit by digit, one spelling, refused by name."""

from __future__ import annotations

import contextlib
import hashlib
import json
from decimal import Decimal
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts import FIELDS, fields, study
from sequester.protocols import privacy
from sequester.protocols.errors import PrivacyError, RefusalCode, StudyError
from sequester.protocols.signing import canonical
from sequester.protocols.study import parse_study, read_study, study_json, validated

V1 = Path(__file__).parents[1] / "vectors" / "study" / "v1"
YAML = (files("sequester.server") / "templates" / "risk-score.yaml").read_text("utf-8")


def test_a_study_of_format_1_stays_readable_and_keeps_its_digest() -> None:
    data, digest = (V1 / "study.json").read_bytes(), (V1 / "digest.txt").read_text("ascii").strip()
    read = parse_study(data)
    assert privacy.study_digest(read) == digest == hashlib.sha256(data).hexdigest()
    assert read.analysis("score").noise_multiplier is not None


def test_signed_bytes_come_back_as_the_same_study() -> None:
    original = study()
    assert parse_study(canonical(study_json(original))) == original


def test_a_second_spelling_of_the_same_study_is_refused() -> None:
    value = study_json(study())
    for other in (
        value | {"privacy": value["privacy"] | {"epsilon": "3.0"}},
        {k: v for k, v in value.items() if k != "genome_build"},
    ):
        with pytest.raises(StudyError, match="canonical form"):
            parse_study(canonical(other))
    with pytest.raises(StudyError, match="canonical form"):
        parse_study(json.dumps(value).encode())


def test_any_changed_field_is_another_study() -> None:
    digests = {
        privacy.study_digest(validated(fields(**change)))
        for change in (
            {},
            {"n0": 10001},
            {"privacy__epsilon": "2.9"},
            {"sites__0__id": "hafen"},
            {"title__en": "A risk scorf"},
        )
    }
    assert len(digests) == 5


def test_two_spellings_of_a_number_in_yaml_are_one_study() -> None:
    numbers = YAML.replace("\n  profile: standard ", " {epsilon: 3, delta: 0.000001, order: 8.9} ")
    texts = [
        YAML,
        numbers.replace("delta: 0.000001,", "delta: 1e-6,"),
        numbers.replace("epsilon: 3,", 'epsilon: "3.0",'),
    ]
    assert len(set(texts)) == 3
    assert len({privacy.study_digest(read_study(text)) for text in texts}) == 1


def test_no_digit_passes_through_a_binary_float() -> None:
    text = YAML.replace("frequency: 0.21}", "frequency: 0.2100000000000000000001}")
    assert read_study(text).variants[0].frequency == Decimal("0.2100000000000000000001")
    with pytest.raises(StudyError, match=r"privacy\.epsilon"):
        validated(fields(privacy__epsilon=0.1))


def test_no_is_a_word_and_so_is_a_date() -> None:
    read = read_study(YAML.replace('values: ["0", "1"]', "values: [NO, YES]", 1))
    assert read.phenotype.values == ("NO", "YES")
    assert read.expires == "2030-01-01T00:00:00Z"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("lineage: risk-score ", "consortium: twice ", "duplicate key"),
        ("lineage: risk-score ", "lineage: risk: score ", "not YAML"),
        ("  test_fraction: 0.2 ", "  test_fraction: .inf ", "not a decimal"),
        ("  test_fraction: 0.2 ", "  test_fraction: 1e999999999 ", "too many digits"),
        ("n0: 10000", "n0: ten", "found `ten`"),
        ("    rounds: 10", "    rouns: 10", "rouns"),
        ("effect: T, other: C", "effect: T, other: X", "variants.1.other"),
    ],
)
def test_a_fault_in_yaml_is_named_with_its_line(old: str, new: str, said: str) -> None:
    line = YAML[: YAML.index(old)].count("\n") + 1
    with pytest.raises(StudyError) as refused:
        read_study(YAML.replace(old, new))
    assert said in refused.value.message and f"line {line}" in refused.value.message and refused.value.hint


@pytest.mark.parametrize(
    "text", ["%YAML 1.1\n---\na: NO", "[" * 5000, "- a\n- b", "a: !!python/name:os.system", "\x00", ""]
)
def test_what_is_no_study_is_one_clear_error(text: str) -> None:
    with pytest.raises(StudyError) as refused:
        read_study(text)
    assert refused.value.hint


EXACT = {"kind": "linear", "name": "fit", "mode": "exact"}
DOSE = {"name": "dose", "kind": "quantitative", "lower": "1", "upper": "100"}
GLM = FIELDS["analyses"][0]
FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"sites": FIELDS["sites"][:2]}, "at least 3"),
    ({"sites": [*FIELDS["sites"], FIELDS["sites"][0]]}, "named twice"),
    ({"sites__0__key": FIELDS["sites"][1]["key"]}, "named twice"),
    ({"sites__0__key": "AB" * 32}, "sites.0.key"),
    ({"n_max": 9999}, "below n0"),
    ({"purpose": ["HMB"]}, "DUO"),
    ({"purpose": ["DUO:0000007\n"]}, "DUO"),
    ({"title": {}}, "title"),
    ({"title": {"english": "x"}}, "title"),
    ({"expires": "2026-02-30T00:00:00Z"}, "no moment"),
    ({"expires": "tomorrow"}, "expires"),
    ({"question": "Cost: \x1b[2Knothing"}, "control character"),
    ({"question": "one\ntwo"}, "control character"),
    ({"title__en": "safe \u202e reversed"}, "control character"),
    ({"covariates__0__lower": "90"}, "no bounds"),
    ({"covariates__0__lower": None}, "no bounds"),
    ({"covariates__0": {**FIELDS["covariates"][0], "lower": "0", "transform": "log"}}, "logarithm"),
    ({"covariates__0": {**FIELDS["covariates"][0], "scale": "0"}}, "scale"),
    ({"covariates": [FIELDS["phenotype"]]}, "column is named twice"),
    ({"phenotype": {"name": "c", "kind": "category", "values": ["a", "b"]}}, "binary or quantitative"),
    ({"phenotype__values": ["0"]}, "two codings"),
    ({"phenotype__values": ["1", "1"]}, "value twice"),
    ({"variants__0__id": "rs2"}, "same name"),
    ({"variants__0__other": "T"}, "palindromic"),
    ({"variants__0__other": "A"}, "palindromic"),
    ({"variants__0__frequency": "1"}, "between 0 and 1"),
    ({"variants__0__chromosome": "X"}, "chromosome"),
    ({"variants__0__position": 2**31}, "position"),
    ({"cohort": {"where": ["age"]}}, "column operator value"),
    ({"cohort": {"where": ["age > old"]}}, "a number was expected"),
    ({"cohort": {"where": ["a b == 1"]}}, "column operator value"),
    ({"cohort": {"test_fraction": "1"}}, "test_fraction"),
    ({"cohort": {"subgroup": "ancestry"}}, "subgroup"),
    ({"privacy__epsilon": "0"}, "epsilon"),
    ({"privacy__delta": "0.0001"}, "1/n_max"),
    ({"privacy__order": "1"}, "order"),
    ({"spare_attempts": -1}, "spare_attempts"),
    ({"analyses": []}, "at least one analysis"),
    ({"analyses": [GLM, {**GLM, "budget": None}]}, "named twice"),
    ({"analyses": [{**GLM, "name": "Score"}]}, "analyses.0"),
    ({"analyses": [{**GLM, "kind": "neural"}]}, "analyses.0"),
    ({"analyses": [{**GLM, "budget": "1.1"}]}, "add up"),
    ({"analyses": [{**GLM, "noise_multiplier": "0"}]}, "noise multiplier"),
    ({"analyses": [{**GLM, "noise_multiplier": "-1"}]}, "noise multiplier"),
    ({"analyses": [{**GLM, "clip": "0"}]}, "clip"),
    ({"analyses": [{**GLM, "family": "linear"}]}, "binary phenotype"),
    ({"analyses": [{"kind": "evaluation", "name": "e", "of": "later"}, GLM]}, "does not come before"),
    ({"analyses": [GLM, {"kind": "evaluation", "name": "e", "of": "score", "folds": True}]}, "folds"),
    ({"analyses": [EXACT]}, "least squares of a binary"),
    ({"phenotype": DOSE, "analyses": [EXACT], "aggregation": {"mode": "double"}}, "is exact"),
    ({"phenotype": DOSE, "analyses": [EXACT], "aggregation": {"mode": "strict", "min_active": 2}}, "is exact"),
    ({"phenotype": DOSE, "analyses": [{**EXACT, "noise_multiplier": "1"}]}, "no noise"),
    ({"analyses": [{**GLM, "mode": "exact", "budget": None}]}, "newton"),
]


@pytest.mark.parametrize(("change", "said"), FAULTS)
def test_a_study_that_contradicts_itself_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyError) as refused:
        validated(fields(**change))
    assert said in refused.value.message and refused.value.code == RefusalCode.STUDY


def test_a_field_that_is_not_in_the_contract_is_refused() -> None:
    with pytest.raises(StudyError, match="secure_mode"):
        validated(FIELDS | {"secure_mode": True})


def test_the_roster_is_ascending_by_name_whatever_the_order_written() -> None:
    assert study(sites=FIELDS["sites"][::-1]).roster == study().roster
    assert study().site_ids == ("harbor", "lake", "north")


def test_calibration_spends_the_whole_epsilon_and_not_more() -> None:
    one = study()
    assert privacy.check_calibrated(one) == pytest.approx(
        privacy.accounting.cap(3, 1e-6, 8.9), rel=1e-6
    )  # multipliers are rounded up to a millionth
    with pytest.raises(Exception, match="cost"):
        privacy.check_calibrated(
            one.model_copy(update={"privacy": one.privacy.model_copy(update={"epsilon": Decimal("2.9")})})
        )


def _paths(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [p for key, child in inner for p in _paths(child, (*path, key))]


STRANGE = st.sampled_from(
    ["0", "-1", "1e30", "1e-30", "0.5", 0, -1, 1, 2**31, 2**53, 10**20, 1.5, True, None, "", [], {}, [[]], "NaN", "1e400",
     "\ud800", "a" * 10000, "private", "exact", "double", "local", "replace-one", "log", "sqrt", "linear", "newton", 64]
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(_paths(study_json(study()))), STRANGE), min_size=1, max_size=3))
def test_a_mangled_study_is_refused_or_is_another_study_that_reads_back(changes: list[tuple[Any, Any]]) -> None:
    value = study_json(study())
    for path, new in changes:
        inner: Any = value
        try:
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = new
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took the branch away
    try:
        read = validated(value)
    except StudyError as error:
        assert error.message
        return
    data = canonical(study_json(read))
    assert parse_study(data) == read
    with contextlib.suppress(StudyError, PrivacyError):  # what a gate derives from it raises nothing else
        privacy.session_params(read)
        privacy.check_calibrated(read)
        privacy.check_headroom(read)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200) | st.binary(max_size=200))
def test_text_and_bytes_of_any_kind_end_as_a_study_error(given_: str | bytes) -> None:
    with pytest.raises(StudyError):
        read_study(given_) if isinstance(given_, str) else parse_study(given_)


def test_a_changed_copy_of_a_study_has_its_own_features_and_digest() -> None:
    whole = study()
    features, digest = whole.features(), privacy.study_digest(whole)
    assert whole.features() is features  # kept: thousands of variants are walked once
    fewer = whole.model_copy(update={"variants": whole.variants[:1], "lineage": "another"})
    assert len(fewer.features()) < len(features) and privacy.study_digest(fewer) != digest
    assert whole.features() == features and privacy.study_digest(whole) == digest
