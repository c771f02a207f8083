"""From images to shared pixels, and from a prompt with ``<image>`` to ids. Names are LLaVA's."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.errors import DataError
from llava.images import to_rgb
from llava.native_crops import NativeCrops

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_PLACEHOLDER: Mapping[str, int] = {DEFAULT_IMAGE_TOKEN: IMAGE_TOKEN_INDEX}
"""What stands for an image in a prompt's text, and its id."""
LONGEST_SIDE = 8192
"""Larger images are first shrunk by a whole factor: padding them to a square would take gigabytes."""
STRETCH = "stretch"
"""Value of ``image_aspect_ratio`` of a model whose processor makes a square of any image, whatever its shape."""
MOST_OBLONG = 100
"""Ratio of sides up to which an image that is not padded can be resized by its shorter side."""


def expand2square(image: Image.Image, background_color: tuple[int, int, int]) -> Image.Image:
    """Pads an image to a square, itself in the middle."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), background_color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def process_images(images: list[Image.Image], image_processor: Any, model_cfg: Any) -> torch.Tensor:
    """Turns images into shared pixels.

    Args:
        images: Images of any mode and size.
        image_processor: The model's.
        model_cfg: The model's config; ``image_aspect_ratio`` ``pad`` pads with the processor's mean colour, anything
            else lets the processor resize and crop (``stretch`` says that it resizes to a square). With
            ``mm_native_crops``, crops of the images as they are come with them.

    Returns:
        ``[N, 3, S, S]``, or with crops ``[N, 3, S + rows, S]``, see ``NativeCrops.pack``.

    Raises:
        DataError: There are no images, or one is too oblong for a model that crops.
    """
    if not images:
        raise DataError("there are no images to process")
    originals = [to_rgb(image) for image in images]
    images = [_limited(image) for image in originals]
    aspect_ratio = getattr(model_cfg, "image_aspect_ratio", None)
    if aspect_ratio == "pad":
        red, green, blue = (int(value * 255) for value in image_processor.image_mean)
        images = [expand2square(image, (red, green, blue)) for image in images]
    elif aspect_ratio != STRETCH:
        _check_oblong(images)
    pixels = image_processor.preprocess(images, return_tensors="pt")["pixel_values"]
    crops = NativeCrops.from_config(getattr(model_cfg, "mm_native_crops", None))
    if crops is None:
        return pixels
    mean, std = (torch.tensor(values) for values in (image_processor.image_mean, image_processor.image_std))
    return torch.stack(
        [crops.pack(whole, crops.cut(image), mean, std) for whole, image in zip(pixels, originals, strict=True)]
    )


def _limited(image: Image.Image) -> Image.Image:
    factor = -(-max(image.size) // LONGEST_SIDE)
    return image if factor == 1 else image.reduce((min(factor, image.width), min(factor, image.height)))


def _check_oblong(images: list[Image.Image]) -> None:
    for image in images:
        if max(image.size) > MOST_OBLONG * min(image.size):
            raise DataError(
                f"an image of {image.width}x{image.height} pixels is too oblong for a model that crops; "
                "crop it, or use a model with image_aspect_ratio 'pad'"
            )


def grid_over_image(grid: np.ndarray, size: tuple[int, int], image_aspect_ratio: str | None) -> np.ndarray:
    """Lays values of patches over the image that they were computed from.

    Args:
        grid: ``[rows, columns]`` over the square that the model saw.
        size: Width and height of the image.
        image_aspect_ratio: The model's; ``pad``: the square is the image with padding, which is cut off;
            ``stretch``: it is the image; else it is the image's middle, and what the model did not see is 0.

    Returns:
        ``[height, width]``, float32, bilinear between patches.
    """
    width, height = size
    rows, columns = grid.shape
    square = Image.fromarray(np.ascontiguousarray(grid, dtype=np.float32))
    if image_aspect_ratio == "pad":
        side = max(width, height)
        left, top = (side - width) // 2 / side, (side - height) // 2 / side
        box = (left * columns, top * rows, (left + width / side) * columns, (top + height / side) * rows)
        return np.asarray(square.resize(size, Image.Resampling.BILINEAR, box=box))
    if image_aspect_ratio == STRETCH:
        return np.asarray(square.resize(size, Image.Resampling.BILINEAR))
    side = min(width, height)
    seen = np.zeros((height, width), dtype=np.float32)
    left, top = (width - side) // 2, (height - side) // 2
    middle = square.resize((side, side), Image.Resampling.BILINEAR)
    seen[top : top + side, left : left + side] = np.asarray(middle)
    return seen


def tokenizer_image_token(
    prompt: str,
    tokenizer: "PreTrainedTokenizerBase",
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
) -> Any:
    """Tokenises a prompt, ``image_token_index`` standing for each ``<image>``.

    Returns:
        A list of ids, or a tensor ``[T]`` for ``return_tensors="pt"``.

    Raises:
        ValueError: Another kind of tensor is asked for.
    """
    if return_tensors not in (None, "pt"):
        raise ValueError(f"unsupported return_tensors {return_tensors!r}; it must be None or 'pt'")
    ids = tokenize_placeholders(prompt, tokenizer, {DEFAULT_IMAGE_TOKEN: image_token_index})
    return torch.tensor(ids, dtype=torch.long) if return_tensors == "pt" else ids


def tokenize_placeholders(
    prompt: str, tokenizer: "PreTrainedTokenizerBase", placeholders: Mapping[str, int] = IMAGE_PLACEHOLDER
) -> list[int]:
    """Tokenises a prompt in which placeholders stand, each becoming its id; the texts between are tokenised apart."""
    texts, between = split_placeholders(prompt, placeholders)
    return join_chunks([tokenizer(text).input_ids for text in texts], tokenizer.bos_token_id, between)


def split_placeholders(prompt: str, placeholders: Mapping[str, int]) -> tuple[list[str], list[int]]:
    """Cuts a prompt at its placeholders; returns the texts, and the ids that stand between them."""
    pieces = re.split("(" + "|".join(map(re.escape, placeholders)) + ")", prompt)
    return pieces[::2], [placeholders[mark] for mark in pieces[1::2]]


def join_chunks(chunks: Sequence[list[int]], bos_token_id: int | None, between: Sequence[int]) -> list[int]:
    """Joins the ids of texts with those between them; only the first text keeps its beginning-of-sequence mark."""
    ids = list(chunks[0])
    for index, chunk in zip(between, chunks[1:], strict=True):
        ids.append(index)
        ids += chunk[1:] if chunk[:1] == [bos_token_id] else chunk
    return ids


def get_model_name_from_path(model_path: str) -> str:
    """Returns a name for a model folder; a ``checkpoint-<step>`` folder is named after its parent as well."""
    path = Path(model_path)
    return f"{path.parent.name}_{path.name}" if path.name.startswith("checkpoint-") else path.name
