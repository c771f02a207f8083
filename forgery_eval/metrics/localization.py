"""Localisation: how well masks say which pixels were changed. Imports no torch.

Masks on disk are grey, so two histograms of 256 values an image, of changed and of unchanged pixels, hold all that any
threshold needs.

Rules. An image without a predicted mask counts as one whose mask is empty; so does one that could not be analysed.
Where both masks are empty, IoU and F1 are 1; where only the predicted one is, precision, F1 and MCC are 0. What is
changed in a real image is nothing. Fakes whose true mask is not known are left out. A predicted mask of another size
than the truth is resized to it.

The pointing game (Zhang et al., 2018): the brightest pixel of a predicted mask lies within 15 pixels of a changed one.
Of several equally bright pixels, the share that does is counted; an empty mask points nowhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from forgery_eval.metrics.detection import DRAWS
from forgery_eval.metrics.ratios import means, ratio_part
from llava.labels import FAKE

Array = np.ndarray

LEVELS = 256
FIXED = 128
"""Grey values from here on are called changed: a probability above one half, a logit above 0."""
RULE = (
    "an image without a predicted mask counts as one with an empty mask; two empty masks agree (IoU and F1 1); a real "
    "image has an empty true mask"
)
NO_IMAGE = "no image has a known mask"
NO_CHANGED = "no image with known changed pixels"
BINARY = "predicted masks are black and white, so there is one threshold only"
_GIOU_EPSILON = 1e-5
TOLERANCE = 15
"""Pixels by which the pointing game may miss."""
_POINTING = ("pointing", "pointing_exact", "hit_by_chance")
_OF_CHANGED = ("iou", "f1", "precision", "recall", "mcc", "auroc", *_POINTING)
"""Means over the images that have changed pixels."""


@dataclass(frozen=True)
class Pixels:
    """How many pixels of an image have which predicted grey value.

    Attributes:
        changed: Among the changed ones, shape (256,).
        unchanged: Among the others, shape (256,).
        missing: Whether there is no predicted mask.
        binary: Whether the predicted mask is black and white.
        resized: Whether the predicted mask was of another size than the truth.
        pointing: Share of the brightest pixels that lie within ``TOLERANCE`` of a changed one, 0 for an empty mask; NaN
            where nothing was changed. ``pointing_exact`` is without tolerance, and ``hit_by_chance`` is the share of
            all pixels that lie so near: how often a random pixel would hit.
    """

    changed: Array
    unchanged: Array
    missing: bool
    binary: bool
    resized: bool = False
    pointing: float = np.nan
    pointing_exact: float = np.nan
    hit_by_chance: float = np.nan

    @property
    def any_changed(self) -> bool:
        """Whether something was changed in truth."""
        return bool(self.changed.sum() > 0)

    @classmethod
    def count(cls, predicted: Array | None, truth: Array | None) -> "Pixels":
        """Counts an image's pixels.

        Args:
            predicted: Grey mask ``[H, W]`` uint8; None if there is none.
            truth: ``[H, W]`` bool; None for an image in which nothing was changed.
        """
        shape = truth.shape if truth is not None else (1, 1) if predicted is None else predicted.shape
        truth = np.zeros(shape, bool) if truth is None else truth
        grey = np.zeros(shape, np.uint8) if predicted is None else _of_shape(predicted, shape)
        changed = np.bincount(grey[truth], minlength=LEVELS)
        unchanged = np.bincount(grey[~truth], minlength=LEVELS)
        binary = bool(np.isin(np.flatnonzero(changed + unchanged), (0, LEVELS - 1)).all())
        resized = predicted is not None and predicted.shape != shape
        return cls(changed, unchanged, predicted is None, binary, resized, **_pointing(grey, truth))


def _of_shape(mask: Array, shape: tuple[int, ...]) -> Array:
    if mask.shape == shape:
        return mask
    return np.asarray(Image.fromarray(mask).resize((shape[1], shape[0]), Image.Resampling.BILINEAR))


def _pointing(grey: Array, truth: Array) -> dict[str, float]:
    if not truth.any():
        return {}
    near = ndimage.distance_transform_edt(~truth) <= TOLERANCE
    brightest = (grey == grey.max()) & (grey > 0)
    hits = {"pointing": near, "pointing_exact": truth}
    found = {name: float(where[brightest].mean()) if brightest.any() else 0.0 for name, where in hits.items()}
    return {**found, "hit_by_chance": float(near.mean())}


def curves(pixels: Sequence[Pixels]) -> dict[str, Array]:
    """Returns, of each image and threshold, true and false positives and false and true negatives, shape (N, 256)."""
    changed_NT = np.stack([one.changed for one in pixels]).astype(np.float64)
    unchanged_NT = np.stack([one.unchanged for one in pixels]).astype(np.float64)
    # Called changed is all from the threshold on.
    tp_NT, fp_NT = (values[:, ::-1].cumsum(axis=1)[:, ::-1] for values in (changed_NT, unchanged_NT))
    fn_NT, tn_NT = changed_NT.sum(1, keepdims=True) - tp_NT, unchanged_NT.sum(1, keepdims=True) - fp_NT
    return {"tp": tp_NT, "fp": fp_NT, "fn": fn_NT, "tn": tn_NT}


def pixel_metrics(counts: Mapping[str, Array]) -> dict[str, Array]:
    """Returns IoU, F1, precision, recall and MCC from counts of any shape; see the module's rules."""
    tp, fp, fn, tn = (counts[name] for name in ("tp", "fp", "fn", "tn"))
    both_empty = tp + fp + fn == 0
    with np.errstate(divide="ignore", invalid="ignore"):
        mcc = (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        return {
            "iou": np.where(both_empty, 1.0, tp / (tp + fp + fn)),
            "f1": np.where(both_empty, 1.0, 2 * tp / (2 * tp + fp + fn)),
            "precision": np.where(both_empty, 1.0, np.nan_to_num(tp / (tp + fp))),
            "recall": np.where(both_empty, 1.0, tp / (tp + fn)),
            "mcc": np.nan_to_num(mcc, nan=0.0, posinf=0.0, neginf=0.0),
        }


def pixel_auroc(pixels: Pixels) -> float:
    """Returns the chance that a changed pixel is brighter than another, ties counting half; NaN for one class."""
    changed, unchanged = pixels.changed.sum(), pixels.unchanged.sum()
    if not changed or not unchanged:
        return np.nan
    below = np.concatenate(([0], pixels.unchanged.cumsum()[:-1]))
    wins = (pixels.changed * (below + pixels.unchanged / 2)).sum()
    return float(wins / (changed * float(unchanged)))


def authors_giou(counts: Mapping[str, Array]) -> Array:
    """Returns each image's IoU as LISA's validator has it: I / (U + 1e-5), 1 where nothing is marked or changed."""
    union = counts["tp"] + counts["fp"] + counts["fn"]
    return np.where(union == 0, 1.0, counts["tp"] / (union + _GIOU_EPSILON))


@dataclass(frozen=True)
class Localized:
    """An image whose changed pixels are known.

    Attributes:
        set: Its evaluation set.
        groups: Its further groups.
        label: 0 for real, 1 for fake.
        pixels: Its pixels.
    """

    set: str
    groups: Mapping[str, str]
    label: int
    pixels: Pixels


def localization_metrics(images: Sequence[Localized], *, draws: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """Computes every metric: of each set and group, and of all images together.

    Returns:
        ``rule``; ``sets``, ``groups`` and ``all``, each part with ``metrics``, ``intervals`` (95 %, bootstrap within
        each set and class) and ``undefined``.
    """

    def part(name: str, chosen: Sequence[Localized]) -> dict[str, Any]:
        return _part(name, chosen, draws, seed)

    names = dict.fromkeys(image.set for image in images)
    groups: dict[str, dict[str, list[Localized]]] = {}
    for image in images:
        for name, value in image.groups.items():
            groups.setdefault(name, {}).setdefault(value, []).append(image)
    return {
        "rule": RULE,
        "sets": {name: part(f"set {name}", [image for image in images if image.set == name]) for name in names},
        "all": part("all", images),
        "groups": {
            name: {value: part(f"{name} {value}", chosen) for value, chosen in values.items()}
            for name, values in groups.items()
        },
    }


def _part(name: str, images: Sequence[Localized], draws: int, seed: int) -> dict[str, Any]:
    pixels = [image.pixels for image in images]
    is_changed = np.array([one.any_changed for one in pixels], bool)
    metrics: dict[str, Any] = {
        "images": len(images),
        "changed": int(is_changed.sum()),
        "real": sum(image.label != FAKE for image in images),
        "missing": sum(one.missing and one.any_changed for one in pixels),
    }
    if not images:
        return {"metrics": metrics, "intervals": {}, "undefined": {"iou": NO_IMAGE}}
    counts = curves(pixels)
    fixed = {key: values[:, FIXED] for key, values in counts.items()}
    values = {**pixel_metrics(fixed), "auroc": np.array([pixel_auroc(one) for one in pixels])}
    values |= {name: np.array([getattr(one, name) for one in pixels]) for name in _POINTING}
    columns: dict[str, tuple[Array, Array]] = {key: (values[key], is_changed) for key in _OF_CHANGED}
    best = _best(counts, is_changed)
    is_binary = all(one.binary for one in pixels)
    for key, (threshold, per_image) in best.items():
        metrics[f"{key}_threshold"] = None if is_binary else round(threshold / (LEVELS - 1), 4)
        columns[key] = (per_image, is_changed)
    marked = (fixed["tp"] + fixed["fp"]) > 0
    real = np.array([image.label != FAKE for image in images], bool)
    columns["giou"] = (authors_giou(fixed), np.ones(len(images), bool))
    columns["real_without_mask"] = ((~marked).astype(float), real)
    sums = dict(means({key: np.where(among, column, np.nan) for key, (column, among) in columns.items()}))
    sums["ciou"] = (fixed["tp"], fixed["tp"] + fixed["fp"] + fixed["fn"])
    reasons = dict.fromkeys(sums, NO_CHANGED) | {"real_without_mask": "there is no real image"}
    strata = [(image.set, image.label) for image in images]
    part = ratio_part(f"localization {name}", strata, sums, reasons, draws=draws, seed=seed)
    metrics, intervals, undefined = metrics | part["metrics"], part["intervals"], part["undefined"]
    if is_binary:
        for key in ("auroc", *best, *(f"{key}_threshold" for key in best)):
            metrics[key], undefined[key] = None, undefined.get(key) or BINARY
            intervals.pop(key, None)
    return {"metrics": metrics, "intervals": intervals, "undefined": undefined}


def _best(counts: Mapping[str, Array], among: Array) -> dict[str, tuple[int, Array]]:
    """The threshold at which the mean IoU (or F1) over the changed images is best, and each image's value there."""
    found = {}
    for key in ("iou", "f1"):
        values_NT = pixel_metrics(counts)[key]
        means_T = values_NT[among][:, 1:].mean(axis=0) if among.any() else np.zeros(LEVELS - 1)
        threshold = 1 + int(means_T.argmax())  # 0 would call every pixel changed
        found[f"{key}_best"] = (threshold, values_NT[:, threshold])
    return found
