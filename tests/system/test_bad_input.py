"""Bad input at the real command lines: each ends as one error that says what was found and what to do, and names nobody."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import grpc
import psutil
import pytest

import consortium as listening
from lowlands import WAIT_S, Copy, Lowlands, Said, client, client_line, said, server
from sequester.one_machine.consortium import Published
from sequester.one_machine.processes import environment
from sequester.protocols import exchange_pb2 as pb
from sequester.protocols.signing import MAX_DOCUMENT
from sequester.server import authority

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def study(lowlands: Lowlands) -> Published:
    """A published study that nobody has decided about; the exchange is off again."""
    with lowlands.exchange():
        published = lowlands.publish(approve=False)
        lowlands.consortium.hospital("gouda", "studies", "--refresh", "--json")
    return published


@pytest.fixture
def gouda(lowlands: Lowlands, study: Published, tmp_path: Path) -> Copy:
    """One hospital's installation and files, to be damaged."""
    return lowlands.copy("gouda", tmp_path)


def without_privileges(command: list[str]) -> list[str]:
    """The same command by an account that may not read what is forbidden to it, also where these tests run as root."""
    return ["unshare", "--user", *command] if os.geteuid() == 0 else command


# ---- the hospital's files -------------------------------------------------------------------------------------------


def _bed_cut(site: Copy) -> None:
    path = site.data / "genotypes.bed"
    path.write_bytes(path.read_bytes()[:-7])


def _bed_of_others(site: Copy) -> None:
    site.table("pat-", "nn-", 200)


def _twice(site: Copy) -> None:
    path = site.data / "phenotypes.csv"
    lines = path.read_text("utf-8").splitlines()
    path.write_text("\n".join([*lines, lines[9]]) + "\n", "utf-8")


def _cell(row: int, column: int, value: str) -> Callable[[Copy], None]:
    def change(site: Copy) -> None:
        path = site.data / "phenotypes.csv"
        lines = [line.split(",") for line in path.read_text("utf-8").splitlines()]
        lines[row - 1][column] = value
        path.write_text("\n".join(",".join(line) for line in lines) + "\n", "utf-8")

    return change


def _folder_for_a_table(site: Copy) -> None:
    (site.data / "phenotypes.csv").unlink()
    (site.data / "phenotypes.csv").mkdir()


