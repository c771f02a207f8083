"""Metrics that are ratios of sums over images, with bootstrap intervals: means, shares, precision, recall. No torch."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from forgery_eval.metrics.detection import DRAWS, Outcomes, draw_weights, interval

Array = np.ndarray
Sums = Mapping[str, tuple[Array, Array]]
"""By the metric's name: what each image adds to the numerator and to the denominator, shape (N,) each."""


def ratio_part(
    name: str,
    strata: Sequence[tuple[str, int]],
    sums: Sums,
    undefined: Mapping[str, str],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Any]:
    """Computes ratios of sums over images, and their 95 % intervals by bootstrap within each set and class.

    Args:
        name: Of the part; the draws depend on it and on the seed.
        strata: Set and class of each image.
        sums: Numerators and denominators.
        undefined: Why a metric without a denominator is undefined.
        draws: Number of bootstrap draws.
        seed: Of the draws.

    Returns:
        ``metrics``, ``intervals`` and ``undefined``.
    """
    known = {key for key, (_, over_N) in sums.items() if over_N.sum() > 0}
    drawn = _bootstrap(name, strata, {key: sums[key] for key in sums if key in known}, draws, seed)
    return {
        "metrics": {key: float(own.sum() / over.sum()) if key in known else None for key, (own, over) in sums.items()},
        "intervals": {key: interval(drawn[key]) if key in known else None for key in sums},
        "undefined": {key: undefined[key] for key in sums if key not in known},
    }


def means(columns: Mapping[str, Array]) -> Sums:
    """Returns the sums whose ratios are the means of some columns over the images that have a value, shape (N,)."""
    known = {key: ~np.isnan(column) for key, column in columns.items()}
    return {key: (np.where(known[key], column, 0.0), known[key].astype(float)) for key, column in columns.items()}


def _bootstrap(name: str, strata: Sequence[tuple[str, int]], sums: Sums, draws: int, seed: int) -> dict[str, Array]:
    """Ratios of sums in each draw, shape (draws,): images drawn with replacement within each set and class."""
    if not sums:
        return {}
    sets = {own: number for number, own in enumerate(dict.fromkeys(own for own, _ in strata))}
    labels = np.array([label for _, label in strata], int)
    numbers = np.array([sets[own] for own, _ in strata], int)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    found: dict[str, list[Array]] = {key: [] for key in sums}
    for weights_DN in draw_weights(Outcomes(labels, labels, np.full(len(labels), np.nan), numbers), draws, rng):
        with np.errstate(divide="ignore", invalid="ignore"):
            for key, (values_N, over_N) in sums.items():
                found[key].append((weights_DN @ values_N) / (weights_DN @ over_N))
    return {key: np.concatenate(parts) for key, parts in found.items()}
