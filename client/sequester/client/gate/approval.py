"""A site's yes or no to a study: the plain words a person reads, the document the site signs, and whether it still holds.

An approval names what it was given for: the study's digest, the frozen data, the policy, and the very text that was
shown. If any of them changed since, it no longer counts, by name. Everything here fails closed: a file that is missing,
unreadable or not signed by this site is no approval.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from sequester.client.config import Home, SiteConfig
from sequester.client.policy import Objection
from sequester.protocols import privacy, release
from sequester.protocols.analyses.registry import CONSENT, analysis_of
from sequester.protocols.decimals import one_spelling
from sequester.protocols.errors import RefusalCode, SiteError, StudyError
from sequester.protocols.faults import INSTANT
from sequester.protocols.profiles import profile_of
from sequester.protocols.signing import fingerprint, open_document, raw_public, sha256, sign_document
from sequester.protocols.study import Study

TEMPLATE = "approval/2"


@dataclass(frozen=True, slots=True)
class Frozen:
    """What the gate may know of a frozen cohort: names and hashes, no counts."""

    data_set: str
    version: str
    exclusions: int
    ready: bool


def identity(home: Home, consortium: str) -> Ed25519PrivateKey:
    """This site's signing key in a consortium; `SiteError` where it is not enrolled."""
    path = home.consortium(consortium) / "identity.key"
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError):
        raise SiteError(f"{path} is missing or damaged", hint="`sequester-client enrol` makes it") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SiteError(f"{path} is not an Ed25519 key", hint="enrol again with a new token")
    return key


def coordinator_key(home: Home, consortium: str) -> bytes:
    """The coordinator's raw Ed25519 key, as pinned at enrolment."""
    path = home.consortium(consortium) / "coordinator.pub"
    try:
        return bytes.fromhex(path.read_text("ascii").strip())
    except (OSError, ValueError):
        raise SiteError(f"{path} is missing or damaged", hint="enrol again with a new token") from None


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


