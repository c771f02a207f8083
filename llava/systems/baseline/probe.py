"""A linear probe: logistic regression on standardised features of a frozen backbone."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save, save_file

from llava.cli import inform, progress
from llava.data.labelled import LabelledImage, read_labelled
from llava.errors import CheckpointError, DataError, ImageReadError, OptionError
from llava.files import atomic_file, atomic_folder, digest_file, digest_files, digest_json, replace_folder, write_json
from llava.images import load_image
from llava.labels import LABELS
from llava.model.checkpoint_files import read_json
from llava.systems import registry
from llava.systems.baseline import PROBE
from llava.systems.baseline.backbone import Backbone, open_backbone

WEIGHTS = "probe.safetensors"
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse strengths of the ridge that are tried."""
FOLDS = 5
_CHUNK = 128
_BATCH = 16
_READERS = 4


@dataclass(frozen=True)
class Probe:
    """A fitted probe.

    Attributes:
        backbone: Source of the backbone, see ``open_backbone``.
        mean: Of the training features, shape (D,).
        spread: Their deviation, shape (D,).
        weights: Shape (D,).
        bias: One number.
        about: What it was fitted on.
    """

    backbone: str
    mean: np.ndarray
    spread: np.ndarray
    weights: np.ndarray
    bias: float
    about: Mapping[str, Any]

    def __call__(self, features_BD: np.ndarray) -> np.ndarray:
        """Returns P(fake), shape (B,).

        Raises:
            CheckpointError: The backbone gives other features than it was fitted on.
        """
        if features_BD.shape[1:] != self.weights.shape:
            raise CheckpointError(
                f"{self.backbone} gives {features_BD.shape[1]} features, but the probe was fitted on "
                f"{len(self.weights)}: fit it again"
            )
        logits = ((features_BD - self.mean) / self.spread) @ self.weights + self.bias
        probabilities: np.ndarray = 1 / (1 + np.exp(-np.clip(logits, -60, 60)))
        return probabilities

    def save(self, folder: Path) -> None:
        """Writes the probe, atomically; an older one there is replaced."""
        with atomic_folder(folder.with_name(f"{folder.name}.new")) as new:
            arrays = {"mean": self.mean, "spread": self.spread, "weights": self.weights}
            save_file({**arrays, "bias": np.array([self.bias])}, new / WEIGHTS)
            config = {
                "model_type": PROBE,
                "system": "baseline",
                "backbone_path": self.backbone,
                "fitted_on": self.about,
            }
            write_json(new / "config.json", config)
        replace_folder(folder.with_name(f"{folder.name}.new"), folder)

    @classmethod
    def load(cls, folder: Path) -> "Probe":
        """Opens what ``save`` wrote.

        Raises:
            CheckpointError: It is damaged.
        """
        config = read_json(folder / "config.json")
        try:
            arrays = load_file(folder / WEIGHTS)
            mean, spread, weights = (arrays[name] for name in ("mean", "spread", "weights"))
            bias = float(arrays["bias"][0])
            return cls(config["backbone_path"], mean, spread, weights, bias, config.get("fitted_on", {}))
        except (OSError, SafetensorError, KeyError, IndexError) as error:
            raise CheckpointError(f"{folder} is no whole linear probe: {error}") from error


