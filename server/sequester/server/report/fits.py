"""What a fit tells beside its weights: the choice of its penalty, its baseline hazard, the prior of its sums."""

from __future__ import annotations

from sequester.protocols.study import Study
from sequester.server.report import plots
from sequester.server.report.pieces import Figure, Pairs, Result, Table, digits, percent

MOST_INTERVALS = 120
SHOWN = {"folds", "interval", "unit"}  # single figures that stand in a table here


def beside(study: Study, name: str, result: Result) -> Pairs:
    """Figures and tables of what the result holds of these; none of an ordinary fit."""
    pairs: Pairs = []
    if result.get("grid"):
        pairs.append(_grid(name, result))
    if result.get("baseline_hazard"):
        pairs.append((None, _hazard(result)))
    if result.get("prior"):
        pairs.append((None, _prior(result["prior"])))
    return pairs


def _grid(name: str, result: Result) -> tuple[Figure, Table]:
    """Each declared strength against the error of left-out patients; the chosen one is marked."""
    grid, chosen = result["grid"], result["strength"]
    rows = tuple(
        (digits(row["strength"]), digits(row["mean_squared_error"], 5), "chosen" if row["strength"] == chosen else "")
        for row in grid
    )
    note = f"Mean squared error of patients left out in {result['folds']} folds, on the outcome's standardised scale."
    if chosen in (grid[0]["strength"], grid[-1]["strength"]):
        note += " The chosen strength is the end of the grid: a strength beyond it may do better."
    strengths, errors = ([row[key] for row in grid] for key in ("strength", "mean_squared_error"))
    figure = Figure(plots.strengths(name, strengths, errors, chosen), "The penalty with the smallest error was chosen.")
    return figure, Table("Strength of the penalty", ("Strength", "Error", ""), rows, note, words=(2,))


def _hazard(result: Result) -> Table:
    """Of a patient whose every feature is at its centre."""
    rates, width = result["baseline_hazard"], float(result["interval"])
    rows = tuple(
        (f"{digits(k * width, 4)} to {digits((k + 1) * width, 4)}", percent(rate, 2))
        for k, rate in enumerate(rates[:MOST_INTERVALS])
    )
    unit = f", {result['unit']}" if result.get("unit") else ""
    note = "Chance of the event in an interval for who reaches it, every feature at its centre."
    if len(rates) > MOST_INTERVALS:
        note += f" The first {MOST_INTERVALS} of {len(rates)} intervals; all are in results.json."
    return Table("Baseline hazard", (f"Interval{unit}", "Hazard"), rows, note)


def _prior(prior: Result) -> Table:
    rows = (
        ("Share of features with an effect", percent(prior["slab"], 1)),
        ("Variance of their sums beyond noise", digits(prior["tau2"])),
        ("Variance of noise in a sum", digits(prior["v"])),
    )
    return Table("What the sums were shrunk by", ("Measure", "Value"), rows, "A spike and a slab, fitted to the sums.")
