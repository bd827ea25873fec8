"""The report's figures as inline SVG: the same numbers give the same bytes, no script, nothing fetched.

Figures carry a title and a description for screen readers, text stays text, colours also differ in lightness. Everything
drawn stands in a table beside the figure. `name` is the analysis: ids are unique on the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[Any]

INK, MUTED, GRID = "#1c2b33", "#5b6b73", "#dfe5e8"
TEAL, AMBER = "#0f6e78", "#c2660a"
PALETTE = (TEAL, AMBER, "#5a4a9c", "#8a8d1f", "#a83258", "#3d5566")

MOST_SCORE = 30  # -log10 p drawn in a scan
CELLS = (500, 180)  # of a plot of many dots, across and up: what a reader can tell apart

Point = Sequence[float]


def roc_curve(name: str, points: Sequence[Point], auc: str) -> str:
    """Share of cases found against share of controls flagged; `points` are [false, true] from (0, 0) to (1, 1)."""

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.fill_between([p[0] for p in points], [p[1] for p in points], color=TEAL, alpha=0.10, linewidth=0)
        axes.plot([p[0] for p in points], [p[1] for p in points], color=TEAL, linewidth=2)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="Controls flagged", ylabel="Cases found", aspect="equal")
        _percent(axes, "xy")

    return _svg(f"roc-{name}", draw, (3.9, 3.7), "ROC curve", f"Cases found against controls flagged. {auc}")


def calibration(name: str, points: Sequence[Point]) -> str:
    """Observed share of cases against the mean predicted risk."""
    reach = min(1.0, max(0.05, 1.12 * max(max(p) for p in points)))

    def draw(axes: Any) -> None:
        axes.plot([0, reach], [0, reach], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.plot([p[0] for p in points], [p[1] for p in points], color=TEAL, linewidth=1.2)
        axes.scatter([p[0] for p in points], [p[1] for p in points], color=TEAL, s=26, zorder=3)
        axes.set(
            xlim=(0, reach), ylim=(0, reach), xlabel="Predicted risk", ylabel="Observed share of cases", aspect="equal"
        )
        _percent(axes, "xy")

    words = f"{len(points)} groups of patients; on the dashed line prediction and observation agree."
    return _svg(f"calibration-{name}", draw, (3.9, 3.7), "Calibration", words)


def score_histogram(
    name: str, labels: Sequence[str], controls: Sequence[float | None], cases: Sequence[float | None]
) -> str:
    """Share of controls and of cases in each band of the score; a withheld band has no bar."""

    def draw(axes: Any) -> None:
        at = range(len(labels))
        axes.bar([i - 0.2 for i in at], [v or 0 for v in controls], 0.38, color="#8fb8bd", label="controls")
        axes.bar([i + 0.2 for i in at], [v or 0 for v in cases], 0.38, color=AMBER, label="cases")
        axes.set_xticks(list(at), labels)
        axes.set(xlabel="Band of the score, low to high", ylabel="Share of the group")
        axes.legend(frameon=False, loc="upper right", ncols=2, bbox_to_anchor=(1, 1.14), handlelength=1)
        _percent(axes, "y")

    return _svg(
        f"histogram-{name}",
        draw,
        (7.4, 2.9),
        "Score by outcome",
        "Share of controls and cases in each band of the score.",
    )


def group_auc(
    name: str, names: Sequence[str], values: Sequence[float], lows: Sequence[float], highs: Sequence[float]
) -> str:
    """AUC of everybody (first row) and of each group with its interval, on one line each."""

    def draw(axes: Any) -> None:
        _intervals(axes, names, values, lows, highs, highlight=0)
        axes.axvline(0.5, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.set(xlabel="AUC (0.5 is chance)", xlim=(min(0.45, *lows) - 0.02, min(1.0, max(highs) + 0.03)))

    words = "; ".join(f"{n} {v:.3f}" for n, v in zip(names, values, strict=True))
    return _svg(f"groups-{name}", draw, (7.4, 0.9 + 0.34 * len(names)), "AUC by group", words)


def forest(
    name: str,
    labels: Sequence[str],
    values: Sequence[float],
    lows: Sequence[float] | None,
    highs: Sequence[float] | None,
) -> str:
    """Weights on the standardised scale, intervals only where they are given."""

    def draw(axes: Any) -> None:
        _intervals(axes, labels, values, lows, highs)
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set(xlabel="Standardised weight")

    said = "with 95 % intervals" if lows is not None else "without intervals"
    words = f"The weights of {len(labels)} features, {said}."
    return _svg(f"forest-{name}", draw, (7.4, 0.8 + 0.27 * len(labels)), "Weights", words)


def strengths(name: str, values: Sequence[float], errors: Sequence[float], chosen: float) -> str:
    """Error of left-out patients by the strength of the penalty, on a logarithmic axis; the chosen one is marked."""

    def draw(axes: Any) -> None:
        axes.plot(values, errors, color=TEAL, linewidth=1.2, marker="o", markersize=5)
        axes.axvline(chosen, color=AMBER, linewidth=1, linestyle=(0, (4, 3)))
        axes.set(xscale="log", xlabel="Strength of the penalty", ylabel="Error of left-out patients")
        axes.minorticks_off()

    words = f"{len(values)} strengths; {chosen:.3g} was chosen, with an error of {min(errors):.4g}."
    return _svg(f"strengths-{name}", draw, (3.9, 3.2), "Choice of the penalty", words)


def manhattan(name: str, chromosome: Vector, position: Vector, score: Vector) -> str:
    """-log10 p (`score`) of variants in the order of the genome; chromosomes change colour, one alone is drawn in Mb.

    What lies beyond `MOST_SCORE` is a triangle there, so that one strong variant does not press all others flat.
    """
    starts, ticks, at = {}, [], 0.0
    for c in np.unique(chromosome):
        mine = position[chromosome == c]
        starts[int(c)] = at - float(mine.min())
        width = max(float(mine.max() - mine.min()), 1.0)
        ticks.append((at + width / 2, str(c)))
        at += 1.03 * width
    alone = len(starts) == 1
    x = position / 1e6 if alone else position + np.array([starts[int(c)] for c in chromosome])
    cell = (_span(x) / CELLS[0], min(_span(score), MOST_SCORE) / CELLS[1])

    def draw(axes: Any) -> None:
        for k, c in enumerate(starts):
            colour, mine = (TEAL, "#7fa9ad")[k % 2], chromosome == c
            inside = mine & (score <= MOST_SCORE)
            if inside.any():
                _dots(axes, x[inside], score[inside], colour, 2.6, cell)
            beyond = mine & ~inside
            axes.scatter(x[beyond], np.full(beyond.sum(), MOST_SCORE), marker="^", color=colour, s=24, clip_on=False)
        top = max(min(float(score.max()), MOST_SCORE), -np.log10(5e-8)) * 1.06
        axes.axhline(-np.log10(5e-8), color=AMBER, linewidth=1, linestyle=(0, (4, 3)))
        axes.axhline(5, color=MUTED, linewidth=1, linestyle=(0, (1, 3)))
        axes.set(ylim=(0, top), ylabel="−log₁₀ p", xlim=_margin(x))
        axes.set(xlabel=f"Chromosome {next(iter(starts))}, position in Mb" if alone else "Chromosome")
        axes.grid(axis="x", visible=False)
        if not alone:
            wide = [(place, label) for k, (place, label) in enumerate(ticks) if len(ticks) <= 14 or k < 12 or k % 2]
            axes.set_xticks([place for place, _ in wide], [label for _, label in wide])

    words = f"{len(score)} variants; the smallest p value is 10 to the power of {-float(score.max()):.1f}."
    return _svg(f"manhattan-{name}", draw, (7.4, 3.1), "Manhattan plot", words)


def quantiles(name: str, expected: Vector, observed: Vector, low: Vector, high: Vector) -> str:
    """-log10 p against what it would be by chance, with the band that holds 95 % of chance; largest first."""

    def draw(axes: Any) -> None:
        some = np.unique(np.geomspace(1, len(expected), 200).astype(int) - 1)
        axes.fill_between(expected[some], low[some], high[some], color=MUTED, alpha=0.15, linewidth=0)
        reach = float(expected[0]) * 1.05
        axes.plot([0, reach], [0, reach], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        cell = (_span(expected) / CELLS[0], min(_span(observed), MOST_SCORE) / CELLS[1])
        _dots(axes, expected, np.minimum(observed, MOST_SCORE), TEAL, 3.2, cell)
        axes.set(xlim=(0, reach), ylim=(0, max(min(float(observed.max()), MOST_SCORE), float(high.max())) * 1.05))
        axes.set(xlabel="Expected −log₁₀ p", ylabel="Observed −log₁₀ p")

    return _svg(f"quantiles-{name}", draw, (3.9, 3.7), "QQ plot", f"{len(expected)} p values against those by chance.")


def survival(name: str, curves: Mapping[str, Sequence[Mapping[str, float]]], unit: str) -> str:
    """Kaplan-Meier steps of each group from (0, 1), with the band of its 95 % interval where there is one."""

    def draw(axes: Any) -> None:
        for (group, points), colour in zip(curves.items(), PALETTE * len(curves), strict=False):
            times = [0.0, *(p["time"] for p in points)]
            axes.step(
                times, [1.0, *(p["survival"] for p in points)], where="post", color=colour, linewidth=2, label=group
            )
            if all("low" in p for p in points):
                low, high = ([1.0, *(p[end] for p in points)] for end in ("low", "high"))
                axes.fill_between(times, low, high, step="post", color=colour, alpha=0.14, linewidth=0)
        axes.set(xlabel=f"Time{f' ({unit})' if unit else ''}", ylabel="Without the event", ylim=(0, 1.02))
        axes.set_xlim(left=0)
        if len(curves) > 1:
            axes.legend(frameon=False, loc="lower left", ncols=min(len(curves), 4))
        _percent(axes, "y")

    said = ", ".join(f"{group} {points[-1]['survival']:.2f}" for group, points in curves.items())
    return _svg(f"survival-{name}", draw, (7.4, 3.6), "Kaplan-Meier curves", f"At the last point shown: {said}.")


def decision(name: str, thresholds: Sequence[float], lines: Mapping[str, Sequence[float]]) -> str:
    """Net benefit by the risk from which a patient would be treated; treating nobody is 0."""

    def draw(axes: Any) -> None:
        axes.axhline(0, color=MUTED, linewidth=1)
        for (label, values), colour in zip(lines.items(), (MUTED, AMBER, TEAL), strict=False):
            axes.plot(thresholds, values, color=colour, linewidth=2, marker="o", markersize=4, label=label)
        best = max(max(values) for values in lines.values())
        axes.set(
            xlabel="Risk from which to treat",
            ylabel="Net benefit",
            ylim=(-0.35 * max(best, 1e-6), 1.15 * max(best, 1e-6)),
        )
        axes.legend(frameon=False, loc="upper right")
        _percent(axes, "x")

    words = "; ".join(f"{label} {values[0]:.4f} at the lowest threshold" for label, values in lines.items())
    return _svg(f"decision-{name}", draw, (7.4, 3.1), "Decision curves", words)


def tenths(name: str, shares: Sequence[float], overall: float) -> str:
    """Share of cases in each tenth of the patients by score, lowest first, and of everybody."""

    def draw(axes: Any) -> None:
        axes.bar(range(1, 11), shares, 0.7, color=["#8fb8bd"] * 9 + [AMBER])
        axes.axhline(overall, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xticks(range(1, 11))
        axes.set(xlabel="Tenth of the patients by score, lowest first", ylabel="Share of cases")
        axes.grid(axis="x", visible=False)
        _percent(axes, "y")

    words = f"From {shares[0]:.3f} in the lowest tenth to {shares[-1]:.3f} in the highest; everybody {overall:.3f}."
    return _svg(f"tenths-{name}", draw, (3.9, 3.2), "Share of cases by tenth", words)


def _dots(axes: Any, x: Vector, y: Vector, colour: str, size: float, cell: tuple[float, float]) -> None:
    """Round dots as one path: one for each cell of the plane, (width, height), that holds any: what can be seen."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    _, first = np.unique(np.column_stack([np.rint(x / cell[0]), np.rint(y / cell[1])]), axis=0, return_index=True)
    at = np.column_stack([x[first], y[first]])
    path = Path(np.repeat(at, 2, axis=0), np.tile([Path.MOVETO, Path.LINETO], len(at)))
    path.should_simplify = False  # a line without length is a dot here, not one to leave out
    axes.add_patch(PathPatch(path, edgecolor=colour, facecolor="none", linewidth=size, capstyle="round"))


