"""Curves of a report, as SVG."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn import metrics as sk

from forgery_eval.metrics.detection import BINS, score_bins, wilson
from forgery_eval.pages.base import COLOURS
from llava.labels import LABELS

Draw = Callable[..., None]
_INK = "#010203"
"""Colour of axes and words, which becomes the page's own, light or dark."""
_SERIES = (COLOURS["fake"], COLOURS["real"], "grey")
_LONGEST_NAME = 24
_LOOK: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    "axes.facecolor": "none",
    "legend.facecolor": "none",
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans"],
}


def score_charts(labels: np.ndarray, scores: np.ndarray) -> dict[str, Markup]:
    """Returns drawings by name: ``reliability`` and ``histogram``; with both classes ``roc`` and ``precision_recall``.

    Args:
        labels: 0 real, 1 fake, shape (N,).
        scores: P(fake), shape (N,); none are drawn where N is 0.
    """
    if not len(scores):
        return {}
    drawings: dict[str, Draw] = {"reliability": _reliability, "histogram": _histogram}
    if len(set(labels.tolist())) == 2:
        drawings = {"roc": _roc, "precision_recall": _precision_recall, **drawings}
    return {name: figure(partial(draw, labels=labels, scores=scores), name) for name, draw in drawings.items()}


def robustness_charts(found: Mapping[str, Any]) -> list[Markup]:
    """Returns a chart a step: metrics against strength, beginning with the clean images.

    Args:
        found: What ``robustness`` of ``metrics.json`` holds.
    """
    by_step: dict[str, list[Mapping[str, Any]]] = {}
    for condition in found["conditions"]:
        by_step.setdefault(condition["step"], []).append(condition)
    charts = []
    for step, conditions in sorted(by_step.items()):
        ordered = sorted(conditions, key=lambda condition: _severity(step, condition["strength"]))
        points = [("clean", found["clean"]), *((condition["strength"], condition) for condition in ordered)]
        charts.append(figure(partial(_against_strength, step=step, points=points), f"robustness {step}"))
    return charts


def _severity(step: str, strength: str) -> float:
    """Order of strengths from mild to strong; lower numbers are stronger where they are a quality or a size."""
    numbers = re.findall(r"[0-9.]+", strength)
    value = float(numbers[0]) if numbers else 0.0
    return -value if step in ("jpeg", "webp", "avif", "resize", "same-format") else value


