"""The report: one HTML file that needs nothing else. All texts are escaped."""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from sklearn import metrics as sk

from forgery_eval.metrics.detection import BINS, score_bins
from forgery_eval.page import COLOURS, escaped, page, picture_source
from forgery_eval.scoring import ALL, Scored
from llava.labels import LABELS
from llava.systems.fakereasoning.protocol import PUBLISHED_ACCURACY, PUBLISHED_MEAN

WORST = 24
_THUMBNAIL = 224
_DETECTION = {
    "text_accuracy": "accuracy (text)",
    "score_accuracy": "accuracy (score)",
    "text_real_accuracy": "real",
    "text_fake_accuracy": "fake",
    "text_balanced_accuracy": "balanced",
    "text_f1_macro": "F1 macro",
    "auroc": "AUROC",
    "average_precision": "AP",
    "tpr_at_1_fpr": "TPR at 1 % FPR",
    "tpr_at_5_fpr": "TPR at 5 % FPR",
    "ece": "ECE",
    "nll": "NLL",
    "brier": "Brier",
    "failure_rate": "failures",
    "disagreement": "text and score differ",
}
_REASONING = {
    "texts": "texts",
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "css": "CSS",
    "css_chunked": "CSS (whole text)",
    "attribute_precision": "attribute precision",
    "attribute_recall": "attribute recall",
    "attribute_f1": "attribute F1",
    "words": "words",
}
_PAPER = ("r_acc", "f_acc", "acc", "bleu1", "rougel", "css", "pre_failure")
_STYLE = """
body{max-width:1400px}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px}
th,td{padding:.25rem .55rem;text-align:right;border-bottom:1px solid var(--line);vertical-align:top}
th:first-child,td:first-child{text-align:left;white-space:nowrap}
.words th,.words td{text-align:left;white-space:normal}thead th{vertical-align:bottom;background:var(--raised)}
td small{display:block;white-space:nowrap}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(340px,1fr));gap:1rem}
.charts svg{width:100%;height:auto}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(250px,1fr));gap:1rem}
.card{font-size:13px}
.card img{display:block;max-width:100%;margin:0 auto .5rem}
"""


def report_page(metrics: Mapping[str, Any], rows: Sequence[Scored]) -> str:
    """Returns the page.

    Args:
        metrics: What ``metrics.json`` holds.
        rows: The scored samples.
    """
    detection, reasoning = metrics["detection"], metrics["reasoning"]
    seconds = [row.prediction.seconds for row in rows if row.prediction.seconds]
    speed = f" · {1 / float(np.mean(seconds)):.3g} images/s" if seconds else ""
    parts = [
        f"<h1>Evaluation on {escaped(metrics['data'])}</h1>",
        f"<p><b>Protocol</b> {escaped(metrics['protocol'])}<br><b>Run</b> {escaped(metrics['run'])} · "
        f"{len(rows)} images{speed}<br>{_calibration(metrics['calibration'])}</p>",
    ]
    notice = metrics.get("settings", {}).get("notice")
    if notice:
        parts.append(f'<p class="notice">{escaped(notice)}</p>')
    if "paper" in metrics:
        parts += ["<h2>By the paper's protocol</h2>", _paper_table(metrics["paper"])]
    parts += [
        "<h2>Detection</h2>",
        '<p class="note">With 95 % bootstrap intervals, drawn anew within each set and class. Below an accuracy stands '
        "the published one of a set of that name. A dash is undefined; its reason is shown on pointing at it.</p>",
        _figures_table(_named(detection), _DETECTION, _published(detection["sets"])),
    ]
    for name, values in detection["groups"].items():
        parts += [f"<h2>By {escaped(name)}</h2>", _figures_table(values, _DETECTION, {})]
    parts += [
        "<h2>Confusion</h2>",
        _confusion(detection[ALL]["figures"]),
        "<h2>Scores</h2>",
        f'<div class="charts">{"".join(_charts(rows))}</div>',
        _two_scores(metrics),
        "<h2>Reasoning</h2>",
        _published_reasoning(),
        *(
            f"<h3>{title}</h3>{_figures_table(_kind(reasoning, kind), _REASONING, {})}"
            for kind, title in (("all", "All answers; failures count 0"), ("parsed", "Answers with a verdict"))
        ),
        "<h2>Worst mistakes</h2>",
        _gallery(rows),
        "<h2>Failures</h2>",
        _failures(metrics["failures"]),
    ]
    return page("Evaluation", parts, _STYLE)


