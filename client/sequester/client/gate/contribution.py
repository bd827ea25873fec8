"""The one way out: every number computed from patients passes `ring_vector` before it is masked and sent.

In this order, and only here: shape and finiteness against the signed plan -> nearest integers -> this site's share of
the noise -> ring words. In exact mode there is no noise, by the study's own typed line and this site's consent; the
ledger has flagged the data set before this is called (spec/privacy.md, 2.3; spec/secure-aggregation.md, 8).

Where a plan takes local steps, each step's sum passes `noised_sum`, with this site's whole noise, before anything is made
of it; the move of the weights that `moved_words` puts under the mask is post-processing of those.

The un-noised vector, the noise and its key never leave this process's memory; both arrays are overwritten after use.
"""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from sequester.protocols import noise, privacy
from sequester.protocols.analyses.analysis import Layout, Sums
from sequester.protocols.analyses.registry import Plan
from sequester.protocols.errors import PrivacyError
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
    if adders < privacy.noise_adders(study):
        raise PrivacyError(
            f"the round counts on {adders} honest noise shares, the study on {privacy.noise_adders(study)}",
            hint="the active set is too small for this study's noise; nothing was sent",
        )
    sigma_int = privacy.sigma_int(study, plan, layout)
    return noise.discrete_gaussian(sigma_int, layout.length, noise.aes_stream(os.urandom(32), os.urandom(16)))


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
