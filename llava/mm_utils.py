"""From a picture file to shared pixels, and from a prompt with ``<image>`` to ids. Names are LLaVA's."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.images import to_rgb

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_SIDE = 8192
"""Larger pictures are first shrunk by a whole factor: padding them to a square would take gigabytes."""
MOST_OBLONG = 100
"""Ratio of sides up to which a picture that is not padded can be resized by its shorter side."""


def expand2square(image: Image.Image, background_color: tuple[int, int, int]) -> Image.Image:
    """Pads a picture to a square, itself in the middle."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), background_color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def process_images(images: list[Image.Image], image_processor: Any, model_cfg: Any) -> torch.Tensor:
    """Turns pictures into shared pixels.

    Args:
        images: Pictures of any mode and size.
        image_processor: The model's.
        model_cfg: The model's config; ``image_aspect_ratio`` ``pad`` pads with the processor's mean colour, anything
            else lets the processor resize and crop.

    Returns:
        ``[N, 3, S, S]``.

    Raises:
        ValueError: There are no images.
    """
    if not images:
        raise ValueError("there are no images to process")
    pictures = [_of_handy_size(to_rgb(image)) for image in images]
    if getattr(model_cfg, "image_aspect_ratio", None) == "pad":
        red, green, blue = (int(value * 255) for value in image_processor.image_mean)
        pictures = [expand2square(picture, (red, green, blue)) for picture in pictures]
    else:
        _refuse_oblong(pictures)
    return image_processor.preprocess(pictures, return_tensors="pt")["pixel_values"]


def _of_handy_size(picture: Image.Image) -> Image.Image:
    factor = -(-max(picture.size) // LONGEST_SIDE)
    return picture if factor == 1 else picture.reduce((min(factor, picture.width), min(factor, picture.height)))


def _refuse_oblong(pictures: list[Image.Image]) -> None:
    for picture in pictures:
        if max(picture.size) > MOST_OBLONG * min(picture.size):
            raise ValueError(
                f"a picture of {picture.width}x{picture.height} pixels is too oblong for a model that crops; "
                "crop it, or use a model with image_aspect_ratio 'pad'"
            )


def grid_over_picture(grid: np.ndarray, size: tuple[int, int], image_aspect_ratio: str | None) -> np.ndarray:
    """Lays values of patches over the picture that they were computed from.

    Args:
        grid: ``[rows, columns]`` over the square that the model saw.
        size: Width and height of the picture.
        image_aspect_ratio: The model's; ``pad``: the square is the picture with padding, which is cut off; else it is
            the picture's middle, and what the model did not see is 0.

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
    chunks = [tokenizer(chunk).input_ids for chunk in prompt.split(DEFAULT_IMAGE_TOKEN)]
    ids = join_chunks(chunks, tokenizer.bos_token_id, image_token_index)
    return torch.tensor(ids, dtype=torch.long) if return_tensors == "pt" else ids


def join_chunks(
    chunks: Sequence[list[int]], bos_token_id: int | None, image_token_index: int = IMAGE_TOKEN_INDEX
) -> list[int]:
    """Joins the ids of the texts between images; only the first keeps its beginning-of-sequence mark."""
    ids = list(chunks[0])
    for chunk in chunks[1:]:
        ids.append(image_token_index)
        ids += chunk[1:] if chunk[:1] == [bos_token_id] else chunk
    return ids


def get_model_name_from_path(model_path: str) -> str:
    """Returns a name for a model folder; a ``checkpoint-<step>`` folder is named after its parent as well."""
    path = Path(model_path)
    return f"{path.parent.name}_{path.name}" if path.name.startswith("checkpoint-") else path.name
