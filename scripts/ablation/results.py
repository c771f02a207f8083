"""From finished runs to one table: means, paired intervals over seeds and images, effect sizes, and what holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forgery_eval.benchmarks import Sample, open_benchmark
from forgery_eval.metrics.detection import expected_calibration_error
from forgery_eval.store import Prediction, read_run
from llava.errors import DataError
from llava.files import atomic_write, read_json, write_json
from llava.labels import FAKE, LABELS
from scripts.ablation import probe
from scripts.ablation.runs import BASE, DONE, TOWERS_OF_A_STAGE, VARIANTS, Workplace

Array = np.ndarray
DRAWS = 1000
METRICS = {
    "auroc": "AUROC",
    "accuracy": "accuracy of the text",
    "ece": "ECE",
    "attributes": "F1 of attributes",
}
CLAIMS = (
    ("both branches are better than CLIP alone", BASE, "clip"),
    ("both branches are better than DINO alone", BASE, "dino"),
    ("forgery-aware fusion is better than interleaving", BASE, "interleave"),
    ("the attention bias helps", BASE, "cross_attention"),
    ("the mapper helps", BASE, "no_mapper"),
    ("learning to reason helps the verdict", BASE, "no_reasoning"),
    ("FACL helps", "facl", BASE),
)
"""What the paper says of its parts: in words, the variant that should be better, and the one that should not."""
CLAIM_METRIC = "auroc"


@dataclass(frozen=True)
class Outcome:
    """What one run said of each test image, in the order of the samples.

    Attributes:
        scores: P(fake), NaN where there is none, ``[N]``.
        after_answer: P(fake) after the answer, ``[N]``.
        right: Whether the text's verdict is right, ``[N]``.
        verdicts: The text's verdict, 0, 1, or -1 for none, ``[N]``.
        attributes: F1 of the attributes that it names of a fake image, NaN of a real one, ``[N]``.
    """

    scores: Array
    after_answer: Array
    right: Array
    verdicts: Array
    attributes: Array


def read_outcome(folder: Path, samples: Sequence[Sample]) -> Outcome:
    """Reads an evaluation of a run.

    Raises:
        DataError: It is not of these images.
    """
    files = sorted((folder / "predictions").glob("*.jsonl"))
    if len(files) != 1:
        raise DataError(f"{folder} must hold the predictions of one evaluation")
    _, predictions = read_run(files[0])
    if missing := [sample.id for sample in samples if sample.id not in predictions]:
        raise DataError(f"{folder} has no prediction of {missing[0]}")
    rows = [predictions[sample.id] for sample in samples]
    verdicts = np.array([LABELS.index(row.verdict) if row.verdict else -1 for row in rows])
    return Outcome(
        scores=_numbers([row.fake_probability for row in rows]),
        after_answer=_numbers([_after_answer(row) for row in rows]),
        right=verdicts == np.array([sample.label for sample in samples]),
        verdicts=verdicts,
        attributes=np.array([_attribute_f1(*pair) for pair in zip(samples, rows, strict=True)]),
    )


def _numbers(values: Sequence[float | None]) -> Array:
    return np.array([np.nan if value is None else value for value in values])


def _after_answer(row: Prediction) -> float | None:
    return row.fake_probability if row.answer_probability is None else row.answer_probability


def _attribute_f1(sample: Sample, row: Prediction) -> float:
    """F1 of the named attributes; NaN for a real image, whose attributes follow from the verdict."""
    if sample.label != FAKE or not sample.attributes:
        return float("nan")
    named, true = set(row.attributes), set(sample.attributes)
    return 2 * len(named & true) / (len(named) + len(true))


# --- metrics of drawn images


def measure(outcome: Outcome, labels: Array, chosen: Array) -> dict[str, float]:
    """Returns each of ``METRICS`` over the chosen images, which may repeat."""
    scores, own = outcome.scores[chosen], labels[chosen]
    known = ~np.isnan(scores)
    right, attributes = outcome.right[chosen], outcome.attributes[chosen]
    named = attributes[~np.isnan(attributes)]
    return {
        "auroc": auroc(own[known], scores[known]),
        "accuracy": float(np.mean([right[own == label].mean() for label in (0, 1)])),
        "ece": expected_calibration_error(own[known], scores[known]) if known.any() else float("nan"),
        "attributes": float(named.mean()) if len(named) else float("nan"),
    }


def auroc(labels: Array, scores: Array) -> float:
    """Returns the share of pairs of a fake and a real image that are in order, ties by half; NaN without a pair."""
    positives = int((labels == FAKE).sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return float("nan")
    _, ranks, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_ranks = (np.cumsum(counts) - (counts - 1) / 2)[ranks]
    return float((mean_ranks[labels == FAKE].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def draw_images(labels: Array, rng: np.random.Generator) -> Array:
    """Draws images with replacement, each class by itself."""
    return np.concatenate([rng.choice(np.flatnonzero(labels == label), (labels == label).sum()) for label in (0, 1)])


def bootstrap(runs: Mapping[str, Mapping[int, Outcome]], labels: Array) -> dict[str, dict[int, list[dict[str, float]]]]:
    """Returns each run's metrics over ``DRAWS`` draws of images, the same draws for all runs."""
    rng = np.random.default_rng(0)
    draws = [draw_images(labels, rng) for _ in range(DRAWS)]
    return {
        name: {seed: [measure(outcome, labels, draw) for draw in draws] for seed, outcome in by_seed.items()}
        for name, by_seed in runs.items()
    }


