"""The release gate: evidence that this installation keeps a study's promise, before its model may be exported.

Four checks on simulated cohorts through the code that hospitals run (contribution, noise share, quantising, sum, step),
none of which reads a patient or costs budget: what one patient can change; the moments of the noise share; the noise on
padding; and canaries, whose presence is guessed from the opened sums and the finished model, against the claimed epsilon.
What may be published of it is pass or fail (spec/privacy.md, sections 1 and 8).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sequester.client.compute.training.gradient import clipped_sum
from sequester.client.gate.contribution import moved_words, noise_share, noised_sum, ring_vector
from sequester.protocols import noise, privacy
from sequester.protocols.accounting import epsilon_pld
from sequester.protocols.analyses.analysis import Broadcast, Finished, Layout, Sums
from sequester.protocols.analyses.cohort import Block, Cohort, Part
from sequester.protocols.analyses.glm import GlmPlan
from sequester.protocols.analyses.heads import HeadsPlan
from sequester.protocols.analyses.linear import LinearPlan
from sequester.protocols.analyses.registry import Plan, analysis_of
from sequester.protocols.analyses.survival import SurvivalPlan
from sequester.protocols.analyses.training import TrainingPlan, bounded, local_round, network_score, records, scales
from sequester.protocols.errors import StudyError
from sequester.protocols.evidence import Measured, check_moments, check_padding, gdp_auc_bound, one_run_bound
from sequester.protocols.release import Form, Tried, models
from sequester.protocols.study import CohortRule, Score, Study, Variant

Vector = NDArray[np.float64]
Share = Callable[[Study, Plan, int, int], NDArray[np.int64] | None]
Tell = Callable[[str, float], None]  # what is done now, and the share of the whole that is behind

OWN_COLUMN, GENOTYPE = 0.95, 0.3  # of a canary's record: its own unused column, and its share of an ordinary genotype


@dataclass(frozen=True, slots=True)
class Size:
    """How much is simulated: patients, ordinary columns, canaries of each kind, runs, neighbour pairs, noise draws."""

    patients: int
    width: int
    own: int
    dirac: int
    runs: int
    neighbours: int
    draws: int

    def tried(self, analysis: str) -> Tried:
        """What a verdict says of it."""
        return Tried(analysis, self.patients, self.width, self.own + self.dirac, self.runs)


FULL = Size(patients=2000, width=1000, own=600, dirac=1000, runs=5, neighbours=200, draws=2_000_000)
SHORT = Size(patients=500, width=100, own=600, dirac=300, runs=3, neighbours=40, draws=500_000)
ENTRIES: dict[Form, int] = {"full": 20_000_000, "short": 2_000_000}  # of the simulated matrix: memory
WORK: dict[Form, int] = {"full": 400_000_000, "short": 40_000_000}  # entries times rounds of one training: time
FEWEST = 200


def size_for(study: Study, plan: Plan, form: Form) -> Size:
    """The plan's own n0 and number of features, as far as memory and minutes allow.

    Where the cohort is smaller than n0 nothing gets easier to pass: the noise is the plan's, and fewer patients hide a
    canary no better.
    """
    most = {"full": FULL, "short": SHORT}[form]
    if _opens_products(plan):
        most = replace(most, width=min(most.width, 20), own=60, dirac=300)
    width = max(1, min(len(study.features()), most.width))
    columns = width + most.own + most.dirac
    fits = min(ENTRIES[form], WORK[form] // (privacy.rounds(study, plan) * privacy.local_steps(plan))) // columns
    return replace(most, width=width, patients=min(study.n0, max(FEWEST, fits)))


@dataclass(frozen=True, slots=True)
class Verdict:
    """`checks` in the order they ran; `passed` is what may leave the hospital."""

    analysis: str
    claim: float
    size: Size
    checks: tuple[Measured, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def json(self) -> dict[str, Any]:
        """The verdict with its figures, for the hospital's own file."""
        rows = [
            {"check": c.name, "passed": c.passed, "figures": c.figures, "sentence": c.sentence} for c in self.checks
        ]
        size = asdict(self.size)
        return {"analysis": self.analysis, "claim": self.claim, "passed": self.passed, "size": size, "checks": rows}