FILES: dict[str, tuple[Callable[[Copy], None], str, str]] = {
    "no table": (lambda s: (s.data / "phenotypes.csv").unlink(), r"phenotypes\.csv: No such file", "site.toml"),
    "a folder": (_folder_for_a_table, r"phenotypes\.csv: Is a directory", "site.toml"),
    "an empty table": (lambda s: (s.data / "phenotypes.csv").write_bytes(b""), "no column `patient`", "id_column"),
    "no text": (lambda s: (s.data / "phenotypes.csv").write_bytes(b"\xff\xfe\x00"), "not a table", "UTF-8"),
    "no genotypes": (lambda s: (s.data / "genotypes.bed").unlink(), r"no .*genotypes\.bed", "prefix"),
    "no .bim": (lambda s: (s.data / "genotypes.bim").unlink(), r"genotypes\.bim is not a file", "."),
    "a .bed cut short": (_bed_cut, r"genotypes\.bed has \d+ bytes; 200 people .* need \d+", "copy"),
    "sample ids of others": (_bed_of_others, "0 of 200 patients", "sample id"),
    "no phenotype column": (lambda s: s.table("patient,case", "patient,status"), "no column `case`", "rename"),
    "no id column": (lambda s: s.table("patient,", "person,"), "no column `patient`", "id_column"),
    "a patient twice": (_twice, "rows 10 and 202 .* same patient", "one row a patient"),
    "nan": (_cell(5, 2, "nan"), "age, row 5: not a number", "decimal"),
    "inf": (_cell(6, 2, "inf"), "age, row 6: not a number", "decimal"),
    "1e999": (_cell(7, 2, "1e999"), "age, row 7: not a number", "decimal"),
    "inf for a case": (_cell(8, 1, "inf"), "case, row 8: a value that is neither `0` nor `1`", "recode"),
    "another unit": (lambda s: [_cell(r, 2, "613")(s) for r in range(2, 12)], "10 values outside 20..90 years", "unit"),
    "a line too long": (_cell(9, 3, "1,1"), "line 9: 5 columns, 4 were expected", "."),
    "another build": (lambda s: s.settings(build="GRCh37"), "GRCh38, site.toml declares GRCh37", "ingest"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_files_that_will_not_do_are_refused_by_place_and_freeze_nothing(
    gouda: Copy, study: Published, case: str
) -> None:
    damage, found, advice = FILES[case]
    damage(gouda)
    gouda.say("data", "freeze", study.digest).one_error(20, found, advice)
    assert not (gouda.home / "datasets" / "main" / "cohorts" / study.digest).exists()


def test_a_table_that_this_account_may_not_read_is_named(gouda: Copy, study: Published) -> None:
    (gouda.data / "phenotypes.csv").chmod(0)
    command = without_privileges(client_line(gouda.home, "data", "freeze", study.digest))
    said(command).one_error(20, r"phenotypes\.csv: Permission denied", "who may read it")


def test_too_few_patients_are_said_at_home_and_nothing_can_be_approved(
    lowlands: Lowlands, study: Published, tmp_path: Path
) -> None:
    gouda = lowlands.copy("gouda", tmp_path, policy={"minimum_cohort": 500})
    told = gouda.say("data", "freeze", study.digest)
    assert told.status == 0 and "200 patients are fewer than this site's minimum of 500" in told.out
    assert "NOT_READY" in told.out and "pat-" not in told.out + told.err
    gouda.say("approve", study.digest, "--person", "A. Keeper", "--yes").one_error(20, "not ready", "data show")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[site\nid = 1", r"site\.toml is not TOML: .*line 1"),
        ('[site]\nid = "gouda"\n[data]\ncolour = "red"\n', r"site\.toml: data\.colour: Extra inputs"),
        ('[site]\nid = "gouda"\n[policy]\nepsilon_study = -1\n', r"site\.toml: policy: .*epsilon_study above 0"),
        ('[site]\nid = "gouda"\n[policy]\nanalyses = ["gml"]\n', "no analysis `gml`"),
        ("[data]\n", r"site\.toml: site: Field required"),
        ("\x00", r"site\.toml is not TOML"),
    ],
)
def test_damaged_settings_are_named_with_their_line_or_field(gouda: Copy, text: str, found: str) -> None:
    (gouda.home / "site.toml").write_text(text, "utf-8")
    gouda.say("studies").one_error(20, found, "line named above|client/README.md")


def test_missing_settings_are_one_error_for_every_command(tmp_path: Path) -> None:
    for words in (
        ["studies"],
        ["run"],
        ["ledger"],
        ["data", "show"],
        ["data", "freeze", "abcdef"],
        ["check", "abcdef"],
    ):
        client(tmp_path, *words).one_error(20, r"site\.toml: No such file|0 published studies", "site.toml|studies")


# ---- keys and the ledger --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["identity.key", "tls.key", "supernode.key", "superexec.secret"])
def test_a_site_does_not_run_with_a_key_that_others_may_read_or_that_is_gone(gouda: Copy, key: str) -> None:
    path = gouda.home / "consortia" / "lowlands" / key
    path.chmod(0o644)
    gouda.say("run").one_error(20, rf"{key}: mode 0644", "chmod 600")
    path.unlink()
    gouda.say("run").one_error(20, rf"{key}: No such file", "enrol again")


def test_a_damaged_key_is_one_error(gouda: Copy, study: Published) -> None:
    path = gouda.home / "consortia" / "lowlands" / "identity.key"
    path.write_bytes(path.read_bytes()[:40])
    for words in (["run"], ["approve", study.digest, "--person", "A. Keeper", "--yes"]):
        gouda.say(*words).one_error(20, r"identity\.key is missing or damaged", "enrol")


def test_a_second_client_on_the_same_ledger_is_refused_and_the_first_goes_on(gouda: Copy) -> None:
    first = subprocess.Popen(
        client_line(gouda.home, "run"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment()
    )
    try:
        _until(lambda: (gouda.home / "run" / "gate.sock").exists())
        gouda.say("run").one_error(20, f"ledger of data set `main` is in use by process {first.pid}", "one client")
        told = gouda.say("status", "--json")
        assert told.status == 0 and json.loads(told.out) == []
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGTERM)
        _, log = first.communicate(timeout=WAIT_S)
    assert first.returncode == 0 and b"Traceback" not in log


@pytest.mark.parametrize("damage", ["cut", "noise", "gone"])
def test_a_damaged_ledger_is_one_error_wherever_it_is_read(gouda: Copy, study: Published, damage: str) -> None:
    path = gouda.home / "datasets" / "main" / "ledger.db"
    whole = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"\x00noise" * 2000)
    for words in (["ledger"], ["run"], ["audit", "verify"]):
        told = gouda.say(*words)
        told.one_error(40 if words[0] == "audit" and damage != "gone" else 20, "ledger|entry", "restore|enrol")