@dataclass(frozen=True)
class Difference:
    """One variant against another, over the seeds that both have.

    Attributes:
        mean: Of the differences.
        low: 2.5 % of the draws of seeds and images.
        high: 97.5 %.
        effect: The mean over the spread of the differences between seeds (Cohen's d of pairs); None without spread.
        seeds: How many.
    """

    mean: float
    low: float
    high: float
    effect: float | None
    seeds: int


def compare(points: Mapping[int, float], drawn: Mapping[int, Array]) -> Difference | None:
    """Returns a difference from its value at each seed, and its values ``[DRAWS]`` over draws of images.

    Seeds are drawn with replacement as well. None if no seed is shared.
    """
    seeds = sorted(points)
    if not seeds:
        return None
    values = np.array([points[seed] for seed in seeds])
    table = np.stack([drawn[seed] for seed in seeds])
    rng = np.random.default_rng(1)
    chosen = rng.integers(len(seeds), size=(table.shape[1], len(seeds)))
    means = table[chosen, np.arange(table.shape[1])[:, None]].mean(axis=1)
    low, high = np.nanpercentile(means, (2.5, 97.5)) if np.isfinite(means).any() else (np.nan, np.nan)
    spread = values.std(ddof=1) if len(seeds) > 1 else 0.0
    # Equal differences of shares have a spread of some 1e-17 by rounding.
    effect = float(values.mean() / spread) if spread > 1e-12 else None
    return Difference(float(values.mean()), float(low), float(high), effect, len(seeds))


def judge(difference: Difference | None) -> str:
    """Says in words whether a claim holds here."""
    if difference is None:
        return "not run"
    if difference.seeds < 3:
        return "cannot be told: fewer than three seeds"
    if difference.low > 0:
        return "holds"
    return "does not hold: the opposite does" if difference.high < 0 else "cannot be told: the interval holds 0"


# --- all of it


def collect(place: Workplace, seeds: Sequence[int]) -> tuple[list[Sample], dict[str, dict[int, Outcome]]]:
    """Returns the test images and the finished runs by variant and seed."""
    samples = list(open_benchmark(place.test, max_sample=place.plan.evaluated))
    found: dict[str, dict[int, Outcome]] = {}
    for name in VARIANTS:
        done = [seed for seed in seeds if (place.run(name, seed) / DONE).is_file()]
        if done:
            found[name] = {seed: read_outcome(place.run(name, seed) / "results", samples) for seed in done}
    return samples, found


