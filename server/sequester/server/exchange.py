"""The exchange: which studies there are, who decided what, and the streams of those that run.

It relays and adds; it holds no key that signs a study or vouches for a hospital, and nothing in it can open one hospital's
numbers. What lies here is in `catalogue.py`, what runs in `runs.py`: one `StudyRun` behind one stream per hospital, which
this file listens to. Services (`services.py`) bring calls in, `serve.py` runs the process, Flower (`flower/`) only tells
hospitals that a study wants them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from sequester.protocols import exchange_pb2 as pb
from sequester.protocols import privacy
from sequester.protocols.errors import PeerError, StudyError
from sequester.protocols.packets import unpacked
from sequester.protocols.release import Release, judge
from sequester.protocols.secagg import keys
from sequester.protocols.secagg.messages import KeyAdvertisement, Resume
from sequester.protocols.secagg.records import adv_json
from sequester.protocols.signing import open_document
from sequester.protocols.states import FINAL, what_next
from sequester.protocols.study import Study
from sequester.protocols.wire import MAX_FRAME_BYTES, Limits, Reader, check_hello, hello
from sequester.server import decisions
from sequester.server.release import words
from sequester.server.runs import RECEIPTS_S, Running, Runs, Stream, Write
from sequester.server.store import Store

log = logging.getLogger("sequester.exchange")

STREAMS = 64  # of one hospital at once; an honest one has one for each study that runs
FAREWELL_S = 60.0  # how long a stream may stand whose study is over
_HELLO_S = 30.0
_DRAINED_S = 10.0
Read = Callable[[], Awaitable[bytes | None]]


class Exchange(Runs):
    """Everything but sockets: hospitals' streams, and what people ask."""

    def __init__(self, store: Store, consortium: str, coordinator: bytes) -> None:
        super().__init__(store, consortium, coordinator)
        self._farewells: dict[tuple[str, str], Stream] = {}  # (study that is over, hospital) -> its stream
        self._open: Counter[str] = Counter()  # hospital -> its streams, those without a Hello included

    async def session(self, site: str, read: Read, write: Write) -> None:
        """One hospital's stream for one study, from Hello to its end; `PeerError` where it breaks the protocol."""
        if self._open[site] >= STREAMS:
            raise StudyError(f"{STREAMS} streams of `{site}` stand", hint="the gate tries again when one has ended")
        self._open[site] += 1
        try:
            await self._session(site, read, write)
        finally:
            self._open[site] -= 1

    async def _session(self, site: str, read: Read, write: Write) -> None:
        first = await asyncio.wait_for(read(), _HELLO_S)
        if first is None:
            return
        greeting = check_hello(Reader(Limits(0, 32)).take(unpacked(first)))
        digest = greeting.study_digest.hex()
        study = self.addressed(site, digest)
        if site in self._struck(study):
            raise StudyError(
                f"`{site}` is enrolled with another identity than study {digest[:12]} names",
                hint="ask for an amendment",
            )
        self._require_running(digest)
        await write(hello(greeting.study_digest))
        running = self._require_running(digest)  # it may have ended meanwhile
        stream = Stream(write)
        if running is None or running.is_over:
            stream.say(self._farewell(digest, self.store.state(digest)))
        older = running.streams.get(site) if running is not None else self._farewells.get((digest, site))
        if older is not None:
            older.closed.set()
        if running is not None:
            running.streams[site] = stream
        else:
            self._farewells[digest, site] = stream
        writer, closed = asyncio.create_task(stream.drain()), asyncio.create_task(stream.closed.wait())
        listening = asyncio.create_task(self._listen(site, study, digest, running, stream, read))
        try:
            limit = None if running is not None else FAREWELL_S
            done, _ = await asyncio.wait(
                {writer, closed, listening}, timeout=limit, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                raise PeerError(f"`{site}` takes no leave of a study that is over")
            for task in done:
                task.result()
            if listening in done:  # what it is still to hear goes out before this stream closes
                await asyncio.wait_for(stream.drained(), _DRAINED_S)
        finally:
            for task in (writer, closed, listening):
                task.cancel()
            await asyncio.gather(writer, closed, listening, return_exceptions=True)
            if running is not None and running.streams.get(site) is stream:
                del running.streams[site]
                self._all_receipts(digest, running)
            if self._farewells.get((digest, site)) is stream:
                del self._farewells[digest, site]

    def _require_running(self, digest: str) -> Running | None:
        """The study as it runs, None where it has ended; refused where it does neither."""
        running, state = self._running.get(digest), self.store.state(digest)
        if running is None and state not in FINAL:
            raise StudyError(f"study {digest[:12]} does not run now: it is {state}", hint="the gate tries again")
        return running

    async def _listen(
        self, site: str, study: Study, digest: str, running: Running | None, stream: Stream, read: Read
    ) -> None:
        index = study.site_ids.index(site)
        reader = Reader(Limits.for_study(study))
        while True:
            data = await read()
            if data is None:
                if running is not None and self._running.get(digest) is running and running.is_over:
                    # what its peers still say goes out before this stream closes
                    await asyncio.wait_for(running.receipts.wait(), RECEIPTS_S)
                return
            if len(data) > MAX_FRAME_BYTES:
                raise PeerError(f"a frame of {len(data)} bytes, at most {MAX_FRAME_BYTES} are allowed")
            message = reader.take(unpacked(data))
            if running is not None:
                running.run.bytes_up[site] += len(data)
            match message:
                case None:
                    continue
                case pb.Receipt():
                    self._receipt(site, study, digest, message.receipt.json)
                    stream.say(pb.Frame(receipt=message))  # kept: the hospital need not send it again
                    if running is not None:
                        self._all_receipts(digest, running)
                case pb.Hello() | pb.Stop() | pb.Done():
                    raise PeerError(f"{type(message).__name__} in the middle of a stream")
                case KeyAdvertisement() if running is None:
                    self._closing(study, digest, index, message)
                case _ if running is None or self._running.get(digest) is not running:
                    continue  # the study ended while this was on its way
                case Resume():
                    await running.run.stands(index, None if message.state == "IDLE" else message)
                case _:
                    await running.run.handle(index, message)

    def _closing(self, study: Study, digest: str, index: int, adv: KeyAdvertisement) -> None:
        """The last head that a hospital signed, from one that comes when the study is over: kept for later studies."""
        key = study.roster[index]
        epochs = range(self.store.run(digest)[1] + 1)
        if adv.session_id not in {keys.session_id(privacy.session_params(study, epoch)) for epoch in epochs}:
            raise PeerError(f"site {index} closes a session that never was")  # each name of one may take some rows
        if adv.index != index or not keys.is_signed(key, adv.signature, keys.advertisement_bytes(adv)):
            raise PeerError(f"the advertisement of site {index} is not signed by it")
        self.store.witness(key, adv.data_set, adv.counter, adv_json(adv))

    def _receipt(self, site: str, study: Study, digest: str, raw: bytes) -> None:
        body = open_document(raw, "receipt", study.roster[study.site_ids.index(site)]).body
        if (body.get("study"), body.get("site")) != (digest, site):
            raise PeerError(f"`{site}` sent a receipt of another study or site")
        self.store.set_receipt(digest, site, raw)

    def _all_receipts(self, digest: str, running: Running) -> None:
        if set(running.streams) <= set(self.store.receipts(digest)):
            running.receipts.set()

    # ---- what people ask ----------------------------------------------------------------------------------------------

    def status(self, digest: str) -> dict[str, Any]:
        """Where a study stands, for the coordinator: no number of one hospital but bytes."""
        study, state = self.study(digest), self.store.state(digest)
        row: dict[str, Any] = {
            "digest": digest,
            "lineage": study.lineage,
            "title": study.title.get("en") or next(iter(study.title.values())),
            "state": state.value,
            "reason": self.store.reason(digest),
            "expires": study.expires,
            "rounds_closed": len(self.store.facts(digest)),
            "sites": decisions.standing(self.store.decisions(digest), study),
            "receipts": sorted(self.store.receipts(digest)),
            "release": words(self.release(digest)),
        }
        running = self._running.get(digest)
        if running is not None:
            row |= running.run.progress | {"seconds": round(time.monotonic() - running.began, 1)}
            row["sites"] = {
                name: "standing" if name in running.streams else running.reports.get(name, "called")
                for name in study.site_ids
            }
            if running.is_over:
                row["awaits_receipts"] = sorted(set(running.streams) - set(row["receipts"]))
        return row

    def release(self, digest: str) -> Release:
        """Where the export of a study's models stands."""
        return judge(self.study(digest), digest, self._coordinator, self.store.release(digest))

    def results(self, digest: str) -> bytes:
        """What `study results` writes out: results.json, the study and the receipts, as one JSON object of texts.

        `PrivacyError` while the release gate holds a private model back.
        """
        data = self.store.results(digest)
        if data is None:
            state = self.store.state(digest)
            raise StudyError(
                f"study {digest[:12]} has no results: it is {state}", hint=self.store.reason(digest) or what_next(state)
            )
        self.release(digest).require()
        texts = {
            "results": data.decode(),
            "study": self.store.study(digest)[0].decode(),
            "receipts": {site: raw.decode() for site, raw in self.store.receipts(digest).items()},
        }
        return json.dumps(texts).encode()
