"""Draws over a picture where the model looked, or what is wrong with it."""

import numpy as np
from PIL import Image

_STRONGEST = 0.7
"""Opacity of the strongest place; places without attention are left as they are."""
_PIXELS_AT_A_TIME = 1_000_000
"""Large pictures are drawn in strips, or they would take a hundred bytes a pixel."""
_LIT, _DARKENED = 0.4, 0.45
_COLOURS = np.array([[70, 20, 120], [220, 50, 70], [255, 220, 60]], dtype=np.float32)


def draw_overlay(picture: Image.Image, attention: np.ndarray) -> Image.Image:
    """Returns the picture with a heat map over it.

    Args:
        picture: The picture, any mode.
        attention: ``[height, width]`` of the picture, any scale; drawn relative to its own range.

    Raises:
        ValueError: The shapes differ.
    """
    if attention.shape != (picture.height, picture.width):
        raise ValueError(
            f"the attention has shape {attention.shape}, the picture {picture.height}x{picture.width} (height x width)"
        )
    low, high = float(attention.min()), float(attention.max())
    drawn = np.array(picture.convert("RGB"))
    rows = max(1, _PIXELS_AT_A_TIME // picture.width)
    for top in range(0, picture.height if high > low else 0, rows):
        strip = slice(top, top + rows)
        drawn[strip] = _heated(drawn[strip], (attention[strip] - low) / (high - low))
    return Image.fromarray(drawn)


def _heated(pixels: np.ndarray, heat: np.ndarray) -> np.ndarray:
    stops = np.linspace(0.0, 1.0, len(_COLOURS))
    colour = np.stack([np.interp(heat, stops, _COLOURS[:, channel]) for channel in range(3)], axis=-1)
    opacity = (_STRONGEST * heat)[..., None]
    return (pixels.astype(np.float32) * (1 - opacity) + colour * opacity).round().astype(np.uint8)


def draw_mask(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """Returns the picture, lit where the mask is and darkened elsewhere.

    Args:
        picture: The picture, any mode.
        mask: ``[height, width]`` of the picture, bool.
    """
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    lit = pixels * (1 - _LIT) + _COLOURS[-1] * _LIT
    return Image.fromarray(np.where(mask[..., None], lit, pixels * _DARKENED).astype(np.uint8))
