"""`doctor`: each thing that can stand between a site and a study is found, named, and comes with what to do."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from consortium import Exchange, closed_port, founded, hospital
from sequester.client import isolation
from sequester.client.cli.doctor import register
from sequester.client.config import Home
from sequester.client.gate import doctor, reach, tls
from sequester.client.gate.doctor import Finding
from sequester.client.gate.enrolment import enrol
from sequester.protocols.errors import SiteError
from sequester.server import authority

APP = typer.Typer()
APP.callback()(lambda: None)
register(APP)
CAN_ISOLATE = doctor.isolation_finding().verdict == "ok"


@pytest.fixture
def alps(tmp_path: Path) -> Iterator[Exchange]:
    alps = founded(tmp_path / "server")
    with alps.listening():
        yield alps


@pytest.fixture
def home(alps: Exchange, tmp_path: Path) -> Home:
    """`north`, enrolled, with readable data files."""
    home = hospital(tmp_path / "north", "north")
    for ending in (".bed", ".bim", ".fam", ".csv"):
        (tmp_path / f"g{ending}").write_text("x")
    home.site_toml.write_text(
        f'[site]\nid = "north"\n[data]\ngenotypes = "{tmp_path / "g"}"\nphenotypes = "{tmp_path / "g.csv"}"\n'
    )
    asked = enrol(home, alps.token("north"), wait=False)
    alps.admit("north", asked.fingerprint)
    enrol(home, None)
    return home


def examine(home: Home, ahead_s: float = 0.0) -> dict[str, Finding]:
    return {finding.test: finding for finding in doctor.examine(home, lambda: time.time() + ahead_s)}


def run(home: Home, *words: str) -> Result:
    return CliRunner().invoke(APP, ["doctor", *words, "--home", str(home.root)])


def failing(found: dict[str, Finding]) -> set[str]:
    """Tests that fail, apart from what this machine cannot do."""
    return {test for test, finding in found.items() if finding.verdict == "fail"} - {"isolation", "disk"}


def test_a_site_that_is_ready_passes_every_test(home: Home) -> None:
    found = examine(home)
    assert failing(found) == set()
    assert {
        "python", "flwr", "grpcio", "cryptography", "isolation", "disk", "disk write", "settings", "genotypes", "phenotypes",
        "key files", "alps: enrolment port", "alps: exchange port", "alps: superlink port", "alps: authority", "alps: clock",
        "alps: own certificate", "alps: mutual TLS",
    } == set(found)  # fmt: skip
    assert all(finding.advice for finding in found.values() if finding.verdict != "ok")


@pytest.mark.skipif(not CAN_ISOLATE, reason="this host gives no network namespaces")
def test_isolation_is_probed_on_a_process_that_gave_its_network_up() -> None:
    assert "network namespace of its own" in doctor.isolation_finding().found


def test_a_process_that_keeps_its_network_is_reported_with_what_to_allow() -> None:
    stays = (sys.executable, "-c", "print('stayed', flush=True); import sys; sys.stdin.read()")
    found = doctor.isolation_finding(stays)
    assert found.verdict == "fail" and "shares this host's network" in found.found and "namespaces" in found.advice
    ended = doctor.isolation_finding((sys.executable, "-c", ""))
    assert ended.verdict == "fail" and "ended at once" in ended.found


def test_the_probes_child_does_not_outlive_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pids: list[int] = []
    probe = isolation.probe
    monkeypatch.setattr(isolation, "probe", lambda pid: (pids.append(pid), probe(pid))[1])
    doctor.isolation_finding()
    assert pids and not Path(f"/proc/{pids[0]}").exists()


def test_the_last_line_is_what_to_ask_the_firewall_for(home: Home, alps: Exchange) -> None:
    said = run(home)
    place = tls.membership(home.consortium("alps"))
    last = said.output.strip().splitlines()[-1]
    assert last.startswith("firewall: allow outbound TCP") and "127.0.0.1" in last and "nothing inbound" in last
    assert f"{place.enrolment_port}, {place.exchange_port}, {place.superlink_port}" in last


def test_the_firewall_line_is_known_before_the_coordinator_has_answered(alps: Exchange, tmp_path: Path) -> None:
    home = hospital(tmp_path / "lake", "lake")
    enrol(home, alps.token("lake"), wait=False)
    assert len(doctor.firewall_lines(home)) == 1
    found = examine(home)
    assert failing(found) == set() and found["alps: clock"].verdict == "ok"


def test_machines_read_json_and_a_failure_exits_20(home: Home) -> None:
    said = run(home, "--json")
    value = json.loads(said.stdout)
    assert {"test", "verdict", "found", "advice"} == set(value["findings"][0]) and len(value["firewall"]) == 1
    (home.consortium("alps") / "identity.key").chmod(0o644)
    failed = run(home, "--json").exception
    assert isinstance(failed, SiteError) and failed.exit_status == 20 and "key files" in failed.message


# ---- bad input: one finding each ------------------------------------------------------------------------------------


def test_an_unreachable_coordinator_fails_by_port(home: Home) -> None:
    folder = home.consortium("alps")
    place = tls.membership(folder)
    moved = place.model_copy(update={"exchange_port": closed_port()})
    tls.write_membership(folder / "consortium.json", moved)
    found = examine(home)
    assert failing(found) == {"alps: exchange port"} and str(moved.exchange_port) in found["alps: exchange port"].found
    assert "outbound TCP" in found["alps: exchange port"].advice


def test_a_name_that_does_not_resolve_fails_by_name(home: Home) -> None:
    folder = home.consortium("alps")
    moved = tls.membership(folder).model_copy(update={"host": "no-such-host.invalid"})
    tls.write_membership(folder / "consortium.json", moved)
    found = examine(home)
    assert "`no-such-host.invalid` does not resolve" in found["alps: enrolment port"].found


@pytest.mark.parametrize(("ahead", "word"), [(20.0, "fast"), (-400.0, "slow")])
def test_a_wrong_clock_fails_with_its_seconds(home: Home, ahead: float, word: str) -> None:
    found = examine(home, ahead)
    assert (
        failing(found) == {"alps: clock"}
        and word in found["alps: clock"].found
        and "NTP" in found["alps: clock"].advice
    )


def test_an_expired_certificate_fails_with_its_date_and_one_about_to_end_warns(home: Home, alps: Exchange) -> None:
    folder = home.consortium("alps")
    place = tls.membership(folder)
    row = alps.store.db.execute("SELECT request FROM enrolments").fetchone()[0]  # type: ignore[union-attr]
    asked = doctor.enrolment.pb.EnrolmentRequest.FromString(row).tls_request_pem
    verdicts = {}
    for days in (-1, 10, 300):
        (folder / "tls.pem").write_bytes(_issued(alps, asked, days))
        verdicts[days] = doctor.own_certificate(folder, place)
    assert {days: finding.verdict for days, finding in verdicts.items()} == {-1: "fail", 10: "warn", 300: "ok"}
    assert "expired on" in verdicts[-1].found and "keeps your identity" in verdicts[-1].advice


def _issued(alps: Exchange, request: bytes, days: int) -> bytes:
    """A site certificate that ends `days` from now."""
    from datetime import timedelta

    from pytest import MonkeyPatch

    with MonkeyPatch.context() as patch:
        if days < 0:
            patch.setattr(authority, "_SKEW", timedelta(days=30))
        return authority.issue_site_certificate(alps.home, request, "north", days=days)


def test_an_exchange_refuses_an_expired_certificate(home: Home, alps: Exchange) -> None:
    folder = home.consortium("alps")
    row = alps.store.db.execute("SELECT request FROM enrolments").fetchone()[0]  # type: ignore[union-attr]
    asked = doctor.enrolment.pb.EnrolmentRequest.FromString(row).tls_request_pem
    (folder / "tls.pem").write_bytes(_issued(alps, asked, -1))
    with pytest.raises(SiteError, match="unavailable"):
        from sequester.client.gate import exchange

        exchange.fetch_members(home, "alps")


def test_somebody_elses_certificate_fails(home: Home, alps: Exchange) -> None:
    folder = home.consortium("alps")
    row = alps.store.db.execute("SELECT request FROM enrolments").fetchone()[0]  # type: ignore[union-attr]
    asked = doctor.enrolment.pb.EnrolmentRequest.FromString(row).tls_request_pem
    (folder / "tls.pem").write_bytes(authority.issue_site_certificate(alps.home, asked, "lake"))
    assert "not `north`'s" in examine(home)["alps: own certificate"].found


def test_a_consortium_with_another_authority_at_the_same_address_fails(home: Home) -> None:
    folder = home.consortium("alps")
    other = tls.membership(folder).model_copy(update={"authority": "00" * 32})
    tls.write_membership(folder / "consortium.json", other)
    found = examine(home)
    assert failing(found) == {"alps: authority"} and "TLS-inspecting" in found["alps: authority"].advice


def test_data_files_that_are_missing_empty_or_unreadable_fail_by_name(home: Home, tmp_path: Path) -> None:
    (tmp_path / "g.bim").unlink()
    (tmp_path / "g.csv").write_bytes(b"")
    found = examine(home)
    assert failing(found) == {"genotypes", "phenotypes"}
    assert "g.bim: No such file" in found["genotypes"].found and "g.csv: empty" in found["phenotypes"].found
    (tmp_path / "g.csv").unlink()
    (tmp_path / "g.csv").mkdir()  # opens for nobody, not even root
    assert "Is a directory" in examine(home)["phenotypes"].found


def test_a_site_that_names_no_data_is_warned(alps: Exchange, tmp_path: Path) -> None:
    found = examine(hospital(tmp_path / "lake", "lake"))
    assert {found[test].verdict for test in ("genotypes", "phenotypes", "enrolment")} == {"warn"}


def test_keys_that_others_may_read_fail_by_file(home: Home) -> None:
    (home.consortium("alps") / "tls.key").chmod(0o640)
    (home.consortium("alps") / "superexec.secret").chmod(0o644)
    found = examine(home)["key files"]
    assert (
        found.verdict == "fail" and "tls.key: mode 0640" in found.found and "superexec.secret: mode 0644" in found.found
    )


def test_settings_that_cannot_be_read_end_the_examination_with_their_line(home: Home) -> None:
    home.site_toml.write_text("[site]\nid = North\n")
    found = examine(home)
    assert "line 2" in found["settings"].found and "alps: clock" not in found
    home.site_toml.unlink()
    assert "No such file" in examine(home)["settings"].found


def test_a_wrong_word_in_the_settings_is_told_and_a_password_is_not(tmp_path: Path) -> None:
    home = Home(tmp_path)
    for text, found in (
        ('[site]\nid = "north"\n[data]\nid = "main"\nbuild = "hg19"\n', "found `hg19`"),
        ('[site]\nid = "north"\n[network]\nhttps_proxy = ["http://user:secret@proxy:3128"]\n', "https_proxy"),
    ):
        home.site_toml.write_text(text, "utf-8")
        with pytest.raises(SiteError) as refused:
            home.config()
        assert found in refused.value.message and "secret" not in refused.value.message


def test_a_disk_that_is_nearly_full_or_refuses_to_write_fails(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = doctor.shutil.disk_usage(home.root)
    for free, verdict in ((50, "fail"), (500, "warn"), (5000, "ok")):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path, free=free: usage._replace(free=free << 20))
        assert examine(home)["disk"].verdict == verdict

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(doctor.os, "fsync", full)
        assert "No space left" in examine(home)["disk write"].found


def test_another_flower_than_the_one_adapted_to_fails(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    version = doctor.importlib.metadata.version
    monkeypatch.setattr(
        doctor.importlib.metadata, "version", lambda name: "1.42.0" if name == "flwr" else version(name)
    )
    found = examine(home)["flwr"]
    assert found.verdict == "fail" and "flwr==1.41.0" in found.advice


# ---- the hospital's proxy -------------------------------------------------------------------------------------------


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    proxy = Proxy()
    yield proxy
    proxy.close()


class Proxy:
    """A CONNECT proxy that wants `user:p@ss`, for one connection after another."""

    def __init__(self) -> None:
        import threading

        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        self.asked: list[str] = []
        self._pipes: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        import threading

        while True:
            try:
                near, _ = self.server.accept()
            except OSError:
                return
            self._pipes.append(near)
            head = b""
            while b"\r\n\r\n" not in head and (more := near.recv(1024)):
                head += more
            self.asked.append(head.split(b"\r\n")[0].decode())
            if b"Basic dXNlcjpwQHNz" not in head:  # user:p@ss
                near.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
                near.close()
                continue
            host, port = head.split()[1].decode().rsplit(":", 1)
            far = socket.create_connection((host, int(port)))
            self._pipes.append(far)
            near.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            for ends in ((near, far), (far, near)):
                threading.Thread(target=self._pipe, args=ends, daemon=True).start()

    def _pipe(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def close(self) -> None:
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        self._thread.join(120)
        for pipe in self._pipes:
            pipe.close()


def test_everything_goes_through_the_proxy_that_site_toml_names(home: Home, proxy: Proxy) -> None:
    text = home.site_toml.read_text()
    home.site_toml.write_text(f'{text}[network]\nhttps_proxy = "http://user:p%40ss@127.0.0.1:{proxy.port}"\n')
    found = examine(home)
    assert failing(found) == set() and "through the proxy" in found["alps: exchange port"].found
    place = tls.membership(home.consortium("alps"))
    asked = {line.split()[1].rsplit(":", 1)[1] for line in proxy.asked}
    assert asked == {str(place.enrolment_port), str(place.exchange_port)}


def test_a_proxy_that_says_no_is_named_and_its_password_is_not_shown(proxy: Proxy) -> None:
    with pytest.raises(SiteError, match="answered 407") as refused:
        reach.dial("127.0.0.1", 1, f"http://user:wrong-secret@127.0.0.1:{proxy.port}")
    assert "wrong-secret" not in refused.value.message + refused.value.hint


@pytest.mark.parametrize("bad", ["socks5://x:1", "http://", "nonsense", "http://x:notaport"])
def test_a_proxy_that_is_not_an_address_is_a_fault_of_site_toml(bad: str) -> None:
    with pytest.raises(SiteError, match="https_proxy is not"):
        reach.dial("127.0.0.1", 1, bad)
