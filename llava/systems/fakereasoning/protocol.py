"""The authors' evaluation protocol, quirks included, and what they published (arXiv 2503.21210)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llava.labels import FAKE, REAL
from llava.systems.base import CompareMeanings, CompareTexts, EvaluatedAnswer

SETTINGS: Mapping[str, Any] = {"temperature": 0.2, "max_sample": 10}
"""Where the authors' defaults differ from those here; a value given on the command line goes before them."""
PUBLISHED_SETS = (
    "stablediffusion",
    "dalle3",
    "if",
    "midjourney",
    "kandinsky",
    "pixart",
    "flux",
    "gpt4o",
    "styleganxl",
    "gigagan",
)
PUBLISHED_ACCURACY: Mapping[str, float] = dict(
    zip(PUBLISHED_SETS, (0.9920, 0.9128, 0.9910, 0.8768, 0.9690, 0.9349, 0.8716, 0.9780, 0.9000, 0.9800), strict=True)
)
PUBLISHED_MEAN: Mapping[str, float] = {
    "accuracy": 0.9406,
    "bleu_1": 0.37,
    "rouge_l": 0.29,
    "css": 0.76,
    "failure_rate": 0.0,
}
PUBLISHED_OVER = "the ten MMFR sets, of parsed answers"

_REASONING = re.compile(r"<REASONING>(.*?)</REASONING>", flags=re.DOTALL)
_CONCLUSION = re.compile(r"<CONCLUSION>(.*?)</CONCLUSION>", flags=re.DOTALL)


def parse(text: str) -> tuple[int, str] | None:
    """Reads an answer as the authors do.

    The first CONCLUSION decides; "fake" is looked for before "real", anywhere in it, so that a conclusion which says
    both is fake. An answer without a closed REASONING is no answer.

    Returns:
        The class and the reasoning, or None where the authors drop the answer.
    """
    reasoning, conclusion = _REASONING.search(text), _CONCLUSION.search(text)
    if reasoning is None or conclusion is None:
        return None
    for label, sentence in ((FAKE, "This image is fake."), (REAL, "This image is real.")):
        if sentence in conclusion[1]:
            return label, reasoning[1].strip()
    return None


def metrics(
    answers: Sequence[EvaluatedAnswer], compare: CompareTexts, similarity: CompareMeanings | None
) -> dict[str, float | None]:
    """Computes the authors' metrics of one evaluation set; what they cannot compute is None.

    Args:
        answers: The answers; those that ``parse`` cannot read are dropped from every metric but the failure rate.
        compare: Gives BLEU-1 and ROUGE-L of a reasoning.
        similarity: Gives CSS, or None where it is not asked for.
    """
    read = [(answer, parsed) for answer in answers if (parsed := parse(answer.text)) is not None]
    verdicts = [(answer.label, verdict) for answer, (verdict, _) in read]
    texts = [reasoning for _, (_, reasoning) in read]
    references = [answer.reference for answer, _ in read]
    compared = [compare(text, reference) for text, reference in zip(texts, references, strict=True)]
    return {
        "r_acc": _mean([verdict == REAL for label, verdict in verdicts if label == REAL]),
        "f_acc": _mean([verdict == FAKE for label, verdict in verdicts if label == FAKE]),
        "acc": _mean([verdict == label for label, verdict in verdicts]),
        "bleu1": _mean([values["bleu_1"] for values in compared]),
        "rougel": _mean([values["rouge_l"] for values in compared]),
        "css": None if similarity is None else _mean(similarity(texts, references)),
        "pre_failure": 1 - len(read) / len(answers) if answers else None,
    }


def metric_line(name: str, values: Mapping[str, float | None]) -> str:
    """Returns a set's line of ``metric.txt``; like the authors', it leaves out the failure rate."""
    parts = (
        f"{key}: {'nan' if value is None else format(value, '.4f')}"
        for key, value in values.items()
        if key != "pre_failure"
    )
    return f"{name} {', '.join(parts)}\n"


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
