"""Features of evaluated images, kept beside their predictions so that they are computed once. Imports no torch."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from forgery_eval.benchmarks import Sample
from forgery_eval.workers import WorkerPool
from llava.cli import progress
from llava.errors import FileError
from llava.files import atomic_write, digest_json, file_errors

if TYPE_CHECKING:
    from llava import ForgeryDetector
    from llava.detector import ImageLike

SUFFIX = ".features.safetensors"
_IDS, _FEATURES = "ids", "features"


def stored_features(predictions: Path, ids: Sequence[str]) -> np.ndarray | None:
    """Returns the features that lie beside a run's predictions, shape (N, D); None if there are none of these images.

    Args:
        predictions: The run's file.
        ids: Of the samples, in order.

    Raises:
        FileError: They are damaged.
    """
    path = predictions.with_suffix(SUFFIX)
    if not path.is_file():
        return None
    with file_errors(path, "read"), safe_open(path, framework="np") as tensors:
        if (tensors.metadata() or {}).get(_IDS) != digest_json(list(ids)):
            return None
        if _FEATURES not in tensors.keys():  # noqa: SIM118 - not a mapping
            raise FileError(f"{path} holds no features; remove it")
        features: np.ndarray = tensors.get_tensor(_FEATURES)
    return features.astype(np.float32)


def compute_features(
    detector: "ForgeryDetector | WorkerPool",
    samples: Sequence[Sample],
    image_of: "Callable[[Sample], ImageLike]",
    predictions: Path,
) -> np.ndarray | None:
    """Returns features of all samples, those that are there already or new ones, which are written first.

    Args:
        detector: The model, or the workers that have it.
        samples: All samples of the run.
        image_of: Gives a sample's image or its path.
        predictions: The run's file.

    Returns:
        Shape (N, D), NaN for an image that cannot be read; None for a system without features.
    """
    if not detector.has_features:
        return None
    ids = [sample.id for sample in samples]
    found = stored_features(predictions, ids)
    if found is not None:
        return found
    if isinstance(detector, WorkerPool):
        each = detector.features_many(samples, image_of)
    else:
        each = detector.features_many(map(image_of, samples))
    rows = list(progress(each, total=len(samples), unit=" images", desc="features"))
    width = next((len(row) for row in rows if row is not None), 0)
    features = np.array([np.full(width, np.nan) if row is None else row for row in rows], np.float32)
    atomic_write(predictions.with_suffix(SUFFIX), save({_FEATURES: features}, {_IDS: digest_json(ids)}))
    return features
