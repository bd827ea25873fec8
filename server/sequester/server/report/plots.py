"""The report's figures as inline SVG: the same numbers give the same bytes, no script, nothing fetched.

Figures carry a title and a description for screen readers, text stays text, colours also differ in lightness. Everything
drawn stands in a table beside the figure. `name` is the analysis: ids are unique on the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

INK, MUTED, GRID = "#1c2b33", "#5b6b73", "#dfe5e8"
TEAL, AMBER = "#0f6e78", "#c2660a"

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
