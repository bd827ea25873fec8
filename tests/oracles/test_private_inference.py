"""Under noise no standard error, interval or p value is printed but those whose coverage is verified (privacy.md, 6).

Every kind of analysis is here, with private plans that run on made-up patients or with the refusal of its private form: a
new kind, or a new name in a result, fails until it says which it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import contracts
import plain_loop
from oracles.test_templates import made_up
from sequester.protocols.analyses.registry import ANALYSES
from sequester.protocols.errors import StudyError

# Names under which a result may carry inference, and all other names that occur under noise: a name in neither fails.
INFERENCE = {"se", "p", "low", "high", "statistic", "intercept_se", "per_unit_se", "i2", "q", "saddlepoint"}
# fmt: off
PLAIN = {
    "absent", "at_risk", "auc", "average_precision", "axes", "band", "bands", "baseline_hazard", "bins", "brier",
    "c_index", "calibration", "call_rate", "cells", "column", "curves", "data_weight", "deciles", "events",
    "expected_calibration_error", "failed", "groups", "hardy_weinberg", "intercept", "intercept_moved", "intercept_raw",
    "interval", "kind", "level", "levels", "margins", "mean_absolute_error", "minor_frequency", "moved",
    "nagelkerke_r2", "name", "net_benefit", "net_reclassification", "new", "no_interval", "noise_sd", "non_events",
    "observed_over_expected", "observed_r2", "of", "old", "over", "over_by_20_percent", "passing", "people", "per_unit",
    "points", "pooled_times", "prior_sd", "roc", "root_mean_squared_error", "score", "share_with_effect", "shrinkage",
    "standardised", "suppressed", "survival", "threshold", "time", "top_against_bottom_odds", "treat_all", "under",
    "under_by_20_percent", "unit", "value", "variants", "weights", "within_20_percent",
}
# fmt: on
# Kind -> where in its result such names may stand under noise, and the test that simulates them.
VERIFIED = {
    "evaluation": (
        ("auc", "groups.*.auc"),
        "oracles/test_evaluation.py::test_what_may_print_covers_93_to_97_over_the_whole_grid",
    )
}

PHENOTYPES = {
    "binary": {"name": "case", "kind": "binary", "values": ["0", "1"]},
    "quantitative": {"name": "dose", "kind": "quantitative", "unit": "mg", "lower": "1", "upper": "100"},
    "time": {"name": "years", "kind": "time", "unit": "years", "lower": "0", "upper": "10", "event": "died"},
    "counted": {"name": "visits", "kind": "quantitative", "lower": "0", "upper": "20", "centre": "0", "scale": "1"},
}
MODEL = {"kind": "glm", "name": "model", "rounds": 3, "prevalence": "0.2"}
LINE = MODEL | {"family": "linear"}
HAZARD = {"kind": "survival", "name": "model", "model": "hazard", "rounds": 3}
# Kind -> (phenotype, the analyses of a study that ends with a private one of the kind).
PRIVATE: dict[str, list[tuple[str, list[dict[str, Any]]]]] = {
    "glm": [
        ("binary", [MODEL]),
        ("binary", [MODEL | {"solver": "newton", "features": "table"}]),
        ("quantitative", [LINE]),
        ("counted", [MODEL | {"family": "poisson", "prevalence": "1.5"}]),
    ],
    "linear": [("quantitative", [{"kind": "linear", "name": "line", "features": "table"}])],
    "training": [
        ("binary", [{"kind": "training", "name": "score", "rounds": 3, "prevalence": "0.2"}]),
    ],
    "prs": [("binary", [{"kind": "prs", "name": "score", "prevalence": "0.2"}])],
    "evaluation": [
        ("binary", [MODEL, {"kind": "evaluation", "name": "held_out", "of": "model"}]),
        ("quantitative", [LINE, {"kind": "evaluation", "name": "held_out", "of": "model", "bands": ["20", "60"]}]),
        ("time", [HAZARD, {"kind": "evaluation", "name": "held_out", "of": "model", "times": 6, "bins": 6}]),
    ],
    "calibration": [("binary", [MODEL, {"kind": "calibration", "name": "right", "of": "model"}])],
    "reclassification": [
        ("binary", [MODEL, MODEL | {"name": "old", "leave_out": ["age"]},
                    {"kind": "reclassification", "name": "moved", "of": "model", "against": "old", "thresholds": ["0.2"]}]),
    ],
    "heads": [
        ("binary", [MODEL, {"kind": "heads", "name": "heads", "of": "model", "columns": "table"}]),
        ("quantitative", [LINE, {"kind": "heads", "name": "heads", "of": "model"}]),
    ],
    "counts": [("binary", [{"kind": "counts", "name": "grid", "axes": [{"column": "case"}, {"column": "ancestry"}]}])],
    "quality": [("binary", [{"kind": "quality", "name": "calls"}])],
    "survival": [
        ("time", [HAZARD]),
        ("time", [{"kind": "survival", "name": "curves", "model": "kaplan_meier", "bins": 10, "by_subgroup": True}]),
    ],
}  # fmt: skip
# Kind -> what a private plan of it is refused with.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "structure": ("binary", {"components": 2}, "exact only"),
    "association": ("binary", {}, "exact only"),
    "burden": ("binary", {"genes": [{"name": "G", "variants": ["rs1", "rs2"]}]}, "exact only"),
    "penalised": ("binary", {"l1": "1", "fraction": "0.1"}, "exact only"),
    "heterogeneity": ("binary", {"terms": ["age"]}, "exact only"),
}


def study(phenotype: str, analyses: list[dict[str, Any]]) -> Any:
    cohort = {"subgroup": "ancestry", "subgroup_values": ["AFR", "EUR"], "subgroup_shares": ["0.3", "0.4"]}
    return contracts.study(
        phenotype=PHENOTYPES[phenotype], analyses=analyses, cohort=cohort, n0=6000, n_max=9000,
        privacy={"epsilon": "100", "delta": "0.000001", "order": "1.5"},
    )  # fmt: skip


def named(value: Any, path: str = "") -> Iterator[str]:
    """Paths to the names in a result that carry inference, the name itself left out; a group's name is `*`."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if path.endswith(("groups", "curves")):
                key = "*"
            assert key in INFERENCE | PLAIN | {"*"}, f"{path}.{key}: is it inference, or plain?"
            if key in INFERENCE:
                yield path
            yield from named(inner, f"{path}.{key}".strip("."))
    elif isinstance(value, list):
        for inner in value:
            yield from named(inner, path)


