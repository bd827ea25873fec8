"""What a hospital allows, and the sentence a study gets that asks for more."""

from __future__ import annotations

from decimal import Decimal

import pytest
from pydantic import ValidationError

from contracts import exact_study, study
from sequester.client.policy import Policy
from sequester.protocols.errors import RefusalCode


def names(policy: Policy, of: object = None) -> list[str]:
    return [o.name for o in policy.objections(of or study())]  # type: ignore[arg-type]


def test_the_default_policy_accepts_a_private_study_of_epsilon_3_and_nothing_exact() -> None:
    assert names(Policy()) == []
    assert names(Policy(), exact_study()) == ["EXACT"]


def test_an_exact_analysis_is_refused_with_the_private_one_that_answers_the_same_question() -> None:
    (refused,) = Policy().objections(exact_study())
    assert refused.code == RefusalCode.POLICY and "glm (family linear, private)" in refused.sentence
    assert names(Policy(exact=("linear",)), exact_study()) == []


def test_an_iterative_exact_analysis_needs_its_own_switch() -> None:
    one = exact_study("glm")
    named = Policy(exact=("glm",))
    assert names(named, one) == ["EXACT_ITERATIVE"]
    assert "a dishonest exchange can read single patients" in named.objections(one)[0].sentence
    assert names(Policy(exact=("glm",), exact_iterative=True), one) == []
    assert names(Policy(exact_iterative=True), one) == ["EXACT"]  # the switch alone allows nothing


def test_every_line_that_is_crossed_is_named() -> None:
    strict = Policy(analyses=("linear",), epsilon_study=Decimal(2), delta=Decimal("0.0000001"), minimum_cell=20)
    assert names(strict) == ["ANALYSIS", "ANALYSIS", "EPSILON", "DELTA", "CELL"]


def test_a_study_without_noise_or_with_too_little_is_no_study_here() -> None:
    one = study()
    for multiplier in (None, Decimal("0.1")):
        plans = tuple(plan.model_copy(update={"noise_multiplier": multiplier}) for plan in one.analyses)
        (refused,) = Policy().objections(one.model_copy(update={"analyses": plans}))
        assert refused.name == "STUDY" and refused.code in (RefusalCode.PARAMS, RefusalCode.BUDGET)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epsilon_life": "0.1"},  # order 4.4 cannot hold it: refused, not clamped
        {"epsilon_study": "0"},
        {"delta": "0"},
        {"order_life": "1"},
        {"epsilon_study": 0.5},  # a binary float is not what was written
        {"approvers": ()},
        {"approvers": ("dpo", "dpo")},
        {"approvers": ("refusal",)},
        {"approvers": ("../dpo",)},
        {"exact": ("everything",)},
        {"minimum_cohort": 0},
        {"allow_everything": True},
    ],
)
def test_a_policy_that_cannot_hold_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Policy.model_validate(wrong)


def test_any_changed_line_changes_the_policy_s_digest() -> None:
    changed = [
        Policy(exact=("linear",)),
        Policy(minimum_cohort=49),
        Policy(allow_unisolated=True),
        Policy(approvers=("dpo", "pi")),
    ]
    assert len({policy.digest() for policy in (Policy(), *changed)}) == 5
    assert Policy(epsilon_study=Decimal("3.0")).digest() == Policy().digest()  # one spelling of a number
