"""Heads of a model by ancestry: what each changes, how much its own patients decided it, and how it does beside the pooled model.

From the results as they were released; the weights of a head over all features are put together here for its scoring file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sequester.protocols.analyses.heads import HeadsPlan, reweighed
from sequester.protocols.study import Study
from sequester.server.report import findings, plots, prs_rs
from sequester.server.report.pieces import Figure, Part, Result, Table, digits, listed, percent, sentence, withheld

MOST_COLUMNS = 4  # re-weighed ones that have a column of their own in the table
MOST_DOTS = 40
MEASURES = {"auc": "AUC", "mean_absolute_error": "Mean absolute error"}


def heads(study: Study, name: str, analyses: Mapping[str, Any]) -> Part:
    """A row and a dot for each group's head, the pooled model first; measures of both side by side where they were taken."""
    plan = study.analysis(name)
    assert isinstance(plan, HeadsPlan)
    result: Result = analyses[name]["result"]
    groups: Mapping[str, Result] = result["groups"]
    words = [
        sentence(prs_rs.method(study, name)),
        f"{listed(pooled_for(result))}: judged by the pooled model"
        + (", with the intercept and multiplier that the groups have in common" if "other" in groups else "")
        + ". No intervals: a head held near another model has none.",
    ]
    if result.get("converged") is False:
        words.append("Not every head converged in its rounds: read them with care.")
    pairs: list[tuple[Figure | None, Table | None]] = [_weights(study, plan, analyses)]
    if (beside := _side_by_side(study, plan, analyses)) is not None:
        pairs.append((None, beside))
    return Part(name, tuple(words), tuple(pairs))


def pooled_for(result: Result) -> list[str]:
    """The groups that have no head of their own."""
    return [*(group for group, row in result["groups"].items() if "suppressed" in row), "other"]


def _weights(study: Study, plan: HeadsPlan, analyses: Mapping[str, Any]) -> tuple[Figure | None, Table]:
    pooled = {row["name"]: row for row in analyses[plan.of]["result"]["weights"]}
    groups: Mapping[str, Result] = analyses[plan.name]["result"]["groups"]
    names = [feature.name for _, feature in reweighed(plan, study)]
    shown = names[:MOST_COLUMNS]
    own = {g: {row["name"]: row for row in found["weights"]} for g, found in groups.items() if "weights" in found}
    first = [digits(pooled[n]["standardised"], 3) if n in pooled else "0" for n in shown]
    rows = [("pooled", digits(analyses[plan.of]["result"]["intercept"], 3), "1", *first, "—", "—")]
    for group, found in groups.items():
        if group not in own:
            rows.append((group, withheld(found), *("" for _ in range(len(shown) + 3))))
            continue
        weights = (digits(own[group][n]["standardised"], 3) for n in shown)
        last = (digits(found["moved"], 2), percent(found["data_weight"]))
        rows.append((group, digits(found["intercept"], 3), digits(found["pooled_times"], 3), *weights, *last))
    head = (
        study.cohort.subgroup or "group",
        "Intercept",
        "Times the pooled model",
        *shown,
        "Moved",
        "Weight of its data",
    )
    note = (
        "Weights on the standardised scale. Moved: how far a head lies from the pooled model, in standard deviations of columns; "
        "weight of its data: 0 % keeps the pooled model, 100 % is the group's patients alone."
    )
    note += (
        "" if len(shown) == len(names) else f" {len(names) - len(shown)} more re-weighed columns are in results.json."
    )
    dots = [(f"{n}, {g}", rows_[n]["standardised"]) for n in names for g, rows_ in own.items()][:MOST_DOTS]
    if not dots:
        return None, Table("Heads", head, tuple(rows), note)
    svg = plots.forest(plan.name, [label for label, _ in dots], [value for _, value in dots], None, None)
    figure = Figure(svg, "Weight of each re-weighed column in each group, on the standardised scale.", True)
    return figure, Table("Heads", head, tuple(rows), note)


def _side_by_side(study: Study, plan: HeadsPlan, analyses: Mapping[str, Any]) -> Table | None:
    """The first evaluation of the heads beside one of the pooled model on the same patients, by group; else None."""
    judged = [p for p in study.analyses if p.kind == "evaluation" and p.name in analyses]
    pairs = (
        (new, old)
        for new in judged
        if new.of == plan.name
        for old in judged
        if old.of == plan.of and old.part == new.part
    )
    new, old = next(pairs, (None, None))
    if new is None or old is None:
        return None
    after, before = (analyses[p.name]["result"] for p in (new, old))
    measure = next((key for key in MEASURES if key in after and key in before), None)
    if measure is None:
        return None

    def cell(row: Result) -> str:
        value = row.get(measure)
        if value is None:
            return withheld(row) if "suppressed" in row else "—"
        return findings.interval(value) if isinstance(value, Mapping) else digits(value, 3)

    groups = [("everybody", before, after)]
    groups += [(g, row, after["groups"].get(g, {})) for g, row in before.get("groups", {}).items()]
    rows = tuple((name, cell(row), cell(more)) for name, row, more in groups)
    note = f"{old.name} and {new.name}, on {prs_rs.part_words(study, new.name)}. The same patients: intervals that overlap say "
    note += "little about the difference."
    head = (study.cohort.subgroup or "group", f"{plan.of}, pooled", f"{plan.name}, own group's head")
    return Table(f"{MEASURES[measure]} of the pooled model and of the heads", head, rows, note)


def rows_of(study: Study, plan: HeadsPlan, analyses: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Group -> weights of its head over all features, as a model's result has them; groups without a head are left out."""
    pooled = analyses[plan.of]["result"]["weights"]
    found = {}
    for group, head in analyses[plan.name]["result"]["groups"].items():
        if "weights" in head:
            times = float(head["pooled_times"])
            variants = [
                {**row, **{key: times * row[key] for key in ("standardised", "per_unit")}}
                for row in pooled if row["kind"] == "variant"
            ]  # fmt: skip
            found[group] = [*head["weights"], *variants]
    return found
