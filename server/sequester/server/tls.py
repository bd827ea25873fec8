"""The exchange's side of TLS: credentials, channel settings, and who a certificate says the peer is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc

from sequester.protocols.errors import StudyError
from sequester.protocols.signing import MAX_DOCUMENT
from sequester.protocols.wire import MAX_FRAME_BYTES
from sequester.server.authority import COORDINATOR_URI, SITE_URI

# Pings stay below the idle limits of common proxies (60 s); a dead peer is noticed within 30 s. Sites ping every 30 s.
SERVER_OPTIONS: list[tuple[str, Any]] = [
    # One port serves streams (frames of at most 2 MiB) and `Publish` (one document and its bundle).
    ("grpc.max_receive_message_length", MAX_DOCUMENT + MAX_FRAME_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_metadata_size", 8192),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 5),
    ("grpc.so_reuseport", 0),
]
# Whoever has no certificate of ours is not let in with more than an enrolment, which `MAX_REQUEST` bounds more closely.
ANONYMOUS_OPTIONS = [(name, 32 * 1024 if "receive" in name else value) for name, value in SERVER_OPTIONS]


def server_credentials(folder: Path, *, require_client: bool) -> grpc.ServerCredentials:
    """TLS by `tls.key` and `tls.pem` of the folder; with `require_client`, only for certificates of our authority."""
    try:
        pair = ((folder / "tls.key").read_bytes(), (folder / "tls.pem").read_bytes())
        authority = (folder / "authority.pem").read_bytes()
    except OSError as error:
        raise StudyError(f"{error.filename}: {error.strerror}", hint="`sequester-server init` makes it") from None
    return grpc.ssl_server_credentials([pair], authority if require_client else None, require_client)


def peer_uri(context: Any) -> str:
    """The `sequester:` name in the peer's verified certificate, "" where there is none."""
    for name in context.auth_context().get("peer_uri", []):
        text = bytes(name).decode("utf-8", "replace")
        if text.startswith("sequester:"):
            return text
    return ""


def peer_site(context: Any) -> str | None:
    """The hospital at the other end, None where it is somebody else."""
    uri = peer_uri(context)
    return uri.removeprefix(SITE_URI) if uri.startswith(SITE_URI) else None


def peer_certificate(context: Any) -> bytes:
    """The peer's verified certificate, PEM; empty where there is none."""
    return bytes(next(iter(context.auth_context().get("x509_pem_cert", [])), b""))


def is_coordinator(context: Any) -> bool:
    """True where the coordinator is at the other end."""
    return peer_uri(context) == COORDINATOR_URI


def coordinator_channel(folder: Path, address: str) -> grpc.Channel:
    """A channel to the exchange with the coordinator's certificate."""
    try:
        credentials = grpc.ssl_channel_credentials(
            (folder / "authority.pem").read_bytes(),
            (folder / "tls.key").read_bytes(),
            (folder / "tls.pem").read_bytes(),
        )
    except OSError as error:
        raise StudyError(
            f"{error.filename}: {error.strerror}", hint="this command runs on the coordinator's machine"
        ) from None
    limit = 256 * 1024 * 1024
    return grpc.secure_channel(
        address,
        credentials,
        [
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", limit),
            ("grpc.enable_http_proxy", 0),
        ],
    )