def _span(values: Vector) -> float:
    return max(float(np.ptp(values)), 1e-9)


def _margin(x: Vector) -> tuple[float, float]:
    return float(x.min()) - 0.015 * _span(x), float(x.max()) + 0.015 * _span(x)


def _intervals(
    axes: Any,
    names: Sequence[str],
    values: Sequence[float],
    lows: Sequence[float] | None,
    highs: Sequence[float] | None,
    highlight: int | None = None,
) -> None:
    rows = list(range(len(names)))[::-1]
    colours = [AMBER if i == highlight else TEAL for i in range(len(names))]
    if lows is not None and highs is not None:
        axes.hlines(rows, lows, highs, color=colours, linewidth=2)
    axes.scatter(values, rows, color=colours, s=30, zorder=3)
    axes.set_yticks(rows, [n if len(n) <= 28 else n[:27] + "…" for n in names])
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def _percent(axes: Any, which: str) -> None:
    from matplotlib.ticker import PercentFormatter

    for letter in which:
        low, high = getattr(axes, f"get_{letter}lim")()
        decimals = 0 if high - low >= 0.1 else 1
        getattr(axes, f"{letter}axis").set_major_formatter(PercentFormatter(1.0, decimals, " %"))


def _svg(name: str, draw: Callable[[Any], None], inches: tuple[float, float], title: str, description: str) -> str:
    import matplotlib  # slow to load: only where a report is made
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none", "svg.hashsalt": f"sequester-{name}", "font.size": 10, "font.family": ["DejaVu Sans"],
        "axes.edgecolor": GRID, "axes.labelcolor": MUTED, "text.color": INK, "xtick.color": MUTED, "ytick.color": INK,
        "xtick.labelcolor": INK, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.8, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "ytick.major.size": 0,
        "text.parse_math": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_visible(False)
        axes = figure.subplots()
        axes.patch.set_visible(False)
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(out.getvalue(), name, title, description)


def _inline(svg: str, name: str, title: str, description: str) -> str:
    """The drawing without prolog, name spaces, style sheet and ids that nothing points to: fit for the middle of an HTML page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if f"#{found[1]}" in svg else "", svg)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)  # markers hash their shape alone
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)  # the page's own face
    svg = re.sub(r"\n\s*", "\n", svg)
    head = f'<svg class="figure" role="img" aria-labelledby="{name}-title {name}-words" '
    titles = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-words">{escape(description)}</desc>'
    first = svg.index(">") + 1
    opening = re.sub(r' (width|height)="[^"]*"', "", svg[4:first])
    return head + opening.strip() + titles + svg[first:].strip()
