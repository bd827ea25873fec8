"""The other hospitals: who the coordinator says they are, and whom a person here has compared.

A `member` document is the coordinator's word. A pin is this hospital's own: somebody heard the fingerprint over another
channel. Only pins count against colluders (spec/secure-aggregation.md, C26); a key that changed is not pinned.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from sequester.client.config import Home
from sequester.protocols.enrolment import Hex32, read_fingerprint
from sequester.protocols.errors import PeerError, SiteError
from sequester.protocols.signing import fingerprint, open_document, spoken
from sequester.protocols.study import SiteId


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    site: SiteId
    identity_key: Hex32
    supernode_key: str
    certificate_sha256: Hex32
    time: str


@dataclass(frozen=True, slots=True)
class Member:
    """A hospital, by the coordinator's word."""

    site: str
    identity_key: bytes
    supernode_key: str
    certificate_sha256: str

    @property
    def fingerprint(self) -> str:
        """What two people compare, hex."""
        return fingerprint(self.identity_key)


def read_member(data: bytes, coordinator: bytes) -> Member:
    """The hospital in a `member` document that the coordinator signed."""
    document = open_document(data, "member", coordinator)
    try:
        body = _Body.model_validate(document.body)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise PeerError(f"a member document with a wrong `{where}`", hint="tell the coordinator") from None
    return Member(body.site, bytes.fromhex(body.identity_key), body.supernode_key, body.certificate_sha256)


def members(home: Home, consortium: str) -> list[Member]:
    """Every hospital whose member document lies here, verified again, by name. Two of one key are refused."""
    folder = home.consortium(consortium)
    coordinator = _coordinator_key(folder)
    found = [read_member(path.read_bytes(), coordinator) for path in sorted((folder / "members").glob("*.json"))]
    keys = [member.identity_key for member in found]
    names = [member.site for member in found]
    if len(set(keys)) < len(keys) or len(set(names)) < len(names):
        raise PeerError(
            f"{len(keys)} hospitals with {len(set(keys))} keys and {len(set(names))} names",
            hint="one hospital counts twice: refuse its studies and ask the coordinator over another channel",
        )
    return sorted(found, key=lambda member: member.site)


def _coordinator_key(folder: Path) -> bytes:
    try:
        return bytes.fromhex((folder / "coordinator.pub").read_text("ascii").strip())
    except (OSError, ValueError):
        raise SiteError(f"{folder / 'coordinator.pub'} is missing or damaged", hint="enrol again") from None


def pins(home: Home, consortium: str) -> dict[str, bytes]:
    """Hospital -> the identity key that a person here compared."""
    path = home.consortium(consortium) / "pins.json"
    try:
        value = json.loads(path.read_bytes())
        if value["format"] != 1:
            raise ValueError
        rows: dict[str, Any] = value["pins"]
        adapter = TypeAdapter(Hex32)
        return {site: bytes.fromhex(adapter.validate_python(row["key"])) for site, row in rows.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise SiteError(
            f"{path} is damaged", hint="remove it and compare the fingerprints again; until then nobody is pinned"
        ) from None


def pinned(home: Home, consortium: str) -> frozenset[bytes]:
    """The identity keys that a person here compared."""
    return frozenset(pins(home, consortium).values())


def pin(home: Home, consortium: str, site: str, typed: str) -> Member:
    """Pin a hospital by the fingerprint that somebody there read out; the member that is pinned now.

    What was typed must match the coordinator's word to the last digit; otherwise nothing changes.
    """
    member = next((member for member in members(home, consortium) if member.site == site), None)
    if member is None:
        raise SiteError(
            f"no hospital `{site}` is known in {consortium}",
            hint="`sequester-client peers --refresh` asks who there is",
        )
    if read_fingerprint(typed) != member.fingerprint:
        raise SiteError(
            f"the fingerprint does not match: the consortium says `{site}` is {spoken(member.fingerprint)[:19]} ...",
            hint="read it out again; if it still differs, somebody poses as that hospital: refuse, tell both",
        )
    _write(home, consortium, pins(home, consortium) | {site: member.identity_key})
    return member


def unpin(home: Home, consortium: str, site: str) -> None:
    """Forget a pin: the hospital counts as a possible colluder from the next study on."""
    held = pins(home, consortium)
    if site not in held:
        raise SiteError(f"`{site}` is not pinned in {consortium}", hint="`sequester-client peers` lists who is")
    del held[site]
    _write(home, consortium, held)


def _write(home: Home, consortium: str, held: dict[str, bytes]) -> None:
    path = home.consortium(consortium) / "pins.json"
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    try:
        times = {site: row["time"] for site, row in json.loads(path.read_bytes())["pins"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        times = {}
    rows = {site: {"key": key.hex(), "time": times.get(site, now)} for site, key in sorted(held.items())}
    temporary = path.with_suffix(".new")
    with temporary.open("wb") as file:
        file.write(json.dumps({"format": 1, "pins": rows}, indent=1).encode())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