def _number(value: float | int | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _calibration(found: Mapping[str, Any] | None) -> str:
    if not found:
        return "Scores are as the model gives them."
    where = "on a fifth of these ids; the rest is reported" if found["fitted_here"] else "before, elsewhere"
    figures = ", ".join(f"{name.upper()} {_number(found['before']['figures'][name])}" for name in ("ece", "nll"))
    return (
        f"Scores are calibrated: temperature {found['temperature']:.4g}, bias {found['bias']:.4g}, fitted {where}. "
        f"Before, over all reported images: {figures}."
    )


def _published(sets: Iterable[str]) -> dict[str, float]:
    """The published accuracies; their mean is comparable only where all published sets are there."""
    comparable = {"macro": PUBLISHED_MEAN["accuracy"]} if set(sets) == set(PUBLISHED_ACCURACY) else {}
    return PUBLISHED_ACCURACY | comparable


def _named(detection: Mapping[str, Any]) -> dict[str, Any]:
    return {**detection["sets"], "macro": detection["macro"], ALL: detection[ALL]}


def _kind(reasoning: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {name: found[kind] for name, found in [*reasoning["sets"].items(), (ALL, reasoning[ALL])]}


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of cells that are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _figures_table(
    found: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str], published: Mapping[str, float]
) -> str:
    def cell(name: str, part: Mapping[str, Any], figure: str) -> str:
        value, reason = part["figures"].get(figure), part["undefined"].get(figure)
        if value is None:
            return f'<span title="{escaped(reason or "")}">–</span>'
        low_high = part["intervals"].get(figure)
        below = f"<small>{low_high[0]:.3f}–{low_high[1]:.3f}</small>" if low_high else ""
        if figure == "text_accuracy" and name in published:
            below += f"<small>published {published[name]:.4f}</small>"
        return _number(value) + below

    counted = [(name, part["figures"].get("images")) for name, part in found.items()]
    with_images = any(count is not None for _, count in counted)
    head = ["", *(["images"] if with_images else []), *columns.values()]
    return _table(
        head,
        (
            [
                escaped(name),
                *(["" if count is None else str(count)] if with_images else []),
                *(cell(name, found[name], figure) for figure in columns),
            ]
            for name, count in counted
        ),
    )


def _paper_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [escaped(name), *(_number(values[key]) for key in _PAPER), _number(PUBLISHED_ACCURACY.get(name))]
        for name, values in found.items()
    ]
    return _table(["", *_PAPER, "published acc"], rows)


def _published_reasoning() -> str:
    names = {"bleu_1": "BLEU-1", "rouge_l": "ROUGE-L", "css": "CSS", "failure_rate": "failures"}
    said = ", ".join(f"{title} {PUBLISHED_MEAN[name]:g}" for name, title in names.items())
    return f'<p class="note">Published means over the ten MMFR sets, of parsed answers: {said}.</p>'


def _confusion(figures: Mapping[str, Any]) -> str:
    rows = [
        [f"{label}, by {source}", *(str(count) for count in figures[f"confusion_{source}"][label].values())]
        for source in ("text", "score")
        if figures[f"confusion_{source}"]
        for label in LABELS
    ]
    return _table(["images that are …", "called real", "called fake", "neither"], rows)


def _two_scores(metrics: Mapping[str, Any]) -> str:
    """The score that is reported beside the one at the answer's verdict, each as read and calibrated."""
    if "answer_score" not in metrics:
        return ""
    plain = {"auroc": "AUROC", "score_accuracy": "accuracy", "disagreement": "differs from text"}
    calibrated = {"ece": "ECE", "nll": "NLL", "brier": "Brier"}
    rows = []
    for name, found, calibration in (
        ("without the answer (the one reported)", metrics["detection"][ALL], metrics["calibration"]),
        ("at the answer's verdict", metrics["answer_score"], metrics["answer_score"]["calibration"]),
    ):
        before, after = (calibration["before"], found) if calibration else (found, {"figures": {}})
        figures = [before["figures"][figure] for figure in plain]
        pairs = [part["figures"].get(figure) for figure in calibrated for part in (before, after)]
        rows.append([name, *map(_number, [*figures, *pairs])])
    head = ["P(fake)", *plain.values(), *(f"{n}{w}" for n in calibrated.values() for w in ("", ", calibrated"))]
    return f"<h3>With and without the answer</h3>{_table(head, rows)}"


