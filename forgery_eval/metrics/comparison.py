"""Several runs on the same images: paired differences with intervals, tests and agreement. Imports no torch.

A draw of the bootstrap takes images with replacement within each class, the same ones for every run. What two runs have
in common thus cancels out of their difference, and its interval is narrower than those of the runs suggest. Verdicts
are compared on the images that get one from both runs of a pair, scores on those that both give a score.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import binom

from forgery_eval.metrics.detection import (
    DRAWS,
    NO_ANSWER,
    ONE_CLASS,
    Array,
    Outcomes,
    draw_weights,
    interval,
    weighted_ranks,
    weighted_verdicts,
)
from llava.cli import progress
from llava.labels import FAKE, REAL

VERDICTS, SCORES, ALL = "verdicts", "scores", "all"
"""Which images a metric is of: those with a verdict, those with a score, or all, where no verdict counts as wrong."""
_OF = {
    VERDICTS: {"accuracy": "accuracy", "balanced_accuracy": "balanced_accuracy"},
    ALL: {"strict_balanced_accuracy": "balanced_accuracy"},
    SCORES: {"auroc": "auroc"},
}
"""Metrics of each kind of images, by their names here and in ``detection``."""
_NOTHING = {VERDICTS: "no image has a verdict", SCORES: "no image has a score", ALL: "there is no image"}
TITLES = {
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "strict_balanced_accuracy": "balanced, no verdict is wrong",
    "auroc": "AUROC",
    "iou": "IoU of masks",
    "pointing": "pointing",
}
"""Every metric in words, in the order of tables."""
NO_MASK = "no image has a known mask"


@dataclass(frozen=True)
class Judged:
    """What one run says of the images.

    Attributes:
        name: The run's.
        verdicts: 0, 1, or ``NO_ANSWER``, shape (N,).
        scores: P(fake), NaN where there is none, shape (N,).
        ranks: What images are ranked by: P(fake) before it was calibrated, which can make different scores equal.
        overlaps: How well what the run points at overlaps what was changed, by the measure's name: 0 to 1, NaN where
            that is not known, shape (N,).
    """

    name: str
    verdicts: Array
    scores: Array
    ranks: Array
    overlaps: Mapping[str, Array] = field(default_factory=dict)

    def known(self, kind: str) -> Array:
        """Which images a kind of metrics can be computed of, shape (N,)."""
        if kind == VERDICTS:
            return np.asarray(self.verdicts != NO_ANSWER)
        if kind == ALL:
            return np.ones(len(self.verdicts), bool)
        values = self.scores if kind == SCORES else self.overlaps.get(kind)
        return np.zeros(len(self.verdicts), bool) if values is None else ~np.isnan(values)

    def measure(self, kind: str, labels: Array, among: Array, weights_DN: Array) -> dict[str, Array]:
        """Computes a kind of metrics for many weightings of some of the images, NaN where undefined, shape (D,)."""
        labels, weights_DN = labels[among], weights_DN[:, among]
        with np.errstate(divide="ignore", invalid="ignore"):
            if kind in (VERDICTS, ALL):
                found = weighted_verdicts(labels, self.verdicts[among], weights_DN)
            elif kind == SCORES:
                found = weighted_ranks(labels, self.ranks[among], weights_DN)
            else:
                found = {kind: (weights_DN @ self.overlaps[kind][among]) / weights_DN.sum(axis=1)}
        return {name: found[source] for name, source in _OF.get(kind, {kind: kind}).items()}


def compare_runs(labels: Array, runs: Sequence[Judged], *, draws: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """Compares runs on the same images.

    Args:
        labels: The truth, 0 or 1, shape (N,).
        runs: The runs, in the order of the labels; metrics that none of them can have are left out.
        draws: Number of bootstrap draws.
        seed: Of the draws.

    Returns:
        ``images``, ``real`` and ``fake``; ``runs``, one part each with ``metrics``, ``intervals`` (95 %) and
        ``undefined``; ``pairs``, one part for each two runs in order, whose metrics are differences, the second run's
        minus the first's, with McNemar's test and agreement.
    """
    pairs = list(combinations(range(len(runs)), 2))
    parts = [(index,) for index in range(len(runs))] + pairs
    kinds = _kinds(runs)
    point = _measure_parts(labels, runs, parts, kinds, np.ones((1, len(labels))))
    drawn: list[list[dict[str, Array]]] = []
    outcomes = Outcomes(labels, labels, labels, np.zeros(len(labels), int))
    rng = np.random.default_rng([seed, zlib.crc32(b"comparison")])
    with progress(total=draws, unit=" draws", leave=False) as bar:
        for weights_DN in draw_weights(outcomes, draws, rng):
            drawn.append(_measure_parts(labels, runs, parts, kinds, weights_DN))
            bar.update(len(weights_DN))
    found = []
    for number, members in enumerate(parts):
        values = {name: np.concatenate([chunk[number][name] for chunk in drawn]) for name in point[number]}
        found.append(_part([runs[index] for index in members], kinds, point[number], values))
    compared = [
        {**_about_pair(labels, runs[one], runs[other]), **part}
        for (one, other), part in zip(pairs, found[len(runs) :], strict=True)
    ]
    add_holm(compared)
    return {
        "images": len(labels),
        "real": int((labels == REAL).sum()),
        "fake": int((labels == FAKE).sum()),
        "runs": [
            {"name": run.name, "with_verdict": int(run.known(VERDICTS).sum()), **part}
            for run, part in zip(runs, found[: len(runs)], strict=True)
        ],
        "pairs": compared,
    }


def shown_metrics(parts: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Returns the titles of the metrics that some part has a value of.

    Args:
        parts: Runs or pairs of ``compare_runs``.
    """
    metrics = [part["metrics"] for part in parts]
    return {name: title for name, title in TITLES.items() if any(own.get(name) is not None for own in metrics)}


