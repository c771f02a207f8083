"""Flowers on stems before a hedge, over grass."""

import math

import numpy as np

from mmfr_generation.synthetic.canvas import Canvas, Light
from mmfr_generation.synthetic.numerics import Generator, field, soften
from mmfr_generation.synthetic.scenes.base import SHADOW, Facts, Fault, SceneKind, Thing, hits
from mmfr_generation.synthetic.solids import PALETTE, bar, blossom, cast, foliage, lit, pick, texture, vary

_STEM = (0.07, 0.22, 0.04)


def draw(canvas: Canvas, rng: Generator, light: Light, fault: Fault | None) -> Facts:
    """Draws the scene and returns its facts."""
    horizon = rng.uniform(0.4, 0.6)
    _backdrop(canvas, rng, light, horizon)
    groups = [int(rng.integers(1, 4)), int(rng.integers(1, 3))]
    colours = [pick(rng, ("red", "orange", "yellow")), pick(rng, ("white", "purple", "blue"))]
    petals = [int(rng.integers(5, 9)) for _ in range(2)]
    sorts = [k for k in (0, 1) for _ in range(groups[k])]
    count = len(sorts)
    order = rng.permutation(count)
    xs = np.linspace(0.16, 0.84, count) if count > 1 else np.asarray([0.5])
    feet = np.sort(rng.uniform(0.8, 0.96, count))
    for k in range(count):
        place, sort = int(order[k]), sorts[k]
        x = float(xs[place]) + rng.uniform(-0.03, 0.03)
        foot, r = float(feet[k]), rng.uniform(0.09, 0.12)
        head = (x + rng.uniform(-0.05, 0.05), rng.uniform(0.2, 0.5))
        turn = rng.uniform(0, 2)
        colour = vary(rng, PALETTE[colours[sort]])
        cast(canvas, light, x, foot, 0.03, 0.22, reversed_=hits(fault, "shadow", k, count))
        _stem(canvas, rng, light, (x, foot), head, gap=hits(fault, "occlusion", k, count))
        blossom(canvas, light, *head, r, petals[sort], turn, colour)
        if hits(fault, "extra", k, count):
            side = 1 if x < 0.5 else -1
            blossom(canvas, light, head[0] + side * r * 0.9, head[1] + r * 0.75, r * 0.8, petals[sort], turn, colour)
            bar(canvas, light, (x + 0.12 * side, foot), (x, foot - 0.2), 0.009, 0.009, _STEM)
    things = tuple(Thing(groups[k], colours[k], "flower") for k in (0, 1))
    return Facts(
        kind="garden",
        things=things,
        place="in a garden before a hedge",
        texture="the grass of the garden",
        edges="the petals",
        sense="Every flower sits on one whole stem.",
    )


def _backdrop(canvas: Canvas, rng: Generator, light: Light, horizon: float) -> None:
    """Paints sky, a blurred hedge and grass that grows sharper towards the viewer."""
    sky = canvas.everywhere()
    canvas.paint(sky, np.ones(sky.shape, np.float32), lit((0.5, 0.62, 0.75), 1.05 - 0.4 * sky.y + 0 * sky.x, light))
    for x in np.arange(0.0, 1.15, 0.23):
        green = vary(rng, (0.06, 0.16, 0.05), 0.3)
        foliage(canvas, rng, light, float(x), horizon - 0.08, 0.2, rng.uniform(0.2, 0.3), green)
    for _ in range(max(1, canvas.size // 56)):
        canvas.rgb_CHW[:] = soften(canvas.rgb_CHW, 0.3)
    window, alpha = canvas.rectangle(-0.1, horizon, 1.1, 1.1, softness=0.02)
    depth = np.clip((window.y - horizon) / (1 - horizon), 0, 1)
    blades = np.maximum(1 + (0.12 + 0.3 * depth) * field(rng, window.shape[1], window.shape[0], "grain").T, 0.15)
    ground = lit(vary(rng, (0.13, 0.25, 0.05), 0.2), blades * texture(rng, window, "cloud", 0.15), light)
    canvas.paint(window, alpha, ground)


def _stem(
    canvas: Canvas, rng: Generator, light: Light, foot: tuple[float, float], head: tuple[float, float], *, gap: bool
) -> None:
    """Paints stem and leaves; with a gap the background shows through the middle of the stem."""
    middle = ((foot[0] + head[0]) / 2 + rng.uniform(-0.02, 0.02), (foot[1] + head[1]) / 2)
    behind = canvas.rgb_CHW.copy() if gap else None
    bar(canvas, light, foot, middle, 0.011, 0.01, _STEM)
    bar(canvas, light, middle, head, 0.01, 0.009, _STEM)
    for side in (-1, 1):
        angle = rng.uniform(0.3, 0.8)
        tip = (middle[0] + side * 0.11 * math.cos(angle), middle[1] + 0.05 - 0.11 * math.sin(angle))
        bar(canvas, light, (middle[0], middle[1] + 0.06), tip, 0.02, 0.006, (0.1, 0.3, 0.06))
    if behind is not None:
        canvas.restore(behind, middle[0] - 0.14, middle[1] - 0.06, middle[0] + 0.14, middle[1] + 0.1)


KIND = SceneKind(
    "garden",
    draw,
    {
        "shadow": SHADOW,
        "extra": "one flower has a second head and a second stem",
        "occlusion": "the background [covers|hides] the middle of a stem that stands before it",
    },
)
