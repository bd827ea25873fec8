"""The exchange's process: opens the ports, takes up what was running, keeps Flower beside it, until SIGTERM."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
import time
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health  # type: ignore[attr-defined]  # missing in the stubs

from sequester.protocols.errors import SequesterError, StudyError
from sequester.server import services, tls
from sequester.server.config import Home
from sequester.server.dispatcher import Dispatcher
from sequester.server.enrolment import EnrolmentService
from sequester.server.exchange import Exchange
from sequester.server.ports import Ports, bind_address
from sequester.server.store import Store

log = logging.getLogger("sequester.exchange")

EXPIRY_S = 30.0
_GRACE_S = 2.0


class _JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, text."""

    def format(self, record: logging.LogRecord) -> str:
        row: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "from": record.name,
            "text": record.getMessage(),
        }
        if record.exc_info:
            row["trace"] = self.formatException(record.exc_info)
        return json.dumps(row)


def log_to_stderr() -> None:
    """JSON lines on standard error for everything this process logs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)


async def serve(home: Home) -> None:
    """Run the exchange until SIGTERM or SIGINT."""
    folder = home.exchange
    config = home.config(folder)
    key = bytes.fromhex((folder / "coordinator.pub").read_text("ascii").strip())
    store = Store(folder)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    ports = Ports(folder, config)
    exchange = Exchange(store, config.consortium, key)
    dispatcher = Dispatcher(home, config.host, exchange, ports)
    enrolment = EnrolmentService(store, config.consortium, (folder / "authority.pem").read_bytes(), key)
    exchange.resume_all()
    servers = [
        await listen(home, config.host, ports, "enrolment_port", [enrolment.handler()], False),
        await listen(
            home, config.host, ports, "exchange_port",
            [
                services.site_service(exchange),
                services.coordinator_service(exchange, key, dispatcher.node_key, dispatcher.stop_run),
            ],
            True,
        ),
        await _dispatch_socket(home, exchange),
    ]  # fmt: skip
    work = [asyncio.create_task(dispatcher.run()), asyncio.create_task(_expire(exchange))]
    log.info("the exchange of %s listens", config.consortium)
    try:
        waiting = asyncio.create_task(stopping.wait())
        done, _ = await asyncio.wait([waiting, *work], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # a fault of the code ends the process: a supervisor starts it again
    finally:
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)
        await exchange.close()
        await asyncio.gather(*(server.stop(_GRACE_S) for server in servers))
        await dispatcher.stop()
        home.dispatch_socket.unlink(missing_ok=True)
        store.close()
        log.info("the exchange of %s has stopped", config.consortium)


async def listen(
    home: Home, host: str, ports: Ports, name: str, handlers: list[services.Handlers], require_client: bool
) -> grpc.aio.Server:
    """A started server on one of the exchange's ports, with TLS and the health service; the chosen port is kept."""
    server = grpc.aio.server(options=tls.SERVER_OPTIONS if require_client else tls.ANONYMOUS_OPTIONS)
    server.add_generic_rpc_handlers(handlers)
    alive = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(alive, server)
    await alive.set("", health_pb2.HealthCheckResponse.SERVING)
    address = bind_address(host)
    at = f"[{address}]" if ":" in address else address
    try:
        port = server.add_secure_port(
            f"{at}:{ports[name]}", tls.server_credentials(home.exchange, require_client=require_client)
        )
    except RuntimeError:
        raise StudyError(
            f"port {ports[name]} ({name}) on {address} is taken",
            hint="stop what listens there, or, before hospitals enrol, change the port in consortium.toml of exchange/ "
            "and of coordinator/",
        ) from None
    ports.choose(**{name: port})
    await server.start()
    return server


async def _dispatch_socket(home: Home, exchange: Exchange) -> grpc.aio.Server:
    home.dispatch_socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    home.dispatch_socket.unlink(missing_ok=True)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([services.dispatch_service(exchange)])
    server.add_insecure_port(f"unix:{home.dispatch_socket}")
    await server.start()
    home.dispatch_socket.chmod(0o600)
    return server


async def _expire(exchange: Exchange) -> None:
    while True:
        try:
            await exchange.expire()
        except SequesterError as error:
            log.warning("%s", error.message)
        await asyncio.sleep(EXPIRY_S)
