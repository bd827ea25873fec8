"""Every study that comes with the program, run on made-up patients of its own columns: each analysis ends, in plain JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import plain_loop
from sequester.protocols import arrays, privacy
from sequester.protocols.study import Study, read_study, standardisation, study_json, transformed, validated
from sequester.server.cli.study import templates
from sequester.server.forecast import forecast, require_worth


def made_up(study: Study, n: int, seed: int) -> plain_loop.Patients:
    """Patients within the study's bounds whose outcome depends on the first column and the first variant."""
    rng = np.random.default_rng(seed)
    columns: list[np.ndarray] = [rng.normal(float(s.mean), float(s.sd), n) for s in study.scores]
    for column in study.covariates:
        if column.kind == "category":
            level = rng.integers(0, len(column.values), n)
            columns += [(level == k).astype(float) for k in range(1, len(column.values))]
        elif column.kind == "binary":
            columns.append(rng.integers(0, 2, n).astype(float))
        else:
            low, high = float(column.lower or 0), float(column.upper or 1)
            columns.append(np.array([transformed(column, v) for v in rng.uniform(low, high, n)]))
    table = np.column_stack([np.zeros((n, 0)), *columns])
    table[rng.random(table.shape) < 0.01] = np.nan
    f = np.array([float(v.frequency) for v in study.variants])
    dosage = rng.binomial(2, f, (n, len(f))).astype(float)
    z = np.zeros(n)
    if len(columns):
        z += np.nan_to_num((table[:, 0] - np.nanmean(table[:, 0])) / np.nanstd(table[:, 0]))
    z += dosage[:, 0] if len(f) else 0.0
    event = None
    if study.phenotype.kind == "binary":
        y = (rng.random(n) < 1 / (1 + np.exp(-(z - 2)))).astype(float)
    elif study.phenotype.kind == "time":
        time, end = rng.exponential(8 * np.exp(-z)), rng.uniform(1, 10, n)
        y, event = np.minimum(time, end), (time <= end).astype(float)
    else:
        centre, scale = standardisation(study.phenotype)
        low, high = (
            transformed(study.phenotype, float(b or 0)) for b in (study.phenotype.lower, study.phenotype.upper)
        )
        y = np.clip((np.clip(centre + scale * (0.3 * z + rng.normal(0, 0.3, n)), low, high) - centre) / scale, -5, 5)
    strata = rng.integers(0, len(study.cohort.subgroup_values) + 1, n) if study.cohort.subgroup else None
    test = float(study.cohort.test_fraction)
    return plain_loop.patients(study, y, table=table, dosage=dosage, event=event, strata=strata, seed=seed, test=test)


def exact_form(text: str) -> str | None:
    """The template with the analyses of its comment in place of its own, None where it has no comment."""
    if "#   analyses:" not in text:
        return None
    start, end = text.index("\nanalyses:\n"), text.index("#   analyses:")
    lines = [line[1:] for line in text[end:].splitlines() if line.startswith("#     - {kind")]
    changed = text[:start] + "\nanalyses:\n" + "\n".join(lines) + "\n" + text[text.index("\nprivacy:\n") :]
    return changed.replace("ring_bits: 32", "ring_bits: 64").replace("fraction_bits: 16", "fraction_bits: 28")


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [n for inner in value.values() for n in numbers(inner)]
    if isinstance(value, list):
        return [n for inner in value for n in numbers(inner)]
    return [float(value)] if isinstance(value, int | float) else []


@pytest.mark.slow
@pytest.mark.parametrize("form", ["as it is", "exact"])
@pytest.mark.parametrize("name", sorted(templates()))
def test_a_template_passes_check_and_every_analysis_of_it_ends_in_plain_json(name: str, form: str) -> None:
    text: str | None = templates()[name]
    if form == "exact":
        text = exact_form(text or "")
        if text is None:
            pytest.skip("the template has no exact form in a comment")
    study = read_study(text or "")
    forecast(study)
    require_worth(study)
    study = validated(study_json(privacy.calibrate(study)))
    cohorts = plain_loop.split(
        made_up(study, study.n0, 1), [study.n0 // 2, study.n0 // 4, study.n0 - 3 * (study.n0 // 4), 0][:3]
    )
    finished = plain_loop.run(study, cohorts, np.random.default_rng(2), fixed_point=True)
    assert set(finished) == {plan.name for plan in study.analyses}
    for plan in study.analyses:
        done = finished[plan.name]
        json.dumps(done.result, allow_nan=False)
        arrays.decode(arrays.encode(done.state))
        assert done.result and np.isfinite(numbers(done.result)).all()
        if plan.mode == "private":  # an interval is printed with noise only where its coverage was verified: the AUC's
            rest = json.dumps({k: v for k, v in done.result.items() if k not in ("auc", "groups")})
            assert not any(f'"{word}":' in rest for word in ("se", "p", "low", "high"))
