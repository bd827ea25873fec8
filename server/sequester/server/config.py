"""Where a consortium keeps things.

    HOME/coordinator/    the coordinator's signing key, the certificate authority, a TLS client key: one person
    HOME/exchange/       the exchange's account: TLS server key, store.db, superlink.db; no signing key, no authority

Outside the demo the two folders live on two machines (server/README.md); nothing in `exchange/` can invent a hospital.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from sequester.protocols.errors import StudyError


class ConsortiumConfig(BaseModel):
    """`consortium.toml`, written by `init` into both folders. Port 0: choose a free one, written to `ports.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    consortium: str
    host: str = "127.0.0.1"
    enrolment_port: int = 7441
    exchange_port: int = 7442
    superlink_port: int = 7443
    control_port: int = 7444  # loopback only: SuperLink's Control, Runtime and Fleet APIs


@dataclass(frozen=True, slots=True)
class Home:
    """The paths of one consortium."""

    root: Path

    @property
    def coordinator(self) -> Path:
        return self.root / "coordinator"

    @property
    def exchange(self) -> Path:
        return self.root / "exchange"

    @property
    def dispatch_socket(self) -> Path:
        """Where the Flower ServerApp asks the exchange; readable by the exchange's account only."""
        return self.exchange / "run" / "dispatch.sock"

    def config(self, folder: Path | None = None) -> ConsortiumConfig:
        """The consortium's settings from `folder` (default: exchange, else coordinator)."""
        for place in [folder] if folder else [self.exchange, self.coordinator]:
            path = place / "consortium.toml"
            if path.is_file():
                try:
                    return ConsortiumConfig.model_validate(tomllib.loads(path.read_text("utf-8")))
                except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError) as error:
                    raise StudyError(
                        f"{path}: {error}", hint="correct it, or found the consortium again elsewhere"
                    ) from None
        raise StudyError(
            f"no consortium.toml under {self.root}",
            hint="name its folder with --home or SEQUESTER_SERVER_HOME, or found one with `sequester-server init`",
        )


def home(path: Path | None = None) -> Home:
    """The consortium's home: the argument, else SEQUESTER_SERVER_HOME, else `~/.sequester-server`."""
    return Home(path or Path(os.environ.get("SEQUESTER_SERVER_HOME", str(Path.home() / ".sequester-server"))))
