"""Reasoning: how near an answer's reasoning is to the reference, and which attributes it names."""

import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from nltk.translate.bleu_score import sentence_bleu
from rouge_score.rouge_scorer import RougeScorer

ORDERS = (1, 2, 3, 4)


def text_figures(text: str, reference: str) -> dict[str, float]:
    """Compares two texts as the authors do: BLEU on words between blanks, unsmoothed; ROUGE-L F1 with stems.

    Args:
        text: What was said.
        reference: What should have been said.
    """
    words, wanted = text.split(), reference.split()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nltk warns wherever a text is too short to share a long sequence of words
        figures = {
            f"bleu_{order}": float(sentence_bleu([wanted], words, weights=(1 / order,) * order)) for order in ORDERS
        }
    figures["rouge_l"] = float(_rouge().score(reference, text)["rougeL"].fmeasure)
    figures["words"] = float(len(words))
    return figures


@lru_cache(maxsize=1)
def _rouge() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)


def attribute_figures(pairs: Iterable[tuple[Sequence[str], Sequence[str]]]) -> dict[str, float | None]:
    """Precision, recall and F1 of named attributes over all images together.

    Args:
        pairs: For each image the attributes that were named and those that are there.
    """
    hit = named = there = 0
    for said, known in pairs:
        hit += len(set(said) & set(known))
        named += len(set(said))
        there += len(set(known))
    return {
        "attribute_precision": hit / named if named else None,
        "attribute_recall": hit / there if there else None,
        "attribute_f1": 2 * hit / (named + there) if named + there else None,
    }


def mean_with_interval(values: Sequence[float], draws: int, seed: int) -> dict[str, Any]:
    """Returns the mean of some values and its bootstrap interval."""
    numbers = np.asarray(values, dtype=float)
    rng = np.random.default_rng(seed)
    # Row by row: all draws of a large set at once would take gigabytes.
    means = [float(numbers[rng.integers(len(numbers), size=len(numbers))].mean()) for _ in range(draws)]
    low, high = np.percentile(means, (2.5, 97.5))
    return {"mean": float(numbers.mean()), "interval": [float(low), float(high)]}
