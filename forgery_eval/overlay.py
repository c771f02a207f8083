"""Draws where the model looked over the picture."""

import numpy as np
from PIL import Image

_STRONGEST = 0.7
"""Opacity of the strongest place; places without attention are left as they are."""
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
    heat = (attention - low) / (high - low) if high > low else np.zeros_like(attention)
    stops = np.linspace(0.0, 1.0, len(_COLOURS))
    colour = np.stack([np.interp(heat, stops, _COLOURS[:, channel]) for channel in range(3)], axis=-1)
    opacity = (_STRONGEST * heat)[..., None]
    blended = np.asarray(picture.convert("RGB"), dtype=np.float32) * (1 - opacity) + colour * opacity
    return Image.fromarray(blended.round().astype(np.uint8))
