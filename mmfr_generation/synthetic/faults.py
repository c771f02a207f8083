"""High-level faults: what a scene can get wrong, and where.

A faulty scene is drawn twice from the same random numbers, with and without the fault. The mask is where the two
images differ, so it is true by construction.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from mmfr_generation.synthetic.canvas import Canvas, Light
from mmfr_generation.synthetic.numerics import Array, Generator, power
from mmfr_generation.synthetic.scenes import Facts, Fault, SceneKind

FAULTS: dict[str, str] = {
    "shadow": "Inconsistent Lighting and Shadows",
    "extra": "Semantic Irrationality",
    "fused": "Semantic Irrationality",
    "text": "Semantic Irrationality",
    "occlusion": "Semantic Irrationality",
}
"""The forgery attribute of each fault: a shadow towards the light, parts too many, things grown together, letters
that are none, and a far thing that covers a near one."""

_VISIBLE = 0.06
"""Least difference, in display values, that counts as part of a fault."""
_LEAST_AREA = 0.003
"""Least share of the image that a fault must change to be kept."""


@dataclass(frozen=True)
class DrawnScene:
    """A scene in linear light with everything that is true of it.

    Attributes:
        linear_CHW: The image, shape (3, size, size).
        kind: What was drawn.
        facts: What is true of it; its reason why the content makes sense holds only without a fault.
        light: Its light.
        fault: Name of its fault; None if it has none.
        mask_HW: Where the fault is, bool; None if it has none.
    """

    linear_CHW: Array
    kind: SceneKind
    facts: Facts
    light: Light
    fault: str | None = None
    mask_HW: Array | None = None


def draw_scene(kind: SceneKind, seed: int, size: int) -> DrawnScene:
    """Draws a scene without a fault; equal seeds give equal scenes."""
    return _draw(kind, seed, size, None)


def draw_faulty_scene(kind: SceneKind, seed: int, size: int, rng: Generator) -> DrawnScene:
    """Draws a scene with one of the faults of its kind.

    Args:
        kind: What to draw.
        seed: Decides the scene.
        size: Side in pixels.
        rng: Chooses the fault; one that would be too small to see is replaced by another.

    Returns:
        The scene; without a fault in the rare case that no fault is big enough.
    """
    sound = _draw(kind, seed, size, None)
    names = list(kind.faults)
    for position in rng.permutation(len(names)):
        fault = Fault(names[int(position)], int(rng.integers(1 << 16)))
        faulty = _draw(kind, seed, size, fault)
        mask = _difference(sound.linear_CHW, faulty.linear_CHW)
        if mask.mean() >= _LEAST_AREA:
            return DrawnScene(faulty.linear_CHW, kind, faulty.facts, faulty.light, fault.kind, mask)
    return sound


def _draw(kind: SceneKind, seed: int, size: int, fault: Fault | None) -> DrawnScene:
    canvas, rng = Canvas(size), np.random.default_rng(seed)
    light = Light.draw(rng)
    facts = kind.draw(canvas, rng, light, fault)
    return DrawnScene(np.clip(canvas.rgb_CHW, 0, 4), kind, facts, light)


def _difference(sound_CHW: Array, faulty_CHW: Array) -> Array:
    """Returns where two images visibly differ, with pinholes closed and specks removed."""
    change = power(np.clip(faulty_CHW, 0, 1), 1 / 2.2) - power(np.clip(sound_CHW, 0, 1), 1 / 2.2)
    differs = np.abs(change).max(axis=0) > _VISIBLE
    closed = ndimage.binary_closing(np.pad(differs, 2), iterations=2)[2:-2, 2:-2]
    return ndimage.binary_opening(closed) | (closed & differs & (ndimage.uniform_filter(closed.astype(float), 3) > 0.5))
