"""What a study will cost, said before anybody spends anything: sizes, noise, epsilon, absences, and whether it is worth it.

The planning rule (spec/privacy.md, section 5): private weights cost less than 0.01 of AUC while features <= n0 epsilon / 300
and more than 0.03 from about n0 epsilon / 30; between the two a study is warned, beyond them refused. Epsilon is what PLD
reports for the model's own charges. Everything follows from the study alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sequester.protocols import accounting, privacy, session
from sequester.protocols.analyses import heads
from sequester.protocols.analyses.cohort import chosen
from sequester.protocols.analyses.evaluation import EvaluationPlan, group_shares, verified
from sequester.protocols.analyses.registry import Plan, leaves_a_model
from sequester.protocols.errors import PrivacyError, RefusalCode
from sequester.protocols.profiles import profile_of
from sequester.protocols.study import Study

FREE, USELESS = 300, 30
# AUC lost to privacy, from and to, against the same features pooled and fitted without noise
LOSSES = {"good": (0.0, 0.01), "noisy": (0.01, 0.03), "refused": (0.03, 0.5)}


@dataclass(frozen=True, slots=True)
class Utility:
    """What privacy costs one model: `verdict` is `good`, `noisy` or `refused`, `loss` the AUC it may lose, from and to."""

    analysis: str
    features: int
    epsilon: float
    verdict: str
    loss: tuple[float, float]


@dataclass(frozen=True, slots=True)
class AnalysisForecast:
    """One analysis: rounds T and spares R, numbers and bytes of its largest round and of all, noise in real units."""

    name: str
    kind: str
    mode: str
    rounds: int
    spares: int
    coordinates: int
    padding: int
    bytes_a_round: int
    bytes_in_all: int
    noise_multiplier: float | None
    noise_sd_of_sum: float | None


@dataclass(frozen=True, slots=True)
class Forecast:
    """The whole study; `verdict` is that of its most costly private model, None without private models.

    `profile`: the named profile whose numbers the study has, None for numbers of its own.
    """

    digest: str
    sites: int
    mode: str
    colluders: int
    absent: int
    honest_adders: int
    analyses: tuple[AnalysisForecast, ...]
    bytes_a_site: int
    profile: str | None
    promise: privacy.Promise | None
    utility: tuple[Utility, ...]
    features: int
    verdict: str | None
    advice: tuple[str, ...]


def forecast(study: Study) -> Forecast:
    """The figures of a study; noise is calibrated first where it is not. Raises what a hospital would refuse for."""
    study = privacy.calibrate(study)
    params = privacy.session_params(study)
    privacy.check_calibrated(study)
    privacy.check_headroom(study)
    rows = tuple(_analysis(study, plan) for plan in study.analyses)
    models = utilities(study)
    worst = max(models, key=lambda model: list(LOSSES).index(model.verdict), default=None)
    return Forecast(
        digest=privacy.study_digest(study),
        sites=len(study.sites),
        mode=params.mode,
        colluders=params.max_corrupt,
        absent=params.max_absent,
        honest_adders=privacy.noise_adders(study),
        analyses=rows,
        bytes_a_site=sum(row.bytes_in_all for row in rows),
        profile=profile_of(study.privacy),
        promise=privacy.promise(study),
        utility=models,
        features=max((model.features for model in models), default=0),
        verdict=worst.verdict if worst else None,
        advice=_advice(study, models),
    )


def utilities(study: Study) -> tuple[Utility, ...]:
    """The planning rule for each private model of a study."""
    study = privacy.calibrate(study)
    models = [plan for plan in study.analyses if plan.mode == "private" and leaves_a_model(plan)]
    return tuple(_utility(study, plan) for plan in models)


def _utility(study: Study, plan: Plan) -> Utility:
    d = len(chosen(study, getattr(plan, "features", "all"), getattr(plan, "leave_out", ())))
    if isinstance(plan, heads.HeadsPlan):
        d = heads.columns(plan, study) * len(study.cohort.subgroup_values)
    charged = [event for event in privacy.events(study) if event.analysis == plan.name]
    epsilon = accounting.epsilon_pld(charged, float(study.privacy.delta))
    reach = study.n0 * epsilon
    if study.privacy.mechanism == "local":
        reach /= len(study.sites) ** 0.5  # the whole noise at each hospital: sqrt(S) times as much on their sum
    verdict = "good" if d <= reach / FREE else "noisy" if d <= reach / USELESS else "refused"
    return Utility(plan.name, d, epsilon, verdict, LOSSES[verdict])


def require_worth(study: Study) -> None:
    """`PrivacyError` for a study that would spend patients' budget and learn nothing."""
    for model in utilities(study):
        if model.verdict == "refused":
            raise PrivacyError(
                f"{model.analysis}: {model.features} features at n0 {study.n0} and epsilon {model.epsilon:.2f} are beyond "
                f"n0 epsilon / {USELESS}: private weights would be noise",
                hint="use fewer features (a published score counts as one), more patients, a larger budget share, or the "
                "exact mode's consent",
                code=RefusalCode.BUDGET,
            )


