"""What we lean on inside flwr 1.41.0. A failure here means: read spec/flower.md again before the pin moves."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import flwr
import pytest

from sequester.server.flower.bundle import bundle_sha256, standard_bundle
from sequester.server.flower.superlink import MAX_BODY, FleetOnly, application, fleet_paths

TEN = {
    "/v1/fleet/" + name
    for name in (
        "activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages", "get-run",
        "get-fab", "push-object", "pull-object", "confirm-message-received",
    )
}  # fmt: skip


def test_flwr_is_the_version_that_the_adapters_were_written_for() -> None:
    assert flwr.__version__ == "1.41.0"


def test_run_clientapp_takes_the_arguments_and_names_the_two_globals_that_the_executor_replaces() -> None:
    from flwr.supernode.runtime import run_clientapp as module

    signature = inspect.signature(module.run_clientapp)
    assert list(signature.parameters) == [
        "runtime_api_address", "token", "insecure", "certificates", "parent_pid", "runtime_dependency_install",
    ]  # fmt: skip
    names = module.run_clientapp.__code__.co_names
    assert {"install_from_fab", "get_load_client_app_fn"} <= set(names)
    # Both are globals of that module and of no inner function, so replacing them there replaces them.
    assert {"install_from_fab", "get_load_client_app_fn"} <= set(vars(module))


def test_superlink_has_the_settings_that_the_adapter_fills_in() -> None:
    from flwr.superlink.config_loader import SuperLinkLifespanConfig

    assert [field.name for field in dataclasses.fields(SuperLinkLifespanConfig)] == [
        "control_address", "health_server_address", "host", "port", "insecure", "certificates", "superexec_auth_secret",
        "authn_plugin", "event_log_plugin", "fleet_event_log_plugin", "enable_event_log", "artifact_provider",
        "enable_supernode_auth", "fleet_api_type", "fleet_api_address", "simulation", "ssl_ca_certfile", "ssl_certfile",
        "ssl_keyfile", "database", "isolation", "runtime_dependency_install",
    ]  # fmt: skip


def test_the_fleet_api_has_twelve_calls_and_nodes_may_use_ten() -> None:
    from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

    fleet = {key for key in PROTOBUF_REQUEST_TYPES if key[1].startswith("/v1/fleet/")}
    assert len(fleet) == 12 and {method for method, _ in fleet} == {"POST"}
    assert fleet_paths() == TEN


def test_the_launcher_wraps_the_constructor_that_gets_the_tls_context() -> None:
    from flwr.supercore.protobuf.client import ProtobufClient

    assert "verify" in inspect.signature(ProtobufClient.__init__).parameters
    assert "load_verify_locations" in ProtobufClient.from_server_address.__func__.__code__.co_names
    assert ProtobufClient("http://127.0.0.1:1")._client is not None  # Control replaces it


def test_the_bundle_holds_its_description_and_nothing_else() -> None:
    bundle = standard_bundle()
    with zipfile.ZipFile(BytesIO(bundle)) as files:
        assert sorted(files.namelist()) == [".info/CONTENT", "pyproject.toml"]
        assert b"dependencies" not in files.read("pyproject.toml")
    assert standard_bundle() == bundle
    assert len(bundle_sha256(bundle)) == 64


def test_upstream_reads_from_the_bundle_what_the_executor_compares_with() -> None:
    from flwr.cli.config_utils import get_fab_metadata

    from sequester.client.gate.flower.executor import FAB_ID

    assert get_fab_metadata(standard_bundle()) == (FAB_ID, "0.1.0")


# ---- the public listener's filter ------------------------------------------------------------------------------------


class Upstream:
    """Counts what gets through."""

    def __init__(self) -> None:
        self.passed = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.passed += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


LENGTH = (b"content-length", b"5")


def answered(path: str, method: str = "POST", headers: tuple[tuple[bytes, bytes], ...] = (LENGTH,), **more: Any) -> int:
    """The status for a request; 0 where nothing was answered, -1 where it was answered without asking upstream yet 200."""
    upstream, sent = Upstream(), []

    async def send(event: Any) -> None:
        sent.append(event)

    async def receive() -> Any:
        raise AssertionError("a body was read before the request was judged")

    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "headers": headers} | more
    asyncio.run(FleetOnly(upstream, fleet_paths())(scope, receive, send))
    status = sent[0]["status"] if sent else 0
    assert (status == 200) == (upstream.passed == 1)
    return int(status)


def test_the_ten_calls_pass() -> None:
    assert {path: answered(path) for path in TEN} == dict.fromkeys(TEN, 200)


def test_every_other_route_of_the_real_application_is_not_found(tmp_path: Path) -> None:
    from fastapi.routing import iter_route_contexts

    app = application(str(tmp_path / "superlink.db"), b"s" * 32, 8000)
    paths = {getattr(context.route, "path", "") for context in iter_route_contexts(app.routes)}
    assert paths > TEN and len(paths) > 60
    for path in paths - TEN:
        for method in ("POST", "GET", "PUT", "DELETE", "HEAD", "OPTIONS"):
            assert answered(path, method) == 404, (method, path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path + "/",
        lambda path: path + "//",
        lambda path: "/" + path,
        lambda path: path.upper(),
        lambda path: path.replace("/v1/", "/v1/../v1/"),
        lambda path: path.replace("/v1/", "/v1/%2e%2e/v1/"),
        lambda path: path.replace("/fleet/", "/fleet/../control/"),
        lambda path: path.replace("-", "%2d"),
        lambda path: path + "\x00",
        lambda path: path + ".json",
        lambda path: "http://127.0.0.1" + path,
        lambda path: path[1:],
        lambda path: path[:-1],
    ],
)
def test_a_path_is_compared_whole(spoil: Any) -> None:
    for path in TEN:
        assert answered(spoil(path)) == 404


def test_a_path_that_only_decodes_to_an_allowed_one_is_not_found() -> None:
    assert answered("/v1/fleet/get-run", raw_path=b"/v1/fleet/get%2drun") == 404


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "CONNECT", "post"])
def test_only_post_is_served(method: str) -> None:
    assert {answered(path, method) for path in TEN} == {404}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ((), 411),
        (((b"content-length", b""),), 411),
        (((b"content-length", b"-1"),), 411),
        (((b"content-length", b"+5"),), 411),
        (((b"content-length", b"0x10"),), 411),
        (((b"content-length", b"5"), (b"content-length", b"5")), 411),
        (((b"transfer-encoding", b"chunked"),), 411),
        (((b"transfer-encoding", b"chunked"), LENGTH), 411),
        (((b"Content-Length", str(MAX_BODY + 1).encode()),), 413),
        (((b"content-length", b"9" * 18),), 413),
        (((b"content-length", b"9" * 5000),), 411),
        (((b"content-length", str(MAX_BODY).encode()),), 200),
        (((b"content-length", b"0"),), 200),
    ],
)
def test_a_body_says_its_length_and_is_bounded(headers: Any, status: int) -> None:
    assert answered("/v1/fleet/push-messages", headers=headers) == status


def test_what_is_not_http_is_dropped() -> None:
    assert answered("/v1/fleet/get-run", type="websocket") == 0
    assert answered("/v1/fleet/get-run", type="lifespan") == 0
