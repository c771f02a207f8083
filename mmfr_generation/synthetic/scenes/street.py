"""A brick house front with windows, a door, a lettered sign and a lamp post."""

import numpy as np

from mmfr_generation.synthetic.canvas import Canvas, Light
from mmfr_generation.synthetic.numerics import Generator
from mmfr_generation.synthetic.scenes.base import SHADOW, Facts, Fault, SceneKind, Thing, hits
from mmfr_generation.synthetic.solids import (
    PALETTE,
    bar,
    cast,
    lit,
    pick,
    surface,
    texture,
    vary,
    window_phase,
)

WORDS = ("CAFE", "HOTEL", "BAKERY", "BOOKS", "MUSIC", "TEA", "MARKET", "CINEMA")
_FRAME = (0.72, 0.7, 0.66)


def draw(canvas: Canvas, rng: Generator, light: Light, fault: Fault | None) -> Facts:
    """Draws the scene and returns its facts."""
    pavement = rng.uniform(0.8, 0.86)
    _bricks(canvas, rng, light)
    columns, storeys = int(rng.integers(2, 5)), 2
    word, colour = pick(rng, WORDS), pick(rng, ("red", "blue", "green", "brown"))
    windows = columns * storeys
    lit_window = int(rng.integers(windows))
    wide = 0.78 / columns
    for k in range(columns * storeys):
        col, row = k % columns, k // columns
        x, y = 0.11 + wide * (col + 0.5), 0.14 + 0.23 * row
        _window(canvas, rng, light, x, y, wide * 0.27, 0.075, glowing=k == lit_window)
        if hits(fault, "fused", k, columns * storeys):
            windows += 1
            step = wide * (0.36 if x < 0.5 else -0.36)
            _window(canvas, np.random.default_rng(7), light, x + step, y + 0.05, wide * 0.27, 0.075, glowing=False)
    surface(canvas, rng, light, pavement, 1.0, (0.3, 0.29, 0.28), "fine")
    door = rng.uniform(0.2, 0.8)
    _door(canvas, rng, light, door, pavement, vary(rng, PALETTE[colour]))
    _sign(canvas, light, word, colour, fault)
    post = rng.uniform(0.07, 0.13) if door > 0.5 else rng.uniform(0.87, 0.93)
    foot = pavement + rng.uniform(0.05, 0.1)
    _lamp(canvas, light, post, foot, fault)
    return Facts(
        kind="street",
        things=(Thing(windows, "", "window"), Thing(1, colour, "door")),
        place="in a brick wall along a street",
        texture="the brick of the wall",
        edges="the windows",
        sense=f"The sign reads {word.lower()} in whole letters.",
        text=word.lower(),
        carrier="the sign",
    )


def _bricks(canvas: Canvas, rng: Generator, light: Light) -> None:
    window = canvas.everywhere()
    course = rng.uniform(0.026, 0.036)
    row = np.floor(window.y / course)
    shift = 0.5 * (row % 2)
    across = window.x / (2.4 * course) + shift
    beds = canvas.cover((0.42 - np.abs(window_phase(window.y, 0, course) - 0.5)) * course)
    gaps = canvas.cover((0.465 - np.abs(window_phase(across, 0, 1.0) - 0.5)) * 2.4 * course)
    joint = np.maximum(beds, gaps)
    tone = rng.uniform(0.78, 1.2, (64, 64)).astype(np.float32)
    bricks = tone[row.astype(int) % 64, np.floor(across).astype(int) % 64]
    base = vary(rng, ((0.36, 0.13, 0.08), (0.45, 0.3, 0.18), (0.3, 0.28, 0.26))[int(rng.integers(3))])
    weather = texture(rng, window, "rough", 0.16) * (0.95 + 0.25 * light.side * (window.x - 0.5))
    wall = lit(base, (1 - joint) * bricks * weather, light) + 0.3 * joint * weather
    canvas.paint(window, np.ones(window.shape, np.float32), wall)


