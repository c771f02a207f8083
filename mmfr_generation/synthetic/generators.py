"""The named forgery generators: each leaves one low-level trace of continuous strength.

A generator takes an image of display values in [0, 1], shape (C, H, W), a strength in (0, 1] and a random
generator, and returns the image with its trace. Strength 1 is what the sets call full strength.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image
from scipy import fft

from mmfr_generation.synthetic.decoder import decode
from mmfr_generation.synthetic.numerics import (
    Array,
    Generator,
    box_mean,
    field,
    gaussian,
    luma,
    normals,
    pad_edge,
    resize,
    sin,
    soften,
)

Role = Literal["seen", "unseen-known-mechanism", "unseen-own-mechanism"]
Apply = Callable[[Array, float, Generator], Array]


@dataclass(frozen=True)
class ForgeryGenerator:
    """One generator.

    Attributes:
        name: Its name, and its evaluation set's folder.
        mechanism: What makes the trace; generators that share it are alike.
        role: ``seen`` ones occur in training and evaluation, the others in evaluation only.
        attribute: The forgery attribute that the trace belongs to.
        description: One sentence for the data card.
        apply: Leaves the trace.
        local: The trace lies in one place only, so it has a mask.
        noisy_source: Whether a clean render gets noise before the trace.
    """

    name: str
    mechanism: str
    role: Role
    attribute: str
    description: str
    apply: Apply
    local: bool = False
    noisy_source: bool = True


def _blend(image: Array, other: Array, share: float) -> Array:
    return image + np.float32(share) * (other - image)


def _down(image: Array, factor: int, kernel: Image.Resampling) -> Array:
    height, width = image.shape[1:]
    return resize(image, -(-height // factor), -(-width // factor), kernel)


def nearest_upsampling(image: Array, strength: float, rng: Generator) -> Array:
    """Repeats each pixel of a half-size image."""
    low = _down(image, 2, Image.Resampling.BOX)
    doubled = low.repeat(2, axis=1).repeat(2, axis=2)[:, : image.shape[1], : image.shape[2]]
    return _blend(image, doubled, 0.3 + 0.7 * strength)


def transposed_convolution(image: Array, strength: float, rng: Generator) -> Array:
    """Upsamples a half-size image with taps that overlap unevenly."""
    out = _down(image, 2, Image.Resampling.BOX)
    uneven = 1 + 0.13 * strength * (1 if rng.random() < 0.5 else -1)
    for axis in (1, 2):
        following = np.concatenate([np.take(out, range(1, out.shape[axis]), axis), np.take(out, [-1], axis)], axis)
        between = np.float32(uneven) * (0.5 * out + 0.5 * following)
        out = np.stack([out, between], axis + 1).reshape([n * 2 if k == axis else n for k, n in enumerate(out.shape)])
    out = out * np.float32(4 / (1 + uneven) ** 2)
    return _blend(image, out[:, : image.shape[1], : image.shape[2]], 0.35 + 0.5 * strength)


def pixel_shuffle(image: Array, strength: float, rng: Generator) -> Array:
    """Gives each sub-pixel channel of a 3- or 4-fold upsampler its own gain."""
    factor = int(rng.integers(3, 5))
    gains = normals(rng, factor, factor)
    gains = np.clip((gains - gains.mean()) / gains.std(), -1.8, 1.8)
    height, width = image.shape[1:]
    pattern = np.tile(gains, (-(-height // factor), -(-width // factor)))[:height, :width]
    softened = _blend(image, soften(image, 0.25), 0.7 * strength)
    return softened * (1 + np.float32(0.075 * strength) * pattern) + np.float32(0.008 * strength) * pattern


def _grating(image: Array, frequencies: list[tuple[float, float]], amplitude: float, rng: Generator) -> Array:
    """Adds plane waves, frequencies in cycles per pixel (row, column), stronger in the mid-tones."""
    rows = np.arange(image.shape[1], dtype=np.float64)[:, None]
    cols = np.arange(image.shape[2], dtype=np.float64)[None, :]
    waves = sum(sin(2 * np.pi * (fy * rows + fx * cols + rng.uniform(0, 1))) for fy, fx in frequencies)
    grey = luma(image)
    return image + np.float32(amplitude) * waves * (0.5 + 2 * grey * (1 - grey))


def spectral_peaks(image: Array, strength: float, rng: Generator) -> Array:
    """Adds two waves at multiples of a sixteenth of the sampling rate."""
    steps = rng.integers(2, 8, 4) / 16
    waves = [(float(steps[0]), float(steps[1])), (float(steps[2]), -float(steps[3]))]
    return _grating(image, waves, 0.012 + 0.028 * strength, rng)


def spectral_lattice(image: Array, strength: float, rng: Generator) -> Array:
    """Adds three waves that make a hexagonal lattice of any pitch and turn."""
    pitch, turn = rng.uniform(3.2, 6.0), rng.uniform(0, np.pi / 3)
    waves = [(np.sin(turn + k * np.pi / 3) / pitch, np.cos(turn + k * np.pi / 3) / pitch) for k in range(3)]
    return _grating(image, waves, 0.014 + 0.02 * strength, rng)


def guided_smoothing(image: Array, strength: float, rng: Generator) -> Array:
    """Smooths what is not an edge, with a guided filter of each colour by itself."""
    side, eps = 5, np.float32(0.0004 + 0.006 * strength)
    mean = box_mean(image, side)
    variance = np.maximum(box_mean(image * image, side) - mean * mean, 0)
    gain = variance / (variance + eps)
    smooth = box_mean(gain, side) * image + box_mean(mean * (1 - gain), side)
    return _blend(image, smooth, 0.55 + 0.45 * strength)


def median_painting(image: Array, strength: float, rng: Generator) -> Array:
    """Paints with strokes: repeated medians and faint blotches of colour."""
    painted = _median3(_median3(_median3(image)))
    blotches = np.stack([gaussian(normals(rng, *image.shape[1:]), 2.5) for _ in range(3)])
    return _blend(image, painted + np.float32(0.1) * blotches, 0.5 + 0.5 * strength)


def _median3(image: Array) -> Array:
    """Takes the median over plus-shaped neighbourhoods of five pixels."""
    p = pad_edge(image)
    a, b, c, d, e = p[:, 1:-1, 1:-1], p[:, :-2, 1:-1], p[:, 2:, 1:-1], p[:, 1:-1, :-2], p[:, 1:-1, 2:]
    low = np.maximum(np.minimum(b, c), np.minimum(d, e))
    high = np.minimum(np.maximum(b, c), np.maximum(d, e))
    return np.maximum(np.minimum(low, high), np.minimum(np.maximum(low, high), a))


def denoising(image: Array, strength: float, rng: Generator) -> Array:
    """Removes the sensor's grain together with all faint detail."""
    base = gaussian(image, 1.4)
    detail = image - base
    limit = np.float32(0.012 + 0.05 * strength)
    kept = np.sign(detail) * np.maximum(np.abs(detail) - limit, 0)
    strong = np.clip(np.abs(detail) / limit - 1, 0, 1)
    return base + kept + strong * np.minimum(limit, np.abs(detail)) * np.sign(detail)


