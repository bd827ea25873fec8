"""Processes of this machine: each with its own log, ended by its own id, none left behind.

Every process gets a session of its own, so that Ctrl-C reaches this program first, which then ends them in order. Long-lived
ones also get SIGTERM from the kernel should this program be killed. What they start in turn is followed by `memory.Watch`
and ended too, should it outlive its parent: that would be a fault of the product, and is said.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import sequester
from sequester.one_machine.memory import Watch

TAIL_LINES = 15
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # loaded here: nothing may be imported between fork and exec


class Interrupts:
    """SIGINT and SIGTERM become `KeyboardInterrupt` in the main thread, later where one would lose a process."""

    def __init__(self) -> None:
        self._depth = 0
        self._came = False

    def install(self) -> None:
        """From here on, for the whole program."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._arrived)

    @contextmanager
    def held(self) -> Iterator[None]:
        """What arrives inside is raised at the end. In other threads nothing is raised, so nothing is held."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._came and not self._depth:
                self._came = False
                raise KeyboardInterrupt

    def _arrived(self, number: int, frame: object) -> None:
        if self._depth:
            self._came = True
        else:
            raise KeyboardInterrupt


INTERRUPTS = Interrupts()


class Failed(Exception):
    """Something that was started did not do its work; `log` is the file that says why."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.log = log

    def tail(self) -> str:
        """The last lines of the guilty log, "" where there is none."""
        if self.log is None or not self.log.exists():
            return ""
        lines = self.log.read_text("utf-8", "replace").splitlines()
        return "\n".join(lines[-TAIL_LINES:])


@dataclass(frozen=True, slots=True)
class Running:
    """A process that was started: `out` receives its standard output, `log` its standard error.

    `lives_on`: it should not end by itself; if it does, everybody who waits for anything hears of it.
    """

    name: str
    kind: str
    popen: subprocess.Popen[bytes]
    out: Path
    log: Path
    lives_on: bool

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def is_alive(self) -> bool:
        return self.popen.poll() is None

    def said(self) -> str:
        """What it has printed so far."""
        return self.out.read_text("utf-8", "replace")


def environment() -> dict[str, str]:
    """What every process here is started with: this program's own, and the words that keep Flower at home.

    The places this program was loaded from come first, so that a checkout runs itself whatever is installed.
    """
    paths = [str(Path(part).parent) for part in sequester.__path__]
    inherited = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, *([inherited] if inherited else [])]),
        "PYTHONUNBUFFERED": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        # one thread a process: a dozen processes share the cores
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