def _against_strength(axes: Axes, *, step: str, points: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    positions = range(len(points))
    lines = {
        "balanced accuracy": [_balanced(part["metrics"]) for _, part in points],
        "AUROC": [part["metrics"].get("auroc") for _, part in points],
        "reals called fake": [part["reals_called_fake"] for _, part in points],
    }
    for (name, values), colour in zip(lines.items(), (COLOURS["fake"], "grey", COLOURS["real"]), strict=True):
        axes.plot(positions, [np.nan if v is None else v for v in values], "o-", label=name, color=colour)
    axes.set(title=step, ylim=(-0.02, 1.02))
    axes.set_xticks(list(positions), [name for name, _ in points])
    axes.legend()


def _balanced(metrics: Mapping[str, Any]) -> float | None:
    of_score: float | None = metrics.get("score_balanced_accuracy")
    return metrics.get("text_balanced_accuracy") if of_score is None else of_score


def risk_coverage_chart(curve: Sequence[Sequence[float]], given: Mapping[str, Any] | None = None) -> Markup:
    """Returns the error among the surest images against their share, and where the rule stands, if there is one.

    Args:
        curve: Points of coverage and error.
        given: Measures of given verdicts.
    """
    return figure(partial(_risk_coverage, curve=curve, given=given), "risk coverage")


def _risk_coverage(axes: Axes, *, curve: Sequence[Sequence[float]], given: Mapping[str, Any] | None) -> None:
    axes.plot([point[0] for point in curve], [point[1] for point in curve], color=COLOURS["fake"])
    if given and given["error_among_given"] is not None:
        axes.plot([given["coverage"]], [given["error_among_given"]], "o", color=COLOURS["real"], label="by the rule")
        axes.legend()
    axes.set(title="Risk and coverage", xlabel="share of images, the surest first", ylabel="error among them")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(bottom=0)


def forest_chart(
    rows: Mapping[str, Mapping[str, tuple[float, Sequence[float] | None]]], title: str, *, zero: bool = False
) -> Markup:
    """Returns values with their intervals, a line a row, the first on top.

    Args:
        rows: Values and both ends of their intervals by what they are, by the row's name.
        title: What the chart is of.
        zero: Whether the values are differences, and no difference is marked.
    """
    return figure(partial(_forest, rows=rows, title=title, zero=zero), title, height=1.3 + 0.45 * len(rows))


def _forest(
    axes: Axes, *, rows: Mapping[str, Mapping[str, tuple[float, Sequence[float] | None]]], title: str, zero: bool
) -> None:
    series = list(dict.fromkeys(name for row in rows.values() for name in row))
    for number, name in enumerate(series):
        colour = _SERIES[number % len(_SERIES)]
        points = [(place, *row[name]) for place, row in enumerate(rows.values()) if name in row]
        heights = [place + 0.18 * (number - (len(series) - 1) / 2) for place, _, _ in points]
        bounds = np.array([(value, value) if ends is None else ends for _, value, ends in points])
        axes.hlines(heights, bounds[:, 0], bounds[:, 1], color=colour, linewidth=1.5)
        axes.plot([value for _, value, _ in points], heights, "o", color=colour, markersize=5, label=name)
    if zero:
        axes.axvline(0, color="grey", linestyle=":")
    axes.set(title=title, ylim=(len(rows) - 0.5, -0.5))
    # Names come from outside: a dollar sign in them begins no formula.
    axes.set_yticks(range(len(rows)), [_shortened(name) for name in rows], parse_math=False)
    axes.locator_params(axis="x", nbins=5)
    axes.figure.legend(loc="outside lower center", ncols=2, frameon=False)


def _shortened(name: str) -> str:
    """A name as short as an axis can show it, its end being what tells it from others."""
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"


def figure(draw: Callable[[Axes], None], name: str, *, height: float = 3.6) -> Markup:
    """Returns what is drawn, as SVG; equal drawings of one name are equal to the byte.

    Args:
        draw: Draws into the axes it is given.
        name: What a screen reader calls the drawing.
        height: In inches; the width is 4.6.
    """
    # A fixed salt and no date: equal results give equal pages.
    with matplotlib.rc_context({**_LOOK, "svg.hashsalt": name}):
        drawn = Figure(figsize=(4.6, height), layout="constrained", facecolor="none")
        axes = drawn.subplots()
        draw(axes)
        axes.grid(alpha=0.25, color="#808080")
        stream = io.StringIO()
        drawn.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    head = f'<svg role="img" aria-label="{escape(name.replace("_", " "))}"'
    # Drawn here from numbers, and from words that matplotlib escapes.
    return Markup(text[text.index("<svg") :].replace("<svg", head, 1).replace(_INK, "currentColor"))


def _roc(axes: Axes, labels: np.ndarray, scores: np.ndarray) -> None:
    false_rate, true_rate, _ = sk.roc_curve(labels, scores)
    axes.plot(false_rate, true_rate, color=COLOURS["fake"])
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
    axes.set(title="ROC", xlabel="reals called fake", ylabel="fakes called fake")


def _precision_recall(axes: Axes, labels: np.ndarray, scores: np.ndarray) -> None:
    precision, recall, _ = sk.precision_recall_curve(labels, scores)
    axes.step(recall, precision, where="post", color=COLOURS["fake"])
    axes.axhline(labels.mean(), color="grey", linestyle=":")
    axes.set(title="Precision and recall", xlabel="recall of fakes", ylabel="precision", ylim=(0, 1.02))


def _reliability(axes: Axes, labels: np.ndarray, scores: np.ndarray) -> None:
    bins = score_bins(scores)
    counts = np.bincount(bins, minlength=BINS)
    filled = counts > 0
    mean_score = np.bincount(bins, weights=scores, minlength=BINS)[filled] / counts[filled]
    share_of_fakes = np.bincount(bins, weights=labels, minlength=BINS)[filled] / counts[filled]
    bounds = np.array([wilson(round(s * n), n) for s, n in zip(share_of_fakes, counts[filled], strict=True)])
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
    axes.vlines(mean_score, bounds[:, 0], bounds[:, 1], color="grey", linewidth=1)
    axes.scatter(mean_score, share_of_fakes, s=12 + 150 * counts[filled] / counts.sum(), color=COLOURS["fake"])
    axes.set(title="Reliability (size: share of images)", xlabel="P(fake)", ylabel="share of fakes")


def _histogram(axes: Axes, labels: np.ndarray, scores: np.ndarray) -> None:
    for number, name in enumerate(LABELS):
        own = scores[labels == number]
        axes.hist(own, bins=30, range=(0, 1), alpha=0.6, label=name, color=COLOURS[name])
    axes.set(title="Scores", xlabel="P(fake)", ylabel="images")
    axes.legend()
