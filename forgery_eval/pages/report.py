"""The report of an evaluation: one HTML file that needs nothing else."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from forgery_eval.backends import usage_words
from forgery_eval.covering import Covered, cover
from forgery_eval.localize import ABOVE
from forgery_eval.masks import read_mask
from forgery_eval.metrics.abstention import risk_coverage
from forgery_eval.metrics.grades import OVERALL
from forgery_eval.metrics.localization import TOLERANCE
from forgery_eval.metrics.scoring import ALL, Scored, verdict_source
from forgery_eval.pages.base import THUMBNAIL, image_source, render, thumbnail
from forgery_eval.pages.charts import risk_coverage_chart, robustness_charts, score_charts
from forgery_eval.pages.overlay import draw_grey_mask, draw_mask
from forgery_eval.pages.summary import tiles, worst_parts
from forgery_eval.pages.tables import Cell, Table, metric_cell, metrics_table, number
from llava.labels import LABELS
from llava.systems.base import EvaluationProtocol
from llava.tampered import read_changed

WORST = 24
_MOST_FAILURES = 200
_MOST_COVERED = 12
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
    "pointing": "pointing",
    "pointing_exact": "pointing, exact",
    "hit_by_chance": "pointing by chance",
    "iou_best": "IoU, best threshold",
    "f1_best": "F1, best threshold",
    "giou": "gIoU",
    "ciou": "cIoU",
    "real_without_mask": "reals without mask",
}
_FAITHFULNESS = {
    "fall_named": "fall, named region",
    "fall_random": "fall, random regions",
    "fall_difference": "difference",
    "named_falls_more": "named falls more",
    "area": "share covered",
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
_ATTRIBUTES = {
    "attribute_there": "images that show it",
    "attribute_named": "answers that name it",
    "attribute_precision": "precision",
    "attribute_recall": "recall",
    "attribute_f1": "F1",
}
_PUBLISHED_MEANS = {"bleu_1": "BLEU-1", "rouge_l": "ROUGE-L", "css": "CSS", "failure_rate": "failures"}


def report_page(
    metrics: Mapping[str, Any],
    rows: Sequence[Scored],
    *,
    published: EvaluationProtocol | None = None,
    masks: Path | None = None,
    covered: Mapping[str, Sequence[Covered]] | None = None,
) -> str:
    """Returns the page.

    Args:
        metrics: What ``metrics.json`` holds.
        rows: The scored samples.
        published: Has the numbers that the system's authors published.
        masks: Folder that the predictions' masks are named from.
        covered: How each image is covered whose faithfulness was measured, by its id.
    """
    detection, reasoning = metrics["detection"], metrics["reasoning"]
    seconds = [row.prediction.seconds for row in rows if row.prediction.seconds]
    failures = metrics["failures"]
    counted_by, shown_tiles = tiles(metrics)
    known = [row for row in rows if not np.isnan(row.score)]
    drawn = score_charts(
        np.array([row.sample.label for row in known], int), np.array([row.score for row in known], float)
    )
    return render(
        "report.html",
        data=metrics["data"],
        protocol=metrics["protocol"],
        run=metrics["run"],
        images=len(rows),
        speed=1 / float(np.mean(seconds)) if seconds else None,
        calibration=_calibration(metrics["calibration"]),
        notice=metrics.get("settings", {}).get("notice") or "",
        counted_by=counted_by,
        tiles=shown_tiles,
        first_charts=[
            *(drawn[name] for name in ("roc", "reliability") if name in drawn),
            *_risk_coverage(metrics, known),
        ],
        charts=[drawn[name] for name in ("precision_recall", "histogram") if name in drawn],
        worst_parts=worst_parts(detection),
        paper=_paper_table(metrics["paper"], published) if "paper" in metrics else None,
        given=_given(metrics["abstention"]) if "abstention" in metrics else None,
        robustness=_robustness(metrics["robustness"]) if "robustness" in metrics else None,
        localization=_localization(metrics["localization"], published) if "localization" in metrics else None,
        worst_masks=_worst_masks(metrics.get("localization"), rows, masks),
        faithfulness=_faithfulness(metrics["faithfulness"], covered or {}) if "faithfulness" in metrics else None,
        judge=_judge(metrics["judge"]) if "judge" in metrics else None,
        published_means=_published_means(published),
        reasoning=_reasoning(reasoning),
        worst=[_card(row, masks) for row in worst_mistakes(rows)],
        tables=_tables(metrics, published),
        failures=Table(["image", "reason"], [[Cell(f["id"]), Cell(f["reason"])] for f in failures[:_MOST_FAILURES]]),
        more_failures=max(0, len(failures) - _MOST_FAILURES),
    )


def _risk_coverage(metrics: Mapping[str, Any], known: Sequence[Scored]) -> list[Markup]:
    """The curve of the rule, or of the scores alone where there is no rule; nothing where there is no score."""
    if "abstention" in metrics:
        everything = metrics["abstention"][ALL]
        return [risk_coverage_chart(everything["risk_coverage"], everything)]
    labels, scores = np.array([r.sample.label for r in known], int), np.array([r.uncalibrated for r in known], float)
    curve, _ = risk_coverage(labels, scores, [""] * len(known))
    return [risk_coverage_chart(curve)] if curve else []


def _tables(metrics: Mapping[str, Any], published: EvaluationProtocol | None) -> dict[str, Table]:
    """Every table of detection by its title, the worst rows first; means and sums stay on top."""
    detection = metrics["detection"]
    worst = f"{verdict_source(detection[ALL]['metrics'])}_accuracy"
    known = _published_accuracy(detection["sets"], published)
    found = {"Sets": metrics_table(_named(detection), _DETECTION, known, worst=worst, pinned=("macro", ALL))}
    for name, values in detection["groups"].items():
        found[f"By {name}"] = metrics_table(values, _DETECTION, worst=worst)
    found["Confusion"] = _confusion(detection[ALL]["metrics"])
    if "answer_score" in metrics:
        found["With and without the answer"] = _two_scores(metrics)
    return found


def _reasoning(found: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """A table of all answers and one of those with a verdict; none where no part has any metric."""
    titles = {"all": "All answers; failures count 0", "parsed": "Answers with a verdict"}
    if not any(value for name, value in found[ALL]["all"]["metrics"].items()):
        return []
    tables = [
        (title, metrics_table(_kind(found, kind), _REASONING, worst="rouge_l", pinned=(ALL,)))
        for kind, title in titles.items()
    ]
    if found["attributes"]:
        tables.append(("Each attribute", metrics_table(found["attributes"], _ATTRIBUTES, worst="attribute_f1")))
    return tables


def _calibration(found: Mapping[str, Any] | None) -> str:
    if not found:
        return "Scores are as the model gives them."
    where = "on some of these ids; the rest is reported" if found["fitted_here"] else "before, elsewhere"
    before = ", ".join(f"{name.upper()} {number(found['before']['metrics'][name])}" for name in ("ece", "nll"))
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
            *(Cell(number(values[key])) for key in names),
            *(Cell(number(known.get(name, {}).get(key))) for key in told),
        ]
        for name, values in found.items()
    ]
    return Table(["", *names, *(f"published {key}" for key in told)], rows).without_dashes()


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
            *(metric_cell(key, part[key]) for key in _GIVEN),
            *(Cell(str(count)) for count in part["no_verdict"].values()),
        ]
        for name, part in sorted(parts.items(), key=lambda item: (item[0] != ALL, -(item[1]["error_among_given"] or 0)))
    ]
    return {
        "rule": f"Called {', '.join(bounds)}{limit}{steps}. Chosen for an error of {rule['error_level']:g} among given "
        f"verdicts{', on some of these ids' if found['fitted_here'] else ', elsewhere'}. "
        f"Area under the curve of risk against coverage: {number(everything['risk_coverage_area'])}.",
        "table": Table(["", "images", *_GIVEN.values(), *everything["no_verdict"]], rows, pinned=1).without_dashes(),
    }


def _robustness(found: Mapping[str, Any]) -> dict[str, Any]:
    """The table of all conditions, the worst first and the clean images above them, and the curves."""
    columns = {name: _DETECTION[name] for name in _ROBUSTNESS}
    conditions = {f"{part['step']} {part['strength']}": part for part in found["conditions"]}
    parts = {"clean": found["clean"], **conditions}
    table = metrics_table(parts, columns, pinned=("clean",))
    head = [*table.head, "reals called fake", "fakes called real", f"reals, clean {found['clean_rate']:.0%}"]
    with_rule = any("abstention" in part for part in conditions.values())
    head += ["coverage", "error among given", "reals called fake, given"] if with_rule else []
    rows = []
    for row, part in zip(table.rows, parts.values(), strict=True):
        at_clean = part["at_clean_threshold"] or {}
        called = {"reals_called_fake": part["reals_called_fake"], "fakes_called_real": part["fakes_called_real"]}
        values = [*called.items(), ("reals_called_fake", at_clean.get("reals_called_fake"))]
        if with_rule:
            given = part.get("abstention", {})
            values += [(name, given.get(name)) for name in ("coverage", "error_among_given", "reals_called_fake")]
        rows.append([*row, *(metric_cell(name, value) for name, value in values)])
    shown = Table(head, rows, table.left_out, table.pinned).without_dashes()
    return {"table": shown, "charts": robustness_charts(found)}


def _localization(found: Mapping[str, Any], published: EvaluationProtocol | None) -> dict[str, Any]:
    """The rules in words, and tables of the sets and of each group; below an IoU or F1 the published one."""
    parts = {**found["sets"], ALL: found["all"]}
    known: Mapping[str, Mapping[str, float]] = getattr(published, "PUBLISHED_LOCALIZATION", {})
    tables = {"Sets": metrics_table(parts, _LOCALIZATION, known, worst="iou", pinned=(ALL,))}
    for name, values in found["groups"].items():
        tables[f"By {name}"] = metrics_table(values, _LOCALIZATION, worst="iou")
    rule = found["rule"][0].upper() + found["rule"][1:]
    tiles = Table(tables["Sets"].head, tables["Sets"].rows[:1])
    return {"rule": f"{rule}; {found['truth']}.", "tolerance": TOLERANCE, "all": tiles, "tables": tables}


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
        image = thumbnail(row.sample.image)
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


def _faithfulness(found: Mapping[str, Any], covered: Mapping[str, Sequence[Covered]]) -> dict[str, Any]:
    """What is done in words, tables of all images and of the sets, and the least faithful images."""
    parts = {**found["sets"], ALL: found["all"]}
    table = metrics_table(parts, _FAITHFULNESS, worst="fall_difference", pinned=(ALL,))
    left_out = [f"{count} with {reason}" for reason, count in found["left_out"].items() if count]

    def difference(image: Mapping[str, Any]) -> float:
        return float(np.mean(image["random"])) - float(image["named"])

    worst = sorted(found["images"], key=lambda image: (difference(image), image["id"]))[:_MOST_COVERED]
    return {
        "method": found["method"],
        "left_out": f"Left out: {', '.join(left_out)}." if left_out else "",
        "all": Table(table.head, table.rows[:1], table.left_out),
        "sets": table if len(found["sets"]) > 1 else None,
        "cards": [_covered_card(image, covered[image["id"]]) for image in worst],
    }


def _judge(found: Mapping[str, Any]) -> dict[str, Any]:
    """Who graded by what, tables of all images and of the sets, and what could not be graded."""
    parts = {**found["sets"], ALL: found[ALL]}
    counts = {"explained": "explained", "graded": "graded", "not_graded": "not graded"}
    grades = {OVERALL: "overall", **{name: name.replace("_", " ") for name in found["rubric"]}}
    table = metrics_table(parts, counts | grades, worst=OVERALL, pinned=(ALL,))
    refused = found["not_graded"]
    rows = [[Cell(one["id"]), Cell(one["reason"])] for one in refused[:_MOST_FAILURES]]
    return {
        "model": found["model"],
        "scale": found["scale"],
        "rubric": {name.replace("_", " "): statement for name, statement in found["rubric"].items()},
        "usage": usage_words(found["usage"]),
        "prompt": found["prompt"],
        "all": Table(table.head, table.rows[:1], table.left_out),
        "sets": table if len(found["sets"]) > 1 else None,
        "refused": Table(["image", "reason"], rows),
        "count": len(refused),
    }


def _covered_card(image: Mapping[str, Any], covered: Sequence[Covered]) -> dict[str, str]:
    """An image with the named region lit, and with that and a random one covered."""
    shown = dict.fromkeys(("region", "named", "random"), "")
    if small := thumbnail(covered[0].image):
        named, random = covered[0].regions[:2]
        region = np.asarray(Image.fromarray(named).resize(small.size, Image.Resampling.NEAREST))
        drawn = (draw_mask(small, region), cover(small, named), cover(small, random))
        shown = {name: image_source(one) for name, one in zip(shown, drawn, strict=True)}
    scores = f"P(fake) {image['before']:.3f}; without the named region {image['named']:.3f}"
    return {"id": image["id"], **shown, "words": f"{scores}, without random ones {np.mean(image['random']):.3f}"}


def _true_mask(files: Sequence[Path]) -> Image.Image | None:
    return Image.fromarray(read_changed(files, above=ABOVE).astype(np.uint8) * 255) if files else None


def _small(mask: Image.Image) -> Image.Image:
    small = mask.convert("L")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
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
        values = [(metric, before["metrics"][metric]) for metric in plain]
        values += [(metric, part["metrics"].get(metric)) for metric in calibrated for part in (before, after)]
        rows.append([Cell(name), *(metric_cell(metric, value) for metric, value in values)])
    head = ["P(fake)", *plain.values()]
    for title in calibrated.values():
        head += [title, f"{title}, calibrated"]
    return Table(head, rows).without_dashes()


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
    image = thumbnail(row.sample.image)
    mask = read_mask(masks, row.prediction.mask) if masks and row.prediction.mask else None
    return {
        "image": image_source(image) if image else "",
        "mask": image_source(draw_grey_mask(image, mask)) if image and mask else "",
        "id": row.sample.id,
        "label": LABELS[row.sample.label],
        "verdict": row.prediction.verdict or "neither",
        "score": "no score" if np.isnan(row.score) else f"P(fake) {row.score:.3f}",
        "text": row.explanation or row.prediction.text or "no reasoning",
    }
