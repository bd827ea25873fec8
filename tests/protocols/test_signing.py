"""A document opens only as the bytes that its signer signed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.signing import VerifyKey

from contracts import COORDINATOR, SITES
from sequester.protocols.errors import RefusalCode, StudyError
from sequester.protocols.signing import (
    MAX_DOCUMENT,
    canonical,
    fingerprint,
    open_document,
    raw_public,
    sign_document,
    spoken,
)

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "documents" / "refusal.json").read_text("utf-8"))
COORDINATOR_KEY = raw_public(COORDINATOR)
BODY = {"site": "north", "n": 3}


@pytest.mark.parametrize("name", VECTORS["cases"])
def test_only_the_good_vector_opens(name: str) -> None:
    case = VECTORS["cases"][name]
    data, signer = case["document"].encode("utf-8", "surrogatepass"), bytes.fromhex(VECTORS["signer"])
    if case.get("valid"):
        assert open_document(data, VECTORS["kind"], signer).body["site"] == "north"
    else:
        with pytest.raises(StudyError) as refused:
            open_document(data, VECTORS["kind"], signer)
        assert refused.value.code in (RefusalCode.STUDY, RefusalCode.VERSION) and refused.value.hint


def test_a_second_library_agrees_about_the_signature() -> None:
    value = json.loads(sign_document("refusal", BODY, COORDINATOR))
    statement = b"sequester-document/v1/refusal\x00" + canonical(BODY)
    VerifyKey(COORDINATOR_KEY).verify(statement, bytes.fromhex(value["signature"]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_no_single_changed_byte_opens(at: int, by: int) -> None:
    data = bytearray(sign_document("refusal", BODY, COORDINATOR))
    data[at % len(data)] ^= by
    with pytest.raises(StudyError):
        open_document(bytes(data), "refusal", None)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_bytes_of_any_kind_end_as_a_study_error(data: bytes) -> None:
    with pytest.raises(StudyError):
        open_document(data, "study", COORDINATOR_KEY)


def test_deep_nesting_and_size_are_refused_before_they_cost_anything() -> None:
    with pytest.raises(StudyError, match="not a signed document"):
        open_document(b"[" * 100_000, "study", None)
    with pytest.raises(StudyError, match="bytes"):
        open_document(b" " * (MAX_DOCUMENT + 1), "study", None)


def test_a_signature_of_one_kind_is_none_of_another() -> None:
    value = json.loads(sign_document("approval", BODY, COORDINATOR))
    with pytest.raises(StudyError, match="does not hold"):
        open_document(canonical(value | {"kind": "refusal"}), "refusal", COORDINATOR_KEY)


def test_another_signer_is_named_by_fingerprint() -> None:
    data = sign_document("refusal", BODY, SITES["lake"])
    with pytest.raises(StudyError) as refused:
        open_document(data, "refusal", COORDINATOR_KEY)
    assert fingerprint(raw_public(SITES["lake"]))[:16] in refused.value.message


def test_a_fingerprint_is_the_sha256_of_the_raw_key_and_is_read_in_fours() -> None:
    assert fingerprint(COORDINATOR_KEY) == hashlib.sha256(COORDINATOR_KEY).hexdigest()
    assert spoken(fingerprint(COORDINATOR_KEY)).replace(" ", "") == fingerprint(COORDINATOR_KEY)
    assert len(spoken(fingerprint(COORDINATOR_KEY)).split()) == 16


def test_the_digest_of_a_document_is_that_of_its_canonical_body() -> None:
    document = open_document(sign_document("refusal", BODY, COORDINATOR), "refusal", COORDINATOR_KEY)
    assert document.digest == hashlib.sha256(b'{"n":3,"site":"north"}').hexdigest()
    assert document.body_bytes == b'{"n":3,"site":"north"}'
