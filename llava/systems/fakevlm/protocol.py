"""The authors' evaluation protocol, quirks included, and what they published (arXiv 2503.14905)."""

from collections.abc import Mapping, Sequence
from typing import Any

from llava.labels import FAKE, LABELS, REAL
from llava.systems.base import CompareMeanings, CompareTexts, EvaluatedAnswer

SETTINGS: Mapping[str, Any] = {}
"""Where the authors' defaults differ from those here: nowhere."""
PUBLISHED: Mapping[str, Mapping[str, float]] = {
    "fakeclue": {"acc": 0.986, "f1": 0.981, "rougel": 0.580, "css": 0.877},
    "loki": {"acc": 0.843, "f1": 0.837, "rougel": 0.201, "css": 0.582},
    "ddvqa": {"acc": 0.932, "f1": 0.931, "rougel": 0.704, "css": 0.866},
}
"""Each metric on each data set; F1 is that of the real images, as far as the published figures tell."""
PUBLISHED_ACCURACY: Mapping[str, float] = {name: values["acc"] for name, values in PUBLISHED.items()}
PUBLISHED_MEAN: Mapping[str, float] = {}
PUBLISHED_OVER = "no sets: the paper gives no means"
_LOOKED_AT = 2
"""So many of an answer's parts between full stops are looked at."""


def parse(text: str) -> int | None:
    """Reads a verdict as the authors do: "real" anywhere in the text before the first full stop, else "fake".

    If that part says neither, the one up to the second full stop is read likewise.

    Returns:
        The class, or None where the authors toss a coin.
    """
    for part in text.lower().split(".")[:_LOOKED_AT]:
        for label in (REAL, FAKE):
            if LABELS[label] in part:
                return label
    return None


def metrics(
    answers: Sequence[EvaluatedAnswer], compare: CompareTexts, similarity: CompareMeanings | None
) -> dict[str, float | None]:
    """Computes the authors' metrics of one evaluation set; what they cannot compute is None.

    Their coin is not tossed: an answer that leaves it to the coin is wrong. The counts are those of their results.

    Args:
        answers: The answers.
        compare: Gives ROUGE-L of a whole answer against its reference.
        similarity: Gives CSS, or None where it is not asked for; which encoder the authors used is not known.
    """
    verdicts = [(answer.label, parse(answer.text)) for answer in answers]
    right = {label: sum(true == label == verdict for true, verdict in verdicts) for label in (REAL, FAKE)}
    total = {label: sum(true == label for true, _ in verdicts) for label in (REAL, FAKE)}
    called_real = sum(verdict == REAL for _, verdict in verdicts)
    told = [answer for answer in answers if answer.reference]
    texts, references = [answer.text for answer in told], [answer.reference for answer in told]
    return {
        "r_acc": _share(right[REAL], total[REAL]),
        "f_acc": _share(right[FAKE], total[FAKE]),
        "acc": _share(sum(right.values()), len(verdicts)),
        "f1": _share(2 * right[REAL], total[REAL] + called_real),
        "rougel": _mean(
            [compare(text, reference)["rouge_l"] for text, reference in zip(texts, references, strict=True)]
        ),
        "css": None if similarity is None else _mean(similarity(texts, references)),
        "coin": _share(sum(verdict is None for _, verdict in verdicts), len(verdicts)),
        "right_real": right[REAL],
        "wrong_real": total[REAL] - right[REAL],
        "right_fake": right[FAKE],
        "wrong_fake": total[FAKE] - right[FAKE],
    }


def metric_line(name: str, values: Mapping[str, float | None]) -> str:
    """Returns a set's line of ``metric.txt``."""
    return f"{name} {', '.join(f'{key}: {_written(value)}' for key, value in values.items())}\n"


def _written(value: float | None) -> str:
    if value is None:
        return "nan"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
