"""What a site asks the exchange outside a study's stream: studies, other hospitals, results; and its own decisions.

Everything fetched is a signed document, checked here against the coordinator's key from the enrolment and kept in the
consortium's folder. What does not verify is not written. What a decision says lies beside the text that was read, in the
consortium's folder: a person's command sends it, and the ledger is the running gate's alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc

from sequester.client.config import Home
from sequester.client.gate import tls
from sequester.client.gate.peers import read_member
from sequester.protocols import exchange_pb2 as pb
from sequester.protocols.errors import PeerError, SiteError
from sequester.protocols.signing import open_document
from sequester.protocols.study import Study, parse_study

CALL_S = 20.0


class Calls:
    """Unary calls over one mutual-TLS channel."""

    def __init__(self, channel: grpc.Channel, folder: Path) -> None:
        self._channel = channel
        self._folder = folder

    def call(self, method: str, request: Any, answer: Callable[[bytes], Any]) -> Any:
        """The exchange's answer; a `SiteError` that names the address's fault where there is none."""
        stub = self._channel.unary_unary(
            f"/sequester.v1.Site/{method}", request_serializer=_serialised, response_deserializer=answer
        )
        try:
            return stub(request, timeout=CALL_S)
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
            raise self._unanswered(method, code) from None

    def _unanswered(self, method: str, code: grpc.StatusCode) -> SiteError:
        place = tls.membership(self._folder)
        found = f"the exchange at {place.address(place.exchange_port)} did not answer `{method}`: "
        found += code.name.lower().replace("_", " ")
        end = tls.certificate_end(self._folder)
        if code is grpc.StatusCode.UNAVAILABLE and end is not None and end < datetime.now(UTC):
            return SiteError(f"{found}; this site's certificate expired on {end:%Y-%m-%d}", hint=tls.RENEW)
        return SiteError(found, hint="`sequester-client doctor` tests name, port, certificate and clock one by one")


def _serialised(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


@contextmanager
def calls(home: Home, consortium: str) -> Iterator[Calls]:
    """Calls to one consortium's exchange; the channel closes afterwards."""
    with tls.site_channel(home.consortium(consortium)) as channel:
        yield Calls(channel, home.consortium(consortium))


def coordinator_key(home: Home, consortium: str) -> bytes:
    """The coordinator's raw Ed25519 key, as pinned at enrolment."""
    path = home.consortium(consortium) / "coordinator.pub"
    try:
        return bytes.fromhex(path.read_text("ascii").strip())
    except (OSError, ValueError):
        raise SiteError(f"{path} is missing or damaged", hint="enrol again with a new token") from None


def fetch_studies(home: Home, consortium: str) -> list[str]:
    """Digests of the studies published to this site, each verified and written to `studies/<digest>.json`."""
    folder = home.consortium(consortium)
    signer = coordinator_key(home, consortium)
    with calls(home, consortium) as ask:
        documents = ask.call("Studies", pb.Empty(), pb.Documents.FromString).documents
        found = []
        for document in documents:
            study = open_document(document.json, "study", signer)
            _keep(folder / "studies" / f"{study.digest}.json", document.json)
            found.append(study.digest)
            bundle = ask.call("Bundle", pb.StudyRequest(study_digest=bytes.fromhex(study.digest)), pb.Blob.FromString)
            _keep(folder / "bundles" / f"{study.digest}.fab", bundle.data)
    return found


def fetch_members(home: Home, consortium: str) -> list[bytes]:
    """The signed `member` documents of every admitted hospital, verified and written to `members/<site>.json`."""
    folder = home.consortium(consortium)
    signer = coordinator_key(home, consortium)
    with calls(home, consortium) as ask:
        documents = [d.json for d in ask.call("Peers", pb.Empty(), pb.Documents.FromString).documents]
    for data in documents:
        member = read_member(data, signer)  # a name that is none could be the path of another file
        _keep(folder / "members" / f"{member.site}.json", data)
    return documents


def send_decision(home: Home, consortium: str, document: bytes) -> None:
    """Hand a signed approval or refusal to the exchange."""
    with calls(home, consortium) as ask:
        ask.call("Decide", pb.Document(json=document), pb.Empty.FromString)


def send_attestation(home: Home, consortium: str, document: bytes) -> None:
    """Hand a signed verdict or countersignature to the exchange."""
    with calls(home, consortium) as ask:
        ask.call("Attest", pb.Document(json=document), pb.Empty.FromString)


def fetch_waiver(home: Home, consortium: str, digest: str) -> bytes | None:
    """The coordinator's waiver of a study as the exchange has it, not yet checked; None where there is none."""
    request = pb.StudyRequest(study_digest=bytes.fromhex(digest))
    with calls(home, consortium) as ask:
        documents = ask.call("Waiver", request, pb.Documents.FromString).documents
    return bytes(documents[0].json) if documents else None


def fetch_result(home: Home, consortium: str, digest: str) -> dict[str, Any]:
    """The results of a finished study, as the coordinator has them."""
    with calls(home, consortium) as ask:
        data = ask.call("Result", pb.StudyRequest(study_digest=bytes.fromhex(digest)), pb.Blob.FromString).data
    try:
        results = json.loads(data)
    except ValueError:
        raise PeerError("the exchange's results are not JSON", hint="ask the coordinator") from None
    if not isinstance(results, dict):
        raise PeerError("the exchange's results are not an object", hint="ask the coordinator")
    return results


def stored_study(home: Home, consortium: str, digest: str) -> tuple[Study, bytes]:
    """The published study of that digest and its signed document, from this site's own copy."""
    path = home.consortium(consortium) / "studies" / f"{digest}.json"
    try:
        data = path.read_bytes()
    except OSError:
        raise SiteError(
            f"no study {digest[:12]} in {consortium}",
            hint="fetch what was published: `sequester-client studies --refresh`",
        ) from None
    document = open_document(data, "study", coordinator_key(home, consortium))
    if document.digest != digest:
        raise PeerError(f"{path.name} holds study {document.digest[:12]}", hint="fetch the studies again")
    return parse_study(document.body_bytes), data


def _keep(path: Path, data: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists() and path.read_bytes() == data:
        return
    temporary = path.with_suffix(".new")
    temporary.write_bytes(data)
    temporary.replace(path)
