"""The site's executor: claims Flower's tasks, and runs the installed ClientApp for each in a forked child.

A stock executor unpacks the bundle and imports what it finds. This one asks the gate whether the bundle's SHA-256 is
approved, anew for each task, and unpacks nothing. Runs as an account that can read the SuperExec secret and reach the
door, and no other file of the gate. Linux only: a child must end with its parent, or its SuperNode hangs for good.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sequester.client.gate.flower import door, lifetime
from sequester.client.isolation import die_with_parent
from sequester.protocols.errors import SiteError

log = logging.getLogger("sequester.executor")

POLL_S = 0.1
CHILD_S = 2 * door.WAIT_S  # a child older than this is deaf; Flower hears of its end within a minute
FAB_ID = "sequester/sequester"
_PROTECTED = {"/flwr.proto.Runtime/AcquireTask"}


class Guard:
    """The two functions that take the place of upstream's, within one child."""

    def __init__(self, door_path: Path) -> None:
        self._door = door_path
        self._sha256 = ""
        self._gate_answers = True

    def install_from_fab(self, content: bytes, *_: object, **__: object) -> None:
        """Let an approved bundle pass, unpack none; a refusal is `LoadClientAppError`, a fixed sentence over there."""
        from flwr.clientapp.client_app import LoadClientAppError

        self._sha256 = hashlib.sha256(content).hexdigest()
        try:
            approved = door.bundle_approved(self._door, self._sha256)
        except SiteError as error:
            log.warning("bundle %s: %s", self._sha256, error.message)
            self._gate_answers = False
            return
        if not approved:
            log.error("refused bundle %s: no study approved here names it", self._sha256)
            raise LoadClientAppError("bundle not approved")

    def get_load_client_app_fn(self, **_: object) -> Callable[[str, str, str], Any]:
        """A loader that compares the bundle's label with its content and gives the installed, guarded app."""
        from flwr.clientapp.client_app import LoadClientAppError

        from sequester.client.gate.flower import app

        def load(fab_id: str, fab_version: str, fab_hash: str) -> Any:
            if fab_id != FAB_ID or fab_hash != self._sha256 or not self._sha256:
                log.error("refused bundle %s: it came labelled %.64s %.64s", self._sha256, fab_id, fab_hash)
                raise LoadClientAppError("bundle mislabelled")
            return app.guarded(self._sha256) if self._gate_answers else app.not_yet

        return load


class Executor:
    """Polls one SuperNode's Runtime API; forks from the main thread, with no other thread and no channel open."""

    def __init__(self, runtime: str, secret: bytes, door_path: Path) -> None:
        import httpx
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
        from flwr.supercore.runtime import RuntimeHttpClient

        self._runtime = runtime
        self._door = door_path
        self._children: dict[int, float] = {}
        self._failing = ""
        # Without upstream's retry: while it sleeps no child is reaped, and on 401 it interrupts the process.
        self._client = RuntimeHttpClient.from_server_address(
            runtime,
            insecure=True,
            root_certificates=None,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperExec"),
                SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=_PROTECTED),
            ],
        )
        self._errors = (httpx.HTTPError, OSError, ValueError)

    def run(self) -> None:
        """Claim tasks until the process ends."""
        gc.collect()
        gc.freeze()
        while True:
            self._reap()
            token = self._claim()
            if token:
                self._fork(token)
            time.sleep(1.0 if self._failing else POLL_S)

    def _claim(self) -> str:
        from flwr.proto.runtime_pb2 import AcquireTaskRequest
        from flwr.supercore.constant import TaskType

        try:
            answer = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        except self._errors as error:
            status = getattr(getattr(error, "response", None), "status_code", "")
            failing = f"{type(error).__name__} {status}".strip()
            if failing != self._failing:
                log.warning("the SuperNode at %s gives no tasks: %s", self._runtime, failing)
            self._failing = failing
            return ""
        if self._failing:
            log.info("the SuperNode at %s answers again", self._runtime)
        self._failing = ""
        return str(answer.token) if answer.HasField("task") else ""

    def _fork(self, token: str) -> None:
        parent = os.getpid()
        pid = os.fork()
        if pid:
            self._children[pid] = time.monotonic()
            return
        status = 1
        try:
            die_with_parent()
            if os.getppid() == parent:
                status = answer_task(self._runtime, token, self._door)
        except BaseException:
            log.exception("a task ended with an error")
        finally:
            os._exit(status)

    def _reap(self) -> None:
        for pid, since in list(self._children.items()):
            done, _ = os.waitpid(pid, os.WNOHANG)
            if done:
                del self._children[pid]
            elif time.monotonic() - since > CHILD_S:
                # Never another signal: a child that ends without a reply by any other hangs its SuperNode for good.
                log.error("child %d has been at it for %.0f s and is killed", pid, CHILD_S)
                os.kill(pid, signal.SIGKILL)


def answer_task(runtime: str, token: str, door_path: Path) -> int:
    """Run one task in this process, upstream's way but for the two functions; the exit status it asks for."""
    from flwr.supernode.runtime import run_clientapp as upstream

    guard = Guard(door_path)
    upstream.install_from_fab = guard.install_from_fab
    upstream.get_load_client_app_fn = guard.get_load_client_app_fn
    try:
        # insecure, no certificates, no parent monitor (it interrupts: fact 6), no dependency installation
        upstream.run_clientapp(runtime, token, True, None, None, False)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def main() -> None:
    """Run the executor of one SuperNode."""
    parser = argparse.ArgumentParser(prog="python -m sequester.client.gate.flower.executor", description="executor")
    parser.add_argument("--runtime", required=True, metavar="HOST:PORT", help="the SuperNode's Runtime API")
    parser.add_argument("--secret-file", required=True, type=Path)
    parser.add_argument("--door", required=True, type=Path, help="the gate's socket for Flower")
    options = parser.parse_args()
    die_with_parent()
    lifetime.quiet_flower(None)
    os.environ[door.VARIABLE] = str(options.door)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # ten lines a second

    # Warm, so that a child starts in milliseconds.

    import sequester.client.gate.flower.app  # noqa: F401

    Executor(options.runtime, options.secret_file.read_bytes(), options.door).run()


if __name__ == "__main__":
    main()
