"""A secure sum over many sites through Flower's simulation engine (Ray): each virtual SuperNode is one site's machine.

A message carries the aggregator's frames to a site, the reply the site's. A site is restored from its journal for each
message, as after a crash, since Ray's actors keep nothing. Sums are compared with the plain sums.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import pickle
import random
import shutil
import tempfile
import time
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np

from answering import serve

STUDY, VALUES, ROUNDS = hashlib.sha256(b"rehearsal").digest(), 1_000, 3


class Rules:
    """Every round of this rehearsal is allowed; nothing is charged, since nothing is anybody's."""

    def __init__(self, roster: tuple[bytes, ...]) -> None:
        self.pinned = frozenset(roster)

    def epoch_floor(self) -> int:
        return -1

    def reserve(self, params: Any) -> tuple[str, int, bytes]:
        return "cohort", 0, bytes(32)

    def ledger_head_at(self, data_set: str, counter: int) -> bytes:
        return bytes(32)

    def highest_seen(self, key: bytes, data_set: str) -> None:
        return None

    def saw(self, key: bytes, advertisement: Any) -> None:
        return None

    def admit(self, start: Any) -> Any:
        from sequester.protocols.secagg.member import Admission

        return Admission(ROUNDS, False)


def vector(i: int) -> np.ndarray:
    """A site's numbers in the ring."""
    return np.random.default_rng(i).integers(0, 2**31, VALUES, dtype=np.uint32)


def parties(n: int) -> tuple[Any, list[Any]]:
    """The session's parameters and every site's identity key, the same in every process."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from sequester.protocols.session import SessionParams, threshold

    draw = random.Random(1)
    identities = [Ed25519PrivateKey.from_private_bytes(draw.randbytes(32)) for _ in range(n)]
    roster = tuple(key.public_key().public_bytes_raw() for key in identities)
    c = (n - 1) // 3
    t = threshold(n, c)
    return SessionParams(STUDY, 0, roster, c, t, n - t, 32, "double"), identities


def answered(folder: Path, n: int, i: int, frames_in: list[bytes]) -> list[bytes]:
    """What site i says to these frames; its journal is written before."""
    from sequester.protocols.packets import packed, unpacked
    from sequester.protocols.quantise import RingVector
    from sequester.protocols.secagg.member import Member
    from sequester.protocols.secagg.messages import Contribute, Persist, Send, StoreOutbox
    from sequester.protocols.wire import Limits, Reader, frames

    params, identities = parties(n)
    place = folder / f"{i}.pickle"
    records, outbox = pickle.loads(place.read_bytes()) if place.exists() else ([], None)
    known = (params, i, identities[i].sign, Rules(params.roster), os.urandom)
    member = Member.restore(records, outbox, *known) if records else Member(*known)
    reader, said = Reader(Limits(1 << 22, 32)), []

    def perform(effects: Any) -> None:
        nonlocal outbox
        for effect in effects:
            match effect:
                case Persist():
                    records.append(effect.record)
                case StoreOutbox():
                    outbox = effect.message
                case Contribute():
                    perform(member.contribute(RingVector(vector(i))))
                case Send():
                    said.extend(packed(frame) for frame in frames(effect.message))

    for data in frames_in:
        if (message := reader.take(unpacked(data))) is not None:
            perform(member.handle(message))
    temporary = folder / f"{i}.part"
    temporary.write_bytes(pickle.dumps((records, outbox)))
    temporary.rename(place)
    return said


def load() -> Any:
    import flwr
    import ray  # noqa: F401  # said by name where it is missing
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    from sequester.protocols.packets import packed, unpacked
    from sequester.protocols.secagg.aggregator import Aggregator
    from sequester.protocols.secagg.messages import Outcome, Send
    from sequester.protocols.session import Task
    from sequester.protocols.wire import Limits, Reader, frames

    def rehearse(n: int) -> dict[str, Any]:
        folder = Path(tempfile.mkdtemp(prefix="rehearsal-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        client, server, found = ClientApp(), ServerApp(), {}

        @client.query()
        def site(message: Any, context: Any) -> Any:
            i = int(context.node_config["partition-id"])
            said = answered(folder, n, i, list(message.content["frames"]["frames"]))
            return Message(RecordDict({"frames": ConfigRecord({"site": i, "frames": said})}), reply_to=message)

        @server.main()
        def main(grid: Any, context: Any) -> None:
            while len(nodes := list(grid.get_node_ids())) < n:
                time.sleep(0.1)

            def ask(asked: dict[int, list[bytes]]) -> list[tuple[int, int, list[bytes]]]:
                sent = [
                    Message(
                        RecordDict({"frames": ConfigRecord({"frames": data})}), dst_node_id=node, message_type="query"
                    )
                    for node, data in asked.items()
                ]
                replies = list(grid.send_and_receive(sent))
                broken = [reply.error for reply in replies if reply.has_error()]
                if broken or len(replies) != len(asked):
                    raise RuntimeError(f"{len(replies)} of {len(asked)} sites answered: {broken[:1]}")
                records = [(r.metadata.src_node_id, r.content["frames"]) for r in replies]
                return [(node, int(record["site"]), list(record["frames"])) for node, record in records]

            begin = time.perf_counter()
            node_of = {i: node for node, i, _ in ask({node: [] for node in nodes})}
            found["first_message_s"] = time.perf_counter() - begin
            params, _ = parties(n)
            machine = Aggregator(params, 600.0)

            def run(effects: Any) -> Any:
                waiting, ended = deque(effects), None
                while waiting:
                    asked: dict[int, list[bytes]] = defaultdict(list)
                    while waiting:
                        effect = waiting.popleft()
                        if isinstance(effect, Send):
                            asked[node_of[effect.to]] += [packed(f) for f in frames(effect.message)]
                        elif isinstance(effect, Outcome):
                            ended = effect
                    for _, i, data in ask(asked) if asked else ():
                        reader = Reader(Limits(1 << 22, 32))
                        for frame in data:
                            if (message := reader.take(unpacked(frame))) is not None:
                                waiting.extend(machine.handle(i, message))
                return ended

            begin = time.perf_counter()
            run(machine.start())
            found["set_up_s"] = time.perf_counter() - begin
            expected = np.sum([vector(i) for i in range(n)], axis=0, dtype=np.uint32)
            found["rounds_s"] = []
            for number in range(1, ROUNDS + 1):
                digest = hashlib.sha256(b"weights").digest()
                task = Task(STUDY, "glm", number, 0, digest, digest, "w32f16g1", "clip", "noise", "event")
                begin = time.perf_counter()
                outcome = run(machine.start_round(number, tuple(range(n)), VALUES, VALUES, task, b"weights"))
                found["rounds_s"].append(time.perf_counter() - begin)
                if outcome is None or not np.array_equal(outcome.total, expected):
                    raise RuntimeError("the opened sum is not the sum of all sites")
            found["sums_are_right"] = True

        begin = time.perf_counter()
        resources = {
            "client_resources": {"num_cpus": 1},
            "init_args": {"num_cpus": os.cpu_count(), "include_dashboard": False},
        }
        run_simulation(server, client, n, backend_config=resources)
        return {"wall_s": time.perf_counter() - begin, **found}

    return flwr.__version__, lambda request: rehearse(int(request["sites"]))


if __name__ == "__main__":
    serve(load)