def _kinds(runs: Sequence[Judged]) -> list[str]:
    """The kinds of metrics that some run can have; ``ALL`` only where it differs from ``VERDICTS``."""
    kinds = [VERDICTS] if any(run.known(VERDICTS).any() for run in runs) else []
    kinds += [ALL] if kinds and not all(run.known(VERDICTS).all() for run in runs) else []
    kinds += [SCORES] if any(run.known(SCORES).any() for run in runs) else []
    overlaps = dict.fromkeys(name for run in runs for name in run.overlaps)
    return kinds + [name for name in overlaps if any(run.known(name).any() for run in runs)]


def _measure_parts(
    labels: Array, runs: Sequence[Judged], parts: Sequence[tuple[int, ...]], kinds: Sequence[str], weights_DN: Array
) -> list[dict[str, Array]]:
    """Metrics of each run alone, and differences of each pair, for the same weightings of the images."""
    measured: dict[tuple[int, str, bytes], dict[str, Array]] = {}  # most parts are of the same images

    def measure(index: int, kind: str, among: Array) -> dict[str, Array]:
        key = (index, kind, among.tobytes())
        if key not in measured:
            measured[key] = runs[index].measure(kind, labels, among, weights_DN)
        return measured[key]

    found: list[dict[str, Array]] = []
    for members in parts:
        values: dict[str, Array] = {}
        for kind in kinds:
            among = np.logical_and.reduce([runs[index].known(kind) for index in members])
            if not among.any():
                values |= dict.fromkeys(_OF.get(kind, [kind]), np.full(len(weights_DN), np.nan))
                continue
            own = [measure(index, kind, among) for index in members]
            values |= own[0] if len(own) == 1 else {name: own[1][name] - own[0][name] for name in own[0]}
        found.append(values)
    return found


