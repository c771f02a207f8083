"""Evaluations on disk, and the images that they share. Imports no torch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from forgery_eval.benchmarks import Sample, open_benchmark
from forgery_eval.conditions import read_perturbed
from forgery_eval.metrics.calibration import SHARE, Calibration, is_for_fitting
from forgery_eval.metrics.comparison import Judged
from forgery_eval.metrics.detection import NO_ANSWER
from forgery_eval.metrics.scoring import ALL, verdict_source
from forgery_eval.store import Prediction, read_run
from llava.cli import note
from llava.errors import DataError, OptionError, UserError
from llava.files import read_json
from llava.labels import FAKE, LABELS, parse_label

METRICS = "metrics.json"
OVERLAPS = ("iou", "pointing")
"""Measures of an image's mask that are compared, as ``metrics.json`` names them."""
RULE = "rule"
"""Verdicts are given by a rule of abstention; the other sources are those of ``verdict_source``."""
_UNKNOWN = -1


def metrics_file(run: Path) -> Path:
    """Returns the file with the metrics of a run that is named by it or by its folder."""
    return run / METRICS if run.is_dir() else run


def read_metrics(run: Path) -> dict[str, Any]:
    """Returns what an evaluation wrote.

    Raises:
        UserError: There is no such file, or it is none of an evaluation's.
    """
    file = metrics_file(run)
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("detection"), dict) or "reasoning" not in content:
        raise DataError(f"{file} is no evaluation's; name a result folder of forgery eval")
    return content


def short_names(runs: Sequence[Path]) -> list[str]:
    """Returns as many last parts of each run's folder as tell it from the others.

    Raises:
        OptionError: A run is named twice.
    """
    parts = [metrics_file(run).resolve().parts for run in runs]
    parts = [path[:-1] if path[-1] == METRICS else path for path in parts]
    if twice := [str(run) for run, path in zip(runs, parts, strict=True) if parts.count(path) > 1]:
        raise OptionError(f"{twice[0]} is named twice")
    names = []
    for path in parts:
        length = next(n for n in range(1, len(path) + 1) if [other[-n:] for other in parts].count(path[-n:]) == 1)
        names.append("/".join(path[-length:]))
    return names


@dataclass(frozen=True)
class Evaluation:
    """What ``forgery eval`` left of one run.

    Attributes:
        name: A short name that no other compared run has.
        metrics: What ``metrics.json`` holds.
        predictions: Of the images that its metrics are of, by id.
        perturbed: Of the same images after each perturbation, by the perturbation's name.
        fitted_on: How many images its calibration was fitted on, which are left out.
    """

    name: str
    metrics: Mapping[str, Any]
    predictions: Mapping[str, Prediction]
    perturbed: Mapping[str, Mapping[str, Prediction]] = field(default_factory=dict)
    fitted_on: int = 0

    @property
    def verdicts_by(self) -> str:
        """Whose verdicts are compared: ``rule``, ``text`` or ``score``."""
        if "withheld" in self.metrics.get("abstention", {}):
            return RULE
        return verdict_source(self.metrics["detection"][ALL]["metrics"])

    def judged(self, images: "Images", condition: str = "") -> tuple[Judged, dict[str, int]]:
        """Returns what it says of some images, and how many have no verdict by the reason why.

        Args:
            images: The images.
            condition: Name of a perturbation; empty for the images as they are.
        """
        given = self.perturbed[condition] if condition else self.predictions
        predictions = [given[name] for name in images.ids]
        raw = np.array([np.nan if p.fake_probability is None else p.fake_probability for p in predictions], float)
        known = self.metrics.get("calibration")
        scores = Calibration(known["temperature"], known["bias"])(raw) if known else raw
        by_score = raw if self.verdicts_by == RULE else scores
        verdicts = np.where(np.isnan(by_score), NO_ANSWER, by_score >= 0.5).astype(int)
        if self.verdicts_by == "text":
            said = [parse_label(prediction.verdict) for prediction in predictions]
            verdicts = np.array([NO_ANSWER if label is None else label for label in said], int)
        reasons = self._reasons(predictions, verdicts, condition)
        verdicts[[bool(reason) for reason in reasons]] = NO_ANSWER
        overlaps = {} if condition else self._overlaps(images)
        return Judged(self.name, verdicts, scores, raw, overlaps), dict(Counter(filter(None, reasons)).most_common())

    def _reasons(self, predictions: Sequence[Prediction], verdicts: np.ndarray, condition: str) -> list[str]:
        """Why each image has no verdict; an empty text where it has one."""
        rule = self.metrics if not condition else _condition(self.metrics, condition)
        withheld = {
            name: reason for reason, names in rule.get("abstention", {}).get("withheld", {}).items() for name in names
        }
        return [
            "could not be analysed"
            if prediction.error
            else withheld.get(prediction.id)
            or ("declined" if prediction.abstained else "no verdict found" if verdict == NO_ANSWER else "")
            for prediction, verdict in zip(predictions, verdicts, strict=True)
        ]

    def _overlaps(self, images: "Images") -> dict[str, np.ndarray]:
        """Measures of each fake image's mask, NaN where it has none."""
        measured = {one["id"]: one for one in self.metrics.get("localization", {}).get("images", [])}
        found = {}
        for name in OVERLAPS:
            given = [measured.get(one, {}).get(name) for one in images.ids]
            values = np.array([np.nan if value is None else value for value in given], float)
            found[name] = np.where(images.labels == FAKE, values, np.nan)
        return found


