"""Fits the rule by which no verdict is given, and measures what it costs and gains. Imports no torch.

Two bounds choose the band, each side by itself:

- Conformal risk control (Angelopoulos et al. 2024, Theorem 1) on a monotone loss, the share of a class that gets the
  other's verdict: with k such among n images of the class, (k + 1) / (n + 1) must not exceed the level. Then its
  expectation on new images does not.
- The error among given verdicts is no monotone loss, so it is tested (learn then test, Angelopoulos et al. 2021) in a
  fixed sequence, from the surest verdicts to all: a threshold passes if as few errors among so many given verdicts
  have a binomial probability of at most the permitted doubt, were the true error at the level; the first that fails
  ends the sequence. The thresholds are ranks of the scores, chosen without looking at labels: above the r-th score
  lie independent images of the distribution that lies above it.

The least strict threshold that passes both is taken.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.stats import binom

from llava.abstention import INCONCLUSIVE, LIGHT_DELIVERIES, REASONS, UNLIKE, AbstentionRule, KnownImages
from llava.errors import DataError
from llava.labels import FAKE, REAL

Array = np.ndarray

CONFIDENCE = 0.9
DIRECTIONS = 8
LEAST_KNOWN = 40
"""Fewest images whose features say what is known."""
MOST_KNOWN = 4096
"""Most of them that are kept as points."""
STEPS = 20
"""Thresholds of the sequence on each side."""
SUREST = 0.1
"""Share of a side's verdicts that the sequence begins with; more if so few could hardly pass."""


def fit_band(scores: Sequence[float], labels: Sequence[int], level: float) -> tuple[float | None, float | None]:
    """Chooses the band of P(fake) in which no verdict is given.

    Args:
        scores: P(fake), shape (N,); NaN is left out.
        labels: 0 real, 1 fake.
        level: Error among given verdicts that is permitted, and share of each class that may get the other's verdict.

    Returns:
        Up to where an image is called real, and from where on fake; None where no threshold passes.
    """
    values, truth = np.asarray(scores, float), np.asarray(labels, int)
    values, truth = values[~np.isnan(values)], truth[~np.isnan(values)]
    called = values >= 0.5
    high = _least_strict(values[called], truth[called] == REAL, int((truth == REAL).sum()), level)
    low = _least_strict(1 - values[~called], truth[~called] == FAKE, int((truth == FAKE).sum()), level)
    return None if low is None else min(1 - low, float(np.nextafter(0.5, 0))), high


def _least_strict(sureness: Array, wrong: Array, others: int, level: float) -> float | None:
    """Returns from which probability of its own class on a verdict is given; None if no threshold passes.

    Args:
        sureness: Probability of the class that each image is called, of those called so, from 0.5 on.
        wrong: Whether it is of the other class.
        others: Number of all images of the other class.
        level: The permitted error.
    """
    doubt = (1 - CONFIDENCE) / 2
    least = int(np.ceil(np.log(doubt) / np.log(1 - level)))  # so many without an error just pass
    count = len(sureness)
    if count < least:
        return None
    ordered = np.sort(sureness)[::-1]
    ranks = np.linspace(min(count, max(2 * least, SUREST * count)), count, STEPS).round().astype(int)
    passed: float | None = None
    for rank in np.unique(ranks):
        threshold = 0.5 if rank == count else float(ordered[rank - 1])
        given = sureness >= threshold
        errors = int(wrong[given].sum())
        if binom.cdf(errors, int(given.sum()), level) > doubt:
            break
        if (errors + 1) / (others + 1) <= level:
            passed = threshold
    return passed


