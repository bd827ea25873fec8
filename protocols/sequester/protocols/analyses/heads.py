"""A risk model's head for each ancestry: what its patients change in the pooled model, held near it by a public prior.

A patient's predictor is z = pooled + x'delta_g. x: 1, the published scores (or all of the table), and the pooled predictor
over its public standard deviation, so that a group may weigh the whole model more or less without changing its order.
delta_g is normal around 0: a group with few patients keeps the pooled model. So does `other`: whoever is in it is not one
population, and the next hospital's `other` is another. Nothing is opened of it.

Exact: the penalised maximum, by Newton in a few columns for all groups at once. Private: noisy information and score of each
group, one sensitivity for all of them, since a patient is in one group's block only (parallel composition); then the
posterior mean of `pooling.py`, which counts the noise and has one intercept and multiplier in common. `other` gets these two:
they leave its order, and people of different groups stay comparable. Later rounds are linearised where the earlier ones
ended, and averaged with them. Neither form has standard errors: those of a penalised estimate are no confidence intervals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from sequester.protocols.analyses import exact_glm
from sequester.protocols.analyses.analysis import Broadcast, Finished, Layout, Next, State, Sums
from sequester.protocols.analyses.cohort import Block, Cohort, Part, Result
from sequester.protocols.analyses.counts import noise_sd
from sequester.protocols.analyses.glm import MAX_NEWTON_COLUMNS, GlmPlan
from sequester.protocols.analyses.newton import inverse, symmetric
from sequester.protocols.analyses.plan import AnalysisPlan, Number
from sequester.protocols.analyses.pooling import posterior
from sequester.protocols.analyses.training import TrainingPlan
from sequester.protocols.analyses.weights import mean_of, predictor, private_rows, score_sd, weights_result

if TYPE_CHECKING:
    from sequester.protocols.study import Feature, Study

Vector = NDArray[np.float64]
ROUNDS = {"exact": 30, "private": 3}
UNIT = 4.0  # private sums are sent divided by it: so they fit a ring that a study's gradients, clipped at 0.6, fit
WIDER = 5.0  # of intercept and multiplier: they rank nobody within a group
FARTHEST = 50.0  # standard deviations of the pooled predictor: beyond it is a broadcast, not a genome
MAX_EXACT_COLUMNS = 200  # every pair of them in every group


class HeadsPlan(AnalysisPlan):
    """`of` names an earlier model with weights; `columns` what a head may re-weigh beside the intercept.

    `prior_sd`: standard deviation of a column's change, per standard deviation of the column, in log odds, or in residual
    standard deviations of a quantity; intercept and multiplier, which rank nobody within a group, may move five times as far.
    The default was measured: at 10,000 patients, a twentieth of them in a group, it costs no group more than 0.005 of AUC
    where groups do not differ (`tests/oracles/test_heads.py`). `rounds` None: 30 in exact mode, which stops when it has
    converged, 3 in private mode. `record_norm` bounds a record's columns, divided by the square root of their number, in
    private mode.
    """

    kind: Literal["heads"] = "heads"
    of: str
    columns: Literal["scores", "table"] = "scores"
    part: Part = "train"
    prior_sd: Number = Decimal("0.1")
    rounds: int | None = Field(default=None, ge=1, le=100)
    record_norm: Number = Decimal("1.5")


class Heads:
    """See the module."""

    kind = "heads"

    def rounds(self, plan: HeadsPlan, study: Study) -> int:
        return plan.rounds if plan.rounds is not None else ROUNDS[plan.mode]

    def layout(self, plan: HeadsPlan, study: Study, step: int) -> Layout:
        g, d = len(study.cohort.subgroup_values), columns(plan, study)
        sums = (("information", (g, d * (d + 1) // 2)), ("score", (g, d)))
        if plan.mode == "exact":
            return Layout((*sums, ("log_likelihood", (g, 1)), ("people", (g, 3))))
        return Layout(sums if family(study) == "logistic" else (*sums, ("squares", (g, 1))))

    def sensitivity(self, plan: HeadsPlan, study: Study) -> float:
        if plan.mode == "exact":
            return FARTHEST**2  # head-room only: nothing is clipped
        b2 = 1 + float(plan.record_norm) ** 2  # the intercept's 1 and the clipped columns
        if family(study) == "logistic":  # weights of at most 1/4, residuals of at most 1
            return float(np.sqrt(b2**2 / 16 + b2)) / UNIT
        return float(np.sqrt(b2**2 + b2 + 1)) / UNIT

    def is_iterative(self, plan: HeadsPlan, study: Study) -> bool:
        return True

    def start(self, plan: HeadsPlan, study: Study, earlier: Mapping[str, Finished]) -> Next:
        pooled, g, d = earlier[plan.of].state, len(study.cohort.subgroup_values), columns(plan, study)
        state: State = {"w": pooled["w"], "b": pooled["b"]}
        if plan.mode == "exact":
            state |= exact_glm.packed([exact_glm.fresh(np.zeros(d), False) for _ in range(g)])
        else:
            state |= {"deltas": np.zeros((g, d)), "moment": np.zeros((g, d)), "squares": np.zeros((g, 1))}
            state["information"] = np.zeros((g, d * (d + 1) // 2))
        return Next(state, _to_all(state))

    def contribution(self, plan: HeadsPlan, study: Study, cohort: Cohort, broadcast: Broadcast, step: int) -> Sums:
        w, b = np.asarray(broadcast["w"], dtype=np.float64), float(broadcast["b"][0])
        deltas = np.asarray(broadcast["deltas"], dtype=np.float64)
        sums = {name: np.zeros(shape) for name, shape in self.layout(plan, study, step).fields}
        upper = np.triu_indices(columns(plan, study))
        add = self._exact if plan.mode == "exact" else self._private
        for block in cohort.blocks(plan.part):
            x, z = design(plan, study, block, w), predictor(block.x, w, b)
            for g in range(len(deltas)):  # `other` is the last stratum, and has no head
                rows = block.strata == g
                of = {name: sums[name][g] for name in sums}
                add(plan, study, x[rows], block.y[rows], z[rows], deltas[g], upper, of)
        return sums if plan.mode == "exact" else {name: total / UNIT for name, total in sums.items()}

    def _exact(
        self, plan: HeadsPlan, study: Study, x: Vector, y: Vector, z: Vector, delta: Vector, upper: Any, of: Sums
    ) -> None:
        ones = np.column_stack([np.ones(len(y)), x])  # (rows, d)
        information, score, value = exact_glm.moments(family(study), ones, y, z + predictor(x, delta[1:], delta[0]))
        of["information"] += information[upper]
        of["score"] += score
        of["log_likelihood"] += value
        of["people"] += [len(y), y.sum(), y @ y]

    def _private(
        self, plan: HeadsPlan, study: Study, x: Vector, y: Vector, z: Vector, delta: Vector, upper: Any, of: Sums
    ) -> None:
        rows, scale = private_rows(x, True, float(plan.record_norm))
        ones = np.column_stack([np.ones(len(y)), rows])  # (rows, d), norm at most sqrt(1 + record_norm^2)
        mu = mean_of(family(study), z + predictor(rows / scale, delta[1:], delta[0]))
        r = np.clip(np.clip(y, 0.0, 1.0) - mu if family(study) == "logistic" else y - mu, -1.0, 1.0)
        weight = mu * (1 - mu) if family(study) == "logistic" else np.ones(len(y))
        of["information"] += (ones.T @ (ones * weight[:, None]))[upper]
        of["score"] += ones.T @ r
        if "squares" in of:
            of["squares"] += r @ r

    def combine(self, plan: HeadsPlan, study: Study, state: State, sums: Sums, step: int) -> Next | Finished:
        last = step + 1 >= self.rounds(plan, study)
        return (self._step if plan.mode == "exact" else self._average)(plan, study, state, sums, step, last)

    def _step(self, plan: HeadsPlan, study: Study, state: State, sums: Sums, step: int, last: bool) -> Next | Finished:
        prior = 1 / variances(plan, study)
        fits = []
        for g, fit in enumerate(exact_glm.unpacked(state)):
            if not fit["done"][0]:
                mine = {name: sums[name][g] for name in ("information", "score", "log_likelihood")}
                fit = {**fit, "people": sums["people"][g]}
                fit = exact_glm.progressed(fit, mine, family(study), "never", study, last, prior)
            fits.append(fit)
        new = {**state, **exact_glm.packed(fits)}
        if not last and not all(fit["done"][0] for fit in fits):
            return Next(new, _to_all(new))
        every = np.ones(len(prior), dtype=bool)
        weights = [1 - float((inverse(fit["information"], every).diagonal() * prior).mean()) for fit in fits]
        people = np.array([fit["people"] for fit in fits])
        converged = all(bool(fit["converged"][0]) for fit in fits)
        return _finished(plan, study, state, [fit["beta"] for fit in fits], weights, people, converged=converged)

    def _average(
        self, plan: HeadsPlan, study: Study, state: State, sums: Sums, step: int, last: bool
    ) -> Next | Finished:
        d, t, noise = columns(plan, study), step + 1, noise_sd(plan, study) * UNIT
        sums = {name: total * UNIT for name, total in sums.items()}
        scale = np.append(1.0, np.full(d - 1, (d - 1) ** -0.5))  # of the columns in the sums
        prior = variances(plan, study) / scale**2
        moment = sums["score"] + [
            symmetric(i, d) @ (delta / scale) for i, delta in zip(sums["information"], state["deltas"], strict=True)
        ]
        total = {"information": sums["information"], "moment": moment}
        total |= {"squares": sums["squares"]} if "squares" in sums else {}
        new: State = {**state, **{name: state[name] + more for name, more in total.items()}}
        informations = [symmetric(information / t, d) for information in new["information"]]
        noises = [noise * t**-0.5 for _ in informations]
        if "squares" in sums:  # in units of the residuals' standard deviation, of all groups together
            squares, people = new["squares"].sum() / t, sum(of[0, 0] for of in informations)
            noises = [n / float(np.sqrt(np.clip(squares / max(people, 1.0), 1e-4, 1.0))) for n in noises]
        found, common = posterior(informations, list(new["moment"] / t), prior, noises[0])
        new["deltas"] = np.array([delta * scale for delta, _ in found])
        if not last:
            return Next(new, _to_all(new))
        weights = [weight for _, weight in found]
        return _finished(plan, study, state, list(new["deltas"]), weights, None, rest=common * scale)


def family(study: Study) -> str:
    """Of the outcome: the models that heads are of have no other."""
    return "logistic" if study.phenotype.kind == "binary" else "linear"


def reweighed(plan: HeadsPlan, study: Study) -> list[tuple[int, Feature]]:
    """Place and feature of each column of the table that a head re-weighs."""
    table = study.table_features()
    return [(j, f) for j, f in enumerate(table) if plan.columns == "table" or f.kind == "score"]


def columns(plan: HeadsPlan, study: Study) -> int:
    """d: intercept, re-weighed columns, multiplier of the pooled predictor."""
    return len(reweighed(plan, study)) + 2


def variances(plan: HeadsPlan, study: Study) -> Vector:
    """Of the prior, (d,)."""
    wider = np.ones(columns(plan, study))
    wider[[0, -1]] = WIDER
    return np.square(float(plan.prior_sd) * wider)


def design(plan: HeadsPlan, study: Study, block: Block, w: Vector) -> Vector:
    """A head's columns without the intercept, (rows, d - 1); `w` are the pooled weights."""
    x = block.x[:, [j for j, _ in reweighed(plan, study)]]
    pooled = np.clip(predictor(block.x, w, 0.0) / score_sd(w), -FARTHEST, FARTHEST)
    return np.column_stack([x, pooled])


