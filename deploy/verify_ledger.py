"""Check an exported ledger without the program that wrote it: `python verify_ledger.py FILE [--key HEX] [--receipt FILE]...`

Needs Python 3.11 and `cryptography`. It reads one file, the answer of `sequester-client audit export`, and says whether
every entry is there, unchanged and signed by the data set's key, and whether the receipts given agree with it. `--key`
is the data set's public key as an earlier audit printed it: without it a ledger written anew under a new key looks whole.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


class Bad(Exception):
    """What is wrong, in a sentence."""


def canonical(value: Any) -> bytes:
    """RFC 8785 bytes of the values an export holds: text, integers, lists and mappings with ASCII names."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode("utf-8")


def opened(data: bytes, kind: str) -> tuple[dict[str, Any], str]:
    """(body, signer in hex) of a signed document; `Bad` where the signature does not hold."""
    document = json.loads(data)
    if document["format"] != 1 or document["kind"] != kind:
        raise Bad(f"a file of kind {document['kind']}, format {document['format']}; expected {kind}, format 1")
    statement = b"sequester-document/v1/" + kind.encode() + b"\x00" + canonical(document["body"])
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(document["signer"])).verify(
            bytes.fromhex(document["signature"]), statement
        )
    except InvalidSignature:
        raise Bad("the file's own signature does not hold: it was changed after it was written") from None
    return document["body"], document["signer"]


def checked(body: dict[str, Any], key_hex: str) -> list[dict[str, Any]]:
    """The entries in order; `Bad` names the first that is missing, changed or signed by another key."""
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key_hex))
    previous, entries = "00" * 32, []
    for number, row in enumerate(body["rows"], start=1):
        digest = hashlib.sha256(row["body"].encode("utf-8")).hexdigest()
        entry = json.loads(row["body"])
        if entry["seq"] != number:
            raise Bad(f"entry {number} is missing")
        if digest != row["hash"] or entry["previous"] != previous:
            raise Bad(f"entry {number} was changed, or does not follow the one before it")
        try:
            key.verify(bytes.fromhex(row["signature"]), b"sequester-ledger/v1/" + bytes.fromhex(digest))
        except InvalidSignature:
            raise Bad(f"entry {number} is not signed by the data set's key") from None
        entries.append(entry)
        previous = digest
    if not entries or entries[0]["kind"] != "founded" or entries[0]["key"] != key_hex:
        raise Bad("entry 1 does not found this data set's ledger")
    if (body["counter"], body["head"]) != (len(entries), previous):
        raise Bad(f"the file says {body['counter']} entries, {len(entries)} are there")
    return entries


def budget(entries: list[dict[str, Any]]) -> None:
    """`Bad` where a charge was not reserved, came after the study's end, or exceeds the reservation."""
    reserved: dict[tuple[str, str], int] = {}
    used: Counter[tuple[str, str]] = Counter()
    is_open: dict[str, bool] = {}
    exact: set[tuple[str, str]] = set()
    for entry in entries:
        match entry["kind"]:
            case "reserve":
                is_open[entry["study"]] = True
                exact |= {(entry["study"], name) for name in entry["exact"]}
                reserved |= {(entry["study"], e["analysis"]): e["count"] for e in entry["events"]}
            case "settle":
                is_open[entry["study"]] = False
            case "spend":
                what = (entry["study"], entry["analysis"])
                used[what] += 1
                if not is_open.get(entry["study"]) or (what not in exact and used[what] > reserved.get(what, 0)):
                    raise Bad(f"entry {entry['seq']} is a charge that nothing was reserved for")


def main() -> int:
    """0 and a summary where the file holds; 1 and the first fault where it does not."""
    parser = argparse.ArgumentParser(description="Check an exported ledger.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--key", help="the data set's public key, hex, from an earlier audit")
    parser.add_argument("--receipt", type=Path, action="append", default=[], help="a receipt the coordinator holds")
    given = parser.parse_args()
    try:
        body, signer = opened(given.file.read_bytes(), "audit")
        if given.key is not None and given.key.lower() != signer:
            raise Bad(f"signed by key {signer}, expected {given.key.lower()}")
        entries = checked(body, signer)
        budget(entries)
        for path in given.receipt:
            said = opened(path.read_bytes(), "receipt")[0]
            counter, head = said["ledger"]["counter"], said["ledger"]["head"]
            if said["data_set"] != body["data_set"]:
                raise Bad(f"{path.name} is about data set {said['data_set']}")
            if counter > len(entries) or body["rows"][counter - 1]["hash"] != head:
                raise Bad(f"{path.name} names an entry {counter} that this ledger does not hold")
    except (Bad, OSError, ValueError, KeyError, TypeError, IndexError) as fault:
        print(f"not whole: {fault}", file=sys.stderr)
        return 1
    kinds = Counter(entry["kind"] for entry in entries)
    print(f"data set {body['data_set']}: {len(entries)} entries, whole; {len(given.receipt)} receipts agree")
    print(f"key {signer}")
    print(", ".join(f"{kind} {n}" for kind, n in sorted(kinds.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
