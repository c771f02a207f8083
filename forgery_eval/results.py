"""Writes what an evaluation found: metrics.json, metrics.csv, report.html; metric.txt under the paper's protocol."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from forgery_eval.answers import AnswerKind
from forgery_eval.benchmarks import Sample
from forgery_eval.metrics.calibration import Calibration, fit, is_for_fitting, kind_of_score
from forgery_eval.metrics.scoring import ALL, Scored, Scoring, Similarity, protocol_metrics, score, with_scores
from forgery_eval.pages.report import report_page
from forgery_eval.store import Prediction
from llava.errors import CheckpointError, DataError
from llava.files import atomic_write
from llava.systems import registry
from llava.systems.base import EvaluationProtocol

PROTOCOLS = {
    False: "default: every answer counts, one without a verdict is wrong",
    True: "paper: as the authors evaluate; answers that they cannot read are dropped from every metric",
}


def open_similarity(clip_path: str) -> Similarity:
    """Loads CLIP's text tower.

    Raises:
        CheckpointError: There is no such model.
    """
    from forgery_eval.metrics.similarity import TextSimilarity

    try:
        clip = TextSimilarity(clip_path)
    except (OSError, ValueError) as error:  # what transformers raises where a folder or a hub id holds no such model
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{clip_path} cannot be opened as a CLIP model: {reason}") from error
    return Similarity(clip.cut, clip.chunked)


def write_results(
    folder: Path,
    samples: Sequence[Sample],
    predictions: Sequence[Prediction],
    about: dict[str, Any],
    answers: AnswerKind,
    *,
    similarity: Similarity | None = None,
    calibration: Calibration | None = None,
    fit_calibration: bool = False,
    protocol: EvaluationProtocol | None = None,
    masks: Path | None = None,
) -> None:
    """Computes every metric, then writes the files.

    Args:
        folder: Where they go.
        samples: The samples.
        predictions: One for each.
        about: What was run on which data; stands in ``metrics.json``.
        answers: What the answers of the predictions' system can have.
        similarity: Compares texts by CLIP.
        calibration: Applied to the scores.
        fit_calibration: Fit the calibration on the ids of its split, save it, and report on the rest.
        protocol: Also compute the authors' metrics.
        masks: Folder that the predictions' masks are named from.

    Raises:
        DataError: The scores cannot be calibrated, or the calibration is for another score.
        FileError: A file cannot be written.
    """
    _check_score(calibration, predictions)
    reported = list(zip(samples, predictions, strict=True))
    for_fitting: list[tuple[Sample, Prediction]] = []
    if fit_calibration:
        for_fitting = [pair for pair in reported if is_for_fitting(pair[0].id)]
        calibration = _fit(for_fitting, "fake_probability", _score_read(predictions))
        reported = [pair for pair in reported if not is_for_fitting(pair[0].id)]
        if not reported:
            raise DataError("every id falls in the calibration split, so there is nothing to report on")
    kept, kept_predictions = [sample for sample, _ in reported], [prediction for _, prediction in reported]
    rows = score(kept, kept_predictions, answers, similarity=similarity, calibration=calibration)
    scoring = Scoring.of(rows, answers)
    metrics: dict[str, Any] = {"protocol": PROTOCOLS[protocol is not None], **about, "calibration": None}
    if calibration:
        before = scoring.overall(with_scores(rows, [p.fake_probability for p in kept_predictions]))
        metrics["calibration"] = {**asdict(calibration), "fitted_here": fit_calibration, "before": before}
    if protocol:
        metrics["paper"] = protocol_metrics(kept, kept_predictions, protocol, similarity)
    metrics |= scoring.all_metrics(rows)
    if any(p.answer_probability is not None for p in kept_predictions):
        own = _fit(for_fitting, "answer_probability", "answer") if for_fitting else None
        metrics["answer_score"] = _answer_score(rows, scoring, own)
    page = report_page(metrics, rows, published=registry.component(answers.system, "protocol"), masks=masks)
    if calibration and fit_calibration:
        calibration.save(folder / "calibration.json")
    if protocol:
        lines = (protocol.metric_line(name, values) for name, values in metrics["paper"].items())
        atomic_write(folder / "metric.txt", "".join(lines))
    atomic_write(folder / "metrics.json", json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    atomic_write(folder / "metrics.csv", _csv(metrics))
    atomic_write(folder / "report.html", page)


def _score_read(predictions: Sequence[Prediction]) -> str | None:
    return kind_of_score(p.score_source for p in predictions if p.fake_probability is not None)


def _check_score(calibration: Calibration | None, predictions: Sequence[Prediction]) -> None:
    read = _score_read(predictions)
    if calibration and calibration.score and read and calibration.score != read:
        raise DataError(
            f"the calibration is for the {calibration.score!r} score, but these scores are {read!r}: "
            "ask for the other score with --score, or fit again with --calibrate"
        )


def _fit(pairs: Sequence[tuple[Sample, Prediction]], field: str, score: str | None) -> Calibration:
    scores = [getattr(prediction, field) for _, prediction in pairs]
    labels = [sample.label for sample, _ in pairs]
    return fit([np.nan if value is None else value for value in scores], labels, score)


def _answer_score(rows: Sequence[Scored], scoring: Scoring, calibration: Calibration | None) -> dict[str, Any]:
    """Metrics of the score at the answer's verdict, where the score that is reported was read without the answer."""
    probabilities = [row.prediction.answer_probability for row in rows]
    before = scoring.overall(with_scores(rows, probabilities))
    if calibration is None:
        return {"calibration": None, **before}
    after = scoring.overall(with_scores(rows, probabilities, calibration))
    return {"calibration": {**asdict(calibration), "fitted_here": True, "before": before}, **after}


def _csv(metrics: dict[str, Any]) -> str:
    """Every number, one a line: part, name, metric, value, low and high end of its interval, reason if undefined."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("part", "name", "metric", "value", "low", "high", "undefined"))
    for part, name, found in _parts(metrics):
        for metric, value in found["metrics"].items():
            if not isinstance(value, dict):
                low, high = found["intervals"].get(metric) or (None, None)
                writer.writerow((part, name, metric, value, low, high, found["undefined"].get(metric)))
    for name, values in metrics.get("paper", {}).items():
        for metric, value in values.items():
            writer.writerow(("paper", name, metric, value, None, None, None))
    return text.getvalue()


def _parts(metrics: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    found = metrics["detection"]
    yield from (("detection", name, part) for name, part in found["sets"].items())
    yield from (("detection", name, found[name]) for name in ("macro", ALL))
    if "answer_score" in metrics:
        yield "detection", "all, score of the answer", metrics["answer_score"]
    for group, values in found["groups"].items():
        yield from (("detection", f"{group}={value}", part) for value, part in values.items())
    for name, kinds in [*metrics["reasoning"]["sets"].items(), (ALL, metrics["reasoning"][ALL])]:
        yield from ((f"reasoning, {kind} answers", name, part) for kind, part in kinds.items())
