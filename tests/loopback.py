"""A consortium on loopback inside one test: a real exchange and real gates over mutual-TLS gRPC, real compute processes.

What is missing is Flower: gates are told of a study by `join`, as the ClientApp would tell them. Hospitals hold simulated
patients in PLINK files; enrolment, pinning, freezing and approval are the product's own functions.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio

import consortium
import released
from sequester.client.config import Home
from sequester.client.gate import approval, peers
from sequester.client.gate import exchange as calls
from sequester.client.gate.enrolment import enrol
from sequester.client.gate.gate import Consortium
from sequester.client.gate.ledger import Ledger
from sequester.client.ingest.freeze import freeze
from sequester.protocols import privacy
from sequester.protocols.signing import raw_public, sha256, sign_document
from sequester.protocols.study import Study, study_json, validated
from sequester.server import authority, services
from sequester.server.exchange import Exchange
from sequester.server.ports import Ports
from sequester.server.serve import listen
from sequester.server.store import Store

BUNDLE = b"a bundle without a line of program"


@dataclass
class Hospital:
    """One site: its home, and its gate while it runs."""

    name: str
    home: Home
    gate: Consortium | None = None
    ledger: Ledger | None = None

    def open(self) -> Consortium:
        """Start the gate."""
        config = self.home.config()
        self.ledger = Ledger(self.home.dataset(config.data.id))
        self.gate = Consortium(self.home, "alps", config, self.ledger)
        return self.gate

    async def close(self) -> None:
        """Stop the gate; journals and ledger keep what is needed."""
        if self.gate is not None and self.ledger is not None:
            await self.gate.stop()
            self.ledger.close()
        self.gate = self.ledger = None

    def key(self) -> bytes:
        """The raw identity key."""
        return raw_public(approval.identity(self.home, "alps"))


@dataclass
class Loopback:
    """The consortium `alps`; `exchange` is there while `serving`."""

    root: Path
    founded: consortium.Exchange
    hospitals: dict[str, Hospital]
    exchange: Exchange | None = None
    _servers: list[grpc.aio.Server] = field(default_factory=list)
    _store: Store | None = None

    def study(self, fields: dict[str, Any]) -> Study:
        """The fields with this consortium's names and keys in them, validated and calibrated as `study sign` does."""
        whole = {
            "format": 1, "consortium": "alps", "lineage": "test", "title": {"en": "A test"}, "summary": {"en": "A test."},
            "question": "Does it run?", "purpose": ["DUO:0000007"], "contact": "coordinator@example.org",
            "ethics": [{"reference": "vote", "expires": "2999-01-01T00:00:00Z"}],
            "agreement": [{"reference": "agreement", "expires": "2999-01-01T00:00:00Z"}],
            "retention_days": 30, "expires": "2999-01-01T00:00:00Z", "bundle": sha256(BUNDLE),
            "sites": [{"id": name, "key": hospital.key().hex()} for name, hospital in self.hospitals.items()],
            **fields,
        }  # fmt: skip
        return validated(study_json(privacy.calibrate(validated(whole))))

    def signed(self, study: Study) -> bytes:
        """The coordinator's signature under it."""
        return sign_document("study", study_json(study), authority.signing_key(self.founded.home))

    async def publish_and_approve(self, study: Study, *, but: Sequence[str] = (), tried: bool = True) -> str:
        """The study's digest, after every hospital froze its cohort and said yes (`but` these).

        Unless `tried` is false their release gates have passed before, since most tests are about something else.
        """
        assert self.exchange is not None
        digest = self.exchange.publish(self.signed(study), BUNDLE)
        for name, hospital in self.hospitals.items():
            if name not in but:
                await asyncio.to_thread(self._approve, hospital, digest)
                if tried:
                    released.passed_here(hospital.home, "alps", study)
        return digest

    def _approve(self, hospital: Hospital, digest: str) -> None:
        calls.fetch_studies(hospital.home, "alps")
        study, _ = calls.stored_study(hospital.home, "alps", digest)
        config = hospital.home.config()
        freeze(hospital.home, config, study, digest)
        pinned = peers.pinned(hospital.home, "alps")
        shown = approval.text(study, digest, config, pinned)
        key = approval.identity(hospital.home, "alps")
        document = approval.sign(hospital.home, "alps", config, study, shown, "A. Keeper", "dpo", key)
        calls.send_decision(hospital.home, "alps", document)

    # ---- the exchange -------------------------------------------------------------------------------------------

    async def open_exchange(self) -> Exchange:
        """Start the exchange on the ports it has had, and take up what was running."""
        folder = self.founded.home.exchange
        key = bytes.fromhex((folder / "coordinator.pub").read_text().strip())
        ports = Ports(folder, self.founded.home.config(folder))
        self._store = Store(folder)
        self.exchange = Exchange(self._store, "alps", key)
        self.exchange.resume_all()
        rest = [
            services.site_service(self.exchange),
            services.coordinator_service(self.exchange, key, *consortium.NO_FLOWER),
        ]
        self._servers = [await listen(self.founded.home, "127.0.0.1", ports, "exchange_port", rest, True)]
        return self.exchange

    async def close_exchange(self) -> None:
        """Stop it as a crash would, but for the sockets: nothing is written that a crash would not leave."""
        assert self.exchange is not None and self._store is not None
        await self.exchange.close()
        for server in self._servers:
            await server.stop(None)
        self._store.close()
        self.exchange = None

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Exchange]:
        """The exchange and every gate, until the block ends."""
        try:
            exchange = await self.open_exchange()
            for hospital in self.hospitals.values():
                hospital.open()
            yield exchange
        finally:
            for hospital in self.hospitals.values():
                await hospital.close()
            if self.exchange is not None:
                await self.close_exchange()

    async def call(self, digest: str) -> dict[str, tuple[str, str]]:
        """Each gate's answer to the study's `join`."""
        gates = {name: hospital.gate for name, hospital in self.hospitals.items() if hospital.gate is not None}
        said = await asyncio.gather(*(gate.join(digest, sha256(BUNDLE)) for gate in gates.values()))
        return dict(zip(gates, said, strict=True))

    async def until(self, ready: Callable[[], bool], within_s: float = 120.0) -> None:
        """Wait for something to be true."""
        async with asyncio.timeout(within_s):
            while not ready():
                await asyncio.sleep(0.02)

    async def ended(self, digest: str, within_s: float = 120.0) -> dict[str, Any]:
        """The study's status once it has ended, receipts of the standing hospitals included."""
        assert self.exchange is not None
        exchange = self.exchange
        await self.until(lambda: digest not in exchange.running(), within_s)
        return exchange.status(digest)

    def results(self, digest: str) -> dict[str, Any]:
        """results.json."""
        assert self.exchange is not None
        found: dict[str, Any] = json.loads(self.exchange.store.results(digest) or b"{}")
        return found


