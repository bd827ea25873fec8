"""Starts everything a site runs and stops it again: gate, door, forwarder, SuperNode, executor, control socket.

One process (this one) holds the keys; the SuperNode and the executor are children with their own Flower homes, or
separate units of the operating system where a hospital runs them under other accounts (`deploy/systemd`).
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

log = logging.getLogger("sequester.gate")


class _JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, text. Texts are ours and hold no data of a person."""

    def format(self, record: logging.LogRecord) -> str:
        row: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "from": record.name,
            "text": record.getMessage(),
        }
        return json.dumps(row)


def log_to_stderr() -> None:
    """JSON lines on standard error for everything this process logs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
