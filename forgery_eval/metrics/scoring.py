"""From samples and predictions to every metric of a report. Imports no torch unless texts are compared by CLIP."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from forgery_eval.answers import AnswerKind
from forgery_eval.benchmarks import Sample
from forgery_eval.metrics import detection
from forgery_eval.metrics.calibration import Calibration
from forgery_eval.metrics.ratios import ratio_part
from forgery_eval.metrics.reasoning import attribute_sums, mean_with_interval, text_metrics
from forgery_eval.store import Prediction
from llava.errors import DataError
from llava.labels import parse_label
from llava.systems.base import CompareMeanings, EvaluatedAnswer, EvaluationProtocol

ALL = "all"
ONLY_SCORES = "only scores were asked for"
NO_CLIP = "no CLIP model was given (--clip_path)"
NO_REFERENCE = "no image has both an answer and a reference text"
_SCORES_WITHOUT_ANSWER = ("prompt", "detector")
"""Sources of a score that need no answer; the verdict beside such a score is the score's own."""
_TEXT_METRICS = (*(f"bleu_{order}" for order in (1, 2, 3, 4)), "rouge_l", "css", "css_chunked", "words")


@dataclass(frozen=True)
class Similarity:
    """The two ways in which CLIP compares texts."""

    cut: CompareMeanings
    chunked: CompareMeanings


@dataclass(frozen=True)
class Scored:
    """A sample with what was predicted of it, and with its text's metrics.

    Attributes:
        sample: The sample.
        prediction: What was predicted.
        score: P(fake), calibrated if that was asked for; NaN where there is none.
        uncalibrated: P(fake) before that, by which images are ranked.
        explanation: The text that says why; empty if there is none.
        texts: Metrics of the explanation; None where there is no reference.
    """

    sample: Sample
    prediction: Prediction
    score: float
    explanation: str
    texts: Mapping[str, float] | None
    uncalibrated: float = np.nan


@dataclass(frozen=True)
class Impossible:
    """Why kinds of metrics cannot be computed of some predictions; empty texts where they can.

    Attributes:
        text: Those of the verdicts that texts give.
        score: Those of P(fake).
        explanation: Those of explanations.
        attributes: Those of named attributes.
    """

    text: str
    score: str
    explanation: str
    attributes: str

    @classmethod
    def of(cls, predictions: Sequence[Prediction], answers: AnswerKind) -> "Impossible":
        """Returns the reasons, from what the system's answers can have and from what there is."""
        any_score = any(prediction.fake_probability is not None for prediction in predictions)
        any_verdict = any(prediction.verdict is not None for prediction in predictions)
        text = ONLY_SCORES if only_scores(predictions) else ""
        if any_score or not any_verdict:  # verdicts of a system with neither answers nor scores are all there is
            text = answers.without_text or text
        return cls(
            text=text,
            score="" if any_score else detection.NO_SCORE,
            explanation=text or answers.without_explanation,
            attributes=text or answers.without_attributes,
        )


def only_scores(predictions: Sequence[Prediction]) -> bool:
    """Whether no answer was asked for: there are scores, but no text and no verdict of one."""
    answered = any(p.text or (p.verdict and p.score_source not in _SCORES_WITHOUT_ANSWER) for p in predictions)
    return not answered and any(p.fake_probability is not None for p in predictions)


def match(samples: Sequence[Sample], predictions: Mapping[str, Prediction]) -> list[Prediction]:
    """Returns the prediction of each sample; one that is not there is a failure.

    Raises:
        DataError: No sample has a prediction.
    """
    if not any(sample.id in predictions for sample in samples):
        raise DataError("no prediction has the id of a sample; ids must be those of the data set")
    missing = "there is no prediction"
    return [predictions.get(sample.id) or Prediction(sample.id, sample.label, error=missing) for sample in samples]


def score(
    samples: Sequence[Sample],
    predictions: Sequence[Prediction],
    answers: AnswerKind,
    *,
    similarity: Similarity | None = None,
    calibration: Calibration | None = None,
) -> list[Scored]:
    """Joins samples, predictions and the metrics of their explanations."""
    explanations = [answers.explanation(prediction.stages) for prediction in predictions]
    possible = not Impossible.of(predictions, answers).explanation
    compared = [index for index, sample in enumerate(samples) if sample.reference and possible]
    texts = [explanations[index] for index in compared]
    references = [samples[index].reference or "" for index in compared]
    metrics: dict[int, dict[str, float]] = {
        index: text_metrics(text, reference) for index, text, reference in zip(compared, texts, references, strict=True)
    }
    if similarity and compared:
        for name, compare in (("css", similarity.cut), ("css_chunked", similarity.chunked)):
            for index, value in zip(compared, compare(texts, references), strict=True):
                metrics[index][name] = value
    rows = [
        Scored(sample, prediction, np.nan, explanations[index], metrics.get(index))
        for index, (sample, prediction) in enumerate(zip(samples, predictions, strict=True))
    ]
    return with_scores(rows, [prediction.fake_probability for prediction in predictions], calibration)


