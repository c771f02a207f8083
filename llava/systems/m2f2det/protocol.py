"""The authors' evaluation protocol, quirks included, and what they published (arXiv 2503.20188).

Of frames of videos (FaceForensics++) it is the detector's; of other images the language model's judgement and
explanation (DD-VQA).
"""

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np

from llava.errors import OptionError
from llava.labels import FAKE, REAL
from llava.systems.base import CompareMeanings, CompareTexts, EvaluatedAnswer

SETTINGS: Mapping[str, Any] = {}
"""Where the authors' defaults differ from those here: nowhere."""
PUBLISHED: Mapping[str, Mapping[str, float]] = {
    "ffpp_c23": {"accuracy": 0.9879, "auc": 0.9934},
    "ffpp_c40": {"accuracy": 0.9383, "auc": 0.9658},
    "celeb_df": {"accuracy": 0.9898, "auc": 0.9992},
    "ddvqa": {"accuracy": 0.9523, "f1": 0.9661},
}
"""Figures of the paper; the authors' committed outputs on DD-VQA give an accuracy of .9444 and an F1 of .9420."""
PUBLISHED_ACCURACY: Mapping[str, float] = {name: values["accuracy"] for name, values in PUBLISHED.items()}
PUBLISHED_MEAN: Mapping[str, float] = {}
PUBLISHED_OVER = "no sets: the paper gives no means"
_TRIMMED = 10
"""Frames of a video that are dropped at either end of its scores."""
_MARKS = re.compile(r"</?s>|</n>")


# --- the language model: judgement and explanation


def parse(text: str) -> int | None:
    """Reads a judgement as the authors do: "real" anywhere goes first, so that "unrealistic" and "really" are real.

    Returns:
        The class, or None where the authors leave the answer out.
    """
    lower = text.lower()
    if "real" in lower:
        return REAL
    return FAKE if "fake" in lower or "computer-generated" in lower else None


def metrics(
    answers: Sequence[EvaluatedAnswer], compare: CompareTexts, similarity: CompareMeanings | None
) -> dict[str, float | None]:
    """Computes the authors' metrics of one evaluation set; what they cannot compute is None.

    Args:
        answers: The answers.
        compare: Not used: the authors compare texts by pycocoevalcap.
        similarity: Not used: the authors compare no meanings.
    """
    if any(answer.video for answer in answers):
        return video_metrics(answers)
    return {**judgement_metrics(answers), **explanation_metrics(answers)}


def judgement_metrics(answers: Sequence[EvaluatedAnswer]) -> dict[str, float | None]:
    """Accuracy, and F1, precision and recall of the fakes, over the answers that ``parse`` reads."""
    read = [(answer.label, verdict) for answer in answers if (verdict := parse(answer.text)) is not None]
    counts = {(true, said): read.count((true, said)) for true in (REAL, FAKE) for said in (REAL, FAKE)}
    hits, misses, alarms = counts[FAKE, FAKE], counts[FAKE, REAL], counts[REAL, FAKE]
    return {
        "accuracy": _share(hits + counts[REAL, REAL], len(read)),
        "f1": _share(2 * hits, 2 * hits + misses + alarms),
        "precision": _share(hits, hits + alarms),
        "recall": _share(hits, hits + misses),
        "skipped": _share(len(answers) - len(read), len(answers)),
    }


def explanation_metrics(answers: Sequence[EvaluatedAnswer]) -> dict[str, float | None]:
    """BLEU-1 to 4 and their mean, ROUGE-L and CIDEr by pycocoevalcap, on words between blanks; SPICE takes Java.

    Raises:
        OptionError: There are references, but pycocoevalcap is not installed.
    """
    told = [(_cleaned(answer.text), [answer.reference]) for answer in answers if answer.reference]
    if not told:
        return dict.fromkeys(("bleu_1", "bleu_2", "bleu_3", "bleu_4", "bleu", "rouge_l", "cider"))
    return caption_metrics([text for text, _ in told], [references for _, references in told])


