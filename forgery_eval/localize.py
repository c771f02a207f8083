"""Compares predicted masks with the true ones of an evaluation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from forgery_eval.benchmarks import Sample
from forgery_eval.masks import read_mask
from forgery_eval.metrics.localization import FIXED, Localized, Pixels, curves, localization_metrics, pixel_metrics
from forgery_eval.store import Prediction
from llava.labels import REAL
from llava.tampered import CHANGED, read_changed

ABOVE, ABOVE_PUBLISHED = 127, CHANGED - 1
"""Grey value above which a pixel of a true mask counts as changed: by default, and as published."""


def localized_images(
    samples: Sequence[Sample], predictions: Sequence[Prediction], masks: Path | None, *, above: int = ABOVE
) -> list[tuple[Sample, Prediction, Localized]]:
    """Counts the pixels of each image whose changed pixels are known: fakes with masks, and real images.

    Args:
        samples: The samples.
        predictions: One for each.
        masks: Folder that the predictions' masks are named from.
        above: See ``ABOVE``.

    Returns:
        Nothing if no sample has a true mask.

    Raises:
        DataError: A true mask cannot be read.
    """
    if not any(sample.masks for sample in samples):
        return []
    found = []
    for sample, prediction in zip(samples, predictions, strict=True):
        if sample.masks or sample.label == REAL:
            truth = read_changed(sample.masks, above=above) if sample.masks else None
            pixels = Pixels.count(_predicted(prediction, masks), truth)
            found.append((sample, prediction, Localized(sample.set, sample.groups, sample.label, pixels)))
    return found


def _predicted(prediction: Prediction, masks: Path | None) -> np.ndarray | None:
    image = read_mask(masks, prediction.mask) if masks and prediction.mask else None
    return None if image is None else np.asarray(image)


def localization(
    samples: Sequence[Sample], predictions: Sequence[Prediction], masks: Path | None, *, above: int = ABOVE
) -> dict[str, Any] | None:
    """Returns the metrics of the predicted masks; None where no true mask, or no predicted one, is there.

    ``resized`` names the images whose predicted and true mask differ in size.
    """
    images = localized_images(samples, predictions, masks, above=above)
    if not images or not any(prediction.mask for prediction in predictions):
        return None
    found = localization_metrics([image for _, _, image in images])
    values = pixel_metrics(
        {key: of_image[:, FIXED] for key, of_image in curves([i.pixels for _, _, i in images]).items()}
    )
    resized = [sample.id for sample, _, image in images if image.pixels.resized]
    truth = f"grey values above {above} of a true mask are changed"
    if resized:
        truth += f"; predicted masks that were resized to the size of the true ones: {len(resized)}"
    return {
        "truth": truth,
        "resized": resized,
        **found,
        "images": [
            {
                "id": sample.id,
                "iou": round(float(iou), 6),
                "f1": round(float(f1), 6),
                "pointing": None if np.isnan(image.pixels.pointing) else round(image.pixels.pointing, 6),
                "missing": image.pixels.missing,
            }
            for (sample, _, image), iou, f1 in zip(images, values["iou"], values["f1"], strict=True)
        ],
    }
