"""The gate's memory of one protocol session: what must survive a crash before anything is said.

Append-only records of the `member` state machine, each sealed with AES-256-GCM under a key derived from the site's
identity, committed with `synchronous=FULL` before the message that follows them is sent; and the outbox, the one masked
vector a crashed site re-sends byte for byte (spec/secure-aggregation.md, 7 and 11; C25). Records hold session secrets:
whoever reads both this file and the identity key can open this site's contributions of the study.

One process at a time, and one session: the study's folder, above those of its key epochs, is locked for as long as a
journal of it is open (C25).
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import struct
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sequester.protocols.errors import SiteError
from sequester.protocols.packets import pieces, unpacked
from sequester.protocols.secagg.messages import MaskedInput
from sequester.protocols.wire import Limits, Reader, frames

_LENGTH = struct.Struct(">I")


class Journal:
    """Records and outbox of one session of a study under `folder`, `<study>/<epoch>`; `limits` bound the outbox."""

    def __init__(self, folder: Path, identity_secret: bytes, limits: Limits) -> None:
        self._folder = folder
        self._limits = limits
        self._seal = AESGCM(HKDF(SHA256(), 32, salt=None, info=b"sequester-journal/v1").derive(identity_secret))
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(folder.parent / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise SiteError(
                f"the journal {folder} cannot be opened: {error.strerror}",
                hint="free disk space, or let the gate write there",
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise SiteError(
                f"{folder.parent} is in use by another gate process",
                hint="one gate serves a study; stop the other one (`sequester-client run` shows its process id)",
            ) from None
        self._db = sqlite3.connect(folder / "journal.db", isolation_level=None, check_same_thread=False)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("CREATE TABLE IF NOT EXISTS records (seq INTEGER PRIMARY KEY, sealed BLOB NOT NULL)")
            (self._count,) = self._db.execute("SELECT COUNT(*) FROM records").fetchone()
        except sqlite3.Error as error:
            self.close()
            raise self._fault(error) from None

    def records(self) -> list[bytes]:
        """Every record, oldest first; one that does not open is a `SiteError`: the disk or the identity changed."""
        opened = []
        for seq, sealed in self._db.execute("SELECT seq, sealed FROM records ORDER BY seq"):
            try:
                opened.append(self._seal.decrypt(sealed[:12], sealed[12:], seq.to_bytes(8, "big")))
            except InvalidTag:
                raise SiteError(
                    f"journal record {seq} of {self._folder} does not open",
                    hint="restore nothing by hand: withdraw from the study; the consortium starts a new epoch",
                ) from None
        return opened

    def append(self, record: bytes) -> None:
        """Durable when this returns; a full disk is a `SiteError` and nothing of the record is left behind."""
        nonce = os.urandom(12)
        sealed = nonce + self._seal.encrypt(nonce, record, (self._count + 1).to_bytes(8, "big"))
        try:
            self._db.execute("INSERT INTO records (seq, sealed) VALUES (?, ?)", (self._count + 1, sealed))
        except sqlite3.Error as error:
            raise self._fault(error) from None
        self._count += 1

    def _fault(self, error: sqlite3.Error) -> SiteError:
        return SiteError(
            f"the journal {self._folder} cannot be written: {error}",
            hint="free disk space; the gate takes up where it stopped, nothing was sent",
        )

    def store_outbox(self, message: MaskedInput) -> None:
        """Keep the bytes of one masked input, replacing the last round's; atomic and durable. They are ciphertext."""
        temporary = self._folder / "outbox.new"
        try:
            with temporary.open("wb") as file:
                for frame in frames(message):
                    parts = pieces(frame)
                    file.write(_LENGTH.pack(sum(map(len, parts))))
                    for part in parts:
                        file.write(part)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._folder / "outbox")
            folder = os.open(self._folder, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        except OSError as error:
            raise SiteError(
                f"the outbox in {self._folder} cannot be written: {error.strerror}",
                hint="free disk space; nothing was sent, the round counts this site as absent",
            ) from None

    def outbox(self) -> MaskedInput | None:
        """The stored masked input, None where there is none."""
        path = self._folder / "outbox"
        if not path.exists():
            return None
        reader = Reader(self._limits)
        with path.open("rb") as file:
            while head := file.read(_LENGTH.size):
                message = reader.take(unpacked(file.read(*_LENGTH.unpack(head))))
                if isinstance(message, MaskedInput):
                    return message
        return None

    def close(self) -> None:
        """Release the lock; safe to call twice."""
        self._db.close()
        if self._lock >= 0:  # once: the number may belong to another file by now
            os.close(self._lock)
            self._lock = -1
