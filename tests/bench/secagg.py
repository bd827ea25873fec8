"""Secure aggregation against Flower's SecAgg+, against CKKS, and against the speed of AES on this core.

Figures: secagg_site_vs_flwr, secagg_server_vs_flwr, secagg_site_vs_ckks, bytes_vs_flwr, bytes_vs_ckks, mask_limit.
The product's own state machines do the work, from float64 vectors to bytes and back; what is not timed is said at `Ours`.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

from bench.frame import Bench, interleaved, timed
from bench.peer import Peer, PeerMissing
from protocols.secagg.conftest import Session, session
from sequester.protocols.memory import Room
from sequester.protocols.packets import packed, unpacked
from sequester.protocols.quantise import Codec
from sequester.protocols.secagg import masks
from sequester.protocols.secagg.messages import Contribute, Effect, MaskedInput, Message, Outcome, Send
from sequester.protocols.wire import Limits, Reader, frames

ALIKE = Codec(32, 18)  # 16 / 2^22: flwr's clip of 8 at 22 bits, and head-room for 31 sites
PACKED = Codec(64, 12, lanes=3)  # 16 / 2^16: three lanes of 21 bits, sums of up to 32 sites
CODECS = {"alike": ALIKE, "packed": PACKED}
REUSE = 3_000_000  # above this many masked values in a round one site's vector stands for all, on both sides
BLOCK = 1 << 20


class Ours:
    """One session of n sites. A round is site 0's work and bytes, or the aggregator's.

    Site: from RoundStart and a float64 vector to the packets of its masked input (quantise, mask, seal, sign, chunk).
    Server: from the packets of every site to the decoded sum (reading, checks of signatures, adding, opening, decoding).
    Not timed: key set-up (once a study, Flower's is once a round and not timed either), the sites' short answers.
    """

    def __init__(self, n: int, codec: Codec, vector: NDArray[np.float64]) -> None:
        self.n, self.codec, self.vector = n, codec, vector
        self.session: Session = session(n, ring_bits=codec.ring_bits)
        for rules in self.session.rules:
            rules.charges = 1 << 40
        self.words = codec.words(len(vector))
        self.round = 0
        self._readers: dict[int, Reader] = {}
        self._room = Room()
        self.bytes_up = 0
        self.sum: NDArray[np.float64] = np.zeros(0)

    def _start(self) -> dict[int, Message]:
        self.round += 1
        everybody = tuple(range(self.n))
        task = self.session.task(self.round)
        started = self.session.aggregator.start_round(
            self.round, everybody, self.words, len(self.vector), task, b"broadcast"
        )
        return {e.to: e.message for e in started if isinstance(e, Send)}

    def _masked(self, i: int, start: Message, keep: bool = True) -> tuple[MaskedInput, list[bytes]]:
        member = self.session.members[i]
        asked = member.handle(start)
        assert any(isinstance(e, Contribute) for e in asked)
        words = self.codec.words_of(self.vector, room=self._room)
        message = next(e.message for e in member.contribute(words) if isinstance(e, Send))
        assert isinstance(message, MaskedInput)
        sent, size = [], 0
        for frame in frames(message):  # a gate lets go of each packet when it is written
            data = packed(frame)
            size += len(data)
            if keep:
                sent.append(data)
        if i == 0:
            self.bytes_up = size
        return message, sent

    def site(self) -> float:
        """Seconds of site 0."""
        start = self._start()[0]
        begin = time.perf_counter()
        self._masked(0, start, keep=False)
        return time.perf_counter() - begin

    def server(self, absent: int) -> float:
        """Seconds of the aggregator over one round in which the last `absent` sites say nothing."""
        self.sum = np.zeros(0)  # as an analysis lets go of the last sum before the next one
        starts = self._start()
        active = range(self.n - absent)
        sent: dict[int, list[bytes]] = {}
        shared: list[bytes] = []
        for i in active:
            with _unmasked() if shared else contextlib.nullcontext():
                message, whole = self._masked(i, starts[i])
            sent[i] = [whole[0], *shared] if shared else whole
            if not shared and self.n * self.words > REUSE:
                shared = whole[1:]
            self.session.members[i]._outbox = None  # thirty vectors need not stay in memory
            del message, whole
        clock = _Clock()
        limits = Limits(8 * self.words, self.codec.ring_bits)
        effects: list[Effect] = []
        for i in active:
            reader = self._readers.setdefault(i, Reader(limits))  # as a stream has one for all its rounds
            parts = sent.pop(i)
            with clock:
                for data in parts:
                    if (message := reader.take(unpacked(data))) is not None:
                        effects += self.session.aggregator.handle(i, message)
            del message, parts
        if absent:
            token = self.session.aggregator._token
            with clock:
                effects += self.session.aggregator.deadline(token)
        outcome = self._answered(effects, clock)
        with clock:
            self.sum = self.codec.values_of(outcome.total, len(self.vector), self._room)
        return clock.seconds

    def _answered(self, effects: Sequence[Effect], clock: _Clock) -> Outcome:
        """The sites' answers until the sum is out; what a site says besides its vector counts in `bytes_up`."""
        waiting = list(effects)
        while waiting:
            effect = waiting.pop(0)
            if isinstance(effect, Outcome):
                return effect
            if not isinstance(effect, Send):
                continue
            for said in self.session.members[effect.to].handle(effect.message):
                if isinstance(said, Send):
                    if effect.to == 0:
                        self.bytes_up += sum(len(packed(frame)) for frame in frames(said.message))
                    with clock:
                        waiting += self.session.aggregator.handle(effect.to, said.message)
        raise AssertionError("the round has no end")


class _Clock:
    """Seconds inside its `with` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start


@contextlib.contextmanager
def _unmasked() -> Iterator[None]:
    """Contributions whose vector nobody reads are not masked; their seals, commitments and signatures are real."""
    with mock.patch.object(masks, "add_streams"):
        yield


def against_flower(bench: Bench, folder: Path, sizes: Sequence[int], sites: Sequence[int]) -> None:
    """Site and server, like for like and with lane packing, the three of them in turn."""
    with Peer(bench.peers, "flwr_secagg.py") as peer:
        for n in sites:
            threshold = session(n).aggregator.threshold
            peer.ask(op="set_up", n=n, threshold=threshold)
            for m in sizes:
                vector = _vector(m)
                np.save(folder / "values.npy", vector.astype(np.float32))
                peer.ask(op="inputs", path=str(folder / "values.npy"))
                ours = {name: Ours(n, codec, vector) for name, codec in CODECS.items()}
                _sites(bench, peer, ours, m, n)
                for absent in (0, 1):
                    _servers(bench, peer, ours, m, n, absent)


def _sites(bench: Bench, peer: Peer, ours: dict[str, Ours], m: int, n: int) -> None:
    tasks = {"flwr": lambda: float(peer.ask(op="site")["seconds"])} | {k: o.site for k, o in ours.items()}
    taken = interleaved(tasks, _repeats(bench, m))
    cell = f"m={_short(m)} N={n}"
    bench.compared("secagg_site_vs_flwr", cell + " alike", taken["alike"], taken["flwr"], at_least=5)
    target = 10 if n >= 30 else 8
    bench.compared("secagg_site_vs_flwr", cell + " packed", taken["packed"], taken["flwr"], at_least=target)


def _servers(bench: Bench, peer: Peer, ours: dict[str, Ours], m: int, n: int, absent: int) -> None:
    tasks = {"flwr": lambda: float(peer.ask(op="server", absent=absent)["seconds"])}
    tasks |= {k: (lambda o=o: o.server(absent)) for k, o in ours.items()}
    taken = interleaved(tasks, _repeats(bench, m))
    for our in ours.values():
        if n * our.words <= REUSE:  # every vector was masked for real: the sum is the sum
            expected, step = (n - absent) * our.vector, n * 2.0**-our.codec.fraction_bits
            assert np.abs(our.sum - expected).max() <= step, "the opened sum is not the sum"
    cell = f"m={_short(m)} N={n} absent={absent}"
    target = 6 if n < 30 else (100 if m <= 1_000_000 else 20)
    for name in CODECS:
        bench.compared("secagg_server_vs_flwr", f"{cell} {name}", taken[name], taken["flwr"], at_least=target)
    if absent == 0:
        theirs = float(peer.ask(op="site")["bytes"])
        for name, least in (("alike", 2), ("packed", 3)):
            mine = float(ours[name].bytes_up)
            bench.compared(
                "bytes_vs_flwr", f"m={_short(m)} N={n} {name}", [mine], [theirs], unit="bytes", at_least=least
            )


def against_ckks(bench: Bench, folder: Path, sizes: Sequence[int]) -> None:
    """One site's encryption, serialisation and decryption against one site's masked input."""
    with Peer(bench.peers, "tenseal_ckks.py") as peer:
        for m in sizes:
            vector = _vector(m)
            np.save(folder / "values.npy", vector)
            peer.ask(op="inputs", path=str(folder / "values.npy"))
            ours = {str(n): Ours(n, ALIKE, vector) for n in (5, 30)}
            packed = Ours(5, PACKED, vector)
            said: dict[str, float] = {}

            def theirs(said: dict[str, float] = said) -> float:
                said.update(peer.ask(op="site"))
                return said["seconds"]

            taken = interleaved({"ckks": theirs} | {k: o.site for k, o in ours.items()}, 3)
            for n, least in (("5", 60), ("30", 25)):
                bench.compared("secagg_site_vs_ckks", f"m={_short(m)} N={n}", taken[n], taken["ckks"], at_least=least)
            for name, our, least in (("alike", ours["5"], 14), ("packed", packed, 21)):
                our.server(0)  # a whole round: every byte site 0 sends in it
                mine = float(our.bytes_up)
                cell = f"m={_short(m)} N=5 {name}"
                bench.compared("bytes_vs_ckks", cell, [mine], [said["bytes"]], unit="bytes", at_least=least)


def mask_limit(bench: Bench, words: int, streams: int) -> None:
    """Our fused mask-and-add, bytes a second, against AES-256-CTR alone in blocks of 1 MB on the same core."""
    vector = np.zeros(words, dtype=np.uint32)
    keys = [bytes([i + 1]) * 32 for i in range(streams)]
    zeros, buffer = memoryview(bytes(BLOCK)), bytearray(BLOCK + 15)

    def alone() -> None:
        for key in keys:
            stream = Cipher(AES(key), CTR(bytes(16))).encryptor()
            for start in range(0, 4 * words, BLOCK):
                stream.update_into(zeros[: min(BLOCK, 4 * words - start)], buffer)

    tasks = {"aes": lambda: timed(alone), "ours": lambda: timed(lambda: masks.add_streams(vector, keys))}
    taken = interleaved(tasks, 3 if bench.quick else 9)
    rate = {name: [4e-9 * words * streams / s for s in seconds] for name, seconds in taken.items()}
    cell = f"{_short(words)} uint32, {streams} streams"
    bench.compared("mask_limit", cell, rate["ours"], rate["aes"], unit="GB/s", at_least=0.55, higher=True)


def run(bench: Bench) -> None:
    """Every figure of this file; Flower and CKKS each on their own, so that one may be missing."""
    sizes = [100_000] if bench.quick else [100_000, 1_000_000, 10_000_000]
    sites = [5, 30] if bench.quick else [5, 10, 30]
    for streams in (1, 29):
        mask_limit(bench, 1_000_000 if bench.quick else 10_000_000, streams)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            against_ckks(bench, folder, sizes[:2])
        except PeerMissing as missing:
            bench.absent("secagg_site_vs_ckks", "", str(missing)), bench.absent("bytes_vs_ckks", "", str(missing))
        try:
            against_flower(bench, folder, sizes, sites)
        except PeerMissing as missing:
            for figure in ("secagg_site_vs_flwr", "secagg_server_vs_flwr", "bytes_vs_flwr"):
                bench.absent(figure, "", str(missing))


def _vector(m: int) -> NDArray[np.float64]:
    """Standard normal * 0.1, the model updates of the specification's table."""
    return np.random.default_rng(1).standard_normal(m) * 0.1


def _short(m: int) -> str:
    return f"{m // 1_000_000}M" if m >= 1_000_000 else f"{m // 1000}k"


def _repeats(bench: Bench, m: int) -> int:
    return 3 if bench.quick or m >= 10_000_000 else 5
