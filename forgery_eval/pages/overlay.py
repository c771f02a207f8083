"""Draws over an image where the model looked, or what is forged in it."""

import numpy as np
from PIL import Image

from llava.errors import DataError

_STRONGEST = 0.7
"""Opacity where the attention is strongest; pixels without attention are left as they are."""
_PIXELS_AT_A_TIME = 1_000_000
"""Large images are drawn in strips, or they would take a hundred bytes a pixel."""
_LIT, _DARKENED = 0.4, 0.45
_COLOURS = np.array([[70, 20, 120], [220, 50, 70], [255, 220, 60]], dtype=np.float32)


def draw_overlay(image: Image.Image, attention: np.ndarray) -> Image.Image:
    """Returns the image with a heat map over it.

    Args:
        image: The image, any mode.
        attention: ``[height, width]`` of the image, any scale; drawn relative to its own range.

    Raises:
        DataError: The shapes differ.
    """
    if attention.shape != (image.height, image.width):
        raise DataError(
            f"the attention has shape {attention.shape}, the image {image.height}x{image.width} (height x width)"
        )
    low, high = float(attention.min()), float(attention.max())
    drawn = np.array(image.convert("RGB"))
    rows = max(1, _PIXELS_AT_A_TIME // image.width)
    for top in range(0, image.height if high > low else 0, rows):
        strip = slice(top, top + rows)
        drawn[strip] = _heated(drawn[strip], (attention[strip] - low) / (high - low))
    return Image.fromarray(drawn)


def _heated(pixels: np.ndarray, heat: np.ndarray) -> np.ndarray:
    stops = np.linspace(0.0, 1.0, len(_COLOURS))
    colour = np.stack([np.interp(heat, stops, _COLOURS[:, channel]) for channel in range(3)], axis=-1)
    opacity = (_STRONGEST * heat)[..., None]
    return (pixels.astype(np.float32) * (1 - opacity) + colour * opacity).round().astype(np.uint8)


def draw_mask(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """Returns the image, lit where the mask is and darkened elsewhere.

    Args:
        image: The image, any mode.
        mask: ``[height, width]`` of the image, bool.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    lit = pixels * (1 - _LIT) + _COLOURS[-1] * _LIT
    return Image.fromarray(np.where(mask[..., None], lit, pixels * _DARKENED).astype(np.uint8))


def draw_grey_mask(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Returns the image with a grey mask of any size over it, lit where the mask is above one half."""
    resized = mask.convert("L").resize(image.size, Image.Resampling.BICUBIC)
    return draw_mask(image, np.asarray(resized) > 127)
