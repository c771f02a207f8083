"""Runs of one evaluation beside the clean one: perturbed images, light deliveries, and features. Imports no torch.

Each has a predictions file of its own in a folder below the clean run's, and is resumed like it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from forgery_eval.benchmarks import Sample
from forgery_eval.features import compute_features, stored_features
from forgery_eval.perturbations import GRID, Perturbation, keep_images
from forgery_eval.runner import fill_store, image_source
from forgery_eval.store import Prediction, Run, RunStore, read_run
from llava.abstention import LIGHT_DELIVERIES
from llava.cli import inform, note
from llava.errors import DataError, MissingFileError

if TYPE_CHECKING:
    from forgery_eval.workers import WorkerPool
    from llava import ForgeryDetector
    from llava.systems.base import AnalyzeOptions

_PERTURBED = "perturbed"
_STABILITY = tuple(Perturbation("stability", str(k), (step,)) for k, step in enumerate(LIGHT_DELIVERIES, start=1))


@dataclass(frozen=True)
class Plan:
    """What is asked for beside the clean predictions.

    Attributes:
        perturbations: Cells of the robustness grid.
        features: Whether features of the images are needed.
        deliveries: Light deliveries of each image.
        images: Folder to write perturbed images to; None writes none.
    """

    perturbations: Sequence[Perturbation] = ()
    features: bool = False
    deliveries: int = 0
    images: Path | None = None


@dataclass(frozen=True)
class RunEvidence:
    """What one condition gave, in the order of the samples.

    Attributes:
        predictions: One a sample; empty for the clean condition, whose predictions lie apart.
        features: Shape (N, D), or None.
        delivered: Predictions after each light delivery.
    """

    predictions: Sequence[Prediction] = ()
    features: np.ndarray | None = None
    delivered: Sequence[Sequence[Prediction]] = field(default_factory=tuple)


@dataclass(frozen=True)
class Conditions:
    """Analyses samples as they are and as they become.

    Attributes:
        detector: The model, or the workers that have it.
        samples: The samples.
        options: How images are analysed.
        run: The clean run.
        folder: Where its predictions go.
        oriented: Whether images are turned as their EXIF orientation says.
    """

    detector: "ForgeryDetector | WorkerPool"
    samples: Sequence[Sample]
    options: "AnalyzeOptions"
    run: Run
    folder: Path
    oriented: bool

    def predictions(
        self, perturbation: Perturbation | None = None, images: Path | None = None
    ) -> tuple[Path, list[Prediction]]:
        """Analyses what is not analysed yet.

        Args:
            perturbation: What is done to the images first.
            images: Folder to write the changed images to.

        Returns:
            The run's file, and a prediction of each sample.
        """
        run, folder, change = self.run, self.folder, None
        if perturbation is not None:
            run = _perturbed_run(run, perturbation)
            folder = _folder(self.folder, perturbation)
            change = perturbation if images is None else keep_images(perturbation, images / perturbation.folder)
            inform(f"perturbed: {perturbation.name}")
        path, found = self.analyze(run, folder, change)
        return path, [found[sample.id] for sample in self.samples]

    def analyze(
        self, run: Run, folder: Path, change: Callable[[Sample, Image.Image], Image.Image] | None = None
    ) -> tuple[Path, dict[str, Prediction]]:
        """Analyses what is not analysed yet of some run.

        Args:
            run: The run.
            folder: Where its predictions go.
            change: Gives another image instead of a sample's.

        Returns:
            The run's file, and the predictions by id.
        """
        with closing(RunStore(folder, run, [sample.id for sample in self.samples])) as store:
            fill_store(self.detector, self.samples, self.options, store, oriented=self.oriented, change=change)
        return store.path, read_run(store.path)[1]

    def evidence(self, clean: Path, plan: Plan) -> tuple[RunEvidence, dict[Perturbation, RunEvidence]]:
        """Returns what is asked for of the clean images and of the perturbed ones.

        Args:
            clean: The clean run's file.
            plan: What is asked for.
        """
        delivered = [self.predictions(step)[1] for step in _STABILITY[: plan.deliveries]]
        features = self._features(clean) if plan.features else None
        perturbed = {}
        for cell in plan.perturbations:
            path, predictions = self.predictions(cell, plan.images)
            perturbed[cell] = RunEvidence(predictions, self._features(path, cell) if plan.features else None)
        return RunEvidence(features=features, delivered=delivered), perturbed

    def _features(self, path: Path, perturbation: Perturbation | None = None) -> np.ndarray | None:
        color_managed = self.options.color_management == "srgb"
        image_of = image_source(self.oriented, perturbation, color_managed=color_managed)
        return compute_features(self.detector, self.samples, image_of, path)


def _folder(predictions: Path, perturbation: Perturbation) -> Path:
    return predictions / _PERTURBED / perturbation.folder


def _perturbed_run(run: Run, perturbation: Perturbation) -> Run:
    steps = [step.to_json() for step in perturbation.fixed]
    return replace(run, settings={**run.settings, "perturbation": [perturbation.name, steps]})


def read_perturbed(
    clean: Path, settings: Mapping[str, Any], names: Collection[str], answer_format: str | None = None
) -> dict[str, dict[str, Prediction]]:
    """Reads what one run predicted of perturbed images, of the perturbations that lie there.

    Args:
        clean: The clean run's file.
        settings: The clean run's.
        names: Names of perturbations.
        answer_format: As for ``read_run``.

    Returns:
        Predictions by id, by the perturbation's name.
    """
    found = {}
    for cell in GRID:
        run = _perturbed_run(Run(settings, {}, 0), cell)
        file = _folder(clean.parent, cell) / f"{run.key}.jsonl"
        if cell.name in names and file.is_file():
            found[cell.name] = read_run(file, answer_format)[1]
    return found


def read_evidence(
    clean: Path, samples: Sequence[Sample], plan: Plan, answer_format: str | None = None
) -> tuple[RunEvidence, dict[Perturbation, RunEvidence]]:
    """Reads what an earlier evaluation left beside its predictions.

    Args:
        clean: The clean run's file.
        samples: The samples.
        plan: What is asked for.
        answer_format: As for ``read_run``.

    Raises:
        MissingFileError: An asked-for perturbation or light delivery was not predicted.
        DataError: Several runs of one lie there.
    """
    ids = [sample.id for sample in samples]
    delivered = [_read(clean, step, samples, answer_format)[1] for step in _STABILITY[: plan.deliveries]]
    features = stored_features(clean, ids) if plan.features else None
    if plan.features and features is None:
        note("no features of these images lie beside the predictions; only the band of scores is used")
    perturbed = {}
    for cell in plan.perturbations:
        path, predictions = _read(clean, cell, samples, answer_format)
        perturbed[cell] = RunEvidence(predictions, stored_features(path, ids) if plan.features else None)
    return RunEvidence(features=features, delivered=delivered), perturbed


def _read(
    clean: Path, perturbation: Perturbation, samples: Sequence[Sample], answer_format: str | None
) -> tuple[Path, list[Prediction]]:
    from forgery_eval.metrics.scoring import match

    folder = _folder(clean.parent, perturbation)
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise MissingFileError(f"{folder} holds no predictions of {perturbation.name}; run without --rescore first")
    if len(files) > 1:
        raise DataError(f"{folder} must hold the predictions of one run; there: {', '.join(map(str, files))}")
    found: Mapping[str, Prediction] = read_run(files[0], answer_format)[1]
    return files[0], match(samples, found)
