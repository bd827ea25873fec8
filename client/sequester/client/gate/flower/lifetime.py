"""The environment in which a site's Flower processes run: offline, past every proxy, without upstream's side doors."""

from __future__ import annotations

import os
from pathlib import Path

_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
# The SuperNode's only way out is the gate's forwarder, which speaks to the hospital's proxy itself: a SuperNode that
# does so ends at that proxy's first 502.
_UNWANTED = (
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy",
    "FLWR_INTERNAL_GRPC_CONTROL_API", "FLWR_INTERNAL_GRPC_FLEET_API", "FLWR_TRACING_ENABLED", "FLWR_OIDC_ENABLED",
)  # fmt: skip


def quiet_flower(home: Path | None) -> None:
    """Set this process's environment before flwr is imported; `home` is Flower's own folder unless FLWR_HOME names one."""
    os.environ.update(_QUIET)
    if home is not None:
        os.environ.setdefault("FLWR_HOME", str(home))
    for name in _UNWANTED:
        os.environ.pop(name, None)
