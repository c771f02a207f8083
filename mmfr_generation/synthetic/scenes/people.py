"""Standing people on a square or a beach, with long shadows."""

import numpy as np

from mmfr_generation.synthetic.canvas import Canvas, Light
from mmfr_generation.synthetic.numerics import Generator, field
from mmfr_generation.synthetic.scenes.base import SHADOW, Facts, Fault, SceneKind, Thing, hits
from mmfr_generation.synthetic.solids import PALETTE, cast, lit, person, pick, surface, texture, vary, window_phase


def draw(canvas: Canvas, rng: Generator, light: Light, fault: Fault | None) -> Facts:
    """Draws the scene and returns its facts."""
    horizon = rng.uniform(0.36, 0.46)
    beach = rng.random() < 0.5
    sky = canvas.window(0, 0, 1, horizon + 0.02)
    clouds = np.clip(0.5 * field(rng, *sky.shape, "cloud"), 0, 0.7)
    blue = lit((0.33, 0.5, 0.8), 0.8 + 0.9 * sky.y + 0.15 * light.side * (sky.x - 0.5), light)
    canvas.paint(sky, np.ones(sky.shape, np.float32), blue + clouds * (0.92 - blue))
    if beach:
        _sea(canvas, rng, light, horizon)
        surface(canvas, rng, light, horizon + 0.08, 1.0, (0.52, 0.42, 0.27), "rough")
    else:
        _houses(canvas, rng, light, horizon)
        surface(canvas, rng, light, horizon, 1.0, (0.36, 0.34, 0.32), "rough")
        _paving(canvas, horizon)
    colour = pick(rng, ("red", "yellow", "green", "purple", "white"))
    count = int(rng.integers(2, 5))
    xs = np.linspace(0.16, 0.84, count) + rng.uniform(-0.04, 0.04, count)
    feet = np.sort(horizon + rng.uniform(0.28, 0.52, count))
    for k, place in enumerate(rng.permutation(count)):
        x, foot = float(xs[place]), float(feet[k])
        height = 0.3 + 0.62 * (foot - horizon - 0.16)
        cast(canvas, light, x, foot, height * 0.11, height * 0.8, reversed_=hits(fault, "shadow", k, count))
        behind = canvas.rgb_CHW.copy() if hits(fault, "occlusion", k, count) else None
        arms = 3 if hits(fault, "extra", k, count) else 2
        heads = 2 if hits(fault, "fused", k, count) else 1
        person(canvas, rng, light, x, foot, height, vary(rng, PALETTE[colour]), arms=arms, heads=heads)
        if behind is not None:
            canvas.restore(behind, x - 0.3 * height, foot - 0.56 * height, x + 0.3 * height, foot - 0.3 * height)
    return Facts(
        kind="people",
        things=(Thing(count, colour, "person"),),
        place="on a beach by the sea" if beach else "on a square before some houses",
        texture="the sand of the beach" if beach else "the stone of the square",
        edges="the people",
        sense="Every person has one head, two arms and two legs.",
    )


def _sea(canvas: Canvas, rng: Generator, light: Light, horizon: float) -> None:
    window, alpha = canvas.rectangle(-0.1, horizon, 1.1, horizon + 0.12)
    depth = (window.y - horizon) / 0.12
    canvas.paint(window, alpha, lit((0.06, 0.2, 0.3), (0.8 + 0.5 * depth) * texture(rng, window, "grain", 0.2), light))
    canvas.paint(*canvas.rectangle(-0.1, horizon + 0.072, 1.1, horizon + 0.09, softness=0.012), (0.75, 0.78, 0.78))


def _houses(canvas: Canvas, rng: Generator, light: Light, horizon: float) -> None:
    """Paints a hazy row of houses with gables and small windows."""
    x = -0.05
    while x < 1.0:
        wide, tall = rng.uniform(0.16, 0.26), rng.uniform(0.12, 0.24)
        wall = vary(rng, ((0.5, 0.42, 0.33), (0.42, 0.3, 0.25), (0.48, 0.48, 0.45))[int(rng.integers(3))])
        window, alpha = canvas.rectangle(x, horizon - tall, x + wide, horizon + 0.01)
        canvas.paint(window, alpha, lit(wall, 0.85 * texture(rng, window, "fine", 0.07), light))
        panes = (window_phase(window.x, x, wide / 3) - 0.3) * (0.7 - window_phase(window.x, x, wide / 3))
        rows = (window_phase(window.y, horizon - tall, 0.07) - 0.3) * (
            0.8 - window_phase(window.y, horizon - tall, 0.07)
        )
        canvas.shade(window, alpha * ((panes > 0) & (rows > 0)), 0.35)
        roof = [(x - 0.01, horizon - tall), (x + wide + 0.01, horizon - tall), (x + wide / 2, horizon - tall - 0.08)]
        canvas.fill(roof, vary(rng, (0.22, 0.1, 0.07), 0.3))
        x += wide


def _paving(canvas: Canvas, horizon: float) -> None:
    """Draws joints of slabs that run together at the horizon."""
    window, alpha = canvas.rectangle(-0.1, horizon, 1.1, 1.1)
    depth = np.maximum(window.y - horizon, 0.02)
    rows = canvas.cover((np.abs(window_phase(0.12 / depth, 0, 0.16) - 0.5) - 0.03) * 1.3 * depth * depth)
    cols = canvas.cover((np.abs(window_phase((window.x - 0.5) / depth, 0, 0.33) - 0.5) - 0.015) * 0.33 * depth)
    canvas.shade(window, alpha * np.maximum(rows, cols), 0.72)


KIND = SceneKind(
    "people",
    draw,
    {
        "shadow": SHADOW,
        "extra": "one person has three arms",
        "fused": "one person has two heads on one neck",
        "occlusion": "the background [covers|hides] the middle of a person who stands before it",
    },
)
