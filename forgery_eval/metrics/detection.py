"""Detection: metrics by text and by score, with bootstrap intervals. Real = 0, fake = 1.

Point values are scikit-learn's. The bootstrap computes the same metrics for all draws at once: a draw is a weight for
each image, the number of times that it was drawn from its set and class.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn import metrics as sk

from llava.labels import FAKE, LABELS, REAL

Array = np.ndarray
Values = dict[str, Any]
Metric = tuple[float | None, str]
"""A value, or None with the reason why it is undefined."""

DRAWS = 1000
BINS = 15
FALSE_POSITIVE_RATES = {"tpr_at_1_fpr": 0.01, "tpr_at_5_fpr": 0.05}
RANKING_METRICS = ("auroc", "average_precision", *FALSE_POSITIVE_RATES)
SCORE_METRICS = (*RANKING_METRICS, "ece", "nll", "brier")
INTERVAL = (2.5, 97.5)
_NORMAL = 1.959964
"""Quantile of the normal distribution that an interval of 95 % ends at."""
NO_ANSWER = -1
_CELLS = 2_000_000
"""Weights held at a time, so that the bootstrap takes flat memory."""

ONE_CLASS = "both classes are needed"
NO_SCORE = "no image has a score"
NO_IMAGE = "there is no image"


@dataclass(frozen=True)
class Outcomes:
    """What was predicted of some images.

    Attributes:
        labels: The truth, 0 or 1, shape (N,).
        verdicts: What the text says: 0, 1, or ``NO_ANSWER``, shape (N,).
        scores: P(fake), NaN where there is none, shape (N,).
        strata: Number of the stratum (evaluation set) of each image, shape (N,).
        uncalibrated: The scores before they were calibrated, by which images are ranked, shape (N,); None where they
            were not. Calibration keeps the order of scores, but can round several to the same probability.
    """

    labels: Array
    verdicts: Array
    scores: Array
    strata: Array
    uncalibrated: Array | None = None

    def __getitem__(self, chosen: Array) -> "Outcomes":
        before = None if self.uncalibrated is None else self.uncalibrated[chosen]
        return Outcomes(self.labels[chosen], self.verdicts[chosen], self.scores[chosen], self.strata[chosen], before)

    @property
    def ranks(self) -> Array:
        """What images are ranked by, NaN where there is no score."""
        return self.scores if self.uncalibrated is None else self.uncalibrated

    @property
    def by_score(self) -> Array:
        """The verdict that the score gives: fake from 0.5 on."""
        return np.where(np.isnan(self.scores), NO_ANSWER, self.scores >= 0.5).astype(int)


def detection_metrics(outcomes: Outcomes) -> tuple[Values, dict[str, str]]:
    """Computes every metric.

    Returns:
        The metrics by name, None where one is undefined, and the reasons of those.
    """
    metrics: Values = {"images": len(outcomes.labels), "scored": int((~np.isnan(outcomes.scores)).sum())}
    reasons: dict[str, str] = {}
    for prefix, verdicts in (("text", outcomes.verdicts), ("score", outcomes.by_score)):
        found = _verdict_metrics(outcomes.labels, verdicts)
        metrics |= {f"{prefix}_{name}": value for name, (value, _) in found.items()}
        reasons |= {f"{prefix}_{name}": reason for name, (_, reason) in found.items() if reason}
    for name, (value, reason) in (_score_metrics(outcomes) | _agreement(outcomes)).items():
        metrics[name] = value
        if reason:
            reasons[name] = reason
    metrics["confusion_text"] = confusion(outcomes.labels, outcomes.verdicts)
    metrics["confusion_score"] = confusion(outcomes.labels, outcomes.by_score)
    return metrics, reasons


def confusion(labels: Array, verdicts: Array) -> dict[str, dict[str, int]]:
    """Counts verdicts (``real``, ``fake``, ``none``) of each class."""
    table = (
        sk.confusion_matrix(labels, verdicts, labels=[REAL, FAKE, NO_ANSWER]) if len(labels) else np.zeros((3, 3), int)
    )
    names = (*LABELS, "none")
    return {names[row]: {names[column]: int(table[row, column]) for column in range(3)} for row in range(2)}


def _verdict_metrics(labels: Array, verdicts: Array) -> dict[str, Metric]:
    """Accuracies and F1; an answer without a verdict is wrong, and no prediction of either class."""
    if not len(labels):
        names = ("accuracy", "real_accuracy", "fake_accuracy", "balanced_accuracy", "f1_fake", "f1_real", "f1_macro")
        return dict.fromkeys(names, (None, NO_IMAGE))
    recalls: list[Metric] = []
    f1: list[Metric] = []
    for number, name in enumerate(LABELS):
        own, called = labels == number, verdicts == number
        if own.any():
            recalls.append((float(sk.accuracy_score(labels[own], verdicts[own])), ""))
        else:
            recalls.append((None, f"there is no {name} image"))
        if own.any() or called.any():
            f1.append((float(sk.f1_score(labels, verdicts, labels=[number], average="macro", zero_division=0)), ""))
        else:
            f1.append((None, f"no image is {name} or was called so"))
    both = len(set(labels.tolist())) == 2
    return {
        "accuracy": (float(sk.accuracy_score(labels, verdicts)), ""),
        "real_accuracy": recalls[0],
        "fake_accuracy": recalls[1],
        "balanced_accuracy": _mean(recalls) if both else (None, ONE_CLASS),
        "f1_fake": f1[1],
        "f1_real": f1[0],
        "f1_macro": _mean(f1) if both else (None, ONE_CLASS),
    }


def _mean(metrics: Sequence[Metric]) -> Metric:
    return float(np.mean([value for value, _ in metrics if value is not None])), ""


def _score_metrics(outcomes: Outcomes) -> dict[str, Metric]:
    """Ranking and calibration, over the images that have a score."""
    scored = ~np.isnan(outcomes.scores)
    labels, scores, ranks = outcomes.labels[scored], outcomes.scores[scored], outcomes.ranks[scored]
    if not len(labels):
        return dict.fromkeys(SCORE_METRICS, (None, NO_SCORE))
    found: dict[str, Metric] = {
        "ece": (expected_calibration_error(labels, scores), ""),
        "nll": (float(sk.log_loss(labels, scores, labels=[REAL, FAKE])), ""),
        "brier": (float(np.mean((scores - labels) ** 2)), ""),
    }
    if len(set(labels)) < 2:
        return found | dict.fromkeys(RANKING_METRICS, (None, ONE_CLASS))
    # With every point of the curve: without the collinear ones, the rate at a limit between two corners would be low.
    false_rate, true_rate, _ = sk.roc_curve(labels, ranks, drop_intermediate=False)
    found |= {
        "auroc": (float(sk.roc_auc_score(labels, ranks)), ""),
        "average_precision": (float(sk.average_precision_score(labels, ranks)), ""),
    }
    for name, most in FALSE_POSITIVE_RATES.items():
        found[name] = (float(true_rate[false_rate <= most].max()), "")
    return found


def _agreement(outcomes: Outcomes) -> dict[str, Metric]:
    if not len(outcomes.labels):
        return dict.fromkeys(("failure_rate", "disagreement"), (None, NO_IMAGE))
    both = (outcomes.verdicts != NO_ANSWER) & ~np.isnan(outcomes.scores)
    differ = outcomes.verdicts != outcomes.by_score
    return {
        "failure_rate": (float(np.mean(outcomes.verdicts == NO_ANSWER)), ""),
        "disagreement": (float(differ[both].mean()), "") if both.any() else (None, "no image has both text and score"),
    }


def expected_calibration_error(labels: Array, scores: Array) -> float:
    """ECE of P(fake) over equal bins (Naeini et al., 2015)."""
    bins = score_bins(scores)
    # n_bin * |mean score - share of fakes| is the sum of (score - label) over the bin.
    gaps = np.bincount(bins, weights=scores - labels, minlength=BINS)
    return float(np.abs(gaps).sum() / len(labels))


def score_bins(scores: Array) -> Array:
    """Returns the bin of each score; 1 belongs to the last."""
    return np.minimum((scores * BINS).astype(int), BINS - 1)


def bootstrap(outcomes: Outcomes, name: str, *, draws: int = DRAWS, seed: int = 0) -> dict[str, Array]:
    """Draws images with replacement within each set and class.

    Args:
        outcomes: The images.
        name: Of the partition; it decides, with the seed, what is drawn.
        draws: Number of draws.
        seed: Of the draws.

    Returns:
        Every metric's value in each draw, NaN where it is undefined, shape (draws,).
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    parts = [weighted_metrics(outcomes, weights) for weights in draw_weights(outcomes, draws, rng)]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def interval(values: Array) -> list[float] | None:
    """Returns the percentile interval of a metric's draws, None if it is undefined in all."""
    known = values[~np.isnan(values)]
    return [float(value) for value in np.percentile(known, INTERVAL)] if len(known) else None


