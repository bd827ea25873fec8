"""The gate's local control: a unix socket of the site's own account, one JSON line asked, one answered.

`sequester-client` uses it to see running studies, to leave one, and to answer a held round. Nothing that comes in here
can approve a study, raise a budget or read a number.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from sequester.protocols.errors import SiteError

_MAX_LINE = 4096
Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


async def serve(path: Path, handler: Handler, mode: int = 0o600) -> asyncio.Server:
    """A listening control socket; `handler` answers each request, and what is no request as an empty one."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            try:
                request = json.loads(await reader.readline())
            except ValueError:  # no JSON, or a line beyond the limit
                request = {}
            answer = await handler(request if isinstance(request, dict) else {})
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        finally:
            writer.close()

    server = await asyncio.start_unix_server(connected, str(path), limit=_MAX_LINE)
    path.chmod(mode)
    return server


def ask(path: Path, request: dict[str, Any], timeout_s: float = 30.0) -> dict[str, Any]:
    """The gate's answer; a `SiteError` where no gate listens or none comes in time."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(path))
            connection.sendall(json.dumps(request).encode() + b"\n")
            answer = json.loads(connection.makefile("rb").readline())
        except (OSError, ValueError):
            raise SiteError("no gate is running here", hint="start it with `sequester-client run`") from None
    if not isinstance(answer, dict) or "error" in answer:
        raise SiteError(str(answer.get("error", "the gate's answer makes no sense")), hint=str(answer.get("hint", "")))
    return answer
