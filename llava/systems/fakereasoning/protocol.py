"""The authors' evaluation protocol, quirks included, and what they published (arXiv 2503.21210)."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

SETTINGS = {"temperature": 0.2, "max_sample": 10}
"""Where the authors' defaults differ from ours; a value given on the command line goes before them."""
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
PUBLISHED_ACCURACY = dict(
    zip(PUBLISHED_SETS, (0.9920, 0.9128, 0.9910, 0.8768, 0.9690, 0.9349, 0.8716, 0.9780, 0.9000, 0.9800), strict=True)
)
PUBLISHED_MEAN = {"accuracy": 0.9406, "bleu_1": 0.37, "rouge_l": 0.29, "css": 0.76, "failure_rate": 0.0}

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
    for label, sentence in ((1, "This image is fake."), (0, "This image is real.")):
        if sentence in conclusion[1]:
            return label, reasoning[1].strip()
    return None


def figures(
    labels: Sequence[int],
    parsed: Sequence[tuple[int, str] | None],
    text_pairs: Sequence[tuple[float, float]],
    similarities: Sequence[float] | None,
) -> dict[str, Any]:
    """Computes the authors' figures; what they cannot compute is None.

    Args:
        labels: The truth of every image.
        parsed: What ``parse`` returned for each.
        text_pairs: BLEU-1 and ROUGE-L of each answer that was parsed.
        similarities: CSS of each, or None if it was not computed.
    """
    kept = [(label, answer[0]) for label, answer in zip(labels, parsed, strict=True) if answer is not None]
    accuracies = {
        "r_acc": _mean([said == 0 for label, said in kept if label == 0]),
        "f_acc": _mean([said == 1 for label, said in kept if label == 1]),
        "acc": _mean([said == label for label, said in kept]),
    }
    return {
        **accuracies,
        "bleu1": _mean([bleu for bleu, _ in text_pairs]),
        "rougel": _mean([rouge for _, rouge in text_pairs]),
        "css": None if similarities is None else _mean(similarities),
        "pre_failure": 1 - len(kept) / len(labels) if labels else None,
    }


def metric_line(name: str, values: dict[str, Any]) -> str:
    """Returns a set's line of ``metric.txt``; like the authors', it leaves out the failure rate."""
    said = (
        f"{key}: {'nan' if value is None else format(value, '.4f')}"
        for key, value in values.items()
        if key != "pre_failure"
    )
    return f"{name} {', '.join(said)}\n"


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
