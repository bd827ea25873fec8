"""How the Flower processes of the consortium start and end: with their parent, offline, past every proxy."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
# A proxy would see the Control and Runtime APIs; the second half opens servers or traces nobody asked for.
_UNWANTED = (
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy",
    "FLWR_INTERNAL_GRPC_CONTROL_API", "FLWR_INTERNAL_GRPC_FLEET_API", "FLWR_TRACING_ENABLED", "FLWR_OIDC_ENABLED",
)  # fmt: skip


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent (the thread that started us) ends; ends at once if it already has."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def quiet_flower(home: Path) -> None:
    """Set this process's environment before flwr is imported; `home` is Flower's own folder unless FLWR_HOME names one."""
    os.environ.update(_QUIET)
    os.environ.setdefault("FLWR_HOME", str(home))
    for name in _UNWANTED:
        os.environ.pop(name, None)
