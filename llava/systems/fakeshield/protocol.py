"""The authors' evaluation, quirks included, and what they published (arXiv 2410.02761, tables 1 and 2)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llava.labels import FAKE
from llava.systems.base import CompareMeanings, CompareTexts, EvaluatedAnswer
from llava.systems.fakeshield.answer import gate_is_open

SETTINGS: Mapping[str, Any] = {"temperature": 0.2, "gate": "published"}
"""Where the authors' defaults differ from those here; a value given on the command line goes before them."""
PUBLISHED_ACCURACY: Mapping[str, float] = {
    "CASIAv1+": 0.95,
    "IMD2020": 0.83,
    "Columbia": 0.98,
    "coverage": 0.97,
    "DSO": 0.97,
    "DeepFake_Val": 0.93,
    "AIGC_Val": 0.98,
}
"""By the names of the data set's folders; sets of fakes alone have a recall here."""
PUBLISHED_LOCALIZATION: Mapping[str, Mapping[str, float]] = {
    "CASIAv1+": {"iou": 0.54, "f1": 0.60},
    "IMD2020": {"iou": 0.50, "f1": 0.57},
    "Columbia": {"iou": 0.67, "f1": 0.75},
    "NIST16": {"iou": 0.32, "f1": 0.37},
    "DSO": {"iou": 0.48, "f1": 0.52},
    "Korus": {"iou": 0.17, "f1": 0.20},
    "DeepFake_Val": {"iou": 0.14, "f1": 0.22},
    "AIGC_Val": {"iou": 0.18, "f1": 0.24},
}
PUBLISHED_MEAN: Mapping[str, float] = {}
PUBLISHED_OVER = ""


def metrics(
    answers: Sequence[EvaluatedAnswer], compare: CompareTexts, similarity: CompareMeanings | None
) -> dict[str, float | None]:
    """Computes the authors' metrics of one set; a verdict is what decides over a mask, one phrase letter for letter.

    Args:
        answers: The answers; each has a verdict, since all without that phrase are fake.
        compare: Not used: they compare texts by embeddings alone.
        similarity: Gives CSS, or None where it is not asked for.
    """
    called = np.array([gate_is_open(answer.text) for answer in answers], bool)
    fake = np.array([answer.label == FAKE for answer in answers], bool)
    hits, counted = float((called & fake).sum()), float(called.sum() + fake.sum())
    referenced = [answer for answer in answers if answer.reference]
    texts, references = [a.text for a in referenced], [a.reference for a in referenced]
    return {
        "acc": float((called == fake).mean()) if len(answers) else None,
        "f1": 2 * hits / counted if counted else None,
        "css": None if similarity is None or not texts else float(np.mean(similarity(texts, references))),
    }


def metric_line(name: str, values: Mapping[str, float | None]) -> str:
    """Returns a set's line of ``metric.txt``."""
    parts = (f"{key}: {'nan' if value is None else format(value, '.4f')}" for key, value in values.items())
    return f"{name} {', '.join(parts)}\n"