def with_scores(
    rows: Sequence[Scored], probabilities: Sequence[float | None], calibration: Calibration | None = None
) -> list[Scored]:
    """Returns the rows with these scores, calibrated if that is asked for."""
    before = np.array([np.nan if value is None else value for value in probabilities], float)
    scores = calibration(before) if calibration else before
    return [
        replace(row, score=float(value), uncalibrated=float(own))
        for row, value, own in zip(rows, scores, before, strict=True)
    ]


def outcomes(rows: Sequence[Scored]) -> detection.Outcomes:
    """Returns the rows as arrays."""
    sets = {name: number for number, name in enumerate(dict.fromkeys(row.sample.set for row in rows))}
    return detection.Outcomes(
        labels=np.array([row.sample.label for row in rows], int),
        verdicts=np.array([_class_number(row.prediction.verdict) for row in rows], int),
        scores=np.array([row.score for row in rows], float),
        strata=np.array([sets[row.sample.set] for row in rows], int),
        uncalibrated=np.array([row.uncalibrated for row in rows], float),
    )


def _class_number(verdict: str | None) -> int:
    return detection.NO_ANSWER if (label := parse_label(verdict)) is None else label


@dataclass(frozen=True)
class Scoring:
    """Computes metrics of parts of one evaluation.

    Attributes:
        impossible: Which kinds of metrics there are not, and why; of all images, so that parts are comparable.
        draws: Number of bootstrap draws.
        seed: Of the draws.
    """

    impossible: Impossible
    draws: int = detection.DRAWS
    seed: int = 0

    @classmethod
    def of(cls, rows: Sequence[Scored], answers: AnswerKind, **settings: int) -> "Scoring":
        """Returns the scoring of an evaluation's rows."""
        return cls(Impossible.of([row.prediction for row in rows], answers), **settings)

    def all_metrics(self, rows: Sequence[Scored]) -> dict[str, Any]:
        """Computes every metric: of each set and group, of all images together, and the mean over sets."""
        names = dict.fromkeys(row.sample.set for row in rows)
        sets = {name: [row for row in rows if row.sample.set == name] for name in names}
        drawn = {name: self._detection(f"set {name}", part) for name, part in sets.items()}
        return {
            "detection": {
                "sets": {name: found for name, (found, _) in drawn.items()},
                "macro": _macro(list(drawn.values())),
                ALL: self.overall(rows),
                "groups": {
                    name: {value: self._detection(f"{name} {value}", part)[0] for value, part in values.items()}
                    for name, values in _groups(rows).items()
                },
            },
            "reasoning": {
                "sets": {name: self._reasoning(f"set {name}", part) for name, part in sets.items()},
                ALL: self._reasoning(ALL, rows),
                "attributes": self._each_attribute(rows),
            },
            "failures": [
                {"id": row.sample.id, "reason": _failure(row.prediction)} for row in rows if self._failed(row)
            ],
        }

    def overall(self, rows: Sequence[Scored]) -> dict[str, Any]:
        """Computes the detection metrics of all images together, those that ``all_metrics`` gives for them."""
        return self._detection(ALL, rows)[0]

    def _failed(self, row: Scored) -> bool:
        """Whether an image has no result: no score where there are only scores, else no verdict."""
        return bool(np.isnan(row.score)) if self.impossible.text else row.prediction.verdict is None

    def _detection(self, name: str, rows: Sequence[Scored]) -> tuple[dict[str, Any], dict[str, detection.Array]]:
        arrays = outcomes(rows)
        if self.impossible.text:
            # What has a score did not fail; the metrics of the text are taken out again below.
            arrays = replace(arrays, verdicts=arrays.by_score)
        metrics, undefined = detection.detection_metrics(arrays)
        for reason, affected in ((self.impossible.text, _of_text), (self.impossible.score, _of_score)):
            if reason:
                names = [key for key in metrics if affected(key)]
                metrics |= dict.fromkeys(names)
                undefined |= dict.fromkeys(names, reason)
        values = detection.bootstrap(arrays, name, draws=self.draws, seed=self.seed)
        intervals = {key: None if metrics[key] is None else detection.interval(drawn) for key, drawn in values.items()}
        return {"metrics": metrics, "intervals": intervals, "undefined": undefined}, values

    def _reasoning(self, name: str, rows: Sequence[Scored]) -> dict[str, Any]:
        """Text metrics: over all images with a reference, failures counting 0, and over answers with a verdict."""
        parsed = [row for row in rows if row.prediction.verdict is not None]
        return {"all": self._texts(name, rows), "parsed": self._texts(f"{name}, parsed", parsed)}

    def _texts(self, name: str, rows: Sequence[Scored]) -> dict[str, Any]:
        compared = [(row.prediction.verdict is not None, row.texts) for row in rows if row.texts is not None]
        metrics: dict[str, Any] = {"texts": None if self.impossible.explanation else len(compared)}
        intervals: dict[str, list[float] | None] = {}
        undefined = {"texts": self.impossible.explanation} if self.impossible.explanation else {}
        for metric in _TEXT_METRICS:
            values = [texts[metric] if is_parsed else 0.0 for is_parsed, texts in compared if metric in texts]
            found = mean_with_interval(values, self.draws, self.seed) if values else {"mean": None, "interval": None}
            metrics[metric], intervals[metric] = found["mean"], found["interval"]
            if not values:
                undefined[metric] = self.impossible.explanation or (NO_CLIP if compared else NO_REFERENCE)
        named = self._attributes(f"attributes {name}", rows)
        return {
            "metrics": metrics | named["metrics"],
            "intervals": intervals | named["intervals"],
            "undefined": undefined | named["undefined"],
        }

    def _attributes(self, name: str, rows: Sequence[Scored], only: str | None = None) -> dict[str, Any]:
        """Precision, recall and F1 of attributes; a failure names none, and so counts against recall and F1."""
        known = [row for row in rows if row.sample.attributes is not None and not self.impossible.attributes]
        pairs = [(row.prediction.attributes if row.prediction.verdict else (), row.sample.attributes) for row in known]
        sums = attribute_sums([(own, there or ()) for own, there in pairs], only)
        unnamed = "no attribute is named" if known else "no image has both an answer and known attributes"
        reasons = dict.fromkeys(sums, self.impossible.attributes or unnamed)
        strata = [(row.sample.set, row.sample.label) for row in known]
        return ratio_part(name, strata, sums, reasons, draws=self.draws, seed=self.seed)

    def _each_attribute(self, rows: Sequence[Scored]) -> dict[str, Any]:
        """The metrics of each attribute that is there or was named, and how many images have it and name it."""
        known = [row for row in rows if row.sample.attributes is not None and not self.impossible.attributes]
        there = Counter(name for row in known for name in set(row.sample.attributes or ()))
        named = Counter(name for row in known if row.prediction.verdict for name in row.prediction.attributes)
        found = {}
        for name in sorted(there | named):
            part = self._attributes(f"attribute {name}", rows, name)
            counts = {"attribute_there": there[name], "attribute_named": named[name]}
            found[name] = {**part, "metrics": counts | part["metrics"]}
        return found