def weights_of(plan: HeadsPlan, study: Study, w: Vector, b: float, delta: Vector) -> tuple[Vector, float]:
    """A head's weights over all of the study's features (features,) and its intercept."""
    times, table = multiplier(plan, study, w, delta), reweighed(plan, study)
    new = w * times
    new[[j for j, _ in table]] += delta[1 : 1 + len(table)]
    return new, b + float(delta[0])


def multiplier(plan: HeadsPlan, study: Study, w: Vector, delta: Vector) -> float:
    """By how much a head multiplies the pooled weights."""
    return 1 + float(delta[-1]) / score_sd(w)


def _to_all(state: State) -> Broadcast:
    return {"w": state["w"], "b": state["b"], "deltas": state["f.beta"] if "f.beta" in state else state["deltas"]}


def _finished(
    plan: HeadsPlan, study: Study, state: State, deltas: list[Vector], weights: list[float], people: Vector | None,
    rest: Vector | None = None, **more: Any,
) -> Finished:  # fmt: skip
    """What is printed, and for later analyses the pooled model with one of each stratum.

    `people` (groups, 3) in exact mode; `rest` is the change of everybody else, where there is one.
    """
    names, floor = study.cohort.subgroup_values, study.publication_floor
    w, b = np.asarray(state["w"], dtype=np.float64), float(state["b"][0])

    def measure(g: int) -> Result:
        if people is not None:
            n, cases = float(people[g, 0]), float(people[g, 1])
            # no count is printed, and weights add up to nothing that is: no second group has to be hidden with a small one
            if (min(cases, n - cases) if family(study) == "logistic" else n) < floor - 0.5:
                return {"suppressed": f"<{floor}"}
        return _row(plan, study, w, b, deltas[g]) | {"data_weight": weights[g]}

    groups = {name: measure(g) for g, name in enumerate(names)}
    own = [weights_of(plan, study, w, b, deltas[g]) for g in range(len(names))]
    # who is not shown, and `other`, keep the pooled model
    kept = [own[g] if "suppressed" not in groups[name] else (w, b) for g, name in enumerate(names)] + [(w, b)]
    if rest is not None:
        groups["other"] = _row(plan, study, w, b, rest) | {"data_weight": 0.0}
        kept[-1] = weights_of(plan, study, w, b, rest)
    heads: State = {"head_w": np.array([row for row, _ in kept]), "head_b": np.array([at for _, at in kept])}
    result: Result = {"of": plan.of, "prior_sd": float(plan.prior_sd), "groups": groups} | more
    return Finished(result, {"w": state["w"], "b": state["b"], **heads})


