"""Stock `flower-superexec`, which starts one ServerApp process for each run, under a launcher that ends with its parent."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from sequester.server.flower.lifetime import die_with_parent, quiet_flower


def main() -> None:
    """Run until the parent ends or a signal comes."""
    parser = argparse.ArgumentParser(prog="python -m sequester.server.flower.superexec", description=__doc__)
    parser.add_argument("--runtime", required=True, metavar="HOST:PORT", help="the SuperLink's private listener")
    parser.add_argument("--secret-file", required=True, type=Path)
    options = parser.parse_args()
    die_with_parent()
    quiet_flower(options.secret_file.parent / "flower")
    # SuperExec finds `flwr-serverapp` by PATH: the one installed beside this interpreter.
    beside = Path(sys.executable).parent
    os.environ["PATH"] = os.pathsep.join([str(beside), os.environ.get("PATH", os.defpath)])
    os.environ.setdefault("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.2")

    from flwr.supercore.cli.flower_superexec import flower_superexec

    sys.argv = [
        "flower-superexec",
        "--runtime-api-address", options.runtime,
        "--insecure",
        "--superexec-auth-secret-file", str(options.secret_file),
    ]  # fmt: skip
    flower_superexec()


if __name__ == "__main__":
    main()
