"""A receipt on its way: sent again, byte for byte, until the exchange says that it is kept.

The exchange answers a receipt with that receipt once it is on its disk. Without that answer (its disk was full, the
stream broke, the gate was stopped) this site's signed account of the study would exist here alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import grpc
import grpc.aio

from sequester.client.gate.egress import Egress
from sequester.protocols import exchange_pb2 as pb
from sequester.protocols.errors import SequesterError
from sequester.protocols.packets import Frame, packed, unpacked
from sequester.protocols.wire import hello

METHOD = "/sequester.v1.Site/Session"
PAUSES_S = (2.0, 5.0, 15.0, 60.0, 300.0)  # the last one for ever
_ANSWER_S = 30.0


def receipt_frame(document: bytes) -> Frame:
    """The frame that carries a receipt, and in which the exchange says that it is kept."""
    return pb.Frame(receipt=pb.Receipt(receipt=pb.Document(json=document)))


def is_kept(frame: object, document: bytes) -> bool:
    """True for the exchange's word that it has this receipt."""
    return (
        isinstance(frame, pb.Frame) and frame.WhichOneof("kind") == "receipt" and frame.receipt.receipt.json == document
    )


def mark(receipt: Path) -> Path:
    """The empty file beside a receipt that says it was delivered."""
    return receipt.with_suffix(".kept")


async def deliver(
    receipt: Path,
    digest: str,
    egress: Egress,
    open_channel: Callable[[], grpc.aio.Channel],
    pauses: tuple[float, ...] = PAUSES_S,
) -> None:
    """Returns when the exchange has kept the receipt in `receipt` of study `digest`; tries for as long as that takes."""
    tries = 0
    while not mark(receipt).exists():
        await asyncio.sleep(pauses[min(tries, len(pauses) - 1)])
        tries += 1
        try:
            document = receipt.read_bytes()
            async with asyncio.timeout(_ANSWER_S), open_channel() as channel:
                if await _sent(channel, digest, document, egress):
                    mark(receipt).touch()
        except (grpc.aio.AioRpcError, TimeoutError, OSError, SequesterError):
            continue  # not now: the exchange is away, or a disk is full


async def _sent(channel: grpc.aio.Channel, digest: str, document: bytes, egress: Egress) -> bool:
    call = channel.stream_stream(METHOD, request_serializer=lambda data: data, response_deserializer=unpacked)()  # type: ignore[call-arg]  # the stub knows only calls with an iterator
    await call.write(hello(bytes.fromhex(digest)).SerializeToString())
    await call.read()  # its Hello: nothing of it matters to a receipt
    data = packed(receipt_frame(document))
    egress.leaves("Receipt", [data], 0)
    await call.write(data)
    await call.done_writing()
    while isinstance(answer := await call.read(), Frame):
        if is_kept(answer, document):
            return True
    return False
