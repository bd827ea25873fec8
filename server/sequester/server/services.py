"""gRPC in front of the exchange: who may call what, and how a refusal looks on the wire.

Sites and the coordinator come over mutual TLS and are told apart by the name in their certificate. A hospital whose
membership ended is refused although its certificate still verifies, and so is a certificate that a newer one replaced.
Flower's ServerApp comes over a unix socket of the exchange's own account.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from sequester.protocols import exchange_pb2 as pb
from sequester.protocols.errors import PeerError, SequesterError, StudyError
from sequester.protocols.packets import packed
from sequester.protocols.signing import open_document
from sequester.server import enrolment, release, tls
from sequester.server.exchange import Exchange

log = logging.getLogger("sequester.exchange")

Handlers = Any  # grpc.GenericRpcHandler; its stub is generic, the class is not
NodeKey = Callable[[str, bytes | None], Awaitable[None]]  # (site, SuperNode key, None: strike it)


async def _refuse(context: Any, error: SequesterError) -> None:
    """A refusal: sentence and hint, for `CoordinatorCalls` to show as they are."""
    code = grpc.StatusCode.INVALID_ARGUMENT if isinstance(error, PeerError) else grpc.StatusCode.FAILED_PRECONDITION
    await context.abort(code, f"{error.message}\n{error.hint}")


def _unary(act: Callable[[Any, Any], Any], request: Any, may: Callable[[Any], bool]) -> Any:
    async def handler(message: Any, context: Any) -> Any:
        if not may(context):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"{tls.peer_uri(context)} may not ask that")
        try:
            answer = act(message, context)
            return await answer if asyncio.iscoroutine(answer) else answer
        except SequesterError as error:
            await _refuse(context, error)

    return grpc.unary_unary_rpc_method_handler(handler, request.FromString, lambda answer: answer.SerializeToString())


def _anybody(context: Any) -> bool:
    return True


# ---- hospitals ------------------------------------------------------------------------------------------------------


def site_service(exchange: Exchange) -> Handlers:
    """`Site`: what a hospital asks, and its study streams."""

    def is_member(context: Any) -> bool:
        return enrolment.is_admitted(exchange.store, tls.peer_site(context) or "", tls.peer_certificate(context))

    def name(context: Any) -> str:
        return tls.peer_site(context) or ""

    def peers(message: pb.Empty, context: Any) -> pb.Documents:
        return pb.Documents(documents=[pb.Document(json=m) for m in enrolment.members(exchange.store)])

    def studies(message: pb.Empty, context: Any) -> pb.Documents:
        return pb.Documents(documents=[pb.Document(json=d) for d in exchange.studies_for(name(context))])

    def bundle(message: pb.StudyRequest, context: Any) -> pb.Blob:
        exchange.addressed(name(context), message.study_digest.hex())
        return pb.Blob(data=exchange.store.study(message.study_digest.hex())[1])

    def decide(message: pb.Document, context: Any) -> pb.Empty:
        exchange.decide(name(context), message.json)
        return pb.Empty()

    def attest(message: pb.Document, context: Any) -> pb.Empty:
        release.attest(exchange, name(context), message.json)
        return pb.Empty()

    def waiver(message: pb.StudyRequest, context: Any) -> pb.Documents:
        digest = message.study_digest.hex()
        exchange.addressed(name(context), digest)
        raw = exchange.store.release(digest).waiver
        return pb.Documents(documents=[] if raw is None else [pb.Document(json=raw)])

    def result(message: pb.StudyRequest, context: Any) -> pb.Blob:
        digest = message.study_digest.hex()
        exchange.addressed(name(context), digest)
        data = exchange.store.results(digest)
        if data is None:
            raise StudyError(f"study {digest[:12]} has no results yet", hint="ask again when it is done")
        exchange.release(digest).require()
        return pb.Blob(data=data)

    async def session(requests: Any, context: Any) -> None:
        if not is_member(context):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"{tls.peer_uri(context)} may not ask that")

        async def read() -> bytes | None:
            data = await context.read()
            return data if isinstance(data, bytes) else None

        try:
            await exchange.session(name(context), read, context.write)
        except (DecodeError, PeerError) as error:
            log.warning("the stream of %s was closed: %s", name(context), error)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the stream broke the protocol")
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no Hello")
        except SequesterError as error:
            await _refuse(context, error)

    methods: dict[str, Any] = {
        "Peers": _unary(peers, pb.Empty, is_member),
        "Studies": _unary(studies, pb.Empty, is_member),
        "Bundle": _unary(bundle, pb.StudyRequest, is_member),
        "Decide": _unary(decide, pb.Document, is_member),
        "Attest": _unary(attest, pb.Document, is_member),
        "Waiver": _unary(waiver, pb.StudyRequest, is_member),
        "Result": _unary(result, pb.StudyRequest, is_member),
        "Session": grpc.stream_stream_rpc_method_handler(session, None, packed),
    }
    handlers: Handlers = grpc.method_handlers_generic_handler("sequester.v1.Site", methods)
    return handlers


# ---- the coordinator ------------------------------------------------------------------------------------------------


def coordinator_service(
    exchange: Exchange, coordinator: bytes, node_key: NodeKey, stop_run: Callable[[str], Any]
) -> Handlers:
    """`Coordinator`: invitations, studies, results. `node_key` tells Flower which SuperNode key a hospital has."""
    store = exchange.store

    def invite(message: pb.Invitation, context: Any) -> pb.Empty:
        enrolment.invite(store, message)
        return pb.Empty()

    async def admit(message: pb.Admission, context: Any) -> pb.Empty:
        key = enrolment.admit(store, message, coordinator)
        is_member = enrolment.is_member(store, message.site)
        await node_key(message.site, key if is_member else None)
        await exchange.roster_changed()
        return pb.Empty()

    def publish(message: pb.PublishRequest, context: Any) -> pb.Empty:
        exchange.publish(message.study.json, message.bundle)
        return pb.Empty()

    def status_of(digest: str) -> pb.StudyStatus:
        return pb.StudyStatus(json=json.dumps(exchange.status(digest)).encode())

    def start(message: pb.StudyRequest, context: Any) -> pb.StudyStatus:
        exchange.start(message.study_digest.hex())
        return status_of(message.study_digest.hex())

    async def control(message: pb.StudyControl, context: Any) -> pb.StudyStatus:
        digest = message.study_digest.hex()
        if open_document(message.order.json, "order", coordinator).body != {"study": digest, "act": message.act}:
            raise StudyError("the signed order names another study or act", hint="nothing was changed")
        await exchange.control(digest, message.act)
        if message.act == "withdraw":
            await stop_run(digest)
        return status_of(digest)

    def status(message: pb.StudyRequest, context: Any) -> pb.StudyStatus:
        if message.study_digest:
            return status_of(message.study_digest.hex())
        return pb.StudyStatus(json=json.dumps([exchange.status(d) for d in store.digests()]).encode())

    def result(message: pb.StudyRequest, context: Any) -> pb.Blob:
        return pb.Blob(data=exchange.results(message.study_digest.hex()))

    def waive(message: pb.Document, context: Any) -> pb.Empty:
        release.waive(exchange, coordinator, message.json)
        return pb.Empty()

    def released(message: pb.StudyRequest, context: Any) -> pb.Blob:
        digest = message.study_digest.hex()
        texts = {"study": store.study(digest)[0].decode(), "release": store.release(digest).json()}
        return pb.Blob(data=json.dumps(texts).encode())

    def enrolments(message: pb.Empty, context: Any) -> pb.EnrolmentList:
        return enrolment.rows(store)

    acts: dict[str, tuple[Any, Any]] = {
        "Invite": (invite, pb.Invitation),
        "Enrolments": (enrolments, pb.Empty),
        "Admit": (admit, pb.Admission),
        "Publish": (publish, pb.PublishRequest),
        "Start": (start, pb.StudyRequest),
        "Control": (control, pb.StudyControl),
        "Status": (status, pb.StudyRequest),
        "Result": (result, pb.StudyRequest),
        "Waive": (waive, pb.Document),
        "Release": (released, pb.StudyRequest),
    }
    methods = {verb: _unary(act, request, tls.is_coordinator) for verb, (act, request) in acts.items()}
    handlers: Handlers = grpc.method_handlers_generic_handler("sequester.v1.Coordinator", methods)
    return handlers


# ---- Flower's ServerApp ---------------------------------------------------------------------------------------------


def dispatch_service(exchange: Exchange) -> Handlers:
    """`Dispatch`, on the unix socket only."""

    def joins(message: pb.StudyRequest, context: Any) -> pb.JoinList:
        return exchange.joins(message.study_digest.hex())

    def report(message: pb.JoinReport, context: Any) -> pb.Empty:
        exchange.report(message.study_digest.hex(), message.site, message.status[:64])
        return pb.Empty()

    methods = {"Joins": _unary(joins, pb.StudyRequest, _anybody), "Report": _unary(report, pb.JoinReport, _anybody)}
    handlers: Handlers = grpc.method_handlers_generic_handler("sequester.v1.Dispatch", methods)
    return handlers