def _window(
    canvas: Canvas, rng: Generator, light: Light, x: float, y: float, half: float, tall: float, *, glowing: bool
) -> None:
    """Paints a window set back into the wall, so that the reveal on the light's side lies in shadow."""
    canvas.paint(*canvas.rectangle(x - half, y - tall, x + half, y + tall), lit(_FRAME, 0.9, light))
    pane, alpha = canvas.rectangle(x - half * 0.84, y - tall * 0.88, x + half * 0.84, y + tall * 0.88)
    sky = 0.1 + 0.16 * np.clip(1 - (pane.y - y + tall) / (2 * tall), 0, 1) * texture(rng, pane, "cloud", 0.35)
    glass = lit((1.5, 1.05, 0.5) if glowing else (0.6, 0.8, 1.0), sky + (0.22 if glowing else 0), light)
    canvas.paint(pane, alpha, glass)
    canvas.paint(*canvas.rectangle(x - half * 0.05, y - tall, x + half * 0.05, y + tall), lit(_FRAME, 0.8, light))
    canvas.paint(*canvas.rectangle(x - half, y - tall * 0.06, x + half, y + tall * 0.06), lit(_FRAME, 0.8, light))
    inner = x + light.side * half * 0.72
    canvas.shade(*canvas.rectangle(inner - half * 0.14, y - tall * 0.88, inner + half * 0.14, y + tall * 0.88), 0.4)
    canvas.shade(*canvas.rectangle(x - half * 0.84, y - tall * 0.88, x + half * 0.84, y - tall * 0.66, 0.01), 0.45)
    canvas.paint(*canvas.rectangle(x - half * 1.2, y + tall, x + half * 1.2, y + tall * 1.14), lit(_FRAME, 1.0, light))
    canvas.shade(*canvas.rectangle(x - half * 1.2, y + tall * 1.14, x + half * 1.2, y + tall * 1.35, 0.012), 0.6)


def _door(
    canvas: Canvas, rng: Generator, light: Light, x: float, foot: float, colour: tuple[float, float, float]
) -> None:
    half, top = 0.075, foot - 0.2
    canvas.paint(*canvas.rectangle(x - half * 1.15, top - 0.012, x + half * 1.15, foot), lit(_FRAME, 0.8, light))
    window, alpha = canvas.rectangle(x - half, top, x + half, foot)
    canvas.paint(window, alpha, lit(colour, texture(rng, window, "grain", 0.12), light))
    for dx in (-0.45, 0.45):
        for y0, y1 in ((0.02, 0.085), (0.105, 0.185)):
            panel = canvas.rectangle(x + dx * half - 0.024, top + y0, x + dx * half + 0.024, top + y1)
            canvas.shade(*panel, 0.62)
    canvas.paint(*canvas.ellipse(x + half * 0.8, foot - 0.1, 0.008, 0.008), (0.7, 0.55, 0.2))
    canvas.shade(*canvas.rectangle(x - half, top, x + half, top + 0.02, softness=0.015), 0.45)


def _sign(canvas: Canvas, light: Light, word: str, colour: str, fault: Fault | None) -> None:
    x0, x1, y0, y1 = 0.16, 0.84, 0.485, 0.595
    drop = -light.side * 0.02
    canvas.shade(*canvas.rectangle(x0 + drop, y0 + 0.02, x1 + drop, y1 + 0.025, softness=0.015), 0.4)
    window, alpha = canvas.rectangle(x0, y0, x1, y1)
    canvas.paint(window, alpha, lit(PALETTE[colour], 1.1 + 0.3 * light.side * (window.x - 0.5), light))
    broken = fault.seed if fault is not None and fault.kind == "text" else None
    letters = canvas.letters(word, x0 + 0.03, y0 + 0.008, x1 - 0.03, y1 - 0.008, broken=broken)
    canvas.paint(*letters, lit((0.9, 0.88, 0.8), 1.0, light))


def _lamp(canvas: Canvas, light: Light, x: float, foot: float, fault: Fault | None) -> None:
    cast(canvas, light, x, foot, 0.025, 0.3, reversed_=hits(fault, "shadow", 0, 1))
    behind = canvas.rgb_CHW.copy()
    iron = (0.05, 0.06, 0.06)
    top = foot - 0.56
    bar(canvas, light, (x, foot), (x, top), 0.016, 0.011, iron)
    bar(canvas, light, (x, foot), (x, foot - 0.07), 0.026, 0.02, iron)
    canvas.paint(*canvas.ellipse(x, top, 0.036, 0.045), lit((0.85, 0.82, 0.7), 0.95, light))
    canvas.fill([(x - 0.045, top - 0.035), (x + 0.045, top - 0.035), (x, top - 0.075)], iron)
    if hits(fault, "occlusion", 0, 1):
        canvas.restore(behind, x - 0.06, foot - 0.42, x + 0.06, foot - 0.2)


KIND = SceneKind(
    "street",
    draw,
    {
        "shadow": SHADOW,
        "fused": "two windows [run|have grown] into each other",
        "text": "the letters of the sign are [broken|mirrored and joined] and cannot be read",
        "occlusion": "the wall [covers|hides] a part of the lamp post that stands before it",
    },
)
