"""bench.html: one self-contained page of the figures, their spread and how cost grows."""

from __future__ import annotations

import io
from collections import defaultdict
from html import escape
from typing import Any

_STYLE = """body{font:14px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.5em 0}td,th{padding:.15em .7em;text-align:right;border-bottom:1px solid #ddd}
td:nth-child(1),th:nth-child(1),td:last-child,th:last-child{text-align:left}.no{color:#a00;font-weight:bold}svg{max-width:100%}"""


def html(result: dict[str, Any]) -> str:
    """The page of one run."""
    by_name: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in result["figures"]:
        by_name[row["name"]].append(row)
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    parts = [
        "<!doctype html><meta charset=utf-8><title>Sequester: cost as ratios</title>",
        f"<style>{_STYLE}</style><h1>Sequester: cost as ratios</h1><p>{escape(machine)}</p>",
        "<p>A ratio is what the peer costs over what ours costs, in neighbouring repeats of one run: the median and, as a "
        "bar, the least and the greatest. The line is the bound.</p>",
        _groups(result),
    ]
    parts += [_figure(name, rows) for name, rows in by_name.items()]
    return "\n".join(parts) + "\n"


def _groups(result: dict[str, Any]) -> str:
    cells = [("group", "seconds", "load before, after", "")]
    cells += [
        (g["group"], f"{g['seconds']:.0f}", ", ".join(map(str, g["load"])), g["failed"] or "") for g in result["groups"]
    ]
    return _table(cells)


def _figure(name: str, rows: list[dict[str, Any]]) -> str:
    head = ("cell", "ours", "peer", "ratio", "least", "greatest", "at least", "met", "to last run", "note")
    cells = [head, *(_cells(row) for row in rows)]
    if name.startswith("growth_"):
        plot = _growth(name, rows)
    else:
        plot = _ratios([row for row in rows if row["ratio"]])
    return f"<h2>{escape(name)}</h2>{plot}{_table(cells)}"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    r = row["ratio"] or {}
    number = lambda value: "" if value is None else f"{value:.4g}"  # noqa: E731
    met = {True: "yes", False: "NO", None: ""}[row["met"]]
    return (
        row["cell"], f"{number(row['ours'])} {row['unit']}", number(row["peer"]), number(r.get("median")),
        number(r.get("min")), number(r.get("max")), number(row["at_least"]), met, number(row.get("to_last_run")), row["note"],
    )  # fmt: skip


def _table(rows: list[tuple[str, ...]]) -> str:
    lines = []
    for i, row in enumerate(rows):
        tag = "th" if i == 0 else "td"
        lines.append(
            "<tr>" + "".join(f"<{tag}{' class=no' if c == 'NO' else ''}>{escape(c)}</{tag}>" for c in row) + "</tr>"
        )
    return f"<table>{''.join(lines)}</table>"


def _ratios(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    figure, axes = _axes(0.28 * len(rows) + 0.9)
    for i, row in enumerate(rows):
        r = row["ratio"]
        colour = "#a00" if row["met"] is False else "#06c"
        axes.plot([r["min"], r["max"]], [i, i], color=colour, linewidth=1)
        axes.plot([r["median"]], [i], "o", color=colour, markersize=4)
        if row["at_least"] is not None:
            axes.plot([row["at_least"]] * 2, [i - 0.4, i + 0.4], color="#333", linewidth=1.5)
    axes.set_yticks(range(len(rows)), [row["cell"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    return _svg(figure)


def _growth(name: str, rows: list[dict[str, Any]]) -> str:
    figure, axes = _axes(3.2)
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row["ours"] is not None and "=" in row["cell"]:
            series, _, x = row["cell"].rpartition(" ")
            lines[series].append((float(x.split("=")[1]), row["ours"]))
    for series, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", markersize=4, linewidth=1, label=series)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(name.removeprefix("growth_"))
    axes.legend(fontsize=8)
    return _svg(figure)


def _axes(height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(8, height), layout="constrained")


def _svg(figure: Any) -> str:
    from matplotlib import pyplot

    text = io.StringIO()
    figure.savefig(text, format="svg")
    pyplot.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]