def release_gate(
    study: Study, size: Size | Form = "full", share: Share = noise_share, seed: int = 0, tell: Tell = lambda *_: None
) -> tuple[Verdict, ...]:
    """One verdict for each private model of a calibrated study. `share` is the gate's own noise unless it is on trial.

    `seed` decides the simulated patients and canaries, never the noise.
    """
    plans = models(study)
    found = []
    for i, plan in enumerate(plans):
        chosen = size if isinstance(size, Size) else size_for(study, plan, size)

        def told(what: str, part: float, i: int = i, name: str = plan.name) -> None:
            tell(f"{name}: {what}", (i + part) / len(plans))

        found.append(_verdict(study, plan, chosen, share, np.random.default_rng([seed, i]), told))
    return tuple(found)


def claimed_epsilon(study: Study, plan: Plan) -> float:
    """epsilon by PLD of the plan's own rounds, spare attempts left out: the least that may be claimed for its model."""
    (event,) = (e for e in privacy.events(study) if e.analysis == plan.name)
    return epsilon_pld([replace(event, count=privacy.rounds(study, plan))], float(study.privacy.delta))


def _opens_products(plan: Plan) -> bool:
    """True where the sums hold a product of every two columns, so that a plan has few columns."""
    return isinstance(plan, LinearPlan | HeadsPlan) or (isinstance(plan, GlmPlan) and plan.solver == "newton")


def _verdict(study: Study, plan: Plan, size: Size, share: Share, rng: np.random.Generator, tell: Tell) -> Verdict:
    claim = claimed_epsilon(study, plan)
    tell("what one patient changes", 0.0)
    moved = sensitivity(study, plan, size.width, size.neighbours, rng)
    tell("the noise", 0.05)
    sigma = privacy.sigma_int(study, plan, privacy.layout(study, plan, 0))
    draws = noise.discrete_gaussian(sigma, size.draws, noise.aes_stream(os.urandom(32), os.urandom(16)))
    moments = check_moments(draws, sigma)
    runs = []
    for run in range(size.runs):
        tell(f"canaries, training {run + 1} of {size.runs}", 0.1 + 0.9 * run / size.runs)
        runs.append(canary_run(study, plan, size, share, rng))
    sd = privacy.padding_sd(*_audit_study(study, plan, size.width + size.own + size.dirac), len(study.sites))
    padding = check_padding([p for run in runs for p in run.padding], sd)
    return Verdict(plan.name, claim, size, (moved, moments, padding, *audit(runs, claim, float(study.privacy.delta))))


# ---- what one patient changes ---------------------------------------------------------------------------------------


