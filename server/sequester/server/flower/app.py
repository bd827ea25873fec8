"""The ServerApp: brings one study's `join` to its sites until the exchange says that the study is over.

It knows nothing but the study's digest. Whom to ask, who stands already and when to end it hears from the exchange over
a unix socket; what sites answer it hands on. A run that dies is replaced by another: nothing is kept here.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from sequester.protocols import exchange_pb2 as pb
from sequester.protocols.errors import RefusalCode, SequesterError, StudyError
from sequester.server.flower.control import same_key

log = logging.getLogger("sequester.dispatch")

SOCKET_VARIABLE = "SEQUESTER_DISPATCH_SOCKET"
MESSAGE_TYPE = "query.join"
TTL_S = 7 * 86400.0  # of request and reply; an answer comes within a minute of delivery, a site may be off for days
POLL_S = 0.5
# Seconds until a site without a stream is asked again.
AGAIN_S = {"not yet": 5.0, "joined": 60.0, "refused": 60.0, "error": 60.0, "lost": 3.0, "offline": 2.0}
SILENT_S = 180.0  # delivered, never answered: its reply was dropped on the way (spec/flower.md, section 7)
# Flower's own errors that say nothing about the study: the node or its child was gone, or the time to live ran out.
_LOST = {3, 4, 5, 8}
_NOT_LOADED = 1  # the site's executor would not take the bundle; upstream says so in a fixed sentence


class Exchange(Protocol):
    """What the exchange says and hears."""

    def joins(self) -> pb.JoinList:
        """Whom to ask, and whether the study is over."""

    def report(self, site: str, status: str) -> None:
        """What a site answered."""


class DispatchClient:
    """The exchange, over its unix socket; waits where it restarts."""

    def __init__(self, path: str, digest: str) -> None:
        self._digest = bytes.fromhex(digest)
        self._channel = grpc.insecure_channel(
            f"unix:{path}", [("grpc.enable_http_proxy", 0), ("grpc.max_reconnect_backoff_ms", 1000)]
        )
        self._joins = self._channel.unary_unary(
            "/sequester.v1.Dispatch/Joins",
            request_serializer=pb.StudyRequest.SerializeToString,
            response_deserializer=pb.JoinList.FromString,
        )
        self._report = self._channel.unary_unary(
            "/sequester.v1.Dispatch/Report",
            request_serializer=pb.JoinReport.SerializeToString,
            response_deserializer=pb.Empty.FromString,
        )

    def joins(self) -> pb.JoinList:
        listed: pb.JoinList = self._insist(lambda: self._joins(pb.StudyRequest(study_digest=self._digest), timeout=10))
        return listed

    def report(self, site: str, status: str) -> None:
        message = pb.JoinReport(study_digest=self._digest, site=site, status=status)
        self._insist(lambda: self._report(message, timeout=10))

    def _insist(self, call: Callable[[], Any]) -> Any:
        silent = False
        while True:
            try:
                return call()
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    raise StudyError(f"the exchange knows no study {self._digest.hex()[:12]}") from None
                if not silent:
                    log.warning("the exchange does not answer (%s), waiting for it", error.code().name)
                silent = True
                time.sleep(1.0)


@dataclass(slots=True)
class _Site:
    message: str = ""  # the `join` that is out, "" for none
    sent: float = 0.0
    again: float = 0.0  # not to be asked before


class Dispatcher:
    """The state of one run: which sites have a `join` out, and when to ask the others again."""

    def __init__(self, grid: Any, exchange: Exchange, digest: str, now: Callable[[], float] = time.monotonic) -> None:
        self._grid = grid
        self._exchange = exchange
        self._digest = digest
        self._now = now
        self._sites: dict[str, _Site] = {}

    def step(self) -> bool:
        """Collect answers, send what is due; False once the study is over."""
        self._collect()
        listed = self._exchange.joins()
        if listed.over:
            return False
        due = [join for join in listed.joins if not join.stands and self._is_due(join.site)]
        if due:
            self._send(due, listed.bundle_sha256.hex())
        return True

    def _is_due(self, name: str) -> bool:
        site, now = self._sites.setdefault(name, _Site()), self._now()
        if site.message and now - site.sent > SILENT_S:
            log.warning("%s has not answered for %.0f s, asking again", name, SILENT_S)
            site.message = ""
        return not site.message and now >= site.again

    def _send(self, due: Iterable[pb.Join], bundle: str) -> None:
        online = list(self._grid.get_nodes())
        for join in due:
            # The name is the site's, the key is what its SuperNode proves: both as the exchange admitted them.
            node = next((n for n in online if n.name == join.site and same_key(join.supernode_key, n.public_key)), None)
            if node is None:
                self._sites[join.site].again = self._now() + AGAIN_S["offline"]
                continue
            record = ConfigRecord({"study": self._digest, "bundle": bundle})
            message = Message(
                RecordDict({"join": record}), dst_node_id=node.node_id, message_type=MESSAGE_TYPE, ttl=TTL_S
            )
            (sent,) = list(self._grid.push_messages([message])) or [None]
            site = self._sites[join.site]
            if sent:
                site.message, site.sent = str(sent), self._now()
                log.info("asked %s to join", join.site)
            else:
                site.again = self._now() + AGAIN_S["lost"]

    def _collect(self) -> None:
        out = {site.message: name for name, site in self._sites.items() if site.message}
        if not out:
            return
        for reply in self._grid.pull_messages(list(out)):
            name = out.get(reply.metadata.reply_to_message_id)
            if name is None:
                continue
            kind, status = read_reply(reply, self._digest)
            self._sites[name].message = ""
            self._sites[name].again = self._now() + AGAIN_S[kind]
            log.info("%s: %s", name, status)
            self._exchange.report(name, status)


def read_reply(reply: Any, digest: str) -> tuple[str, str]:
    """What a reply comes to: a key of AGAIN_S, and the status for the exchange.

    Statuses: "joined", "not yet", "refused:CODE" with a RefusalCode, "error:N" with Flower's error code, and
    "error:reply" for an answer that is none of these.
    """
    if reply.has_error():
        number = int(reply.error.code)
        if number == _NOT_LOADED:
            return "refused", f"refused:{RefusalCode.STUDY}"
        return ("lost" if number in _LOST else "error"), f"error:{number}"
    records = dict(reply.content)
    record = records.get("join")
    if set(records) == {"join"} and isinstance(record, ConfigRecord) and record.get("study") == digest:
        match record.get("status"), record.get("code"):
            case ("joined" | "not yet") as status, "":
                return status, status
            case "refused", str(code) if code in RefusalCode.__members__:
                return "refused", f"refused:{code}"
    return "error", "error:reply"


app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Dispatch the study of the run's configuration until it is over."""
    digest = str(context.run_config.get("study", ""))
    path = os.environ.get(SOCKET_VARIABLE, "")
    if re.fullmatch(r"[0-9a-f]{64}", digest) is None or not path:
        raise SequesterError(f"a run needs a study digest and {SOCKET_VARIABLE}", hint="the exchange starts runs")
    dispatcher = Dispatcher(grid, DispatchClient(path, digest), digest)
    while dispatcher.step():
        time.sleep(POLL_S)
