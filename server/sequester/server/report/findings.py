"""How good a model is, as sentences, tables and figures: from the results alone, as they were released.

Nothing is recomputed from cells. An interval is printed only where the analysis gives one; a group that is withheld
stays withheld.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sequester.protocols.study import Study
from sequester.server.report import plots, prs_rs
from sequester.server.report.pieces import (
    Figure,
    Part,
    Result,
    Table,
    Tile,
    digits,
    listed,
    percent,
    scalars,
    sentence,
    withheld,
)

BANDS = 10
GENOME_WIDE = 5e-8  # the usual limit of a scan


@dataclass(frozen=True, slots=True)
class Headline:
    """The first page's sentence and figures."""

    verdict: str
    tiles: tuple[Tile, ...] = ()
    warnings: tuple[str, ...] = ()
    groups: str = ""


def interval(auc: Result) -> str:
    """`0.74 (0.71 to 0.77)`; without the bracket where no interval is given."""
    if "low" not in auc or "high" not in auc:
        return f"{auc['value']:.3f}"
    return f"{auc['value']:.3f} ({auc['low']:.3f} to {auc['high']:.3f})"


# ---- the first page -------------------------------------------------------------------------------------------------


def headline(study: Study, analyses: Mapping[str, Result]) -> Headline:
    """The verdict on the first evaluation, else on the first scan; its figures, and what a reader must know about them."""
    name = next((p.name for p in study.analyses if p.kind == "evaluation" and p.name in analyses), None)
    if name is None:
        scan = next((p.name for p in study.analyses if p.kind == "association" and p.name in analyses), None)
        if scan is not None and "table" in analyses[scan]["result"]:
            return _scan_headline(analyses[scan]["result"])
        return Headline("The study ran its analyses and evaluated no model on other patients.")
    result: Result = analyses[name]["result"]
    on = prs_rs.part_words(study, name)
    if "suppressed" in result:
        return Headline(f"Too few patients to say how good the model is: the count is {result['suppressed']}.")
    if "auc" in result:
        return _discrimination_headline(study, result, on)
    if "c_index" in result:
        return _time_headline(result, on)
    if "mean_absolute_error" in result:
        return _error_headline(result, on)
    return Headline(f"The study evaluated its model on {on}; the measures are below.")


def _scan_headline(result: Result) -> Headline:
    p = [p for p, error in zip(result["table"]["p"], result["table"]["error"], strict=True) if not error]
    hits, inflation = sum(1 for value in p if value < GENOME_WIDE), result.get("lambda")
    said = f"{hits:,} of {len(p):,} variants" if hits else f"None of {len(p):,} variants"
    tiles = [
        Tile("Variants below 5\u00a0×\u00a010⁻⁸", f"{hits:,}", f"of {len(p):,} tested in {result['people']:,} people")
    ]
    if inflation is not None:
        tiles.append(Tile("Lambda", f"{inflation:.3f}", "1 by chance; confounding makes it larger"))
    return Headline(f"{said} went with the outcome below the limit of a genome-wide scan.", tuple(tiles))


def _time_headline(result: Result, on: str) -> Headline:
    index = float(result["c_index"])
    said = f"Of 100 pairs of patients, the model scores the one with the earlier event higher in {100 * index:.0f}; chance would "
    tiles = [Tile("C-index", f"{index:.3f}", "no interval: none with verified coverage")]
    warnings: tuple[str, ...] = ()
    shown = {name: float(group["c_index"]) for name, group in result.get("groups", {}).items() if "c_index" in group}
    if len(shown) >= 2:
        worst, best = min(shown, key=lambda g: shown[g]), max(shown, key=lambda g: shown[g])
        words = f"{worst} {shown[worst]:.3f}, {best} {shown[best]:.3f}; without intervals, so chance may explain it"
        tiles.append(Tile("Equity gap in C-index", f"{shown[best] - shown[worst]:.3f}", words))
    elif not result.get("groups"):
        warnings = ("No equity gap: the study names no groups to compare.",)
    return Headline(f"{said}be 50. Measured on {on}.", tuple(tiles), warnings)


def _discrimination_headline(study: Study, result: Result, on: str) -> Headline:
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
        if names := hidden(result["groups"]):
            warnings.append(f"No figures for {listed(names)}: too few patients, or withheld to protect such a group.")
    else:
        warnings.append("No equity gap: the study names no groups to compare.")
    shown = [f"{name} {interval(g['auc'])}" for name, g in result.get("groups", {}).items() if "auc" in g]
    by = f"AUC by {study.cohort.subgroup}: {'; '.join(shown)}." if shown else ""
    return Headline(said, tuple(tiles), tuple(warnings), by)


