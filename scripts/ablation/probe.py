"""Linear probes on towers: what a straight line can read from their features, before and after a stage."""

from pathlib import Path
from typing import Any

import numpy as np

from llava.errors import DataError
from llava.files import read_json, read_jsonl, write_json
from llava.images import load_image
from llava.systems.fakereasoning.answer import FORGERY_ATTRIBUTES
from scripts.ablation import runs
from scripts.ablation.runs import TOWERS_OF_A_STAGE, Workplace

KINDS = {"random": "before", "cross_entropy": "plain cross-entropy", "facl_alone": "FACL"}
"""Towers that are probed; the two stages have equally many steps."""
_BATCH = 64


def file_of(place: Workplace, kind: str, seed: int) -> Path:
    """File of a pair's probes."""
    return place.out / "probes" / f"{kind}_{seed}" / "scores.json"


def probe_towers(place: Workplace, kind: str, seed: int) -> bool:
    """Fits and scores the probes of a pair of towers; False if another process is at it."""
    file = file_of(place, kind, seed)
    return runs.once(file.parent, lambda: write_json(file, _probe(place, kind, seed)))


def _probe(place: Workplace, kind: str, seed: int) -> dict[str, Any]:
    """Fits one probe an attribute on the fake training images, and scores the fake test images.

    Real images are left out, since an attribute could be told from the class alone there.

    Returns:
        ``ids`` and ``labels`` ``[N][A]`` of the test images, and by the tower's name the ``scores`` ``[N][A]``.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, test = fake_images(place.data, "train"), fake_images(place.test, "eval", most=place.plan.evaluated)
    found: dict[str, Any] = {"ids": [name for name, _ in test], "labels": [present for _, present in test]}
    for tower in TOWERS_OF_A_STAGE:
        folder = runs.last_stage(place, kind, seed) / tower
        seen = features(folder, place, [place.data / name for name, _ in train])
        asked = features(folder, place, [place.test / name for name, _ in test])
        scores = []
        for targets in np.array([present for _, present in train]).T:
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
            scores.append(probe.fit(seen, targets).decision_function(asked))
        found[tower] = np.stack(scores, axis=1).round(5).tolist()
    return found


def fake_images(root: Path, split: str, most: int | None = None) -> list[tuple[str, list[bool]]]:
    """Returns the fake images of a split with the forgery attributes that each has.

    Args:
        root: A tree of MMFR-Synthetic.
        split: ``train``, or ``eval`` for all others.
        most: Most images of each evaluation set.

    Raises:
        DataError: There are none.
    """
    found, counts = [], dict[str, int]()
    for _, record in read_jsonl(root / "manifest.jsonl"):
        if record["label"] != "fake" or (record["split"] == "train") != (split == "train"):
            continue
        group = str(Path(record["image"]).parent)
        counts[group] = counts.get(group, 0) + 1
        if most is None or counts[group] <= most:
            present = [bool(record["attributes"].get(name)) for name in FORGERY_ATTRIBUTES]
            found.append((record["image"], present))
    if not found:
        raise DataError(f"{root} has no fake {split} image")
    return found


def features(folder: Path, place: Workplace, images: list[Path]) -> np.ndarray:
    """Returns a tower's mean patch features of images, float32 ``[N, C]``."""
    import torch
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from llava.demo.towers import load_tower
    from llava.mm_utils import process_images
    from llava.model.configuration import LlavaConfig
    from llava.model.multimodal_encoder.base import PixelFormat
    from llava.model.multimodal_encoder.builder import build_vision_tower, read_vision_tower

    config = LlavaConfig.from_dict(read_json(Path(place.plan.config)))
    source = read_vision_tower(str(folder))
    tower = build_vision_tower(source.config, PixelFormat(**config.pixel_format())).eval()
    load_tower(tower, folder)
    processor = CLIPImageProcessorPil(**(config.mm_image_processor or {}))
    parts = []
    with torch.no_grad():
        for first in range(0, len(images), _BATCH):
            opened = [load_image(image) for image in images[first : first + _BATCH]]
            pixels = [process_images([image], processor, config)[0] for image in opened]
            parts.append(tower(torch.stack(pixels)).features.mean(1))
    return torch.cat(parts).float().numpy()
