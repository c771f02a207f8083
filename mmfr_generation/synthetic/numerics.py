"""Array helpers that give the same numbers on every processor.

Sine, exponential and power of numpy differ in the last bit between instruction sets when they work in single
precision. Here they work in double precision and are rounded to single, which hides that bit; everything else is
plain arithmetic. Images are planar float32 arrays: C = colour, H = rows, W = columns.
"""

from functools import lru_cache
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import fft, ndimage

Array: TypeAlias = npt.NDArray[Any]
Generator: TypeAlias = np.random.Generator
Texture = Literal["fine", "rough", "cloud", "grain"]

LUMA = (0.299, 0.587, 0.114)
_BANK_SIDE = 512
_TEXTURES: dict[Texture, tuple[float, float]] = {
    "fine": (0.7, 1.0),
    "rough": (1.1, 1.0),
    "cloud": (1.7, 1.0),
    "grain": (1.0, 9.0),
}
"""Spectral slope of the amplitude (1/f^slope) and stretch along the row direction."""


def sin(x: Array) -> Array:
    """Returns the sine as float32."""
    return np.sin(np.asarray(x, np.float64)).astype(np.float32)


def exp(x: Array) -> Array:
    """Returns the exponential as float32."""
    return np.exp(np.asarray(x, np.float64)).astype(np.float32)


def power(x: Array, exponent: float) -> Array:
    """Returns ``x ** exponent`` of non-negative ``x`` as float32."""
    return np.power(np.asarray(x, np.float64), exponent).astype(np.float32)


def luma(rgb_CHW: Array) -> Array:
    """Returns the brightness plane, shape (H, W), of an image of shape (3, H, W)."""
    return LUMA[0] * rgb_CHW[0] + LUMA[1] * rgb_CHW[1] + LUMA[2] * rgb_CHW[2]


def normals(rng: Generator, *shape: int) -> Array:
    """Draws float32 standard normal numbers."""
    return rng.standard_normal(shape, dtype=np.float32)


def pad_edge(planes: Array, width: int = 1) -> Array:
    """Repeats the border of the last two axes outwards by ``width`` pixels."""
    margins = [(0, 0)] * (planes.ndim - 2) + [(width, width), (width, width)]
    return np.pad(planes, margins, mode="edge")


def soften(planes: Array, weight: float) -> Array:
    """Blurs the last two axes with the kernel (weight, 1 - 2 weight, weight); weight in [0, 1/3]."""
    padded = pad_edge(planes)
    rows = padded[..., 1:-1, :] * (1 - 2 * weight) + (padded[..., :-2, :] + padded[..., 2:, :]) * weight
    return rows[..., 1:-1] * (1 - 2 * weight) + (rows[..., :-2] + rows[..., 2:]) * weight


def gaussian(planes: Array, sigma: float) -> Array:
    """Blurs the last two axes with a Gaussian of ``sigma`` pixels."""
    out = planes
    for axis in (-2, -1):
        out = ndimage.gaussian_filter1d(out, sigma, axis=axis, mode="nearest", truncate=3.0)
    return out


def box_mean(planes: Array, side: int) -> Array:
    """Averages the last two axes over a square of ``side`` pixels."""
    out = planes
    for axis in (-2, -1):
        out = ndimage.uniform_filter1d(out, side, axis=axis, mode="nearest")
    return out


def resize(planes: Array, height: int, width: int, kernel: Image.Resampling) -> Array:
    """Resizes each plane of shape (C, H, W) to (C, height, width)."""
    return np.stack(
        [np.asarray(Image.fromarray(np.ascontiguousarray(p)).resize((width, height), kernel)) for p in planes]
    )


def field(rng: Generator, height: int, width: int, texture: Texture) -> Array:
    """Draws a random field with a 1/f-like spectrum, about zero mean and unit deviation.

    Args:
        rng: Chooses the place in the field.
        height: Rows, up to 512.
        width: Columns, up to 512.
        texture: ``fine``, ``rough`` and ``cloud`` differ in slope; ``grain`` is stretched along the rows.
    """
    bank = _bank(texture)
    first, second = (_crop(bank, rng, height, width) for _ in range(2))
    mixed = first + 0.7 * second
    sample = mixed[::3, ::3].astype(np.float64)
    return ((mixed - sample.mean()) / max(float(sample.std()), 0.15)).astype(np.float32)


def _crop(bank: Array, rng: Generator, height: int, width: int) -> Array:
    row, col = rng.integers(0, _BANK_SIDE, 2)
    piece = bank[row : row + height, col : col + width]
    return piece[:, ::-1] if rng.random() < 0.5 else piece


@lru_cache(maxsize=8)
def _bank(texture: Texture) -> Array:
    """Builds one periodic field, repeated once in each direction so that any crop is a plain slice."""
    slope, stretch = _TEXTURES[texture]
    rng = np.random.default_rng([17, sorted(_TEXTURES).index(texture)])
    white = rng.standard_normal((_BANK_SIDE, _BANK_SIDE))
    rows = np.fft.fftfreq(_BANK_SIDE)[:, None]
    cols = np.fft.rfftfreq(_BANK_SIDE)[None, :] * stretch
    frequency = np.maximum(np.sqrt(rows**2 + cols**2), 1.0 / _BANK_SIDE)
    shaped = fft.irfft2(fft.rfft2(white) * frequency**-slope, s=white.shape)
    shaped = (shaped / shaped.std()).astype(np.float32)
    return np.tile(shaped, (2, 2))
