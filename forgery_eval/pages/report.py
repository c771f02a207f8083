"""The report of an evaluation: one HTML file that needs nothing else."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from forgery_eval.localize import ABOVE
from forgery_eval.masks import read_mask
from forgery_eval.metrics.scoring import ALL, Scored
from forgery_eval.pages.base import image_source, render
from forgery_eval.pages.charts import charts, risk_coverage_chart, robustness_charts
from forgery_eval.pages.overlay import draw_grey_mask
from llava.labels import LABELS
from llava.systems.base import EvaluationProtocol
from llava.tampered import read_changed

WORST = 24
_THUMBNAIL = 224
_MOST_FAILURES = 200
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
_ROBUSTNESS = ("text_balanced_accuracy", "score_accuracy", "auroc", "average_precision", "ece", "failure_rate")
_GIVEN = {
    "coverage": "coverage",
    "error_among_given": "error among given",
    "balanced_accuracy_of_given": "balanced, given",
    "reals_called_fake": "reals called fake",
    "fakes_called_real": "fakes called real",
    "ece_of_given": "ECE, given",
}
_LOCALIZATION = {
    "changed": "changed",
    "missing": "no mask",
    "iou": "IoU",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "mcc": "MCC",
    "auroc": "pixel AUROC",
    "iou_best": "IoU, best threshold",
    "f1_best": "F1, best threshold",
    "giou": "gIoU",
    "ciou": "cIoU",
    "real_without_mask": "reals without mask",
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
_PUBLISHED_MEANS = {"bleu_1": "BLEU-1", "rouge_l": "ROUGE-L", "css": "CSS", "failure_rate": "failures"}


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: What it shows.
        notes: Smaller lines below.
        reason: Why it shows no value; seen on pointing at it.
    """

    text: str
    notes: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Table:
    """A table with one row of headings.

    Attributes:
        head: Headings.
        rows: Cells, as many in each row.
        left_out: What would have been dashes from top to bottom, and why; empty if nothing was.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    left_out: str = ""


def report_page(
    metrics: Mapping[str, Any],
    rows: Sequence[Scored],
    *,
    published: EvaluationProtocol | None = None,
    masks: Path | None = None,
) -> str:
    """Returns the page.

    Args:
        metrics: What ``metrics.json`` holds.
        rows: The scored samples.
        published: Has the numbers that the system's authors published.
        masks: Folder that the predictions' masks are named from.
    """
    detection, reasoning = metrics["detection"], metrics["reasoning"]
    seconds = [row.prediction.seconds for row in rows if row.prediction.seconds]
    known = [row for row in rows if not np.isnan(row.score)]
    failures = metrics["failures"]
    return render(
        "report.html",
        data=metrics["data"],
        protocol=metrics["protocol"],
        run=metrics["run"],
        images=len(rows),
        speed=1 / float(np.mean(seconds)) if seconds else None,
        calibration=_calibration(metrics["calibration"]),
        notice=metrics.get("settings", {}).get("notice") or "",
        paper=_paper_table(metrics["paper"], published) if "paper" in metrics else None,
        detection=_metrics_table(_named(detection), _DETECTION, _published_accuracy(detection["sets"], published)),
        groups={name: _metrics_table(values, _DETECTION, {}) for name, values in detection["groups"].items()},
        confusion=_confusion(detection[ALL]["metrics"]),
        charts=charts(
            np.array([row.sample.label for row in known], int), np.array([row.score for row in known], float)
        ),
        given=_given(metrics["abstention"]) if "abstention" in metrics else None,
        robustness=_robustness(metrics["robustness"]) if "robustness" in metrics else None,
        two_scores=_two_scores(metrics) if "answer_score" in metrics else None,
        published_means=_published_means(published),
        reasoning=[
            (title, _metrics_table(_kind(reasoning, kind), _REASONING, {}))
            for kind, title in (("all", "All answers; failures count 0"), ("parsed", "Answers with a verdict"))
        ],
        localization=_localization(metrics["localization"], published) if "localization" in metrics else None,
        worst_masks=_worst_masks(metrics.get("localization"), rows, masks),
        worst=[_card(row, masks) for row in worst_mistakes(rows)],
        failures=[[Cell(failure["id"]), Cell(failure["reason"])] for failure in failures[:_MOST_FAILURES]],
        more_failures=max(0, len(failures) - _MOST_FAILURES),
    )


def _number(value: float | int | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _calibration(found: Mapping[str, Any] | None) -> str:
    if not found:
        return "Scores are as the model gives them."
    where = "on some of these ids; the rest is reported" if found["fitted_here"] else "before, elsewhere"
    before = ", ".join(f"{name.upper()} {_number(found['before']['metrics'][name])}" for name in ("ece", "nll"))
    return (
        f"Scores are calibrated: temperature {found['temperature']:.4g}, bias {found['bias']:.4g}, fitted {where}. "
        f"Before, over all reported images: {before}."
    )


def _published_accuracy(sets: Iterable[str], published: EvaluationProtocol | None) -> dict[str, float]:
    """The published accuracies; their mean is comparable only where all published sets are there."""
    if published is None:
        return {}
    accuracy = dict(published.PUBLISHED_ACCURACY)
    if set(sets) == set(accuracy) and "accuracy" in published.PUBLISHED_MEAN:
        accuracy["macro"] = published.PUBLISHED_MEAN["accuracy"]
    return accuracy


def _published_means(published: EvaluationProtocol | None) -> str:
    if published is None:
        return ""
    means = [
        f"{title} {published.PUBLISHED_MEAN[name]:g}"
        for name, title in _PUBLISHED_MEANS.items()
        if name in published.PUBLISHED_MEAN
    ]
    return f"Published means over {published.PUBLISHED_OVER}: {', '.join(means)}." if means else ""


def _named(detection: Mapping[str, Any]) -> dict[str, Any]:
    return {**detection["sets"], "macro": detection["macro"], ALL: detection[ALL]}


def _kind(reasoning: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {name: found[kind] for name, found in [*reasoning["sets"].items(), (ALL, reasoning[ALL])]}


def _metrics_table(
    found: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str], published: Mapping[str, Any]
) -> Table:
    """One row a part; below a metric its interval, and the published one of a set of that name.

    A metric that no part has gets no column.
    """
    shown = {m: title for m, title in columns.items() if any(p["metrics"].get(m) is not None for p in found.values())}
    absent = {metric: title for metric, title in columns.items() if metric not in shown}

    def cell(name: str, part: Mapping[str, Any], metric: str) -> Cell:
        value = part["metrics"].get(metric)
        if value is None:
            return Cell(_number(None), reason=part["undefined"].get(metric) or "")
        low_high = part["intervals"].get(metric)
        notes = [f"{low_high[0]:.3f}–{low_high[1]:.3f}"] if low_high else []
        known = published.get(name)
        known = known.get(metric) if isinstance(known, Mapping) else known if metric == "text_accuracy" else None
        if known is not None:
            notes.append(f"published {known:.4f}")
        return Cell(_number(value), tuple(notes))

    counts = {name: part["metrics"].get("images") for name, part in found.items()}
    with_images = any(count is not None for count in counts.values())
    head = ["", *(["images"] if with_images else []), *shown.values()]
    rows = []
    for name, part in found.items():
        count = [Cell("" if counts[name] is None else str(counts[name]))] if with_images else []
        rows.append([Cell(name), *count, *(cell(name, part, metric) for metric in shown)])
    return Table(head, rows, _left_out(absent, found.values()))


def _left_out(absent: Mapping[str, str], parts: Collection[Mapping[str, Any]]) -> str:
    """Says which metrics have no column, by the reasons of it."""
    by_reason: dict[str, list[str]] = {}
    for metric, title in absent.items():
        reasons = {str(reason) for part in parts if (reason := part["undefined"].get(metric))}
        by_reason.setdefault("; ".join(sorted(reasons)) or "not defined here", []).append(title)
    return ". ".join(f"Without {', '.join(titles)}: {reason}" for reason, titles in by_reason.items())


def _paper_table(found: Mapping[str, Mapping[str, Any]], published: EvaluationProtocol | None) -> Table:
    names = list(next(iter(found.values()), {}))
    accuracy = published.PUBLISHED_ACCURACY if published else {}
    known: Mapping[str, Mapping[str, float]] = getattr(published, "PUBLISHED", None) or {
        name: {"acc": value} for name, value in accuracy.items()
    }
    told = [key for key in names if any(key in values for values in known.values())]
    rows = [
        [
            Cell(name),
            *(Cell(_number(values[key])) for key in names),
            *(Cell(_number(known.get(name, {}).get(key))) for key in told),
        ]
        for name, values in found.items()
    ]
    return Table(["", *names, *(f"published {key}" for key in told)], rows)


def _confusion(metrics: Mapping[str, Any]) -> Table:
    rows = [
        [Cell(f"{label}, by {source}"), *(Cell(str(count)) for count in metrics[f"confusion_{source}"][label].values())]
        for source in ("text", "score")
        if metrics[f"confusion_{source}"]
        for label in LABELS
    ]
    return Table(["images that are …", "called real", "called fake", "neither"], rows)


def _given(found: Mapping[str, Any]) -> dict[str, Any]:
    """Given verdicts: the rule in words, a table of all images, sets and groups, and the curve."""
    rule, everything = found["rule"], found["all"]
    bounds = [
        f"{name} {'never' if rule[end] is None else f'{word} P(fake) {rule[end]:.4g}'}"
        for name, end, word in (("real", "low", "up to"), ("fake", "high", "from"))
    ]
    limit = "" if rule["known_limit"] is None else f"; known up to a distance of {rule['known_limit']:.4g}"
    steps = f"; lasting under {rule['deliveries']} light deliveries" if rule["deliveries"] else ""
    parts = {ALL: everything, **found["sets"]}
    for name, values in found["groups"].items():
        parts |= {f"{name} {value}": part for value, part in values.items()}
    rows = [
        [
            Cell(name),
            Cell(str(part["images"])),
            *(Cell(_number(part[key])) for key in _GIVEN),
            *(Cell(str(count)) for count in part["no_verdict"].values()),
        ]
        for name, part in parts.items()
    ]
    return {
        "rule": f"Called {', '.join(bounds)}{limit}{steps}. Chosen for an error of {rule['error_level']:g} among given "
        f"verdicts{', on some of these ids' if found['fitted_here'] else ', elsewhere'}. "
        f"Area under the curve of risk against coverage: {_number(everything['risk_coverage_area'])}.",
        "table": Table(["", "images", *_GIVEN.values(), *everything["no_verdict"]], rows),
        "chart": risk_coverage_chart(everything["risk_coverage"], everything),
    }


def _robustness(found: Mapping[str, Any]) -> dict[str, Any]:
    """The table of all conditions, the worst first and the clean images above them, and the curves."""
    columns = {name: _DETECTION[name] for name in _ROBUSTNESS}
    conditions = {f"{part['step']} {part['strength']}": part for part in found["conditions"]}
    parts = {"clean": found["clean"], **conditions}
    table = _metrics_table(parts, columns, {})
    head = [*table.head, "reals called fake", "fakes called real", f"reals, clean {found['clean_rate']:.0%}"]
    with_rule = any("abstention" in part for part in conditions.values())
    head += ["coverage", "error among given", "reals called fake, given"] if with_rule else []
    rows = []
    for row, part in zip(table.rows, parts.values(), strict=True):
        at_clean = part["at_clean_threshold"] or {}
        values = [part["reals_called_fake"], part["fakes_called_real"], at_clean.get("reals_called_fake")]
        if with_rule:
            given = part.get("abstention", {})
            values += [given.get(name) for name in ("coverage", "error_among_given", "reals_called_fake")]
        rows.append([*row, *(Cell(_number(value)) for value in values)])
    return {"table": Table(head, rows, table.left_out), "charts": robustness_charts(found)}


def _localization(found: Mapping[str, Any], published: EvaluationProtocol | None) -> dict[str, Any]:
    """The rules in words, and tables of the sets and of each group; below an IoU or F1 the published one."""
    parts = {**found["sets"], ALL: found["all"]}
    known: Mapping[str, Mapping[str, float]] = getattr(published, "PUBLISHED_LOCALIZATION", {})
    tables = {"": _metrics_table(parts, _LOCALIZATION, known)}
    tables |= {name: _metrics_table(values, _LOCALIZATION, {}) for name, values in found["groups"].items()}
    rule = found["rule"][0].upper() + found["rule"][1:]
    return {"rule": f"{rule}; {found['truth']}.", "tables": tables}


def _worst_masks(
    found: Mapping[str, Any] | None, rows: Sequence[Scored], masks: Path | None, most: int = WORST
) -> list[dict[str, str]]:
    """Images beside their predicted and their true mask: changed ones, the worst IoU first, then marked real ones.

    The real ones get a quarter of the places, where there are so many.
    """
    if found is None:
        return []
    by_id = {row.sample.id: row for row in rows}
    worst = sorted(found["images"], key=lambda one: (one["iou"], one["id"]))
    changed = [one for one in worst if by_id[one["id"]].sample.masks]
    marked = [one for one in worst if not by_id[one["id"]].sample.masks and one["iou"] < 1]
    changed = changed[: most - min(len(marked), most // 4)]
    shown: list[dict[str, str]] = []
    for entry in [*changed, *marked[: most - len(changed)]]:
        row = by_id[entry["id"]]
        image = _thumbnail(row.sample.image)
        predicted = read_mask(masks, row.prediction.mask) if masks and row.prediction.mask else None
        truth = _true_mask(row.sample.masks)
        shown.append(
            {
                "id": entry["id"],
                "image": image_source(image) if image else "",
                "mask": image_source(_small(predicted)) if predicted else "",
                "truth": image_source(_small(truth)) if truth else "",
                "words": f"IoU {entry['iou']:.3f} · F1 {entry['f1']:.3f}" if truth else "real, but marked",
            }
        )
    return shown


def _true_mask(files: Sequence[Path]) -> Image.Image | None:
    return Image.fromarray(read_changed(files, above=ABOVE).astype(np.uint8) * 255) if files else None


def _small(mask: Image.Image) -> Image.Image:
    small = mask.convert("L")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return small


def _two_scores(metrics: Mapping[str, Any]) -> Table:
    """The score that is reported beside the one at the answer's verdict, each as read and calibrated."""
    plain = {"auroc": "AUROC", "score_accuracy": "accuracy", "disagreement": "differs from text"}
    calibrated = {"ece": "ECE", "nll": "NLL", "brier": "Brier"}
    rows = []
    for name, found, calibration in (
        ("without the answer (the one reported)", metrics["detection"][ALL], metrics["calibration"]),
        ("at the answer's verdict", metrics["answer_score"], metrics["answer_score"]["calibration"]),
    ):
        before, after = (calibration["before"], found) if calibration else (found, {"metrics": {}})
        values = [before["metrics"][metric] for metric in plain]
        pairs = [part["metrics"].get(metric) for metric in calibrated for part in (before, after)]
        rows.append([Cell(name), *(Cell(_number(value)) for value in [*values, *pairs])])
    head = ["P(fake)", *plain.values()]
    for title in calibrated.values():
        head += [title, f"{title}, calibrated"]
    return Table(head, rows)


