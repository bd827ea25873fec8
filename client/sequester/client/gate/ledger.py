"""The ledger of one data set: budget, approvals and everything that left, append-only and hash-chained.

Each row is canonical JSON with the hash of the row before it, signed by the data set's own key. A row is durable when
`append` returns (`synchronous=FULL`); reservations precede keys, charges precede bytes. The filter is an RDP sum at one
order, fixed when the ledger is founded (spec/privacy.md, section 7). One process writes; others may read.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from sequester.client.policy import Policy
from sequester.protocols.accounting import Event, cap, cost, epsilon_pld, epsilon_rdp
from sequester.protocols.errors import PrivacyError, RefusalCode, SiteError
from sequester.protocols.signing import canonical, raw_public, sha256

GENESIS = bytes(32)
SCHEMA = 1

_TABLE = """
CREATE TABLE IF NOT EXISTS rows (seq INTEGER PRIMARY KEY, body BLOB NOT NULL, hash BLOB NOT NULL, signature BLOB NOT NULL);
CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON rows BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON rows BEGIN SELECT RAISE(ABORT, 'append only'); END;
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One entry: `body` has schema, seq, time, kind, previous and the kind's own fields."""

    seq: int
    body: dict[str, Any]
    raw: bytes
    hash: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Balance:
    """RDP at the ledger's order: reserved by running studies, spent by ended ones, and the cap for life."""

    order: float
    delta: float
    cap: float
    reserved: float
    spent: float
    epsilon_pld: float
    exact: tuple[str, ...]

    @property
    def left(self) -> float:
        return self.cap - self.reserved - self.spent


