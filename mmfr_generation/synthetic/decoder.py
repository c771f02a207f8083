"""A small neural decoder, fitted to rendered scenes when it is first used.

Each patch of 8 x 8 pixels is described by a code of 24 numbers (brightness on a 4 x 4 grid, two colour differences
on a 2 x 2 grid) and decoded by a network with one hidden layer. What the network cannot say leaves its trace.
Shape suffixes: N = patches, P = values of a patch (3 x 8 x 8), K = code, C = colour; in blocks R, S = row and column of
the patch, H, W = row and column in it.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from mmfr_generation.synthetic.camera import Camera, render_clean
from mmfr_generation.synthetic.canvas import Canvas, Light
from mmfr_generation.synthetic.numerics import Array
from mmfr_generation.synthetic.scenes import SCENES

_SIDE = 8
_HIDDEN = 48
_STEPS = 500
_BATCH = 256
_RATE = 0.004
_GRID = 4096.0
"""Weights are rounded to 1/4096, so that the last bits of a processor's arithmetic cannot reach an image."""


class Weights(NamedTuple):
    """The network: ``tanh(code @ into + into_bias) @ out + out_bias``."""

    into: Array
    into_bias: Array
    out: Array
    out_bias: Array


def decode(image_CHW: Array) -> Array:
    """Returns what the decoder makes of an image of display values, shape (3, H, W)."""
    height, width = image_CHW.shape[1:]
    padded = np.pad(image_CHW, [(0, 0), (0, -height % _SIDE), (0, -width % _SIDE)], mode="edge")
    _, full_height, full_width = padded.shape
    rows, cols = full_height // _SIDE, full_width // _SIDE
    patches_NP = _patches(padded)
    means = patches_NP.mean(axis=1, keepdims=True)
    _, decoded_NP = _run(_fitted(), _encode(patches_NP - means))
    blocks_RSCHW = (decoded_NP + means).reshape(rows, cols, 3, _SIDE, _SIDE)
    joined = blocks_RSCHW.transpose(2, 0, 3, 1, 4).reshape(3, full_height, full_width)
    return joined[:, :height, :width].astype(np.float32)


def _patches(image_CHW: Array) -> Array:
    _, height, width = image_CHW.shape
    blocks = image_CHW.astype(np.float64).reshape(3, height // _SIDE, _SIDE, width // _SIDE, _SIDE)
    return blocks.transpose(1, 3, 0, 2, 4).reshape(-1, 3 * _SIDE * _SIDE)


def _encode(patches_NP: Array) -> Array:
    red, green, blue = patches_NP.reshape(-1, 3, _SIDE, _SIDE).transpose(1, 0, 2, 3)
    bright = ((red + 2 * green + blue) / 4).reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4))
    colours = [(c - green).reshape(-1, 2, 4, 2, 4).mean(axis=(2, 4)).reshape(-1, 4) for c in (red, blue)]
    return np.concatenate([bright.reshape(-1, 16), *colours], axis=1) * 4


def _run(weights: Weights, code_NK: Array) -> tuple[Array, Array]:
    hidden = np.tanh(code_NK @ weights.into + weights.into_bias)
    return hidden, hidden @ weights.out + weights.out_bias


@lru_cache(maxsize=1)
def _fitted() -> Weights:
    """Fits the network with Adam to patches of four scenes of each kind."""
    rng = np.random.default_rng(29)
    patches = np.concatenate([_patches(_scene(k, rng)) for k in range(4 * len(SCENES))])
    patches -= patches.mean(axis=1, keepdims=True)
    values = patches.shape[1]
    weights = Weights(
        rng.normal(0, 24**-0.5, (24, _HIDDEN)),
        np.zeros(_HIDDEN),
        rng.normal(0, 0.1 * _HIDDEN**-0.5, (_HIDDEN, values)),
        np.zeros(values),
    )
    first = [np.zeros_like(w) for w in weights]
    second = [np.zeros_like(w) for w in weights]
    for step in range(1, _STEPS + 1):
        target = patches[rng.integers(0, len(patches), _BATCH)]
        gradients = _gradients(weights, target)
        first = [0.9 * m + 0.1 * g for m, g in zip(first, gradients, strict=True)]
        second = [0.99 * v + 0.01 * g * g for v, g in zip(second, gradients, strict=True)]
        scale = _RATE * (1 - 0.99**step) ** 0.5 / (1 - 0.9**step)
        weights = Weights(
            *(w - scale * m / (np.sqrt(v) + 1e-9) for w, m, v in zip(weights, first, second, strict=True))
        )
    return Weights(*(np.round(w * _GRID) / _GRID for w in weights))


def _gradients(weights: Weights, target_NP: Array) -> Weights:
    """Returns the gradient of the mean squared error."""
    code = _encode(target_NP)
    hidden, output = _run(weights, code)
    error = (output - target_NP) / len(target_NP)
    back = (error @ weights.out.T) * (1 - hidden * hidden)
    return Weights(code.T @ back, back.sum(0), hidden.T @ error, error.sum(0))


def _scene(index: int, rng: np.random.Generator) -> Array:
    canvas = Canvas(14 * _SIDE)
    SCENES[index % len(SCENES)].draw(canvas, rng, Light.draw(rng), None)
    return render_clean(canvas.rgb_CHW, Camera.draw(rng), rng, noise=False)
