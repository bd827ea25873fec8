"""What the exchange remembers: one SQLite file, durable before anything is answered, one process at a time.

Signed documents, decisions, the aggregators' journals, closed rounds, results, receipts. Masked vectors are not kept
beyond their round; nothing in here can open one.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sequester.protocols.errors import SequesterError, StudyError
from sequester.protocols.release import Documents
from sequester.protocols.states import StudyState, advance

WITNESSED = 8  # advertisements kept of one hospital and session: one begins it, one or two close it
_SCHEMA = """
CREATE TABLE IF NOT EXISTS studies (
    digest TEXT PRIMARY KEY, document BLOB NOT NULL, bundle BLOB NOT NULL, state TEXT NOT NULL, reason TEXT NOT NULL,
    run_id TEXT NOT NULL, epoch INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS decisions (
    digest TEXT, site TEXT, role TEXT, document BLOB NOT NULL, PRIMARY KEY (digest, site, role)
);
CREATE TABLE IF NOT EXISTS journal (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, digest TEXT NOT NULL, epoch INTEGER NOT NULL, record BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS journal_of ON journal (digest, epoch, seq);
CREATE TABLE IF NOT EXISTS rounds (
    digest TEXT, epoch INTEGER, number INTEGER, analysis TEXT, step INTEGER, attempt INTEGER, state BLOB, facts TEXT NOT NULL,
    PRIMARY KEY (digest, epoch, number)
);
CREATE TABLE IF NOT EXISTS finished (
    digest TEXT, analysis TEXT, result TEXT NOT NULL, state BLOB NOT NULL, PRIMARY KEY (digest, analysis)
);
CREATE TABLE IF NOT EXISTS results (digest TEXT PRIMARY KEY, json BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS receipts (digest TEXT, site TEXT, document BLOB NOT NULL, PRIMARY KEY (digest, site));
CREATE TABLE IF NOT EXISTS advertisements (
    key BLOB, data_set TEXT, counter INTEGER, row TEXT NOT NULL, PRIMARY KEY (key, data_set, counter)
);
CREATE TABLE IF NOT EXISTS attestations (
    digest TEXT, kind TEXT, site TEXT, document BLOB NOT NULL, PRIMARY KEY (digest, kind, site)
);
CREATE TABLE IF NOT EXISTS room (id INTEGER PRIMARY KEY, filler BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS invitations (site TEXT PRIMARY KEY, secret_sha256 BLOB NOT NULL, expires INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS enrolments (
    site TEXT PRIMARY KEY, state TEXT NOT NULL, secret_sha256 BLOB NOT NULL, request BLOB NOT NULL, certificate BLOB NOT NULL,
    member BLOB NOT NULL, skew_ms INTEGER NOT NULL
);
"""


class StoreFault(SequesterError):
    """The disk took no more, or gave back nothing: what is in memory may be ahead of what is written."""

    exit_status = 50


class Database:
    """A connection whose faults are `StoreFault`s and leave no transaction open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise self._fault(error) from None

    def execute(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """One statement."""
        try:
            return self._connection.execute(statement, values)
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise self._fault(error) from None

    def close(self) -> None:
        """Close it."""
        self._connection.close()

    def _fault(self, error: sqlite3.Error) -> StoreFault:
        return StoreFault(
            f"{self._path} cannot be written: {error}",
            hint="free disk space; nothing was sent without its record, and what runs goes on by itself",
        )


class Store:
    """The exchange's database under `folder`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise StudyError(f"another exchange runs on {folder}", hint="stop it first; nothing was changed") from None
        self.db = Database(folder / "store.db")

    def is_writable(self) -> bool:
        """Whether the disk takes a write of some size now."""
        try:
            self.db.execute("INSERT OR REPLACE INTO room VALUES (1, zeroblob(262144))")
            self.db.execute("INSERT OR REPLACE INTO room VALUES (1, x'')")
        except StoreFault:
            return False
        return True

    def close(self) -> None:
        """Close and release the lock."""
        self.db.close()
        os.close(self._lock)

    # ---- studies ------------------------------------------------------------------------------------------------

    def publish(self, digest: str, document: bytes, bundle: bytes) -> None:
        """Keep a signed study; publishing the same bytes again changes nothing."""
        self.db.execute(
            "INSERT OR IGNORE INTO studies VALUES (?, ?, ?, ?, '', '', 0)",
            (digest, document, bundle, StudyState.PUBLISHED.value),
        )

    def study(self, digest: str) -> tuple[bytes, bytes]:
        """(signed document, bundle); `StudyError` where there is none."""
        row = self.db.execute("SELECT document, bundle FROM studies WHERE digest = ?", (digest,)).fetchone()
        if row is None:
            raise StudyError(f"no study {digest[:12]} here", hint="publish it first")
        return row[0], row[1]

    def digests(self) -> list[str]:
        """Every study, oldest first."""
        return [row[0] for row in self.db.execute("SELECT digest FROM studies ORDER BY rowid")]

    def state(self, digest: str) -> StudyState:
        """Where the study stands."""
        row = self.db.execute("SELECT state FROM studies WHERE digest = ?", (digest,)).fetchone()
        if row is None:
            raise StudyError(f"no study {digest[:12]} here", hint="publish it first")
        return StudyState(row[0])

    def reason(self, digest: str) -> str:
        """Why a study ended as it did."""
        return str(self.db.execute("SELECT reason FROM studies WHERE digest = ?", (digest,)).fetchone()[0])

    def move(self, digest: str, event: str, reason: str = "") -> StudyState:
        """Advance the study by one event of the table in `protocols/states.py`."""
        state = advance(self.state(digest), event)
        self.db.execute("UPDATE studies SET state = ?, reason = ? WHERE digest = ?", (state.value, reason, digest))
        return state

    def set_run(self, digest: str, run_id: str, epoch: int) -> None:
        """The Flower run that dispatches the study, and the session's epoch."""
        self.db.execute("UPDATE studies SET run_id = ?, epoch = ? WHERE digest = ?", (run_id, epoch, digest))

    def run(self, digest: str) -> tuple[str, int]:
        """(Flower run id or "", epoch)."""
        row = self.db.execute("SELECT run_id, epoch FROM studies WHERE digest = ?", (digest,)).fetchone()
        return str(row[0]), int(row[1])

    def decide(self, digest: str, site: str, role: str, document: bytes, roles: Sequence[str] = ()) -> None:
        """Keep a site's approval (by role) or refusal (role "refusal"); approvals in other roles than `roles` are dropped:
        the site asks for another set of people now."""
        self.db.execute("BEGIN IMMEDIATE")
        if roles:
            self.db.execute(
                f"DELETE FROM decisions WHERE digest = ? AND site = ? AND role NOT IN ('refusal'{', ?' * len(roles)})",
                (digest, site, *roles),
            )
        self.db.execute("INSERT OR REPLACE INTO decisions VALUES (?, ?, ?, ?)", (digest, site, role, document))
        self.db.execute("COMMIT")

    def decisions(self, digest: str) -> dict[str, dict[str, bytes]]:
        """Site -> role -> signed decision; a role "refusal" is a no."""
        found: dict[str, dict[str, bytes]] = {}
        query = "SELECT site, role, document FROM decisions WHERE digest = ? ORDER BY site, role"
        for site, role, document in self.db.execute(query, (digest,)):
            found.setdefault(site, {})[role] = document
        return found

    # ---- rounds -------------------------------------------------------------------------------------------------

    def append(self, digest: str, epoch: int, record: bytes) -> None:
        """One journal record of a study's aggregator in one key epoch."""
        self.db.execute("INSERT INTO journal (digest, epoch, record) VALUES (?, ?, ?)", (digest, epoch, record))

    def records(self, digest: str, epoch: int) -> list[bytes]:
        """The journal of a study's epoch, oldest first."""
        query = "SELECT record FROM journal WHERE digest = ? AND epoch = ? ORDER BY seq"
        return [r for (r,) in self.db.execute(query, (digest, epoch))]

    def close_round(
        self,
        digest: str,
        epoch: int,
        number: int,
        analysis: str,
        step: int,
        attempt: int,
        state: bytes,
        facts: dict[str, Any],
        finished: tuple[dict[str, Any], bytes] | None,
    ) -> None:
        """A round whose sum was combined: what the next one starts from, or the analysis' result and state, in one commit."""
        self.db.execute("BEGIN IMMEDIATE")
        self.db.execute(
            "INSERT OR REPLACE INTO rounds VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (digest, epoch, number, analysis, step, attempt, state, json.dumps(facts)),
        )
        if finished is not None:
            self.db.execute(
                "INSERT OR REPLACE INTO finished VALUES (?, ?, ?, ?)",
                (digest, analysis, json.dumps(finished[0]), finished[1]),
            )
        self.db.execute("COMMIT")

    def last_closed(self, digest: str) -> tuple[int, str, int, bytes] | None:
        """(number, analysis, step, state) of the last closed round, None where there is none."""
        row: tuple[int, str, int, bytes] | None = self.db.execute(
            "SELECT number, analysis, step, state FROM rounds WHERE digest = ? ORDER BY rowid DESC LIMIT 1", (digest,)
        ).fetchone()
        return row

    def facts(self, digest: str) -> list[dict[str, Any]]:
        """What is known of each closed round: timings, bytes, survivors, noise on the padding."""
        query = "SELECT number, analysis, step, attempt, facts FROM rounds WHERE digest = ? ORDER BY rowid"
        return [
            {"round": n, "analysis": a, "step": s, "attempt": t, **json.loads(f)}
            for n, a, s, t, f in self.db.execute(query, (digest,))
        ]

    def finished(self, digest: str) -> dict[str, tuple[dict[str, Any], bytes]]:
        """Analysis -> (result, state)."""
        query = "SELECT analysis, result, state FROM finished WHERE digest = ?"
        return {a: (json.loads(r), s) for a, r, s in self.db.execute(query, (digest,))}

    def set_results(self, digest: str, data: bytes) -> None:
        """results.json of a study."""
        self.db.execute("INSERT OR REPLACE INTO results VALUES (?, ?)", (digest, data))

    def results(self, digest: str) -> bytes | None:
        """results.json, None before the study is done."""
        row = self.db.execute("SELECT json FROM results WHERE digest = ?", (digest,)).fetchone()
        return row[0] if row is not None else None

    def set_receipt(self, digest: str, site: str, document: bytes) -> None:
        """A site's signed receipt."""
        self.db.execute("INSERT OR REPLACE INTO receipts VALUES (?, ?, ?)", (digest, site, document))

    def receipts(self, digest: str) -> dict[str, bytes]:
        """Site -> receipt document."""
        return dict(self.db.execute("SELECT site, document FROM receipts WHERE digest = ?", (digest,)).fetchall())

    def attest(self, digest: str, kind: str, site: str, document: bytes) -> None:
        """Keep a `verdict` or `countersignature` of a hospital, or the coordinator's `waiver` (site ""); the last one counts."""
        self.db.execute("INSERT OR REPLACE INTO attestations VALUES (?, ?, ?, ?)", (digest, kind, site, document))

    def release(self, digest: str) -> Documents:
        """What is kept of a study's release."""
        found: dict[str, dict[str, bytes]] = {"verdict": {}, "waiver": {}, "countersignature": {}}
        query = "SELECT kind, site, document FROM attestations WHERE digest = ? ORDER BY site"
        for kind, site, document in self.db.execute(query, (digest,)):
            found[kind][site] = document
        return Documents(found["verdict"], found["waiver"].get(""), found["countersignature"])

    def witness(self, key: bytes, data_set: str, counter: int, row: dict[str, Any]) -> None:
        """Keep an advertisement: what a later study's peers may point at when a ledger was rolled back."""
        count = "SELECT COUNT(*) FROM advertisements WHERE key = ? AND json_extract(row, '$.session_id') = ?"
        (held,) = self.db.execute(count, (key, row["session_id"])).fetchone()
        if held >= WITNESSED:
            return
        self.db.execute(
            "INSERT OR REPLACE INTO advertisements VALUES (?, ?, ?, ?)", (key, data_set, counter, json.dumps(row))
        )

    def witnessed(self) -> Iterator[dict[str, Any]]:
        """Every advertisement ever seen."""
        for (row,) in self.db.execute("SELECT row FROM advertisements"):
            yield json.loads(row)
