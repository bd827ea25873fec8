"""`sequester-client studies|show|check|approve|refuse`: what was published to this site, and what a person decides.

Decisions are documents signed by the site's own key. `check` and `show` change nothing, anywhere.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from sequester.client.config import Home, SiteConfig
from sequester.client.config import home as home_of
from sequester.client.policy import Objection
from sequester.protocols import privacy, release
from sequester.protocols.errors import PeerError, PrivacyError, RefusalCode, SiteError, StudyError
from sequester.protocols.signing import Document, open_document, raw_public
from sequester.protocols.study import Study, parse_study, read_study, study_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from sequester.client.gate.ledger import Balance

HomeOption = Annotated[
    Path | None, typer.Option("--home", help="The site's folder; default SEQUESTER_HOME, else ~/.sequester.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Answer in JSON, for machines.")]
StudyArgument = Annotated[str, typer.Argument(help="The study's digest or its first letters.")]
ConsortiumOption = Annotated[str, typer.Option("--consortium", help="Only needed where a digest is in two.")]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Keep the decision here; send it later.")]

# Whose fault an objection is, as an exit status; every other code is the study's.
_BRANCH = {RefusalCode.BUDGET: PrivacyError, RefusalCode.NOT_READY: SiteError, RefusalCode.UNPINNED: SiteError}


def register(app: typer.Typer) -> None:
    """Add the commands about studies."""
    for name, command in (
        ("studies", studies),
        ("show", show),
        ("check", check),
        ("approve", approve),
        ("refuse", refuse),
    ):
        app.command(name)(command)


@dataclass(frozen=True, slots=True)
class Published:
    """A study as it lies at this site: verified against the coordinator's key, which was compared at enrolment."""

    consortium: str
    digest: str
    study: Study
    document: Document