def _charts(rows: Sequence[Scored]) -> list[str]:
    known = [row for row in rows if not np.isnan(row.score)]
    labels = np.array([row.sample.label for row in known], int)
    scores = np.array([row.score for row in known], float)
    if not known:
        return ["<p>No image has a score.</p>"]
    drawings: list[Callable[[Axes, np.ndarray, np.ndarray], None]] = [_reliability, _histogram]
    if len(set(labels.tolist())) == 2:
        drawings = [_roc, _precision_recall, *drawings]
    return [_svg(drawing, labels, scores) for drawing in drawings]


def _svg(draw: Callable[[Axes, np.ndarray, np.ndarray], None], labels: np.ndarray, scores: np.ndarray) -> str:
    figure = Figure(figsize=(4.6, 3.8), layout="constrained")
    axes = figure.subplots()
    draw(axes, labels, scores)
    axes.grid(alpha=0.25)
    stream = io.StringIO()
    # A fixed salt and no date: equal results give equal pages.
    with matplotlib.rc_context({"svg.hashsalt": draw.__name__}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


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
    there = counts > 0
    said = np.bincount(bins, weights=scores, minlength=BINS)[there] / counts[there]
    true = np.bincount(bins, weights=labels, minlength=BINS)[there] / counts[there]
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
    axes.scatter(said, true, s=12 + 150 * counts[there] / counts.sum(), color=COLOURS["fake"])
    axes.set(title="Reliability (size: share of images)", xlabel="P(fake)", ylabel="share of fakes")


def _histogram(axes: Axes, labels: np.ndarray, scores: np.ndarray) -> None:
    for number, name in enumerate(LABELS):
        own = scores[labels == number]
        axes.hist(own, bins=30, range=(0, 1), alpha=0.6, label=name, color=COLOURS[name])
    axes.set(title="Scores", xlabel="P(fake)", ylabel="images")
    axes.legend()


def worst_mistakes(rows: Sequence[Scored], most: int = WORST) -> list[Scored]:
    """Returns the images that were called what they are not, the surest first."""

    def said(row: Scored) -> str | None:
        if row.prediction.verdict is not None or np.isnan(row.score):
            return row.prediction.verdict
        return LABELS[int(row.score >= 0.5)]

    def sureness(row: Scored) -> float:
        return 0.0 if np.isnan(row.score) else abs(row.score - row.sample.label)

    wrong = [row for row in rows if said(row) not in (None, LABELS[row.sample.label])]
    return sorted(wrong, key=lambda row: (-sureness(row), row.sample.id))[:most]


def _gallery(rows: Sequence[Scored]) -> str:
    worst = worst_mistakes(rows)
    if not worst:
        return "<p>No image was called what it is not.</p>"
    return f'<div class="gallery">{"".join(map(_card, worst))}</div>'


def _card(row: Scored) -> str:
    score = "no score" if np.isnan(row.score) else f"P(fake) {row.score:.4f}"
    reasoning = row.prediction.stages.get("REASONING") or row.prediction.text or "no reasoning"
    return (
        f'<div class="card">{_thumbnail(row.sample.image)}<b>{escaped(row.sample.id)}</b><br>'
        f"is {LABELS[row.sample.label]}, called {row.prediction.verdict or 'neither'} · {score}"
        f"<p>{escaped(reasoning)}</p></div>"
    )


def _thumbnail(file: Path) -> str:
    try:
        with Image.open(file) as image:
            small = ImageOps.exif_transpose(image).convert("RGB")
        small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    except Exception:  # Pillow's plugins raise many kinds; a picture that cannot be shown is no fault of the report
        return "<i>cannot be shown</i><br>"
    return f'<img alt="" src="{picture_source(small)}">'


def _failures(found: Sequence[Mapping[str, str]]) -> str:
    if not found:
        return "<p>None.</p>"
    most = 200
    more = f"<p>… and {len(found) - most} more; all are in metrics.json.</p>" if len(found) > most else ""
    rows = ([escaped(failure["id"]), escaped(failure["reason"])] for failure in found[:most])
    return f'<div class="words">{_table(["image", "reason"], rows)}</div>{more}'
