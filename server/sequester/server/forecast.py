"""What a study will cost, said before anybody spends anything: sizes, noise, epsilon, absences, and whether it is worth it.

The planning rule (spec/genomics.md, section 1): private weights are nearly free while features <= n0 epsilon / 300 and
useless beyond n0 epsilon / 30. Everything follows from the study alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from sequester.protocols import privacy, session
from sequester.protocols.analyses.cohort import chosen
from sequester.protocols.analyses.registry import Plan, leaves_a_model
from sequester.protocols.errors import PrivacyError, RefusalCode
from sequester.protocols.study import Study

FREE, USELESS = 300, 30


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
    """The whole study; `verdict` is `good`, `noisy` or `refused` by the planning rule, None without private models."""

    digest: str
    sites: int
    mode: str
    colluders: int
    absent: int
    honest_adders: int
    analyses: tuple[AnalysisForecast, ...]
    bytes_a_site: int
    promise: privacy.Promise | None
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
    verdict = worth(study)
    return Forecast(
        digest=privacy.study_digest(study),
        sites=len(study.sites),
        mode=params.mode,
        colluders=params.max_corrupt,
        absent=params.max_absent,
        honest_adders=privacy.noise_adders(study),
        analyses=rows,
        bytes_a_site=sum(row.bytes_in_all for row in rows),
        promise=privacy.promise(study),
        features=private_features(study) or 0,
        verdict=verdict,
        advice=_advice(study, verdict),
    )


def worth(study: Study) -> str | None:
    """`good`, `noisy` or `refused` for the study's private models; None where it has none."""
    d = private_features(study)
    if d is None:
        return None
    reach = study.n0 * float(study.privacy.epsilon)
    return "good" if d <= reach / FREE else "noisy" if d <= reach / USELESS else "refused"


def private_features(study: Study) -> int | None:
    """Features of the study's widest private model; None where it trains none."""
    models = [plan for plan in study.analyses if plan.mode == "private" and leaves_a_model(plan)]
    return max(
        (len(chosen(study, getattr(plan, "features", "all"), getattr(plan, "leave_out", ()))) for plan in models),
        default=None,
    )


def require_worth(study: Study) -> None:
    """`PrivacyError` for a study that would spend patients' budget and learn nothing."""
    if worth(study) == "refused":
        raise PrivacyError(
            f"{private_features(study)} features at n0 {study.n0} and epsilon {study.privacy.epsilon}: beyond n0 epsilon / "
            f"{USELESS} = {study.n0 * float(study.privacy.epsilon) / USELESS:.0f} private weights are noise",
            hint="use fewer features (a published score counts as one), more patients, or the exact mode's consent",
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


def _advice(study: Study, verdict: str | None) -> tuple[str, ...]:
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
    if verdict == "noisy":
        said.append(
            f"{private_features(study)} features are more than n0 epsilon / {FREE}: expect a visible loss; rehearse the study"
        )
    if any(plan.mode == "exact" for plan in study.analyses):
        said.append("exact analyses: every hospital's policy must name them, and the life epsilon of its data ends")
    return tuple(said)
