"""The guarded ClientApp and the two functions by which the executor lets it run, with a real door."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.client_app import LoadClientAppError
from flwr.supercore.task_identity import TaskIdentity

from flower.stack import Gate, Loop
from sequester.client.gate.flower import app, door
from sequester.client.gate.flower.executor import FAB_ID, Guard
from sequester.protocols.errors import SiteError
from sequester.server.flower.app import read_reply
from sequester.server.flower.bundle import bundle_sha256, standard_bundle

STUDY = "5a" * 32
BUNDLE = bundle_sha256(standard_bundle())


@pytest.fixture(autouse=True)
def a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_run_id", 7), ("_node_id", 1), ("_task_id", 2)):
        monkeypatch.setattr(TaskIdentity, name, value)


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """A gate behind a real door."""
    behind, loop = Gate(approved={BUNDLE}), Loop()
    monkeypatch.setenv(door.VARIABLE, str(tmp_path / "door"))
    server = loop.run(door.serve_door(tmp_path / "door", behind))
    yield behind
    loop.loop.call_soon_threadsafe(server.close)
    loop.close()


class Run:
    """The context of a task, as far as the app reads it."""

    def __init__(self, run_config: dict[str, Any]) -> None:
        self.run_config = run_config


def message(content: Any = None, kind: str = "query.join") -> Any:
    if content is None:
        content = {"join": ConfigRecord({"study": STUDY, "bundle": BUNDLE})}
    return Message(RecordDict(content), dst_node_id=1, message_type=kind)


def answer(given: Any, bundle: str | None = BUNDLE) -> tuple[str, str]:
    """Status and code of the reply, which carries one record and nothing else."""
    reply = app.guarded(bundle)(given, Run({"study": STUDY}))
    assert reply.has_content() and list(reply.content) == ["join"]
    record = reply.content["join"]
    assert set(record) == {"study", "status", "code"}
    return str(record["status"]), str(record["code"])


@pytest.mark.parametrize("said", [("joined", ""), ("not yet", ""), ("refused", "BUDGET")])
def test_the_gates_answer_goes_back_as_it_is(gate: Gate, said: tuple[str, str]) -> None:
    gate.answers[STUDY] = said
    assert answer(message()) == said
    assert gate.asked == [(STUDY, BUNDLE)]


def test_the_exchange_reads_the_reply_it_was_written_for(gate: Gate) -> None:
    for said, status in ((("joined", ""), "joined"), (("refused", "EXPIRED"), "refused:EXPIRED")):
        gate.answers[STUDY] = said
        assert read_reply(app.guarded(BUNDLE)(message(), Run({"study": STUDY})), STUDY)[1] == status
        assert read_reply(app.guarded(BUNDLE)(message(), Run({"study": STUDY})), "00" * 32) == ("error", "error:reply")


@pytest.mark.parametrize("kind", ["query", "query.other", "train", "train.join", "evaluate", "query.Join"])
def test_another_message_type_is_refused_without_asking_the_gate(gate: Gate, kind: str) -> None:
    assert answer(message(kind=kind)) == ("refused", "STUDY")
    assert gate.asked == []


GOOD = {"study": STUDY, "bundle": BUNDLE}


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"other": ConfigRecord(GOOD)},
        {"join": ConfigRecord(GOOD), "more": ConfigRecord({})},
        {"join": ConfigRecord(GOOD), "weights": ArrayRecord()},
        {"join": MetricRecord({"study": 1, "bundle": 2})},
        {"join": ConfigRecord({"study": STUDY})},
        {"join": ConfigRecord(GOOD | {"epsilon": 9.0})},
        {"join": ConfigRecord(GOOD | {"study": STUDY.upper()})},
        {"join": ConfigRecord(GOOD | {"study": STUDY[:-1]})},
        {"join": ConfigRecord(GOOD | {"study": STUDY + "\n"})},
        {"join": ConfigRecord(GOOD | {"study": bytes.fromhex(STUDY)})},
        {"join": ConfigRecord(GOOD | {"study": [STUDY]})},
        {"join": ConfigRecord(GOOD | {"bundle": "../../etc/passwd"})},
        {"join": ConfigRecord(GOOD | {"bundle": 1})},
    ],
)
def test_content_that_is_not_exactly_a_join_is_refused_without_asking_the_gate(gate: Gate, content: Any) -> None:
    assert answer(message(content)) == ("refused", "STUDY")
    assert gate.asked == []


def test_a_join_that_names_another_bundle_than_it_came_with_is_refused(gate: Gate) -> None:
    assert answer(message(), bundle="00" * 32) == ("refused", "STUDY")
    assert gate.asked == []


@pytest.mark.parametrize(
    "config",
    [{"study": STUDY, "epsilon": 30.0}, {"study": STUDY, "noise": 0, "genotypes": "/x"}, {"study": "00" * 32}, {}],
)
def test_a_run_config_that_says_more_than_the_study_is_refused_by_name_without_asking_the_gate(
    gate: Gate, config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    reply = app.guarded(BUNDLE)(message(), Run(config))
    assert read_reply(reply, STUDY) == ("refused", "refused:STUDY")
    assert gate.asked == [] and "run config" in caplog.text
    assert all(name in caplog.text for name in config if name != "study")


def test_an_error_message_is_refused(gate: Gate) -> None:
    incoming = message()
    erroneous = Message(Error(1, "x"), reply_to=incoming)
    assert answer(erroneous) == ("refused", "STUDY")


def test_the_text_of_an_exception_never_leaves(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Any:
        raise ValueError("patient 0042 in /data/cohort.vcf")

    monkeypatch.setattr(door, "join", fails)
    reply = app.guarded(BUNDLE)(message(), Run({"study": STUDY}))
    assert (reply.error.code, reply.error.reason) == (2, "E_INTERNAL")
    assert not reply.has_content()
    monkeypatch.delenv(door.VARIABLE)
    assert app.guarded(BUNDLE)(message(), Run({"study": STUDY})).error.reason == "E_INTERNAL"


def test_without_a_gate_the_answer_is_not_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(door.VARIABLE, str(tmp_path / "nobody"))
    assert answer(message()) == ("not yet", "")


def test_the_installed_app_is_one_that_upstream_loads() -> None:
    assert isinstance(app.app, ClientApp)
    reply = app.app(message(kind="train"), None)
    assert reply.content["join"]["status"] == "refused"


# ---- the executor's two functions ------------------------------------------------------------------------------------


def test_an_approved_bundle_passes_and_nothing_is_unpacked(
    gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    guard = Guard(tmp_path / "door")
    guard.install_from_fab(standard_bundle(), skip_prompt=True)
    load = guard.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
    assert load(FAB_ID, "0.1.0", BUNDLE)(message(), Run({"study": STUDY})).content["join"]["status"] == "joined"
    assert not (tmp_path / "home").exists()


def test_a_bundle_that_no_study_names_is_not_loaded(gate: Gate, tmp_path: Path) -> None:
    for content in (b"", b"PK", standard_bundle() + b"\0"):
        with pytest.raises(LoadClientAppError):
            Guard(tmp_path / "door").install_from_fab(content)


def test_approval_is_asked_anew_for_each_task(gate: Gate, tmp_path: Path) -> None:
    guard = Guard(tmp_path / "door")
    guard.install_from_fab(standard_bundle())
    gate.approved.clear()
    with pytest.raises(LoadClientAppError):
        guard.install_from_fab(standard_bundle())


@pytest.mark.parametrize("label", [(FAB_ID, "0" * 64), ("evil/sequester", BUNDLE), (FAB_ID, ""), ("", "")])
def test_a_label_that_is_not_the_contents_is_not_loaded(gate: Gate, tmp_path: Path, label: tuple[str, str]) -> None:
    guard = Guard(tmp_path / "door")
    guard.install_from_fab(standard_bundle())
    with pytest.raises(LoadClientAppError):
        guard.get_load_client_app_fn()(label[0], "0.1.0", label[1])


def test_a_bundle_that_was_never_looked_at_is_not_loaded(gate: Gate, tmp_path: Path) -> None:
    with pytest.raises(LoadClientAppError):
        Guard(tmp_path / "door").get_load_client_app_fn()(FAB_ID, "0.1.0", "")


def test_while_no_gate_answers_nothing_is_decided(tmp_path: Path) -> None:
    guard = Guard(tmp_path / "nobody")
    guard.install_from_fab(standard_bundle())
    reply = guard.get_load_client_app_fn()(FAB_ID, "0.1.0", BUNDLE)(message(), None)
    assert reply.content["join"] == ConfigRecord({"study": STUDY, "status": "not yet", "code": ""})


# ---- the door --------------------------------------------------------------------------------------------------------


def raw(path: Path, line: bytes) -> Any:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        connection.sendall(line)
        return json.loads(connection.makefile("rb").readline())


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"not json\n",
        b"[]\n",
        b'{"ask":"approve","study":"' + STUDY.encode() + b'"}\n',
        b'{"ask":"bundle"}\n',
        b'{"ask":"bundle","sha256":"00"}\n',
        b'{"ask":"bundle","sha256":["' + BUNDLE.encode() + b'"]}\n',
        b'{"ask":"bundle","sha256":"' + BUNDLE.encode() + b'","also":1}\n',
        b'{"ask":"join","study":"' + STUDY.encode() + b'"}\n',
        b'{"ask":"join","study":"' + STUDY.encode() + b'","bundle":"' + BUNDLE.encode() + b'","epsilon":9}\n',
        b'{"ask":"status"}\n',
        b'"' + b"x" * 100_000 + b'"\n',
    ],
)
def test_the_door_refuses_whatever_is_not_one_of_its_two_questions(gate: Gate, tmp_path: Path, line: bytes) -> None:
    assert raw(tmp_path / "door", line) == {"status": "refused", "code": "STUDY"}
    assert gate.asked == []


def test_the_door_is_for_its_owner_and_group(gate: Gate, tmp_path: Path) -> None:
    mode = (tmp_path / "door").stat().st_mode
    assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o660


def test_a_fault_of_the_gate_is_a_code_at_the_door(gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*_: object) -> Any:
        raise RuntimeError("/home/alps/ledger.db is locked")

    monkeypatch.setattr(gate, "join", fails)
    assert door.join(tmp_path / "door", STUDY, BUNDLE) == ("refused", "NOT_READY")
    monkeypatch.setattr(gate, "bundle_approved", fails)
    assert door.bundle_approved(tmp_path / "door", BUNDLE) is False


def test_an_answer_outside_the_list_is_a_refusal(gate: Gate, tmp_path: Path) -> None:
    for odd in (("done", ""), ("refused", "patient 0042"), ("", "")):
        gate.answers[STUDY] = odd
        assert door.join(tmp_path / "door", STUDY, BUNDLE) == ("refused", "NOT_READY")


def test_a_gate_that_does_not_answer_in_time_is_not_yet(
    gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "WAIT_S", 0.3)
    gate.slow_s = 2.0
    assert door.join(tmp_path / "door", STUDY, BUNDLE) == ("not yet", "")


def test_no_gate_is_an_error_for_the_bundle_question(tmp_path: Path) -> None:
    with pytest.raises(SiteError):
        door.bundle_approved(tmp_path / "nobody", BUNDLE)


def test_two_studies_wait_at_the_door_side_by_side(gate: Gate, tmp_path: Path) -> None:
    gate.slow_s = 0.5

    async def both() -> list[Any]:
        ask = [asyncio.to_thread(door.join, tmp_path / "door", f"{n:064x}", BUNDLE) for n in range(8)]
        return await asyncio.wait_for(asyncio.gather(*ask), 3)

    assert asyncio.run(both()) == [("joined", "")] * 8
