"""Writes what an evaluation found: metrics.json, metrics.csv, report.html; metric.txt under the paper's protocol."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from forgery_eval.answers import AnswerKind
from forgery_eval.benchmarks import Sample
from forgery_eval.covering import METHOD
from forgery_eval.faithfulness import Faithfulness
from forgery_eval.judge import RUBRIC, Judge
from forgery_eval.localize import ABOVE, ABOVE_PUBLISHED, localization
from forgery_eval.metrics.calibration import Calibration, fit, is_for_fitting, kind_of_score
from forgery_eval.metrics.choices import choice_metrics
from forgery_eval.metrics.faithfulness import faithfulness_metrics
from forgery_eval.metrics.grades import grade_metrics
from forgery_eval.metrics.robustness import robustness
from forgery_eval.metrics.scoring import ALL, Scored, Scoring, Similarity, protocol_metrics, score, with_scores
from forgery_eval.metrics.videos import video_metrics
from forgery_eval.pages.report import report_page
from forgery_eval.store import Prediction
from forgery_eval.verdicts import Evidence, Judgement, given_under
from llava.abstention import CALIBRATION, AbstentionRule
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
    fit_share: float = 0.0,
    protocol: EvaluationProtocol | None = None,
    masks: Path | None = None,
    judgement: Judgement | None = None,
    perturbed: Mapping[tuple[str, str], Evidence] | None = None,
    faithfulness: Faithfulness | None = None,
    judge: Judge | None = None,
) -> dict[str, Any]:
    """Computes every metric, then writes the files.

    Args:
        folder: Where they go.
        samples: The samples.
        predictions: One for each.
        about: What was run on which data; stands in ``metrics.json``.
        answers: What the answers of the predictions' system can have.
        similarity: Compares texts by CLIP.
        calibration: Applied to the scores.
        fit_share: Share of the ids that the calibration is fitted on and saved; the rest is reported. 0 to fit none.
        protocol: Also compute the authors' metrics.
        masks: Folder that the predictions' masks are named from.
        judgement: By which rule verdicts are given.
        perturbed: What was predicted of the same samples after perturbations, by step and strength.
        faithfulness: What was predicted of some of them with regions covered.
        judge: Grades their explanations.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        DataError: The scores cannot be calibrated, or the calibration or the rule is for another score.
        FileError: A file cannot be written.
    """
    _check_score(calibration, predictions)
    judgement = judgement or Judgement()
    _check_score(judgement.rule, predictions)
    reported = list(zip(samples, predictions, strict=True))
    for_fitting: list[tuple[Sample, Prediction]] = []
    if fit_share:
        for_fitting = [pair for pair in reported if is_for_fitting(pair[0].id, fit_share)]
        calibration = _fit(for_fitting, "fake_probability", _score_read(predictions))
        reported = [pair for pair in reported if not is_for_fitting(pair[0].id, fit_share)]
        if not reported:
            raise DataError("every id falls in the calibration split, so there is nothing to report on")
        judgement = judgement.fitted(samples, predictions, _score_read(predictions), list((perturbed or {}).values()))
    kept, kept_predictions = [sample for sample, _ in reported], [prediction for _, prediction in reported]
    rows = score(kept, kept_predictions, answers, similarity=similarity, calibration=calibration)
    scoring = Scoring.of(rows, answers)
    metrics: dict[str, Any] = {"protocol": PROTOCOLS[protocol is not None], **about, "calibration": None}
    if calibration:
        before = scoring.overall(with_scores(rows, [p.fake_probability for p in kept_predictions]))
        fitted = {"fitted_here": bool(fit_share), "share": fit_share}
        metrics["calibration"] = {**asdict(calibration), **fitted, "before": before}
    if protocol:
        metrics["paper"] = protocol_metrics(kept, kept_predictions, protocol, similarity)
    metrics |= scoring.all_metrics(rows)
    above = ABOVE if protocol is None else ABOVE_PUBLISHED
    if masked := localization(kept, kept_predictions, masks, above=above):
        metrics["localization"] = masked
    if any(row.sample.video for row in rows):
        metrics["videos"] = video_metrics(rows, scoring)
    if any(row.sample.chosen_from for row in rows):
        metrics["choices"] = choice_metrics(rows, draws=scoring.draws, seed=scoring.seed)
    if any(p.answer_probability is not None for p in kept_predictions):
        own = _fit(for_fitting, "answer_probability", "answer") if for_fitting else None
        metrics["answer_score"] = _answer_score(rows, scoring, own)
    reporting = [k for k, sample in enumerate(samples) if not is_for_fitting(sample.id, fit_share)]
    if judgement.rule:
        metrics["abstention"] = judgement.measured(rows, reporting)
    if perturbed:
        runs = {cell: run.of(reporting) for cell, run in perturbed.items()}
        under = {cell: score(kept, run.predictions, answers, calibration=calibration) for cell, run in runs.items()}
        metrics["robustness"] = _robustness(rows, under, runs, scoring, judgement.rule)
    if faithfulness:
        found = faithfulness_metrics(faithfulness.scores, draws=scoring.draws, seed=scoring.seed)
        metrics["faithfulness"] = {"method": METHOD, "left_out": dict(faithfulness.left_out), **found}
    if judge:
        metrics["judge"] = _judged(judge, rows, scoring)
    covered = faithfulness.covered if faithfulness else {}
    published = registry.component(answers.system, "protocol")
    page = report_page(metrics, rows, published=published, masks=masks, covered=covered)
    if calibration and fit_share:
        calibration.save(folder / CALIBRATION)
        if judgement.rule:
            judgement.rule.save(folder / CALIBRATION)
    _write(folder, metrics, page, protocol)
    return metrics


def _judged(judge: Judge, rows: Sequence[Scored], scoring: Scoring) -> dict[str, Any]:
    """Means of the grades, which explanations have none and why, and what it took."""
    grades = judge.grade(rows)
    found = grade_metrics(
        [(row.sample.set, row.sample.label, row.explanation, grades.of.get(row.sample.id)) for row in rows],
        list(RUBRIC),
        draws=scoring.draws,
        seed=scoring.seed,
    )
    refused = [{"id": name, "reason": reason} for name, reason in grades.refused.items()]
    return {**grades.about, **found, "not_graded": refused, "usage": dict(grades.usage)}


def _robustness(
    clean: Sequence[Scored],
    rows: Mapping[tuple[str, str], Sequence[Scored]],
    runs: Mapping[tuple[str, str], Evidence],
    scoring: Scoring,
    rule: AbstentionRule | None,
) -> dict[str, Any]:
    """Metrics of each perturbation, and of the verdicts that are given under it."""
    found = robustness(clean, rows, scoring)
    for condition in found["conditions"] if rule else ():
        cell = (condition["step"], condition["strength"])
        assert rule is not None
        condition["abstention"] = given_under(rule, rows[cell], runs[cell])
    return found


def _write(folder: Path, metrics: dict[str, Any], page: str, protocol: EvaluationProtocol | None) -> None:
    if protocol:
        lines = (protocol.metric_line(name, values) for name, values in metrics["paper"].items())
        atomic_write(folder / "metric.txt", "".join(lines))
    atomic_write(folder / "metrics.json", json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    atomic_write(folder / "metrics.csv", _csv(metrics))
    atomic_write(folder / "report.html", page)


def _score_read(predictions: Sequence[Prediction]) -> str | None:
    return kind_of_score(p.score_source for p in predictions if p.fake_probability is not None)


def _check_score(calibration: Calibration | AbstentionRule | None, predictions: Sequence[Prediction]) -> None:
    read = _score_read(predictions)
    if calibration and calibration.score and read and calibration.score != read:
        raise DataError(
            f"the calibration is for the {calibration.score!r} score, but these scores are {read!r}: "
            "ask the model for the score that it is for, or fit again with --calibrate"
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
    for part, name, values in _plain_parts(metrics):
        for metric, value in values.items():
            if not isinstance(value, dict | list | str):
                writer.writerow((part, name, metric, value, None, None, None))
    for name, values in metrics.get("paper", {}).items():
        for metric, value in values.items():
            writer.writerow(("paper", name, metric, value, None, None, None))
    return text.getvalue()


def _plain_parts(metrics: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Measures without intervals: of given verdicts (all, each set, each perturbation), and errors by perturbation."""
    if "abstention" in metrics:
        yield "abstention", ALL, metrics["abstention"]["all"]
        yield from (("abstention", name, part) for name, part in metrics["abstention"]["sets"].items())
    for condition in metrics.get("robustness", {}).get("conditions", []):
        name = f"{condition['step']} {condition['strength']}"
        yield "robustness", name, condition
        if "abstention" in condition:
            yield "abstention", name, condition["abstention"]