def verdict_source(metrics: Mapping[str, Any]) -> str:
    """Whose verdicts stand first: ``text`` where answers give any, else ``score``."""
    return "score" if metrics["text_accuracy"] is None else "text"


def _of_text(name: str) -> bool:
    return name.startswith("text_") or name in ("disagreement", "confusion_text")


def _of_score(name: str) -> bool:
    return name.startswith("score_") or name in ("disagreement", "confusion_score", *detection.SCORE_METRICS)


def _failure(prediction: Prediction) -> str:
    if prediction.error:
        return prediction.error
    if prediction.abstained:
        return prediction.abstained_because or "the system declines to give a verdict"
    return "the answer gives no verdict"


def _macro(parts: Sequence[tuple[dict[str, Any], dict[str, detection.Array]]]) -> dict[str, Any]:
    """Means over sets; what is undefined in every set for one reason is undefined here for the same."""
    means, intervals = detection.macro([(found["metrics"], values) for found, values in parts])
    undefined = {}
    for name in (name for name, value in means.items() if value is None):
        reasons = {found["undefined"].get(name, "") for found, _ in parts}
        undefined[name] = reasons.pop() if len(reasons) == 1 else "it is defined in no set"
    return {"metrics": means, "intervals": intervals, "undefined": undefined}


def _groups(rows: Sequence[Scored]) -> dict[str, dict[str, list[Scored]]]:
    groups: dict[str, dict[str, list[Scored]]] = {}
    for row in rows:
        for name, value in row.sample.groups.items():
            groups.setdefault(name, {}).setdefault(value, []).append(row)
    return groups


def protocol_metrics(
    samples: Sequence[Sample],
    predictions: Sequence[Prediction],
    protocol: EvaluationProtocol,
    similarity: Similarity | None,
) -> dict[str, dict[str, float | None]]:
    """Computes the authors' metrics of each set, as the authors do.

    The reference is the whole answer where a data set has it, else what is known of the explanation.
    """
    found = {}
    for name in dict.fromkeys(sample.set for sample in samples):
        answers = [
            EvaluatedAnswer(
                sample.label,
                prediction.text,
                prediction.fake_probability,
                sample.answers[0] if sample.answers else sample.reference or "",
                sample.video,
            )
            for sample, prediction in zip(samples, predictions, strict=True)
            if sample.set == name
        ]
        found[name] = protocol.metrics(answers, text_metrics, similarity.cut if similarity else None)
    return found
