"""When the ServerApp asks which site, and what it makes of the answers. The grid and the clock are the test's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity

from flower.stack import Exchange
from sequester.protocols import exchange_pb2 as pb
from sequester.protocols.errors import SequesterError, StudyError
from sequester.server.flower import app
from sequester.server.flower.app import AGAIN_S, SILENT_S, DispatchClient, Dispatcher

STUDY, BUNDLE = "5a" * 32, "b0" * 32
OK = {"study": STUDY, "status": "joined", "code": ""}


@pytest.fixture(autouse=True)
def a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_run_id", 7), ("_node_id", 1), ("_task_id", 2)):
        monkeypatch.setattr(TaskIdentity, name, value)


def key() -> Any:
    return ec.generate_private_key(ec.SECP384R1()).public_key()


KEYS = {"bern": key(), "basel": key(), "thief": key()}


def openssh(name: str) -> bytes:
    return bytes(KEYS[name].public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))


def node(number: int, name: str, whose: str | None = None) -> NodeInfo:
    pem = KEYS[whose or name].public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return NodeInfo(node_id=number, name=name, public_key=pem, status="online")


class World:
    """A grid, an exchange and a clock."""

    def __init__(self, *nodes: NodeInfo) -> None:
        self.nodes = list(nodes)
        self.listed = pb.JoinList(
            joins=[pb.Join(site=n, supernode_key=openssh(n)) for n in ("bern", "basel")],
            bundle_sha256=bytes.fromhex(BUNDLE),
        )
        self.sent: list[Any] = []
        self.replies: list[Any] = []
        self.reports: list[tuple[str, str]] = []
        self.time = 1000.0
        self.dispatcher = Dispatcher(self, self, STUDY, lambda: self.time)

    def get_nodes(self) -> list[NodeInfo]:
        return self.nodes

    def push_messages(self, messages: list[Any]) -> list[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"m{len(self.sent)}"
            self.sent.append(message)
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, ids: list[str]) -> list[Any]:
        taken = [reply for reply in self.replies if reply.metadata.reply_to_message_id in ids]
        self.replies = [reply for reply in self.replies if reply not in taken]
        return taken

    def joins(self) -> pb.JoinList:
        return self.listed

    def report(self, site: str, status: str) -> None:
        self.reports.append((site, status))

    def step(self, after: float = 0.0) -> bool:
        self.time += after
        return self.dispatcher.step()

    def asked(self) -> list[int]:
        return [message.metadata.dst_node_id for message in self.sent]

    def answer(self, content: Any) -> None:
        """The reply to the latest message: a record's content, or Flower's error code."""
        body = Error(content, "why") if isinstance(content, int) else RecordDict({"join": ConfigRecord(content)})
        self.replies.append(Message(body, reply_to=self.sent[-1]))


def test_each_listed_site_that_is_online_gets_one_join_and_no_more() -> None:
    world = World(node(1, "bern"), node(2, "basel"), node(3, "thief"))
    for _ in range(10):
        assert world.step(1.0)
    assert sorted(world.asked()) == [1, 2]
    for message in world.sent:
        assert message.metadata.message_type == "query.join" and message.metadata.ttl == 7 * 86400
        assert dict(message.content) == {"join": ConfigRecord({"study": STUDY, "bundle": BUNDLE})}


def test_a_node_with_a_sites_name_and_another_key_is_never_asked() -> None:
    world = World(node(1, "bern", whose="thief"), node(2, "thief", whose="basel"))
    world.step()
    assert world.asked() == []
    world.nodes.append(node(4, "bern"))
    world.step(after=AGAIN_S["offline"])
    assert world.asked() == [4]


def test_a_site_that_stands_is_not_asked() -> None:
    world = World(node(1, "bern"), node(2, "basel"))
    world.listed.joins[0].stands = True
    world.step()
    assert world.asked() == [2]


def test_it_ends_when_the_exchange_says_over_and_hands_on_what_came_last() -> None:
    world = World(node(1, "bern"))
    assert world.step()
    world.answer(OK)
    world.listed.over = True
    assert not world.step()
    assert world.reports == [("bern", "joined")]


def test_a_site_comes_online_later_and_is_asked_then() -> None:
    world = World()
    world.step()
    world.nodes.append(node(9, "bern"))
    world.step(after=AGAIN_S["offline"])
    assert world.asked() == [9]


@pytest.mark.parametrize(
    ("answer", "status", "again"),
    [
        (OK, "joined", AGAIN_S["joined"]),
        (OK | {"status": "not yet"}, "not yet", AGAIN_S["not yet"]),
        (OK | {"status": "refused", "code": "BUDGET"}, "refused:BUDGET", AGAIN_S["refused"]),
        (1, "refused:STUDY", AGAIN_S["refused"]),
        (2, "error:2", AGAIN_S["error"]),
        (7, "error:7", AGAIN_S["error"]),
        (3, "error:3", AGAIN_S["lost"]),
        (4, "error:4", AGAIN_S["lost"]),
        (5, "error:5", AGAIN_S["lost"]),
        (8, "error:8", AGAIN_S["lost"]),
        (OK | {"study": "00" * 32}, "error:reply", AGAIN_S["error"]),
        (OK | {"status": "done"}, "error:reply", AGAIN_S["error"]),
        (OK | {"code": "patient 0042"}, "error:reply", AGAIN_S["error"]),
        (OK | {"status": "refused", "code": "patient 0042"}, "error:reply", AGAIN_S["error"]),
        ({"study": STUDY}, "error:reply", AGAIN_S["error"]),
    ],
)
def test_an_answer_is_reported_once_and_a_site_without_stream_is_asked_again(
    answer: Any, status: str, again: float
) -> None:
    world = World(node(1, "bern"))
    world.step()
    world.answer(answer)
    world.step()
    assert world.reports == [("bern", status)] and len(world.sent) == 1
    world.step(after=again - 0.1)
    assert len(world.sent) == 1
    world.step(after=0.2)
    assert len(world.sent) == 2 and world.reports == [("bern", status)]


def test_after_a_lost_join_the_site_is_asked_when_it_is_back() -> None:
    world = World(node(1, "bern"))
    world.step()
    world.answer(5)
    world.nodes.clear()
    for _ in range(100):
        world.step(1.0)
    assert len(world.sent) == 1
    world.nodes.append(node(1, "bern"))
    world.step(after=AGAIN_S["offline"])
    assert len(world.sent) == 2


def test_a_site_that_never_answers_is_asked_again_unless_it_stands() -> None:
    world = World(node(1, "bern"))
    world.step()
    world.step(after=SILENT_S - 1)
    assert len(world.sent) == 1
    world.step(after=2)
    assert len(world.sent) == 2
    world.listed.joins[0].stands = True
    world.step(after=2 * SILENT_S)
    assert len(world.sent) == 2


def test_an_answer_to_a_join_that_was_given_up_is_not_read() -> None:
    world = World(node(1, "bern"))
    world.step()
    world.answer(OK)
    late = world.replies.pop()
    world.step(after=SILENT_S + 1)
    world.replies.append(late)
    world.step()
    assert world.reports == []


# ---- the run's entry and the socket ----------------------------------------------------------------------------------


@pytest.mark.parametrize("study", ["", "zz", STUDY.upper(), STUDY + "\n", "5a" * 31])
def test_a_run_without_a_study_ends_at_once(study: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(app.SOCKET_VARIABLE, "/nowhere")
    with pytest.raises(SequesterError):
        app.main(None, SimpleNamespace(run_config={"study": study}))


def within(seconds: float, act: Callable[[], Any]) -> Any:
    """The result of a call that may hang."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(act()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, f"not within {seconds} s"
    return results[0]


def test_a_restarting_exchange_is_waited_for(tmp_path: Path) -> None:
    exchange = Exchange(tmp_path / "dispatch.sock")
    exchange.over.add(STUDY)
    client = DispatchClient(str(exchange.path), STUDY)
    threading.Timer(1.5, exchange.start).start()
    started = time.monotonic()
    assert within(20, client.joins).over
    assert time.monotonic() - started > 1.0
    exchange.stop()
    exchange.start()
    client.report("bern", "joined")
    assert exchange.reports == [(STUDY, "bern", "joined")]
    exchange.stop()


def test_a_study_that_the_exchange_does_not_know_ends_the_run(tmp_path: Path) -> None:
    exchange = Exchange(tmp_path / "dispatch.sock")
    exchange.unknown.add(STUDY)
    exchange.start()
    with pytest.raises(StudyError):
        DispatchClient(str(exchange.path), STUDY).joins()
    exchange.stop()
