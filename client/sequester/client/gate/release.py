"""The gate's side of the release gate: this installation is tried on made-up patients before it joins a study with models.

A trial is a process of its own (`release_worker.py`); its figures stay here, pass or fail is signed with the site's
identity key, is an egress row of the ledger, and goes to the exchange. A site that fails does not join. Trials start by
themselves: when the last approval is given, when the gate starts, at the latest when the study calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sequester.client.config import Home
from sequester.client.gate import approval, exchange
from sequester.client.gate.egress import Egress
from sequester.client.gate.ledger import Ledger
from sequester.protocols import release
from sequester.protocols.errors import PrivacyError, RefusalCode, SequesterError, SiteError
from sequester.protocols.faults import INSTANT
from sequester.protocols.release import Form, Tried, Verdict, Waiver, Word
from sequester.protocols.signing import canonical, open_document, raw_public, sha256, sign_document
from sequester.protocols.study import Study, study_json

log = logging.getLogger("sequester.gate")

LIMIT_S = 3600.0  # a trial takes minutes on two cores; a machine that is asked for much more than that is said to be
_LINE = 16 * 1024 * 1024
_KINDS = ("verdict", "countersignature")  # what is signed here and sent, in this order


async def try_out(study: Study, form: Form, tell: Any, log_file: Path | None = None) -> list[dict[str, Any]]:
    """The figures of one trial, a row for each private model; `SiteError` where it came to no end."""
    errors = (
        subprocess.DEVNULL if log_file is None else os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    )
    kept = {k: v for k, v in os.environ.items() if k.startswith(("PATH", "LANG", "LC_", "PYTHON", "OMP_"))}
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "sequester.client.release_worker", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=errors, env=kept, start_new_session=True, limit=_LINE,
        )  # fmt: skip
    finally:
        if log_file is not None:
            os.close(errors)
    assert process.stdin is not None and process.stdout is not None
    try:
        async with asyncio.timeout(LIMIT_S):
            request = {"study": canonical(study_json(study)).decode(), "form": form}
            with contextlib.suppress(ConnectionError):  # it died: its end is read below
                process.stdin.write(json.dumps(request).encode() + b"\n")
                await process.stdin.drain()
                process.stdin.close()
            while line := await process.stdout.readline():
                row: dict[str, Any] = json.loads(line)
                if "verdicts" in row:
                    found: list[dict[str, Any]] = row["verdicts"]
                    return found
                if "error" in row:
                    raise SiteError(f"the release gate could not run: {row['error']}", hint=str(row["hint"]))
                tell(str(row["said"]), float(row["part"]))
            status = await process.wait()
    except TimeoutError:
        raise SiteError(
            f"the release gate came to no end within {LIMIT_S / 60:.0f} minutes", hint="try a quieter machine"
        ) from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    raise SiteError(
        f"the release gate's process ended with status {status}",
        hint="free memory (1.3 GB for a large plan); log/release.log says more",
    )


@dataclass(slots=True)
class Trial:
    """One trial while it runs and after it: what it does, how far it is, and what went wrong."""

    said: str = "waiting for its turn"
    part: float = 0.0
    error: SequesterError | None = None
    task: asyncio.Task[None] | None = None

    def tell(self, said: str, part: float) -> None:
        self.said, self.part = said, part


@dataclass(slots=True)
class ReleaseGate:
    """Trials, verdicts and countersignatures of one consortium; `consortia/<name>/release/<study>/` keeps them."""

    home: Home
    consortium: str
    site: str
    ledger: Ledger
    _trials: dict[str, Trial] = field(default_factory=dict)
    _egress: dict[str, Egress] = field(default_factory=dict)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # one trial at a time: it takes a core, and memory

    # ---- what stands here ---------------------------------------------------------------------------------------

    def verdict(self, study: Study, digest: str) -> Verdict | None:
        """The last verdict on this study by the program that is installed now."""
        found = _read(self.home, self.consortium, digest, "verdict")
        if found is None:
            return None
        try:
            verdict = release.read_verdict(study, digest, self.site, found)
        except SequesterError as error:
            log.error("study %s: %s", digest[:12], error.message)
            return None
        return verdict if verdict.program == version("sequester") else None

    def word(self, study: Study, digest: str) -> Word:
        """How this site stands: passed, failed or missing."""
        verdict = self.verdict(study, digest)
        return "missing" if verdict is None else "passed" if verdict.passed else "failed"

    async def require(self, study: Study, digest: str) -> None:
        """Returns when this site may join: it passed, or it countersigned a waiver of what it lacks; else an error."""
        if not release.models(study):
            return
        fault: SequesterError | None = None
        if self.word(study, digest) == "missing":
            trial = self.start(study, digest)
            assert trial.task is not None
            await asyncio.shield(trial.task)
            fault = trial.error
        word = self.word(study, digest)
        if word == "passed":
            await self.send(digest)
            return
        waiver = countersigned(self.home, self.consortium, self.site, study, digest)
        if waiver is not None and waiver.stood.get(self.site) == word:
            log.warning("study %s: joined without a pass, by a waiver: %s", digest[:12], waiver.reason)
            return
        if fault is not None:
            raise SiteError(fault.message, hint=fault.hint, code=RefusalCode.NOT_READY)
        raise PrivacyError(
            "this installation fails the release gate: it does not keep what the study promises",
            hint=f"`sequester-client audit release {digest[:12]}` shows which check; nothing was reserved or sent",
            code=RefusalCode.NOT_READY,
        )

    # ---- trials -------------------------------------------------------------------------------------------------

    def trial(self, digest: str) -> Trial | None:
        """The last trial of a study since this process began."""
        return self._trials.get(digest)

    def start(self, study: Study, digest: str, form: Form | None = None) -> Trial:
        """The trial that runs for a study, started if none does."""
        running = self._trials.get(digest)
        if running is not None and running.task is not None and not running.task.done():
            return running
        trial = self._trials[digest] = Trial()
        trial.task = asyncio.create_task(self._run(study, digest, form or release.form_of(study), trial))
        return trial

    async def stop(self) -> None:
        """End every trial; one that was cut short leaves nothing."""
        tasks = [trial.task for trial in self._trials.values() if trial.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, study: Study, digest: str, form: Form, trial: Trial) -> None:
        try:
            async with self._turn:
                self.home.log.mkdir(mode=0o700, exist_ok=True)
                rows = await try_out(study, form, trial.tell, self.home.log / "release.log")
            self._keep(digest, form, rows)
            passed = all(row["passed"] for row in rows)
            (log.info if passed else log.error)(
                "study %s: the release gate %s here", digest[:12], "passed" if passed else "FAILED"
            )
            await self.send(digest)
        except SequesterError as error:
            log.error("study %s: %s; %s", digest[:12], error.message, error.hint)
            trial.error = error

    def _keep(self, digest: str, form: Form, rows: list[dict[str, Any]]) -> None:
        tried = [Tried(**row.pop("tried")) for row in rows]
        passed = all(row["passed"] for row in rows)
        # every trial is written down before its outcome is, so that trying until it passes is seen
        self.ledger.append("note", {"study": digest, "release": "passed" if passed else "failed"})
        attempt = sum(row.body.get("study") == digest and "release" in row.body for row in self.ledger.rows("note"))
        program = version("sequester")
        body = release.verdict_body(digest, self.site, passed, form, tried, attempt, program, _now())
        key = approval.identity(self.home, self.consortium)
        keep(self.home, self.consortium, digest, "figures", json.dumps(rows, indent=2).encode() + b"\n")
        keep(self.home, self.consortium, digest, "verdict", sign_document("verdict", body, key))

    # ---- what leaves --------------------------------------------------------------------------------------------

    async def send(self, digest: str) -> bool:
        """Hand over what the exchange has not acknowledged of a study; False where it did not answer. Ledger first."""
        for kind in _KINDS:
            document = _read(self.home, self.consortium, digest, kind)
            if (
                document is None
                or _read(self.home, self.consortium, digest, f"{kind}.sent") == sha256(document).encode()
            ):
                continue
            self._egress.setdefault(digest, Egress(self.ledger, digest)).leaves(kind.capitalize(), [document], 0)
            try:
                await asyncio.to_thread(exchange.send_attestation, self.home, self.consortium, document)
            except SequesterError as error:
                log.warning("study %s: its %s was not taken: %s", digest[:12], kind, error.message)
                return False
            keep(self.home, self.consortium, digest, f"{kind}.sent", sha256(document).encode())
        return True

    async def send_all(self) -> None:
        """Every study's, once more."""
        for folder in sorted((self.home.consortium(self.consortium) / "release").glob("*")):
            await self.send(folder.name)