def fit_known(features_ND: Array, ids: Sequence[str], share: float) -> KnownImages | None:
    """Describes the features of known images.

    Half of the images, by the hash of their ids, are kept as points; the others give the limit, the smallest distance
    that keeps the share of them with the conformal correction for their number. So a new image of their kind is let
    through with at least that probability.

    Args:
        features_ND: Features; rows with NaN are left out.
        ids: Of the images.
        share: Of known images that are let through.

    Returns:
        The statistics; None if there are fewer than ``LEAST_KNOWN`` images, or too few for the share.
    """
    usable = np.isfinite(features_ND).all(axis=1)
    named = [(_digest(name), name, row) for row, name in enumerate(ids) if usable[row]]
    features = np.asarray(features_ND, np.float64)[[row for _, _, row in sorted(named)]]
    kept, limiting = features[: len(features) // 2], features[len(features) // 2 :]
    rank = int(np.ceil((len(limiting) + 1) * share))
    if len(features) < LEAST_KNOWN or rank > len(limiting):
        return None
    known = _points(kept[:MOST_KNOWN])
    return replace(known, limit=float(np.sort(known.distances(limiting))[rank - 1]))


def _digest(name: str) -> bytes:
    return hashlib.sha256(f"known {name}".encode()).digest()


def _points(features_ND: Array) -> KnownImages:
    """Lays images along their principal directions, half as many as images at most; in the precision of the file."""
    mean, spread = features_ND.mean(axis=0), features_ND.std(axis=0)
    spread = np.maximum(spread, 1e-6 + 1e-4 * np.abs(mean))  # rounding must not count where a feature never varies
    _, _, directions = np.linalg.svd((features_ND - mean) / spread, full_matrices=False)
    count, width = features_ND.shape
    kept = max(1, min(DIRECTIONS, count // 2, width))
    mean, spread, directions = mean.astype(np.float32), spread.astype(np.float32), directions[:kept].astype(np.float32)
    shape = KnownImages(mean, spread, directions, np.empty((0, kept + 1)), np.inf)
    return replace(shape, points_MK=shape.coordinates(features_ND).astype(np.float32))


def fit_rule(
    ids: Sequence[str],
    labels: Sequence[int],
    scores: Sequence[float],
    features_ND: Array | None,
    *,
    level: float,
    share: float,
    deliveries: int,
    score: str | None,
) -> AbstentionRule:
    """Fits the whole rule on calibration data.

    Raises:
        DataError: No image has a score.
    """
    if np.isnan(np.asarray(scores, float)).all():
        raise DataError("no calibration image has a score, so no band of scores can be chosen")
    low, high = fit_band(scores, labels, level)
    known = None if features_ND is None else fit_known(features_ND, ids, share)
    return AbstentionRule(low, high, level, CONFIDENCE, score, known, share, deliveries)


def agreements(scores: Array, delivered: Sequence[Array]) -> Array | None:
    """Counts, for each image, the light deliveries whose score is on the same side; None if there are none.

    Args:
        scores: P(fake), shape (N,).
        delivered: P(fake) of each delivery, each of shape (N,); NaN agrees with nothing.
    """
    if not delivered:
        return None
    same = [(~np.isnan(other)) & ((other >= 0.5) == (scores >= 0.5)) for other in delivered]
    return np.sum(same, axis=0)


def decide_all(
    rule: AbstentionRule, scores: Array, features_ND: Array | None = None, agree: Array | None = None
) -> list[str]:
    """Returns why no verdict is given on each image, an empty text where one is.

    An image without a score is inconclusive.
    """
    distances = None if features_ND is None or rule.known is None else rule.known.distances(features_ND)
    reasons = []
    for index, score in enumerate(scores):
        if np.isnan(score):
            reasons.append(INCONCLUSIVE)
            continue
        distance = None if distances is None or np.isnan(distances[index]) else float(distances[index])
        reasons.append(rule.decide(float(score), distance, None if agree is None else int(agree[index])).reason)
    return reasons


def abstention_metrics(labels: Array, scores: Array, reasons: Sequence[str], calibrated: Array) -> dict[str, Any]:
    """Measures given verdicts.

    Args:
        labels: 0 real, 1 fake, shape (N,).
        scores: P(fake) that the rule saw, NaN where there is none.
        reasons: From ``decide_all``.
        calibrated: P(fake) after calibration.

    Returns:
        Counts, coverage, error among given verdicts, balanced accuracy of them, reals called fake among all reals and
        fakes called real among all fakes, calibration error of given verdicts, and the curve of risk against
        coverage with its area. What is undefined is None.
    """
    from forgery_eval.metrics.detection import expected_calibration_error

    given = np.array([not reason for reason in reasons], bool)
    called = scores >= 0.5
    wrong = given & (called != (labels == FAKE))
    real, fake = labels == REAL, labels == FAKE
    recalls = [_share(~wrong, given & own) for own in (real, fake)]
    curve, area = risk_coverage(labels, scores, reasons)
    ece = expected_calibration_error(labels[given], calibrated[given]) if given.any() else None
    return {
        "images": len(labels),
        "given": int(given.sum()),
        "coverage": _share(given, np.ones(len(labels), bool)),
        "error_among_given": _share(wrong, given),
        "balanced_accuracy_of_given": None
        if None in recalls
        else float(np.mean([r for r in recalls if r is not None])),
        "reals_called_fake": _share(wrong, real),
        "fakes_called_real": _share(wrong, fake),
        "ece_of_given": ece,
        "no_verdict": {name: sum(1 for reason in reasons if reason == name) for name in REASONS},
        "risk_coverage": curve,
        "risk_coverage_area": area,
    }


def _share(part: Array, of: Array) -> float | None:
    return float(part[of].mean()) if of.any() else None


def risk_coverage(
    labels: Array, scores: Array, reasons: Sequence[str], points: int = 50
) -> tuple[list[list[float]], float | None]:
    """Returns the error among the surest images against the share of images that they are, and its mean.

    The surest are those whose score is farthest from 0.5; images unlike known ones come last, and those without a
    score after them, as wrong. Equally sure images enter together, so that the order of the data does not matter.

    Returns:
        Points of coverage and error, about as many as asked for, and the area under the whole curve; None without an
        image.
    """
    count = len(labels)
    if not count:
        return [], None
    missing = np.isnan(scores)
    wrong = np.where(missing, True, (np.nan_to_num(scores) >= 0.5) != (labels == FAKE)).astype(float)
    sureness = np.where(missing, -2.0, np.abs(np.nan_to_num(scores) - 0.5))
    sureness = np.where(~missing & np.array([reason == UNLIKE for reason in reasons], bool), sureness - 1, sureness)
    _, block = np.unique(-sureness, return_inverse=True)
    sizes, errors = np.bincount(block), np.bincount(block, weights=wrong)
    expected = np.repeat(errors / sizes, sizes)
    risk = np.cumsum(expected) / np.arange(1, count + 1)
    chosen = np.unique(np.linspace(0, count - 1, min(points, count)).round().astype(int))
    return [[float((k + 1) / count), float(risk[k])] for k in chosen], float(risk.mean())


def check_deliveries(count: int) -> None:
    """Checks how many light deliveries are asked for.

    Raises:
        DataError: There are not so many.
    """
    if not 0 <= count <= len(LIGHT_DELIVERIES):
        raise DataError(f"--stability must be 0 to {len(LIGHT_DELIVERIES)}, not {count}")


def about_rule(rule: AbstentionRule) -> Mapping[str, Any]:
    """Returns what ``metrics.json`` says of a rule."""
    return {**rule.to_json(), "has_statistics": rule.known is not None}