# ---- the disk -------------------------------------------------------------------------------------------------------


def on_a_full_disk(site: Copy, *words: object) -> Said:
    """A command whose home lies on a file system of its own that has not a byte left."""
    disk = site.home.parent / "disk"
    disk.mkdir(exist_ok=True)
    script = (
        'mount -t tmpfs -o size=4m full "$1" && cp -a "$2/." "$1" && '
        '{ dd if=/dev/zero of="$1/filler" bs=4k 2>/dev/null; shift 2; exec "$@"; }'
    )
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(disk), str(site.home)]
    return said([*command, *client_line(disk, *words)])


def test_a_full_disk_is_one_error_and_no_command_leaves_half_a_file(gouda: Copy, study: Published) -> None:
    on_a_full_disk(gouda, "data", "freeze", study.digest).one_error(20, "No space left on device", "free")
    assert gouda.say("data", "freeze", study.digest).status == 0
    approve = ("approve", study.digest, "--person", "A. Keeper", "--yes", "--offline")
    on_a_full_disk(gouda, *approve).one_error(20, "No space left on device", "free")
    on_a_full_disk(gouda, "run").one_error(20, "disk is full|No space left|disk I/O error|unable to open", "free")
    told = on_a_full_disk(gouda, "doctor")
    assert told.status == 20 and "disk write: " in told.out and "No space left on device" in told.out
    assert "Traceback" not in told.out + told.err


# ---- the way to the consortium --------------------------------------------------------------------------------------


def _until(ready: Callable[[], bool], within_s: float = WAIT_S) -> None:
    until = time.monotonic() + within_s
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_an_exchange_that_is_off_is_named_by_its_address_on_both_sides(
    lowlands: Lowlands, gouda: Copy, study: Published
) -> None:
    place = json.loads((gouda.home / "consortia" / "lowlands" / "consortium.json").read_text())
    address = f"127.0.0.1:{place['exchange_port']}"
    for words in (["studies", "--refresh"], ["peers", "--refresh"]):
        gouda.say(*words).one_error(20, f"{address} did not answer .*unavailable", "doctor")
    assert gouda.say("data", "freeze", study.digest).status == 0
    approve = ("approve", study.digest, "--person", "A. Keeper", "--yes")
    gouda.say(*approve).one_error(20, f"{address} did not answer `Decide`", "doctor")
    assert gouda.say(*approve, "--offline").status == 0  # what was signed can be signed again, and sent later
    server(lowlands.consortium.server, "study", "status").one_error(10, f"{address} does not answer", "serve")


