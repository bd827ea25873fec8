"""What this hospital allows, in `site.toml` under [policy]. No study can override a line of it."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from sequester.protocols import privacy
from sequester.protocols.accounting import Event, cap, cost
from sequester.protocols.analyses.plan import Number
from sequester.protocols.analyses.registry import ANALYSES, analysis_of
from sequester.protocols.errors import PrivacyError, RefusalCode, SequesterError
from sequester.protocols.signing import canonical, sha256
from sequester.protocols.study import Study

# A role names a file of the approval, so it is a plain word; `refusal` is the other decision's name.
Role = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]

# Which private analysis answers the question an exact one was refused for.
PRIVATE_INSTEAD = {
    "linear": "glm (family linear, private)",
    "glm": "glm (private)",
    "evaluation": "evaluation (private)",
    "counts": "counts (private)",
    "quality": "quality (private) of a short declared list",
    "structure": "projection on public loadings, as scores of the study,",
    "association": "prs (private) of declared variants",
    "burden": "glm (private) on burden columns of the table",
    "heterogeneity": "glm (private), one estimate for all hospitals,",
    "survival": "survival, model hazard or kaplan_meier (private),",
    "penalised": "glm (private) or prs (private)",
    "prs": "prs (private)",
    "calibration": "calibration (private)",
    "reclassification": "reclassification (private)",
    "heads": "heads (private)",
}


@dataclass(frozen=True, slots=True)
class Objection:
    """One reason this site would say no: a name, a plain sentence, the public code."""

    name: str
    sentence: str
    code: RefusalCode


class Policy(BaseModel):
    """Safe defaults: private analyses only, epsilon 3 a study and 8 for life, one approver, isolation required."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    analyses: tuple[str, ...] = (
        "glm", "linear", "evaluation", "training", "counts", "quality", "prs", "survival", "calibration", "reclassification",
        "heads",
    )  # fmt: skip
    exact: tuple[str, ...] = ()
    exact_iterative: bool = False
    epsilon_study: Number = Decimal("3")
    epsilon_life: Number = Decimal("8")
    delta: Number = Decimal("0.000001")
    order_life: Number = Decimal("4.4")
    minimum_cohort: int = Field(default=50, ge=1)
    minimum_cell: int = Field(default=10, ge=1)
    approvers: tuple[Role, ...] = Field(default=("dpo",), min_length=1)
    hold_rounds: tuple[str, ...] = ()
    allow_unisolated: bool = False

    @model_validator(mode="after")
    def _can_hold(self) -> Policy:
        if self.epsilon_study <= 0 or not 0 < self.delta < 1 or self.order_life <= 1:
            raise ValueError("epsilon_study above 0, delta between 0 and 1 and order_life above 1 were expected")
        if len(set(self.approvers)) < len(self.approvers) or "refusal" in self.approvers:
            raise ValueError("approvers: each role once, none called `refusal`; two roles are two persons")
        unknown = sorted({*self.analyses, *self.exact} - set(ANALYSES))
        if unknown:
            raise ValueError(f"there is no analysis `{unknown[0]}`; there are {', '.join(ANALYSES)}")
        try:
            self.life_cap()
        except PrivacyError as error:
            raise ValueError(f"{error.message}; {error.hint}") from None
        return self

    def digest(self) -> str:
        """SHA-256 of the policy: an approval holds under the policy it was given under."""
        return sha256(canonical(self.model_dump(mode="json")))

    def objections(self, study: Study) -> list[Objection]:
        """Every line of this policy that the study crosses, and every figure of the study that does not add up."""
        found = []
        for plan in study.analyses:
            if plan.kind not in self.analyses:
                found.append(
                    Objection(
                        "ANALYSIS",
                        f"`{plan.kind}` ({plan.name}) is not an analysis this site allows",
                        RefusalCode.POLICY,
                    )
                )
            if plan.mode != "exact":
                continue
            if plan.kind not in self.exact:
                found.append(
                    Objection(
                        "EXACT",
                        f"`{plan.name}` asks for exact sums of `{plan.kind}`, which this site's policy does not name; "
                        f"{PRIVATE_INSTEAD.get(plan.kind, 'a private analysis')} answers the same question",
                        RefusalCode.POLICY,
                    )
                )
            elif analysis_of(plan).is_iterative(plan, study) and not self.exact_iterative:
                found.append(
                    Objection(
                        "EXACT_ITERATIVE",
                        f"`{plan.name}` is exact and iterative: a dishonest exchange can read single patients; this "
                        f"site's policy does not allow it, {PRIVATE_INSTEAD.get(plan.kind, 'a private analysis')} does "
                        "not need it",
                        RefusalCode.POLICY,
                    )
                )
        if study.privacy.epsilon > self.epsilon_study:
            found.append(
                Objection(
                    "EPSILON",
                    f"the study asks for epsilon {study.privacy.epsilon}, this site gives a study {self.epsilon_study}",
                    RefusalCode.POLICY,
                )
            )
        if study.privacy.delta > self.delta:
            found.append(
                Objection("DELTA", f"delta {study.privacy.delta} is above this site's {self.delta}", RefusalCode.POLICY)
            )
        if study.publication_floor < self.minimum_cell:
            found.append(
                Objection(
                    "CELL",
                    f"the study prints cells from {study.publication_floor} people, this site from {self.minimum_cell}",
                    RefusalCode.POLICY,
                )
            )
        try:
            privacy.session_params(study)
            privacy.check_calibrated(study)
            privacy.check_headroom(study)
        except SequesterError as error:
            found.append(Objection("STUDY", error.message, error.code or RefusalCode.STUDY))
        return found

    def life_cap(self) -> float:
        """What a data set's ledger may hold at its order."""
        return cap(float(self.epsilon_life), float(self.delta), float(self.order_life))

    def life_cost(self, events: list[Event]) -> float:
        """The cost of events at the ledger's order."""
        return sum(cost(event, float(self.order_life)) for event in events)