def _error_headline(result: Result, on: str) -> Headline:
    unit = f" {result['unit']}" if result.get("unit") else ""
    error, within = result["mean_absolute_error"], result.get("within_20_percent")
    said = f"Predictions are {digits(error, 3)}{unit} away from the truth on average, measured on {on}."
    tiles = [
        Tile(
            f"Mean absolute error{f', {unit.strip()}' if unit else ''}",
            digits(error, 3),
            "no interval: none with verified coverage",
        )
    ]
    if within is not None:
        said += f" {100 * within:.0f} of 100 lie within 20\u00a0% of it."
        tiles.append(Tile("Within 20\u00a0%", f"{100 * within:.0f}\u00a0%", "of predictions, of the true value"))
    return Headline(said, tuple(tiles), ("No figures by group: this evaluation opens none.",))


def hidden(groups: Mapping[str, Result]) -> list[str]:
    """Names of the groups of whom nothing is told."""
    return [name for name, group in groups.items() if "suppressed" in group]


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
    else:
        words += "; without intervals, so chance may explain it"
    return float(gap), words


# ---- evaluations ----------------------------------------------------------------------------------------------------


def evaluation(study: Study, name: str, result: Result) -> Part:
    """One evaluation: groups, ROC, calibration, scores by outcome, errors."""
    words = [sentence(prs_rs.method(study, name))]
    if "suppressed" in result:
        return Part(name, (*words, f"Withheld: {result['suppressed']} patients."))
    pairs: list[tuple[Figure | None, Table | None]] = []
    if result.get("groups"):
        pairs.append(_groups(study, name, result) if "auc" in result else (None, _measured_groups(study, result)))
    if result.get("roc"):
        pairs.append(_roc(name, result))
    if result.get("calibration"):
        pairs.append(_calibration(study, name, result["calibration"]))
    if result.get("deciles"):
        pairs.append(_tenths(name, result))
    if result.get("roc"):
        pairs.append(_histogram(study, name, result))
    if result.get("bands"):
        pairs.append((None, _bands(study, result["bands"])))
    if "mean_absolute_error" in result:
        pairs.append((None, _errors(study, name, result)))
    shown = {
        "auc",
        "unit",
        "mean_absolute_error",
        "root_mean_squared_error",
        "top_against_bottom_odds",
        *TWENTY_PERCENT,
    }
    rest = scalars(result, skip=shown)
    if rest is not None:
        pairs.append((None, rest))
    return Part(name, tuple(words), tuple(pairs))


def _groups(study: Study, name: str, result: Result) -> tuple[Figure | None, Table]:
    groups: Mapping[str, Result] = result["groups"]
    shown = {"everybody": result["auc"], **{name: g["auc"] for name, g in groups.items() if "auc" in g}}
    rows = [("everybody", interval(result["auc"]))]
    rows += [(name, interval(group["auc"]) if "auc" in group else withheld(group)) for name, group in groups.items()]
    figure = None
    if all("low" in auc and "high" in auc for auc in shown.values()):
        values, lows, highs = ([auc[key] for auc in shown.values()] for key in ("value", "low", "high"))
        svg = plots.group_auc(name, list(shown), values, lows, highs)
        figure = Figure(svg, "AUC with 95\u00a0% intervals, everybody and each group that may be shown.", wide=True)
    by = study.cohort.subgroup or "group"
    what = "sampling" if study.analysis(name).mode == "exact" else "sampling and privacy noise"
    said = [f"95\u00a0% intervals include {what}."] if any("low" in auc for auc in shown.values()) else []
    said += [f"No interval for {name}: {auc['no_interval']}." for name, auc in shown.items() if "no_interval" in auc]
    note = " ".join(said)
    return figure, Table(f"AUC by {by}", (by, "AUC (95\u00a0% interval)"), tuple(rows), note)


def _measured_groups(study: Study, result: Result) -> Table:
    """Of a time or a quantity: its first measure, for everybody and each group."""
    measure = "c_index" if "c_index" in result else "mean_absolute_error"
    rows = [
        (name, digits(group[measure], 3) if measure in group else withheld(group))
        for name, group in (("everybody", result), *result["groups"].items())
    ]
    by, called = study.cohort.subgroup or "group", sentence(measure.replace("_", " ")).rstrip(".")
    return Table(f"{called} by {by}", (by, called), tuple(rows), "")


