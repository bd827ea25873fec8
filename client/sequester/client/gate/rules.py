"""What the signed study, the site's policy and its disk say about one round: the member's `Rules`.

Nothing here is received. The study was signed by the coordinator and approved by this site; layouts, noise and charges
are derived from it; the ledger and the record of peers' advertisements are this site's own files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from sequester.client.gate.differencing import require_no_study_less_one
from sequester.client.gate.ledger import Ledger
from sequester.client.policy import Policy
from sequester.protocols import privacy
from sequester.protocols.analyses.registry import analysis_of
from sequester.protocols.errors import PeerError, PrivacyError, RefusalCode, SiteError, StudyError
from sequester.protocols.faults import INSTANT
from sequester.protocols.secagg.member_state import Admission
from sequester.protocols.secagg.messages import KeyAdvertisement, RoundStart
from sequester.protocols.session import SessionParams
from sequester.protocols.study import Study

MAX_EPOCHS = 256  # key epochs of one study at this site; each costs entries that nobody takes back


class Witnesses:
    """The highest advertisement seen of each (site key, data set), across studies, in one small durable file (C28)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[str, dict[str, object]] = json.loads(path.read_text("utf-8")) if path.exists() else {}

    def highest(self, key: bytes, data_set: str) -> KeyAdvertisement | None:
        """The journalled advertisement, None where there is none."""
        row = self._rows.get(f"{key.hex()}/{data_set}")
        if row is None:
            return None
        return KeyAdvertisement(
            index=int(str(row["index"])),
            session_id=bytes.fromhex(str(row["session_id"])),
            kx=bytes.fromhex(str(row["kx"])),
            data_set=data_set,
            counter=int(str(row["counter"])),
            head=bytes.fromhex(str(row["head"])),
            signature=bytes.fromhex(str(row["signature"])),
        )

    def saw(self, key: bytes, seen: KeyAdvertisement) -> None:
        """Keep `seen` if it is higher than what is held; durable when this returns."""
        held = self.highest(key, seen.data_set)
        if held is not None and held.counter >= seen.counter:
            return
        row = {
            "index": seen.index,
            "session_id": seen.session_id.hex(),
            "kx": seen.kx.hex(),
            "counter": seen.counter,
            "head": seen.head.hex(),
            "signature": seen.signature.hex(),
        }
        rows = self._rows | {f"{key.hex()}/{seen.data_set}": row}
        temporary = self._path.with_suffix(".new")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(rows, file, indent=1, sort_keys=True)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
            folder = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the new name too: what a peer signed is remembered before anything is said
            finally:
                os.close(folder)
        except OSError as error:
            raise SiteError(
                f"{self._path} cannot be written: {error.strerror}",
                hint="free disk space; nothing was said, the gate takes up where it stopped",
            ) from None
        self._rows = rows


