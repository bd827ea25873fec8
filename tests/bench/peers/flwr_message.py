"""One stock Flower message to three SuperNodes: SuperLink with TLS, node keys, every process as Flower starts it.

The ServerApp waits for a file, sends one message to each node, waits for the three replies, and writes the seconds.
"""

from __future__ import annotations

import atexit
import datetime
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from answering import serve

NODES, STARTS_S, ANSWERS_S = 3, 120, 180
TOML = """[project]
name = "onemessage"
version = "0.1.0"
dependencies = []
[tool.flwr.app]
publisher = "bench"
[tool.flwr.app.components]
serverapp = "onemessage.apps:server"
clientapp = "onemessage.apps:client"
[tool.flwr.app.config]
folder = ""
"""
APPS = '''"""One message there and back."""
import time
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client, server = ClientApp(), ServerApp()


@client.query()
def answer(message, context):
    return Message(RecordDict({"said": ConfigRecord({"ok": True})}), reply_to=message)


@server.main()
def main(grid, context):
    folder = Path(str(context.run_config["folder"]))
    while len(list(grid.get_node_ids())) < 3:
        time.sleep(0.2)
    (folder / "ready").touch()
    number = 0
    while not (folder / "stop").exists():
        if not (folder / f"go-{number}").exists():
            time.sleep(0.05)
            continue
        start = time.perf_counter()
        asked = [
            Message(RecordDict({"asked": ConfigRecord({"n": number})}), dst_node_id=n, message_type="query")
            for n in grid.get_node_ids()
        ]
        replies = [m for m in grid.send_and_receive(asked) if not m.has_error()]
        seconds = time.perf_counter() - start
        temporary = folder / f"part-{number}"
        temporary.write_text(f"{seconds} {len(replies)}")
        temporary.rename(folder / f"done-{number}")
        number += 1
'''


def certificates(folder: Path) -> None:
    """An authority and a server certificate for 127.0.0.1, and one key a node."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def named(text: str) -> Any:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    def pem(key: Any) -> bytes:
        kind = serialization.PrivateFormat.PKCS8
        return key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption())

    def built(subject: str, public: Any, signer: Any, is_ca: bool) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder().subject_name(named(subject)).issuer_name(named("bench")).public_key(public)
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(1))
        builder = builder.not_valid_after(now + datetime.timedelta(2))
        builder = builder.add_extension(x509.BasicConstraints(is_ca, None), True)
        names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
        return (
            builder.add_extension(names, False).sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        )

    authority, server = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    (folder / "ca.pem").write_bytes(built("bench", authority.public_key(), authority, True))
    (folder / "server.pem").write_bytes(built("127.0.0.1", server.public_key(), authority, False))
    (folder / "server.key").write_bytes(pem(server))
    for i in range(NODES):
        node = ec.generate_private_key(ec.SECP384R1())
        openssh, none = serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        (folder / f"node{i}").write_bytes(node.private_bytes(serialization.Encoding.PEM, openssh, none))
        kind = serialization.PublicFormat.OpenSSH
        (folder / f"node{i}.pub").write_bytes(node.public_key().public_bytes(serialization.Encoding.OpenSSH, kind))


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def load() -> Any:
    import flwr
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key
    from flwr.cli.build import build_fab_from_files
    from flwr.common.serde import user_config_to_proto
    from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
    from flwr.proto.fab_pb2 import Fab
    from flwr.supercore.control.control_http_client import ControlHttpClient
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    folder = Path(tempfile.mkdtemp(prefix="flwr-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    certificates(folder)
    address = f"127.0.0.1:{free_port()}"
    bin_folder = Path(sys.executable).parent
    log = (folder / "log").open("wb")

    def start(role: str, *command: str) -> None:
        home = folder / role
        home.mkdir()
        environment = os.environ | {"FLWR_HOME": str(home), "PATH": f"{bin_folder}:{os.environ['PATH']}"}
        process = subprocess.Popen(
            [str(bin_folder / command[0]), *command[1:]], env=environment, stdout=log, stderr=log, cwd=home,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        atexit.register(process.terminate)

    start(
        "superlink", "flower-superlink", "--host", "127.0.0.1", "--port", address.split(":")[1], "--ssl-certfile",
        f"{folder}/server.pem", "--ssl-keyfile", f"{folder}/server.key", "--ssl-ca-certfile", f"{folder}/ca.pem",
        "--enable-supernode-auth", "--disable-runtime-dependency-installation", "--database", f"{folder}/state.db",
    )  # fmt: skip
    control = ControlHttpClient.from_server_address(
        address, False, str(folder / "ca.pem"), [RuntimeVersionHttpInterceptor(component_name="flwr CLI")]
    )

    def eventually(call: Any) -> Any:
        until = time.monotonic() + STARTS_S
        while True:
            try:
                return call()
            except Exception:
                if time.monotonic() > until:
                    raise RuntimeError((folder / "log").read_text()[-2000:]) from None
                time.sleep(0.3)

    for i in range(NODES):
        key = public_key_to_bytes(load_ssh_public_key((folder / f"node{i}.pub").read_bytes()))
        eventually(lambda key=key, i=i: control.RegisterNode(RegisterNodeRequest(public_key=key, name=f"node{i}")))
        start(
            f"node{i}-home", "flower-supernode", "--superlink", address, "--root-certificates", f"{folder}/ca.pem",
            "--auth-supernode-private-key", f"{folder}/node{i}", "--port", str(free_port()),
        )  # fmt: skip
    files = {"pyproject.toml": TOML.encode(), "onemessage/__init__.py": b"", "onemessage/apps.py": APPS.encode()}
    bundle = bytes(build_fab_from_files(files)[0])
    override = user_config_to_proto({"folder": str(folder)})
    control.StartRun(
        StartRunRequest(fab=Fab(hash_str=hashlib.sha256(bundle).hexdigest(), content=bundle), override_config=override)
    )

    def wait(name: str, within_s: float) -> None:
        until = time.monotonic() + within_s
        while not (folder / name).exists():
            if time.monotonic() > until:
                raise RuntimeError(f"{name}: {(folder / 'log').read_text()[-2000:]}")
            time.sleep(0.02)

    wait("ready", STARTS_S)
    number = 0

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal number
        (folder / f"go-{number}").touch()
        wait(f"done-{number}", ANSWERS_S)
        seconds, replies = (folder / f"done-{number}").read_text().split()
        number += 1
        return {"seconds": float(seconds), "replies": int(replies)}

    return flwr.__version__, answer


serve(load)