def _parts(metrics: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    found = metrics["detection"]
    yield from (("detection", name, part) for name, part in found["sets"].items())
    yield from (("detection", name, found[name]) for name in ("macro", ALL))
    if "videos" in metrics:
        yield "detection", "all, by video", metrics["videos"]
    if "choices" in metrics:
        yield "detection", "choices between images", metrics["choices"]
    if "answer_score" in metrics:
        yield "detection", "all, score of the answer", metrics["answer_score"]
    for condition in metrics.get("robustness", {}).get("conditions", []):
        yield "robustness", f"{condition['step']} {condition['strength']}", condition
    for group, values in found["groups"].items():
        yield from (("detection", f"{group}={value}", part) for value, part in values.items())
    if "localization" in metrics:
        masks = metrics["localization"]
        yield from (("localization", name, part) for name, part in [*masks["sets"].items(), (ALL, masks["all"])])
        for group, values in masks["groups"].items():
            yield from (("localization", f"{group}={value}", part) for value, part in values.items())
    for name, kinds in [*metrics["reasoning"]["sets"].items(), (ALL, metrics["reasoning"][ALL])]:
        yield from ((f"reasoning, {kind} answers", name, part) for kind, part in kinds.items())
    for kind in ("faithfulness", "judge"):
        if kind in metrics:
            yield from (
                (kind, name, part) for name, part in [*metrics[kind]["sets"].items(), (ALL, metrics[kind][ALL])]
            )
    yield from (("attribute", name, part) for name, part in metrics["reasoning"]["attributes"].items())
