"""Vessels, balls and boxes on a wooden table before a wall."""

import numpy as np

from mmfr_generation.synthetic.canvas import Canvas, Colour, Light
from mmfr_generation.synthetic.numerics import Generator
from mmfr_generation.synthetic.scenes.base import SHADOW, Facts, Fault, SceneKind, Thing, hits
from mmfr_generation.synthetic.solids import (
    PALETTE,
    ball,
    cast,
    crate,
    lit,
    mix,
    pick,
    surface,
    texture,
    vary,
    vase,
)

NOUNS = ("vase", "ball", "box")


def draw(canvas: Canvas, rng: Generator, light: Light, fault: Fault | None) -> Facts:
    """Draws the scene and returns its facts."""
    wall = pick(rng, ("grey", "blue", "green", "white"))
    horizon = rng.uniform(0.44, 0.56)
    _wall(canvas, rng, light, PALETTE[wall], horizon)
    surface(canvas, rng, light, horizon, 1.0, vary(rng, (0.36, 0.19, 0.09), 0.35), "grain")
    nouns = [pick(rng, NOUNS)]
    nouns.append(pick(rng, [n for n in NOUNS if n != nouns[0]]))
    colours = [pick(rng, ("red", "yellow", "white", "orange")), pick(rng, ("blue", "green", "purple", "brown"))]
    counts = [int(rng.integers(1, 3)), int(rng.integers(1, 3))]
    sorts = [k for k in (0, 1) for _ in range(counts[k])]
    order = rng.permutation(len(sorts))
    slots = np.linspace(0.17, 0.83, len(sorts))
    feet = horizon + rng.uniform(0.16, 0.38, len(sorts))
    for place in np.argsort(feet):
        sort, n = sorts[order[place]], len(sorts)
        x = float(slots[place] + rng.uniform(-0.03, 0.03))
        foot = float(feet[place])
        half = rng.uniform(0.095, 0.125) * (0.8 + 0.8 * (foot - horizon))
        height = half * rng.uniform(2.4, 3.2) if nouns[sort] == "vase" else half * 2
        colour = vary(rng, PALETTE[colours[sort]])
        cast(canvas, light, x, foot, half, height, reversed_=hits(fault, "shadow", int(place), n))
        _put(canvas, rng, light, nouns[sort], x, foot, half, height, colour)
        if hits(fault, "fused", int(place), n):
            counts[sort] += 1
            to = x + (1.25 * half if x < 0.5 else -1.25 * half)
            _put(
                canvas,
                np.random.default_rng(fault.seed if fault else 0),
                light,
                nouns[sort],
                to,
                foot - half * 0.2,
                half,
                height,
                colour,
            )
        if hits(fault, "occlusion", int(place), n):
            _table_through(canvas, light, x, foot, half, height)
    things = tuple(Thing(counts[k], colours[k], nouns[k]) for k in (0, 1))
    return Facts(
        kind="still life",
        things=things,
        place=f"on a wooden table before a {wall} wall",
        texture="the wood of the table",
        edges="the objects on the table",
        sense="Every object stands firmly on the table.",
    )


def _wall(canvas: Canvas, rng: Generator, light: Light, colour: Colour, foot: float) -> None:
    window, alpha = canvas.rectangle(-0.1, -0.1, 1.1, foot)
    glow = 0.75 + 0.4 * light.side * (window.x - 0.5) - 0.12 * (window.y - 0.2)
    planes = lit(mix(colour, (0.5, 0.5, 0.5), 0.45), glow * texture(rng, window, "cloud", 0.06), light)
    canvas.paint(window, alpha, planes * texture(rng, window, "fine", 0.03))
    edge, alpha = canvas.rectangle(-0.1, foot - 0.012, 1.1, foot + 0.004, softness=0.008)
    canvas.shade(edge, alpha, 0.5)


def _put(
    canvas: Canvas,
    rng: Generator,
    light: Light,
    noun: str,
    x: float,
    foot: float,
    half: float,
    height: float,
    colour: Colour,
) -> None:
    if noun == "vase":
        vase(canvas, rng, light, x, foot, half, height, colour)
    elif noun == "ball":
        ball(canvas, rng, light, x, foot - half * 0.95, half, colour, gloss=0.55)
    else:
        crate(canvas, rng, light, x, foot, half * 0.85, height * 0.85, colour)


def _table_through(canvas: Canvas, light: Light, x: float, foot: float, half: float, height: float) -> None:
    """Lets a board that lies behind a thing pass in front of it."""
    middle = foot - 0.5 * height
    window, alpha = canvas.rectangle(x - 2.2 * half, middle - 0.028, x + 2.2 * half, middle + 0.028)
    canvas.paint(window, alpha, lit((0.33, 0.18, 0.09), 0.8 + 6 * (middle - window.y), light))


KIND = SceneKind(
    "still life",
    draw,
    {
        "shadow": SHADOW,
        "fused": "two things on the table [have grown|are melted] into one",
        "occlusion": "a board of the table [passes|lies] in front of a thing that stands on it",
    },
)