def _analysis(study: Study, plan: Plan) -> AnalysisForecast:
    rounds, spares = privacy.rounds(study, plan), privacy.spares(study, plan)
    layouts = [privacy.layout(study, plan, step) for step in range(rounds)]  # a scan's rounds differ in size
    layout = max(layouts, key=lambda of: of.length)
    sizes = [privacy.codec(study).words(of.length) * study.aggregation.ring_bits // 8 for of in layouts]
    private = plan.mode == "private"
    step = 2.0**study.aggregation.fraction_bits
    sd = privacy.sigma_int(study, plan, layout) * len(study.sites) ** 0.5 / step if private else None
    return AnalysisForecast(
        name=plan.name,
        kind=plan.kind,
        mode=plan.mode,
        rounds=rounds,
        spares=spares,
        coordinates=layout.coordinates,
        padding=layout.padding,
        bytes_a_round=max(sizes),
        bytes_in_all=sum(sizes) + spares * max(sizes),
        noise_multiplier=privacy.multiplier(plan) if private else None,
        noise_sd_of_sum=sd,
    )


def _advice(study: Study, models: tuple[Utility, ...]) -> tuple[str, ...]:
    said = []
    n = len(study.sites)
    params = privacy.session_params(study)
    if n <= 4 and params.mode != "strict":
        said.append(f"{n} hospitals: mode strict needs less noise and one trip a round; double pays off from five on")
    if params.mode == "strict":
        said.append("strict: a hospital that is away stops the round; nobody's masks are opened for it")
    else:
        least = min(session.floor(params, active) for active in range(params.min_active, n + 1))
        said.append(f"double: a round counts with {least} hospitals or more")
    for model in models:
        if model.verdict == "noisy":
            said.append(
                f"{model.analysis}: {model.features} features are more than n0 epsilon / {FREE}: expect a visible loss; "
                "rehearse the study"
            )
    said += _intervals(study)
    if any(plan.mode == "exact" for plan in study.analyses):
        said.append("exact analyses: every hospital's policy must name them, and the life epsilon of its data ends")
    return tuple(said)


def _intervals(study: Study) -> Iterator[str]:
    """Whether each private AUC will come with an interval: said here, since nothing that opens later changes it."""
    for plan in study.analyses:
        if not isinstance(plan, EvaluationPlan) or plan.mode == "exact" or study.phenotype.kind != "binary":
            continue
        for group in (None, *group_shares(study)):
            found, whose = verified(plan, study, group), f"{plan.name}: the AUC of {group or 'everybody'}"
            if found.honest:
                yield (
                    f"{whose} comes with a 95 % interval; simulated at the declared sizes it covers in "
                    f"{found.least:.1%} to {found.most:.1%}"
                )
                continue
            mend = " (a larger share of the budget or fewer bins may help)" if "stand out" in found.why else ""
            yield f"{whose} comes without an interval: {found.why}{mend or ' (more bins may help)' * ('covers' in found.why)}"