def _part(
    members: Sequence[Judged], kinds: Sequence[str], point: Mapping[str, Array], drawn: Mapping[str, Array]
) -> dict[str, Any]:
    """Values with their intervals, and why there are none."""
    metrics = {name: None if np.isnan(values[0]) else float(values[0]) for name, values in point.items()}
    undefined = {}
    for kind in kinds:
        known = np.logical_and.reduce([run.known(kind) for run in members]).any()
        for name in _OF.get(kind, [kind]):
            if metrics[name] is None:
                reason = ONE_CLASS if known else _NOTHING.get(kind, NO_MASK)
                undefined[name] = reason if known or len(members) == 1 else f"{reason} from both"
    intervals = {name: None if metrics[name] is None else interval(values) for name, values in drawn.items()}
    return {"metrics": metrics, "intervals": intervals, "undefined": undefined}


def _about_pair(labels: Array, one: Judged, other: Judged) -> dict[str, Any]:
    """What is counted of a pair: images, verdicts that only one has right, and agreement."""
    given = [run.known(VERDICTS) for run in (one, other)]
    both = given[0] & given[1]
    right = [run.verdicts == labels for run in (one, other)]
    counts = [int((both & right[own] & ~right[1 - own]).sum()) for own in (0, 1)]
    return {
        "first": one.name,
        "second": other.name,
        "images": int(both.sum()),
        "verdict_of_first_only": int((given[0] & ~given[1]).sum()),
        "verdict_of_second_only": int((given[1] & ~given[0]).sum()),
        "verdict_of_neither": int((~given[0] & ~given[1]).sum()),
        "scored": int((one.known(SCORES) & other.known(SCORES)).sum()),
        "only_first_right": counts[0],
        "only_second_right": counts[1],
        "p": mcnemar(*counts) if both.any() else None,
        "agreement": float((one.verdicts == other.verdicts)[both].mean()) if both.any() else None,
        "kappa": kappa(one.verdicts[both], other.verdicts[both]),
    }


def mcnemar(only_first: int, only_second: int) -> float:
    """Returns the p-value of McNemar's exact test, two-sided.

    If both runs are right equally often, each image that one alone has right is either's with probability one half.

    Args:
        only_first: Images that only the first run has right.
        only_second: Images that only the second has right.
    """
    return min(1.0, 2 * float(binom.cdf(min(only_first, only_second), only_first + only_second, 0.5)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Returns p-values corrected for their number (Holm, 1979); None stays None and does not count."""
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    found: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        found[place] = largest
    return found


def add_holm(pairs: Sequence[dict[str, Any]]) -> None:
    """Writes the corrected p-value of each pair, over all of them, beside its own as ``p_holm``."""
    for pair, corrected in zip(pairs, holm([pair["p"] for pair in pairs]), strict=True):
        pair["p_holm"] = corrected


def kappa(first: Array, second: Array) -> float | None:
    """Returns Cohen's kappa: agreement beyond chance, as a share of what is possible beyond chance.

    Args:
        first: Verdicts, 0 or 1, shape (N,).
        second: The other run's of the same images.

    Returns:
        At most 1; None where both runs give one and the same verdict throughout, or there is no image.
    """
    if not len(first):
        return None
    shares = first.mean(), second.mean()
    chance = shares[0] * shares[1] + (1 - shares[0]) * (1 - shares[1])
    return None if chance == 1 else float(((first == second).mean() - chance) / (1 - chance))


def disagreements(labels: Array, one: Judged, other: Judged) -> tuple[Array, Array]:
    """Finds the images that one run has right and the other wrong, the most confident first.

    How confident they are is the mean probability that both runs give to their own, opposite verdicts, one half where
    there is no score.

    Returns:
        Places of the images that only the first run has right, and of those that only the second has.
    """
    both = one.known(VERDICTS) & other.known(VERDICTS)
    sureness = np.zeros(len(labels))
    for run in (one, other):
        own = np.where(run.verdicts == FAKE, run.scores, 1 - run.scores)
        sureness += np.where(np.isnan(own), 0.5, own)
    order = np.argsort(-sureness, kind="stable")
    right = [(run.verdicts == labels)[order] for run in (one, other)]
    compared = both[order]
    return order[compared & right[0] & ~right[1]], order[compared & right[1] & ~right[0]]
