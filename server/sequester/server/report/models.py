"""The weights of a model, and the analyses that are not models: from the results alone, as they were released.

Intervals and tests on weights are printed in exact mode only; weights under noise have none whose coverage is verified.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sequester.protocols.analyses.registry import Plan
from sequester.protocols.study import Feature, Study
from sequester.server.report import fits, plots, prs_rs
from sequester.server.report.pieces import (
    Figure,
    Pairs,
    Part,
    Result,
    Table,
    digits,
    listed,
    p_value,
    scalars,
    sentence,
    withheld,
)

MOST_WEIGHTS = 50
MOST_DOTS = 30
MOST_CELLS = 200


def model(study: Study, name: str, mode: str, result: Result) -> Part:
    """The weights of one model, largest first; intervals only in exact mode."""
    if "not_fitted" in result:
        counted = scalars(_counted(study, result), skip={"intercept", "intercept_raw", "not_fitted"})
        told = f"Not fitted: {result['not_fitted']}. Its weights are zeros that nobody should use."
        return Part(name, (sentence(prs_rs.method(study, name)), told), ((None, counted),) if counted else ())
    rows = sorted(result["weights"], key=lambda row: -abs(row["standardised"]))
    honest = mode == "exact" and any("low" in row for row in rows)
    words = [sentence(prs_rs.method(study, name))]
    if honest:
        words.append("Intervals are 95\u00a0%, from the information of the pooled fit.")
    elif mode == "exact":
        words.append("No intervals: the fit gave none.")
    else:
        words.append("No intervals or tests on weights: none under noise has a verified coverage.")
    if result.get("firth"):
        words.append("Firth's penalty was used: without it a weight had no maximum, or the study asked for it.")
    if result.get("converged") is False and "not_fitted" not in result:
        words.append("The fit did not converge in its rounds: read the weights with care.")
    if result.get("separated"):
        words.append(
            f"Separation: {listed(result['separated'])} split the outcome perfectly; such weights have no maximum."
        )
    if study.phenotype.transform != "none":
        words.append(f"The outcome is {prs_rs.column_words(study.phenotype)}; weights are on its standardised scale.")
    drawn = [row for row in rows if not honest or "low" in row][:MOST_DOTS]
    svg = plots.forest(
        name,
        [row["name"] for row in drawn],
        [row["standardised"] for row in drawn],
        [row["low"] for row in drawn] if honest else None,
        [row["high"] for row in drawn] if honest else None,
    )
    first = f"The {len(drawn)} largest of {len(rows)} weights" if len(drawn) < len(rows) else "All weights"
    caption = f"{first} on the standardised scale" + (", with 95\u00a0% intervals." if honest else ".")
    caption += " One unit is a variant's standard deviation at its public frequency, or a column's public scale."
    more = scalars(_counted(study, result), skip={"intercept", "intercept_raw", "intercept_se", *fits.SHOWN})
    pairs: Pairs = [(Figure(svg, caption, True), _weights(study, name, rows, result, honest))]
    pairs += fits.beside(study, name, result)
    if more is not None:
        pairs.append((None, more))
    return Part(name, tuple(words), tuple(pairs))


def _weights(study: Study, name: str, rows: Sequence[Result], result: Result, honest: bool) -> Table:
    features = {feature.name: feature for feature in study.features()}
    plan = study.analysis(name)
    ratio = _RATIOS.get(_scale(study, plan), "")
    tested, summed = any("statistic" in row for row in rows), any("score" in row for row in rows)
    head = ["Feature", "Kind", "Standardised", *(["95\u00a0% interval"] if honest else [])]
    head += [
        *(["t" if _scale(study, plan) == "outcome" else "z"] if tested else []),
        *(["p"] if honest else []),
        "Per unit",
        *([ratio] if ratio else []),
    ]
    head += ["Sum before shrinkage"] if summed else []
    body = []
    for row in rows[:MOST_WEIGHTS]:
        cells = [row["name"], _per(row, features.get(row["name"])), digits(row["standardised"])]
        if honest and "low" in row:
            cells += [f"{digits(row['low'], 3)} to {digits(row['high'], 3)}"]
            cells += [digits(row["statistic"], 3) if "statistic" in row else "—"] if tested else []
            cells += [p_value(row["p"])]
        elif honest:
            cells += [f"not estimated: {row.get('not_estimated', 'no reason given')}", *(["—"] if tested else []), "—"]
        cells.append(digits(row["per_unit"]))
        if ratio:
            cells.append(_ratio(row["per_unit"]))
        if summed:
            cells.append(digits(row["score"]))
        body.append(tuple(cells))
    error = f" (SE {digits(result['intercept_se'], 3)})" if "intercept_se" in result else ""
    standardised = f"{digits(result['intercept'])}{error}"
    note = f"Intercept {digits(result['intercept_raw'])} on raw features, {standardised} on standardised ones."
    if getattr(plan, "model", "").startswith("cox"):
        note = "A Cox model has no intercept."
    if any(row["kind"] == "variant" for row in rows):
        note += " Variants: per copy of the effect allele; alleles are in the scoring file."
    if len(rows) > MOST_WEIGHTS:
        note += f" The {MOST_WEIGHTS} largest of {len(rows)}; all are in results.json."
    return Table("Weights", tuple(head), tuple(body), note, words=(1,))


_RATIOS = {"log odds": "Odds ratio per unit", "log hazard": "Hazard ratio per unit", "log rate": "Rate ratio per unit"}


def _scale(study: Study, plan: Plan) -> str:
    """What a weight adds to: log odds, log hazard, log rate, or the outcome itself."""
    if plan.kind == "survival":
        return "log hazard"
    family = getattr(plan, "family", "logistic" if study.phenotype.kind == "binary" else "linear")
    return {"logistic": "log odds", "poisson": "log rate"}.get(family, "outcome")


def _counted(study: Study, result: Result) -> dict[str, object]:
    """The result with counts below the floor withheld, and the total too where it would give the controls away."""
    found = dict(result)
    total = "n" if "n" in found else "people"
    floor, n, cases = study.publication_floor, found.get(total), found.get("cases")
    if isinstance(n, int) and isinstance(cases, int):
        if cases < floor:
            found["cases"] = f"<{floor}"
        elif n - cases < floor:
            found[total] = found["cases"] = f"withheld: <{floor} controls"
    elif isinstance(n, int) and n < floor:
        found[total] = f"<{floor}"
    return found


def _ratio(weight: float) -> str:
    ratio = math.exp(min(weight, 700.0))
    return f"{ratio:.2f}" if 0.1 <= ratio < 100 else digits(ratio, 3)


def _per(row: Result, feature: Feature | None) -> str:
    if row["kind"] == "variant":
        return "variant, per copy"
    if feature is not None and feature.level:
        return "category, against the first"
    return str(row["kind"])


# ---- what is not a model --------------------------------------------------------------------------------------------


def other(study: Study, name: str, result: Result) -> Part:
    """An analysis without weights: its grid or its single figures; what is longer is in results.json."""
    words = [sentence(prs_rs.method(study, name))]
    pairs: Pairs = []
    shown: set[str] = set()
    if "passing" in result:
        pairs, shown = [(None, _quality(result))], {"variants", "passing", "failed"}
    if "cells" in result:
        pairs, shown = [(None, _grid(result)), *_margins(result)], {"cells", "margins", "axes"}
    if "eigenvalues" in result:
        pairs, shown = [(None, _components(result))], {"variants", "eigenvalues", "left_out"}
    if "suppressed" in result:
        words.append(sentence(withheld(result)))
    if (table := scalars(_counted(study, result), skip=shown | {"suppressed"})) is not None:
        pairs.append((None, table))
    long = [k for k, v in result.items() if k not in shown and isinstance(v, list | dict) and "value" not in v]
    if long:
        words.append(f"In full in results.json: {listed(long)}.")
    return Part(name, tuple(words), tuple(pairs))


def _grid(result: Result) -> Table:
    cells: Sequence[Result] = result["cells"]
    head = (*(axis["column"] for axis in result["axes"]), "People")
    rows = tuple((*(str(v) for v in cell["levels"]), _people(cell["people"])) for cell in cells[:MOST_CELLS])
    note = (
        f"Noise with standard deviation {digits(result['noise_sd'], 3)} in each cell. " if "noise_sd" in result else ""
    )
    note += f"The first {MOST_CELLS} of {len(cells)} cells; all are in results.json." if len(cells) > MOST_CELLS else ""
    return Table("People in each cell", head, rows, note.strip(), words=tuple(range(1, len(head) - 1)))


def _margins(result: Result) -> Pairs:
    """People by each column alone; with one column the cells are it."""
    if len(result["axes"]) < 2 or not result.get("margins"):
        return []
    rows = tuple(
        (axis["column"], str(level), _people(people))
        for axis, margin in zip(result["axes"], result["margins"], strict=True)
        for level, people in zip(axis["levels"], margin["people"], strict=True)
    )
    return [(None, Table("People by each column alone", ("Column", "Level", "People"), rows, words=(1,)))]


def _components(result: Result) -> Table:
    rows = tuple((f"PC{k + 1}", digits(value)) for k, value in enumerate(result["eigenvalues"]))
    left = len(result["left_out"])
    note = f"Of the relationship matrix of {result['variants']:,} variants; {left:,} did not vary and were left out."
    return Table("Components", ("Component", "Eigenvalue"), rows, note)


def _people(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _quality(result: Result) -> Table:
    rows = [("Passing", f"{len(result['passing']):,} of {result['variants']:,}")]
    rows += [(f"Failed: {reason.replace('_', ' ')}", f"{count:,}") for reason, count in result["failed"].items()]
    note = "A variant counts under the first reason that it fails. The list that passes is in results.json."
    return Table("Variants", ("Outcome", "Variants"), tuple(rows), note)
