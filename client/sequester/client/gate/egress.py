"""What leaves for one study: in the ledger before it leaves. What only repeats costs few entries, however often it is asked.

An exchange may ask the same thing for ever, and each answer is a frame that left. Entries for the same bytes therefore
stand for 1, 1, 2, 4, 8 .. frames (`times`, at most so many before the next entry), and the study's last entry has the
exact number. Other bytes, asked within one round, are few in an honest study: beyond ANSWERS nothing more is said.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable

from sequester.client.gate.ledger import Ledger
from sequester.protocols.errors import PeerError

ANSWERS = 256  # different answers of one kind in one round: an honest exchange asks one site a handful
SENTENCES = 64


class Egress:
    """The frames of one study, over all its streams and key epochs."""

    def __init__(self, ledger: Ledger, study: str) -> None:
        self._ledger = ledger
        self._study = study
        self._said: dict[str, tuple[int, int]] = {}  # SHA-256 -> (times said, times that entries stand for)
        self._answers: Counter[tuple[str, int]] = Counter()

    @property
    def repeats(self) -> int:
        """Messages that were said before, byte for byte."""
        return sum(times - 1 for times, _ in self._said.values())

    def leaves(
        self, kind: str, pieces: Iterable[bytes | memoryview], round_number: int, epoch: int | None = None
    ) -> int:
        """Record one message that leaves next, its bytes in order, durable when this returns; how many they are."""
        size, digest = 0, hashlib.sha256()
        for data in pieces:
            size += len(data)
            digest.update(data)
        name = digest.hexdigest()
        said, covered = self._said.get(name, (0, 0))
        if said == covered:
            if said == 0 and self._answers[kind, round_number] >= ANSWERS:
                raise PeerError(
                    f"the exchange has asked for {ANSWERS} different answers `{kind}` in round {round_number}",
                    hint="nothing more is said in that round; tell the coordinator",
                )
            times = max(1, said)
            self._ledger.egress(self._study, round_number, kind, size, name, epoch, times)
            self._answers[kind, round_number] += said == 0
            covered += times
        self._said[name] = (said + 1, covered)
        return size


class Seldom:
    """Counts sentences that whoever is outside can bring about, so that logs and ledger hold them and not a flood."""

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()

    def times(self, sentence: str) -> int:
        """How often it was said by now where that is 1, 2, 4, 8 ..; else 0. Beyond SENTENCES all others count as one."""
        if sentence not in self._times and len(self._times) >= SENTENCES:
            sentence = ""
        self._times[sentence] += 1
        now = self._times[sentence]
        return now if now & (now - 1) == 0 else 0