def wilson(count: int, of: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share by its score (Wilson, 1927).

    Args:
        count: Successes.
        of: Trials, at least one.
    """
    share, square = count / of, _NORMAL**2 / of
    middle = (share + square / 2) / (1 + square)
    half = _NORMAL * np.sqrt(share * (1 - share) / of + square / of / 4) / (1 + square)
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def draw_weights(outcomes: Outcomes, draws: int, rng: np.random.Generator) -> Iterator[Array]:
    """How often each image is drawn, shape (draws, N), some draws at a time."""
    pairs = sorted(set(zip(outcomes.strata.tolist(), outcomes.labels.tolist(), strict=True)))
    strata = [np.flatnonzero((outcomes.strata == stratum) & (outcomes.labels == label)) for stratum, label in pairs]
    step = max(1, _CELLS // max(1, len(outcomes.labels)))
    for start in range(0, draws, step):
        count = min(step, draws - start)
        weights = np.zeros((count, len(outcomes.labels)))
        for members in strata:
            # All draws of a stratum in one bincount: draw d counts into its own range of len(members) bins.
            drawn = rng.integers(len(members), size=(count, len(members)))
            drawn += np.arange(count)[:, None] * len(members)
            counts = np.bincount(drawn.ravel(), minlength=count * len(members))
            weights[:, members] = counts.reshape(count, len(members))
        yield weights


def weighted_metrics(outcomes: Outcomes, weights_DN: Array) -> dict[str, Array]:
    """Computes the metrics for many weightings of the images at once; undefined ones are NaN, shape (D,)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        metrics: dict[str, Array] = {}
        for prefix, verdicts in (("text", outcomes.verdicts), ("score", outcomes.by_score)):
            found = weighted_verdicts(outcomes.labels, verdicts, weights_DN)
            metrics |= {f"{prefix}_{name}": values for name, values in found.items()}
        scored = ~np.isnan(outcomes.scores)
        metrics |= weighted_ranks(outcomes.labels[scored], outcomes.ranks[scored], weights_DN[:, scored])
        metrics |= _weighted_scores(outcomes.labels[scored], outcomes.scores[scored], weights_DN[:, scored])
        both = scored & (outcomes.verdicts != NO_ANSWER)
        differ = both & (outcomes.verdicts != outcomes.by_score)
        metrics["failure_rate"] = _share(weights_DN, outcomes.verdicts == NO_ANSWER, np.ones_like(both))
        metrics["disagreement"] = _share(weights_DN, differ, both)
    return metrics


def _share(weights_DN: Array, counted: Array, among: Array) -> Array:
    shares: Array = (weights_DN @ counted) / (weights_DN @ among)
    return shares


def weighted_verdicts(labels: Array, verdicts: Array, weights_DN: Array) -> dict[str, Array]:
    """Computes the accuracies and F1 for many weightings at once, shape (D,); an image without a verdict is wrong."""
    right = labels == verdicts
    recalls, f1 = [], []
    for number in (0, 1):
        own, called = labels == number, verdicts == number
        recalls.append(_share(weights_DN, own & right, own))
        f1.append(_share(weights_DN, 2.0 * (own & right), own.astype(float) + called))
    both = ~np.isnan(recalls[0]) & ~np.isnan(recalls[1])
    return {
        "accuracy": _share(weights_DN, right, np.ones_like(right)),
        "real_accuracy": recalls[0],
        "fake_accuracy": recalls[1],
        "balanced_accuracy": (recalls[0] + recalls[1]) / 2,
        "f1_fake": f1[1],
        "f1_real": f1[0],
        "f1_macro": np.where(both, (f1[0] + f1[1]) / 2, np.nan),
    }


def weighted_ranks(labels: Array, scores: Array, weights_DN: Array) -> dict[str, Array]:
    """Computes the metrics of ranking for many weightings at once, shape (D,); no score may be NaN."""
    # The curves' points for falling thresholds: how many fakes and reals, by weight, have at least that score.
    order = np.argsort(-scores, kind="stable")
    labels, scores, weights_DN = labels[order], scores[order], weights_DN[:, order]
    # Equal scores share a threshold, so only the last of each run of equal ones is a point of the curve.
    last = np.flatnonzero(np.append(np.diff(scores) != 0, len(scores) > 0)) if len(scores) else np.zeros(0, int)
    true_DK = np.cumsum(weights_DN * labels, axis=1)[:, last]
    false_DK = np.cumsum(weights_DN * (1 - labels), axis=1)[:, last]
    fakes, reals = (weights_DN @ labels)[:, None], (weights_DN @ (1 - labels))[:, None]
    recall_DK = np.pad(true_DK / fakes, ((0, 0), (1, 0)))
    alarm_DK = np.pad(false_DK / reals, ((0, 0), (1, 0)))
    steps_DK = np.diff(recall_DK, axis=1)
    precision_DK = np.nan_to_num(true_DK / (true_DK + false_DK))
    undefined = np.isnan(fakes / fakes + reals / reals)[:, 0]  # 0 / 0 where a draw lacks a class
    # AUROC by trapezoids over the ROC curve, average precision as steps (both as scikit-learn defines them).
    metrics = {
        "auroc": (np.diff(alarm_DK, axis=1) * (recall_DK[:, 1:] + recall_DK[:, :-1]) / 2).sum(axis=1),
        "average_precision": (steps_DK * precision_DK).sum(axis=1),
    }
    for name, most in FALSE_POSITIVE_RATES.items():
        metrics[name] = np.where(alarm_DK <= most, recall_DK, 0).max(axis=1)
    return {name: np.where(undefined, np.nan, values) for name, values in metrics.items()}


def _weighted_scores(labels: Array, scores: Array, weights_DN: Array) -> dict[str, Array]:
    total = weights_DN.sum(axis=1)
    # A bin's share times |mean score - share of fakes| is |sum of (score - label)| over the total weight.
    bins = score_bins(scores)
    gaps_DB = np.stack([weights_DN @ ((scores - labels) * (bins == index)) for index in range(BINS)], 1)
    smallest = np.finfo(np.float64).eps  # as log_loss clips
    likelihoods = np.clip(np.where(labels == 1, scores, 1 - scores), smallest, 1 - smallest)
    return {
        "ece": np.abs(gaps_DB).sum(axis=1) / total,
        "nll": weights_DN @ -np.log(likelihoods) / total,
        "brier": weights_DN @ (scores - labels) ** 2 / total,
    }


def macro(per_set: Sequence[tuple[Values, dict[str, Array]]]) -> tuple[Values, dict[str, list[float] | None]]:
    """Means over sets, each over the sets where the metric is defined.

    Args:
        per_set: Metrics and draws of each set.

    Returns:
        The means by name, and their intervals.
    """
    means: Values = {}
    intervals: dict[str, list[float] | None] = {}
    for name in per_set[0][1]:
        defined = [(metrics[name], draws[name]) for metrics, draws in per_set if metrics[name] is not None]
        means[name] = float(np.mean([value for value, _ in defined])) if defined else None
        intervals[name] = interval(np.mean([drawn for _, drawn in defined], axis=0)) if defined else None
    return means, intervals