class StudyRules:
    """`Rules` of one study at one site; `now` is a clock that returns UTC, `is_refused` says whether a person said no since."""

    def __init__(
        self,
        study: Study,
        digest: str,
        policy: Policy,
        ledger: Ledger,
        pinned: frozenset[bytes],
        witnesses: Witnesses,
        epoch_floor: int,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        is_refused: Callable[[], bool] = lambda: False,
    ) -> None:
        self.pinned = pinned
        self._study = study
        self._digest = digest
        self._policy = policy
        self._ledger = ledger
        self._witnesses = witnesses
        self._epoch_floor = epoch_floor
        self._now = now
        self._is_refused = is_refused

    def epoch_floor(self) -> int:
        return self._epoch_floor

    def reserve(self, params: SessionParams) -> tuple[str, int, bytes]:
        """Reserves T + R charges of every analysis, durably, before a key is advertised; `PrivacyError` refuses."""
        if self._ledger.epochs(self._digest) >= MAX_EPOCHS:
            raise PrivacyError(
                f"the exchange has begun {MAX_EPOCHS} key epochs of this study",
                hint="ask the coordinator why; withdraw, or join an amendment",
                code=RefusalCode.EPOCH,
            )
        for proof in self._ledger.recorded("rolled-back"):
            head = self._ledger.head_at(proof["counter"])
            if head is None or head.hex() != proof["head"]:
                raise PrivacyError(
                    f"peers hold this data set's signature on ledger entry {proof['counter']}, which is not here: the "
                    "ledger was restored or cut",
                    hint="put back the newest ledger.db: what it had spent is spent",
                    code=RefusalCode.BUDGET,
                )
        exact = [plan.name for plan in self._study.analyses if plan.mode == "exact"]
        if exact:
            require_no_study_less_one(self._ledger, self._digest, self._study.roster, params.max_corrupt)
        self._ledger.reserve(self._digest, privacy.events(self._study), exact)
        counter, head = self._ledger.head()
        return self._ledger.data_set, counter, head

    def ledger_head_at(self, data_set: str, counter: int) -> bytes | None:
        return self._ledger.head_at(counter) if data_set == self._ledger.data_set else None

    def highest_seen(self, key: bytes, data_set: str) -> KeyAdvertisement | None:
        return self._witnesses.highest(key, data_set)

    def saw(self, key: bytes, advertisement: KeyAdvertisement) -> None:
        self._witnesses.saw(key, advertisement)

    def admit(self, start: RoundStart) -> Admission:
        """Whether this study allows this round here: the task must equal what this site derives for itself."""
        if self._is_refused():
            raise StudyError(
                "this site has said no to the study since it joined",
                hint="nothing more is sent; `sequester-client stop` leaves the study for good",
                code=RefusalCode.POLICY,
            )
        if self._now() > self._study.expires_at:
            raise StudyError(
                f"the study expired at {self._study.expires}",
                hint="the coordinator signs an amendment with a later expiry",
                code=RefusalCode.EXPIRED,
            )
        for paper in (*self._study.ethics, *self._study.agreement):
            if self._now() > datetime.strptime(paper.expires, INSTANT).replace(tzinfo=UTC):
                raise StudyError(
                    f"`{paper.reference}` expired at {paper.expires}, while the study ran",
                    hint="nothing more is sent; the coordinator signs an amendment with the renewed paper",
                    code=RefusalCode.EXPIRED,
                )
        plan = next((plan for plan in self._study.analyses if plan.name == start.task.analysis), None)
        if plan is None:
            raise PeerError(f"the study has no analysis `{start.task.analysis}`", hint="nothing was sent")
        if start.task.step >= analysis_of(plan).rounds(plan, self._study):
            raise PeerError(
                f"{plan.name} takes {analysis_of(plan).rounds(plan, self._study)} steps, step {start.task.step} asked",
                hint="nothing was sent",
            )
        layout = privacy.layout(self._study, plan, start.task.step)
        if start.coordinates != layout.length or start.length != privacy.codec(self._study).words(layout.length):
            raise PeerError(
                f"the round asks for {start.coordinates} numbers in {start.length} words, the study for {layout.length}",
                hint="nothing was sent",
            )
        if start.task != privacy.task_for(self._study, plan, start.task.step, start.task.attempt, start.broadcast):
            raise PeerError(
                f"the task of {plan.name}, step {start.task.step}, is not the one the signed study gives",
                hint="nothing was sent; the exchange and this site disagree about layout, clip, noise or broadcast",
            )
        privacy.check_broadcast(self._study, plan, start.task.step, start.broadcast)
        if plan.mode == "exact" and self._ledger.has_spent(self._digest, plan.name, start.task.step):
            # an epoch ago: the session's own memory of what it contributed began afresh, the ledger's did not (C27)
            raise PrivacyError(
                f"exact step {start.task.step} of {plan.name} was contributed before",
                hint="nothing was sent; an exact step that was abandoned ends its analysis",
            )
        held = plan.name in self._policy.hold_rounds
        until = int(self._now().timestamp()) + 86400 if held else 0
        return Admission(
            charges=privacy.charges(self._study, plan),
            exact=plan.mode == "exact",
            needs_hold=held,
            hold_until_unix=until,
        )