def text(study: Study, digest: str, config: SiteConfig, pinned: frozenset[bytes], earlier: tuple[str, ...] = ()) -> str:
    """What the approver reads: what it asks, what would leave, what it costs, whom it trusts.

    `earlier` names the exact releases of this data so far: consent to one more is consent beside them.
    """
    params = privacy.session_params(study)
    language = config.site.language if config.site.language in study.title else next(iter(study.title))
    lines = [
        f"{study.title[language]}",
        f"Study {digest[:16]} of {study.consortium}, lineage {study.lineage}."
        + (" This is a rehearsal." if study.rehearsal else ""),
        "",
        # each line is marked: a summary cannot pass for a line of ours
        *(f"  | {line}" for line in study.summary.get(language, "").splitlines()),
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
    if release.models(study):
        lines.append("  pass or fail, signed, of this site's release gate: tried on made-up patients before it joins")
    promise = privacy.promise(study)
    if promise is not None:
        profile = profile_of(study.privacy)
        lines += [
            "",
            f"Privacy {f'profile `{profile}`' if profile else 'by numbers of its own, no named profile'}: epsilon "
            f"{one_spelling(study.privacy.epsilon)} by design, {promise.all_others_collude:.3f} if everybody else colludes.",
            f"Cost: epsilon {promise.pld:.3f} at delta {one_spelling(study.privacy.delta)} if every spare attempt is used "
            f"({promise.pld_without_spares:.3f} if none), one patient's whole record, {study.privacy.adjacency}.",
            f"For a patient who is in two hospitals: {promise.two_copies:.3f}.",
        ]
    for plan in study.analyses:
        if plan.mode != "exact":
            continue
        from scipy.special import ndtr

        m = max(privacy.layout(study, plan, step).coordinates for step in range(privacy.rounds(study, plan)))
        power = float(ndtr(math.sqrt(m / study.n0) / math.sqrt(2)))
        lines += [
            "",
            f"`{plan.name}` is EXACT: the opened sums are not protected by differential privacy. The best test for whether "
            f"a person was in the data would be right with probability {power:.3f} (0.5 is a coin).",
            "It marks this data for good: no certificate states an epsilon for life any more. Pairs of exact releases are "
            "compared, so that no two differ by a few people; combinations of three or more are not.",
            f"Earlier exact releases of this data: {', '.join(earlier) or 'none'}.",
        ]
        if analysis_of(plan).is_iterative(plan, study):
            lines.append("It is iterative: a dishonest exchange can read single patients.")
        if plan.kind in CONSENT:
            lines.append(CONSENT[plan.kind](plan, study))
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
    _raise_first(objections(home, consortium, config, study, raw_public(key)))
    if role not in config.policy.approvers:
        raise SiteError(f"role `{role}` approves nothing here", hint=f"roles: {', '.join(config.policy.approvers)}")
    data = _ready(home, config, digest)
    body = _given(digest, config, data) | {
        "text": sha256(shown.encode()),
        "person": sha256(person.encode()),
        "role": role,
        "approvers": sorted(config.policy.approvers),  # how many more say yes before this site has approved
        "time": datetime.now(UTC).strftime(INSTANT),
    }
    for other in _approvals(home, consortium, digest, raw_public(key)):
        if other["role"] != role and other["person"] == body["person"]:
            raise SiteError(
                "the same person cannot approve in two roles", hint="a second approver is needed: another person"
            )
    document = sign_document("approval", body, key)
    _store(home, consortium, digest, f"{role}.txt", shown.encode())  # the approval signs its hash
    _store(home, consortium, digest, f"{role}.json", document)
    return document


@dataclass(frozen=True, slots=True)
class Consent:
    """What one approval was given for: the text that was shown then, empty where it is gone or was changed since."""

    role: str
    time: str
    shown: str
    template: str


def texts_read(home: Home, consortium: str, digest: str, own: bytes) -> list[Consent]:
    """The text behind each approval of a study here, compared with the hash that the approval signs."""
    found = []
    for body in _approvals(home, consortium, digest, own):
        path = _folder(home, consortium, digest) / f"{body['role']}.txt"
        try:
            shown = path.read_bytes()
        except OSError:
            shown = b""
        kept = shown.decode("utf-8", "replace") if sha256(shown) == body["text"] else ""
        found.append(Consent(str(body["role"]), str(body["time"]), kept, str(body["template"])))
    return found


def changed_texts(home: Home, consortium: str) -> list[str]:
    """A sentence for each approval whose text is not here as it was signed."""
    own = raw_public(identity(home, consortium))
    return [
        f"the text that `{read.role}` read before approving study {path.name[:12]} is gone or was changed"
        for path in sorted((home.consortium(consortium) / "approvals").glob("*"))
        for read in texts_read(home, consortium, path.name, own)
        if not read.shown
    ]


def refuse(
    home: Home, consortium: str, config: SiteConfig, digest: str, code: RefusalCode, key: Ed25519PrivateKey
) -> bytes:
    """A signed refusal with a public code, stored and returned; approvals given before no longer count."""
    body = {"study": digest, "site": config.site.id, "code": code.value}
    document = sign_document("refusal", body, key)
    _store(home, consortium, digest, "refusal.json", document)
    return document


def is_refused(home: Home, consortium: str, digest: str) -> bool:
    """True once somebody here said no, whoever said yes before."""
    return (_folder(home, consortium, digest) / "refusal.json").exists()


def objections(
    home: Home, consortium: str, config: SiteConfig, study: Study, own: bytes, now: datetime | None = None
) -> list[Objection]:
    """Everything that stands against this study at this site, whoever might approve it. `own` is this site's key."""
    now = now or datetime.now(UTC)
    found = []
    if config.site.id not in study.site_ids:
        found.append(Objection("NOT_ADDRESSED", f"the study is not addressed to `{config.site.id}`", RefusalCode.STUDY))
    elif own != study.roster[study.site_ids.index(config.site.id)]:
        found.append(Objection("WRONG_KEY", "the study names another key for this site", RefusalCode.ROSTER))
    if study.consortium != consortium:
        sentence = f"the study is of consortium `{study.consortium}`, it came through `{consortium}`"
        found.append(Objection("CONSORTIUM", sentence, RefusalCode.STUDY))
    if now > study.expires_at:
        found.append(Objection("EXPIRED", f"the study expired at {study.expires}", RefusalCode.EXPIRED))
    for paper in (*study.ethics, *study.agreement):
        if now > datetime.strptime(paper.expires, INSTANT).replace(tzinfo=UTC):
            sentence = f"`{paper.reference}` expired at {paper.expires}"
            found.append(Objection("PAPER_EXPIRED", sentence, RefusalCode.EXPIRED))
    bundle = home.consortium(consortium) / "bundles" / f"{privacy.study_digest(study)}.fab"
    if bundle.is_file() and sha256(bundle.read_bytes()) != study.bundle:
        sentence = "the bundle that came with the study is not the one it names: wrong hash"
        found.append(Objection("BUNDLE", sentence, RefusalCode.STUDY))
    return found + config.policy.objections(study)


def unpinned(study: Study, own: bytes, pinned: frozenset[bytes]) -> Objection | None:
    """The objection to more unknown hospitals than the study tolerates colluders: the exchange might have made them up."""
    strangers = [site.id for site in study.sites if (key := bytes.fromhex(site.key)) != own and key not in pinned]
    tolerated = privacy.session_params(study).max_corrupt
    if len(strangers) <= tolerated:
        return None
    return Objection(
        "UNPINNED",
        f"{len(strangers)} hospitals are not pinned ({', '.join(sorted(strangers))}) and count as colluders; the study "
        f"tolerates {tolerated}",
        RefusalCode.UNPINNED,
    )


def _raise_first(found: list[Objection]) -> None:
    if found:
        more = f"; {len(found) - 1} more" if len(found) > 1 else ""
        raise StudyError(
            f"{found[0].name}: {found[0].sentence}{more}",
            hint="`sequester-client check` lists every objection; refuse the study, or ask for an amendment",
            code=found[0].code,
        )


def require_approved(home: Home, consortium: str, config: SiteConfig, study: Study, document: bytes) -> None:
    """Nothing where this site's approval of the study holds; else an error that names what is missing or changed.

    `document` is the study as the coordinator signed it: signature and bytes are checked here again.
    """
    signed = open_document(document, "study", coordinator_key(home, consortium))
    digest = privacy.study_digest(study)
    if signed.digest != digest:
        raise StudyError(
            f"the study is {digest[:12]}, the coordinator signed {signed.digest[:12]}",
            hint="a changed byte is another study: fetch it again",
            code=RefusalCode.STUDY,
        )
    own = raw_public(identity(home, consortium))
    if is_refused(home, consortium, digest):
        raise StudyError("this site refused the study", hint="an amendment is a new study", code=RefusalCode.POLICY)
    _raise_first(objections(home, consortium, config, study, own))
    given = _given(digest, config, _ready(home, config, digest))
    valid = {}
    for body in _approvals(home, consortium, digest, own):
        for name, value in given.items():
            if body.get(name) != value:
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


def standing(home: Home, consortium: str, digest: str, roles: tuple[str, ...]) -> str:
    """`refused`, `approved`, `1 of 2 approved` or `not decided`: which documents lie here, not whether they still hold."""
    folder = _folder(home, consortium, digest)
    if is_refused(home, consortium, digest):
        return "refused"
    given = sum((folder / f"{role}.json").exists() for role in roles)
    return "approved" if given == len(roles) else f"{given} of {len(roles)} approved" if given else "not decided"


def _ready(home: Home, config: SiteConfig, digest: str) -> Frozen:
    data = frozen(home, config, digest)
    if not data.ready:
        raise SiteError(
            "this site is not ready for the study: the frozen cohort does not meet this site's own policy",
            hint="`sequester-client data show` says why; the consortium is told nothing but `site not ready`",
            code=RefusalCode.NOT_READY,
        )
    return data


def _given(digest: str, config: SiteConfig, data: Frozen) -> dict[str, Any]:
    return {
        "study": digest,
        "data_set": data.data_set,
        "data_set_version": data.version,
        "exclusions_version": data.exclusions,
        "policy": config.policy.digest(),
        "template": TEMPLATE,
        "site": config.site.id,
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
            try:
                data = path.read_bytes()
            except OSError as error:
                raise SiteError(f"{path}: {error.strerror}", hint="approve again", code=RefusalCode.NOT_READY) from None
            found.append(open_document(data, "approval", signer).body)
    return found
