"""The peers' own environment, and one peer as a process that is asked for one repeat at a time.

A peer's script (`peers/*.py`) reads one JSON request a line and answers each with one JSON line; arrays travel as .npy
files. It imports nothing of Sequester, and nothing of it is installed into Sequester's environment.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).parent / "peers"
REQUIREMENTS = HERE / "requirements.txt"
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class PeerMissing(Exception):
    """A peer that could not be installed or started; the sentence names it."""


def install(folder: Path) -> dict[str, str]:
    """The peers' environment under `folder`, made once for each text of requirements.txt; what failed, by name."""
    text = REQUIREMENTS.read_text()
    made = folder / "made.json"
    key = hashlib.sha256(text.encode()).hexdigest()
    if made.exists() and (state := json.loads(made.read_text()))["key"] == key:
        return dict(state["failed"])
    venv.create(folder, with_pip=True, clear=True)
    failed: dict[str, str] = {}
    for line in (line.strip() for line in text.splitlines()):
        if not line or line.startswith("#"):
            continue
        # one at a time: a peer that does not exist for this machine takes no other with it
        command = [str(python(folder)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", line]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            errors = [text for text in done.stderr.splitlines() if text.startswith("ERROR")] or ["pip failed"]
            failed[line] = errors[-1]
    made.write_text(json.dumps({"key": key, "failed": failed}))
    return failed


def python(folder: Path) -> Path:
    """The interpreter of the peers' environment."""
    return folder / "bin" / "python"


def environment() -> dict[str, str]:
    """A peer's environment variables: one thread, no telemetry, nothing of ours on its path unless it is asked for."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return (
        kept
        | THREADS
        | {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    )


class Peer:
    """One peer's process; `ask` waits for its answer."""

    def __init__(self, folder: Path, script: str, *path: Path) -> None:
        self.script = script
        if not python(folder).exists():
            raise PeerMissing(f"{script}: no environment of the peers in {folder}")
        self._process = subprocess.Popen(
            [str(python(folder)), str(HERE / script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment() | ({"PYTHONPATH": os.pathsep.join(map(str, path))} if path else {}),
        )  # fmt: skip
        hello = self._read()
        self.version = hello["version"]

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerMissing(f"{self.script}: the peer's process ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "missing" in answer:
            raise PeerMissing(answer["missing"])
        return answer

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # a peer ends, and what it started, when nobody asks any more
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main() -> None:
    """Make the environment and say what failed."""
    for name, why in install(Path(sys.argv[1])).items():
        print(f"{name}: {why}")


if __name__ == "__main__":
    main()
