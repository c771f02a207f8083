"""Explanations: how near an answer's explanation is to the reference, and which attributes it names."""

import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from nltk.translate.bleu_score import sentence_bleu
from rouge_score.rouge_scorer import RougeScorer

from forgery_eval.metrics.ratios import Sums

ORDERS = (1, 2, 3, 4)


def text_metrics(text: str, reference: str) -> dict[str, float]:
    """Compares two texts as the authors do: BLEU on words between blanks, unsmoothed; ROUGE-L F1 with stems.

    Args:
        text: The answer's explanation.
        reference: The reference explanation.
    """
    words, wanted = text.split(), reference.split()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nltk warns wherever a text is too short to share a long sequence of words
        metrics = {
            f"bleu_{order}": float(sentence_bleu([wanted], words, weights=(1 / order,) * order)) for order in ORDERS
        }
    metrics["rouge_l"] = float(_rouge().score(reference, text)["rougeL"].fmeasure)
    metrics["words"] = float(len(words))
    return metrics


@lru_cache(maxsize=1)
def _rouge() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)


def attribute_sums(pairs: Sequence[tuple[Iterable[str], Iterable[str]]], only: str | None = None) -> Sums:
    """Returns what precision, recall and F1 of named attributes are ratios of, over all images together.

    Args:
        pairs: For each image the attributes that were named and those that are there.
        only: Count this attribute alone.
    """
    kept = [tuple({name for name in names if only in (None, name)} for names in pair) for pair in pairs]
    hits, named, there = (
        np.array([count(*pair) for pair in kept], float)
        for count in (lambda own, known: len(own & known), lambda own, _: len(own), lambda _, known: len(known))
    )
    return {
        "attribute_precision": (hits, named),
        "attribute_recall": (hits, there),
        "attribute_f1": (2 * hits, named + there),
    }


def mean_with_interval(values: Sequence[float], draws: int, seed: int) -> dict[str, Any]:
    """Returns the mean of some values and its bootstrap interval."""
    numbers = np.asarray(values, dtype=float)
    rng = np.random.default_rng(seed)
    # Row by row: all draws of a large set at once would take gigabytes.
    means = [float(numbers[rng.integers(len(numbers), size=len(numbers))].mean()) for _ in range(draws)]
    low, high = np.percentile(means, (2.5, 97.5))
    return {"mean": float(numbers.mean()), "interval": [float(low), float(high)]}
