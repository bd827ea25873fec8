"""The site's side of mutual TLS: where its consortium's exchange is, and channels to it with the site's certificate."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import grpc
import grpc.aio
from cryptography import x509
from pydantic import BaseModel, ConfigDict, ValidationError

from sequester.client.config import Home
from sequester.protocols.enrolment import ConsortiumId, Hex32, Host, Port, Token
from sequester.protocols.errors import SiteError
from sequester.protocols.signing import MAX_DOCUMENT, canonical
from sequester.protocols.study import SiteId
from sequester.protocols.wire import MAX_FRAME_BYTES

# Below the 60 s after which common proxies and firewalls forget a silent connection.
_KEEPALIVE: list[tuple[str, Any]] = [
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.max_metadata_size", 8192),
]
RENEW = "ask the coordinator for an invitation and `sequester-client enrol`: it keeps your identity and your pins"
_MAX_ANSWER = 16 * MAX_DOCUMENT  # `Studies` answers with every study in one message


class Membership(BaseModel):
    """`consortium.json`: which consortium, as which site, and where. `authority` is the SHA-256 of its certificate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    consortium: ConsortiumId
    site: SiteId
    host: Host
    enrolment_port: Port
    exchange_port: Port
    superlink_port: Port
    authority: Hex32

    def address(self, port: int) -> str:
        """`host:port`, as gRPC wants it."""
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"


def membership_of(token: Token) -> Membership:
    """What a token says, without its secret."""
    return Membership.model_validate(token.model_dump(exclude={"secret", "expires"}))


def write_membership(path: Path, membership: Membership) -> None:
    """Write `consortium.json`."""
    path.write_bytes(canonical(membership.model_dump()))


def membership(folder: Path) -> Membership:
    """The membership that a consortium's folder holds."""
    path = folder / "consortium.json"
    try:
        return Membership.model_validate(json.loads(path.read_bytes()))
    except (OSError, ValueError, ValidationError):
        raise SiteError(f"{path} is missing or damaged", hint="enrol again with a new token") from None


def certificate_end(folder: Path) -> datetime | None:
    """When this site's certificate ends, UTC; None where it cannot be read."""
    try:
        return x509.load_pem_x509_certificate((folder / "tls.pem").read_bytes()).not_valid_after_utc
    except (OSError, ValueError):
        return None


def key_faults(folder: Path) -> list[str]:
    """Keys of a consortium's folder that are missing, or that others on this machine may read."""
    beyond = dict.fromkeys(("identity.key", "tls.key", "supernode.key"), 0o077) | {"superexec.secret": 0o027}
    return [text for name, bits in beyond.items() if (text := open_to_others(folder / name, bits))]


def open_to_others(path: Path, beyond: int) -> str:
    """What is wrong with a file that should be there with none of these mode bits, "" where nothing is."""
    try:
        mode = path.stat().st_mode & 0o777
    except OSError as error:
        return f"{path}: {error.strerror}"
    return f"{path}: mode {mode:04o}" if mode & beyond else ""


def site_channel(folder: Path) -> grpc.Channel:
    """A channel for single calls to the exchange; `with` closes it."""
    address, credentials, options = _ends(folder, _MAX_ANSWER)
    return grpc.secure_channel(address, credentials, options)


def site_channel_aio(folder: Path) -> grpc.aio.Channel:
    """A channel for a study's stream: no frame beyond 2 MiB either way."""
    address, credentials, options = _ends(folder, MAX_FRAME_BYTES + 65536)
    return grpc.aio.secure_channel(address, credentials, options)


def proxy_options(https_proxy: str) -> list[tuple[str, Any]]:
    """The way out that site.toml names, and no other: the environment's proxies are not asked."""
    return [("grpc.http_proxy", https_proxy)] if https_proxy else [("grpc.enable_http_proxy", 0)]


def _ends(folder: Path, max_receive: int) -> tuple[str, grpc.ChannelCredentials, list[tuple[str, Any]]]:
    place = membership(folder)
    try:
        pem = [(folder / name).read_bytes() for name in ("authority.pem", "tls.key", "tls.pem")]
    except OSError as error:
        raise SiteError(f"{error.filename}: {error.strerror}", hint="enrol again with a new token") from None
    https_proxy = Home(folder.parent.parent).config().network.https_proxy
    options = [
        *_KEEPALIVE,
        *proxy_options(https_proxy),
        ("grpc.max_receive_message_length", max_receive),
        ("grpc.max_send_message_length", MAX_DOCUMENT + MAX_FRAME_BYTES),
    ]
    return place.address(place.exchange_port), grpc.ssl_channel_credentials(*pem), options
