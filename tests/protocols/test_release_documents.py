"""No private model without a pass of every hospital, or a waiver of the coordinator that every hospital countersigned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import contracts
import released
from sequester.protocols import privacy
from sequester.protocols.errors import PrivacyError, StudyError
from sequester.protocols.release import Documents, Release, form_of, judge, models
from sequester.protocols.signing import canonical, open_document, raw_public, sign_document
from sequester.protocols.study import Study, parse_study

VECTORS = Path(__file__).parents[1] / "vectors"
COORDINATOR = raw_public(contracts.COORDINATOR)
NORTH_IS_AWAY = {"north": "missing"}


@pytest.fixture(scope="module")
def study() -> Study:
    return contracts.study()


def stands(study: Study, documents: Documents) -> Release:
    return judge(study, privacy.study_digest(study), COORDINATOR, documents)


def refused(study: Study, documents: Documents) -> str:
    found = stands(study, documents)
    assert found.granted_by == ""
    with pytest.raises(PrivacyError) as error:
        found.require()
    assert error.value.hint.startswith("nothing is exported: ")
    return error.value.message


def test_a_pass_of_every_hospital_lets_the_models_out(study: Study) -> None:
    found = stands(study, released.passes(study))
    assert found.granted_by == "passes" and set(found.words.values()) == {"passed"}
    found.require()


def test_a_study_without_a_private_model_has_nothing_to_release() -> None:
    exact = contracts.exact_study()
    counted = contracts.study(analyses=[{"kind": "quality", "name": "n"}])
    for of in (exact, counted):
        assert models(of) == () and stands(of, Documents()).granted_by == "nothing to release"


@pytest.mark.parametrize("word", ["failed", "missing"])
def test_one_hospital_without_a_pass_holds_the_model_back_and_is_named(study: Study, word: Any) -> None:
    said = refused(study, Documents(released.verdicts(study, lake=word)))
    assert said == f"the release gate: lake {word}; a pass of every hospital was expected"


def test_a_forged_verdict_is_refused_by_name(study: Study) -> None:
    forged = [
        released.verdict(study, "lake", key=contracts.SITES["north"]),  # another hospital's key
        released.verdict(study, "lake", key=contracts.COORDINATOR),  # the exchange or the coordinator in its place
        released.verdict(study, "lake", False).replace(b'"passed":false', b'"passed":true'),
        canonical(json.loads(released.verdict(study, "lake")) | {"kind": "receipt"}),
        b"{}",
    ]
    for raw in forged:
        with pytest.raises(StudyError, match="the verdict of lake: "):
            stands(study, Documents(released.verdicts(study) | {"lake": raw}))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"study": "ab" * 32}, "it is about study 'abab"),
        ({"site": "north"}, "at 'north'"),
        ({"tried": []}, "not about the private models"),
        (
            {"tried": [{"analysis": "held_out", "patients": 1, "columns": 1, "canaries": 1, "runs": 1}]},
            "private models",
        ),
        ({"tried": "all"}, "private models"),
        ({"passed": 1}, "neither pass nor fail"),
        ({"form": "none"}, "which form ran"),
        ({"attempt": 0}, "count its attempts"),
        ({"program": "0.1\x1b[2J"}, "plain text"),
    ],
)
def test_a_verdict_about_something_else_is_none(study: Study, changed: dict[str, Any], said: str) -> None:
    other = released.verdict(study, "lake", **changed)
    with pytest.raises(StudyError, match=f"the verdict of lake: .*{said}"):
        stands(study, Documents(released.verdicts(study) | {"lake": other}))


def test_a_pass_for_another_study_does_not_let_this_one_out(study: Study) -> None:
    amended = contracts.study(n0=10001)
    with pytest.raises(StudyError, match="it is about study"):
        stands(amended, released.passes(study))


def test_a_strangers_verdict_is_refused(study: Study) -> None:
    with pytest.raises(StudyError, match="no hospital of this study"):
        stands(study, Documents(released.verdicts(study) | {"../lake": released.verdict(study, "lake")}))


def test_a_waiver_counts_with_every_countersignature_and_not_with_one_less(study: Study) -> None:
    waiver = released.waiver(study, NORTH_IS_AWAY)  # type: ignore[arg-type]
    verdicts = released.verdicts(study, north="missing")
    signed = released.countersigned(study, waiver)
    found = stands(study, Documents(verdicts, waiver, signed))
    assert found.granted_by == "waiver" and found.waiver is not None
    assert found.waiver.reason == "The machine is down." and found.lacking == NORTH_IS_AWAY
    for site in study.site_ids:
        said = refused(study, Documents(verdicts, waiver, {s: d for s, d in signed.items() if s != site}))
        assert said.endswith(f"the waiver lacks the countersignature of {site}")


def test_a_waiver_by_anybody_but_the_coordinator_is_refused(study: Study) -> None:
    waiver = released.waiver(study, NORTH_IS_AWAY, key=contracts.SITES["north"])  # type: ignore[arg-type]
    documents = Documents(released.verdicts(study, north="missing"), waiver, released.countersigned(study, waiver))
    with pytest.raises(StudyError, match="the waiver of the coordinator: signed by"):
        stands(study, documents)


def test_countersignatures_of_another_waiver_do_not_count(study: Study) -> None:
    first = released.waiver(study, NORTH_IS_AWAY, "The machine is down.")  # type: ignore[arg-type]
    second = released.waiver(study, NORTH_IS_AWAY, "We are in a hurry.")  # type: ignore[arg-type]
    documents = Documents(released.verdicts(study, north="missing"), second, released.countersigned(study, first))
    assert "lacks the countersignature of harbor, lake, north" in refused(study, documents)


def test_a_countersignature_by_another_hospital_is_refused(study: Study) -> None:
    waiver = released.waiver(study, NORTH_IS_AWAY)  # type: ignore[arg-type]
    signed = released.countersigned(study, waiver)
    with pytest.raises(StudyError, match="the countersignature of lake: signed by"):
        stands(study, Documents(released.verdicts(study), waiver, signed | {"lake": signed["north"]}))


def test_a_waiver_ends_when_a_hospital_stands_worse_than_it_says_and_holds_when_it_has_passed(study: Study) -> None:
    waiver = released.waiver(study, NORTH_IS_AWAY | {"lake": "missing"})  # type: ignore[arg-type]
    signed = released.countersigned(study, waiver)
    worse = Documents(released.verdicts(study, north="failed", lake="missing"), waiver, signed)
    assert "the waiver was signed for: lake missing, north missing" in refused(study, worse)
    better = Documents(released.verdicts(study, north="missing"), waiver, signed)
    assert stands(study, better).granted_by == "waiver"


def test_a_reason_is_asked_for_and_is_plain_text(study: Study) -> None:
    for reason in ("", "  ", "x" * 2001, "a\x1b[2J"):
        waiver = released.waiver(study, NORTH_IS_AWAY, reason)  # type: ignore[arg-type]
        with pytest.raises(StudyError, match="its reason is not plain text"):
            stands(study, Documents({}, waiver, {}))


def test_the_form_is_short_for_small_plans_only(study: Study) -> None:
    assert form_of(study) == "short"
    assert form_of(contracts.study(n0=1_000_000, n_max=1_200_000, privacy__delta="0.0000001")) == "full"


def test_documents_travel_as_text_and_another_answer_is_a_fault(study: Study) -> None:
    documents = released.passes(study)
    assert Documents.from_json(json.loads(json.dumps(documents.json()))) == documents
    for answer in ({}, None, {"verdicts": 3, "waiver": None, "countersignatures": {}}):
        with pytest.raises(StudyError, match="nothing of the release gate"):
            Documents.from_json(answer)


def test_documents_of_format_1_stay_readable() -> None:
    of = parse_study((VECTORS / "study" / "v1" / "study.json").read_bytes())
    kept = json.loads((VECTORS / "documents" / "release.json").read_text("utf-8"))
    found = judge(of, privacy.study_digest(of), COORDINATOR, Documents.from_json(kept))
    assert found.granted_by == "waiver" and found.words == {"harbor": "passed", "lake": "failed", "north": "missing"}
    assert found.verdicts["harbor"].tried[0].patients == 600


def test_the_signature_of_a_verdict_is_none_of_a_receipt(study: Study) -> None:
    with pytest.raises(StudyError):
        open_document(released.verdict(study, "lake"), "receipt", raw_public(contracts.SITES["lake"]))
    body = open_document(released.verdict(study, "lake"), "verdict", None).body
    receipt = json.loads(sign_document("receipt", body, contracts.SITES["lake"])) | {"kind": "verdict"}
    with pytest.raises(StudyError, match="does not hold"):
        stands(study, Documents(released.verdicts(study) | {"lake": canonical(receipt)}))
