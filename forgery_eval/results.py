"""Writes what an evaluation found: metrics.json, metrics.csv, report.html; metric.txt under the paper's protocol."""

import argparse
import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from forgery_eval import paper_protocol
from forgery_eval.benchmarks import Sample
from forgery_eval.calibration import Calibration, fit, is_for_fitting
from forgery_eval.files import write_whole
from forgery_eval.predictions import Prediction
from forgery_eval.report_page import report_page
from forgery_eval.scoring import ALL, Similarity, all_figures, paper_figures, score

PROTOCOLS = {
    False: "default: every answer counts, one without a verdict is wrong",
    True: "paper: as the authors evaluate; answers that they cannot read are dropped from every figure",
}


def write_results(
    samples: Sequence[Sample],
    predictions: Sequence[Prediction],
    about: dict[str, Any],
    arguments: argparse.Namespace,
) -> None:
    """Computes every figure and writes the files.

    Args:
        samples: The samples.
        predictions: One for each.
        about: What was run.
        arguments: Of the command: ``result_folder``, ``dataset_path``, ``clip_path``, ``calibrate``, ``calibration``,
            ``paper_protocol``.

    Raises:
        ValueError: The scores cannot be calibrated.
    """
    folder = arguments.result_folder
    similarity = _similarity(arguments.clip_path)
    reported = list(zip(samples, predictions, strict=True))
    calibration = Calibration.load(arguments.calibration) if arguments.calibration else None
    if arguments.calibrate:
        calibration = _fit(reported)
        calibration.save(folder / "calibration.json")
        reported = [(sample, prediction) for sample, prediction in reported if not is_for_fitting(sample.id)]
        if not reported:
            raise ValueError("every id falls in the calibration split, so there is nothing to report on")
    kept, said = [sample for sample, _ in reported], [prediction for _, prediction in reported]
    rows = score(kept, said, similarity=similarity, calibration=calibration)
    metrics: dict[str, Any] = {
        "protocol": PROTOCOLS[arguments.paper_protocol],
        "data": arguments.dataset_path.resolve().name,
        **about,
        "calibration": None,
    }
    if calibration:
        before = all_figures(score(kept, said))["detection"][ALL]
        metrics["calibration"] = {**asdict(calibration), "fitted_here": arguments.calibrate, "before": before}
    if arguments.paper_protocol:
        metrics["paper"] = paper_figures(kept, said, similarity)
        lines = (paper_protocol.metric_line(name, values) for name, values in metrics["paper"].items())
        write_whole(folder / "metric.txt", "".join(lines))
    metrics |= all_figures(rows)
    write_whole(folder / "metrics.json", json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_whole(folder / "metrics.csv", _csv(metrics))
    write_whole(folder / "report.html", report_page(metrics, rows))


def _similarity(clip_path: str | None) -> Similarity | None:
    if clip_path is None:
        return None
    from forgery_eval.metrics.similarity import TextSimilarity

    clip = TextSimilarity(clip_path)
    return Similarity(clip.cut, clip.chunked)


def _fit(reported: Sequence[tuple[Sample, Prediction]]) -> Calibration:
    own = [(sample, prediction) for sample, prediction in reported if is_for_fitting(sample.id)]
    scores = [np.nan if p.fake_probability is None else p.fake_probability for _, p in own]
    return fit(scores, [sample.label for sample, _ in own])


def _csv(metrics: dict[str, Any]) -> str:
    """Every number, one a line: part, name, figure, value, low and high end of its interval, reason if undefined."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("part", "name", "figure", "value", "low", "high", "undefined"))
    for part, name, found in _parts(metrics):
        for figure, value in found["figures"].items():
            if not isinstance(value, dict):
                low, high = found["intervals"].get(figure) or (None, None)
                writer.writerow((part, name, figure, value, low, high, found["undefined"].get(figure)))
    for name, values in metrics.get("paper", {}).items():
        for figure, value in values.items():
            writer.writerow(("paper", name, figure, value, None, None, None))
    return text.getvalue()


def _parts(metrics: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    found = metrics["detection"]
    yield from (("detection", name, figures) for name, figures in found["sets"].items())
    yield from (("detection", name, found[name]) for name in ("macro", ALL))
    for group, values in found["groups"].items():
        yield from (("detection", f"{group}={value}", figures) for value, figures in values.items())
    for name, kinds in [*metrics["reasoning"]["sets"].items(), (ALL, metrics["reasoning"][ALL])]:
        yield from ((f"reasoning, {kind} answers", name, figures) for kind, figures in kinds.items())
