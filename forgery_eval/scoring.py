"""From samples and predictions to every figure of a report. Imports no torch unless texts are compared by CLIP."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from forgery_eval.benchmarks import Sample
from forgery_eval.calibration import Calibration
from forgery_eval.metrics import detection
from forgery_eval.metrics.reasoning import attribute_figures, mean_with_interval, text_figures
from forgery_eval.predictions import Prediction
from llava.labels import LABELS
from llava.systems.fakereasoning import protocol

Compare = Callable[[Sequence[str], Sequence[str]], list[float]]
ALL = "all"
ONLY_SCORES = "only scores were asked for"
NO_CLIP = "no CLIP model was given (--clip_path)"


@dataclass(frozen=True)
class Similarity:
    """The two ways in which CLIP compares texts."""

    cut: Compare
    chunked: Compare


@dataclass(frozen=True)
class Scored:
    """A sample with what was said of it, and with its text's figures.

    Attributes:
        sample: The sample.
        prediction: What was said.
        score: P(fake), calibrated if that was asked for; NaN where there is none.
        texts: Figures of its reasoning; None where there is no reference.
    """

    sample: Sample
    prediction: Prediction
    score: float
    texts: Mapping[str, float] | None


def match(samples: Sequence[Sample], predictions: Mapping[str, Prediction]) -> list[Prediction]:
    """Returns the prediction of each sample; one that is not there is a failure.

    Raises:
        ValueError: No sample has a prediction.
    """
    if not any(sample.id in predictions for sample in samples):
        raise ValueError("no prediction has the id of a sample; ids must be those of the data set")
    missing = "there is no prediction"
    return [predictions.get(sample.id) or Prediction(sample.id, sample.label, error=missing) for sample in samples]


def score(
    samples: Sequence[Sample],
    predictions: Sequence[Prediction],
    *,
    similarity: Similarity | None = None,
    calibration: Calibration | None = None,
) -> list[Scored]:
    """Joins samples, predictions and the figures of their texts."""
    silent = only_scores(predictions)
    known = [place for place, sample in enumerate(samples) if sample.reference and not silent]
    said = [predictions[place].stages.get("REASONING", "") for place in known]
    wanted = [samples[place].reference or "" for place in known]
    texts: dict[int, dict[str, float]] = {
        place: text_figures(text, reference) for place, text, reference in zip(known, said, wanted, strict=True)
    }
    if similarity and known:
        for name, compare in (("css", similarity.cut), ("css_chunked", similarity.chunked)):
            for place, value in zip(known, compare(said, wanted), strict=True):
                texts[place][name] = value
    rows = [
        Scored(sample, prediction, np.nan, texts.get(place))
        for place, (sample, prediction) in enumerate(zip(samples, predictions, strict=True))
    ]
    return with_scores(rows, [prediction.fake_probability for prediction in predictions], calibration)


def with_scores(
    rows: Sequence[Scored], probabilities: Sequence[float | None], calibration: Calibration | None = None
) -> list[Scored]:
    """Returns the rows with these scores, calibrated if that is asked for."""
    scores = np.array([np.nan if value is None else value for value in probabilities], float)
    scores = calibration(scores) if calibration else scores
    return [replace(row, score=float(value)) for row, value in zip(rows, scores, strict=True)]


def only_scores(predictions: Sequence[Prediction]) -> bool:
    """Whether no answer was asked for: there are scores, but no text and no verdict of one."""
    answered = any(p.text or (p.verdict and p.score_source != "prompt") for p in predictions)
    return not answered and any(p.fake_probability is not None for p in predictions)


def judged(rows: Sequence[Scored]) -> detection.Judged:
    """Returns the rows as arrays."""
    sets = {name: number for number, name in enumerate(dict.fromkeys(row.sample.set for row in rows))}
    return detection.Judged(
        labels=np.array([row.sample.label for row in rows], int),
        verdicts=np.array([_class_number(row.prediction.verdict) for row in rows], int),
        scores=np.array([row.score for row in rows], float),
        strata=np.array([sets[row.sample.set] for row in rows], int),
    )


def _class_number(verdict: str | None) -> int:
    return detection.NO_ANSWER if verdict is None else LABELS.index(verdict)


def all_figures(rows: Sequence[Scored], *, draws: int = detection.DRAWS, seed: int = 0) -> dict[str, Any]:
    """Computes every figure: of each set and group, of all images together, and the mean over sets.

    Args:
        rows: The scored samples.
        draws: Number of bootstrap draws.
        seed: Of the draws.
    """
    silent = only_scores([row.prediction for row in rows])
    sets = {name: [row for row in rows if row.sample.set == name] for name in dict.fromkeys(r.sample.set for r in rows)}

    def figures_of(name: str, part: Sequence[Scored]) -> tuple[dict[str, Any], dict[str, detection.Array]]:
        return _detection(name, part, draws, seed, silent=silent)

    drawn = {name: figures_of(f"set {name}", part) for name, part in sets.items()}
    means, intervals = detection.macro([(found["figures"], values) for found, values in drawn.values()])
    undefined = {name: "it is defined in no set" for name, value in means.items() if value is None}
    return {
        "detection": {
            "sets": {name: found for name, (found, _) in drawn.items()},
            "macro": {"figures": means, "intervals": intervals, "undefined": undefined},
            ALL: figures_of(ALL, rows)[0],
            "groups": {
                name: {value: figures_of(f"{name} {value}", part)[0] for value, part in values.items()}
                for name, values in _groups(rows).items()
            },
        },
        "reasoning": {
            "sets": {name: reasoning_figures(part, draws, seed) for name, part in sets.items()},
            ALL: reasoning_figures(rows, draws, seed),
        },
        "failures": [
            {"id": row.sample.id, "reason": row.prediction.error or "the answer gives no verdict"}
            for row in rows
            if (np.isnan(row.score) if silent else row.prediction.verdict is None)
        ],
    }


def overall_figures(rows: Sequence[Scored], *, draws: int = detection.DRAWS, seed: int = 0) -> dict[str, Any]:
    """Computes the detection figures of all images together, those that ``all_figures`` gives for them."""
    silent = only_scores([row.prediction for row in rows])
    return _detection(ALL, rows, draws, seed, silent=silent)[0]


def _groups(rows: Sequence[Scored]) -> dict[str, dict[str, list[Scored]]]:
    groups: dict[str, dict[str, list[Scored]]] = {}
    for row in rows:
        for name, value in row.sample.groups.items():
            groups.setdefault(name, {}).setdefault(value, []).append(row)
    return groups


def _detection(
    name: str, rows: Sequence[Scored], draws: int, seed: int, *, silent: bool
) -> tuple[dict[str, Any], dict[str, detection.Array]]:
    arrays = judged(rows)
    if silent:
        # What has a score did not fail; the figures of the text are taken out again below.
        arrays = replace(arrays, verdicts=arrays.by_score)
    figures, undefined = detection.detection_figures(arrays)
    if silent:
        textual = [key for key in figures if key.startswith("text_") or key in ("disagreement", "confusion_text")]
        figures |= dict.fromkeys(textual)
        undefined |= dict.fromkeys(textual, ONLY_SCORES)
    values = detection.bootstrap(arrays, name, draws=draws, seed=seed)
    intervals = {key: None if figures[key] is None else detection.interval(drawn) for key, drawn in values.items()}
    return {"figures": figures, "intervals": intervals, "undefined": undefined}, values


def reasoning_figures(rows: Sequence[Scored], draws: int, seed: int) -> dict[str, Any]:
    """Computes the text figures: over all images with a reference, failures counting 0, and over parsed answers."""
    parsed = [row for row in rows if row.prediction.verdict is not None]
    return {"all": _texts(rows, draws, seed), "parsed": _texts(parsed, draws, seed)}


def _texts(rows: Sequence[Scored], draws: int, seed: int) -> dict[str, Any]:
    with_reference = [(row.prediction.verdict is not None, row.texts) for row in rows if row.texts is not None]
    names = [*(f"bleu_{order}" for order in (1, 2, 3, 4)), "rouge_l", "css", "css_chunked", "words"]
    figures: dict[str, Any] = {"texts": len(with_reference)}
    intervals: dict[str, list[float] | None] = {}
    undefined: dict[str, str] = {}
    for name in names:
        values = [texts[name] if is_parsed else 0.0 for is_parsed, texts in with_reference if name in texts]
        found = mean_with_interval(values, draws, seed) if values else {"mean": None, "interval": None}
        figures[name], intervals[name] = found["mean"], found["interval"]
        if not values:
            undefined[name] = NO_CLIP if with_reference else "no image has both an answer and a reference text"
    silent = only_scores([row.prediction for row in rows])
    known = [
        (list(row.prediction.attributes) if row.prediction.verdict else [], row.sample.attributes)
        for row in rows
        if row.sample.attributes is not None and not silent
    ]
    for name, value in attribute_figures(known).items():
        figures[name] = value
        if value is None:
            undefined[name] = "no attribute is named" if known else "no image has both an answer and known attributes"
    return {"figures": figures, "intervals": intervals, "undefined": undefined}


def paper_figures(
    samples: Sequence[Sample], predictions: Sequence[Prediction], similarity: Similarity | None
) -> dict[str, dict[str, Any]]:
    """Computes the authors' figures of each set, as the authors do."""
    found = {}
    for name in dict.fromkeys(sample.set for sample in samples):
        own = [(s, p) for s, p in zip(samples, predictions, strict=True) if s.set == name]
        parsed = [protocol.parse(prediction.text) for _, prediction in own]
        kept = [(answer[1], s.reference or "") for answer, (s, _) in zip(parsed, own, strict=True) if answer]
        texts = [text_figures(text, reference) for text, reference in kept]
        css = similarity.cut([text for text, _ in kept], [wanted for _, wanted in kept]) if similarity else None
        pairs = [(text["bleu_1"], text["rouge_l"]) for text in texts]
        found[name] = protocol.figures([s.label for s, _ in own], parsed, pairs, css)
    return found