def test_every_kind_says_what_it_prints_under_noise() -> None:
    assert set(PRIVATE) | set(REFUSED) == set(ANALYSES) and not set(PRIVATE) & set(REFUSED)
    assert set(VERIFIED) <= set(PRIVATE)


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_a_kind_without_a_private_form_is_refused_in_private_mode(kind: str) -> None:
    phenotype, plan, words = REFUSED[kind]
    with pytest.raises(StudyError, match=words):
        study(phenotype, [{"kind": kind, "name": "asked", **plan}])


@pytest.mark.parametrize(
    ("kind", "case"), [(kind, case) for kind, cases in PRIVATE.items() for case in range(len(cases))]
)
def test_what_carries_inference_under_noise_is_verified(kind: str, case: int) -> None:
    phenotype, analyses = PRIVATE[kind][case]
    of = study(phenotype, analyses)
    cohorts = plain_loop.split(made_up(of, 6000, 1), [3000, 2000, 1000])
    finished = plain_loop.run(of, cohorts, np.random.default_rng(2))
    assert of.analyses[-1].kind == kind
    for plan in of.analyses:
        allowed = VERIFIED[plan.kind][0] if plan.kind in VERIFIED else ()
        assert set(named(finished[plan.name].result)) <= set(allowed)
    if (kind, phenotype) == ("evaluation", "binary"):  # and here it is printed, so that the walk is known to find it
        assert set(named(finished["held_out"].result)) == {"auc", "groups.*.auc"}