# ---- a waiver, read and countersigned by a person -------------------------------------------------------------------


def countersign(
    home: Home, consortium: str, site: str, study: Study, digest: str, waiver: bytes, person: str, role: str
) -> None:
    """Sign this site's name under a waiver that the coordinator signed, and keep both for sending."""
    found = release.read_waiver(study, digest, approval.coordinator_key(home, consortium), waiver)
    body = release.countersignature_body(digest, site, found.digest, sha256(person.encode()), role, _now())
    keep(home, consortium, digest, "waiver", waiver)
    key = approval.identity(home, consortium)
    keep(home, consortium, digest, "countersignature", sign_document("countersignature", body, key))


def countersigned(home: Home, consortium: str, site: str, study: Study, digest: str) -> Waiver | None:
    """The waiver that this site countersigned, None where there is none or either signature does not hold."""
    waiver, own = (_read(home, consortium, digest, kind) for kind in ("waiver", "countersignature"))
    if waiver is None or own is None:
        return None
    try:
        found = release.read_waiver(study, digest, approval.coordinator_key(home, consortium), waiver)
        signed = open_document(own, "countersignature", raw_public(approval.identity(home, consortium))).body
    except SequesterError as error:
        log.error("study %s: %s", digest[:12], error.message)
        return None
    return found if (signed["waiver"], signed["site"]) == (found.digest, site) else None


def figures(home: Home, consortium: str, digest: str) -> list[dict[str, Any]]:
    """What the last trial measured; these stay at this site."""
    raw = _read(home, consortium, digest, "figures")
    found: list[dict[str, Any]] = [] if raw is None else json.loads(raw)
    return found


def keep(home: Home, consortium: str, digest: str, name: str, data: bytes) -> None:
    """Write one of a study's files here; it appears whole or not at all."""
    path = _path(home, consortium, digest, name)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".new")
        unfinished.write_bytes(data)
        unfinished.replace(path)
    except OSError as error:
        raise SiteError(
            f"{path} cannot be written: {error.strerror}", hint="free disk space; nothing was sent"
        ) from None


def _path(home: Home, consortium: str, digest: str, name: str) -> Path:
    return home.consortium(consortium) / "release" / digest / (name if "." in name else f"{name}.json")


def _read(home: Home, consortium: str, digest: str, name: str) -> bytes | None:
    try:
        return _path(home, consortium, digest, name).read_bytes()
    except OSError:
        return None


def _now() -> str:
    return datetime.now(UTC).strftime(INSTANT)