def _condition(metrics: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    conditions = metrics.get("robustness", {}).get("conditions", [])
    return next((one for one in conditions if f"{one['step']}:{one['strength']}" == name), {})


@dataclass(frozen=True)
class DataSet:
    """The data set that runs are of; empty where it is not known.

    Attributes:
        samples: Its samples, by id.
        files: Ids of its samples, by file.
    """

    samples: Mapping[str, Sample] = field(default_factory=dict)
    files: Mapping[Path, str] = field(default_factory=dict)

    def by_id(self, predictions: Mapping[str, Prediction]) -> dict[str, Prediction]:
        """Returns predictions by the ids of the samples, also where they name the images' files."""
        known = {name: self.files.get(Path(name).absolute(), name) for name in predictions if name not in self.samples}
        return {known.get(name, name): replace(p, id=known.get(name, name)) for name, p in predictions.items()}


def open_data(
    runs: Sequence[Mapping[str, Any]], dataset: Path | None, label_map: Mapping[str, int] | None = None
) -> DataSet:
    """Opens the data set of some runs: its files, sets and groups.

    Args:
        runs: Their metrics, which may say where the data set lay.
        dataset: The data set; None to take the first of the runs' that is there.
        label_map: What further label words of a table mean.

    Raises:
        UserError: The named data set cannot be opened.
    """
    named = [Path(run["source"]["data"]) for run in runs if run.get("source", {}).get("data")]
    path = dataset or next((path for path in named if path.exists()), None)
    if path is None:
        return DataSet()
    try:
        samples = open_benchmark(path, label_map=label_map)
    except UserError as error:
        if dataset is not None:
            raise
        note(f"without groups and images, since the data set cannot be opened: {error}")
        return DataSet()
    files = {Path(sample.image).absolute(): sample.id for sample in samples}
    return DataSet({sample.id: sample for sample in samples}, files)


def read_evaluation(file: Path, name: str, metrics: Mapping[str, Any], data: DataSet) -> Evaluation:
    """Reads a run's predictions, those of perturbed images among them.

    Args:
        file: Where they lie, see ``predictions_file``.
        name: The run's short name.
        metrics: What ``read_metrics`` returned.
        data: The data set, where it is known.

    Raises:
        UserError: The predictions are not there or cannot be read.
    """
    answers = metrics.get("source", {}).get("answers")
    header, predictions = read_run(file, answers)
    names = [f"{one['step']}:{one['strength']}" for one in metrics.get("robustness", {}).get("conditions", [])]
    perturbed = read_perturbed(file, header.get("settings", {}), names, answers)
    own = data.by_id(predictions)
    calibration = metrics.get("calibration") or {}
    share = calibration.get("share", SHARE) if calibration.get("fitted_here") else 0.0
    reported = {one: p for one, p in own.items() if not (share and is_for_fitting(one, share))}
    if len(reported) != (counted := metrics["detection"][ALL]["metrics"]["images"]):
        note(f"{name}: its metrics are of {counted} images, and its predictions of {len(reported)}; these are compared")
    whole = {cell: found for cell, of in perturbed.items() if (found := data.by_id(of)).keys() >= reported.keys()}
    return Evaluation(name, metrics, reported, whole, len(own) - len(reported))


def predictions_file(run: Path, metrics: Mapping[str, Any]) -> Path:
    """Returns where the predictions of a run lie, or should lie."""
    named = metrics.get("source", {}).get("predictions", f"predictions/{metrics.get('run')}.jsonl")
    return metrics_file(run).parent / str(named)


# --- the images


@dataclass(frozen=True)
class Images:
    """The images that all runs have.

    Attributes:
        ids: In the order of the first run.
        labels: 0 real, 1 fake, shape (N,).
        counts: How many images each run has, by its name.
        only: How many images each run has that no other has.
    """

    ids: list[str]
    labels: np.ndarray
    counts: Mapping[str, int]
    only: Mapping[str, int]


def match_images(runs: Sequence[Evaluation], samples: Mapping[str, Sample]) -> Images:
    """Finds the images that all runs have; an image is known by its id in the data set.

    Args:
        runs: The runs.
        samples: Those of the data set, by id, where it is known.

    Raises:
        DataError: Labels disagree, an image has none, or no image is common.
    """
    seen = Counter(name for run in runs for name in run.predictions)
    ids = [name for name in runs[0].predictions if seen[name] == len(runs)]
    if not ids:
        first, other = (next(iter(run.predictions), "no image") for run in runs[:2])
        raise DataError(
            f"no image is common to all runs: {runs[0].name} has {first}, {runs[1].name} has {other}; "
            "evaluate them on the same data set"
        )
    truth = {name: sample.label for name, sample in samples.items()}
    known = [("the data set", truth)] if truth else []
    known += [(run.name, {name: p.label for name, p in run.predictions.items()}) for run in runs]
    labels = []
    for name in ids:
        given = {source: own[name] for source, own in known if own.get(name, _UNKNOWN) != _UNKNOWN}
        if len(set(given.values())) > 1:
            words = ", ".join(f"{LABELS[label]} in {source}" for source, label in given.items())
            raise DataError(f"the labels disagree, so these are not the same images: {name} is {words}")
        if not given:
            raise DataError(f"no run says whether {name} is real or fake; name the data set by --dataset_path")
        labels.append(next(iter(given.values())))
    only = {run.name: sum(seen[name] == 1 for name in run.predictions) for run in runs}
    return Images(ids, np.array(labels, int), {run.name: len(run.predictions) for run in runs}, only)
