"""What towers are fed in their training, made once for each image and kept on disk.

Most towers take the whole image, in levels. A residual tower's measures cost several times as much as the tower itself
and never change, so that they are kept instead of the crops.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.cli import progress
from llava.demo.residual_encoder import Measures, ResidualVisionTower
from llava.files import file_errors, make_folder, read_json, write_json
from llava.images import load_image
from llava.mm_utils import process_images
from llava.model.configuration import LlavaConfig
from llava.model.multimodal_encoder.base import PixelFormat, VisionTower

LEVELS, TILES, CROPS = "levels", "tiles", "crops"
_STATE = "state.json"
_CHUNK = 64


def read_pixels(images: Sequence[Path], config: LlavaConfig) -> Tensor:
    """Decodes images as the model does: shared pixels ``[N, 3, H, S]``.

    Raises:
        ImageReadError: An image cannot be read.
    """
    processor = CLIPImageProcessorPil(**(config.mm_image_processor or {}))
    return process_images([load_image(image) for image in images], processor, config)


class TowerInputs:
    """Inputs of every example, by row.

    Args:
        images: Image of each example.
        config: The model's; says how pixels are made.
        towers: Towers whose inputs are wanted, as they will be trained: measures are standardised.
        folder: Where the inputs are kept. Those of the same images and towers are used again.
        workers: Threads that decode images.

    Raises:
        ImageReadError: An image cannot be read.
        FileError: The disk cannot hold them.
    """

    def __init__(
        self, images: Sequence[Path], config: LlavaConfig, towers: Sequence[VisionTower], folder: Path, workers: int
    ) -> None:
        self.shared = PixelFormat(**config.pixel_format())
        self.residual = next((tower for tower in towers if isinstance(tower, ResidualVisionTower)), None)
        self.images, self.config, self.folder, self.workers = images, config, folder, max(1, workers)
        side, count = self.shared.size, len(images)
        shapes: dict[str, tuple[Any, tuple[int, ...]]] = {LEVELS: (np.uint8, (count, 3, side, side))}
        if self.residual is not None:
            tiles, crops = self.residual.tile_mean.numel(), self.residual.crop_mean.numel()
            shapes[TILES] = (np.float16, (count, self.residual.num_patches, tiles))
            shapes[CROPS] = (np.float16, (count, self.residual.crops.count, crops))
        make_folder(folder, "inputs")
        identity = self._identity()
        begun = folder / _STATE
        state = read_json(begun) if begun.is_file() else {}
        done = state["done"] if state.get("identity") == identity else 0
        with file_errors(folder, "written"):
            self.arrays = {
                name: np.lib.format.open_memmap(
                    folder / f"{name}.npy", mode="r+" if done else "w+", dtype=dtype, shape=shape
                )
                for name, (dtype, shape) in shapes.items()
            }
        self._make(done, identity)

    def of(self, index: Tensor, device: torch.device) -> dict[str, Tensor]:
        """Returns the inputs of some rows, in single precision."""
        picked = {name: self.kept(name, index, device) for name in self.arrays}
        picked[LEVELS] = normalized(picked[LEVELS], self.shared)
        return picked

    def kept(self, name: str, index: Tensor, device: torch.device) -> Tensor:
        """Returns one kind of them, ``LEVELS``, ``TILES`` or ``CROPS``, as it is kept, in single precision."""
        return torch.from_numpy(self.arrays[name][index.numpy()]).to(device).float()

    def _make(self, done: int, identity: str) -> None:
        bar = progress(total=len(self.images), initial=done, desc="reading", unit="image")
        for start, pixels in self._chunks(done):
            rows = slice(start, start + len(pixels))
            whole = pixels[:, :, : self.shared.size]
            self.arrays[LEVELS][rows] = levels(whole, self.shared).to(torch.uint8).numpy()
            if self.residual is not None:
                device = self.residual.position_embeddings.device
                measures = self.residual.measure(pixels.to(device))
                self.arrays[TILES][rows] = measures.tiles.cpu().numpy()
                self.arrays[CROPS][rows] = measures.crops.cpu().numpy()
            bar.update(len(pixels))
            if (start // _CHUNK) % 16 == 15 or rows.stop >= len(self.images):
                with file_errors(self.folder, "written"):
                    for array in self.arrays.values():
                        array.flush()
                write_json(self.folder / _STATE, {"identity": identity, "done": start + len(pixels)})
        bar.close()

    def _chunks(self, done: int) -> Iterator[tuple[int, Tensor]]:
        """Yields shared pixels of the images that are still to come; threads decode a chunk while one is measured."""

        def read(start: int) -> list[Future[Tensor]]:
            return [pool.submit(read_pixels, [image], self.config) for image in self.images[start : start + _CHUNK]]

        starts = list(range(done, len(self.images), _CHUNK))
        with ThreadPoolExecutor(self.workers) as pool:
            coming = read(starts[0]) if starts else []
            for start, after in zip(starts, [*starts[1:], None], strict=False):
                now, coming = coming, [] if after is None else read(after)
                yield start, torch.cat([part.result() for part in now])

    def _identity(self) -> str:
        settings = [self.config.mm_image_processor, self.config.mm_native_crops, self.config.image_aspect_ratio]
        digest = hashlib.blake2b(repr([*map(str, self.images), settings]).encode(), digest_size=16)
        if self.residual is not None:
            for name, buffer in self.residual.named_buffers():
                digest.update(name.encode() + buffer.cpu().numpy().tobytes())
        return digest.hexdigest()


def measures_of(inputs: Mapping[str, Tensor]) -> Measures:
    """Returns what a residual tower encodes."""
    return Measures(inputs[TILES], inputs[CROPS])


def levels(pixels: Tensor, shared: PixelFormat) -> Tensor:
    """Returns the colours, 0 to 255, of normalised pixels ``[B, 3, H, W]``."""
    mean, std = _per_channel(pixels, shared)
    return ((pixels * std + mean) * 255).round().clamp(0, 255)


def normalized(levels_B3HW: Tensor, shared: PixelFormat) -> Tensor:
    """Normalises colours as the model's image processor does."""
    mean, std = _per_channel(levels_B3HW, shared)
    return (levels_B3HW / 255 - mean) / std


def _per_channel(like: Tensor, shared: PixelFormat) -> tuple[Tensor, Tensor]:
    mean, std = (like.new_tensor(values).view(1, 3, 1, 1) for values in (shared.mean, shared.std))
    return mean, std
