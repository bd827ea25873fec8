"""What a signed study promises and what both sides must do for it, derived from the study alone.

Threshold, noise shares, charges, layouts and tasks: a hospital computes them for itself and compares; none is received
(spec/privacy.md 2.2; spec/secure-aggregation.md 2 and 8).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Decimal

import numpy as np

from sequester.protocols import accounting, arrays, session
from sequester.protocols.accounting import Event
from sequester.protocols.analyses.analysis import Changing, Finished, Layout, State
from sequester.protocols.analyses.evaluation import subgroups
from sequester.protocols.analyses.heads import HeadsPlan
from sequester.protocols.analyses.linear import LinearPlan
from sequester.protocols.analyses.registry import Plan, analysis_of
from sequester.protocols.analyses.structure import StructurePlan, standardisation
from sequester.protocols.analyses.training import MOVE_BOUND, TrainingPlan, padding_gain, parameters
from sequester.protocols.decimals import one_spelling
from sequester.protocols.errors import PeerError, PrivacyError, RefusalCode, StudyError
from sequester.protocols.quantise import Codec
from sequester.protocols.session import SessionParams, Task
from sequester.protocols.signing import canonical, sha256
from sequester.protocols.study import Study, remembered, study_json

CLIP_SLACK = 1e-5
PADDING = 1024
PADDING_POOLED = 8192
SIGMA_INT_MIN, SIGMA_INT_MAX = 100, 2**24


@remembered
def study_digest(study: Study) -> str:
    """SHA-256 of the study's canonical bytes, hex."""
    return sha256(canonical(study_json(study)))


# ---- the session ----------------------------------------------------------------------------------------------------


def session_params(study: Study, epoch: int = 0) -> SessionParams:
    """The protocol session of a study, defaults of section 2 filled in from the roster's size."""
    return _session_params(study, bytes.fromhex(study_digest(study)), epoch)


