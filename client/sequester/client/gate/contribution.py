"""The one way out: every number computed from patients passes `Outgoing` or `ring_vector` before it is masked and sent.

In this order, and only here: shape and finiteness against the signed plan -> nearest integers -> this site's share of
the noise -> ring words. `Outgoing` does so block by block as the numbers arrive, over ring words that hold the noise
first; `ring_vector` at once, where all of them are there. In exact mode there is no noise, by the study's own typed line
and this site's consent; the ledger has flagged the data set before this is called (spec/privacy.md, 2.3;
spec/secure-aggregation.md, 8).

Where a plan takes local steps, each step's sum passes `noised_sum`, with this site's whole noise, before anything is made
of it; the move of the weights that `moved_words` puts under the mask is post-processing of those.

The un-noised vector, the noise and its key never leave this process's memory; what holds them is overwritten after use.
"""

from __future__ import annotations

import math
import os
import threading

import numpy as np
from numpy.typing import NDArray

from sequester.protocols import noise, privacy
from sequester.protocols.analyses.analysis import Layout, Sums
from sequester.protocols.analyses.registry import Plan
from sequester.protocols.arrays import Part
from sequester.protocols.errors import PrivacyError, SequesterError, SiteError
from sequester.protocols.memory import Room
from sequester.protocols.quantise import RingVector
from sequester.protocols.study import Study


def noise_share(study: Study, plan: Plan, step: int, adders: int) -> NDArray[np.int64] | None:
    """This site's share of the noise of one round, int64 (length,), in ring units; None in exact mode.

    Drawn before the vector is looked at, from an AES-256-CTR stream whose key comes from the operating system and is
    used once. `adders` is h, the smallest number of honest shares, from this site's own numbers; a plan that was
    calibrated for another h is refused.
    """
    if plan.mode == "exact":
        return None
    layout = privacy.layout(study, plan, step)
    return noise.discrete_gaussian(_sigma_int(study, plan, layout, adders), layout.length, _fresh_stream())


def _sigma_int(study: Study, plan: Plan, layout: Layout, adders: int) -> int:
    if adders < privacy.noise_adders(study):
        raise PrivacyError(
            f"the round counts on {adders} honest noise shares, the study on {privacy.noise_adders(study)}",
            hint="the active set is too small for this study's noise; nothing was sent",
        )
    return privacy.sigma_int(study, plan, layout)


def _fresh_stream() -> noise.ByteSource:
    return noise.aes_stream(os.urandom(32), os.urandom(16))