def _roc(name: str, result: Result) -> tuple[Figure, Table]:
    points = np.array(result["roc"], dtype=float)
    order = np.lexsort((points[:, 1], points[:, 0]))  # noise can make neighbours change places
    x, y = points[order, 0], np.maximum.accumulate(points[order, 1])
    svg = plots.roc_curve(name, np.column_stack([x, y]).tolist(), f"AUC {interval(result['auc'])}.")
    rows = tuple((percent(rate), percent(float(np.interp(rate, x, y)))) for rate in (0.05, 0.1, 0.2, 0.3, 0.5))
    table = Table("Cases found", ("Controls flagged", "Cases found"), rows, f"AUC {interval(result['auc'])}.")
    return Figure(svg, "ROC curve; the dashed line is chance."), table


def _calibration(study: Study, name: str, points: Sequence[Sequence[float]]) -> tuple[Figure, Table]:
    rows = tuple((percent(p, 1), percent(seen, 1)) for p, seen in points)
    note = f"Groups that did not reach ten times the publication floor of {study.publication_floor} are left out."
    figure = Figure(plots.calibration(name, points), _calibration_caption(points))
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


def _tenths(name: str, result: Result) -> tuple[Figure, Table]:
    shares: Sequence[float] = result["deciles"]
    overall = sum(shares) / len(shares)
    rows = tuple(
        (str(k + 1), percent(share, 1), f"{share / overall:.2f}" if overall else "—") for k, share in enumerate(shares)
    )
    note = "A tenth of the patients each, by score."
    if "top_against_bottom_odds" in result:
        note += f" Odds of the highest tenth over those of the lowest: {digits(result['top_against_bottom_odds'], 3)}."
    table = Table("Cases by tenth of the score", ("Tenth", "Cases", "Against everybody"), rows, note)
    return Figure(
        plots.tenths(name, shares, overall), "Share of cases in each tenth; the dashed line is everybody."
    ), table


def _bands(study: Study, bands: Sequence[Result]) -> Table:
    keys = ("within_20_percent", "under", "over")
    rows = tuple(
        (str(row["band"]), *(percent(row[key], 1) for key in keys))
        if keys[0] in row
        else (str(row["band"]), withheld(row), "", "")
        for row in bands
    )
    unit = f" ({study.phenotype.unit})" if study.phenotype.unit else ""
    head = (f"Actual value{unit}", "Within 20\u00a0%", "Too low", "Too high")
    return Table("Predictions by the actual value", head, rows, "Too low and too high: by more than 20\u00a0% of it.")


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
        plots.score_histogram(name, labels, controls, cases), "How the score spreads in controls and in cases.", True
    ), table


def _sizes(study: Study, name: str, result: Result) -> tuple[float, float] | None:
    """(controls, cases): the result's own noisy counts, else from the declared n0 and prevalence; None in exact mode."""
    counts = result.get("sizes")
    if counts is not None:
        return float(counts["controls"]), float(counts["cases"])
    plan = study.analysis(name)
    model = study.analysis(plan.of) if plan.kind == "evaluation" else None
    if model is not None and model.kind == "heads":
        model = study.analysis(model.of)
    if plan.mode == "exact" or model is None or model.kind not in ("glm", "training") or model.family != "logistic":
        return None
    held = float(study.cohort.test_fraction)
    fraction = {"test": held, "train": 1 - held}.get(getattr(plan, "part", "test"), 1.0)
    people, cases = study.n0 * fraction, float(model.prevalence)
    return people * (1 - cases), people * cases


TWENTY_PERCENT = {
    "within_20_percent": "Predictions within 20\u00a0% of the truth",
    "over_by_20_percent": "Predictions more than 20\u00a0% too high",
    "under_by_20_percent": "Predictions more than 20\u00a0% too low",
}


def _errors(study: Study, name: str, result: Result) -> Table:
    unit = result.get("unit") or "outcome's unit"
    rows = [
        (f"Mean absolute error ({unit})", digits(result["mean_absolute_error"])),
        (f"Root mean squared error ({unit})", digits(result["root_mean_squared_error"])),
        *((said, percent(result[key], 1)) for key, said in TWENTY_PERCENT.items() if key in result),
    ]
    bound = getattr(study.analysis(name), "error_bound", None)
    note = f"One prediction counts as at most {bound} {unit} wrong, a public bound." if bound is not None else ""
    return Table("Errors on the outcome's own scale", ("Measure", "Value"), tuple(rows), note)