def _row(plan: HeadsPlan, study: Study, w: Vector, b: float, delta: Vector) -> Result:
    """One head: weights of the table, the multiplier of the variants, and how far it moved from the pooled model."""
    own, at = weights_of(plan, study, w, b, delta)
    whole = weights_result(study.features(), own, at)
    rows = whole["weights"][: len(study.table_features())]
    for row, change in zip(rows, own - w, strict=False):
        row["moved"] = float(change)
    found: Result = {"intercept": at, "intercept_raw": whole["intercept_raw"], "weights": rows}
    found["pooled_times"] = multiplier(plan, study, w, delta)
    return found | {"intercept_moved": float(delta[0]), "moved": float(np.linalg.norm(delta[1:]))}


def consent(plan: HeadsPlan, study: Study) -> str:
    """The line an approver reads: what this opens about groups."""
    return (
        f"It opens sums for each group of `{study.cohort.subgroup}` ({', '.join(study.cohort.subgroup_values)}) apart, not "
        "only over everybody: where hospitals have few patients of a group, its sums are those of few. A group's head is "
        f"printed from {study.publication_floor} patients of the rarer outcome on; the exchange sees all sums."
    )


def faults(study: Study, plan: HeadsPlan, earlier: Mapping[str, Any]) -> Iterator[str]:
    """What a plan says against its study."""
    if study.cohort.subgroup is None:
        yield f"analysis {plan.name}: heads are by group; the study names no `cohort.subgroup` and `subgroup_values`"
    of = earlier.get(plan.of)
    weighted = of is not None and of.kind in ("glm", "linear", "training", "penalised", "prs")
    if not weighted or (isinstance(of, TrainingPlan) and of.hidden):
        yield f"analysis {plan.name} is of `{plan.of}`, which is no model with weights before it"
        return
    if isinstance(of, GlmPlan) and of.family == "poisson":
        yield f"analysis {plan.name}: heads of a Poisson model; a logistic or linear one was expected"
    if plan.prior_sd <= 0 or plan.record_norm <= 0:
        yield f"analysis {plan.name}: prior_sd and record_norm are above 0"
    d = columns(plan, study)
    most = MAX_NEWTON_COLUMNS if plan.mode == "private" else MAX_EXACT_COLUMNS
    if d > most:
        yield (
            f"analysis {plan.name}: every pair of {d} columns would be summed for each group; at most {most} were "
            f"expected in {plan.mode} mode"
        )


HEADS = Heads()
