"""Stock `flower-supernode` under a launcher: it shows the site's certificate, and ends when its loop does.

Upstream's process lives on when its loop has ended on an error, with `/health` at 200 and the node offline for ever
(spec/flower.md, fact 7). Here it ends with status 75 and whoever started it starts it again.
"""

from __future__ import annotations

import argparse
import logging
import os
import ssl
import sys
from pathlib import Path
from typing import Any

from sequester.client.gate.flower import lifetime
from sequester.client.isolation import die_with_parent

log = logging.getLogger("sequester.supernode")

LOOP_ENDED = 75


def show_certificate(certificate: Path, key: Path) -> None:
    """Have every TLS client of flwr in this process present the site's certificate, over TLS 1.3 only."""
    from flwr.supercore.protobuf.client import ProtobufClient

    upstream = ProtobufClient.__init__

    def init(self: Any, *args: Any, verify: ssl.SSLContext | bool | str = True, **kwargs: Any) -> None:
        if isinstance(verify, ssl.SSLContext):
            verify.minimum_version = ssl.TLSVersion.TLSv1_3
            verify.load_cert_chain(certificate, key)
        upstream(self, *args, verify=verify, **kwargs)

    ProtobufClient.__init__ = init


def main() -> None:
    """Run the SuperNode of one consortium's folder until its loop ends or a signal comes."""
    parser = argparse.ArgumentParser(prog="python -m sequester.client.gate.flower.supernode", description="SuperNode")
    parser.add_argument("--superlink", required=True, metavar="HOST:PORT", help="the gate's forwarder")
    parser.add_argument("--folder", required=True, type=Path, help="the consortium's folder")
    parser.add_argument("--port", required=True, type=int, help="where the Runtime API listens on 127.0.0.1")
    parser.add_argument("--secret-file", required=True, type=Path)
    options = parser.parse_args()
    die_with_parent()
    folder = options.folder.resolve()
    lifetime.quiet_flower(folder / "flower")
    show_certificate(folder / "tls.pem", folder / "tls.key")

    from flwr.supernode.cli import flower_supernode

    sys.argv = [
        "flower-supernode",
        "--superlink", options.superlink,
        "--root-certificates", str(folder / "authority.pem"),
        "--auth-supernode-private-key", str(folder / "supernode.key"),
        "--isolation", "process",
        "--superexec-auth-secret-file", str(options.secret_file),
        "--host", "127.0.0.1",
        "--port", str(options.port),
    ]  # fmt: skip
    try:
        flower_supernode()
    except SystemExit as end:
        # A signal, a refused key, a wrong clock: upstream has said why. Its threads would keep the process.
        os._exit(end.code if isinstance(end.code, int) else 1)
    except BaseException:
        log.exception("the SuperNode's loop ended with an error")
    os._exit(LOOP_ENDED)


if __name__ == "__main__":
    main()
