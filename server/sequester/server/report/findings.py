"""What a study found, as sentences, tables and figures: from the results alone, as they were released.

Nothing is recomputed from cells. An interval is printed only where the analysis gives one, and on weights only in exact
mode; a group that is withheld stays withheld. `Table`, `Figure` and `Tile` are what the page is made of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sequester.protocols.study import Feature, Study
from sequester.server.report import plots, prs_rs

Result = Mapping[str, Any]
MOST_WEIGHTS = 50
MOST_DOTS = 30
BANDS = 10
Z95 = 1.959964


@dataclass(frozen=True, slots=True)
class Table:
    """Cells are text; all columns but the first hold figures, save those numbered in `words`."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    words: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Figure:
    """An inline SVG and the sentence under it; a wide one has its table below."""

    svg: str
    caption: str
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Tile:
    """One figure of the first page."""

    label: str
    value: str
    note: str


@dataclass(frozen=True, slots=True)
class Part:
    """One analysis on the page; `pairs` are figures with their tables beside them."""

    title: str
    words: tuple[str, ...]
    pairs: tuple[tuple[Figure | None, Table | None], ...] = ()


@dataclass(frozen=True, slots=True)
class Headline:
    """The first page's sentence and figures."""

    verdict: str
    tiles: tuple[Tile, ...] = ()
    warnings: tuple[str, ...] = field(default=())


def digits(value: float, n: int = 4) -> str:
    """`n` significant digits, a true minus sign."""
    text = f"{value:.{n}g}"
    if "e" not in text and abs(value) >= 10**n:
        text = f"{value:,.0f}"
    return text.replace("-", "−")


def sentence(text: str) -> str:
    """Its first letter large, a full stop at the end."""
    return text[:1].upper() + text[1:].rstrip(".") + "."


def percent(share: float, decimals: int = 0) -> str:
    """`74 %`, the space not broken."""
    return f"{100 * share:.{decimals}f}\u00a0%".replace("-", "−")


def interval(auc: Result) -> str:
    """`0.74 (0.71 to 0.77)`; without the bracket where no interval is given."""
    if "low" not in auc or "high" not in auc:
        return f"{auc['value']:.3f}"
    return f"{auc['value']:.3f} ({auc['low']:.3f} to {auc['high']:.3f})"


# ---- the first page -------------------------------------------------------------------------------------------------


def headline(study: Study, analyses: Mapping[str, Result]) -> Headline:
    """The verdict on the first evaluation, its figures, and what a reader must know about them."""
    name = next((p.name for p in study.analyses if p.kind == "evaluation" and p.name in analyses), None)
    if name is None:
        return Headline("The study ran its analyses and evaluated no model on other patients.")
    result: Result = analyses[name]["result"]
    on = prs_rs.part_words(study, name)
    if "suppressed" in result:
        return Headline(f"Too few patients to say how good the model is: the count is {result['suppressed']}.")
    if "auc" in result:
        return _discrimination_headline(result, on)
    if "mean_absolute_error" in result:
        return _error_headline(result, on)
    return Headline(f"The study evaluated its model on {on}; the measures are below.")


def _discrimination_headline(result: Result, on: str) -> Headline:
    auc = result["auc"]
    low, high = auc.get("low"), auc.get("high")
    said = f"Of 100 pairs of a case and a control, the model scores the case higher in {100 * auc['value']:.0f}"
    said += f" (95\u00a0% interval {100 * low:.0f} to {100 * high:.0f})" if low is not None else ""
    said += f"; chance would be 50. Measured on {on}."
    warnings = []
    if low is not None and low <= 0.5 <= high:
        said += " The interval includes chance: this study does not show that the model predicts."
    tiles = [
        Tile(
            "AUC",
            f"{auc['value']:.3f}",
            f"95\u00a0% interval {low:.3f} to {high:.3f}" if low is not None else "no interval",
        )
    ]
    if result.get("groups"):
        gap, words = equity_gap(result["groups"])
        tiles.append(Tile("Equity gap in AUC", f"{gap:.3f}" if gap is not None else "not known", words))
        hidden = [name for name, group in result["groups"].items() if "suppressed" in group]
        if hidden:
            warnings.append(f"No figures for {_listed(hidden)}: too few patients, or withheld to protect such a group.")
    else:
        warnings.append("No equity gap: the study names no groups to compare.")
    return Headline(said, tuple(tiles), tuple(warnings))


