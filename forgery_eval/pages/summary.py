"""The first screen of a report: verdict metrics with intervals, and where they are worst."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forgery_eval.metrics.detection import wilson
from forgery_eval.metrics.grades import OVERALL
from forgery_eval.metrics.scoring import ALL, verdict_source
from forgery_eval.pages.tables import Cell, Table, heat, interval_words, metric_cell, number

MOST_GROUPS = 10
_BY = {"text": "by the answers' verdicts", "score": "by P(fake) from 0.5 on"}
_TILES = {
    "{by}_balanced_accuracy": "balanced accuracy",
    "{by}_real_accuracy": "real images right",
    "{by}_fake_accuracy": "fake images right",
    "auroc": "AUROC",
    "tpr_at_5_fpr": "fakes found at 5 % false alarms",
    "ece": "calibration error (ECE)",
    "failure_rate": "without a verdict",
}
_GIVEN = {"coverage": "get a verdict under the rule", "error_among_given": "error among given verdicts"}


@dataclass(frozen=True)
class Tile:
    """A number of the first screen.

    Attributes:
        title: What it is.
        value: The number.
        interval: Its 95 % interval in words, or empty.
        heat: How bad it is, see ``tables.heat``.
    """

    title: str
    value: str
    interval: str
    heat: int


def tiles(metrics: Mapping[str, Any]) -> tuple[str, list[Tile]]:
    """Returns whose verdicts are counted, in words, and the numbers of all images.

    Args:
        metrics: What ``metrics.json`` holds.
    """
    part = metrics["detection"][ALL]
    by = verdict_source(part["metrics"])
    names = {name.format(by=by): title for name, title in _TILES.items()}
    if part["metrics"][f"{by}_balanced_accuracy"] is None:
        names = {f"{by}_accuracy": "accuracy", **names}
    shown = [
        Tile(title, number(float(value)), interval_words(bounds) if (bounds := part["intervals"].get(name)) else "", h)
        for name, title in names.items()
        if (value := part["metrics"].get(name)) is not None
        for h in [heat(name, float(value))]
    ]
    given = metrics.get("abstention", {}).get("all")
    return _BY[by], shown + (_given_tiles(given) if given else [])


def _given_tiles(given: Mapping[str, Any]) -> list[Tile]:
    found = []
    for name, of in (("coverage", given["images"]), ("error_among_given", given["given"])):
        if (value := given[name]) is not None and of:
            bounds = wilson(round(value * of), of)
            found.append(Tile(_GIVEN[name], number(value), interval_words(bounds), heat(name, value)))
    return found


def summary_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Returns what a terminal shows of explanations that were put to the test.

    Args:
        metrics: What ``metrics.json`` holds.
    """
    lines = []
    if "faithfulness" in metrics:
        lines.append(f"faithfulness: {_faithfulness_words(metrics['faithfulness']['all'])}")
    if "judge" in metrics:
        lines.append(f"judge: {_judge_words(metrics['judge'])}")
    return lines


def _judge_words(found: Mapping[str, Any]) -> str:
    part = found[ALL]
    counts = part["metrics"]
    left = f"; {counts['not_graded']} could not be graded" if counts["not_graded"] else ""
    if not counts["graded"]:
        return f"{part['undefined'][OVERALL]}{left}"
    highest = found["scale"][1]
    return f"{_with_interval(part, OVERALL)} of {highest} over {counts['graded']} explanations{left}"


def _faithfulness_words(part: Mapping[str, Any]) -> str:
    if not part["metrics"]["images"]:
        return str(part["undefined"]["fall_named"])
    named, random, difference, more = (
        _with_interval(part, name) for name in ("fall_named", "fall_random", "fall_difference", "named_falls_more")
    )
    return (
        f"P(fake) falls by {named} when the named region is covered and by {random} when random ones are; difference "
        f"{difference}; the named one falls more in a share of {more} of {part['metrics']['images']} images"
    )


def _with_interval(part: Mapping[str, Any], metric: str) -> str:
    return f"{number(part['metrics'][metric])} ({interval_words(part['intervals'][metric])})"


def worst_parts(detection: Mapping[str, Any], most: int = MOST_GROUPS) -> Table | None:
    """Returns the sets and groups with the lowest accuracy; None where there is one part only.

    It is the balanced accuracy where a part has both classes. A group that is a set again, image by image, is not
    named twice.

    Args:
        detection: That of ``metrics.json``.
        most: Parts that are shown.
    """
    by = verdict_source(detection[ALL]["metrics"])
    parts = {f"set {name}": part for name, part in detection["sets"].items()} if len(detection["sets"]) > 1 else {}
    for group, values in detection["groups"].items():
        same = {name for name, part in values.items() if part["metrics"] == _metrics(detection["sets"].get(name))}
        parts |= {f"{group} {name}": part for name, part in values.items() if len(values) > 1 and name not in same}
    ranked = sorted(
        ((value, name, metric) for name, part in parts.items() for value, metric in [_accuracy(part["metrics"], by)]),
    )
    if len(ranked) < 2:
        return None
    rows = []
    for value, name, metric in ranked[:most]:
        part = parts[name]
        values = [metric_cell(metric, value, bounds=part["intervals"].get(metric))]
        values.append(metric_cell("auroc", part["metrics"]["auroc"], bounds=part["intervals"].get("auroc")))
        rows.append([Cell(name), Cell(str(part["metrics"]["images"])), *values])
    return Table(["", "images", "balanced accuracy, or of its one class", "AUROC"], rows).without_dashes()


def _metrics(part: Mapping[str, Any] | None) -> Any:
    return part["metrics"] if part else None


def _accuracy(metrics: Mapping[str, Any], by: str) -> tuple[float, str]:
    name = f"{by}_balanced_accuracy"
    if metrics.get(name) is None:
        name = f"{by}_accuracy"
    value = metrics.get(name)
    return (math.inf if value is None else float(value)), name
