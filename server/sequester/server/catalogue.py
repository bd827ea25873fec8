"""What lies at the exchange: signed studies, hospitals' decisions, and who is a member. Nothing here runs."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sequester.protocols.errors import StudyError
from sequester.protocols.signing import open_document, sha256
from sequester.protocols.states import FINAL, StudyState
from sequester.protocols.study import Study, parse_study
from sequester.server import decisions, enrolment
from sequester.server.store import Store


class Catalogue:
    """Studies, decisions and members, over the store."""

    def __init__(self, store: Store, consortium: str, coordinator: bytes) -> None:
        self.store = store
        self._consortium = consortium
        self._coordinator = coordinator
        self._studies: dict[str, Study] = {}

    def study(self, digest: str) -> Study:
        """The published study of that digest."""
        if digest not in self._studies:
            document, _ = self.store.study(digest)
            body = open_document(document, "study", self._coordinator).body_bytes
            self._studies[digest] = parse_study(body)
        return self._studies[digest]

    def publish(self, document: bytes, bundle: bytes) -> str:
        """Keep a study that the coordinator signed, with its bundle; its digest."""
        signed = open_document(document, "study", self._coordinator)
        study = parse_study(signed.body_bytes)
        if study.consortium != self._consortium:
            raise StudyError(f"the study is of `{study.consortium}`, this is `{self._consortium}`", hint="correct it")
        if sha256(bundle) != study.bundle:
            raise StudyError(
                f"the bundle has SHA-256 {sha256(bundle)[:12]}, the study names {study.bundle[:12]}",
                hint="publish the very file that `study sign --bundle` was given",
            )
        if struck := self._struck(study):
            raise StudyError(
                f"{', '.join(struck)}: not among the hospitals admitted here, or there with another identity key",
                hint="`sequester-server enrolments` lists them",
            )
        if study.expires_at <= datetime.now(UTC):
            raise StudyError(f"the study expired at {study.expires}", hint="sign it again with a later date")
        self.store.publish(signed.digest, document, bundle)
        if study.supersedes is not None and study.supersedes in self.store.digests():
            self._supersede(study.supersedes)
        return signed.digest

    def _supersede(self, digest: str) -> None:
        if self.store.state(digest) in (StudyState.PUBLISHED, StudyState.APPROVED, StudyState.DONE):
            self.store.move(digest, "supersede", "an amendment was published")

    def members(self) -> list[dict[str, Any]]:
        """The bodies of the coordinator's member documents."""
        return [open_document(raw, "member", self._coordinator).body for raw in enrolment.members(self.store)]

    def _struck(self, study: Study) -> list[str]:
        """Hospitals of a study whose membership has ended, or stands for another identity key."""
        admitted = {body["site"]: body["identity_key"] for body in self.members()}
        return [site.id for site in study.sites if admitted.get(site.id) != site.key]

    def addressed(self, site: str, digest: str) -> Study:
        """The study, if it is addressed to this hospital."""
        study = self.study(digest)
        if site not in study.site_ids:
            raise StudyError(f"study {digest[:12]} is not addressed to `{site}`", hint="ask the coordinator")
        return study

    def studies_for(self, site: str) -> list[bytes]:
        """The signed documents of every study that is addressed to a hospital."""
        return [self.store.study(d)[0] for d in self.store.digests() if site in self.study(d).site_ids]

    def decide(self, site: str, document: bytes) -> None:
        """Keep a hospital's signed approval or refusal, and move the study where that decides it."""
        digest, role, approvers = decisions.read(document, site, self.study)
        state = self.store.state(digest)
        if state in FINAL:
            raise StudyError(f"study {digest[:12]} is {state} already", hint="nothing is left to decide")
        self.store.decide(digest, site, role, document, approvers)
        standing = decisions.standing(self.store.decisions(digest), self.study(digest))
        if state in (StudyState.PUBLISHED, StudyState.APPROVED) and any(
            w.startswith("refused") for w in standing.values()
        ):
            refusals = ", ".join(f"{name} {word}" for name, word in standing.items() if word.startswith("refused"))
            self.store.move(digest, "too-many-refusals", refusals)
        elif state is StudyState.PUBLISHED and all(word == "approved" for word in standing.values()):
            self.store.move(digest, "enough-approvals")
