"""The augmentation of the detector's published training."""

from random import Random

import numpy as np
from PIL import Image

from llava.image_operations import jpeg

_BLUR_SHARE, _JPEG_SHARE, _FLIP_SHARE = 0.1, 0.1, 0.5
_LARGEST_SIGMA = 3.0
_CODECS, _QUALITIES = ("cv2", "pil"), (30, 100)
_REACH = 4
"""Standard deviations at which the kernel ends."""


def draw(random: Random) -> dict[str, float]:
    """Draws what happens to an image: ``sigma`` of a blur and ``quality`` of a compression, each if at all.

    The authors also draw one of two libraries for the compression; both give the same pixels.
    """
    drawn: dict[str, float] = {}
    if random.random() < _BLUR_SHARE:
        drawn["sigma"] = random.random() * _LARGEST_SIGMA
    if random.random() < _JPEG_SHARE:
        random.choice(_CODECS)
        drawn["quality"] = random.choice(_QUALITIES)
    return drawn


def augment(image: Image.Image, random: Random) -> Image.Image:
    """Blurs, compresses and mirrors an RGB image by chance."""
    drawn = draw(random)
    if "sigma" in drawn:
        image = blur(image, drawn["sigma"])
    if "quality" in drawn:
        image = jpeg(image, quality=int(drawn["quality"]))
    return flip(image, random)


def flip(image: Image.Image, random: Random) -> Image.Image:
    """Mirrors every second image."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < _FLIP_SHARE else image


def blur(image: Image.Image, sigma: float) -> Image.Image:
    """Blurs with a Gaussian of ``sigma`` pixels, borders mirrored; each of the two passes rounds down, as published."""
    values_HWC = np.asarray(image)
    reach = int(_REACH * sigma + 0.5)
    if reach == 0:
        return image
    positions = np.arange(-reach, reach + 1, dtype=np.float64)
    weights = np.exp(-0.5 * (positions / sigma) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        moved = np.moveaxis(values_HWC, axis, 0)
        padded = np.pad(moved.astype(np.float64), [(reach, reach), (0, 0), (0, 0)], mode="symmetric")
        blurred = sum(weight * padded[offset : offset + len(moved)] for offset, weight in enumerate(weights))
        values_HWC = np.moveaxis(np.asarray(blurred).astype(np.uint8), 0, axis)
    return Image.fromarray(np.ascontiguousarray(values_HWC))
