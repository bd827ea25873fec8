"""A site's yes or no to a study: the plain words a person reads, the document the site signs, and whether it still holds.

An approval names what it was given for: the study's digest, the frozen data, the policy, and the very text that was
shown. If any of them changed since, it no longer counts, by name.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from scipy.special import ndtr

from sequester.client.config import Home, SiteConfig
from sequester.protocols import privacy
from sequester.protocols.analyses.registry import analysis_of
from sequester.protocols.decimals import one_spelling
from sequester.protocols.errors import RefusalCode, SiteError, StudyError
from sequester.protocols.signing import fingerprint, open_document, raw_public, sha256, sign_document
from sequester.protocols.study import Study

TEMPLATE = "approval/1"


@dataclass(frozen=True, slots=True)
class Frozen:
    """What the gate may know of a frozen cohort: names and hashes, no counts."""

    data_set: str
    version: str
    exclusions: int
    ready: bool


def frozen(home: Home, config: SiteConfig, digest: str) -> Frozen:
    """The frozen cohort of a study at this site; `SiteError` where there is none."""
    path = home.dataset(config.data.id) / "cohorts" / digest / "manifest.json"
    try:
        manifest = json.loads(path.read_text("utf-8"))
        return Frozen(
            manifest["data_set"], manifest["data_set_version"], manifest["exclusions_version"], bool(manifest["ready"])
        )
    except (OSError, ValueError, KeyError):
        raise SiteError(
            "there is no frozen cohort for this study",
            hint=f"`sequester-client data freeze {digest[:12]}` makes it",
            code=RefusalCode.NOT_READY,
        ) from None


def text(study: Study, digest: str, config: SiteConfig, pinned: frozenset[bytes]) -> str:
    """What the approver reads: what it asks, what would leave, what it costs, whom it trusts."""
    params = privacy.session_params(study)
    language = config.site.language if config.site.language in study.title else next(iter(study.title))
    lines = [
        f"{study.title[language]}",
        f"Study {digest[:16]} of {study.consortium}, lineage {study.lineage}."
        + (" This is a rehearsal." if study.rehearsal else ""),
        "",
        study.summary.get(language, ""),
        f"Question: {study.question}",
        f"Purpose: {', '.join(study.purpose)}. Contact: {study.contact}. Results are kept {study.retention_days} days.",
        "Ethics: " + "; ".join(f"{r.reference} until {r.expires}" for r in study.ethics),
        "Agreement: " + "; ".join(f"{r.reference} until {r.expires}" for r in study.agreement),
        f"Expires {study.expires}.",
        "",
        f"It uses {len(study.variants)} variants, {len(study.scores)} published scores and {len(study.covariates)} "
        f"covariates to explain `{study.phenotype.name}`.",
        "What would leave this building, masked so that only the sum over hospitals opens:",
    ]
    total = 0
    for plan in study.analyses:
        layout = privacy.layout(study, plan, 0)
        attempts = privacy.charges(study, plan) if plan.mode == "private" else privacy.rounds(study, plan)
        size = privacy.codec(study).words(layout.length) * study.aggregation.ring_bits // 8
        total += size * attempts
        lines.append(
            f"  {plan.name} ({plan.kind}, {plan.mode}): {layout.coordinates} numbers, {size} bytes a round, "
            f"at most {attempts} rounds"
        )
    lines.append(f"  at most {total} bytes in all, and the messages that carry them")
    promise = privacy.promise(study)
    if promise is not None:
        lines += [
            "",
            f"Cost: epsilon {promise.pld:.3f} at delta {one_spelling(study.privacy.delta)} if every spare attempt is used "
            f"({promise.pld_without_spares:.3f} if none), one patient's whole record, {study.privacy.adjacency}.",
            f"If all other hospitals and the exchange collude: {promise.all_others_collude:.3f}. "
            f"For a patient who is in two hospitals: {promise.two_copies:.3f}.",
        ]
    for plan in study.analyses:
        if plan.mode != "exact":
            continue
        m = privacy.layout(study, plan, 0).coordinates
        power = float(ndtr(math.sqrt(m / study.n0) / math.sqrt(2)))
        lines += [
            "",
            f"`{plan.name}` is EXACT: the opened sums are not protected by differential privacy. The best test for whether "
            f"a person was in the data would be right with probability {power:.3f} (0.5 is a coin).",
        ]
        if analysis_of(plan).is_iterative(plan, study):
            lines.append("It is iterative: a dishonest exchange can read single patients.")
    lines += [
        "",
        f"Hospitals ({params.max_corrupt} may collude, {params.max_absent} may be absent, mode {params.mode}):",
    ]
    for site in sorted(study.sites, key=lambda s: s.id):
        key = bytes.fromhex(site.key)
        word = (
            "this site"
            if site.id == config.site.id
            else "pinned"
            if key in pinned
            else "NOT PINNED: counts as a colluder"
        )
        lines.append(f"  {site.id}  {fingerprint(key)[:16]}  {word}")
    if config.policy.allow_unisolated:
        lines += ["", "allow_unisolated: this site lets the process that reads DNA keep its network."]
    return "\n".join(lines) + "\n"


def sign(
    home: Home,
    consortium: str,
    config: SiteConfig,
    study: Study,
    shown: str,
    person: str,
    role: str,
    key: Ed25519PrivateKey,
) -> bytes:
    """A signed approval by one person in one role, stored and returned. Objections and missing data are refused first."""
    digest = privacy.study_digest(study)
    objections = config.policy.objections(study)
    if objections:
        first = objections[0]
        raise StudyError(first.sentence, hint="`sequester-client check` lists every objection", code=first.code)
    if role not in config.policy.approvers:
        raise SiteError(f"role `{role}` approves nothing here", hint=f"roles: {', '.join(config.policy.approvers)}")
    data = frozen(home, config, digest)
    if not data.ready:
        raise SiteError(
            "this site is not ready for the study: the frozen cohort does not meet this site's own policy",
            hint="`sequester-client data show` says why; the consortium is told nothing but `site not ready`",
            code=RefusalCode.NOT_READY,
        )
    body = _given(digest, config, data) | {
        "site": config.site.id,
        "text": sha256(shown.encode()),
        "template": TEMPLATE,
        "person": sha256(person.encode()),
        "role": role,
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    for other in _approvals(home, consortium, digest, raw_public(key)):
        if other["role"] != role and other["person"] == body["person"]:
            raise SiteError(
                "the same person cannot approve in two roles", hint="a second approver is needed: another person"
            )
    document = sign_document("approval", body, key)
    _store(home, consortium, digest, f"{role}.json", document)
    return document


def refuse(
    home: Home, consortium: str, config: SiteConfig, digest: str, code: RefusalCode, key: Ed25519PrivateKey
) -> bytes:
    """A signed refusal with a public code, stored and returned; approvals given before no longer count."""
    body = {"study": digest, "site": config.site.id, "code": code.value}
    document = sign_document("refusal", body, key)
    _store(home, consortium, digest, "refusal.json", document)
    return document


def require_approved(home: Home, consortium: str, config: SiteConfig, study: Study, signer: bytes) -> None:
    """Nothing where this site's approval of the study holds; else an error that names what is missing or changed."""
    digest = privacy.study_digest(study)
    if config.site.id not in study.site_ids:
        raise StudyError(f"the study is not addressed to `{config.site.id}`", hint="refuse it", code=RefusalCode.STUDY)
    own = bytes.fromhex(next(site.key for site in study.sites if site.id == config.site.id))
    if own != signer:
        raise StudyError("the study names another key for this site", hint="refuse it", code=RefusalCode.ROSTER)
    if datetime.now(UTC) > study.expires_at:
        raise StudyError(
            f"the study expired at {study.expires}", hint="wait for an amendment", code=RefusalCode.EXPIRED
        )
    if (_folder(home, consortium, digest) / "refusal.json").exists():
        raise StudyError("this site refused the study", hint="an amendment is a new study", code=RefusalCode.POLICY)
    objections = config.policy.objections(study)
    if objections:
        raise StudyError(objections[0].sentence, hint="the policy says no", code=objections[0].code)
    given = _given(digest, config, frozen(home, config, digest))
    valid = {}
    for body in _approvals(home, consortium, digest, own):
        for name, value in given.items():
            if body[name] != value:
                raise SiteError(
                    f"the approval by `{body['role']}` was given for another {name.replace('_', ' ')}",
                    hint="read the study again and approve again",
                    code=RefusalCode.NOT_READY,
                )
        valid[body["role"]] = body["person"]
    missing = [role for role in config.policy.approvers if role not in valid]
    if missing:
        raise SiteError(
            f"not approved yet: {len(missing)} of {len(config.policy.approvers)} approvers are missing "
            f"({', '.join(missing)})",
            hint=f"`sequester-client approve {digest[:12]} --role {missing[0]} --person NAME`",
            code=RefusalCode.NOT_READY,
        )
    if len(set(valid.values())) < len(valid):
        raise SiteError(
            "two roles were filled by one person", hint="a second approver is needed", code=RefusalCode.NOT_READY
        )


def _given(digest: str, config: SiteConfig, data: Frozen) -> dict[str, Any]:
    return {
        "study": digest,
        "data_set": data.data_set,
        "data_set_version": data.version,
        "exclusions_version": data.exclusions,
        "policy": config.policy.digest(),
    }


def _folder(home: Home, consortium: str, digest: str) -> Path:
    return home.consortium(consortium) / "approvals" / digest


def _store(home: Home, consortium: str, digest: str, name: str, document: bytes) -> None:
    folder = _folder(home, consortium, digest)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = folder / (name + ".new")
    temporary.write_bytes(document)
    temporary.replace(folder / name)


def _approvals(home: Home, consortium: str, digest: str, signer: bytes) -> list[dict[str, Any]]:
    found = []
    for path in sorted(_folder(home, consortium, digest).glob("*.json")):
        if path.name != "refusal.json":
            found.append(open_document(path.read_bytes(), "approval", signer).body)
    return found
