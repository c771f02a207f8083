"""Metrics under each perturbation, with the thresholds that clean images gave. Imports no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from forgery_eval.metrics.scoring import Scored, Scoring, outcomes
from llava.labels import FAKE, REAL

CLEAN_RATE = 0.05
"""Share of clean real images above the second threshold."""
_ORDER = ("score_balanced_accuracy", "text_balanced_accuracy")


def clean_threshold(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Returns the least score that at most ``CLEAN_RATE`` of the real images reach; None without a real image.

    An image is called fake from this threshold on.
    """
    real = np.sort(scores[(labels == REAL) & ~np.isnan(scores)])
    if not len(real):
        return None
    allowed = int(np.floor(CLEAN_RATE * len(real)))
    return float(np.nextafter(real[len(real) - 1 - allowed], np.inf))


def error_rates(labels: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, float | None]:
    """Returns the shares of reals called fake and of fakes called real, among those with a score."""
    known = ~np.isnan(scores)
    called = scores >= threshold
    rates = {}
    for name, own, wrong in (
        ("reals_called_fake", labels == REAL, called),
        ("fakes_called_real", labels == FAKE, ~called),
    ):
        rates[name] = float(wrong[own & known].mean()) if (own & known).any() else None
    return rates


def robustness(
    clean: Sequence[Scored], perturbed: Mapping[tuple[str, str], Sequence[Scored]], scoring: Scoring
) -> dict[str, Any]:
    """Measures each perturbation beside the clean images.

    Args:
        clean: Rows of the clean images.
        perturbed: Rows of the same samples, by step and strength.
        scoring: That of the evaluation.

    Returns:
        Thresholds, the clean images' metrics, and those of each condition, the worst first: by balanced accuracy of
        the score, or of the text where there is no score.
    """
    arrays = outcomes(clean)
    threshold = clean_threshold(arrays.labels, arrays.scores)

    def measured(rows: Sequence[Scored]) -> dict[str, Any]:
        own = outcomes(rows)
        at_clean = None if threshold is None else error_rates(own.labels, own.scores, threshold)
        return {**scoring.overall(rows), **error_rates(own.labels, own.scores, 0.5), "at_clean_threshold": at_clean}

    conditions = [
        {"step": step, "strength": strength, **measured(rows)} for (step, strength), rows in perturbed.items()
    ]
    conditions.sort(key=lambda condition: _goodness(condition["metrics"]))
    return {
        "threshold": 0.5,
        "clean_threshold": threshold,
        "clean_rate": CLEAN_RATE,
        "clean": measured(clean),
        "conditions": conditions,
    }


def _goodness(metrics: Mapping[str, Any]) -> float:
    values = (metrics.get(name) for name in _ORDER)
    return next((float(value) for value in values if value is not None), np.inf)
