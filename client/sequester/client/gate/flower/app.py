"""The ClientApp: hands a `join` to the gate and answers as soon as the study's own stream stands, or with a refusal.

It lives for seconds and decides nothing; the gate does. Whatever goes wrong here is answered with a code and told in
this site's log: upstream would send the text of an exception to the consortium. The reply's size and the time it took
are seen there, which is accepted: neither depends on a patient.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from sequester.client.gate.flower import door
from sequester.protocols.errors import RefusalCode

log = logging.getLogger("sequester.clientapp")

MESSAGE_TYPE = "query.join"
_CLIENT_APP_RAISED_EXCEPTION = 2


def guarded(bundle: str | None = None) -> Callable[[Any, Any], Any]:
    """The app for a bundle of this SHA-256; without one (a rehearsal by Ray) the gate is told what the message says."""

    def answering(message: Any, context: Any) -> Any:
        try:
            return _answer(message, bundle, context)
        except Exception:
            log.exception("a message could not be answered")
            return Message(Error(_CLIENT_APP_RAISED_EXCEPTION, "E_INTERNAL"), reply_to=message)

    return answering


def not_yet(message: Any, context: Any) -> Any:
    """The app for the time that no gate answers: nothing is decided, the consortium asks again."""
    study, _ = read(message) or ("", "")
    return _reply(message, study, "not yet", "")


def read(message: Any) -> tuple[str, str] | None:
    """Study and bundle of a well-formed `join`; None for everything else."""
    if message.metadata.message_type != MESSAGE_TYPE or not message.has_content():
        return None
    records = dict(message.content)
    record = records.get("join")
    if set(records) != {"join"} or not isinstance(record, ConfigRecord) or set(record) != {"study", "bundle"}:
        return None
    study, bundle = record["study"], record["bundle"]
    return (str(study), str(bundle)) if door.is_digest(study) and door.is_digest(bundle) else None


def run_config_fault(config: Mapping[str, Any], study: str) -> str:
    """What a run's configuration says beside the study's digest, "" where that is nothing.

    Nothing in it would be used: epsilon, noise, clipping and paths come from the study that was approved. A consortium that
    writes them there means something else than what it signed.
    """
    beside = sorted(str(name)[:32] for name in config if name != "study")
    if beside:
        shown = ", ".join(name if name.isprintable() else "?" for name in beside[:5])
        return f"Flower's run config sets {shown}; only the signed study decides, `study` alone was expected"
    if config.get("study") != study:
        return "Flower's run config names another study than the `join`"
    return ""


def _answer(message: Any, carried: str | None, context: Any) -> Any:
    request = read(message)
    if request is None or (carried is not None and request[1] != carried):
        log.error("refused a message that is no join, or of another bundle than it came with")
        return _reply(message, "" if request is None else request[0], "refused", RefusalCode.STUDY.value)
    study, bundle = request
    if carried is not None and (fault := run_config_fault(context.run_config, study)):
        log.error("study %s refused: %s", study[:12], fault)
        return _reply(message, study, "refused", RefusalCode.STUDY.value)
    status, code = door.join(Path(os.environ[door.VARIABLE]), study, bundle)
    log.info("study %s: %s %s", study[:12], status, code)
    return _reply(message, study, status, code)


def _reply(message: Any, study: str, status: str, code: str) -> Any:
    record = ConfigRecord({"study": study, "status": status, "code": code})
    return Message(RecordDict({"join": record}), reply_to=message)


class JoinApp(ClientApp):  # type: ignore[misc]
    """Answers every message itself, of whatever type: upstream's own dispatch raises for an unknown one."""

    def __call__(self, message: Any, context: Any) -> Any:
        return guarded()(message, context)


app = JoinApp()