def _error_headline(result: Result, on: str) -> Headline:
    unit = f" {result['unit']}" if result.get("unit") else ""
    error, within = result["mean_absolute_error"], result.get("within_20_percent")
    said = f"Predictions are {digits(error, 3)}{unit} away from the truth on average, measured on {on}."
    tiles = [Tile("Mean absolute error", f"{digits(error, 3)}{unit}", "no interval: none with verified coverage")]
    if within is not None:
        said += f" {100 * within:.0f} of 100 lie within 20\u00a0% of it."
        tiles.append(Tile("Within 20\u00a0%", f"{100 * within:.0f}\u00a0%", "of predictions, of the true value"))
    return Headline(said, tuple(tiles), ("No figures by group: this evaluation opens none.",))


def equity_gap(groups: Mapping[str, Result]) -> tuple[float | None, str]:
    """Largest difference in AUC between groups that are shown, and the sentence that names the two."""
    shown = {name: group["auc"] for name, group in groups.items() if "auc" in group}
    if len(shown) < 2:
        return None, "fewer than two groups may be shown"
    worst, best = min(shown, key=lambda g: shown[g]["value"]), max(shown, key=lambda g: shown[g]["value"])
    gap = shown[best]["value"] - shown[worst]["value"]
    words = f"{worst} {shown[worst]['value']:.3f}, {best} {shown[best]['value']:.3f}"
    if "low" in shown[best] and "high" in shown[worst]:
        apart = shown[best]["low"] > shown[worst]["high"]
        words += "; their intervals do not meet" if apart else "; their intervals overlap"
    return float(gap), words


# ---- evaluations ----------------------------------------------------------------------------------------------------


def evaluation(study: Study, name: str, result: Result) -> Part:
    """One evaluation: groups, ROC, calibration, scores by outcome, errors."""
    words = [sentence(prs_rs.method(study, name))]
    if "suppressed" in result:
        return Part(name, (*words, f"Withheld: {result['suppressed']} patients."))
    pairs: list[tuple[Figure | None, Table | None]] = []
    if result.get("groups"):
        pairs.append(_groups(study, result))
    if result.get("roc"):
        pairs.append(_roc(result))
    if result.get("calibration"):
        pairs.append(_calibration(study, result["calibration"]))
    if result.get("roc"):
        pairs.append(_histogram(study, name, result))
    if "mean_absolute_error" in result:
        pairs.append((None, _errors(study, result)))
    rest = _scalars(result, skip={"auc", "unit", "mean_absolute_error", "root_mean_squared_error", "within_20_percent"})
    if rest is not None:
        pairs.append((None, rest))
    return Part(name, tuple(words), tuple(pairs))


def _groups(study: Study, result: Result) -> tuple[Figure | None, Table]:
    groups: Mapping[str, Result] = result["groups"]
    shown = {"everybody": result["auc"], **{name: g["auc"] for name, g in groups.items() if "auc" in g}}
    rows = [("everybody", interval(result["auc"]))]
    rows += [(name, interval(group["auc"]) if "auc" in group else withheld(group)) for name, group in groups.items()]
    figure = None
    if all("low" in auc and "high" in auc for auc in shown.values()):
        values, lows, highs = ([auc[key] for auc in shown.values()] for key in ("value", "low", "high"))
        svg = plots.group_auc(list(shown), values, lows, highs)
        figure = Figure(svg, "AUC with 95\u00a0% intervals, everybody and each group that may be shown.", wide=True)
    by = study.cohort.subgroup or "group"
    note = "Intervals include sampling and privacy noise." if "low" in result["auc"] else ""
    return figure, Table(f"AUC by {by}", (by, "AUC (95\u00a0% interval)"), tuple(rows), note)


def withheld(group: Result) -> str:
    """Why a group has no figure."""
    reason = str(group.get("suppressed", ""))
    return "withheld: else a smaller group could be solved for" if reason == "complement" else f"withheld: {reason}"


