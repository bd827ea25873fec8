"""Journal records of both state machines: canonical JSON, secrets in hex; who drives a machine seals and keeps them."""

from __future__ import annotations

import json
from typing import Any

from sequester.protocols.secagg.messages import KeyAdvertisement, MaskedInput
from sequester.protocols.session import Task


def as_record(kind: str, row: dict[str, Any]) -> bytes:
    return json.dumps({"kind": kind, **row}, sort_keys=True, separators=(",", ":")).encode()


def input_record(sent: MaskedInput) -> bytes:
    """The round's vector is made: the outbox has its bytes, and the site's ledger their SHA-256 before they leave."""
    return as_record("input", {"ctx": sent.ctx.hex(), "salt": sent.salt.hex()})


def adv_json(adv: KeyAdvertisement) -> dict[str, Any]:
    return {
        "index": adv.index, "session_id": adv.session_id.hex(), "kx": adv.kx.hex(), "data_set": adv.data_set,
        "counter": adv.counter, "head": adv.head.hex(), "signature": adv.signature.hex(),
    }  # fmt: skip


def adv_from_json(row: dict[str, Any]) -> KeyAdvertisement:
    return KeyAdvertisement(
        row["index"], bytes.fromhex(row["session_id"]), bytes.fromhex(row["kx"]), row["data_set"], row["counter"],
        bytes.fromhex(row["head"]), bytes.fromhex(row["signature"]),
    )  # fmt: skip


def task_json(task: Task) -> list[Any]:
    return [
        task.study_digest.hex(), task.analysis, task.step, task.attempt, task.broadcast.hex(), task.layout.hex(),
        task.codec, task.clip, task.noise, task.event,
    ]  # fmt: skip


def task_from_json(row: list[Any]) -> Task:
    study, analysis, step, attempt, broadcast, layout, codec, clip, noise, event = row
    return Task(
        bytes.fromhex(study), analysis, step, attempt, bytes.fromhex(broadcast), bytes.fromhex(layout), codec, clip,
        noise, event,
    )  # fmt: skip
