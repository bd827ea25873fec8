"""`study waive`: the coordinator's signed word that a private model may go out although a hospital lacks a pass."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from sequester.protocols import exchange_pb2 as pb
from sequester.protocols import release as rule
from sequester.protocols.errors import StudyError
from sequester.protocols.faults import INSTANT
from sequester.protocols.release import Documents, Release
from sequester.protocols.signing import Document, open_document, sign_document
from sequester.protocols.study import Study, parse_study
from sequester.server.cli.exchange import DigestArgument, call, digest_of, request_of
from sequester.server.cli.study import HomeOption, JsonOption, passphrase, verbs
from sequester.server.config import Home
from sequester.server.config import home as home_of


def register(app: typer.Typer) -> None:
    """Add `study waive`."""
    verbs.command("waive")(waive)


def waive(
    study: DigestArgument,
    reason: Annotated[str, typer.Option("--reason", help="Why; every hospital reads it, and the report prints it.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sign a waiver of the release gate: the model may go out although hospitals lack a pass. The report prints it.

    It counts once every hospital has countersigned it (`sequester-client countersign`), and only for what stands now: one
    that fails afterwards needs another waiver. A hospital that signs nothing keeps the model in.
    """
    from sequester.server.authority import signing_key

    place = home_of(home)
    digest = digest_of(home, study)
    _, of, standing, _ = fetched(place, digest)
    if standing.granted_by in ("passes", "nothing to release"):
        raise StudyError(
            f"there is nothing to waive: {standing.granted_by}", hint=f"`sequester-server study results {digest[:12]}`"
        )
    body = rule.waiver_body(digest, reason, standing.lacking, datetime.now(UTC).strftime(INSTANT))
    document = sign_document("waiver", body, signing_key(place, passphrase()))
    rule.read_waiver(of, digest, coordinator(place), document)  # what hospitals would refuse does not leave here
    call(home, "Waive", pb.Document(json=document))
    if as_json:
        typer.echo(json.dumps(body, indent=2, ensure_ascii=False))
        return
    stood = ", ".join(f"{site} {word}" for site, word in standing.lacking.items())
    typer.echo(
        f"The waiver for study {digest[:12]} is signed ({stood}) and waits for {len(of.sites)} countersignatures."
    )
    typer.echo(f"next: every hospital, `sequester-client countersign {digest[:12]} --person NAME`.")


def fetched(place: Home, digest: str) -> tuple[Document, Study, Release, Documents]:
    """The signed study and where its release stands, judged here from documents that the exchange holds."""
    texts: Any = json.loads(call(place.root, "Release", request_of(digest)).data)
    signed = open_document(str(texts["study"]).encode(), "study", coordinator(place))
    if signed.digest != digest:
        raise StudyError("the exchange answered with another study", hint="tell whoever runs the exchange")
    study, documents = parse_study(signed.body_bytes), Documents.from_json(texts["release"])
    return signed, study, rule.judge(study, digest, coordinator(place), documents), documents


def coordinator(place: Home) -> bytes:
    """The coordinator's raw public key."""
    return bytes.fromhex((place.coordinator / "coordinator.pub").read_text("ascii").strip())