class Ledger:
    """The ledger in `folder` (`datasets/<id>/`)."""

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        self.data_set = folder.name
        self._folder = folder
        path = folder / "ledger.db"
        if not path.exists():
            raise SiteError(f"no ledger in {folder}", hint="`sequester-client enrol` founds one for the data set")
        self._lock = -1
        if read_only:
            self._db = sqlite3.connect(f"file:{path}?mode=ro", uri=True, check_same_thread=False)
        else:
            self._take_lock()
            self._key = _load_key(folder)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
        last = self._db.execute("SELECT seq, hash FROM rows ORDER BY seq DESC LIMIT 1").fetchone()
        self._counter, self._head = last if last is not None else (0, GENESIS)
        self._founded: dict[str, Any] = next(self.rows()).body
        self._charges: dict[tuple[str, str], int] | None = None

    @classmethod
    def found(cls, folder: Path, policy: Policy) -> None:
        """Found a ledger with the policy's life budget; does nothing where one stands."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if (folder / "ledger.db").exists():
            return
        cap(float(policy.epsilon_life), float(policy.delta), float(policy.order_life))  # refuses a cap that cannot hold
        key = Ed25519PrivateKey.generate()
        descriptor = os.open(folder / "ledger.key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            file.flush()
            os.fsync(file.fileno())
        db = sqlite3.connect(folder / "ledger.db", isolation_level=None)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.executescript(_TABLE)
        body = {
            "epsilon_life": str(policy.epsilon_life), "delta": str(policy.delta), "order": str(policy.order_life),
            "data_set": folder.name, "key": raw_public(key).hex(),
        }  # fmt: skip
        raw, digest, signature = _sealed(key, 1, GENESIS, "founded", body)
        db.execute("INSERT INTO rows VALUES (?, ?, ?, ?)", (1, raw, digest, signature))
        db.close()

    def _take_lock(self) -> None:
        self._lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(self._lock, 32).decode("ascii", "replace").strip()
            os.close(self._lock)
            raise SiteError(
                f"the ledger of data set `{self.data_set}` is in use by process {holder or 'unknown'}",
                hint="one client at a time: stop the other one, nothing was changed",
            ) from None
        os.ftruncate(self._lock, 0)
        os.write(self._lock, str(os.getpid()).encode())

    def close(self) -> None:
        """Close and release the lock."""
        self._db.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # ---- rows ---------------------------------------------------------------------------------------------------

    def append(self, kind: str, fields: dict[str, Any]) -> int:
        """Append one row, durable when this returns; its number. A disk that cannot take it is a `SiteError`."""
        seq = self._counter + 1
        raw, digest, signature = _sealed(self._key, seq, self._head, kind, fields)
        try:
            self._db.execute("INSERT INTO rows VALUES (?, ?, ?, ?)", (seq, raw, digest, signature))
        except sqlite3.Error as error:
            raise SiteError(
                f"the ledger cannot be written: {error}", hint="free disk space; nothing was sent and nothing is lost"
            ) from None
        self._counter, self._head = seq, digest
        return seq

    def rows(self, kind: str | None = None) -> Iterator[Row]:
        """Every row, oldest first."""
        for seq, raw, digest, signature in self._db.execute("SELECT seq, body, hash, signature FROM rows ORDER BY seq"):
            body = json.loads(raw)
            if kind is None or body["kind"] == kind:
                yield Row(seq, body, raw, digest, signature)

    def head(self) -> tuple[int, bytes]:
        """Number and hash of the last row."""
        return self._counter, self._head

    def head_at(self, counter: int) -> bytes | None:
        """The hash of row `counter`, None where there is none."""
        row = self._db.execute("SELECT hash FROM rows WHERE seq = ?", (counter,)).fetchone()
        return row[0] if row is not None else None

    # ---- budget -------------------------------------------------------------------------------------------------

    def balance(self) -> Balance:
        """Where the budget stands."""
        order, delta = float(self._founded["order"]), float(self._founded["delta"])
        total = cap(float(self._founded["epsilon_life"]), delta, order)
        settled = {row.body["study"]: row.body for row in self.rows("settle")}
        reserved = spent = 0.0
        charged: list[Event] = []
        exact: set[str] = set()
        for row in self.rows("reserve"):
            study = row.body["study"]
            exact.update(f"{study[:12]}/{name}" for name in row.body["exact"])
            planned = [Event.from_json(event) for event in row.body["events"]]
            if study in settled:
                used = [Event.from_json(event) for event in settled[study]["events"]]
                spent += sum(cost(event, order) for event in used if event.count)
                charged += used
            else:
                reserved += sum(cost(event, order) for event in planned)
                charged += planned
        return Balance(order, delta, total, reserved, spent, epsilon_pld(charged, delta), tuple(sorted(exact)))

    def reserve(self, study: str, events: list[Event], exact: list[str]) -> None:
        """Reserve every charge of a study, spare attempts included; refused before any change where it does not fit."""
        if any(row.body["study"] == study for row in self.rows("reserve")):
            return  # a new epoch of the same study: its reservation stands, charges already spent stay spent
        now = self.balance()
        asked = sum(cost(event, now.order) for event in events)
        if asked > now.left * (1 + 1e-12):
            raise PrivacyError(
                f"the study costs {asked:.4f} at order {now.order:g}; {now.left:.4f} of {now.cap:.4f} are left "
                f"(reserved {now.reserved:.4f}, spent {now.spent:.4f})",
                hint="the data set's budget for life does not hold this study; ask for one with a smaller epsilon",
                code=RefusalCode.BUDGET,
            )
        if exact:
            self.append("exact", {"study": study, "analyses": exact})
        self.append("reserve", {"study": study, "events": [event.json() for event in events], "exact": exact})

    def spend(self, study: str, analysis: str, step: int, attempt: int) -> None:
        """One charge, written before the bytes it pays for; never beyond what was reserved."""
        reserved = {
            e["analysis"]: int(e["count"])
            for row in self.rows("reserve")
            if row.body["study"] == study
            for e in row.body["events"]
        }
        if analysis in reserved:
            used = self._spent(study).get(analysis, 0)
            if used >= reserved[analysis]:
                raise PrivacyError(f"{analysis} has spent its {reserved[analysis]} reserved charges")
        self.append("spend", {"study": study, "analysis": analysis, "step": step, "attempt": attempt})
        if self._charges is not None:
            self._charges[(study, analysis)] = self._charges.get((study, analysis), 0) + 1

    def charges_spent(self, study: str) -> dict[str, int]:
        """Charges of a study by analysis."""
        return dict(self._spent(study))

    def _spent(self, study: str) -> dict[str, int]:
        if self._charges is None:
            self._charges = {}
            for row in self.rows("spend"):
                key = (row.body["study"], row.body["analysis"])
                self._charges[key] = self._charges.get(key, 0) + 1
        return {analysis: n for (s, analysis), n in self._charges.items() if s == study}

    def settle(self, study: str) -> None:
        """The study is over here: what was spent counts from now on; what was reserved and never spent is free again."""
        reserve = next((row for row in self.rows("reserve") if row.body["study"] == study), None)
        if reserve is None or any(row.body["study"] == study for row in self.rows("settle")):
            return
        used = self._spent(study)
        events = [
            {**event, "count": used[event["analysis"]]}
            for event in reserve.body["events"]
            if used.get(event["analysis"])
        ]
        self.append("settle", {"study": study, "events": events})

    def egress(self, study: str, round_number: int, kind: str, n_bytes: int, digest: str) -> None:
        """What is about to leave: study, round, kind, bytes, SHA-256."""
        self.append("egress", {"study": study, "round": round_number, "what": kind, "bytes": n_bytes, "sha256": digest})

    def forecast(self, events: list[Event]) -> str:
        """What a study would cost, in words with figures."""
        now = self.balance()
        one = epsilon_pld(events, now.delta)
        ten = epsilon_pld(events * 10, now.delta)
        life = float(self._founded["epsilon_life"])
        after = epsilon_rdp(now.reserved + now.spent + sum(cost(e, now.order) for e in events), now.delta, now.order)
        return (
            f"This study costs epsilon {one:.2f} of your {life:g}; after it the filter stands at {after:.2f}. "
            f"Ten such studies cost {ten:.2f}, not {10 * one:.0f}."
        )


def _sealed(
    key: Ed25519PrivateKey, seq: int, previous: bytes, kind: str, fields: dict[str, Any]
) -> tuple[bytes, bytes, bytes]:
    body = {
        **fields, "schema": SCHEMA, "seq": seq, "kind": kind, "previous": previous.hex(),
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }  # fmt: skip
    raw = canonical(body)
    digest = bytes.fromhex(sha256(raw))
    return raw, digest, key.sign(b"sequester-ledger/v1/" + digest)


def _load_key(folder: Path) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key((folder / "ledger.key").read_bytes(), None)
    except (OSError, ValueError):
        raise SiteError(
            f"{folder / 'ledger.key'} is missing or damaged", hint="restore it from the key backup"
        ) from None
    assert isinstance(key, Ed25519PrivateKey)
    return key