def studies(
    refresh: Annotated[bool, typer.Option("--refresh", help="Ask the exchanges what was published since.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the studies published to this site and where each stands here."""
    from sequester.client.gate import approval

    place = home_of(home)
    config, now = place.config(), datetime.now(UTC)
    if refresh:
        from sequester.client.gate import exchange

        for consortium in place.consortia():
            exchange.fetch_studies(place, consortium)
    rows = [
        {
            "study": found.digest,
            "consortium": found.consortium,
            "title": _title(found.study, config),
            "decision": approval.standing(place, found.consortium, found.digest, config.policy.approvers),
            "ended": _outcome(place, found) or ("expired" if found.study.expires_at <= now else ""),
            "expires": found.study.expires,
        }
        for found in published(place)
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    if not rows:
        joined = (
            "`sequester-client studies --refresh` asks again."
            if place.consortia()
            else ("It belongs to no consortium: `sequester-client enrol` joins one.")
        )
        typer.echo(f"No study was published to this site. {joined}")
        return
    table = Table("study", "consortium", "title", "decision", "ended", "expires")
    for row in rows:
        table.add_row(
            row["study"][:12],
            *(row[k] for k in ("consortium", "title", "decision", "ended")),
            row["expires"].replace("T", " "),
        )
    table.columns[0].no_wrap = True  # people copy a digest
    for column in table.columns[1:]:
        column.overflow = "fold"
    Console(highlight=False, markup=False).print(table)


def show(
    study: StudyArgument, consortium: ConsortiumOption = "", home: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Read a study in plain words: what it asks, what would leave the building, what it costs, whom it trusts."""
    place = home_of(home)
    found = pick(place, study, consortium)
    if as_json:
        typer.echo(json.dumps(study_json(found.study), indent=2, ensure_ascii=False))
        return
    today = _text(place, place.config(), found)
    typer.echo(today, nl=False)
    for line in _read_before(place, found, today):
        typer.echo(line)


def check(
    study: Annotated[str, typer.Argument(help="A study.yaml, a signed study, or the digest of a published one.")],
    consortium: ConsortiumOption = "",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether this site would accept a study, every objection, and what to do next. Changes nothing.

    Exit status: 0 accepted; 10 the study or the policy says no; 20 this site must do something first; 40 the budget.
    """
    place = home_of(home)
    config = place.config()
    read, name, digest = _subject(place, study, consortium)
    found = _objections(place, config, name, read)
    prepared = bool(digest) and (place.dataset(config.data.id) / "cohorts" / digest / "manifest.json").is_file()
    following = _next(found, digest, config, prepared)
    if as_json:
        said = {"study": digest, "accepted": not found, "objections": [asdict(o) for o in found], "next": following}
        typer.echo(json.dumps(said, indent=2, ensure_ascii=False))
    else:
        typer.echo(
            f"{_title(read, config)}: "
            + (f"{len(found)} objection{'' if len(found) == 1 else 's'}." if found else "this site would accept it.")
        )
        for objection in found:
            typer.echo(f"  {objection.name}: {objection.sentence} (said aloud: {objection.code.value})")
        typer.echo(f"next: {following}")
    if found:
        raise typer.Exit(_BRANCH.get(found[0].code, StudyError).exit_status)


def approve(
    study: StudyArgument,
    person: Annotated[str, typer.Option("--person", help="Your name; only its hash leaves this site.")],
    role: Annotated[str, typer.Option("--role", help="One of the policy's approvers; default: the only one.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="You have read the text of `show`; do not ask.")] = False,
    offline: OfflineOption = False,
    consortium: ConsortiumOption = "",
    home: HomeOption = None,
) -> None:
    """Show a study in plain words and sign yes to it, as one person in one role."""
    from sequester.client.gate import approval

    place = home_of(home)
    config = place.config()
    found = pick(place, study, consortium)
    roles = config.policy.approvers
    if role and role not in roles:
        raise SiteError(f"role `{role}` approves nothing here", hint=f"roles: {', '.join(roles)}")
    if not role and len(roles) > 1:
        raise SiteError(f"this site asks {len(roles)} roles: {', '.join(roles)}", hint="say yours with --role")
    key = approval.identity(place, found.consortium)
    against = approval.unpinned(found.study, raw_public(key), _pinned(place, found.consortium))
    if against is not None:
        raise SiteError(
            against.sentence, hint="compare fingerprints and pin them: `sequester-client peers pin`", code=against.code
        )
    shown = _text(place, config, found)
    typer.echo(shown)
    if not yes and not typer.confirm(f"{person}, do you say yes to this as `{role or roles[0]}`?"):
        typer.echo("Nothing was signed.")
        raise typer.Exit(1)
    document = approval.sign(place, found.consortium, config, found.study, shown, person, role or roles[0], key)
    standing = approval.standing(place, found.consortium, found.digest, roles)
    typer.echo(f"{standing}: {found.digest[:12]}.")
    _send(place, found, document, offline)
    if standing == "approved" and release.models(found.study):
        _try_out(place, found)


def refuse(
    study: StudyArgument,
    code: Annotated[RefusalCode, typer.Option("--code", help="What the consortium is told.")] = RefusalCode.POLICY,
    offline: OfflineOption = False,
    consortium: ConsortiumOption = "",
    home: HomeOption = None,
) -> None:
    """Sign no to a study. The consortium is told the code and nothing else; approvals given before no longer count.

    A study that runs here already is left, as by `stop`.
    """
    from sequester.client.gate import approval

    place = home_of(home)
    found = pick(place, study, consortium)
    key: Ed25519PrivateKey = approval.identity(place, found.consortium)
    document = approval.refuse(place, found.consortium, place.config(), found.digest, code, key)
    typer.echo(f"refused: {found.digest[:12]}.")
    _leave(place, found)
    _send(place, found, document, offline)


# ---- what lies here -------------------------------------------------------------------------------------------------


def published(home: Home) -> list[Published]:
    """Every study that was published to this site, by consortium and digest."""
    return [
        _opened(home, consortium, path)
        for consortium in home.consortia()
        for path in sorted((home.consortium(consortium) / "studies").glob("*.json"))
    ]


def pick(home: Home, prefix: str, consortium: str = "") -> Published:
    """The one published study whose digest starts with `prefix`."""
    paths = [
        (name, path)
        for name in home.consortia()
        if consortium in ("", name)
        for path in sorted((home.consortium(name) / "studies").glob("*.json"))
        if path.stem.startswith(prefix.lower())
    ]
    if len(paths) != 1 or len(prefix) < 4:
        found = f"{len(paths)} published studies start with `{prefix[:64]}`, one was expected"
        hint = "`sequester-client studies` lists them" + ("" if paths else "; --refresh asks what is new")
        raise SiteError(found, hint=hint + "; give at least four letters")
    return _opened(home, *paths[0])


def _opened(home: Home, consortium: str, path: Path) -> Published:
    from sequester.client.gate import approval

    document = open_document(path.read_bytes(), "study", approval.coordinator_key(home, consortium))
    if document.digest != path.stem:
        raise PeerError(f"{path.name} holds study {document.digest[:12]}", hint="`sequester-client studies --refresh`")
    return Published(consortium, document.digest, parse_study(document.body_bytes), document)


def _subject(home: Home, given: str, consortium: str) -> tuple[Study, str, str]:
    """(study, consortium, digest or "" for one that is not signed) of what `check` was given."""
    path = Path(given)
    if not path.is_file():
        found = pick(home, given, consortium)
        return found.study, found.consortium, found.digest
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        raise SiteError(f"{path} cannot be read as UTF-8", hint="a study.yaml or a signed study.json") from None
    if text.startswith('{"body":'):
        document = open_document(data, "study", None)
        return parse_study(document.body_bytes), consortium, document.digest
    return privacy.calibrate(read_study(text)), consortium, ""


def _objections(home: Home, config: SiteConfig, consortium: str, study: Study) -> list[Objection]:
    from sequester.client.gate import approval
    from sequester.protocols.accounting import cost

    name = consortium or study.consortium
    found = []
    if name in home.consortia():
        own = raw_public(approval.identity(home, name))
        found += approval.objections(home, name, config, study, own)
    else:
        sentence = f"this site is not enrolled in consortium `{name}`"
        found += [Objection("NOT_ENROLLED", sentence, RefusalCode.STUDY), *config.policy.objections(study)]
    if any(o.name == "STUDY" for o in found):
        return found  # its noise does not add up, so neither does a cost
    if name in home.consortia() and (stranger := approval.unpinned(study, own, _pinned(home, name))) is not None:
        found.append(stranger)
    balance, is_reserved = _ledger(home, config, study)
    if balance is not None and not is_reserved:
        asked = sum(cost(event, balance.order) for event in privacy.events(study))
        if asked > balance.left:
            sentence = (
                f"it costs {asked:.4f} at order {balance.order:g}, {balance.left:.4f} of {balance.cap:.4f} are left"
            )
            found.append(Objection("BUDGET", sentence, RefusalCode.BUDGET))
    return found


def _next(found: list[Objection], digest: str, config: SiteConfig, prepared: bool) -> str:
    if any(o.code == RefusalCode.UNPINNED for o in found):
        return "compare fingerprints with the other hospitals over another channel, then `sequester-client peers pin`"
    if found:
        return "refuse it (`sequester-client refuse`), or ask the coordinator for an amendment; nothing was changed"
    if not digest:
        return "the coordinator signs and publishes it; then `sequester-client studies --refresh`"
    if not prepared:
        return f"`sequester-client data freeze {digest[:12]}` prepares the cohort"
    roles = ", ".join(config.policy.approvers)
    return f"`sequester-client approve {digest[:12]} --person NAME` by each of: {roles}"


def _pinned(home: Home, consortium: str) -> frozenset[bytes]:
    from sequester.client.gate import peers

    pinned: frozenset[bytes] = peers.pinned(home, consortium)
    return pinned


def _text(home: Home, config: SiteConfig, found: Published) -> str:
    from sequester.client.gate import approval

    balance, _ = _ledger(home, config, found.study)
    earlier = balance.exact if balance is not None else ()
    return approval.text(found.study, found.digest, config, _pinned(home, found.consortium), earlier)


def _read_before(home: Home, found: Published, today: str) -> list[str]:
    """What each approval given here was given for, beside what `show` says today."""
    from sequester.client.gate import approval

    if not (home.consortium(found.consortium) / "approvals" / found.digest).is_dir():
        return []
    lines = [""]
    own = raw_public(approval.identity(home, found.consortium))
    for read in approval.texts_read(home, found.consortium, found.digest, own):
        said = f"Approved as `{read.role}` at {read.time}, after reading "
        if not read.shown:
            lines.append(f"{said}a text that is gone or was changed: read this one and approve again.")
        elif read.shown == today:
            lines.append(f"{said}this very text.")
        else:
            changed = difflib.ndiff(read.shown.splitlines(), today.splitlines())
            lines.append(f"{said}another text; since then (- then, + today):")
            lines += [f"  {line}" for line in changed if line[:2] in ("- ", "+ ")]
    return lines


def _ledger(home: Home, config: SiteConfig, study: Study) -> tuple[Balance | None, bool]:
    """The data set's balance (None before there is a ledger), and whether this study is reserved in it already."""
    from sequester.client.gate.ledger import Ledger

    folder = home.dataset(config.data.id)
    if not (folder / "ledger.db").is_file():
        return None, False
    ledger = Ledger(folder, read_only=True)
    try:
        digest = privacy.study_digest(study)
        return ledger.balance(), any(row.body["study"] == digest for row in ledger.rows("reserve"))
    finally:
        ledger.close()


def _title(study: Study, config: SiteConfig) -> str:
    return study.title.get(config.site.language) or next(iter(study.title.values()))


def _outcome(home: Home, found: Published) -> str:
    path = home.consortium(found.consortium) / "outcomes" / found.digest
    return path.read_text("ascii") if path.is_file() else ""


def _try_out(home: Home, found: Published) -> None:
    """Have the running gate try this installation on made-up patients; without one that happens when it runs."""
    from sequester.client.gate import control

    request = {"ask": "try", "consortium": found.consortium, "study": found.digest}
    try:
        control.ask(home.run / "gate.sock", request)
        when = "now"
    except SiteError:
        when = "when `sequester-client run` runs"
    typer.echo(
        f"The release gate tries this installation on made-up patients {when}; pass or fail is all that leaves. "
        f"`sequester-client audit release {found.digest[:12]}` shows it."
    )


def _leave(home: Home, found: Published) -> None:
    """A no to a study that runs here ends it here: approvals no longer count, and its rounds would go on."""
    from sequester.client.gate import control

    try:
        said = control.ask(home.run / "gate.sock", {"ask": "withdraw", "study": found.digest})["said"]
    except SiteError:
        return  # it does not run here; the gate would refuse to join it
    typer.echo(str(said))


def _send(home: Home, found: Published, document: bytes, offline: bool) -> None:
    if offline:
        typer.echo("The decision lies here and was not sent; the same command without --offline sends it.")
        return
    from sequester.client.gate import exchange

    exchange.send_decision(home, found.consortium, document)
    typer.echo("The exchange has the decision.")