def white_grain(image: Array, strength: float, rng: Generator) -> Array:
    """Covers the sensor's noise with grain of its own: each pixel and colour apart, dark and light alike."""
    return soften(image, 0.12) + np.float32(0.012 + 0.03 * strength) * normals(rng, *image.shape)


def coarse_grain(image: Array, strength: float, rng: Generator) -> Array:
    """Adds grain in clumps of two to three pixels, the same in all colours."""
    clumps = gaussian(normals(rng, *image.shape[1:]), rng.uniform(0.6, 0.9))
    return soften(image, 0.12) + np.float32(0.04 + 0.08 * strength) * clumps


def halo(image: Array, strength: float, rng: Generator) -> Array:
    """Puts a bright and a dark rim along both sides of every edge."""
    detail = image - gaussian(image, rng.uniform(1.3, 2.2))
    return image + np.float32(0.45 + 1.5 * strength) * detail * np.clip(np.abs(detail) / 0.04, 0, 1)


def ringing(image: Array, strength: float, rng: Generator) -> Array:
    """Cuts the spectrum off sharply, so that every edge is followed by echoes."""
    margin = 16
    padded = pad_edge(image, margin)
    spectrum = fft.rfft2(padded)
    rows = np.abs(fft.fftfreq(padded.shape[1]))[:, None]
    cols = fft.rfftfreq(padded.shape[2])[None, :]
    cut = rng.uniform(0.15, 0.24)
    keep = ((rows < cut) & (cols < cut)).astype(np.float32)
    sharp = fft.irfft2(spectrum * keep, s=padded.shape[1:])[:, margin:-margin, margin:-margin]
    return _blend(image, sharp, 0.3 + 0.7 * strength)