def worst_mistakes(rows: Sequence[Scored], most: int = WORST) -> list[Scored]:
    """Returns the images that were called what they are not, the surest first."""

    def predicted(row: Scored) -> str | None:
        if row.prediction.verdict is not None or np.isnan(row.score):
            return row.prediction.verdict
        return LABELS[int(row.score >= 0.5)]

    def sureness(row: Scored) -> float:
        return 0.0 if np.isnan(row.score) else abs(row.score - row.sample.label)

    wrong = [row for row in rows if predicted(row) not in (None, LABELS[row.sample.label])]
    return sorted(wrong, key=lambda row: (-sureness(row), row.sample.id))[:most]


def _card(row: Scored, masks: Path | None) -> dict[str, str]:
    """What the page shows of one mistake."""
    image = _thumbnail(row.sample.image)
    mask = read_mask(masks, row.prediction.mask) if masks and row.prediction.mask else None
    return {
        "image": image_source(image) if image else "",
        "mask": image_source(draw_grey_mask(image, mask)) if image and mask else "",
        "id": row.sample.id,
        "label": LABELS[row.sample.label],
        "verdict": row.prediction.verdict or "neither",
        "score": "no score" if np.isnan(row.score) else f"P(fake) {row.score:.4f}",
        "text": row.explanation or row.prediction.text or "no reasoning",
    }


def _thumbnail(file: Path) -> Image.Image | None:
    try:
        with Image.open(file) as image:
            small = ImageOps.exif_transpose(image).convert("RGB")
        small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    except Exception:  # Pillow's plugins raise many kinds; an image that cannot be shown is no fault of the report
        return None
    return small
