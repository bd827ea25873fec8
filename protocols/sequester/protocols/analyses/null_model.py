"""The model of covariates alone that score tests start from: common to the scan of variants and the tests of genes.

Columns are the intercept, the study's table features, and the components of an earlier structure analysis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from sequester.protocols.analyses import exact_glm
from sequester.protocols.analyses.analysis import Broadcast, Finished, State, Sums
from sequester.protocols.analyses.cohort import Cohort, Part, chosen, standardised
from sequester.protocols.analyses.plan import AnalysisPlan
from sequester.protocols.analyses.structure import StructurePlan, projected, standardisation
from sequester.protocols.analyses.weights import mean_of

if TYPE_CHECKING:
    from sequester.protocols.study import Study

Vector = NDArray[np.float64]
Fields = tuple[tuple[str, tuple[int, ...]], ...]


class CovariatePlan(AnalysisPlan):
    """`components` names an earlier structure analysis."""

    part: Part = "all"
    components: str | None = None


class ScorePlan(CovariatePlan):
    """`null_rounds` are spent on the covariates (linear: one)."""

    null_rounds: int = Field(default=8, ge=2, le=50)


def is_linear(study: Study) -> bool:
    """True for a quantitative outcome."""
    return study.phenotype.kind == "quantitative"


def family(study: Study) -> str:
    """linear or logistic."""
    return "linear" if is_linear(study) else "logistic"


def rounds(plan: ScorePlan, study: Study) -> int:
    """Rounds before the pass over the variants."""
    return 1 if is_linear(study) else plan.null_rounds


def columns(plan: CovariatePlan, study: Study) -> int:
    """Columns of the null model."""
    more = 0
    if plan.components is not None and isinstance(of := study.analysis(plan.components), StructurePlan):
        more = min(of.components, len(study.variants))
    return 1 + len(chosen(study, "table")) + more


def fields(plan: ScorePlan, study: Study) -> Fields:
    """What one round of the null model opens."""
    c = columns(plan, study)
    return (("information", (c * (c + 1) // 2,)), ("score", (c,)), ("log_likelihood", (1,)), ("people", (3,)))


def start(plan: CovariatePlan, study: Study, earlier: Mapping[str, Finished]) -> State:
    """The state before the first round."""
    state = exact_glm.fresh(np.zeros(columns(plan, study)), False)
    if plan.components is not None:
        of = earlier[plan.components].state
        state |= {f"structure.{name}": of[name] for name in ("mean", "scale", "loadings")}
    return state


def to_all(state: State) -> Broadcast:
    """What every hospital needs to evaluate the null model."""
    sent: Broadcast = {"beta": state["beta"]}
    return sent | {name: state[name] for name in state if name.startswith("structure.")}


def stand_in(plan: CovariatePlan, study: Study) -> Broadcast:
    """Zeros of the names and shapes of `to_all`."""
    sent: Broadcast = {"beta": np.zeros(columns(plan, study))}
    if plan.components is not None and isinstance(of := study.analysis(plan.components), StructurePlan):
        shapes = standardisation(study, min(of.components, len(study.variants)))
        sent |= {f"structure.{name}": zeros for name, zeros in shapes.items()}
    return sent


def design(plan: CovariatePlan, study: Study, cohort: Cohort, broadcast: Broadcast) -> tuple[Vector, Vector, Vector]:
    """(x, y, linear predictor) of a hospital's patients."""
    found = cohort.columns(plan.part)
    parts = [np.ones((len(found.y), 1)), standardised(found.raw, chosen(study, "table"))]
    if plan.components is not None:
        parts.append(
            projected(cohort, plan.part, {n: broadcast[f"structure.{n}"] for n in ("mean", "scale", "loadings")})
        )
    x = np.hstack(parts)
    z = np.clip(np.nan_to_num(x @ np.asarray(broadcast["beta"], dtype=np.float64)), -1e6, 1e6)
    return x, found.y, z


def sums(study: Study, x: Vector, y: Vector, z: Vector) -> Sums:
    """A hospital's share of `fields`."""
    information, score, value = exact_glm.moments(family(study), x, y, z)
    people = np.array([float(len(y)), y.sum(), y @ y])
    return {
        "information": information[np.triu_indices(len(score))], "score": score, "log_likelihood": np.array([value]),
        "people": people,
    }  # fmt: skip


def residuals(study: Study, y: Vector, z: Vector) -> tuple[Vector, Vector]:
    """(y - mean, weight) of each patient."""
    mu = mean_of(family(study), z)
    return y - mu, np.ones_like(mu) if is_linear(study) else mu * (1 - mu)


def advanced(study: Study, state: State, opened: Sums) -> State:
    """The state after one more round."""
    return exact_glm.progressed(state, opened, family(study), "never", study, last=False)


def has_one_outcome(study: Study, people: Vector) -> bool:
    """True where a binary outcome takes one value only."""
    return not is_linear(study) and not 0.5 < float(people[1]) < float(people[0]) - 0.5


def faults(study: Study, plan: ScorePlan, earlier: Mapping[str, Any]) -> Iterator[str]:
    """What any plan of score tests says against its study."""
    if not study.variants:
        yield f"analysis {plan.name}: score tests of no variants"
    yield from covariate_faults(study, plan, earlier)


def covariate_faults(study: Study, plan: CovariatePlan, earlier: Mapping[str, Any]) -> Iterator[str]:
    """What any plan on covariates and components says against its study."""
    if study.phenotype.kind == "time":
        yield f"analysis {plan.name}: the phenotype is a time; a binary or quantitative phenotype was expected"
    if plan.components is not None and getattr(earlier.get(plan.components), "kind", "") != "structure":
        yield f"analysis {plan.name}: components `{plan.components}` is no structure analysis before it"
