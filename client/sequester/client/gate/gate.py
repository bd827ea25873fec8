"""The gate of one hospital: one process, keys and policy, every stream and every number that leaves.

It waits for `join` messages that Flower brings (or finds studies its journals say were under way), checks approval,
policy and isolation, and runs one `Session` for each study. It listens on unix sockets and loopback only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from sequester.client.config import Home, SiteConfig
from sequester.client.gate import approval, delivery, differencing, exchange, peers, tls
from sequester.client.gate.custodian import Custodian
from sequester.client.gate.egress import Egress, Seldom
from sequester.client.gate.journal import Journal
from sequester.client.gate.ledger import Ledger
from sequester.client.gate.reckoning import reckoned
from sequester.client.gate.release import ReleaseGate
from sequester.client.gate.rules import StudyRules, Witnesses
from sequester.client.gate.session import DISK_S, Progress, Session
from sequester.protocols import privacy, release
from sequester.protocols.errors import RefusalCode, SequesterError, SiteError, StudyError
from sequester.protocols.secagg.member import Member
from sequester.protocols.signing import canonical, sign_document
from sequester.protocols.study import Study, study_json
from sequester.protocols.wire import Limits

log = logging.getLogger("sequester.gate")

JOIN_S = 50.0  # below the 60 s after which the ClientApp answers "not yet" (spec/flower.md, 4.2.5)


class Consortium:
    """One consortium this hospital belongs to: its folder, its identity, its running studies."""

    def __init__(self, home: Home, name: str, config: SiteConfig, ledger: Ledger) -> None:
        self.name = name
        self.folder = home.consortium(name)
        self.sessions: dict[str, Session] = {}
        self.release = ReleaseGate(home, name, config.site.id, ledger)
        self._home = home
        self._config = config
        self._ledger = ledger
        self._tasks: dict[str, asyncio.Task[str]] = {}
        self._deliveries: dict[str, asyncio.Task[None]] = {}
        self._refused = Seldom()
        self._witnesses = Witnesses(self.folder / "advertisements.json")
        self._identity = approval.identity(home, name)

    # ---- what the door asks -------------------------------------------------------------------------------------

    async def bundle_approved(self, sha256: str) -> bool:
        """True where some study approved here names this bundle."""
        for digest in self._known():
            try:
                study = self._approved(digest)
            except SequesterError:
                continue
            if study.bundle == sha256:
                return True
        return False

    def rows(self) -> list[dict[str, object]]:
        """What `sequester-client status` shows of the studies that run: counts and bytes."""
        return [
            {"study": digest, "consortium": self.name, "held": session.holds, **asdict(session.progress)}
            for digest, session in self.sessions.items()
        ]

    async def join(self, digest: str, bundle: str) -> tuple[str, str]:
        """("joined", ""), ("not yet", "") or ("refused", public code); the full reason goes to this site's log."""
        until = asyncio.get_running_loop().time() + JOIN_S
        try:
            if (recorded := self.outcome(digest)) is not None:
                return ("joined", "") if recorded == "done" else ("refused", RefusalCode.STUDY)
            study = self._approved(digest)
            if study.bundle != bundle:
                raise StudyError(
                    f"study {digest[:12]} names bundle {study.bundle[:12]}, Flower brought {bundle[:12]}",
                    hint="refuse; ask the coordinator which program was meant",
                    code=RefusalCode.STUDY,
                )
            try:
                async with asyncio.timeout_at(until):
                    await self.release.require(study, digest)
            except TimeoutError:
                return "not yet", ""  # the trial goes on, and the study calls again
            session = await self.begin(study, digest)
        except SequesterError as error:
            code = (error.code or RefusalCode.NOT_READY).value
            if times := self._refused.times(f"{digest} {code} {error.message}"):
                log.error("study %s refused: %s (%d times so far)", digest[:12], error.message, times)
                self._ledger.append("note", {"study": digest, "refused": code, "times": times})
            return "refused", (error.code or RefusalCode.NOT_READY).value
        try:
            async with asyncio.timeout_at(until):
                await session.stands.wait()
        except TimeoutError:
            return "not yet", ""
        return "joined", ""

    # ---- sessions -----------------------------------------------------------------------------------------------

    async def begin(self, study: Study, digest: str) -> Session:
        """The running session of an approved study, started if it was not; isolation and cohort are checked first."""
        if digest in self.sessions:
            return self.sessions[digest]
        session = self._session(study, digest)
        try:
            await session.ready_compute()
            differencing.join(
                self._ledger,
                self._home.dataset(self._ledger.data_set),
                digest,
                exact=any(plan.mode == "exact" for plan in study.analyses),
                floor=self._config.policy.minimum_cell,
                roster=study.roster,
                max_corrupt=privacy.session_params(study).max_corrupt,
                events=privacy.events(study),
            )
        except BaseException:
            await session.discard()  # or its lock would refuse the next join
            raise
        self.sessions[digest] = session
        self._tasks[digest] = asyncio.create_task(self._run(digest, session))
        return session

    async def resume(self) -> None:
        """Take up every study that a journal says was under way when the gate ended, and every receipt on its way.

        Approved studies whose release gate has not run are tried.
        """
        for receipt in sorted((self.folder / "receipts").glob("*.json")):
            if self.outcome(receipt.stem) is not None:
                self._deliver(receipt.stem, Egress(self._ledger, receipt.stem))
        for folder in sorted((self.folder / "journal").glob("*")):
            if self.outcome(folder.name) is None:
                try:
                    await self.begin(self._approved(folder.name), folder.name)
                except SequesterError as error:
                    log.error("study %s is not taken up again: %s", folder.name[:12], error.message)
        for digest in self._known():
            if self.outcome(digest) is None:
                with contextlib.suppress(SequesterError):
                    self.try_out(digest)

    def try_out(self, digest: str) -> None:
        """Start the trial of an approved study that has models and no verdict; an error where it is not approved."""
        study = self._approved(digest)
        if release.models(study) and self.release.verdict(study, digest) is None:
            self.release.start(study, digest)

    async def stop(self) -> None:
        """End every session's work here; the journals keep what is needed to go on."""
        await self.release.stop()
        tasks = [*self._tasks.values(), *self._deliveries.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def outcome(self, digest: str) -> str | None:
        """How a study ended at this site, None while it has not."""
        path = self.folder / "outcomes" / digest
        return path.read_text("ascii") if path.exists() else None

    async def _run(self, digest: str, session: Session) -> str:
        try:
            final = await session.run()
            await self._write_outcome(digest, final)
            # the session's keys end with it: with them and this site's identity its past contributions could be opened
            shutil.rmtree(self.folder / "journal" / digest, ignore_errors=True)
            log.info("study %s ended here: %s", digest[:12], final)
            if session.is_receipt_kept:
                with contextlib.suppress(OSError):  # sent once more, then
                    delivery.mark(self._receipt_path(digest)).touch()
            else:
                self._deliver(digest, session.egress)
            return final
        finally:
            del self.sessions[digest]

    def _receipt_path(self, digest: str) -> Path:
        return self.folder / "receipts" / f"{digest}.json"

    def _deliver(self, digest: str, egress: Egress) -> None:
        """Have a receipt sent until the exchange has kept it."""
        receipt = self._receipt_path(digest)
        if receipt.exists() and not delivery.mark(receipt).exists():
            sending = delivery.deliver(receipt, digest, egress, lambda: tls.site_channel_aio(self.folder))
            self._deliveries[digest] = asyncio.create_task(sending)

    async def _write_outcome(self, digest: str, final: str) -> None:
        path = self.folder / "outcomes" / digest
        unfinished = path.with_suffix(".new")
        said = False
        while True:
            try:
                path.parent.mkdir(mode=0o700, exist_ok=True)
                unfinished.write_text(final, "ascii")
                unfinished.replace(path)
                return
            except OSError as error:
                if not said:
                    log.error("study %s: its end cannot be written: %s; free disk space", digest[:12], error.strerror)
                said = True
                await asyncio.sleep(DISK_S)

    def _session(self, study: Study, digest: str) -> Session:
        cohort = self._home.dataset(self._ledger.data_set) / "cohorts" / digest
        limits = Limits.for_study(study)

        def keep(after_epoch: int | None) -> tuple[Member, Journal]:
            return self._member(study, digest, limits, after_epoch)

        async def start_compute() -> Custodian:
            text = canonical(study_json(study)).decode()
            self._home.log.mkdir(mode=0o700, exist_ok=True)
            log_file = self._home.log / f"compute-{digest[:12]}.log"
            allow, device = self._config.policy.allow_unisolated, self._config.compute.device
            return await Custodian.start(text, cohort, allow, log_file, device)

        async def receipt(progress: Progress, state: str) -> bytes:
            life = await asyncio.to_thread(reckoned, self._ledger.life())
            data = self._receipt(study, digest, session, progress, state, life)
            path = self._receipt_path(digest)
            try:
                path.parent.mkdir(mode=0o700, exist_ok=True)
                path.write_bytes(data)
            except OSError as error:
                raise SiteError(
                    f"the receipt of study {digest[:12]} cannot be written: {error.strerror}",
                    hint="free disk space; it is written and sent then",
                ) from None
            return data

        session = Session(
            study,
            digest,
            keep,
            self._ledger,
            start_compute,
            lambda: tls.site_channel_aio(self.folder),
            receipt,
            limits,
        )
        return session

    def _member(self, study: Study, digest: str, limits: Limits, after_epoch: int | None) -> tuple[Member, Journal]:
        """The member as its journal has it; with `after_epoch` a new one, for an epoch beyond that.

        Each session has a folder of its own, named by the lowest epoch it may have; what is in an older one is never
        opened for work again.
        """
        folder = self.folder / "journal" / digest
        epochs = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
        floor = self._ledger.epoch(digest)  # the ledger's word stands where the journal was deleted
        number = max(epochs, default=floor + 1) if after_epoch is None else max(after_epoch, floor) + 1
        secret = self._identity.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
        journal = Journal(folder / str(number), secret, limits)
        for older in epochs:
            if older < number:  # the keys of a session that is over
                shutil.rmtree(folder / str(older), ignore_errors=True)
        rules = StudyRules(
            study,
            digest,
            self._config.policy,
            self._ledger,
            peers.pinned(self._home, self.name),
            self._witnesses,
            epoch_floor=max(number - 1, floor),
            is_refused=lambda: approval.is_refused(self._home, self.name, digest),
        )
        index = study.site_ids.index(self._config.site.id)
        member = Member.restore(
            journal.records(), journal.outbox(), privacy.session_params(study), index, self._identity.sign, rules,
            os.urandom,
        )  # fmt: skip
        return member, journal

    def stored(self, digest: str) -> Study:
        """A study as it was published to this site."""
        return exchange.stored_study(self._home, self.name, digest)[0]

    def _approved(self, digest: str) -> Study:
        study, document = exchange.stored_study(self._home, self.name, digest)
        approval.require_approved(self._home, self.name, self._config, study, document)
        return study

    def _known(self) -> list[str]:
        return sorted(path.stem for path in (self.folder / "studies").glob("*.json"))

    def _receipt(
        self, study: Study, digest: str, session: Session, progress: Progress, state: str, life: dict[str, Any]
    ) -> bytes:
        counter, head = self._ledger.head()
        body = {
            "study": digest,
            "site": self._config.site.id,
            "data_set": self._ledger.data_set,
            "state": state,
            "rounds": progress.rounds,
            "bytes_up": progress.bytes_up,
            "charges": self._ledger.charges_spent(digest),
            "isolation": session.isolation,
            "allow_unisolated": self._config.policy.allow_unisolated,
            "exact": [plan.name for plan in study.analyses if plan.mode == "exact"],
            "ledger": {"counter": counter, "head": head.hex()},
            "life": life,
            "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        return sign_document("receipt", body, self._identity)