def test_an_expired_certificate_is_said_with_its_date_where_the_exchange_hangs_up(
    lowlands: Lowlands, gouda: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = lowlands.consortium.server / "exchange"
    with closing(sqlite3.connect(f"file:{exchange / 'store.db'}?mode=ro", uri=True)) as store:
        (request,) = store.execute("SELECT request FROM enrolments WHERE site = 'gouda'").fetchone()
    monkeypatch.setattr(authority, "_SKEW", timedelta(days=30))
    asked = pb.EnrolmentRequest.FromString(request).tls_request_pem
    expired = authority.issue_site_certificate(authority.Home(lowlands.consortium.server), asked, "gouda", days=-1)
    (gouda.home / "consortia" / "lowlands" / "tls.pem").write_bytes(expired)
    with lowlands.exchange():
        gouda.say("studies", "--refresh").one_error(20, "certificate expired on 20", "invitation")
        told = gouda.say("doctor")
        assert told.status == 20 and "this site's certificate expired on 20" in told.out


@pytest.mark.parametrize(("ahead_s", "word"), [(-400.0, "fast"), (400.0, "slow")])
def test_a_wrong_clock_is_refused_with_its_minutes_before_the_token_is_spent(
    tmp_path: Path, ahead_s: float, word: str
) -> None:
    alps = listening.founded(tmp_path / "server")
    home = listening.hospital(tmp_path / "north", "north")
    with alps.listening():
        token = alps.token("north")
        alps.ahead_s = ahead_s
        client(home.root, "enrol", stdin=token + "\n").one_error(20, rf"clock is .*{word}", "NTP|clock")
        alps.ahead_s = 0.0
        assert client(home.root, "enrol", "--no-wait", stdin=token + "\n").status == 0


# ---- a hostile peer -------------------------------------------------------------------------------------------------


def _ports(lowlands: Lowlands) -> dict[str, int]:
    found: dict[str, int] = json.loads((lowlands.consortium.server / "exchange" / "ports.json").read_text("utf-8"))
    return found


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _tls(port: int, folder: Path | None) -> ssl.SSLSocket:
    """A TLS connection by hand, with the certificate of the site in `folder` or none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if folder is not None:
        context.load_cert_chain(folder / "tls.pem", folder / "tls.key")
    return context.wrap_socket(socket.create_connection(("127.0.0.1", port), 10))


def _flood(connection: socket.socket, data: bytes, times: int) -> None:
    try:
        for _ in range(times):
            connection.sendall(data)
        while connection.recv(65536):
            pass
    except OSError:
        pass  # it was hung up on
    finally:
        connection.close()


def _huge_frame(folder: Path, port: int, size: int) -> str:
    """The status with which a message of so many bytes ends, sent on a study stream with the site's own certificate."""
    pem = [(folder / name).read_bytes() for name in ("authority.pem", "tls.key", "tls.pem")]
    options = [("grpc.max_send_message_length", -1), ("grpc.enable_http_proxy", 0)]
    with grpc.secure_channel(f"127.0.0.1:{port}", grpc.ssl_channel_credentials(*pem), options) as channel:
        call = channel.stream_stream("/sequester.v1.Site/Session", lambda data: data, lambda data: data)
        try:
            list(call(iter([b"\x0a" + b"\xff" * size]), timeout=180))
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            return error.code().name
    return "OK"


def test_garbage_strangers_and_huge_frames_leave_the_exchange_standing_in_bounded_memory(
    lowlands: Lowlands, gouda: Copy
) -> None:
    folder = gouda.home / "consortia" / "lowlands"
    with lowlands.exchange() as exchange:
        lowlands.until("all three listen", lambda: all(map(_listens, _ports(lowlands).values())))
        ports = _ports(lowlands)
        assert gouda.say("studies", "--refresh").status == 0
        process = psutil.Process(exchange.pid)
        before = process.memory_info().rss
        noise = os.urandom(65536)
        for name in ("enrolment_port", "exchange_port", "superlink_port"):
            for first in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):
                _flood(socket.create_connection(("127.0.0.1", ports[name]), 10), first + noise, 64)
        with pytest.raises(OSError), _tls(ports["exchange_port"], None) as stranger:  # TLS 1.3 hears it late
            stranger.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            while stranger.recv(1024):
                pass
            raise ConnectionResetError
        _flood(_tls(ports["exchange_port"], folder), noise, 256)  # a member that speaks no HTTP/2
        # a header frame that says it is 16 MB, and continuation frames without end
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
        _flood(_tls(ports["exchange_port"], folder), preface + b"\xff\xff\xff\x01\x00\x00\x00\x00\x01" + noise, 256)
        one = preface + b"\x00\x40\x00\x01\x00\x00\x00\x00\x01" + bytes(0x4000)
        _flood(_tls(ports["exchange_port"], folder), one + b"\x00\x40\x00\x09\x00\x00\x00\x00\x01" + bytes(0x4000), 256)
        idle = [socket.create_connection(("127.0.0.1", ports["exchange_port"]), 10) for _ in range(200)]
        for _ in range(4):
            assert _huge_frame(folder, ports["exchange_port"], 4 * MAX_DOCUMENT + (64 << 20)) == "RESOURCE_EXHAUSTED"
        assert _huge_frame(folder, ports["exchange_port"], 3 << 20) in (
            "INVALID_ARGUMENT",
            "FAILED_PRECONDITION",
            "INTERNAL",
        )
        assert gouda.say("studies", "--refresh").status == 0  # others are served meanwhile
        assert exchange.is_alive and process.is_running()
        grown = (process.memory_info().rss - before) / 2**20
        for connection in idle:
            connection.close()
        assert grown < 100, f"{grown:.0f} MiB"
        log = exchange.log.read_text("utf-8", "replace")
        assert "Traceback" not in log and len(log) < 200_000
    shutil.rmtree(gouda.home)