def patch_seams(image: Array, strength: float, rng: Generator) -> Array:
    """Puts the image together from square patches that do not quite fit in brightness and place."""
    side = int(rng.integers(14, 27))
    height, width = image.shape[1:]
    start = rng.integers(0, side, 2)
    padded = pad_edge(image, 2)
    out = image.copy()
    reach = 2 if strength > 0.6 else 1
    for top in range(-int(start[0]), height, side):
        for left in range(-int(start[1]), width, side):
            y0, y1, x0, x1 = max(top, 0), min(top + side, height), max(left, 0), min(left + side, width)
            dy, dx = rng.integers(-reach, reach + 1, 2)
            step = normals(rng, 3, 1, 1) * 0.3 + normals(rng)
            piece = padded[:, y0 + 2 + dy : y1 + 2 + dy, x0 + 2 + dx : x1 + 2 + dx]
            out[:, y0:y1, x0:x1] = piece + np.float32(0.012 + 0.028 * strength) * step
    return out


def inpainting(image: Array, strength: float, rng: Generator) -> Array:
    """Paints over one region: smooth, a little off in colour, up to a hard border."""
    size = image.shape[1]
    radii = rng.uniform(0.14, 0.2, 2) + 0.1 * strength
    centre = rng.uniform(0.28, 0.72, 2)
    axis = (np.arange(size) + 0.5) / size
    outline = 0.25 * field(rng, size, size, "cloud").astype(np.float64)
    rows, cols = (axis - centre[0])[:, None] / radii[0], (axis - centre[1])[None, :] / radii[1]
    inside = rows**2 + cols**2 + outline < 1
    tint = np.float32(0.05) * normals(rng, 3, 1, 1)
    filled = gaussian(image, 0.7 + 1.1 * strength) + np.float32(0.4 + 0.6 * strength) * tint
    checker = np.float32(0.025 * strength) * ((np.indices(image.shape[1:]).sum(0) % 2) * 2 - 1)
    return np.where(inside, filled + checker, image).astype(np.float32)


def palette(image: Array, strength: float, rng: Generator) -> Array:
    """Keeps only a few steps of each colour."""
    levels = np.float32(19 - 13 * strength)
    offset = normals(rng, 3, 1, 1) * 0.3
    base = soften(image, 0.22)
    return np.clip((np.round(base * levels + offset) - offset) / levels, 0, 1)


