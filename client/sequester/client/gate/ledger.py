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
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from sequester.client.gate.reckoning import Life
from sequester.client.policy import Policy
from sequester.protocols.accounting import Event, cap, cost, epsilon_pld, epsilon_rdp
from sequester.protocols.errors import PrivacyError, RefusalCode, SiteError
from sequester.protocols.signing import canonical, raw_public, sha256

GENESIS = bytes(32)
SCHEMA = 1
RARE = ("cohort", "rolled-back")  # kinds of entry of which a data set has few
_RESTORE = "restore the newest copy, then `sequester-client audit verify`"

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


@dataclass(slots=True)
class _Standing:
    """One study in the ledger: what it may release, what it has released, and whether it is over."""

    planned: dict[str, Event] = field(default_factory=dict)
    exact: set[str] = field(default_factory=set)
    used: Counter[str] = field(default_factory=Counter)
    steps: set[tuple[str, int]] = field(default_factory=set)
    open: bool = False

    def spent(self) -> list[Event]:
        """Events of the private charges made so far."""
        return [replace(event, count=self.used[name]) for name, event in self.planned.items() if self.used[name]]

    def charged(self) -> list[Event]:
        """What counts against the budget: everything reserved while the study runs, what was spent when it is over."""
        return list(self.planned.values()) if self.open else self.spent()


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
            self._key = signing_key(folder)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=FULL")
            except sqlite3.OperationalError as error:
                self.close()
                raise SiteError(
                    f"the ledger cannot be written: {error}", hint="free disk space; nothing is lost"
                ) from None
            except sqlite3.DatabaseError as error:
                self.close()
                raise SiteError(f"the ledger in {folder} is damaged: {error}", hint=_RESTORE) from None
        self._is_read_only = read_only
        self._counter: int = 0
        self._head: bytes = GENESIS
        self._standings: dict[str, _Standing] = {}
        self._epochs: dict[str, list[int]] = {}  # study -> [highest, how many]
        self._rare: dict[str, list[dict[str, Any]]] = {}
        self._founded: dict[str, Any] = self._read()

    @classmethod
    def found(cls, folder: Path, policy: Policy) -> None:
        """Found a ledger with the policy's life budget; does nothing where one stands.

        `ledger.db` appears whole or not at all. A key without a ledger is refused: a new ledger would be a new budget.
        """
        path, unfinished = folder / "ledger.db", folder / "ledger.db.new"
        if path.exists():
            return
        cap(float(policy.epsilon_life), float(policy.delta), float(policy.order_life))  # refuses a cap that cannot hold
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not unfinished.exists():
            if (folder / "ledger.key").exists():
                raise SiteError(
                    f"{folder} has a ledger's key and no ledger", hint="restore ledger.db: a new one would spend twice"
                )
            unfinished.touch(mode=0o600)
        if (folder / "ledger.key").exists():
            (folder / "ledger.key").unlink()  # founding was cut short: nothing was ever signed with it
        unfinished.write_bytes(b"")
        key = Ed25519PrivateKey.generate()
        descriptor = os.open(folder / "ledger.key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            file.flush()
            os.fsync(file.fileno())
        body = {
            "epsilon_life": str(policy.epsilon_life), "delta": str(policy.delta), "order": str(policy.order_life),
            "data_set": folder.name, "key": raw_public(key).hex(),
        }  # fmt: skip
        db = sqlite3.connect(unfinished, isolation_level=None)
        db.execute("PRAGMA synchronous=FULL")
        db.executescript(_TABLE)
        db.execute("INSERT INTO rows VALUES (?, ?, ?, ?)", (1, *_sealed(key, 1, GENESIS, "founded", body)))
        db.close()
        unfinished.replace(path)
        directory = os.open(folder, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)

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
        return self.append_many([(kind, fields)])

    def append_many(self, entries: Sequence[tuple[str, dict[str, Any]]]) -> int:
        """Append rows in one commit: all of them or none; the last one's number."""
        seq, head, sealed, bodies = self._counter, self._head, [], []
        for kind, fields in entries:
            seq += 1
            raw, digest, signature = _sealed(self._key, seq, head, kind, fields)
            sealed.append((seq, raw, digest, signature))
            bodies.append(json.loads(raw))
            head = digest
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT INTO rows VALUES (?, ?, ?, ?)", sealed)
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise SiteError(
                f"the ledger cannot be written: {error}", hint="free disk space; nothing was sent and nothing is lost"
            ) from None
        self._counter, self._head = seq, head
        for body in bodies:
            self._take(body)
        return seq

    def _read(self) -> dict[str, Any]:
        """Take in every row; the first one's body."""
        self._counter, self._head, self._standings, self._epochs, self._rare = 0, GENESIS, {}, {}, {}
        founded: dict[str, Any] = {}
        try:
            for row in self.rows():
                if row.body["schema"] != SCHEMA:
                    self.close()
                    raise SiteError(
                        f"entry {row.seq} of the ledger has schema {row.body['schema']}, this version reads {SCHEMA}",
                        hint="install the version that wrote it; nothing was changed",
                    )
                founded = founded or row.body
                self._take(row.body)
                self._counter, self._head = row.seq, row.hash
        except (sqlite3.DatabaseError, ValueError, KeyError, TypeError):
            founded = {}
        if founded.get("kind") != "founded":
            self.close()
            raise SiteError(
                f"the ledger of data set `{self.data_set}` cannot be read beyond entry {self._counter}",
                hint=_RESTORE,
            )
        return founded

    def _take(self, body: dict[str, Any]) -> None:
        """What one row changes: the last `reserve` or `settle` of a study says whether it is open."""
        kind = body["kind"]
        if kind == "egress" and "epoch" in body:
            held = self._epochs.setdefault(body["study"], [-1, 0])
            if int(body["epoch"]) > held[0]:
                held[0], held[1] = int(body["epoch"]), held[1] + 1
        if kind in RARE:
            self._rare.setdefault(kind, []).append(body)
        if kind not in ("reserve", "exact", "spend", "settle"):
            return
        standing = self._standings.setdefault(body["study"], _Standing())
        match kind:
            case "reserve":
                standing.planned = {e["analysis"]: Event.from_json(e) for e in body["events"]}
                standing.exact.update(body["exact"])
                standing.open = True
            case "exact":
                standing.exact.update(body["analyses"])
            case "spend":
                standing.used[body["analysis"]] += 1
                standing.steps.add((body["analysis"], body["step"]))
            case "settle":
                standing.open = False

    def _studies(self) -> dict[str, _Standing]:
        if self._is_read_only:
            self._read()  # another process may have written since
        return self._standings

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
        studies = self._studies()
        order, delta = float(self._founded["order"]), float(self._founded["delta"])
        total = cap(float(self._founded["epsilon_life"]), delta, order)
        reserved, spent = self._totals()
        exact = sorted(f"{study[:12]}/{name}" for study, standing in studies.items() for name in standing.exact)
        return Balance(order, delta, total, reserved, spent, epsilon_pld(self.charged(), delta), tuple(exact))

    def charged(self) -> list[Event]:
        """Every event that counts against the budget: reserved by running studies, spent by ended ones."""
        return [event for standing in self._studies().values() for event in standing.charged()]

    def life(self) -> Life:
        """What a receipt says of the whole ledger: its charges, like ones together, its delta, and its exact releases."""
        together: Counter[tuple[float, float]] = Counter()
        for event in self.charged():
            together[event.sigma, event.q] += event.count
        events = tuple(Event("", sigma, count, q) for (sigma, q), count in sorted(together.items()))
        exact = (f"{study[:12]}/{name}" for study, standing in self._studies().items() for name in standing.exact)
        return Life(events, str(self._founded["delta"]), tuple(sorted(exact)))

    def _totals(self) -> tuple[float, float]:
        """(reserved by running studies, spent by ended ones) as RDP at the ledger's order."""
        order = float(self._founded["order"])
        totals = {True: 0.0, False: 0.0}
        for standing in self._standings.values():
            totals[standing.open] += sum(cost(event, order) for event in standing.charged())
        return totals[True], totals[False]

    def reserve(self, study: str, events: list[Event], exact: list[str]) -> None:
        """Reserve every charge of a study, spare attempts included; refused before any change where it does not fit.

        A running study keeps its reservation in a new epoch. One that was settled and comes back reserves what it gave
        back, and charges that it has spent stay spent.
        """
        held = self._studies().get(study, _Standing())
        if held.open:
            return
        order = float(self._founded["order"])
        total = cap(float(self._founded["epsilon_life"]), float(self._founded["delta"]), order)
        reserved, spent = self._totals()
        asked = sum(cost(event, order) for event in events) - sum(cost(event, order) for event in held.spent())
        left = total - reserved - spent
        if asked > left * (1 + 1e-12):
            raise PrivacyError(
                f"the study costs {asked:.4f} at order {order:g}; {left:.4f} of {total:.4f} are left "
                f"(reserved {reserved:.4f}, spent {spent:.4f})",
                hint="the data set's budget for life does not hold this study; ask for one with a smaller epsilon",
                code=RefusalCode.BUDGET,
            )
        rows: list[tuple[str, dict[str, Any]]] = []
        if exact:
            rows.append(("exact", {"study": study, "analyses": exact}))
        rows.append(("reserve", {"study": study, "events": [event.json() for event in events], "exact": exact}))
        self.append_many(rows)

    def spend(self, study: str, analysis: str, step: int, attempt: int) -> None:
        """One charge, written before the bytes it pays for; never beyond what was reserved, never after the end."""
        held = self._standings.get(study, _Standing())
        if not held.open or (analysis not in held.planned and analysis not in held.exact):
            raise PrivacyError(
                f"nothing is reserved for {analysis} of study {study[:12]}",
                hint="nothing was sent; a study that ended here comes back with a new epoch only",
                code=RefusalCode.BUDGET,
            )
        if analysis in held.planned and held.used[analysis] >= held.planned[analysis].count:
            raise PrivacyError(
                f"{analysis} has spent its {held.planned[analysis].count} reserved charges",
                hint="nothing was sent; the study ends for this analysis",
                code=RefusalCode.BUDGET,
            )
        self.append("spend", {"study": study, "analysis": analysis, "step": step, "attempt": attempt})

    def has_spent(self, study: str, analysis: str, step: int) -> bool:
        """True where one step of an analysis was charged before."""
        return (analysis, step) in self._studies().get(study, _Standing()).steps

    def is_committed(self, study: str) -> bool:
        """True where a study has charges reserved here, or has spent one."""
        held = self._studies().get(study, _Standing())
        return held.open or bool(held.used)

    def charges_spent(self, study: str) -> dict[str, int]:
        """Charges of a study by analysis."""
        return dict(self._studies().get(study, _Standing()).used)

    def settle(self, study: str) -> None:
        """The study is over here: what was spent counts from now on; what was reserved and never spent is free again."""
        held = self._standings.get(study)
        if held is None or not held.open:
            return
        self.append("settle", {"study": study, "events": [event.json() for event in held.spent()]})

    def egress(
        self,
        study: str,
        round_number: int,
        kind: str,
        n_bytes: int,
        digest: str,
        epoch: int | None = None,
        times: int = 1,
    ) -> None:
        """What is about to leave: study, round, kind, bytes, SHA-256; of a key advertisement also its epoch.

        `times` above 1: the same bytes again, at most so often until the next entry of them.
        """
        row: dict[str, Any] = {"study": study, "round": round_number, "what": kind, "bytes": n_bytes, "sha256": digest}
        if times > 1:
            row["times"] = times
        self.append("egress", row if epoch is None else row | {"epoch": epoch})

    def epoch(self, study: str) -> int:
        """The highest key epoch advertised for a study, -1 where there is none: it outlives the journal (C3)."""
        return self._epochs.get(study, [-1, 0])[0]

    def epochs(self, study: str) -> int:
        """How many key epochs were advertised for a study."""
        return self._epochs.get(study, [-1, 0])[1]

    def recorded(self, kind: str) -> list[dict[str, Any]]:
        """Bodies of the entries of a kind in RARE, oldest first, from memory: asked whenever a study begins."""
        assert kind in RARE
        return self._rare.get(kind, [])

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


def signing_key(folder: Path) -> Ed25519PrivateKey:
    """The data set's own key, which signs every entry."""
    try:
        key = load_pem_private_key((folder / "ledger.key").read_bytes(), None)
    except (OSError, ValueError):
        raise SiteError(
            f"{folder / 'ledger.key'} is missing or damaged", hint="restore it from the key backup"
        ) from None
    assert isinstance(key, Ed25519PrivateKey)
    return key
