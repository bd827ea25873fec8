"""One SuperLink and real sites: what a `join` comes to, and what happens when a process on the way is gone."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.cli.build import build_fab_from_files
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from flower.stack import Site, Stack, children, end, free_port, stack, until
from sequester.client.gate.flower.supernode import LOOP_ENDED
from sequester.protocols.errors import StudyError
from sequester.server.flower.bundle import PYPROJECT, bundle_sha256
from sequester.server.flower.control import Control, SuperLinkError
from sequester.server.flower.superlink import MAX_BODY

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def flower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with stack(tmp_path_factory.mktemp("flower")) as running:
        running.site("bern")
        yield running


@pytest.fixture
def bern(flower: Stack) -> Iterator[Site]:
    """The site, as it was: approving, quick, with both its processes."""
    site = flower.sites[0]
    yield site
    site.gate.answers.clear()
    site.gate.slow_s = 0.0
    site.gate.approved = {flower.exchange.bundle.hex()}
    assert site.unpacked() == [], "something was unpacked at a site"


def finish(flower: Stack, digest: str, run: str) -> None:
    flower.exchange.over.add(digest)
    until("the run ends", lambda: flower.status(run) == "finished:completed")


# ---- joins -----------------------------------------------------------------------------------------------------------


def test_a_site_that_approves_joins_within_seconds(flower: Stack, bern: Site) -> None:
    digest = flower.study(1, bern)
    started = time.monotonic()
    run = flower.run(digest)
    assert flower.heard(digest, bern) == "joined"
    assert time.monotonic() - started < 15
    assert bern.gate.asked == [(digest, flower.exchange.bundle.hex())]
    assert flower.status(run) == "running"
    finish(flower, digest, run)


def test_a_bundle_that_no_study_here_names_is_refused_before_the_gate_hears_of_a_join(
    flower: Stack, bern: Site
) -> None:
    bern.gate.approved.clear()
    digest = flower.study(2, bern)
    run = flower.run(digest)
    assert flower.heard(digest, bern) == "refused:STUDY"
    assert digest not in [study for study, _ in bern.gate.asked]
    assert "refused bundle" in bern.said("executor")
    finish(flower, digest, run)


def test_code_in_a_bundle_never_runs_at_a_site(flower: Stack, bern: Site, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    toml = PYPROJECT.replace("sequester.client.gate.flower.app:app", "evil:app")
    evil = f"open({str(marker)!r}, 'w').write('x')\nfrom flwr.clientapp import ClientApp\napp = ClientApp()\n"
    bundle, _ = build_fab_from_files({"pyproject.toml": toml.encode(), "evil.py": evil.encode()})
    digest = flower.study(3, bern)
    run = flower.run(digest, bundle)
    assert flower.heard(digest, bern) == "refused:STUDY"
    finish(flower, digest, run)
    # Even where somebody had approved of these bytes, the installed app would run; its `join` names another bundle.
    bern.gate.approved.add(bundle_sha256(bundle))
    digest = flower.study(4, bern)
    run = flower.run(digest, bundle)
    assert flower.heard(digest, bern) == "refused:STUDY"
    finish(flower, digest, run)
    assert not marker.exists()


def test_the_gates_refusal_reaches_the_exchange_as_a_code(flower: Stack, bern: Site) -> None:
    digest = flower.study(5, bern)
    bern.gate.answers[digest] = ("refused", "BUDGET")
    run = flower.run(digest)
    assert flower.heard(digest, bern) == "refused:BUDGET"
    finish(flower, digest, run)


def test_not_yet_is_asked_again_until_it_is_joined(flower: Stack, bern: Site) -> None:
    digest = flower.study(6, bern)
    bern.gate.answers[digest] = ("not yet", "")
    run = flower.run(digest)
    assert flower.heard(digest, bern) == "not yet"
    bern.gate.answers[digest] = ("joined", "")
    until("the second answer", lambda: flower.exchange.heard(digest, "bern")[-1] == "joined")
    finish(flower, digest, run)


def test_two_studies_join_side_by_side(flower: Stack, bern: Site) -> None:
    bern.gate.slow_s = 2.0
    first, second = flower.study(7, bern), flower.study(8, bern)
    runs = [flower.run(first), flower.run(second)]
    assert [flower.heard(study, bern) for study in (first, second)] == ["joined", "joined"]
    assert [flower.status(run) for run in runs] == ["running", "running"]
    for study, run in zip((first, second), runs, strict=True):
        finish(flower, study, run)


def test_a_site_of_another_study_and_a_node_with_another_key_are_left_alone(flower: Stack, bern: Site) -> None:
    digest = flower.study(9, bern)
    other = ec.generate_private_key(ec.SECP384R1()).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    flower.exchange.joins[digest]["bern"].supernode_key = other
    run = flower.run(digest)
    until("the run is under way", lambda: flower.status(run) == "running")
    time.sleep(5)
    assert flower.exchange.heard(digest, "bern") == [] and digest not in [study for study, _ in bern.gate.asked]
    finish(flower, digest, run)


def test_a_stopped_run_is_told_apart_and_the_next_one_joins(flower: Stack, bern: Site) -> None:
    bern.gate.slow_s = 3.0
    digest = flower.study(10, bern)
    run = flower.run(digest)
    until("the gate is asked", lambda: digest in [study for study, _ in bern.gate.asked])
    with flower.control() as control:
        control.stop(run)
        assert control.status(run) == "finished:stopped"
        control.stop(run)
        assert (control.status("12345"), control.status("nonsense")) == ("", "")
    bern.gate.slow_s = 0.0
    digest = flower.study(11, bern)
    run = flower.run(digest)
    assert flower.heard(digest, bern) == "joined"
    finish(flower, digest, run)


def test_the_forwarder_has_counted_what_the_node_said(flower: Stack, bern: Site) -> None:
    until("bytes are told", lambda: bern.closed, 40)
    up, down = (sum(column) for column in zip(*bern.closed, strict=True))
    assert up > 1000 and down > 1000


# ---- who may speak to it ---------------------------------------------------------------------------------------------


def ask(flower: Stack, path: str, *, certificate: Path | None, content: Any = b"", **more: Any) -> httpx.Response:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(flower.folder / "authority.pem")
    if certificate is not None:
        context.load_cert_chain(certificate / "tls.pem", certificate / "tls.key")
    headers = {"content-type": PROTOBUF_MEDIA_TYPE} | more.pop("headers", {})
    with httpx.Client(verify=context, timeout=10, trust_env=False) as client:
        url = f"https://127.0.0.1:{flower.ports['public_port']}{path}"
        return client.request(more.pop("method", "POST"), url, content=content, headers=headers)


def test_the_public_listener_serves_fleet_calls_of_bounded_size_and_nothing_else(flower: Stack, bern: Site) -> None:
    pull = "/v1/fleet/pull-messages"

    def status(path: str, **more: Any) -> int:
        return ask(flower, path, certificate=bern.folder, **more).status_code

    assert status(pull) == 401
    for path in ("/docs", "/openapi.json", "/health", "/v1/control/list-runs", "/v1/runtime/acquire-task"):
        assert status(path) == status(path, method="GET") == 404
    for path in ("/v1/fleet/register-node", "/v1/fleet/unregister-node", pull + "/", "/v1/fleet/%2e%2e/fleet/get-run"):
        assert status(path) == 404
    assert status(pull, content=iter([b"x"])) == 411
    assert status(pull, headers={"content-length": str(MAX_BODY + 1)}, content=b"x" * (MAX_BODY + 1)) == 413


def test_without_a_certificate_of_our_authority_nobody_is_heard(flower: Stack, tmp_path: Path) -> None:
    with pytest.raises(httpx.TransportError):
        ask(flower, "/v1/fleet/pull-messages", certificate=None)


def test_older_tls_is_not_spoken(flower: Stack, bern: Site) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(flower.folder / "authority.pem")
    context.load_cert_chain(bern.folder / "tls.pem", bern.folder / "tls.key")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(("127.0.0.1", flower.ports["public_port"])) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain, server_hostname="127.0.0.1")


def test_the_private_listener_gives_tasks_only_for_the_secret(flower: Stack) -> None:
    url = f"http://127.0.0.1:{flower.ports['private_port']}/v1/runtime/acquire-task"
    headers = {"content-type": PROTOBUF_MEDIA_TYPE}
    assert httpx.post(url, content=b"", headers=headers, trust_env=False).status_code == 401


def test_the_private_files_are_the_owners(flower: Stack) -> None:
    for name in ("superlink.db", "superexec.secret", "run/superlink.json"):
        assert (flower.folder / name).stat().st_mode & 0o007 == 0, name


# ---- Control ---------------------------------------------------------------------------------------------------------


def test_registering_repeats_and_a_new_key_takes_the_place_of_the_old(flower: Stack, bern: Site) -> None:
    def new_key() -> bytes:
        public = ec.generate_private_key(ec.SECP384R1()).public_key()
        return public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)

    with flower.control() as control:
        control.register(bern.supernode_key, "bern")
        first, second = new_key(), new_key()
        for key in (first, first, second):
            control.register(key, "basel")
        assert control.nodes() == {"bern": "online", "basel": "registered"}
        assert len(control._nodes()) == 2
        control.unregister("basel")
        control.unregister("basel")
        assert control.nodes() == {"bern": "online"}
        for name, key in (("basel", second), ("chur", bern.supernode_key)):
            with pytest.raises(StudyError):  # struck off for good; another site's
                control.register(key, name)
        assert control.nodes() == {"bern": "online"}


def test_a_proxy_in_the_environment_is_not_asked(flower: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with flower.control() as control:
        assert control.nodes()["bern"] == "online"


def test_a_dead_superlink_is_one_plain_error() -> None:
    control = Control(free_port())
    for call in (control.nodes, lambda: control.start(b"x", "00" * 32), lambda: control.status("1")):
        with pytest.raises(SuperLinkError) as caught:
            call()
        assert "does not answer" in caught.value.message and caught.value.hint


# ---- ends and beginnings ---------------------------------------------------------------------------------------------


def test_while_the_gate_is_gone_the_site_says_not_yet(flower: Stack, bern: Site) -> None:
    aside = bern.door.with_name("aside")
    bern.door.rename(aside)
    try:
        digest = flower.study(20, bern)
        run = flower.run(digest)
        assert flower.heard(digest, bern) == "not yet"
    finally:
        aside.rename(bern.door)
    until("the site joins", lambda: flower.exchange.heard(digest, "bern")[-1] == "joined")
    finish(flower, digest, run)


def test_an_executor_that_starts_later_answers_the_join_that_waits(flower: Stack, bern: Site) -> None:
    assert end(bern.processes["executor"]) == -signal.SIGTERM
    digest = flower.study(21, bern)
    run = flower.run(digest)
    until("the run is under way", lambda: flower.status(run) == "running")
    time.sleep(3)
    bern.executor()
    assert flower.heard(digest, bern) == "joined"
    finish(flower, digest, run)


def test_a_child_ends_with_its_executor(flower: Stack, bern: Site) -> None:
    """No reply follows (spec/flower.md, fact 6), so the SuperNode starts afresh afterwards."""
    bern.gate.slow_s = 30.0
    digest = flower.study(22, bern)
    run = flower.run(digest)
    (child,) = until("the child asks the gate", lambda: children(bern.processes["executor"].pid))
    until("the gate is asked", lambda: digest in [study for study, _ in bern.gate.asked])
    end(bern.processes["executor"], signal.SIGKILL)
    until("the child is gone", lambda: not Path(f"/proc/{child}").exists(), 5)
    bern.gate.slow_s = 0.0
    assert end(bern.processes["supernode"]) == 0
    bern.supernode()
    bern.executor()
    until("the site joins", lambda: "joined" in flower.exchange.heard(digest, "bern"), 60)
    finish(flower, digest, run)


def test_a_supernode_that_restarts_is_asked_again(flower: Stack, bern: Site) -> None:
    assert end(bern.processes["supernode"]) == 0
    digest = flower.study(23, bern)
    run = flower.run(digest)
    until("the run is under way", lambda: flower.status(run) == "running")
    time.sleep(2)
    assert flower.exchange.heard(digest, "bern") == []
    bern.supernode()
    assert flower.heard(digest, bern) == "joined"
    finish(flower, digest, run)


def test_a_restarting_exchange_does_not_end_the_run(flower: Stack, bern: Site) -> None:
    digest = flower.study(24)
    run = flower.run(digest)
    until("the run is under way", lambda: flower.status(run) == "running")
    flower.exchange.stop()
    time.sleep(3)
    flower.study(24, bern)
    flower.exchange.start()
    assert flower.heard(digest, bern) == "joined"
    finish(flower, digest, run)


def test_a_superlink_that_was_killed_takes_up_its_run(flower: Stack, bern: Site) -> None:
    digest = flower.study(25)
    run = flower.run(digest)
    until("the run is under way", lambda: flower.status(run) == "running")
    end(flower.processes["superlink"], signal.SIGKILL)
    time.sleep(2)
    flower.superlink()
    flower.online(bern, 60)
    flower.study(25, bern)
    assert flower.heard(digest, bern, 60) == "joined"
    assert flower.status(run) == "running"
    finish(flower, digest, run)


def test_a_superlink_ends_cleanly_on_sigterm_and_comes_back_on_its_ports(flower: Stack, bern: Site) -> None:
    before = dict(flower.ports)
    started = time.monotonic()
    assert end(flower.processes["superlink"]) == 0
    assert time.monotonic() - started < 8
    flower.superlink()
    assert (flower.ports["public_port"], flower.ports["private_port"]) == (
        before["public_port"],
        before["private_port"],
    )
    flower.online(bern, 60)


@pytest.mark.parametrize("module", ["server.flower.superlink", "server.flower.superexec"])
def test_a_server_process_ends_with_its_parent(flower: Stack, tmp_path: Path, module: str) -> None:
    words = {
        "server.flower.superlink": ["--folder", str(flower.folder), "--host", "127.0.0.1"],
        "server.flower.superexec": ["--runtime", "127.0.0.1:1", "--secret-file", str(tmp_path / "secret")],
    }[module]
    (tmp_path / "secret").write_bytes(os.urandom(32))
    orphaned(module, words, tmp_path)


@pytest.mark.parametrize("module", ["client.gate.flower.supernode", "client.gate.flower.executor"])
def test_a_site_process_ends_with_its_parent(bern: Site, tmp_path: Path, module: str) -> None:
    secret = str(bern.folder / "superexec.secret")
    words = {
        "client.gate.flower.supernode": [
            "--superlink", "127.0.0.1:1", "--folder", str(bern.folder), "--port", str(free_port()),
            "--secret-file", secret,
        ],
        "client.gate.flower.executor": [
            "--runtime", "127.0.0.1:1", "--secret-file", secret, "--door", str(bern.door),
        ],
    }[module]  # fmt: skip
    orphaned(module, words, tmp_path)


def orphaned(module: str, words: list[str], tmp_path: Path) -> None:
    """Start the module below a parent that is killed once it has been up for three seconds; it has to go, too."""
    command = [sys.executable, "-m", f"sequester.{module}", *words]
    script = f"import subprocess, time; subprocess.Popen({command!r}); time.sleep(60)"
    with (tmp_path / "orphan.log").open("wb") as out:
        parent = subprocess.Popen(
            [sys.executable, "-c", script], stdout=out, stderr=out, env={**os.environ, "FLWR_HOME": str(tmp_path)}
        )
    (child,) = until("it is started", lambda: children(parent.pid))
    time.sleep(3)
    assert Path(f"/proc/{child}").exists(), (tmp_path / "orphan.log").read_text()
    parent.kill()
    parent.wait(5)
    until(f"{module} is gone", lambda: not Path(f"/proc/{child}").exists(), 5)


def test_a_site_that_is_struck_off_ends_its_supernode(flower: Stack) -> None:
    chur = flower.site("chur", online=False)
    chur.supernode()
    flower.online(chur)
    with flower.control() as control:
        control.unregister("chur")
    # Upstream interrupts itself on the 401 (status 0) and raises it in its loop, too (75): whichever is first, it is over.
    assert chur.processes["supernode"].wait(15) in (0, LOOP_ENDED)
