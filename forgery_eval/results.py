"""Writes what an evaluation found: metrics.json, metrics.csv, report.html; metric.txt under the paper's protocol."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from forgery_eval.benchmarks import Sample
from forgery_eval.calibration import Calibration, fit, is_for_fitting, kind_of_score
from forgery_eval.predictions import Prediction
from forgery_eval.report_page import report_page
from forgery_eval.scoring import (
    ALL,
    Scored,
    Similarity,
    all_figures,
    overall_figures,
    paper_figures,
    score,
    with_scores,
)
from llava.files import atomic_write
from llava.systems.fakereasoning import protocol

PROTOCOLS = {
    False: "default: every answer counts, one without a verdict is wrong",
    True: "paper: as the authors evaluate; answers that they cannot read are dropped from every figure",
}


def open_similarity(clip_path: str) -> Similarity:
    """Loads CLIP's text tower.

    Raises:
        ValueError: There is no such model.
    """
    from forgery_eval.metrics.similarity import TextSimilarity

    try:
        clip = TextSimilarity(clip_path)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{clip_path} cannot be opened as a CLIP model: {reason}") from None
    return Similarity(clip.cut, clip.chunked)


def write_results(
    folder: Path,
    samples: Sequence[Sample],
    predictions: Sequence[Prediction],
    about: dict[str, Any],
    *,
    similarity: Similarity | None = None,
    calibration: Calibration | None = None,
    fit_calibration: bool = False,
    paper: bool = False,
) -> None:
    """Computes every figure and writes the files.

    Args:
        folder: Where they go.
        samples: The samples.
        predictions: One for each.
        about: What was run on which data; stands in ``metrics.json``.
        similarity: Compares texts by CLIP.
        calibration: Applied to the scores.
        fit_calibration: Fit the calibration on the ids of its split, save it, and report on the rest.
        paper: Also compute the authors' figures.

    Raises:
        ValueError: The scores cannot be calibrated, or the calibration is for another score.
    """
    _check_score(calibration, predictions)
    reported = list(zip(samples, predictions, strict=True))
    for_fitting: list[tuple[Sample, Prediction]] = []
    if fit_calibration:
        for_fitting = [pair for pair in reported if is_for_fitting(pair[0].id)]
        calibration = _fit(for_fitting, "fake_probability", _score_read(predictions))
        calibration.save(folder / "calibration.json")
        reported = [pair for pair in reported if not is_for_fitting(pair[0].id)]
        if not reported:
            raise ValueError("every id falls in the calibration split, so there is nothing to report on")
    kept, said = [sample for sample, _ in reported], [prediction for _, prediction in reported]
    rows = score(kept, said, similarity=similarity, calibration=calibration)
    metrics: dict[str, Any] = {"protocol": PROTOCOLS[paper], **about, "calibration": None}
    if calibration:
        before = overall_figures(with_scores(rows, [p.fake_probability for p in said]))
        metrics["calibration"] = {**asdict(calibration), "fitted_here": fit_calibration, "before": before}
    if paper:
        metrics["paper"] = paper_figures(kept, said, similarity)
        lines = (protocol.metric_line(name, values) for name, values in metrics["paper"].items())
        atomic_write(folder / "metric.txt", "".join(lines))
    metrics |= all_figures(rows)
    if any(p.answer_probability is not None for p in said):
        own = _fit(for_fitting, "answer_probability", "answer") if for_fitting else None
        metrics["answer_score"] = _answer_score(rows, own)
    atomic_write(folder / "metrics.json", json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    atomic_write(folder / "metrics.csv", _csv(metrics))
    atomic_write(folder / "report.html", report_page(metrics, rows))


def _score_read(predictions: Sequence[Prediction]) -> str | None:
    return kind_of_score(said.score_source for said in predictions if said.fake_probability is not None)


def _check_score(calibration: Calibration | None, predictions: Sequence[Prediction]) -> None:
    read = _score_read(predictions)
    if calibration and calibration.score and read and calibration.score != read:
        raise ValueError(
            f"the calibration is for the {calibration.score!r} score, but these scores are {read!r}: "
            "ask for the other score with --score, or fit anew with --calibrate"
        )


def _fit(pairs: Sequence[tuple[Sample, Prediction]], field: str, score: str | None) -> Calibration:
    scores = [getattr(prediction, field) for _, prediction in pairs]
    labels = [sample.label for sample, _ in pairs]
    return fit([np.nan if value is None else value for value in scores], labels, score)


def _answer_score(rows: Sequence[Scored], calibration: Calibration | None) -> dict[str, Any]:
    """Figures of the score at the answer's verdict, where the score that is reported was read without the answer."""
    said = [row.prediction.answer_probability for row in rows]
    before = overall_figures(with_scores(rows, said))
    if calibration is None:
        return {"calibration": None, **before}
    after = overall_figures(with_scores(rows, said, calibration))
    return {"calibration": {**asdict(calibration), "fitted_here": True, "before": before}, **after}


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
    if "answer_score" in metrics:
        yield "detection", "all, score of the answer", metrics["answer_score"]
    for group, values in found["groups"].items():
        yield from (("detection", f"{group}={value}", figures) for value, figures in values.items())
    for name, kinds in [*metrics["reasoning"]["sets"].items(), (ALL, metrics["reasoning"][ALL])]:
        yield from ((f"reasoning, {kind} answers", name, figures) for kind, figures in kinds.items())