@dataclass(slots=True)
class Processes:
    """Everything one run starts. A context manager: at its end nothing that was started is alive."""

    logs: Path
    term_s: float = 90.0
    show_to: int | None = None  # file descriptor of what `show` shows; None: our own standard output
    left_behind: list[str] = field(default_factory=list)
    _running: list[Running] = field(default_factory=list)
    _ending: threading.Event = field(default_factory=threading.Event)
    _numbers: dict[str, int] = field(default_factory=dict)
    _turn: threading.Lock = field(default_factory=threading.Lock)
    watch: Watch = field(default_factory=Watch)

    def __enter__(self) -> Processes:
        self.logs.mkdir(parents=True, exist_ok=True)
        self.watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def start(
        self,
        name: str,
        kind: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdin: str | None = None,
        show: bool = False,
        lives_on: bool = True,
    ) -> Running:
        """A process that runs. `stdin` is what it reads, then end of file; `show` lets it write to our terminal."""
        # The kernel's signal follows the thread that forked: only the main thread lives as long as this program.
        tether = _tether if threading.current_thread() is threading.main_thread() else None
        # Neither Ctrl-C nor `end` in another thread may come between the start of a process and its registration.
        with INTERRUPTS.held(), self._turn:
            if self._ending.is_set():
                raise Failed(f"{name} was not started: everything is being ended")
            self._numbers[name] = number = self._numbers.get(name, 0) + 1
            suffix = "" if number == 1 else f"-{number}"
            out, log = self.logs / f"{name}{suffix}.out", self.logs / f"{name}{suffix}.log"
            with out.open("wb") as stdout, log.open("ab") as stderr:
                stderr.write(f"$ {shlex.join(command)}\n".encode())
                stderr.flush()
                popen = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
                    stdout=self.show_to if show else stdout,
                    stderr=None if show else stderr,
                    env=dict(env or environment()),
                    start_new_session=True,
                    preexec_fn=tether,
                )
            running = Running(name, kind, popen, out, log, lives_on)
            self._running.append(running)
            self.watch.follow(popen.pid, kind)
        if stdin is not None and popen.stdin is not None:
            try:
                popen.stdin.write(stdin.encode())
                popen.stdin.close()
            except BrokenPipeError:
                pass  # it ended without reading; its status and its log say why
        return running

    def run(
        self,
        name: str,
        command: Sequence[str],
        *,
        kind: str = "command line",
        env: Mapping[str, str] | None = None,
        stdin: str | None = None,
        timeout_s: float = 180.0,
        show: bool = False,
        statuses: Sequence[int] = (0,),
    ) -> str:
        """What a command printed; `Failed` with its log where it ends with another status than `statuses`, or not at all."""
        running = self.start(name, kind, command, env=env, stdin=stdin, show=show, lives_on=False)
        return self.finish(running, timeout_s, statuses)

    def finish(self, running: Running, timeout_s: float = 180.0, statuses: Sequence[int] = (0,)) -> str:
        """Wait for a command; sooner than that, for the death of anything that should live on."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                status = running.popen.wait(0.1)
                break
            except subprocess.TimeoutExpired:
                pass
            self.require_alive()
            if time.monotonic() > deadline:
                _signal(running, signal.SIGKILL)
                raise Failed(f"{running.name} did not end within {timeout_s:.0f} s", running.log)
        self.forget(running)
        if self._ending.is_set() and status < 0:
            raise Failed(f"{running.name} was ended with everything else", running.log)
        if status not in statuses:
            raise Failed(f"{running.name} ended with status {status}", running.log)
        return running.said()

    def wait_until(self, what: str, ready: Callable[[], bool], timeout_s: float, blame: Running | None = None) -> None:
        """Return when `ready()` is true; `Failed` after `timeout_s`, or when something that should live on has died."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            self.require_alive()
            if time.monotonic() > deadline:
                raise Failed(f"{what}: not within {timeout_s:.0f} s", blame.log if blame else None)
            time.sleep(0.1)

    def require_alive(self) -> None:
        """`Failed` with the log of a process that should live on and has ended by itself."""
        with self._turn:
            kept = [running for running in self._running if running.lives_on]
        for running in kept:
            if not running.is_alive and not self._ending.is_set():
                raise Failed(f"{running.name} ended by itself, status {running.popen.returncode}", running.log)

    def forget(self, running: Running) -> None:
        """No longer one of those that must live on or be ended."""
        with self._turn:
            if running in self._running:
                self._running.remove(running)

    def stop(self, running: Running) -> int:
        """End one process: SIGTERM, later SIGKILL to its group; its status. What it started is ended with it."""
        self.forget(running)
        self.watch.sample()
        _signal(running, signal.SIGTERM)
        try:
            running.popen.wait(self.term_s)
        except subprocess.TimeoutExpired:
            _signal(running, signal.SIGKILL)
            running.popen.wait()
            self.left_behind.append(f"{running.name} did not end within {self.term_s:.0f} s of SIGTERM")
        self.left_behind += self.watch.end_orphans(running.pid)
        return int(running.popen.returncode)

    def end(self) -> None:
        """End everything, last started first; safe to call twice. A second Ctrl-C does not cut it short."""
        with INTERRUPTS.held():
            self._end()

    def _end(self) -> None:
        with self._turn:
            self._ending.set()
            running, self._running = self._running[::-1], []
        self.watch.sample()
        for one in running:  # all at once, so that nobody waits for a peer that is going too
            _signal(one, signal.SIGTERM)
        deadline = time.monotonic() + self.term_s
        for one in running:
            try:
                one.popen.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _signal(one, signal.SIGKILL)
                one.popen.wait()
                self.left_behind.append(f"{one.name} did not end within {self.term_s:.0f} s of SIGTERM")
        self.watch.stop()
        self.left_behind += self.watch.end_orphans()


def python(*words: str) -> list[str]:
    """A command line of the running interpreter."""
    return [sys.executable, *words]


def _signal(running: Running, number: signal.Signals) -> None:
    """To the process; SIGKILL to its whole group, whose id is its own since it leads a session."""
    try:
        if number is signal.SIGKILL:
            os.killpg(running.pid, number)
        elif running.is_alive:
            running.popen.send_signal(number)
    except ProcessLookupError:
        pass


def _tether() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
