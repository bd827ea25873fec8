"""What stands between this machine and a study, tested one by one: each finding says what was found and what to do.

It sends the site's name to the enrolment port and opens TLS with the site's certificate; nothing of a patient is read beyond
whether the files open.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import grpc
from cryptography import x509

from sequester.client import isolation
from sequester.client.config import ONE_PASS, Home, SiteConfig, genotype_files
from sequester.client.gate import enrolment, tls
from sequester.client.gate.reach import dial, presented
from sequester.protocols.enrolment import clock_fault, read_token
from sequester.protocols.errors import SequesterError, SiteError
from sequester.protocols.signing import sha256

Verdict = Literal["ok", "warn", "fail"]
WAIT_S = 5.0
_MIB = 1024 * 1024
_FLWR = "1.41.0"
_GENOTYPES = ((".bed", ".bim", ".fam"), (".pgen", ".pvar", ".psam"))


@dataclass(frozen=True, slots=True)
class Finding:
    """One test: what was found, and what to do where it is not `ok`."""

    test: str
    verdict: Verdict
    found: str
    advice: str = ""


def examine(home: Home, clock: Callable[[], float] = time.time) -> Iterator[Finding]:
    """Every finding, in the order in which things are needed."""
    yield from _versions()
    yield isolation_finding()
    yield from _disk(home)
    try:
        config = home.config()
    except SequesterError as error:
        yield Finding("settings", "fail", error.message, error.hint)
        return
    yield Finding("settings", "ok", f"site.toml: this is `{config.site.id}`")
    yield from _data(config)
    yield from _permissions(home)
    places = _places(home)
    if not places:
        yield Finding(
            "enrolment", "warn", "this site belongs to no consortium yet", "`sequester-client enrol` joins one"
        )
    for folder, place in places:
        yield from _consortium(folder, place, config, clock)


def firewall_lines(home: Home) -> list[str]:
    """What to ask the firewall for, one line for each consortium (also one whose enrolment is under way)."""
    return [
        f"firewall: allow outbound TCP from this machine to {place.host} ports {place.enrolment_port}, "
        f"{place.exchange_port}, {place.superlink_port} (TLS from end to end; nothing inbound)"
        for _, place in _places(home)
    ]


def _places(home: Home) -> list[tuple[Path, tls.Membership]]:
    found = []
    for name in home.consortia():
        try:
            found.append((home.consortium(name), tls.membership(home.consortium(name))))
        except SiteError:
            continue  # `_permissions` reports the folder
    known = {place.consortium for _, place in found}
    for path in sorted((home.root / "enrolment").glob("*/token")):
        try:
            place = tls.membership_of(read_token(path.read_text("ascii")))
        except (SequesterError, OSError, UnicodeDecodeError):
            continue
        if place.consortium not in known:
            found.append((path.parent, place))
    return found


# ---- this machine ---------------------------------------------------------------------------------------------------


def _versions() -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    is_python = (3, 11) <= sys.version_info[:2] <= (3, 12)
    yield Finding(
        "python", "ok" if is_python else "fail", f"Python {python}", "" if is_python else "use Python 3.11 or 3.12"
    )
    for name, exact in (("flwr", _FLWR), ("grpcio", ""), ("cryptography", "")):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(
                name, "fail", f"{name} is not installed", "install sequester[site] again with constraints.txt"
            )
            continue
        is_right = not exact or version == exact
        advice = "" if is_right else f"install {name}=={exact}: its inside is adapted to, to the letter"
        yield Finding(name, "ok" if is_right else "fail", f"{name} {version}", advice)


_CHILD = """
import sys
from sequester.client import isolation
print("left" if isolation.leave_network() else "stayed", flush=True)
sys.stdin.read()
"""


def isolation_finding(command: tuple[str, ...] = (sys.executable, "-c", _CHILD)) -> Finding:
    """Whether a process of this account can give up the network, by trying it with one that does nothing else."""
    try:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError as error:
        return Finding("isolation", "fail", f"no process could be started: {error.strerror}", "see the system's limits")
    try:
        assert child.stdout is not None
        said = child.stdout.readline().strip()
        verdict = isolation.probe(child.pid) if said else isolation.Verdict(False, "the test process ended at once")
    finally:
        child.kill()
        child.communicate()
    if verdict.isolated:
        return Finding("isolation", "ok", verdict.sentence)
    return Finding(
        "isolation",
        "fail",
        verdict.sentence,
        "let this account make network namespaces: `sysctl user.max_user_namespaces` above 0, on Ubuntu 24.04 "
        "`kernel.apparmor_restrict_unprivileged_userns=0` or a profile, in a container its seccomp rule for unshare; or run "
        "compute under systemd with PrivateNetwork=yes. The policy line allow_unisolated goes without, and says so",
    )


def _disk(home: Home) -> Iterator[Finding]:
    home.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    free = shutil.disk_usage(home.root).free
    verdict: Verdict = "ok" if free >= 1024 * _MIB else "warn" if free >= 100 * _MIB else "fail"
    advice = "" if verdict == "ok" else "free some: a ledger that cannot be written stops every study"
    yield Finding("disk", verdict, f"{free // _MIB} MiB free at {home.root}", advice)
    try:
        started = time.perf_counter()
        with tempfile.TemporaryFile(dir=home.root) as file:
            file.write(b"\x00" * 4096)
            file.flush()
            os.fsync(file.fileno())
        took = (time.perf_counter() - started) * 1000
    except OSError as error:
        yield Finding("disk write", "fail", f"{home.root}: {error.strerror}", "the site's account must own its folder")
        return
    slow = took > 250
    advice = "the ledger waits for the disk at each charge: a local disk is better than a share" if slow else ""
    yield Finding("disk write", "warn" if slow else "ok", f"a durable write takes {took:.1f} ms", advice)


def _data(config: SiteConfig) -> Iterator[Finding]:
    data = config.data
    for test, named in (("genotypes", data.genotypes), ("phenotypes", data.phenotypes)):
        if named is None:
            yield Finding(test, "warn", f"site.toml names no {test}", f"write `{test}` under [data]")
            continue
        try:
            paths = [Path(named)]
            if test == "genotypes":
                paths = [file for path in genotype_files(named) for file in _genotype_set(path)]
        except SiteError as error:
            yield Finding(test, "fail", error.message, error.hint)
            continue
        faults = [text for path in paths if (text := _unreadable(path))]
        if faults:
            yield Finding(
                test, "fail", "; ".join(faults), f"correct `{test}` in site.toml, or let this account read it"
            )
        else:
            yield Finding(test, "ok", f"{', '.join(path.name for path in paths)} can be read")


def _genotype_set(path: Path) -> list[Path]:
    """The files that must be there for one of the files or prefixes that site.toml names."""
    if path.name.endswith(ONE_PASS):
        return [path]
    sets = [[path.with_name(path.name + ending) for ending in choice] for choice in _GENOTYPES]
    return next((paths for paths in sets if paths[0].exists()), sets[0])


def _unreadable(path: Path) -> str:
    try:
        with path.open("rb") as file:
            is_empty = not file.read(1)
    except OSError as error:
        return f"{path}: {error.strerror}"
    return f"{path}: empty" if is_empty else ""


def _permissions(home: Home) -> Iterator[Finding]:
    wrong = []
    for name in home.consortia():
        folder = home.consortium(name)
        try:
            tls.membership(folder)
        except SiteError as error:
            wrong.append(error.message)
        wrong += tls.key_faults(folder)
    for path in sorted((home.root / "datasets").glob("*/ledger.key")):
        wrong += [text] if (text := tls.open_to_others(path, 0o077)) else []
    if wrong:
        advice = "`chmod 600` for keys, 640 for superexec.secret; enrol again where one is missing"
        yield Finding("key files", "fail", "; ".join(wrong), advice)
    elif home.consortia():
        yield Finding("key files", "ok", "every private key is there and its owner's alone")


# ---- the way to the consortium --------------------------------------------------------------------------------------


def _consortium(
    folder: Path, place: tls.Membership, config: SiteConfig, clock: Callable[[], float]
) -> Iterator[Finding]:
    proxy = config.network.https_proxy
    ports = {"enrolment": place.enrolment_port, "exchange": place.exchange_port, "superlink": place.superlink_port}
    open_ports = set()
    for name, port in ports.items():
        test = f"{place.consortium}: {name} port"
        try:
            dial(place.host, port, proxy, WAIT_S).close()
        except SequesterError as error:
            yield Finding(test, "fail", error.message, error.hint)
        else:
            open_ports.add(name)
            yield Finding(test, "ok", f"{place.host}:{port} answers{' through the proxy' if proxy else ''}")
    is_trusted = False
    if "enrolment" in open_ports:
        finding = _authority(place, proxy, clock)
        is_trusted = finding.verdict == "ok"
        yield finding
    if is_trusted and (folder / "authority.pem").exists():
        yield _clock(folder, place, proxy, clock)
    if (folder / "tls.pem").exists():
        own = own_certificate(folder, place, clock)
        yield own
        if "exchange" in open_ports and own.verdict != "fail":
            yield _mutual(folder, place)


def _authority(place: tls.Membership, proxy: str, clock: Callable[[], float]) -> Finding:
    test = f"{place.consortium}: authority"
    try:
        chain = presented(place.host, place.enrolment_port, proxy, WAIT_S)
    except SequesterError as error:
        return Finding(test, "fail", error.message, error.hint)
    if place.authority not in [sha256(der) for der in chain]:
        return Finding(
            test,
            "fail",
            f"{place.host}:{place.enrolment_port} presents another authority than this consortium's",
            "a TLS-inspecting proxy stands between: ask for an exception for this host; or the host is wrong",
        )
    leaf = x509.load_der_x509_certificate(chain[0])
    today = datetime.fromtimestamp(clock(), UTC)
    if not leaf.not_valid_before_utc <= today <= leaf.not_valid_after_utc:
        return Finding(
            test,
            "fail",
            f"the exchange's certificate is not good at {today:%Y-%m-%d %H:%M} UTC, this machine's time",
            "set this machine's clock; if it is right, the coordinator must renew the exchange's certificate",
        )
    return Finding(test, "ok", f"ours; the exchange's certificate is good until {leaf.not_valid_after_utc:%Y-%m-%d}")


def _clock(folder: Path, place: tls.Membership, proxy: str, clock: Callable[[], float]) -> Finding:
    test = f"{place.consortium}: clock"
    with enrolment.enrolment_channel(folder, place, proxy) as channel:
        try:
            ahead = enrolment.ahead_s(channel, place.site, clock)
        except SequesterError as error:
            return Finding(test, "fail", error.message, error.hint)
    if fault := clock_fault(ahead):
        return Finding(test, "fail", fault, "let this machine keep time by NTP")
    return Finding(test, "ok", f"{ahead:+.1f} s against the exchange's")


def own_certificate(folder: Path, place: tls.Membership, clock: Callable[[], float] = time.time) -> Finding:
    """Whether this site's certificate is there, in its name, and not about to end."""
    test = f"{place.consortium}: own certificate"
    again = tls.RENEW
    try:
        certificate = x509.load_pem_x509_certificate((folder / "tls.pem").read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound):
        return Finding(test, "fail", f"{folder / 'tls.pem'} cannot be read", again)
    if [name.value for name in names] != [f"sequester:site:{place.site}"]:
        return Finding(test, "fail", f"{folder / 'tls.pem'} is not `{place.site}`'s", again)
    end, today = certificate.not_valid_after_utc, datetime.fromtimestamp(clock(), UTC)
    if today > end or today < certificate.not_valid_before_utc:
        when = f"expired on {end:%Y-%m-%d}" if today > end else "is not good yet by this machine's clock"
        return Finding(test, "fail", f"this site's certificate {when}", again)
    soon = end - today < timedelta(days=30)
    return Finding(test, "warn" if soon else "ok", f"good until {end:%Y-%m-%d}", again if soon else "")


def _mutual(folder: Path, place: tls.Membership) -> Finding:
    test = f"{place.consortium}: mutual TLS"
    try:
        with tls.site_channel(folder) as channel:
            grpc.channel_ready_future(channel).result(timeout=WAIT_S)
    except SequesterError as error:
        return Finding(test, "fail", error.message, error.hint)
    except grpc.FutureTimeoutError:
        return Finding(
            test,
            "fail",
            f"the exchange at {place.address(place.exchange_port)} did not accept this site's certificate",
            "a TLS-inspecting proxy, or a certificate of another authority: compare, then enrol again",
        )
    return Finding(test, "ok", "the exchange accepts this site's certificate")
