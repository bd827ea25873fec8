"""Survival curves, calibration, reclassification and heterogeneity, as figures and tables: from the results as released.

What is withheld in the results stays withheld; numbers at risk are printed where the analysis gives them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sequester.protocols.analyses.reclassification import ReclassificationPlan
from sequester.protocols.study import Study
from sequester.server.report import plots, prs_rs
from sequester.server.report.pieces import (
    Figure,
    Pairs,
    Part,
    Result,
    Table,
    digits,
    p_value,
    percent,
    scalars,
    sentence,
    withheld,
)

MOST_TIMES = 8


def survival(study: Study, name: str, result: Result) -> Part:
    """Kaplan-Meier curves with intervals where there are any, survival and numbers at risk at some of the times."""
    words = [sentence(prs_rs.method(study, name))]
    curves: Mapping[str, Result] = result["curves"]
    shown = {group: curve["points"] for group, curve in curves.items() if curve.get("points")}
    unit = str(result.get("unit", ""))
    words += [f"No curve of {group}: {withheld(curve)}." for group, curve in curves.items() if "suppressed" in curve]
    if not shown:
        return Part(name, (*words, "No curve may be shown."))
    pairs: Pairs = []
    banded = all("low" in point for points in shown.values() for point in points)
    caption = "Share of patients without the event" + (", with 95\u00a0% intervals." if banded else ".")
    if not banded:
        caption += " No intervals: none under noise has a verified coverage."
    figure = Figure(plots.survival(name, shown, unit), caption, wide=True)
    times = _round_times(max(points[-1]["time"] for points in shown.values()))
    head = ("Group", *(digits(time, 3) for time in times))
    after = f" after … {unit}" if unit else " after"
    at = {group: [_latest(points, time) for time in times] for group, points in shown.items()}
    rows = [(group, *("—" if p is None else percent(p["survival"], 1) for p in of)) for group, of in at.items()]
    pairs.append((figure, Table(f"Without the event{after}", head, tuple(rows))))
    if any("at_risk" in p for of in at.values() for p in of if p is not None):
        rows = [
            (group, *("—" if p is None or "at_risk" not in p else f"{round(p['at_risk']):,}" for p in of))
            for group, of in at.items()
        ]
        note = f"At the last point of the curve up to that time; not printed below {study.publication_floor} at risk."
        if study.analysis(name).mode == "private":
            note += " With noise."
        pairs.append((None, Table(f"Numbers at risk{after}", head, tuple(rows), note)))
    return Part(name, tuple(words), tuple(pairs))


def calibration(study: Study, name: str, result: Result) -> Part:
    """Observed risk by predicted risk, slope and intercept where they are opened, for everybody and by group."""
    words = [sentence(prs_rs.method(study, name))]
    if "suppressed" in result:
        return Part(name, (*words, f"Withheld: {result['suppressed']} patients."))
    pairs: Pairs = []
    points: Sequence[Sequence[float]] = result["bins"]
    if points:
        rows = tuple((percent(p, 1), percent(seen, 1)) for p, seen in points)
        note = "Bins between public edges; those with too few patients are left out."
        figure = Figure(plots.calibration(name, points), "Predicted and observed risk; on the dashed line they agree.")
        pairs.append((figure, Table("Calibration", ("Predicted", "Observed"), rows, note)))
    everybody = {"everybody": result, **result.get("groups", {})}
    columns = [c for c in ("observed_over_expected", "slope", "intercept", "expected_calibration_error") if c in result]
    head = ("Group", *(_CALIBRATION[c] for c in columns))
    body = [
        (group, *(_with_interval(found.get(c)) for c in columns)) if "suppressed" not in found
        else (group, withheld(found), *("" for _ in columns[1:]))
        for group, found in everybody.items()
    ]  # fmt: skip
    note = "Slope below 1: high risks promise too much. Observed over expected above 1: risks are too low."
    if "slope" not in result:
        note += " Slope and intercept are not released under noise."
    pairs.append((None, Table("By group", head, tuple(body), note)))
    return Part(name, tuple(words), tuple(pairs))


_CALIBRATION = {
    "observed_over_expected": "Observed / expected", "slope": "Slope", "intercept": "Intercept",
    "expected_calibration_error": "Mean gap",
}  # fmt: skip


def _with_interval(value: object) -> str:
    if isinstance(value, Mapping):
        ends = f" ({digits(value['low'], 3)} to {digits(value['high'], 3)})" if "low" in value else ""
        return digits(value["value"], 3) + ends
    return "—" if not isinstance(value, int | float) else digits(value, 3)


def reclassification(study: Study, name: str, result: Result) -> Part:
    """Net reclassification by group, and the decision curves of the old and the new model."""
    plan = study.analysis(name)
    assert isinstance(plan, ReclassificationPlan)
    words = [sentence(prs_rs.method(study, name))]
    if "suppressed" in result:
        return Part(name, (*words, f"Withheld: {result['suppressed']} patients."))
    everybody = {"everybody": result, **result.get("groups", {})}
    body = [
        (group, withheld(found), "", "") if "suppressed" in found
        else (group, *(_signed(found[c]) for c in ("events", "non_events", "net_reclassification")))
        for group, found in everybody.items()
    ]  # fmt: skip
    note = "Share that moves to a better category less the share that moves to a worse one; the net is the sum of both."
    note += "" if plan.mode == "exact" else " With noise and without intervals: none has a verified coverage."
    moved = Table(f"{plan.of} against {plan.against}", ("Group", "Of cases", "Of controls", "Net"), tuple(body), note)
    rows: Sequence[Result] = result["net_benefit"]
    thresholds = [float(row["threshold"]) for row in rows]
    lines = {
        "treat everybody": [float(r["treat_all"]) for r in rows], plan.against: [float(r["old"]) for r in rows],
        plan.of: [float(r["new"]) for r in rows],
    }  # fmt: skip
    head = ("Treat from a risk of", *lines)
    table = Table(
        "Net benefit", head,
        tuple(
            (percent(t, 1), *(f"{values[k]:.4f}".replace("-", "−") for values in lines.values()))
            for k, t in enumerate(thresholds)
        ),
        "Cases found for each patient, less the controls treated, weighed by the threshold's odds. Treating nobody is 0.",
    )  # fmt: skip
    figure = Figure(
        plots.decision(name, thresholds, lines),
        "Net benefit of treating by each model: the higher line is better.",
        True,
    )
    return Part(name, tuple(words), ((None, moved), (figure, table)))


def _signed(value: float) -> str:
    return f"{100 * value:+.1f}\u00a0%".replace("-", "−")


def heterogeneity(study: Study, name: str, result: Result) -> Part:
    """Q and I2 of each term over hospitals."""
    rows = [
        (
            row["term"],
            str(row["hospitals"]),
            *(
                (
                    f"{digits(row['effect'], 3)} ({digits(row['se'], 2)})",
                    digits(row["q"], 3),
                    p_value(row["p"]),
                    percent(row["i2"]),
                )
                if "q" in row
                else ("—", "—", row.get("not_tested", "not tested"), "—")
            ),
        )
        for row in result["terms"]
    ]
    head = ("Term", "Hospitals", "Mean effect (SE)", "Q", "p", "I²")
    note = "A small p: the hospitals' own estimates lie further apart than chance explains. No hospital's estimate was opened."
    rest = scalars(result, {"terms"})
    pairs: Pairs = [(None, Table("Heterogeneity between hospitals", head, tuple(rows), note))]
    return Part(name, (sentence(prs_rs.method(study, name)),), (*pairs, *(((None, rest),) if rest else ())))


def _round_times(last: float) -> list[float]:
    """At most `MOST_TIMES` multiples of 1, 2 or 5 times a power of ten, up to the last."""
    power = 10.0 ** math.floor(math.log10(last / MOST_TIMES))
    step = next(power * k for k in (1, 2, 5, 10) if last / (power * k) <= MOST_TIMES + 1e-9)
    return [k * step for k in range(1, int(last / step + 1e-9) + 1)]


def _latest(points: Sequence[Mapping[str, float]], time: float) -> Mapping[str, float] | None:
    """The last point up to that time, None where the curve has ended before it or not begun."""
    before = [point for point in points if point["time"] <= time + 1e-9]
    return before[-1] if before and time <= points[-1]["time"] + 1e-9 else None
