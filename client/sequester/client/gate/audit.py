"""Whether a ledger is whole: its chain, its signatures, and what others witnessed of it."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from sequester.client.gate.ledger import GENESIS, Ledger
from sequester.protocols.signing import raw_public, sha256, sign_document


@dataclass(frozen=True, slots=True)
class Finding:
    """`bad` is the number of the first bad entry, 0 where the whole chain holds; `sentence` says what was found."""

    bad: int
    sentence: str


def verify(folder: Path, witnessed: list[tuple[int, bytes]]) -> Finding:
    """The first thing that is wrong with a ledger.

    `witnessed` are heads (number, hash) this data set once signed and others kept: they notice a cut tail, a rewritten
    chain and a restored copy, which a chain alone cannot.
    """
    db = sqlite3.connect(f"file:{folder / 'ledger.db'}?mode=ro", uri=True)
    try:
        rows = db.execute("SELECT seq, body, hash, signature FROM rows ORDER BY seq").fetchall()
    except sqlite3.DatabaseError as error:
        return Finding(1, f"the ledger cannot be read: {error}")
    finally:
        db.close()
    heads: dict[int, bytes] = {}
    previous, expected, key = GENESIS, 1, None
    for seq, raw, digest, signature in rows:
        try:
            body = json.loads(raw)
            if key is None:
                key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(body["key"]))
            if seq != expected or body["seq"] != expected:
                return Finding(expected, f"entry {expected} is missing")
            if body["previous"] != previous.hex() or bytes.fromhex(sha256(raw)) != digest:
                return Finding(expected, f"entry {expected} was changed, or does not follow the one before it")
            key.verify(signature, b"sequester-ledger/v1/" + digest)
        except InvalidSignature:
            return Finding(expected, f"entry {expected} is not signed by this data set's key")
        except (ValueError, KeyError, TypeError):
            return Finding(expected, f"entry {expected} is not an entry of a ledger")
        heads[seq] = previous = digest
        expected += 1
    for counter, head in sorted(witnessed):
        held = heads.get(counter)
        if held is None:
            return Finding(
                expected, f"others hold your signature on entry {counter}; this ledger ends at {expected - 1}"
            )
        if held != head:
            return Finding(counter, f"entry {counter} is not the one that others hold your signature on")
    return Finding(0, f"{expected - 1} entries, whole; {len(witnessed)} witnessed heads agree")


def witnesses(consortia: list[Path], data_set: str) -> list[tuple[int, bytes]]:
    """Heads that this data set signed into receipts and key advertisements, from every consortium's folder."""
    heads = []
    for folder in consortia:
        for receipt in sorted((folder / "receipts").glob("*.json")):
            body = json.loads(receipt.read_text("utf-8"))["body"]
            if body["data_set"] == data_set:
                heads.append((int(body["ledger"]["counter"]), bytes.fromhex(body["ledger"]["head"])))
        path = folder / "advertisements.json"
        if path.exists() and (folder / "identity.key").exists():
            row = json.loads(path.read_text("utf-8")).get(f"{_own_key(folder)}/{data_set}")
            if row is not None:
                heads.append((int(row["counter"]), bytes.fromhex(row["head"])))
    return heads


def _own_key(folder: Path) -> str:
    key = load_pem_private_key((folder / "identity.key").read_bytes(), None)
    assert isinstance(key, Ed25519PrivateKey)
    return raw_public(key).hex()


def export(ledger: Ledger, key: Ed25519PrivateKey) -> bytes:
    """One signed file with every row; `deploy/verify_ledger.py` checks it without this program."""
    rows = [
        {"body": row.raw.decode(), "hash": row.hash.hex(), "signature": row.signature.hex()} for row in ledger.rows()
    ]
    counter, head = ledger.head()
    return sign_document(
        "audit", {"data_set": ledger.data_set, "counter": counter, "head": head.hex(), "rows": rows}, key
    )
