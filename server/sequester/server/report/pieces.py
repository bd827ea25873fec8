"""What the page is made of: tables, figures, tiles, parts; and how a figure becomes text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]


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


Pairs = list[tuple[Figure | None, Table | None]]


@dataclass(frozen=True, slots=True)
class Part:
    """One analysis on the page; `pairs` are figures with their tables beside them."""

    title: str
    words: tuple[str, ...]
    pairs: tuple[tuple[Figure | None, Table | None], ...] = ()


def digits(value: float, n: int = 4) -> str:
    """`n` significant digits, whole numbers in full, a true minus sign."""
    whole = isinstance(value, int) or 10**n <= abs(value) < 1e15
    text = f"{value:,.0f}" if whole else f"{value:.{n}g}"
    return text.replace("-", "−")


def sentence(text: str) -> str:
    """Its first letter large, a full stop at the end."""
    return text[:1].upper() + text[1:].rstrip(".") + "."


def p_value(p: float) -> str:
    """`0.031`, two digits where it is small, `<1e−300` where it cannot be told from 0."""
    if p < 1e-300:
        return "<1e−300"
    return f"{p:.2g}".replace("-", "−") if p < 0.001 else f"{p:.3f}"


def percent(share: float, decimals: int = 0) -> str:
    """`74 %`, the space not broken."""
    return f"{100 * share:.{decimals}f}\u00a0%".replace("-", "−")


def withheld(group: Result) -> str:
    """Why a group has no figure."""
    reason = str(group.get("suppressed", ""))
    return "withheld: else a smaller group could be solved for" if reason == "complement" else f"withheld: {reason}"


_LABELS = {
    "n": "People", "r2": "R²", "auc": "AUC", "brier": "Brier score (mean squared error of the risk; 0 is best)",
    "nagelkerke_r2": "R² (Nagelkerke)", "observed_r2": "R² (observed scale)", "liability_r2": "R² (liability scale)",
    "observed_over_expected": "Observed over expected cases", "c_index": "C-index (0.5 is chance)",
    "average_precision": "Average precision (share of cases is chance)",
}  # fmt: skip


def scalars(result: Result, skip: set[str]) -> Table | None:
    """A table of the single figures of a result that nothing else shows, None where there are none."""
    rows = []
    for key, value in result.items():
        label = _LABELS.get(key, sentence(key.replace("_", " ")).rstrip("."))
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


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
