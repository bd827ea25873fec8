"""Canonical bytes, digests, fingerprints, and documents that one Ed25519 key vouches for.

RFC 8785 of a JSON value is the only spelling that is hashed or signed. A document is the canonical JSON of
`{"format": 1, "kind", "body", "signer", "signature"}`; the signature covers the kind and the canonical body.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import rfc8785
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from sequester.protocols.errors import RefusalCode, StudyError

KINDS = frozenset(
    {"study", "member", "approval", "refusal", "order", "receipt", "audit", "verdict", "waiver", "countersignature"}
)
MAX_DOCUMENT = 4 * 1024 * 1024


def canonical(value: Any) -> bytes:
    """RFC 8785 bytes of a JSON value.

    >>> canonical({"b": 1, "a": "x"})
    b'{"a":"x","b":1}'
    """
    return rfc8785.dumps(value)


def sha256(data: bytes) -> str:
    """Lower-case hex."""
    return hashlib.sha256(data).hexdigest()


def fingerprint(raw_key: bytes) -> str:
    """SHA-256 of a raw Ed25519 public key, hex: what two people compare."""
    return sha256(raw_key)


def spoken(fingerprint_hex: str) -> str:
    """A fingerprint in groups of four, for reading aloud.

    >>> spoken("0123456789abcdef" * 4)[:19]
    '0123 4567 89ab cdef'
    """
    return " ".join(fingerprint_hex[i : i + 4] for i in range(0, len(fingerprint_hex), 4))


def raw_public(key: Ed25519PrivateKey) -> bytes:
    """The 32 bytes others know a key by."""
    return key.public_key().public_bytes_raw()


def _statement(kind: str, body: bytes) -> bytes:
    return b"sequester-document/v1/" + kind.encode("ascii") + b"\x00" + body


@dataclass(frozen=True, slots=True)
class Document:
    """A verified document. `digest` is the SHA-256 of the canonical body: for a study, the study's name."""

    kind: str
    body: dict[str, Any]
    signer: bytes
    raw: bytes

    @property
    def body_bytes(self) -> bytes:
        """The canonical bytes of the body: what `digest` is taken of."""
        return canonical(self.body)

    @property
    def digest(self) -> str:
        return sha256(self.body_bytes)


def sign_document(kind: str, body: dict[str, Any], key: Ed25519PrivateKey) -> bytes:
    """The document's bytes."""
    if kind not in KINDS:
        raise ValueError(f"no documents of kind {kind}")
    signature = key.sign(_statement(kind, canonical(body)))
    return canonical(
        {"format": 1, "kind": kind, "body": body, "signer": raw_public(key).hex(), "signature": signature.hex()}
    )


def open_document(data: bytes, kind: str, signer: bytes | None) -> Document:
    """The document in `data`, if it is of `kind`, canonical, and signed by `signer` (None: by whoever it names).

    Everything else is a `StudyError` that says which of these failed.
    """
    if len(data) > MAX_DOCUMENT:
        raise StudyError(
            f"a document of {len(data)} bytes", hint=f"at most {MAX_DOCUMENT} bytes", code=RefusalCode.STUDY
        )
    try:
        value = json.loads(data)
        fields = {key: value[key] for key in ("format", "kind", "body", "signer", "signature")}
        named, signature = bytes.fromhex(fields["signer"]), bytes.fromhex(fields["signature"])
        exact = isinstance(fields["body"], dict) and len(value) == 5 and canonical(value) == bytes(data)
        exact = exact and (fields["signer"], fields["signature"]) == (named.hex(), signature.hex())
    except (ValueError, KeyError, TypeError, RecursionError):
        raise StudyError(
            "this is not a signed document", hint="fetch it again from whoever published it", code=RefusalCode.STUDY
        ) from None
    is_format_1 = type(fields["format"]) is int and fields["format"] == 1  # JSON `true` equals 1 in Python
    if not is_format_1 or fields["kind"] != kind:
        raise StudyError(
            f"a document of format {fields['format']!r:.20}, kind {fields['kind']!r:.20}; expected format 1, kind `{kind}`",
            hint="a newer format needs a newer program" if not is_format_1 else "this is another kind of document",
            code=RefusalCode.STUDY if is_format_1 else RefusalCode.VERSION,
        )
    if signer is not None and named != signer:
        raise StudyError(
            f"signed by {fingerprint(named)[:16]}, expected {fingerprint(signer)[:16]}",
            hint="wrong signature: refuse, and ask the coordinator over another channel",
            code=RefusalCode.STUDY,
        )
    try:
        if not exact:
            raise InvalidSignature
        Ed25519PublicKey.from_public_bytes(named).verify(signature, _statement(kind, canonical(fields["body"])))
    except (InvalidSignature, ValueError):
        raise StudyError(
            f"the signature on this {kind} does not hold: its text was changed after signing",
            hint="wrong signature: refuse, and ask for the original",
            code=RefusalCode.STUDY,
        ) from None
    return Document(kind, fields["body"], named, bytes(data))