def caption_metrics(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float | None]:
    """Compares each text with its references by pycocoevalcap.

    Raises:
        OptionError: It is not installed.
    """
    if find_spec("pycocoevalcap") is None:
        raise OptionError("BLEU, ROUGE-L and CIDEr as the authors compute them: pip install 'fakereasoning[captions]'")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    predicted = {number: [text] for number, text in enumerate(texts)}
    known = {number: list(given) for number, given in enumerate(references)}
    bleu, _ = Bleu(4).compute_score(known, predicted, verbose=0)
    rouge, _ = Rouge().compute_score(known, predicted)
    cider, _ = Cider().compute_score(known, predicted)
    orders = {f"bleu_{order}": float(value) for order, value in enumerate(bleu, start=1)}
    return {**orders, "bleu": float(np.mean(bleu)), "rouge_l": float(rouge), "cider": float(cider)}


def _cleaned(text: str) -> str:
    return _MARKS.sub("", text).strip()


# --- the detector: videos


def video_metrics(answers: Sequence[EvaluatedAnswer]) -> dict[str, float | None]:
    """AUC over videos and the best accuracy at any threshold, with real as the positive class.

    A video's score is the mean of P(real) without its highest and lowest ten frames. In ``authors_…`` a video has the
    label of the row behind it, and the last one is lost, as in the authors' script; the others have their own.
    """
    scored = [answer for answer in answers if answer.fake_probability is not None]
    videos = _videos(scored)
    own = [(score, label) for _, score, label in videos]
    shifted = [(score, following[2]) for (_, score, _), following in pairwise(videos)]
    frames = [(1 - float(answer.fake_probability or 0), 1 - answer.label) for answer in scored]
    return {
        "auc": area_under_roc(own),
        "accuracy": best_accuracy(own),
        "authors_auc": area_under_roc(shifted),
        "authors_accuracy": best_accuracy(shifted),
        "frame_auc": area_under_roc(frames),
        "videos": len(videos),
    }


def _videos(answers: Sequence[EvaluatedAnswer]) -> list[tuple[str, float, int]]:
    """Name, score and label (1 for real) of each video, in the order of the frames."""
    frames: dict[str, list[EvaluatedAnswer]] = {}
    for answer in answers:
        frames.setdefault(answer.video, []).append(answer)
    return [
        (name, trimmed_mean([1 - float(answer.fake_probability or 0) for answer in own]), 1 - own[0].label)
        for name, own in frames.items()
    ]


def trimmed_mean(scores: Sequence[float]) -> float:
    """Returns the mean without the ten highest and ten lowest scores; of fewer than 21 all count."""
    ordered = sorted(scores)
    kept = ordered[_TRIMMED:-_TRIMMED] if len(ordered) > 2 * _TRIMMED else ordered
    return float(np.mean(kept))


def area_under_roc(scored: Sequence[tuple[float, int]]) -> float | None:
    """Share of pairs in which the positive has the higher score, ties counted half; None where a class is missing."""
    positives = np.array([score for score, label in scored if label == 1])
    negatives = np.sort([score for score, label in scored if label == 0])
    if not len(positives) or not len(negatives):
        return None
    below, not_above = (np.searchsorted(negatives, positives, side) for side in ("left", "right"))
    return float((below + not_above).mean() / 2 / len(negatives))


def best_accuracy(scored: Sequence[tuple[float, int]]) -> float | None:
    """Returns the accuracy at the threshold that is best on these very scores, as the authors choose it."""
    if not scored:
        return None
    scores, labels = (np.array(column) for column in zip(*scored, strict=True))
    thresholds = [*np.unique(scores), np.inf]
    return float(max(((scores >= threshold) == (labels == 1)).mean() for threshold in thresholds))


def metric_line(name: str, values: Mapping[str, float | None]) -> str:
    """Returns a set's line of ``metric.txt``."""
    parts = (f"{key}: {'nan' if value is None else format(value, '.4f')}" for key, value in values.items())
    return f"{name} {', '.join(parts)}\n"


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
