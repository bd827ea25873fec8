"""One TCP connection out of the hospital, directly or through its CONNECT proxy; and what the other end presents in TLS.

The handshake here verifies nothing and sends nothing of this site: it fetches certificates, to be compared with a hash that
came by another channel before anybody trusts the connection.
"""

from __future__ import annotations

import base64
import socket
import ssl
from typing import Any
from urllib.parse import unquote, urlsplit

from sequester.protocols.errors import PeerError, SiteError

DIAL_S = 5.0
_MAX_ANSWER = 8192


def dial(host: str, port: int, https_proxy: str = "", timeout_s: float = DIAL_S) -> socket.socket:
    """A connected socket; a `SiteError` that says which part of the way is closed."""
    if not https_proxy:
        return _connected(host, port, timeout_s, f"{host}:{port}")
    proxy = urlsplit(https_proxy)
    try:
        proxy_host, proxy_port = proxy.hostname, proxy.port or 3128
    except ValueError:
        proxy_host, proxy_port = None, 0
    if proxy.scheme != "http" or not proxy_host:
        raise SiteError("https_proxy is not http://[user:password@]host:port", hint="correct [network] in site.toml")
    # The proxy's password stays out of every message.
    connection = _connected(proxy_host, proxy_port, timeout_s, f"the proxy {proxy_host}:{proxy_port}")
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    if proxy.username is not None:
        pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
        lines.append(f"Proxy-Authorization: Basic {base64.b64encode(pair.encode()).decode()}")
    try:
        connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        answer = b""
        while b"\r\n\r\n" not in answer:
            more = connection.recv(1)  # a byte at a time: what follows the answer belongs to TLS
            if not more or len(answer) > _MAX_ANSWER:
                raise OSError("no answer")
            answer += more
    except OSError:
        connection.close()
        raise SiteError(
            f"the proxy {proxy_host}:{proxy_port} did not answer", hint="ask who runs the hospital's proxy"
        ) from None
    status = answer.split(b" ", 2)[1:2]
    if status != [b"200"]:
        connection.close()
        said = status[0][:3].decode("ascii", "replace") if status else "nothing"
        raise SiteError(
            f"the proxy {proxy_host}:{proxy_port} answered {said} for {target}",
            hint="407: user and password in https_proxy; 403: ask for this host and port; 502-504: the way beyond it",
        )
    return connection


def _connected(host: str, port: int, timeout_s: float, whom: str) -> socket.socket:
    try:
        return socket.create_connection((host, port), timeout_s)
    except socket.gaierror as error:
        raise SiteError(
            f"the name `{host}` does not resolve ({error.strerror})", hint="ask for a DNS entry, or check the spelling"
        ) from None
    except TimeoutError:
        raise SiteError(
            f"{whom} does not answer within {timeout_s:.0f} s",
            hint="a firewall drops it: ask for outbound TCP to this host and port",
        ) from None
    except OSError as error:
        raise SiteError(
            f"{whom} cannot be reached: {error.strerror}",
            hint="nothing listens there, or a firewall rejects it: ask the coordinator, then for outbound TCP",
        ) from None


def presented(host: str, port: int, https_proxy: str = "", timeout_s: float = DIAL_S) -> list[bytes]:
    """The certificates (DER) that a TLS server presents, its own first. Not verified, not to be trusted by themselves."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    with dial(host, port, https_proxy, timeout_s) as connection:
        try:
            with context.wrap_socket(connection, server_hostname=host) as tls:
                return _chain(tls)
        except (OSError, ssl.SSLError) as error:
            raise PeerError(
                f"{host}:{port} does not speak TLS ({type(error).__name__})",
                hint="another service listens there, or a middlebox ends the connection: compare host and port",
            ) from None


def _chain(connection: ssl.SSLSocket) -> list[bytes]:
    public: Any = getattr(connection, "get_unverified_chain", None)  # Python 3.13
    if public is not None:
        return [bytes(certificate) for certificate in public()]
    inner: Any = connection._sslobj  # type: ignore[attr-defined]  # Python 3.11 and 3.12 have it one level down
    return [ssl.PEM_cert_to_DER_cert(certificate.public_bytes()) for certificate in inner.get_unverified_chain() or ()]