def _blocks(image: Array, side: int) -> Array:
    """Cuts an image into square blocks, shape (C, rows, side, columns, side)."""
    height, width = image.shape[1:]
    padded = np.pad(image, [(0, 0), (0, -height % side), (0, -width % side)], mode="edge")
    return padded.reshape(3, padded.shape[1] // side, side, padded.shape[2] // side, side)


def _joined(blocks: Array, height: int, width: int) -> Array:
    c, rows, side, cols, _ = blocks.shape
    return blocks.reshape(c, rows * side, cols * side)[:, :height, :width]


def _low_orders(side: int, order: float) -> Array:
    """Returns weights that keep block coefficients up to a total order, shape (1, 1, side, 1, side)."""
    total = np.arange(side)[:, None] + np.arange(side)[None, :]
    return np.clip(order - total, 0, 1).astype(np.float32)[None, None, :, None, :]


def block_cosine(image: Array, strength: float, rng: Generator) -> Array:
    """Keeps the low orders of a cosine transform of blocks of 7 to 10 pixels."""
    side = int(rng.integers(7, 11))
    coefficients = fft.dctn(_blocks(image, side), axes=(2, 4), norm="ortho")
    kept = coefficients * _low_orders(side, 6.5 - 4.3 * strength)
    return _joined(fft.idctn(kept, axes=(2, 4), norm="ortho"), *image.shape[1:])


def block_walsh(image: Array, strength: float, rng: Generator) -> Array:
    """Keeps the low orders of a Walsh-Hadamard transform of blocks of eight pixels."""
    coefficients = _along(_along(_blocks(image, 8), 2, _WALSH), 4, _WALSH)
    kept = coefficients * _low_orders(8, 7.5 - 4.5 * strength)
    return _joined(_along(_along(kept, 2, _WALSH.T), 4, _WALSH.T) / np.float32(64), *image.shape[1:])


_WALSH = np.asarray(
    [[(-1) ** (row & col).bit_count() for col in range(8)] for row in (0, 4, 6, 2, 3, 7, 5, 1)], np.float32
)
"""The Walsh functions of eight points, ordered by their number of sign changes."""


def _along(blocks: Array, axis: int, matrix: Array) -> Array:
    """Multiplies one axis by a small matrix of signs."""
    moved = np.moveaxis(blocks, axis, 0)
    return np.moveaxis(np.stack([sum(s * x for s, x in zip(row, moved, strict=True)) for row in matrix]), 0, axis)


def super_resolution(image: Array, strength: float, rng: Generator) -> Array:
    """Doubles a half-size image with a wide kernel and sharpens it."""
    return _enlarged(image, 2, strength, Image.Resampling.LANCZOS)


def super_resolution_x3(image: Array, strength: float, rng: Generator) -> Array:
    """Enlarges a third-size image with a cubic kernel and sharpens it."""
    return _enlarged(image, 3, strength, Image.Resampling.BICUBIC)


def _enlarged(image: Array, factor: int, strength: float, kernel: Image.Resampling) -> Array:
    large = resize(_down(image, factor, kernel), image.shape[1], image.shape[2], kernel)
    sharp = large + np.float32(0.9) * (large - gaussian(large, 0.5 * factor))
    return _blend(image, sharp, 0.4 + 0.6 * strength)


def neural_decoder(image: Array, strength: float, rng: Generator) -> Array:
    """Decodes a short code of each patch with a small network fitted to rendered scenes."""
    return _blend(image, decode(image), 0.35 + 0.65 * strength)


def channel_shift(image: Array, strength: float, rng: Generator) -> Array:
    """Moves red and blue against green by up to a pixel and a half, everywhere alike."""
    angle, reach = rng.uniform(0, 2 * np.pi), 0.35 + 1.15 * strength
    dy, dx = reach * np.sin(angle), reach * np.cos(angle)
    return np.stack([_moved(image[0], dy, dx), image[1], _moved(image[2], -dy, -dx)])


def _moved(plane: Array, dy: float, dx: float) -> Array:
    """Shifts a plane by parts of a pixel, up to two, bilinearly."""
    out = pad_edge(plane, 3)
    for axis, shift in ((0, dy), (1, dx)):
        whole = int(np.floor(shift))
        out = _blend(np.roll(out, whole, axis), np.roll(out, whole + 1, axis), shift - whole)
    return out[3:-3, 3:-3]


def row_jitter(image: Array, strength: float, rng: Generator) -> Array:
    """Displaces every row sideways by its own part of a pixel."""
    shifts = np.clip(normals(rng, image.shape[1]), -2, 2) * np.float32(0.3 + 0.9 * strength)
    position = np.clip(np.arange(image.shape[2], dtype=np.float32) + shifts[:, None], 0, image.shape[2] - 1.001)
    left = position.astype(np.int32)
    share = position - left.astype(np.float32)
    low = np.take_along_axis(image, left[None], 2)
    high = np.take_along_axis(image, left[None] + 1, 2)
    return low + share * (high - low)


_TEXTURE, _EDGES, _QUALITY = "Anomalous Image Texture", "Irregular Image Edges", "Low Image Quality"


def _entry(apply: Apply, mechanism: str, role: Role, attribute: str, **flags: bool) -> ForgeryGenerator:
    description = (apply.__doc__ or "").strip()
    return ForgeryGenerator(apply.__name__, mechanism, role, attribute, description, apply, **flags)


_KNOWN: Role = "unseen-known-mechanism"
_OWN: Role = "unseen-own-mechanism"
GENERATORS: dict[str, ForgeryGenerator] = {
    generator.name: generator
    for generator in (
        _entry(nearest_upsampling, "upsampling", "seen", _TEXTURE),
        _entry(transposed_convolution, "upsampling", "seen", _TEXTURE),
        _entry(spectral_peaks, "spectral", "seen", _TEXTURE),
        _entry(guided_smoothing, "smoothing", "seen", _TEXTURE),
        _entry(denoising, "missing noise", "seen", _TEXTURE, noisy_source=False),
        _entry(white_grain, "wrong noise", "seen", _TEXTURE),
        _entry(halo, "edge", "seen", _EDGES),
        _entry(patch_seams, "composition", "seen", _EDGES),
        _entry(inpainting, "composition", "seen", _EDGES, local=True),
        _entry(palette, "palette", "seen", _QUALITY),
        _entry(block_cosine, "block", "seen", _QUALITY),
        _entry(super_resolution, "super-resolution", "seen", _QUALITY),
        _entry(neural_decoder, "learnt decoder", "seen", _QUALITY),
        _entry(pixel_shuffle, "upsampling", _KNOWN, _TEXTURE),
        _entry(spectral_lattice, "spectral", _KNOWN, _TEXTURE),
        _entry(median_painting, "smoothing", _KNOWN, _TEXTURE),
        _entry(coarse_grain, "wrong noise", _KNOWN, _TEXTURE),
        _entry(ringing, "edge", _KNOWN, _EDGES),
        _entry(block_walsh, "block", _KNOWN, _QUALITY),
        _entry(super_resolution_x3, "super-resolution", _KNOWN, _QUALITY),
        _entry(channel_shift, "colour registration", _OWN, _EDGES),
        _entry(row_jitter, "line displacement", _OWN, _EDGES),
    )
}
"""Every generator by its name: those of training first, then those that only evaluation sees."""
SEEN: tuple[str, ...] = tuple(name for name, g in GENERATORS.items() if g.role == "seen")