def enrolled(root: Path, hospitals: dict[str, Path], policy: str = "", build: str = "GRCh38") -> Loopback:
    """A founded consortium whose hospitals are enrolled and have pinned each other; `hospitals` maps name to data folder."""
    founded = consortium.founded(root / "server")
    homes = {}
    with founded.listening():
        for name, data in hospitals.items():
            home = Home(root / name)
            home.root.mkdir(parents=True)
            genotypes = f'genotypes = "{data / "genotypes"}"\n' if (data / "genotypes.bed").exists() else ""
            home.site_toml.write_text(
                f'[site]\nid = "{name}"\n[data]\n{genotypes}phenotypes = "{data / "phenotypes.csv"}"\nbuild = "{build}"\n'
                f"[policy]\n{policy}\n",
                "utf-8",
            )
            asked = enrol(home, founded.token(name), wait=False)
            founded.admit(name, asked.fingerprint)
            enrol(home, None)
            homes[name] = Hospital(name, home)
        for hospital in homes.values():
            calls.fetch_members(hospital.home, "alps")
            for other in peers.members(hospital.home, "alps"):
                if other.site != hospital.name:
                    peers.pin(hospital.home, "alps", other.site, other.fingerprint)
    return Loopback(root, founded, homes)


def run(main: Callable[[], Awaitable[None]]) -> None:
    """One event loop for exchange and gates, as gRPC wants it."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    asyncio.run(main())  # type: ignore[arg-type]