def _session_params(study: Study, digest: bytes, epoch: int) -> SessionParams:
    n = len(study.sites)
    asked = study.aggregation
    c = asked.max_corrupt if asked.max_corrupt is not None else max(1, (n - 1) // 3)
    t = session.threshold(n, c)
    strict = asked.mode == "strict"
    exact = any(plan.mode == "exact" for plan in study.analyses)
    absent = asked.max_absent if asked.max_absent is not None else (0 if strict or exact else n - t)
    active = asked.min_active if asked.min_active is not None else (n if exact else t)
    params = SessionParams(
        digest, epoch, study.roster, c, active, absent, asked.ring_bits, asked.mode, asked.suite
    )  # fmt: skip
    session.check_params(params)
    if exact and (absent != 0 or active != n or not strict):
        raise StudyError(
            "an exact analysis needs strict mode, the full roster and no absence",
            hint="set aggregation.mode to strict, or make the analysis private",
            code=RefusalCode.PARAMS,
        )
    return params


def noise_adders(study: Study) -> int:
    """h = u - c for a round of the smallest active set this study allows: the shares its noise is sized for."""
    params = _session_params(study, bytes(32), 0)  # a digest of many variants takes a second, and says nothing here
    if study.privacy.mechanism == "local":
        return 1
    return min(session.noise_adders(params, n) for n in range(params.min_active, len(params.roster) + 1))


def codec(study: Study) -> Codec:
    """Fixed point of every analysis of the study."""
    return Codec(study.aggregation.ring_bits, study.aggregation.fraction_bits)


# ---- charges --------------------------------------------------------------------------------------------------------


def rounds(study: Study, plan: Plan) -> int:
    """T."""
    return analysis_of(plan).rounds(plan, study)


def spares(study: Study, plan: Plan) -> int:
    """R: attempts beyond T that are paid for; default ceil(T/5), 0 in exact mode."""
    if plan.mode == "exact":
        return 0
    return study.spare_attempts if study.spare_attempts is not None else math.ceil(rounds(study, plan) / 5)


def charges(study: Study, plan: Plan) -> int:
    """T + R: what a site reserves before it advertises a key."""
    return rounds(study, plan) + spares(study, plan)


def multiplier(plan: Plan) -> float:
    """sigma of a private plan, as signed."""
    if plan.noise_multiplier is None:
        raise StudyError(
            f"analysis {plan.name} carries no noise multiplier",
            hint="`sequester-server study sign` calibrates and signs; a study by hand is not accepted",
            code=RefusalCode.PARAMS,
        )
    return float(plan.noise_multiplier)


def events(study: Study) -> list[Event]:
    """The charges of the whole study, spare attempts included; exact analyses have none."""
    return [
        Event(plan.name, multiplier(plan), charges(study, plan), rate(plan))
        for plan in study.analyses
        if plan.mode == "private"
    ]


def rate(plan: Plan) -> float:
    """q: the Poisson sampling rate of a plan that has one, 1 else."""
    return float(plan.rate) if isinstance(plan, TrainingPlan) else 1.0


def local_steps(plan: Plan) -> int:
    """Steps with noise of their own that a hospital takes in one round: K of a training plan, 1 else.

    K Gaussian releases at sigma sqrt(K) cost what one costs at sigma, at every order: a round is one charge.
    """
    return plan.local_steps if isinstance(plan, TrainingPlan) else 1


def calibrate(study: Study) -> Study:
    """The study with every private analysis' noise multiplier filled in, rounded up: the filter admits it exactly.

    `budget` shares the RDP cap out; analyses without one share what is left equally.
    """
    private = [plan for plan in study.analyses if plan.mode == "private"]
    if not private:
        return study
    order = float(study.privacy.order)
    total = accounting.cap(float(study.privacy.epsilon), float(study.privacy.delta), order)
    given = sum((plan.budget for plan in private if plan.budget is not None), Decimal(0))
    open_ended = [plan for plan in private if plan.budget is None]
    if given > 1 or (open_ended and given >= 1):
        raise StudyError(
            f"the analyses' budget shares add up to {one_spelling(given)}",
            hint="shares of the whole: at most 1 together",
        )
    plans = []
    for plan in study.analyses:
        if plan.mode == "exact":
            plans.append(plan)
            continue
        share = plan.budget if plan.budget is not None else (1 - given) / len(open_ended)
        sigma = accounting.sigma_for(total * float(share), charges(study, plan), order, rate(plan))
        rounded = Decimal(sigma * (1 + 1e-12)).quantize(Decimal("0.000001"), ROUND_CEILING)
        plans.append(plan.model_copy(update={"noise_multiplier": rounded}))
    return study.model_copy(update={"analyses": tuple(plans)})


def check_calibrated(study: Study) -> float:
    """The study's cost at its own order; `PrivacyError` where it exceeds its own epsilon."""
    order = float(study.privacy.order)
    allowed = accounting.cap(float(study.privacy.epsilon), float(study.privacy.delta), order) if events(study) else 0.0
    spent = sum(accounting.cost(event, order) for event in events(study))
    if spent > allowed * (1 + 1e-9):
        raise PrivacyError(
            f"the analyses cost {spent:.6f} at order {order:g}, epsilon {study.privacy.epsilon} allows {allowed:.6f}",
            hint="sign the study again: `study sign` calibrates the noise",
            code=RefusalCode.BUDGET,
        )
    return spent


# ---- one contribution -----------------------------------------------------------------------------------------------


def layout(study: Study, plan: Plan, step: int) -> Layout:
    """The analysis' layout, with padding that carries noise only in private mode (spec/privacy.md, section 8)."""
    bare = analysis_of(plan).layout(plan, study, step)
    if plan.mode == "exact":
        return bare
    return replace(bare, padding=max(PADDING, math.ceil(PADDING_POOLED / rounds(study, plan))))


def clip_int(study: Study, plan: Plan, of: Layout) -> int:
    """C_int = ceil(C (1 + 1e-5) 2^b + sqrt(d)); twice that under replace-one adjacency."""
    sensitivity = analysis_of(plan).sensitivity(plan, study)
    step = float(2**study.aggregation.fraction_bits)
    bound = math.ceil(sensitivity * (1 + CLIP_SLACK) * step + math.sqrt(of.coordinates))
    return 2 * bound if study.privacy.adjacency == "replace-one" else bound


def sigma_int(study: Study, plan: Plan, of: Layout) -> int:
    """One site's share of the noise in ring units: ceil(sigma C_int sqrt(K / h)), K local steps; outside 100..2^24 is refused."""
    c_int = clip_int(study, plan, of)
    value = math.ceil(multiplier(plan) * c_int * math.sqrt(local_steps(plan) / noise_adders(study)))
    if not SIGMA_INT_MIN <= value <= SIGMA_INT_MAX:
        raise StudyError(
            f"{plan.name}: a noise share of {value} steps with {study.aggregation.fraction_bits} fraction bits, "
            f"C {analysis_of(plan).sensitivity(plan, study):g}, sigma {multiplier(plan):g}",
            hint=f"choose fraction_bits so that the share lies in {SIGMA_INT_MIN}..{SIGMA_INT_MAX}",
            code=RefusalCode.PARAMS,
        )
    return value


def padding_sd(study: Study, plan: Plan, live: int) -> float:
    """What the padding coordinates of an opened sum of `live` hospitals must show, in real units."""
    share = sigma_int(study, plan, layout(study, plan, 0)) / float(2**study.aggregation.fraction_bits)
    gain = padding_gain(plan, study) if isinstance(plan, TrainingPlan) and plan.local_steps > 1 else 1.0
    return share * gain * math.sqrt(live)


def check_headroom(study: Study) -> None:
    """`StudyError` where a sum could leave the ring: n_max C 2^b + n + 8 sd of the noise < 2^(l-1)."""
    n = len(study.sites)
    for plan in study.analyses:
        of = layout(study, plan, 0)
        step = 2**study.aggregation.fraction_bits
        if plan.mode == "private":
            reach = study.n_max * clip_int(study, plan, of) + n + 8 * math.sqrt(n) * sigma_int(study, plan, of)
            if local_steps(plan) > 1:  # what is added up is a move of weights, and moves are held in bounds
                reach = n * MOVE_BOUND * step
        else:
            reach = study.n_max * analysis_of(plan).sensitivity(plan, study) * step + n
        if reach >= 2.0 ** (codec(study).lane_bits - 1):
            raise StudyError(
                f"{plan.name}: sums may reach 2^{math.log2(reach):.1f} in words of {codec(study).lane_bits} bits",
                hint="use ring_bits 64, or fewer fraction_bits",
                code=RefusalCode.PARAMS,
            )


def task_for(study: Study, plan: Plan, step: int, attempt: int, broadcast: bytes) -> Task:
    """What every site signs for in this step: sites with other ideas of it get other masks (C6)."""
    of = layout(study, plan, step)
    if plan.mode == "private":
        clip, noise = str(clip_int(study, plan, of)), f"discrete-gaussian/{sigma_int(study, plan, of)}"
        event = f"gaussian sigma={one_spelling(plan.noise_multiplier or Decimal(0))}"
        if rate(plan) < 1.0:
            event += f" poisson q={rate(plan)!r}"
        if local_steps(plan) > 1:
            event += f" in {local_steps(plan)} local steps"
    else:
        clip, noise, event = "none", "none", "exact"
    return Task(
        bytes.fromhex(study_digest(study)), plan.name, step, attempt, bytes.fromhex(sha256(broadcast)), of.digest(),
        codec(study).describe(), clip, noise, event,
    )  # fmt: skip


def check_broadcast(study: Study, plan: Plan, step: int, broadcast: bytes) -> None:
    """`PeerError` where a broadcast is not what the analysis sends: checked before a charge, from public things only.

    Names, kinds of number and shapes are those of the step, and every number is finite. Otherwise an array of n rows would
    fit a site of n patients and no other: its answer would tell n. Private analyses keep what they have at step 0.
    """
    given = arrays.decode(broadcast)
    analysis = analysis_of(plan)
    if plan.mode == "exact" and step > 0 and isinstance(analysis, Changing):
        expected = analysis.later(plan, study, step)
    else:
        expected = [analysis.start(plan, study, _Models(study)).broadcast]
    found = {name: (a.shape, a.dtype.kind) for name, a in given.items()}
    if found not in [
        {name: (np.asarray(a).shape, np.asarray(a).dtype.kind) for name, a in e.items()} for e in expected
    ]:
        raise PeerError(
            f"the broadcast of {plan.name} has other names or shapes than the plan", hint="nothing was sent"
        )
    if not all(np.isfinite(a).all() for a in given.values()):
        raise PeerError(f"the broadcast of {plan.name} is not finite", hint="nothing was sent")


class _Models(dict[str, Finished]):
    """Stand-ins for a study's finished analyses: models of the right shapes, all zero."""

    def __init__(self, study: Study) -> None:
        super().__init__()
        p = len(study.features())
        for plan in study.analyses:
            state: State = {"w": np.zeros(p), "b": np.zeros(1)}
            if isinstance(plan, TrainingPlan) and plan.hidden:
                state = {name: np.zeros(shape) for name, shape in parameters(plan, p)}
            elif isinstance(plan, LinearPlan):
                folds = study.cohort.folds if plan.mode == "exact" else 1
                state |= {"fold_w": np.zeros((folds, p)), "fold_b": np.zeros(folds)}
            elif isinstance(plan, HeadsPlan):
                g = len(subgroups(study))
                state |= {"head_w": np.zeros((g, p)), "head_b": np.zeros(g)}
            elif isinstance(plan, StructurePlan):
                state = standardisation(study, min(plan.components, len(study.variants)))
            self[plan.name] = Finished({}, state)


# ---- what people are told -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Promise:
    """epsilon figures of a study at its delta: by the filter, by PLD with all T + R charges, and the two harsher views."""

    filter: float
    pld: float
    pld_without_spares: float
    two_copies: float
    all_others_collude: float


def promise(study: Study) -> Promise | None:
    """The figures, None for a study without private analyses."""
    charged = events(study)
    if not charged:
        return None
    delta, order = float(study.privacy.delta), float(study.privacy.order)
    spent = sum(accounting.cost(event, order) for event in charged)
    h = noise_adders(study)
    bare = [replace(e, count=e.count - spares(study, study.analysis(e.analysis))) for e in charged]
    return Promise(
        filter=accounting.epsilon_rdp(spent, delta, order),
        pld=accounting.epsilon_pld(charged, delta),
        pld_without_spares=accounting.epsilon_pld(bare, delta),
        two_copies=accounting.epsilon_pld([replace(e, sigma=e.sigma / 2) for e in charged], delta),
        all_others_collude=accounting.epsilon_pld([replace(e, sigma=e.sigma / math.sqrt(h)) for e in charged], delta),
    )
