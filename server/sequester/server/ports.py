"""The exchange's four ports. A port 0 in consortium.toml means a free one, chosen once and kept in `ports.json`:

hospitals learn the ports when they enrol, so a restart must listen where it did.
"""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path

from sequester.server.authority import PORTS
from sequester.server.config import ConsortiumConfig


class Ports:
    """Port by name; 0 where none was chosen yet."""

    def __init__(self, folder: Path, config: ConsortiumConfig) -> None:
        self._path = folder / "ports.json"
        kept = json.loads(self._path.read_text("utf-8")) if self._path.exists() else {}
        self._ports = {name: getattr(config, name) or int(kept.get(name, 0)) for name in PORTS}

    def __getitem__(self, name: str) -> int:
        return self._ports[name]

    def choose(self, **chosen: int) -> None:
        """Keep ports; the file appears when all four are known."""
        self._ports.update(chosen)
        if all(self._ports.values()):
            unfinished = self._path.with_suffix(".new")
            unfinished.write_text(json.dumps(self._ports), "utf-8")
            unfinished.replace(self._path)


def bind_address(host: str) -> str:
    """Where to listen: on loopback where the exchange is known by a loopback address, else on every interface.

    >>> bind_address("127.0.0.1"), bind_address("exchange.example.org")
    ('127.0.0.1', '0.0.0.0')
    """
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    return ("127.0.0.1" if host == "localhost" else host) if is_loopback else "0.0.0.0"