def fit_probe(
    backbone: str, data: Sequence[Path], folder: Path, cache: Path, *, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Fits a probe and writes it.

    Features lie in the cache, by backbone and image contents, so that a probe on other data or an interrupted run
    computes only what is new.

    Args:
        backbone: See ``open_backbone``.
        data: See ``read_labelled``: MMFR trees, folders of classes, tables, training records.
        folder: Where the probe goes. One that was fitted on the same is kept.
        cache: Where features are kept.
        device: Where the backbone runs.
        seed: Of the folds.

    Returns:
        What it was fitted on.

    Raises:
        CheckpointError: The backbone cannot be opened.
        DataError: There are no images of both classes.
    """
    if Path(backbone).expanduser().exists():
        backbone = str(Path(backbone).expanduser().resolve())  # opened again from any folder
    images = read_labelled(data, LABELS, answer_format=registry.answer_format(registry.DEFAULT))
    files = [image.choose(None) for image in images]
    digests = list(progress(digest_files(files), desc="hashing the images", total=len(files), leave=False))
    about: dict[str, Any] = {
        "images": len(images),
        "fakes": sum(image.label for image in images),
        "data": [path.name for path in data],
        "digest": digest_json([[digest, image.label] for digest, image in zip(digests, images, strict=True)])[:16],
        "backbone": _backbone_digest(backbone),
        "seed": seed,
    }
    own = folder / "config.json"
    if own.is_file() and (folder / WEIGHTS).is_file():
        kept = read_json(own)
        same = {name: kept.get("fitted_on", {}).get(name) for name in about}
        if same == about and kept.get("backbone_path") == backbone:
            return dict(kept["fitted_on"])
    features_ND, readable = _features(backbone, images, digests, cache, device, about["backbone"])
    labels = np.array([image.label for image in images])[readable]
    probe, strength = _fit(features_ND[readable], labels, seed)
    about |= {"unreadable": int((~readable).sum()), "strength": strength}
    Probe(backbone, *probe, about).save(folder)
    return about


def _backbone_digest(backbone: str) -> str:
    """What tells a backbone from another at the same place."""
    root = Path(backbone.split(":")[-1]).expanduser()
    if not root.exists():
        return backbone
    files = sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]
    return digest_json([[file.name, digest_file(file)] for file in files])[:16]


# --- features


def _features(
    backbone: str, images: Sequence[LabelledImage], digests: Sequence[str], cache: Path, device: str, digest: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns features ``[N, D]`` and which images could be read; what the cache lacks is computed and added."""
    store = _FeatureCache(cache / digest.replace("/", "_").replace(":", "_"))
    new = [k for k, name in enumerate(digests) if name not in store.rows]
    if new:
        opened = open_backbone(backbone, device)
        inform(f"features of {len(new)} images, {len(images) - len(new)} are there")
        with progress(total=len(new), desc="features", unit=" images") as bar:
            for start in range(0, len(new), _CHUNK):
                chunk = new[start : start + _CHUNK]
                store.add([digests[k] for k in chunk], _compute(opened, [images[k] for k in chunk]))
                bar.update(len(chunk))
    known = [store.rows[name] for name in digests]
    readable = np.array([bool(np.isfinite(row).all()) for row in known])
    width = next((len(row) for row, good in zip(known, readable, strict=True) if good), 1)
    blank = np.full(width, np.nan, np.float32)
    return np.stack([row if good else blank for row, good in zip(known, readable, strict=True)]), readable


def _compute(backbone: Backbone, images: Sequence[LabelledImage]) -> np.ndarray:
    """Features of some images, NaN for those that cannot be read."""

    def prepare(image: LabelledImage) -> Any:
        try:
            return backbone.prepare(load_image(image.choose(None)))
        except ImageReadError as error:
            inform(f"left out: {error}")
            return None

    parts: list[np.ndarray | None] = []
    with ThreadPoolExecutor(_READERS) as readers:
        for batch in _batches(images):
            prepared = list(readers.map(prepare, batch))
            readable = [item for item in prepared if item is not None]
            found = iter(backbone.features(readable) if readable else ())
            parts += [None if item is None else next(found) for item in prepared]
    width = next((len(part) for part in parts if part is not None), 1)
    return np.stack([np.full(width, np.nan, np.float32) if part is None else part for part in parts])


def _batches(images: Sequence[LabelledImage]) -> Iterator[Sequence[LabelledImage]]:
    for start in range(0, len(images), _BATCH):
        yield images[start : start + _BATCH]


class _FeatureCache:
    """Features on disk, in files of some images each, by the digests of the images' contents."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[str, np.ndarray] = {}
        for file in sorted(folder.glob("*.safetensors")):
            try:
                self.rows |= load_file(file)
            except SafetensorError:
                raise DataError(f"{file} is damaged; remove it, and its features are computed again") from None

    def add(self, names: Sequence[str], features_BD: np.ndarray) -> None:
        """Adds features; they are on disk when it returns. What cannot be read is not kept."""
        kept = {name: row for name, row in zip(names, features_BD, strict=True) if np.isfinite(row).all()}
        self.rows |= dict(zip(names, features_BD, strict=True))
        if kept:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.folder / f"{digest_json(sorted(kept))[:16]}.safetensors") as file:
                file.write(save({name: np.ascontiguousarray(row) for name, row in kept.items()}))


# --- the regression


def _fit(
    features_ND: np.ndarray, labels: np.ndarray, seed: int
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray, float], float]:
    """Standardises and fits; the ridge is the one with the least log loss over folds."""
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_score
    except ModuleNotFoundError:
        raise OptionError("scikit-learn is not installed; it comes with: pip install 'fakereasoning[eval]'") from None
    counts = np.bincount(labels, minlength=2)
    if counts.min() < 2:
        raise DataError(
            f"a probe needs two readable images of each class; there are {counts[0]} real, {counts[1]} fake"
        )
    mean, spread = features_ND.mean(axis=0), features_ND.std(axis=0)
    spread = np.where(spread > 1e-6, spread, 1.0)
    inputs = ((features_ND - mean) / spread).astype(np.float64)
    folds = StratifiedKFold(min(FOLDS, int(counts.min())), shuffle=True, random_state=seed)
    models = {c: LogisticRegression(C=c, max_iter=1000) for c in STRENGTHS}
    losses = {
        c: -cross_val_score(model, inputs, labels, cv=folds, scoring="neg_log_loss").mean()
        for c, model in models.items()
    }
    best = min(losses, key=lambda c: losses[c])
    fitted = models[best].fit(inputs, labels)
    return (mean, spread, fitted.coef_[0].copy(), float(fitted.intercept_[0])), best
