"""Curves of a report, as SVG."""

import io
from collections.abc import Callable

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn import metrics as sk

from forgery_eval.metrics.detection import BINS, score_bins
from forgery_eval.pages.base import COLOURS
from llava.labels import LABELS

Draw = Callable[[Axes, np.ndarray, np.ndarray], None]


def charts(labels: np.ndarray, scores: np.ndarray) -> list[Markup]:
    """Returns ROC, precision and recall (where both classes are there), reliability, and a histogram.

    Args:
        labels: 0 real, 1 fake, shape (N,).
        scores: P(fake), shape (N,); none are drawn where N is 0.
    """
    if not len(scores):
        return []
    drawings: list[Draw] = [_reliability, _histogram]
    if len(set(labels.tolist())) == 2:
        drawings = [_roc, _precision_recall, *drawings]
    return [_svg(drawing, labels, scores) for drawing in drawings]


def _svg(draw: Draw, labels: np.ndarray, scores: np.ndarray) -> Markup:
    figure = Figure(figsize=(4.6, 3.8), layout="constrained")
    axes = figure.subplots()
    draw(axes, labels, scores)
    axes.grid(alpha=0.25)
    stream = io.StringIO()
    # A fixed salt and no date: equal results give equal pages.
    with matplotlib.rc_context({"svg.hashsalt": draw.__name__}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return Markup(text[text.index("<svg") :])  # drawn here from numbers and the words of this module alone


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
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
    axes.scatter(mean_score, share_of_fakes, s=12 + 150 * counts[filled] / counts.sum(), color=COLOURS["fake"])
    axes.set(title="Reliability (size: share of images)", xlabel="P(fake)", ylabel="share of fakes")


def _histogram(axes: Axes, labels: np.ndarray, scores: np.ndarray) -> None:
    for number, name in enumerate(LABELS):
        own = scores[labels == number]
        axes.hist(own, bins=30, range=(0, 1), alpha=0.6, label=name, color=COLOURS[name])
    axes.set(title="Scores", xlabel="P(fake)", ylabel="images")
    axes.legend()
