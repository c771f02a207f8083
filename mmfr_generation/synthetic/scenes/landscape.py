"""Mountain ridges in haze behind trees on a meadow or by a lake."""

import numpy as np

from mmfr_generation.synthetic.canvas import Canvas, Colour, Light
from mmfr_generation.synthetic.numerics import Array, Generator, field
from mmfr_generation.synthetic.scenes.base import SHADOW, Facts, Fault, SceneKind, Thing, hits
from mmfr_generation.synthetic.solids import cast, lit, mix, pick, ripple, texture, tree, vary

SKY: Colour = (0.36, 0.55, 0.85)
CROWNS: dict[str, Colour] = {"green": (0.07, 0.22, 0.05), "orange": (0.5, 0.18, 0.03), "red": (0.42, 0.06, 0.03)}


def draw(canvas: Canvas, rng: Generator, light: Light, fault: Fault | None) -> Facts:
    """Draws the scene and returns its facts."""
    horizon = rng.uniform(0.42, 0.52)
    _sky(canvas, rng, light)
    ridges = int(rng.integers(2, 4))
    for k in range(ridges):
        crest = _crest(canvas, rng, horizon - 0.2 * (1 - k / ridges) - 0.05)
        _ridge(canvas, rng, light, crest, 0.72 - 0.6 * k / ridges)
    water = rng.random() < 0.4
    _ground(canvas, rng, light, horizon)
    if water:
        _lake(canvas, rng, light, horizon)
    colour = pick(rng, tuple(CROWNS))
    count = int(rng.integers(2, 5))
    xs = np.linspace(0.14, 0.86, count) + rng.uniform(-0.06, 0.06, count)
    feet = np.sort(horizon + rng.uniform(0.17 if water else 0.1, 0.4, count))
    for k, place in enumerate(rng.permutation(count)):
        x, foot = float(xs[place]), float(feet[k])
        height = 0.26 + 0.55 * (foot - horizon)
        cast(canvas, light, x, foot, height * 0.16, height * 0.75, reversed_=hits(fault, "shadow", k, count))
        behind = canvas.rgb_CHW.copy()
        trunks = 3 if hits(fault, "extra", k, count) else 1
        tree(canvas, rng, light, x, foot, height, vary(rng, CROWNS[colour], 0.2), trunks=trunks)
        if hits(fault, "occlusion", k, count):
            canvas.restore(behind, x - 0.6 * height, foot - 0.66 * height, x + 0.6 * height, foot - 0.4 * height)
    ground = "by a lake" if water else "on a meadow"
    return Facts(
        kind="landscape",
        things=(Thing(count, colour, "tree"),),
        place=f"{ground} before the mountains",
        texture="the water of the lake" if water else "the grass of the meadow",
        edges="the trees",
        sense="The trees stand on the ground before the far mountains.",
    )


def _sky(canvas: Canvas, rng: Generator, light: Light) -> None:
    window = canvas.window(0, 0, 1, 0.7)
    tint = 0.62 + 0.62 * window.y + 0.16 * light.side * (window.x - 0.5)
    cover = np.clip(0.55 * field(rng, *window.shape, "cloud") + rng.uniform(-0.4, 0.3), 0, 1) * 0.8
    blue = lit(mix(SKY, (0.8, 0.82, 0.85), 0.25), tint, light)
    canvas.paint(window, np.ones(window.shape, np.float32), blue + cover * (0.9 - blue))


def _crest(canvas: Canvas, rng: Generator, level: float) -> Array:
    """Returns the height of a ridge over each column, shape (1, size)."""
    window = canvas.window(0, 0, 1, 1 / canvas.size)
    rough = field(rng, 1, canvas.size, "cloud")
    return level + ripple(window.x, rng, 0.05) + np.float32(0.018) * rough


def _ridge(canvas: Canvas, rng: Generator, light: Light, crest: Array, haze: float) -> None:
    window = canvas.window(0, float(crest.min()) - 0.02, 1, 0.62)
    slope = field(rng, *window.shape, "rough")
    rock = mix((0.1, 0.13, 0.1), SKY, haze)
    bright = 1 + (1 - haze) * (0.12 * slope + 0.45 * light.side * np.gradient(slope, axis=1))
    canvas.paint(window, canvas.cover(crest - window.y), lit(rock, np.maximum(bright, 0.3), light))


def _ground(canvas: Canvas, rng: Generator, light: Light, horizon: float) -> None:
    window, alpha = canvas.rectangle(-0.1, horizon, 1.1, 1.1)
    depth = np.clip((window.y - horizon) / (1 - horizon), 0, 1)
    grass = vary(rng, (0.14, 0.23, 0.05), 0.25)
    blades = 1 + (0.1 + 0.28 * depth) * field(rng, *window.shape, "fine") * 0.6
    patches = texture(rng, window, "cloud", 0.16)
    near = lit(grass, np.maximum(blades, 0.15) * patches * (1 + 0.15 * light.side * (window.x - 0.5)), light)
    canvas.paint(window, alpha, near * (0.4 + 0.6 * depth) + (1 - depth) * 0.13)


def _lake(canvas: Canvas, rng: Generator, light: Light, horizon: float) -> None:
    """Mirrors what stands above the shore in a band of water with waves."""
    height = 0.15
    window, alpha = canvas.rectangle(-0.1, horizon + 0.005, 1.1, horizon + height, softness=0.01)
    rows = window.shape[0]
    top = max(window.rows.start - rows, 0)
    mirrored = canvas.rgb_CHW[:, top : top + rows][:, ::-1, window.cols].copy()
    waves = texture(rng, window, "grain", 0.12)
    tinted = mirrored * np.asarray([0.62, 0.72, 0.8], np.float32)[:, None, None] * waves
    canvas.paint(window, alpha, tinted)


KIND = SceneKind(
    "landscape",
    draw,
    {
        "shadow": SHADOW,
        "extra": "one tree has three trunks",
        "occlusion": "the background [covers|hides] a part of a tree that stands before it",
    },
)