def summarise(place: Workplace, seeds: Sequence[int]) -> dict[str, Any]:
    """Returns all results as plain values.

    Raises:
        DataError: No run is finished.
    """
    samples, found = collect(place, seeds)
    if not found and not any(probe.file_of(place, kind, seed).is_file() for kind in probe.KINDS for seed in seeds):
        raise DataError(f"no run in {place.out} is finished, so there is nothing to compare")
    labels = np.array([sample.label for sample in samples])
    everything = np.arange(len(labels))
    points = {
        name: {seed: measure(outcome, labels, everything) for seed, outcome in by_seed.items()}
        for name, by_seed in found.items()
    }
    drawn = bootstrap(found, labels)

    def difference(first: str, second: str, metric: str) -> Difference | None:
        shared = points.get(first, {}).keys() & points.get(second, {}).keys()
        at = {seed: points[first][seed][metric] - points[second][seed][metric] for seed in shared}
        over = {
            seed: np.array(
                [a[metric] - b[metric] for a, b in zip(drawn[first][seed], drawn[second][seed], strict=True)]
            )
            for seed in shared
        }
        return compare(at, over)

    rows = {}
    for name in found:
        own = {metric: _mean([values[metric] for values in points[name].values()]) for metric in METRICS}
        against = {metric: _plain(difference(name, BASE, metric)) for metric in METRICS if name != BASE}
        rows[name] = {
            "title": VARIANTS[name].title,
            "seeds": sorted(found[name]),
            "metrics": own,
            "by_seed": points[name],
            "against": against,
            "done": [read_json(place.run(name, seed) / DONE) for seed in sorted(found[name])],
        }
    claims = []
    for words, better, worse in CLAIMS:
        found_here = difference(better, worse, CLAIM_METRIC)
        claims.append({"claim": words, "difference": _plain(found_here), "verdict": judge(found_here)})
    return {
        "images": len(samples),
        "rows": rows,
        "missing": {name: VARIANTS[name].title for name in VARIANTS if name not in found},
        "claims": claims,
        "scores": observe_scores(place, seeds, samples, found),
        "mapper": observe_mapper(place, found),
        "probes": observe_probes(place, seeds),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _plain(difference: Difference | None) -> dict[str, Any] | None:
    return None if difference is None else vars(difference)


# --- observations


def observe_scores(
    place: Workplace, seeds: Sequence[int], samples: Sequence[Sample], found: Mapping[str, Mapping[int, Outcome]]
) -> list[dict[str, Any]]:
    """Compares the ways to read P(fake) from the base variant: after its answer, without one, over sampled answers."""
    few = list(open_benchmark(place.test, max_sample=place.plan.sampled))
    kept = np.isin([sample.id for sample in samples], [sample.id for sample in few])
    by_way: dict[str, list[dict[str, float]]] = {}
    for seed, outcome in found.get(BASE, {}).items():
        sampled = read_outcome(place.run(BASE, seed) / "sampled", few)
        labels, verdicts = np.array([sample.label for sample in few]), outcome.verdicts[kept]
        ways = {
            "after the model's own reasoning": outcome.after_answer[kept],
            "verdict only, without reasoning": outcome.scores[kept],
            "mean over 4 sampled answers": sampled.scores,
        }
        for way, scores in ways.items():
            by_way.setdefault(way, []).append(_way(labels, scores, verdicts))
    return [{"way": way, **{key: _mean([row[key] for row in rows]) for key in rows[0]}} for way, rows in by_way.items()]


def _way(labels: Array, scores: Array, verdicts: Array) -> dict[str, float]:
    known = ~np.isnan(scores)
    labels, scores, verdicts = labels[known], scores[known], verdicts[known]
    return {
        "auroc": auroc(labels, scores),
        "ece": expected_calibration_error(labels, scores),
        "unsure": float(((scores > 0.01) & (scores < 0.99)).mean()),
        "as_text": float(((scores >= 0.5) == (verdicts == FAKE)).mean()),
    }


def observe_mapper(place: Workplace, found: Mapping[str, Mapping[int, Outcome]]) -> list[dict[str, Any]]:
    """Compares the mapper's loss and accuracy in training, after the true reasoning, with the model's own verdicts."""
    rows = []
    for name in (BASE, "random_towers"):
        by_seed: list[dict[str, float]] = []
        for seed, outcome in found.get(name, {}).items():
            log = read_json(place.run(name, seed) / "model" / "log.json")
            steps = [entry for entry in log if "mapper_loss" in entry]
            if not steps:
                continue  # too short a run to have logged anything
            last = steps[-max(1, len(steps) // 10) :]
            by_seed.append(
                {
                    "first_loss": steps[0]["mapper_loss"],
                    "last_loss": _mean([entry["mapper_loss"] for entry in last]),
                    "forced": _mean([entry["verdict_accuracy_teacher_forced"] for entry in last]),
                    "generated": float(outcome.right.mean()),
                }
            )
        if by_seed:
            mean = {key: _mean([row[key] for row in by_seed]) for key in by_seed[0]}
            rows.append({"title": VARIANTS[name].title, "seeds": len(by_seed), **mean})
    return rows


def observe_probes(place: Workplace, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Compares linear probes of attributes: after FACL against before, and against plain cross-entropy."""
    rows = []
    for tower in TOWERS_OF_A_STAGE:
        read = {
            kind: {s: read_json(file) for s in seeds if (file := probe.file_of(place, kind, s)).is_file()}
            for kind in probe.KINDS
        }
        means = {
            kind: _mean([_probe_auroc(one["labels"], one[tower], None) for one in by_seed.values()])
            for kind, by_seed in read.items()
            if by_seed
        }
        for other in ("random", "cross_entropy"):
            shared = read["facl_alone"].keys() & read[other].keys()
            points, drawn = {}, {}
            rng = np.random.default_rng(2)
            for seed in sorted(shared):
                first, second = read["facl_alone"][seed], read[other][seed]
                count = len(first["ids"])
                draws = [None, *(rng.integers(count, size=count) for _ in range(DRAWS // 2))]
                values = [
                    _probe_auroc(first["labels"], first[tower], draw)
                    - _probe_auroc(second["labels"], second[tower], draw)
                    for draw in draws
                ]
                points[seed], drawn[seed] = values[0], np.array(values[1:])
            against = compare(points, drawn)
            if against is not None:
                rows.append(
                    {
                        "tower": tower,
                        "other": probe.KINDS[other],
                        "facl": means["facl_alone"],
                        "than": means[other],
                        "difference": _plain(against),
                        "verdict": judge(against),
                    }
                )
    return rows


def _probe_auroc(labels: Any, scores: Any, draw: Array | None) -> float:
    """Mean AUROC over the attributes that some of the images have and some have not."""
    labels_NA, scores_NA = np.array(labels).astype(int), np.array(scores)
    if draw is not None:
        labels_NA, scores_NA = labels_NA[draw], scores_NA[draw]
    return float(np.nanmean([auroc(labels_NA[:, a], scores_NA[:, a]) for a in range(labels_NA.shape[1])]))


def write(place: Workplace, seeds: Sequence[int]) -> str:
    """Writes ``results.json``, ``table.md`` and ``page.html``; returns the table.

    Raises:
        DataError: No run is finished.
    """
    from scripts.ablation import page

    found = summarise(place, seeds)
    write_json(place.out / "results.json", found, indent=2)
    text = page.as_text(found)
    atomic_write(place.out / "table.md", text)
    atomic_write(place.out / "page.html", page.as_page(place, seeds, found))
    return text
