"""Tables of a page: numbers in three digits, heat where they are bad, and no column that says nothing."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

DASH = "–"
HEATS = 6
"""Steps of heat; 0 is as good as can be."""
_SCALES = {
    "accuracy": (0.5, 1.0),
    "auroc": (0.5, 1.0),
    "average_precision": (0.5, 1.0),
    "f1": (0.5, 1.0),
    "mcc": (0.0, 1.0),
    "tpr": (0.0, 1.0),
    "coverage": (0.0, 1.0),
    "attribute": (0.0, 1.0),
    "precision": (0.0, 1.0),
    "recall": (0.0, 1.0),
    "without": (0.0, 1.0),
    "iou": (0.0, 1.0),
    "giou": (0.0, 1.0),
    "ciou": (0.0, 1.0),
    "pointing": (0.0, 1.0),
    "more": (0.5, 1.0),
    "ece": (0.3, 0.0),
    "nll": (1.0, 0.0),
    "brier": (0.35, 0.0),
    "failure": (0.5, 0.0),
    "disagreement": (0.5, 0.0),
    "error": (0.5, 0.0),
    "called": (0.5, 0.0),
}
"""What is as bad as it gets (chance, where there is one) and what is best, by a word in a metric's name."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: What it shows.
        notes: Smaller lines below.
        reason: Why it shows no value; seen on pointing at it.
        heat: How bad the value is, 0 to ``HEATS``.
        order: What its column is sorted by; None to sort by the text.
    """

    text: str
    notes: tuple[str, ...] = ()
    reason: str = ""
    heat: int = 0
    order: float | None = None


@dataclass(frozen=True)
class Table:
    """A table with one row of headings.

    Attributes:
        head: Headings.
        rows: Cells, as many in each row.
        left_out: What would have been dashes from top to bottom, and why; empty if nothing was.
        pinned: How many rows stay on top however the table is sorted.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    left_out: str = ""
    pinned: int = 0

    def without_dashes(self) -> "Table":
        """Returns the table without columns of nothing but dashes; ``left_out`` says which."""
        kept = [k for k in range(len(self.head)) if k == 0 or any(row[k].text != DASH for row in self.rows)]
        absent = {str(k): self.head[k] for k in range(len(self.head)) if k not in kept}
        reasons = [{"undefined": {key: row[int(key)].reason for key in absent}} for row in self.rows]
        left_out = " ".join(filter(None, (self.left_out, left_out_words(absent, reasons))))
        rows = [[row[k] for k in kept] for row in self.rows]
        return replace(self, head=[self.head[k] for k in kept], rows=rows, left_out=left_out)


def number(value: float | int | None) -> str:
    """Returns a number as tables show it: counts whole, everything else in three digits."""
    if value is None:
        return DASH
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def metric_cell(
    metric: str, value: float | int | None, notes: Sequence[str] = (), reason: str = "", bounds: Any = None
) -> Cell:
    """Returns a cell of a metric.

    Args:
        metric: Its name.
        value: Its value.
        notes: Smaller lines below the interval.
        reason: Why there is no value.
        bounds: Both ends of its interval, or None.
    """
    if value is None:
        return Cell(DASH, reason=reason)
    own = (interval_words(bounds),) if bounds else ()
    return Cell(number(value), (*own, *notes), heat=heat(metric, value), order=float(value))


def interval_words(bounds: Sequence[float]) -> str:
    """Returns an interval in words."""
    between = " to " if bounds[0] < 0 else "–"
    return f"{bounds[0]:.3f}{between}{bounds[1]:.3f}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Returns a table as plain text, its columns side by side."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def signed(value: float | None) -> str:
    """Returns a difference as tables show it."""
    return DASH if value is None else f"{value:+.3f}".replace("-", "−")


def signed_interval(bounds: Sequence[float]) -> str:
    """Returns the interval of a difference in words."""
    return f"{signed(bounds[0])} to {signed(bounds[1])}"


def p_value(value: float | None) -> str:
    """Returns a p-value as tables show it."""
    return DASH if value is None else "<0.001" if value < 0.0005 else f"{value:.3f}"


def heat(metric: str, value: float | int) -> int:
    """Returns how bad a metric's value is, from 0 to ``HEATS``; 0 for a metric that is neither good nor bad."""
    words = metric.split("_")
    scale = next((_SCALES[word] for word in words if word in _SCALES), _SCALES.get(metric))
    if scale is None or isinstance(value, int):
        return 0
    worst, best = scale
    return round(HEATS * float(np.clip((best - value) / (best - worst), 0, 1)))


def metrics_table(
    found: Mapping[str, Mapping[str, Any]],
    columns: Mapping[str, str],
    published: Mapping[str, Any] | None = None,
    *,
    worst: str = "",
    pinned: Collection[str] = (),
) -> Table:
    """One row a part; below a metric its interval, and the published one of a set of that name.

    A metric that no part has gets no column.

    Args:
        found: Parts with ``metrics``, ``intervals`` and ``undefined``.
        columns: Titles of the metrics.
        published: Published metrics of parts; a plain number is an accuracy.
        worst: Metric by which rows are sorted, the lowest first; in the order of the parts by default.
        pinned: Parts that come before all others.
    """
    published = published or {}
    shown = {m: title for m, title in columns.items() if any(p["metrics"].get(m) is not None for p in found.values())}
    absent = {metric: title for metric, title in columns.items() if metric not in shown}

    def cell(name: str, part: Mapping[str, Any], metric: str) -> Cell:
        known = published.get(name)
        known = known.get(metric) if isinstance(known, Mapping) else known if metric == "text_accuracy" else None
        notes = [] if known is None else [f"published {known:.3f}"]
        value, bounds = part["metrics"].get(metric), part["intervals"].get(metric)
        return metric_cell(metric, value, notes, part["undefined"].get(metric) or "", bounds)

    def place(name: str) -> tuple[bool, float]:
        value = found[name]["metrics"].get(worst) if worst and name not in pinned else None
        return name not in pinned, np.inf if value is None else float(value)

    counts = {name: part["metrics"].get("images") for name, part in found.items()}
    with_images = any(count is not None for count in counts.values())
    head = ["", *(["images"] if with_images else []), *shown.values()]
    rows = []
    for name in sorted(found, key=place):
        count = [Cell("" if counts[name] is None else str(counts[name]))] if with_images else []
        rows.append([Cell(name), *count, *(cell(name, found[name], metric) for metric in shown)])
    return Table(head, rows, left_out_words(absent, found.values()), len(set(pinned) & set(found)))


def left_out_words(absent: Mapping[str, str], parts: Collection[Mapping[str, Any]]) -> str:
    """Says which metrics have no column, by the reasons of it."""
    by_reason: dict[str, list[str]] = {}
    for metric, title in absent.items():
        reasons = {str(reason) for part in parts if (reason := part["undefined"].get(metric))}
        by_reason.setdefault("; ".join(sorted(reasons)) or "not defined here", []).append(title)
    return ". ".join(f"Without {', '.join(titles)}: {reason}" for reason, titles in by_reason.items())
