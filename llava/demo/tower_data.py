"""Training data of the tower stage: images in memory, and what their answers say."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.cli import progress
from llava.data.records import read_records
from llava.errors import DataError
from llava.images import load_image
from llava.mm_utils import process_images
from llava.model.configuration import LlavaConfig
from llava.model.multimodal_encoder.base import PixelFormat
from llava.systems.base import ParsedAnswer
from llava.systems.fakereasoning.answer import FORMAT

RECORDS_FILE = "forgery_reasoning_cot.json"


@dataclass(frozen=True)
class Example:
    """An image's file and its training answer."""

    image: Path
    answer: ParsedAnswer


@dataclass(frozen=True)
class Data:
    """Decoded examples.

    Attributes:
        levels: Colours 0 to 255, uint8 ``[N, 3, S, S]``.
        targets: Bool ``[N, K]``.
    """

    levels: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.levels)

    def split(self, last: int) -> "tuple[Data, Data]":
        """Splits off the last examples."""
        at = len(self) - last
        return Data(self.levels[:at], self.targets[:at]), Data(self.levels[at:], self.targets[at:])


def read_examples(sources: Sequence[Path], image_folder: Path | None) -> list[Example]:
    """Reads records in the layout of the published training file.

    Args:
        sources: Files, or folders that hold ``RECORDS_FILE``.
        image_folder: What the images' names are relative to; by default the folder of their file.

    Raises:
        DataError: A file is missing or is not of that layout, or a record has no image or no verdict.
    """
    examples = []
    for source in sources:
        file = source / RECORDS_FILE if source.is_dir() else source
        for record in read_records([file]):
            if record.image is None:
                raise DataError(f"{record.origin}: there is no image, so a tower cannot learn from it")
            answer = record.verdict(FORMAT)
            if answer.verdict is None:
                raise DataError(f"{record.origin}: {answer.problem}")
            examples.append(Example((image_folder or file.parent) / record.image, answer))
    return examples


def read_pixels(images: Sequence[Path], config: LlavaConfig, workers: int) -> Tensor:
    """Decodes images as the model does, up to normalisation: uint8 ``[N, 3, S, S]``.

    Raises:
        ImageReadError: An image cannot be read.
        DataError: There is no memory for all of them.
    """
    as_levels = {"do_rescale": False, "do_normalize": False}
    processor = CLIPImageProcessorPil(**{**(config.mm_image_processor or {}), **as_levels})
    side = config.pixel_format()["size"]
    try:
        levels = torch.empty(len(images), 3, side, side, dtype=torch.uint8)
    except RuntimeError as error:
        raise DataError(f"no memory for {len(images)} images of {side}x{side} pixels; give fewer records") from error

    def read(index: int) -> None:
        pixels = process_images([load_image(images[index])], processor, config)[0]
        levels[index] = pixels.round().clamp(0, 255).to(torch.uint8)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        for _ in progress(pool.map(read, range(len(images))), total=len(images), desc="reading", unit="image"):
            pass
    return levels


def shared_pixels(levels: Tensor, shared: PixelFormat, device: torch.device) -> Tensor:
    """Normalises decoded images as the model's image processor does, float32 ``[B, 3, S, S]``."""
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (shared.mean, shared.std))
    return (levels.to(device).float() / 255 - mean) / std
