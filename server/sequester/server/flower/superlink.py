"""Flower's SuperLink with split listeners: Control and Runtime on loopback, ten Fleet paths for the world.

Upstream serves all three APIs on one port and asks no credential for Control (spec/flower.md, facts 1 and 2). Here one
application has two listeners: a private one on 127.0.0.1, and a public one that wants a certificate of our authority
and refuses, before any upstream code runs, whatever is not a Fleet call of bounded size.

Everything of flwr's internals that the consortium leans on is in this module, `control` and `app`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

from sequester.server.authority import write_private
from sequester.server.flower.lifetime import die_with_parent, quiet_flower

log = logging.getLogger("sequester.superlink")

MAX_BODY = 8 * 1024 * 1024
MAX_CONNECTIONS = 512  # beyond it uvicorn answers 503, the one refusal that a SuperNode survives
_PREFIX = "/v1/fleet/"
_NOT_FOR_NODES = {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}  # keys come in by enrolment, through Control

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


def fleet_paths() -> frozenset[str]:
    """The ten paths a SuperNode may call."""
    from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

    return frozenset(path for _, path in PROTOBUF_REQUEST_TYPES if path.startswith(_PREFIX)) - _NOT_FOR_NODES


class FleetOnly:
    """An ASGI application in front of another: passes POSTs of bounded size to the given paths, refuses all else."""

    def __init__(self, app: Application, paths: frozenset[str]) -> None:
        self._app = app
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        status = self._refusal(scope)
        if status == 0:
            await self._app(scope, receive, send)
            return
        headers = [(b"content-length", b"0"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    def _refusal(self, scope: Scope) -> int:
        path = scope["path"]
        # The path as it came, too: what decodes to an allowed path is none.
        if scope["method"] != "POST" or path not in self._paths or scope.get("raw_path", b"") != path.encode():
            return 404
        lengths = [value for name, value in scope["headers"] if name.lower() == b"content-length"]
        chunked = any(name.lower() == b"transfer-encoding" for name, _ in scope["headers"])
        if chunked or len(lengths) != 1 or not lengths[0].isdigit() or len(lengths[0]) > 18:
            return 411
        return 413 if int(lengths[0]) > MAX_BODY else 0


def application(database: str, secret: bytes, port: int) -> Any:
    """Flower's own SuperLink application with node authentication, a SuperExec secret and process isolation."""
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin
    from flwr.superlink.main import create_app

    config = SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host="127.0.0.1",
        port=port,
        insecure=True,  # of the private listener; the public one brings its own TLS
        certificates=None,
        superexec_auth_secret=secret,
        authn_plugin=load_control_authn_plugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type="grpc-rere",  # a leftover upstream still reads
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=database,
        isolation="process",
        runtime_dependency_install=False,
    )
    return create_app(config, SuperLinkLifespan)


def superexec_secret(folder: Path) -> Path:
    """The secret that SuperExec claims tasks with; made where there is none."""
    path = folder / "superexec.secret"
    with contextlib.suppress(FileExistsError):
        write_private(path, os.urandom(32))
    return path


def superexec_command(private_port: int, secret_file: Path) -> list[str]:
    """The command line that serves runs of the SuperLink whose private listener is on `private_port`.

    Its environment must name the exchange's unix socket in SEQUESTER_DISPATCH_SOCKET: ServerApps inherit it.
    """
    return [
        sys.executable, "-m", "sequester.server.flower.superexec",
        "--runtime", f"127.0.0.1:{private_port}",
        "--secret-file", str(secret_file),
    ]  # fmt: skip


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    return listener


def _server(app: Any, **settings: Any) -> Any:
    import uvicorn
    from flwr.supercore.http_logging import get_uvicorn_log_config

    class Server(uvicorn.Server):  # type: ignore[misc]
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # two servers share this process: `serve` below stops both, once

    return Server(
        uvicorn.Config(
            app,
            ws="none",
            access_log=False,
            log_config=get_uvicorn_log_config(logging.WARNING),
            server_header=False,
            timeout_graceful_shutdown=3,
            **settings,
        )
    )


async def serve(folder: Path, host: str, public_port: int, private_port: int) -> None:
    """Listen until SIGTERM or SIGINT. Once both listen, `run/superlink.json` in the folder says on which ports."""
    private_socket, public_socket = _listener("127.0.0.1", private_port), _listener(host, public_port)
    ports = {
        "public_port": public_socket.getsockname()[1],
        "private_port": private_socket.getsockname()[1],
        "pid": os.getpid(),
    }
    app = application(str(folder / "superlink.db"), superexec_secret(folder).read_bytes(), ports["private_port"])
    private = _server(app, lifespan="on")
    public = _server(
        FleetOnly(app, fleet_paths()),
        lifespan="off",
        limit_concurrency=MAX_CONNECTIONS,
        ssl_keyfile=str(folder / "tls.key"),
        ssl_certfile=str(folder / "tls.pem"),
        ssl_ca_certs=str(folder / "authority.pem"),
        ssl_cert_reqs=ssl.CERT_REQUIRED,
    )
    public.config.load()
    public.config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3

    def stop() -> None:
        private.should_exit = public.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    running = [asyncio.create_task(private.serve([private_socket]))]
    await _started(private, running[0])
    running.append(asyncio.create_task(public.serve([public_socket])))
    await _started(public, running[1])
    _announce(folder / "run" / "superlink.json", ports)
    log.info("SuperLink listens on %s:%d and 127.0.0.1:%d", host, ports["public_port"], ports["private_port"])
    try:
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stop()  # one listener alone is none
        await asyncio.gather(*running)


async def _started(server: Any, task: asyncio.Task[None]) -> None:
    while not server.started:
        if task.done():
            task.result()
            raise SystemExit("a listener of the SuperLink did not start")
        await asyncio.sleep(0.05)


def _announce(path: Path, ports: dict[str, int]) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(ports), "utf-8")
    aside.replace(path)


def main() -> None:
    """Run the SuperLink of the exchange's folder."""
    parser = argparse.ArgumentParser(prog="python -m sequester.server.flower.superlink", description="SuperLink")
    parser.add_argument("--folder", required=True, type=Path, help="the exchange's folder")
    parser.add_argument("--host", default="0.0.0.0", help="where SuperNodes come in")
    parser.add_argument("--public-port", type=int, default=0)
    parser.add_argument("--private-port", type=int, default=0)
    options = parser.parse_args()
    die_with_parent()
    folder = options.folder.resolve()
    (folder / "run" / "superlink.json").unlink(missing_ok=True)  # of the process before this one
    quiet_flower(folder / "flower")
    os.umask(0o077)  # Flower's database holds messages, node keys and logs
    asyncio.run(serve(folder, options.host, options.public_port, options.private_port))


if __name__ == "__main__":
    main()
