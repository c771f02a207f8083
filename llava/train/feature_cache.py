"""Outputs of frozen towers for each training image, kept on disk, so that they run once an image, not once an epoch."""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava.cli import progress
from llava.data.collator import Sample
from llava.data.dataset import SupervisedDataset
from llava.data.records import Record
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

_BATCH = 16
_BATCHES_A_FLUSH = 64
"""Flushing looks through a whole file, however little of it is new."""
_READERS = 4
_STATE_FILE = "state.json"
_SETTINGS = (
    "mm_image_processor",
    "mm_native_crops",
    "image_aspect_ratio",
    "vision_tower_config",
    "dino_tower_config",
    "extra_tower_configs",
    "mm_fusion_type",
    "mm_vision_select_layer",
    "mm_vision_select_feature",
)
"""Fields of the config that decide the outputs of towers."""


class CachedDataset(SupervisedDataset):
    """Samples whose images the towers have encoded already; text-only samples get zeros.

    Args:
        arrays: Values ``[images, …]`` in half precision, by their names in ``TowerOutputs``.
        rows: Row of each image, by its path in the records.
        **options: As for ``SupervisedDataset``.
    """

    def __init__(self, *arguments: Any, arrays: dict[str, np.ndarray], rows: dict[str, int], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.arrays = arrays
        self.rows = rows

    def __getitem__(self, index: int) -> Sample:
        """Returns a sample with tower outputs instead of pixels."""
        row = self.rows.get(self.records[index].image or "")
        features = {
            name: torch.zeros(array.shape[1:]) if row is None else torch.from_numpy(array[row].astype(np.float32))
            for name, array in self.arrays.items()
        }
        return replace(super().__getitem__(index), tower_outputs=features)

    def image(self, record: Record) -> None:
        """Returns nothing, since the sample has tower outputs."""
        return

    def pixels(self, image: object) -> Tensor:
        """Returns nothing, as there is no image."""
        return torch.zeros(0)


@torch.no_grad()
def cache_features(
    model: LlavaLlamaForCausalLM,
    dataset: SupervisedDataset,
    folder: Path,
    *,
    rank: int,
    world_size: int,
    wait: Callable[[], None],
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Runs the towers over every image that the folder does not have yet.

    The folder belongs to one list of images, one pair of towers and one way to make pixels; with another it is made
    again. An interrupted run resumes.

    Args:
        model: The model, its towers frozen.
        dataset: Its images are read.
        folder: Where the values are kept.
        rank: Number of this process.
        world_size: Number of processes; each does its share.
        wait: Returns once all processes have called it.

    Returns:
        ``arrays`` and ``rows`` of ``CachedDataset``.
    """
    first: dict[str, int] = {}
    for index, record in enumerate(dataset.records):
        if record.image is not None:
            first.setdefault(record.image, index)
    images = list(first)
    key = _fingerprint(model, dataset, images)
    shapes = _shapes(model, dataset.pixels(dataset.image(dataset.records[first[images[0]]])))
    if rank == 0:
        _begin(folder, key, len(images), shapes)
    wait()
    arrays = {name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="r+") for name in shapes}
    done = np.lib.format.open_memmap(folder / "done.npy", mode="r+")
    mine = [row for row in range(rank, len(images), world_size) if not done[row]]
    starts = range(0, len(mine), _BATCH)
    with ThreadPoolExecutor(_READERS) as readers:
        for start in progress(starts, desc="towers", unit=f" x {_BATCH} images", disable=rank != 0, leave=False):
            rows = mine[start : start + _BATCH]
            records = [dataset.records[first[images[row]]] for row in rows]
            pixels = torch.stack(list(readers.map(lambda record: dataset.pixels(dataset.image(record)), records)))
            outputs = model.get_model().run_towers(pixels.to(model.device))
            for name, values in outputs.items():
                arrays[name][rows] = values.to("cpu", torch.float16).numpy()
            if (start // _BATCH + 1) % _BATCHES_A_FLUSH == 0 or start == starts[-1]:
                for array in arrays.values():
                    array.flush()
                done[mine[: start + _BATCH]] = True
                done.flush()
    wait()
    kept = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in shapes}
    return kept, {image: row for row, image in enumerate(images)}


def _shapes(model: LlavaLlamaForCausalLM, pixels: Tensor) -> dict[str, tuple[int, ...]]:
    outputs = model.get_model().run_towers(pixels[None].to(model.device))
    return {name: tuple(values.shape[1:]) for name, values in outputs.items()}


def _begin(folder: Path, key: str, count: int, shapes: dict[str, tuple[int, ...]]) -> None:
    state = folder / _STATE_FILE
    whole = {**{name: (count, *shape) for name, shape in shapes.items()}, "done": (count,)}
    if _has_files(folder, key, whole):
        return
    folder.mkdir(parents=True, exist_ok=True)
    state.unlink(missing_ok=True)
    for name, shape in whole.items():
        kind = np.bool_ if name == "done" else np.float16
        np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=kind, shape=shape).flush()
    state.write_text(json.dumps({"key": key, "images": count}) + "\n", encoding="utf-8")


def _has_files(folder: Path, key: str, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether the folder has these images' files; what is damaged counts as not there."""
    try:
        state = json.loads((folder / _STATE_FILE).read_text("utf-8"))
        found = {name: np.load(folder / f"{name}.npy", mmap_mode="r").shape for name in shapes}
    except (OSError, EOFError, ValueError):
        return False
    return state.get("key") == key and found == shapes


def _fingerprint(model: LlavaLlamaForCausalLM, dataset: SupervisedDataset, images: Sequence[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for tower in model.get_model().towers():
        for name, tensor in sorted(tower.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().numpy().tobytes())
    config = model.config
    digest.update(json.dumps({name: getattr(config, name) for name in _SETTINGS}, sort_keys=True).encode())
    for image in images:
        status = (dataset.image_folder / image).stat()
        digest.update(f"{image}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