def _roc(result: Result) -> tuple[Figure, Table]:
    points = np.array(result["roc"], dtype=float)
    order = np.lexsort((points[:, 1], points[:, 0]))  # noise can make neighbours change places
    x, y = points[order, 0], np.maximum.accumulate(points[order, 1])
    svg = plots.roc_curve(np.column_stack([x, y]).tolist(), f"AUC {interval(result['auc'])}.")
    rows = tuple((percent(rate), percent(float(np.interp(rate, x, y)))) for rate in (0.05, 0.1, 0.2, 0.3, 0.5))
    table = Table("Cases found", ("Controls flagged", "Cases found"), rows, f"AUC {interval(result['auc'])}.")
    return Figure(svg, "ROC curve; the dashed line is chance."), table


def _calibration(study: Study, points: Sequence[Sequence[float]]) -> tuple[Figure, Table]:
    rows = tuple((percent(p, 1), percent(seen, 1)) for p, seen in points)
    note = f"Groups that did not reach ten times the publication floor of {study.publication_floor} are left out."
    figure = Figure(plots.calibration(points), _calibration_caption(points))
    return figure, Table("Calibration", ("Predicted", "Observed"), rows, note)


def _calibration_caption(points: Sequence[Sequence[float]]) -> str:
    said = "Predicted and observed risk; on the dashed line they agree."
    predicted, observed = (points[-1][i] - points[0][i] for i in (0, 1))
    if len(points) >= 3 and predicted > 0:
        if observed > 1.5 * predicted:
            said += " Observed risk spreads wider than predicted: read the score as a rank, not as a risk."
        elif observed < predicted / 1.5:
            said += " Predicted risk spreads wider than observed: high scores promise too much."
    return said


def _histogram(study: Study, name: str, result: Result) -> tuple[Figure | None, Table | None]:
    """Shares by band of the score, read off the ROC; a band below the floor, or that cannot be told, is withheld."""
    sizes = _sizes(study, name, result)
    if sizes is None:
        note = "Withheld: the numbers of cases and controls are not known here, so small bands could not be told."
        return None, Table("Score by outcome", ("Band of the score",), (), note)
    steps = np.diff(np.array(result["roc"], dtype=float), axis=0)[::-1]  # lowest bin first; columns control, case
    bands = [steps[part].sum(axis=0) for part in np.array_split(np.arange(len(steps)), min(BANDS, len(steps)))]
    floor = study.publication_floor
    shares = [[float(v) if v * sizes[j] >= floor else None for j, v in enumerate(band)] for band in bands]
    labels = [str(i + 1) for i in range(len(bands))]
    controls, cases = [band[0] for band in shares], [band[1] for band in shares]
    rows = tuple(
        (label, *(percent(v, 1) if v is not None else f"<{floor} patients" for v in band))
        for label, band in zip(labels, shares, strict=True)
    )
    note = f"Bands of equal width in a public normal reference; fewer than {floor} patients print <{floor}."
    table = Table("Score by outcome", ("Band", "Controls", "Cases"), rows, note)
    return Figure(
        plots.score_histogram(labels, controls, cases), "How the score spreads in controls and in cases.", True
    ), table


def _sizes(study: Study, name: str, result: Result) -> tuple[float, float] | None:
    """(controls, cases): the result's own noisy counts, else from the declared n0 and prevalence; None in exact mode."""
    counts = result.get("sizes")
    if counts is not None:
        return float(counts["controls"]), float(counts["cases"])
    plan = study.analysis(name)
    model = study.analysis(plan.of) if plan.kind == "evaluation" else None
    if plan.mode == "exact" or model is None or model.kind != "glm":
        return None
    held = float(study.cohort.test_fraction)
    fraction = {"test": held, "train": 1 - held}.get(getattr(plan, "part", "test"), 1.0)
    people, cases = study.n0 * fraction, float(model.prevalence)
    return people * (1 - cases), people * cases


def _errors(study: Study, result: Result) -> Table:
    unit = result.get("unit") or "outcome's unit"
    rows = [
        (f"Mean absolute error ({unit})", digits(result["mean_absolute_error"])),
        (f"Root mean squared error ({unit})", digits(result["root_mean_squared_error"])),
        ("Predictions within 20\u00a0% of the truth", percent(result["within_20_percent"], 1)),
    ]
    bounds = [str(p.error_bound) for p in study.analyses if p.kind == "evaluation"]
    note = f"One prediction counts as at most {bounds[0]} {unit} wrong, a public bound." if bounds else ""
    return Table("Errors on the outcome's own scale", ("Measure", "Value"), tuple(rows), note)


# ---- models ---------------------------------------------------------------------------------------------------------