def sensitivity(study: Study, plan: Plan, width: int, pairs: int, rng: np.random.Generator) -> Measured:
    """Neighbouring simulated cohorts, ordinary and extreme: the integers of the contribution move by at most C_int."""
    study, plan = _audit_study(study, plan, width)
    analysis, layout, codec = analysis_of(plan), privacy.layout(study, plan, 0), privacy.codec(study)
    first = analysis.start(plan, study, _earlier(plan, study)).broadcast
    bound, worst = privacy.clip_int(study, plan, layout), 0.0
    if isinstance(plan, TrainingPlan) and plan.rate < 1:
        plan = plan.model_copy(update={"rate": Decimal(1)})  # the same patients on both sides of the pair
    for i in range(pairs):
        n = int(rng.integers(1, 400))
        x, (y, event) = rng.standard_normal((n, width)), _outcome(plan, study, (rng.random(n) < 0.3).astype(np.float64))
        odd = (0, n // 2, n - 1)[i % 3]
        x[odd] *= (1.0, 1e4, 1e25, 0.0)[i % 4]
        y[odd], event[odd] = (1.0, 1e6)[i % 2], 1.0
        at = {k: w + (0.0, 1.0, 1e6)[i % 3] * rng.standard_normal(w.shape) for k, w in first.items()}
        rows = np.arange(n) != odd
        pair = [
            codec.encode(layout.flatten(analysis.contribution(plan, study, cohort, at, 0)))
            for cohort in (_cohort(plan, study, x, y, event), _cohort(plan, study, x[rows], y[rows], event[rows]))
        ]
        worst = max(worst, float(np.linalg.norm((pair[0] - pair[1]).astype(np.float64))))
    return Measured(
        "sensitivity", worst <= bound, {"worst": worst, "bound": bound, "pairs": pairs},
        f"one patient moved the integers by at most {worst:.0f} of {bound} allowed, over {pairs} pairs",
    )  # fmt: skip


# ---- canaries -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """One simulated training: scores of both kinds of canary, which were in, and the padding of every opened sum."""

    own: Vector
    own_in: NDArray[np.bool_]
    dirac: Vector
    dirac_in: NDArray[np.bool_]
    padding: tuple[Vector, ...]


def audit(runs: list[Run], claim: float, delta: float) -> tuple[Measured, Measured]:
    """Medians of the lower bounds against the claim: the model with own-column canaries, the sums with Dirac canaries."""
    model = [max(one_run_bound(r.own, r.own_in, delta), gdp_auc_bound(r.own, r.own_in, delta)) for r in runs]
    sums = [one_run_bound(r.dirac, r.dirac_in, delta) for r in runs]
    found = []
    for name, bounds, what in (("canaries", model, "the model"), ("white_box", sums, "the opened sums")):
        median = float(np.median(bounds))
        sentence = f"epsilon of {what} is at least {median:.2f} (median of {len(runs)} runs), claimed {claim:.2f}"
        found.append(Measured(name, median <= claim, {"bounds": bounds, "median": median, "claim": claim}, sentence))
    return found[0], found[1]


def canary_run(study: Study, plan: Plan, size: Size, share: Share, rng: np.random.Generator) -> Run:
    """Train the plan's model on simulated patients with canaries, each in with probability 1/2, and score them all."""
    of, plan = _audit_study(study, plan, size.width + size.own + size.dirac)
    width, scale = size.width, _scales(plan, of)
    x, y = _patients(rng, size.patients, size.width)
    people = np.column_stack([x, np.zeros((len(x), size.own + size.dirac))])
    canaries = np.zeros((size.own + size.dirac, people.shape[1]))
    canaries[: size.own, :width] = GENOTYPE * _patients(rng, size.own, width)[0]
    own = np.arange(len(canaries))
    canaries[own, width + own] = np.where(own < size.own, OWN_COLUMN, _reach(plan)) / scale[width:]
    label = rng.integers(0, 2, len(canaries)).astype(np.float64)
    label[size.own :] = _heavier(plan)
    is_in = rng.random(len(canaries)) < 0.5
    rows, (outcome, event) = np.vstack([people, canaries[is_in]]), _outcome(plan, of, np.append(y, label[is_in]))
    where = rng.integers(0, len(of.sites), len(rows))
    cohorts = [_cohort(plan, of, rows[at], outcome[at], event[at]) for at in (where == i for i in range(len(of.sites)))]
    finished, opened, padding = _train(of, plan, cohorts, share)
    towards = np.where(label > 0.5, 1.0, -1.0)
    without = canaries.copy()
    without[own, width + own] = 0.0
    moved = (_logit(plan, of, finished, canaries) - _logit(plan, of, finished, without)) * towards
    seen = -opened[width:] * towards
    k = size.own
    return Run(moved[:k], is_in[:k], seen[k:], is_in[k:], tuple(padding))


def _train(of: Study, plan: Plan, cohorts: list[Cohort], share: Share) -> tuple[Finished, Vector, list[Vector]]:
    """The plan's rounds through the gate's own path: the model, each column's sum over the rounds, the padding."""
    analysis, codec = analysis_of(plan), privacy.codec(of)
    following, padding = analysis.start(plan, of, _earlier(plan, of)), []
    columns = np.zeros(len(of.features()))
    for step in range(privacy.rounds(of, plan)):
        layout = privacy.layout(of, plan, step)
        words = [_words(of, plan, layout, cohort, following.broadcast, step, share) for cohort in cohorts]
        total = words[0].copy()
        for other in words[1:]:
            total += other  # wraps in the ring, as masked sums do
        opened = codec.values_of(total, layout.length)
        padding.append(opened[layout.coordinates :])
        sums = layout.split(opened)
        columns += _columns(plan, sums, len(columns))
        outcome = analysis.combine(plan, of, following.state, sums, step)
        if isinstance(outcome, Finished):
            return outcome, columns, padding
        following = outcome
    raise AssertionError("a model ends with its last round")


def _words(
    of: Study, plan: Plan, layout: Layout, cohort: Cohort, broadcast: Broadcast, step: int, share: Share
) -> NDArray[Any]:
    analysis, adders = analysis_of(plan), privacy.noise_adders(of)
    if not isinstance(plan, TrainingPlan) or plan.local_steps == 1:
        sums = analysis.contribution(plan, of, cohort, broadcast, step)
        return ring_vector(of, plan, layout, sums, share(of, plan, step, adders))
    walk = local_round(plan, of, layout, broadcast)
    weights = next(walk)
    while True:
        sums = analysis.contribution(plan, of, cohort, weights, step)
        try:
            weights = walk.send(noised_sum(of, plan, layout, sums, share(of, plan, step, adders)))
        except StopIteration as over:
            return moved_words(of, plan, layout, over.value)


def _columns(plan: Plan, sums: Sums, features: int) -> Vector:
    """What an opened sum says about each column, as a gradient does: low where canaries of label 1 are in."""
    if isinstance(plan, LinearPlan):
        upper = np.zeros((features + 1, features + 1))
        upper[np.triu_indices(features + 1)] = sums["xx"][0]
        return -np.diag(upper)[1:]  # a square is there whatever the label
    if isinstance(plan, HeadsPlan):
        return -sums["score"][0, 1 : 1 + features]  # the intercept stands before them, the pooled predictor after them
    if not isinstance(plan, TrainingPlan):
        # a score points against a gradient; with products its first place is the intercept's
        return sums["gradient"] if "gradient" in sums else -sums["score"][-features:]
    if not plan.hidden:
        sign = -1.0 if plan.local_steps > 1 else 1.0  # a move goes against the gradient
        return sign * sums["head.weight"][0, :features]
    units = sums["hidden.weight"]  # (units, features): the sign of a unit's weight is not known to a canary
    strength: Vector = np.sign(units.sum(axis=0)) * np.sqrt((units**2).sum(axis=0))
    return strength


def _logit(plan: Plan, of: Study, finished: Finished, x: Vector) -> Vector:
    if isinstance(plan, TrainingPlan) and plan.hidden:
        return network_score(bounded(finished.state), records(plan, of, x))
    w = finished.state["head_w"][0] if isinstance(plan, HeadsPlan) else finished.state["w"]
    return np.asarray(x @ w, dtype=np.float64)


def _heavier(plan: Plan) -> float:
    """The label whose canary is clipped at C, as much as a patient can weigh: the rarer outcome, the whole follow-up."""
    if isinstance(plan, SurvivalPlan):
        return 0.0
    return 1.0 if float(getattr(plan, "prevalence", 0.5)) <= 0.5 else 0.0


def _reach(plan: Plan) -> float:
    """How far a record's own column may reach: in a linear model the bound on its norm, the intercept's 1 taken out."""
    if isinstance(plan, HeadsPlan):
        return float(plan.record_norm)
    return float(np.sqrt(float(plan.record_norm) ** 2 - 1)) if isinstance(plan, LinearPlan) else 1.0


def _scales(plan: Plan, of: Study) -> Vector:
    if isinstance(plan, TrainingPlan):
        return scales(plan, of)
    p = len(of.features())
    if isinstance(plan, HeadsPlan):
        return np.full(p, (p + 1) ** -0.5)
    return np.full(p, p**-0.5 if plan.kind == "prs" or getattr(plan, "over_sqrt_p", False) else 1.0)


def _outcome(plan: Plan, of: Study, label: Vector) -> tuple[Vector, Vector]:
    """(y, event) of labels 0 and 1 as the plan's analysis reads them: an event early, or followed to the end without."""
    if isinstance(plan, SurvivalPlan):
        upper = float(of.phenotype.upper or 1)
        return np.where(label > 0.5, upper / plan.bins / 2, upper), label.copy()
    return (2 * label - 1 if isinstance(plan, LinearPlan) else label.copy()), np.zeros(len(label))


def _audit_study(study: Study, plan: Plan, columns: int) -> tuple[Study, Plan]:
    """The same sites, privacy and plan over so many made-up variants; it is run here and never signed."""
    if plan not in models(study):
        raise StudyError(f"analysis {plan.name} leaves no private model", hint="the release gate is about those alone")
    if isinstance(plan, HeadsPlan):  # one group's head over so many scores, of a pooled model that weighs nothing
        scores = tuple(Score(name=f"v{j}", weights=(), mean=Decimal(0), sd=Decimal(1)) for j in range(columns))
        plan = plan.model_copy(update={"part": "all"})
        one = CohortRule(subgroup="group", subgroup_values=("one",))
        parts = {"variants": (), "covariates": (), "scores": scores, "cohort": one}
        return study.model_copy(update=parts | {"analyses": (study.analysis(plan.of), plan)}), plan
    variants = tuple(
        Variant(id=f"v{j}", chromosome="1", position=1 + j, effect="A", other="G", frequency=Decimal("0.3"))
        for j in range(columns)
    )
    whole = {"part": "all"} | ({"features": "all"} if hasattr(plan, "features") else {})
    plan = plan.model_copy(update=whole | ({"leave_out": ()} if hasattr(plan, "leave_out") else {}))
    of = study.model_copy(
        update={"variants": variants, "covariates": (), "scores": (), "cohort": CohortRule(), "analyses": (plan,)}
    )
    return of, plan


def _earlier(plan: Plan, of: Study) -> dict[str, Finished]:
    """What the plan's analysis is of: heads are of a model, here one that weighs nothing."""
    if not isinstance(plan, HeadsPlan):
        return {}
    return {plan.of: Finished({}, {"w": np.zeros(len(of.features())), "b": np.zeros(1)})}


def _patients(rng: np.random.Generator, n: int, p: int) -> tuple[Vector, Vector]:
    """Standardised dosages of independent variants and an outcome of which a hundredth of them know something."""
    frequency = rng.uniform(0.05, 0.5, p)
    x = (rng.binomial(2, frequency, (n, p)) - 2 * frequency) / np.sqrt(2 * frequency * (1 - frequency))
    effect = np.where(np.arange(p) < max(1, p // 100), 1.0, 0.0)
    liability = x @ effect / np.sqrt(max(effect.sum(), 1.0)) + rng.standard_normal(n)
    return x, (liability > 0.8).astype(np.float64)


@dataclass(frozen=True, slots=True)
class _Rows:
    study: Study
    x: Vector
    y: Vector
    event: Vector | None

    def blocks(self, part: Part) -> Iterator[Block]:
        zeros = np.zeros(len(self.y), dtype=np.int64)
        yield Block(self.x, self.y, zeros, zeros, self.event)

    def gradient(self, plan: TrainingPlan, weights: Mapping[str, Vector]) -> dict[str, Vector]:
        return clipped_sum(plan, self.study, self.blocks(plan.part), weights, os.urandom)


def _cohort(plan: Plan, study: Study, x: Vector, y: Vector, event: Vector) -> Cohort:
    # models read blocks and gradients, and nothing else of a cohort
    return cast(Cohort, _Rows(study, x, y, event if isinstance(plan, SurvivalPlan) else None))
