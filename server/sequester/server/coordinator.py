"""The coordinator's calls to the exchange: mutual TLS with the coordinator's own certificate, one answer each.

Where the exchange listens is read from `consortium.toml`; a port 0 there is looked up in the exchange's `ports.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from sequester.protocols import exchange_pb2 as pb
from sequester.protocols.errors import StudyError
from sequester.server.authority import PORTS
from sequester.server.config import ConsortiumConfig, Home
from sequester.server.tls import coordinator_channel

CALL_S = 60.0

ANSWERS: dict[str, Callable[[bytes], Any]] = {
    "Invite": pb.Empty.FromString,
    "Enrolments": pb.EnrolmentList.FromString,
    "Admit": pb.Empty.FromString,
    "Publish": pb.Empty.FromString,
    "Start": pb.StudyStatus.FromString,
    "Control": pb.StudyStatus.FromString,
    "Status": pb.StudyStatus.FromString,
    "Result": pb.Blob.FromString,
    "Waive": pb.Empty.FromString,
    "Release": pb.Blob.FromString,
}


class CoordinatorCalls:
    """Unary calls of the `Coordinator` service."""

    def __init__(self, channel: grpc.Channel, address: str) -> None:
        self._channel = channel
        self._address = address

    def call(self, method: str, request: Any, timeout_s: float = CALL_S) -> Any:
        """The exchange's answer; what it refuses is a `StudyError` with the exchange's own sentence."""
        stub = self._channel.unary_unary(
            f"/sequester.v1.Coordinator/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=ANSWERS[method],
        )
        try:
            return stub(request, timeout=timeout_s)
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
            said = (error.details() or "") if isinstance(error, grpc.Call) else ""
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise StudyError(
                    f"the exchange at {self._address} does not answer `{method}` ({said[:200]})",
                    hint="start it with `sequester-server serve`, or check host and ports in coordinator/consortium.toml",
                ) from None
            sentence, _, hint = said.partition("\n")
            raise StudyError(
                sentence or f"the exchange refused `{method}`: {code.name.lower().replace('_', ' ')}",
                hint=hint or "the exchange's log says more",
            ) from None


def listening(home: Home) -> ConsortiumConfig:
    """The consortium's settings with the ports that the exchange really has."""
    config = home.config(home.coordinator)
    if all(getattr(config, name) for name in PORTS):
        return config
    path = home.exchange / "ports.json"
    try:
        chosen = {name: int(port) for name, port in json.loads(path.read_text("utf-8")).items() if name in PORTS}
    except (OSError, ValueError, AttributeError):
        raise StudyError(
            "consortium.toml leaves a port open (0) and no exchange has chosen one",
            hint=f"start `sequester-server serve` (it writes {path}), or write the port into consortium.toml",
        ) from None
    return config.model_copy(update={name: port for name, port in chosen.items() if not getattr(config, name)})


@contextmanager
def coordinator_stub(home: Home) -> Iterator[CoordinatorCalls]:
    """Calls to this consortium's exchange; the channel closes afterwards."""
    config = listening(home)
    host = f"[{config.host}]" if ":" in config.host else config.host
    address = f"{host}:{config.exchange_port}"
    with coordinator_channel(home.coordinator, address) as channel:
        yield CoordinatorCalls(channel, address)