class Outgoing:
    """One contribution on its way out, in `room`: the words of `ring_vector`, with neither vector nor share ever whole.

    `draw` makes this site's share of the noise; `take`, in any thread, waits for that and adds what compute says; `words`
    gives the sum away once all of it was taken. `erase` ends it: what still arrives is dropped.
    """

    def __init__(self, study: Study, plan: Plan, step: int, adders: int, room: Room) -> None:
        self._study, self._plan, self._adders, self._room = study, plan, adders, room
        self._layout = privacy.layout(study, plan, step)
        self._codec = privacy.codec(study)
        if self._codec.lanes != 1:
            raise SiteError(f"a codec of {self._codec.lanes} lanes", hint="a fault of the code: nothing was sent")
        self._first: dict[str, int] = {}  # where each array begins in the vector
        at = 0
        for name, shape in self._layout.fields:
            self._first[name] = at
            at += math.prod(shape)
        self._taken = dict.fromkeys(self._first, 0)
        self._words: RingVector | None = None
        self._fault: SequesterError | None = None
        self._drawn = threading.Event()
        self._turn = threading.Lock()

    def draw(self) -> None:
        """This site's share of the noise as the vector's first words; zeros in exact mode. Once."""
        try:
            kind = np.uint32 if self._codec.ring_bits == 32 else np.uint64
            words = self._room.array(self._layout.length, kind)
            if self._plan.mode == "exact":
                words.fill(0)
            else:
                sigma_int, at = _sigma_int(self._study, self._plan, self._layout, self._adders), 0
                for drawn in noise.in_pieces(sigma_int, self._layout.length, _fresh_stream()):
                    words[at : at + len(drawn)] = drawn.view(np.uint64)  # modulo the word size
                    at += len(drawn)
                    drawn.fill(0)
            self._words = RingVector(words)
        except SequesterError as fault:
            self._fault = fault
            raise
        finally:
            self._drawn.set()

    def take(self, part: Part) -> None:
        """Add the next numbers; a name, a shape or a number that the plan does not have is a `SiteError`."""
        self._drawn.wait()
        shapes = dict(self._layout.fields)
        if part.name not in shapes:
            raise SiteError(f"the contribution names {part.name}, the plan {sorted(shapes)}")
        if part.shape != shapes[part.name]:
            raise SiteError(f"contribution {part.name} has shape {part.shape}, the plan says {shapes[part.name]}")
        values = np.asarray(part.values, dtype=np.float64)
        if not np.isfinite(values).all():
            raise SiteError("a contribution is not finite after clamping: a fault of the code, nothing was sent")
        with self._turn:
            if self._words is None:
                raise self._fault or SiteError("a contribution that nobody waits for any more")
            if part.at != self._taken[part.name]:
                raise SiteError(f"numbers of {part.name} out of order", hint="a fault of the code: nothing was sent")
            if len(values):
                added = self._codec.words_of(values)
                first = self._first[part.name] + part.at
                self._words[first : first + len(added)] += added
                added.fill(0)
            self._taken[part.name] += len(values)

    def words(self) -> RingVector:
        """What goes under the mask: contribution and noise, given away."""
        with self._turn:
            if any(self._taken[name] != math.prod(shape) for name, shape in self._layout.fields) or self._words is None:
                said = [name for name, taken in self._taken.items() if taken]
                raise SiteError(f"the contribution names {sorted(said)}, the plan {sorted(self._taken)}")
            words, self._words = self._words, None
            return words

    def erase(self) -> None:
        """Overwrite what was made so far: nothing of it will be sent."""
        with self._turn:
            if self._words is not None:
                self._words.fill(0)
            self._words = None


def ring_vector(
    study: Study,
    plan: Plan,
    layout: Layout,
    arrays: Sums,
    share: NDArray[np.int64] | None,
    room: Room | None = None,
) -> RingVector:
    """What goes under the mask: the contribution in integers plus this site's noise, as ring words in `room`."""
    if (share is None) != (plan.mode == "exact"):
        raise PrivacyError(
            f"analysis {plan.name} is {plan.mode}, the noise share is {'absent' if share is None else 'present'}",
            hint="a fault of the code: nothing was sent",
        )
    vector = layout.flatten(arrays)
    words = privacy.codec(study).words_of(vector, share, room)
    vector.fill(0.0)
    if share is not None:
        share.fill(0)
    return words


def noised_sum(
    study: Study, plan: Plan, layout: Layout, arrays: Sums, share: NDArray[np.int64] | None
) -> NDArray[np.float64]:
    """One local step's sum with this site's whole noise on it, padding included, float64 (length,)."""
    if share is None or study.privacy.mechanism != "local":
        raise PrivacyError(
            f"analysis {plan.name} takes local steps without this site's whole noise",
            hint="a fault of the code: nothing was sent",
        )
    vector = layout.flatten(arrays)
    codec = privacy.codec(study)
    integers = codec.encode(vector)
    vector.fill(0.0)
    integers += share
    share.fill(0)
    return codec.decode(integers)


def moved_words(study: Study, plan: Plan, layout: Layout, move: NDArray[np.float64]) -> RingVector:
    """What goes under the mask after local steps: a move made from `noised_sum` alone, as ring words."""
    if privacy.local_steps(plan) == 1 or move.shape != (layout.length,):
        raise PrivacyError(
            f"analysis {plan.name} has no local steps: its sum needs noise",
            hint="a fault of the code: nothing was sent",
        )
    codec = privacy.codec(study)
    return codec.words_of(move)