def model(study: Study, name: str, mode: str, result: Result) -> Part:
    """The weights of one model, largest first; intervals only in exact mode."""
    rows = sorted(result["weights"], key=lambda row: -abs(row["standardised"]))
    features = {feature.name: feature for feature in study.features()}
    honest = mode == "exact" and all("se" in row for row in rows)
    words = [sentence(prs_rs.method(study, name))]
    words.append(
        "Intervals are 95\u00a0%, from the information of the pooled fit."
        if honest
        else "No intervals or tests on weights: none under noise has a verified coverage."
    )
    if result.get("converged") is False:
        words.append("The fit did not converge in its rounds: read the weights with care.")
    if result.get("separated"):
        words.append(
            f"Separation: {_listed(result['separated'])} split cases from controls perfectly; their weights grow without end."
        )
    if study.phenotype.transform != "none":
        words.append(
            f"The outcome is modelled as {prs_rs.column_words(study.phenotype)}; weights are on its standardised scale."
        )
    top = rows[:MOST_DOTS]
    lows = [row["standardised"] - Z95 * row["se"] for row in top] if honest else None
    highs = [row["standardised"] + Z95 * row["se"] for row in top] if honest else None
    svg = plots.forest(name, [row["name"] for row in top], [row["standardised"] for row in top], lows, highs)
    return Part(
        name,
        tuple(words),
        ((Figure(svg, _forest_caption(len(rows), honest), True), _weights(result, rows, features, honest)),),
    )


def _forest_caption(n: int, honest: bool) -> str:
    first = f"The {MOST_DOTS} largest of {n} weights" if n > MOST_DOTS else "All weights"
    return f"{first}, for one standard deviation of the feature" + (", with 95\u00a0% intervals." if honest else ".")


def _weights(result: Result, rows: Sequence[Result], features: Mapping[str, Feature], honest: bool) -> Table:
    head = ("Feature", "Kind", "For one SD", *(("95\u00a0% interval",) if honest else ()), "Per unit")
    body = []
    for row in rows[:MOST_WEIGHTS]:
        feature = features.get(row["name"])
        cells = [row["name"], _per(row, feature), digits(row["standardised"])]
        if honest:
            cells.append(
                f"{digits(row['standardised'] - Z95 * row['se'], 3)} to {digits(row['standardised'] + Z95 * row['se'], 3)}"
            )
        body.append((*cells, digits(row["per_unit"])))
    note = f"Intercept {digits(result['intercept_raw'])} on raw features, {digits(result['intercept'])} on standardised ones."
    if len(rows) > MOST_WEIGHTS:
        note += f" The {MOST_WEIGHTS} largest of {len(rows)}; all are in results.json."
    return Table("Weights", head, tuple(body), note, words=(1,))


def _per(row: Result, feature: Feature | None) -> str:
    if row["kind"] == "variant":
        return "variant, per copy of the effect allele"
    if feature is not None and feature.level:
        return "category, against the first"
    return str(row["kind"])


# ---- everything else ------------------------------------------------------------------------------------------------


def other(study: Study, name: str, result: Result) -> Part:
    """An analysis without a page of its own: its single figures; the rest is in results.json."""
    words = [sentence(prs_rs.method(study, name))]
    table = _scalars(result, skip=set())
    lists = [key for key, value in result.items() if isinstance(value, list | dict) and "value" not in value]
    if lists:
        words.append(f"In full in results.json: {_listed(lists)}.")
    return Part(name, tuple(words), ((None, table),) if table is not None else ())


def _scalars(result: Result, skip: set[str]) -> Table | None:
    rows = []
    for key, value in result.items():
        label = key.replace("_", " ")
        if key in skip or isinstance(value, bool | None):
            continue
        if isinstance(value, int | float):
            rows.append((label, digits(value)))
        elif isinstance(value, str):
            rows.append((label, value))
        elif isinstance(value, dict) and isinstance(value.get("value"), int | float):
            bounds = (
                f" ({digits(value['low'])} to {digits(value['high'])})" if "low" in value and "high" in value else ""
            )
            rows.append((label, digits(value["value"]) + bounds))
        elif isinstance(value, dict) and "suppressed" in value:
            rows.append((label, withheld(value)))
    return Table("Further measures", ("Measure", "Value"), tuple(rows)) if rows else None


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
