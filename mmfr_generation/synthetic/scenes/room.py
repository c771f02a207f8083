"""A room with floor boards, a window's light on the wall, furniture, a lamp and a lettered poster."""

import numpy as np

from mmfr_generation.synthetic.canvas import Canvas, Light
from mmfr_generation.synthetic.numerics import Generator
from mmfr_generation.synthetic.scenes.base import SHADOW, Facts, Fault, SceneKind, Thing, hits
from mmfr_generation.synthetic.solids import PALETTE, bar, cast, lit, mix, pick, texture, vary, vase, window_phase

WORDS = ("JAZZ", "LOVE", "HOME", "PARIS", "ROME", "SUMMER", "DREAM", "PEACE")


def draw(canvas: Canvas, rng: Generator, light: Light, fault: Fault | None) -> Facts:
    """Draws the scene and returns its facts."""
    skirting = rng.uniform(0.58, 0.66)
    wall = pick(rng, ("green", "blue", "yellow", "grey"))
    _shell(canvas, rng, light, wall, skirting)
    word = pick(rng, WORDS)
    poster_x = 0.5 - light.side * rng.uniform(0.18, 0.26)
    _poster(canvas, rng, light, word, poster_x, fault)
    colour = pick(rng, ("red", "white", "brown", "orange"))
    count = int(rng.integers(1, 4))
    xs = np.linspace(0.2, 0.8, count) if count > 1 else np.asarray([rng.uniform(0.35, 0.65)])
    seats = []
    for k in range(count):
        x, foot = float(xs[k]) + rng.uniform(-0.03, 0.03), skirting + rng.uniform(0.16, 0.3)
        seat = _stool(canvas, rng, light, x, foot, vary(rng, PALETTE[colour]), fault, k, count)
        seats.append((x, seat))
    pot = pick(rng, ("blue", "purple", "green"))
    x, seat = seats[int(rng.integers(count))]
    vase(canvas, rng, light, x, seat, 0.055, 0.16, vary(rng, PALETTE[pot]))
    return Facts(
        kind="room",
        things=(Thing(count, colour, "stool"), Thing(1, pot, "vase")),
        place=f"in a room with a {wall} wall and a poster",
        texture="the wood of the floor",
        edges="the stools" if count > 1 else "the stool and the vase",
        sense=f"The poster reads {word.lower()} and every stool has whole legs.",
        text=word.lower(),
        carrier="the poster",
    )


def _shell(canvas: Canvas, rng: Generator, light: Light, wall: str, skirting: float) -> None:
    """Paints the wall with a slanted patch of window light, the skirting and the floor boards."""
    window, alpha = canvas.rectangle(-0.1, -0.1, 1.1, skirting)
    paper = mix(PALETTE[wall], (0.55, 0.53, 0.5), 0.5)
    stripes = 1 + 0.06 * (window_phase(window.x, 0, rng.uniform(0.05, 0.1)) < 0.5)
    glow = (0.62 + 0.35 * light.side * (window.x - 0.5)) * stripes * texture(rng, window, "fine", 0.035)
    canvas.paint(window, alpha, lit(paper, glow, light))
    near = 0.5 + light.side * 0.36
    slant = -light.side * 0.12
    for dx in (-0.085, 0.085):
        for y in (0.1, 0.3):
            pane = [(near + dx - 0.07, y), (near + dx + 0.07, y)]
            low = [(near + dx + 0.07 + slant, y + 0.18), (near + dx - 0.07 + slant, y + 0.18)]
            patch, alpha = canvas.polygon([*pane, *low], softness=0.012)
            canvas.shade(patch, alpha, 1.75)
    floor, alpha = canvas.rectangle(-0.1, skirting, 1.1, 1.1)
    depth = np.maximum(floor.y - skirting + 0.25, 0.02)
    board = (floor.x - 0.5) / depth / 0.32
    tone = rng.uniform(0.75, 1.2, 64).astype(np.float32)[np.floor(board).astype(int) % 64]
    joints = 1 - 0.5 * canvas.cover((0.47 - np.abs(window_phase(board, 0, 1.0) - 0.5)) * 0.32 * depth)
    grain = texture(rng, floor, "rough", 0.12) * (0.8 + 0.3 * light.side * (floor.x - 0.5))
    canvas.paint(floor, alpha, lit(vary(rng, (0.4, 0.22, 0.1), 0.25), tone * joints * grain, light))
    canvas.paint(*canvas.rectangle(-0.1, skirting - 0.03, 1.1, skirting + 0.004), lit((0.7, 0.68, 0.64), 0.8, light))


def _poster(canvas: Canvas, rng: Generator, light: Light, word: str, x: float, fault: Fault | None) -> None:
    y0, y1, half = 0.1, 0.42, 0.19
    drop = -light.side * 0.018
    canvas.shade(*canvas.rectangle(x - half + drop, y0 + 0.015, x + half + drop, y1 + 0.02, softness=0.02), 0.5)
    canvas.paint(*canvas.rectangle(x - half, y0, x + half, y1), lit((0.06, 0.05, 0.05), 1.0, light))
    sheet, alpha = canvas.rectangle(x - half + 0.012, y0 + 0.012, x + half - 0.012, y1 - 0.012)
    canvas.paint(sheet, alpha, lit((0.72, 0.66, 0.52), texture(rng, sheet, "cloud", 0.06), light))
    ink = PALETTE[pick(rng, ("red", "blue", "green", "purple"))]
    canvas.paint(*canvas.ellipse(x, y0 + 0.1, 0.065, 0.065), lit(ink, 1.0, light))
    canvas.paint(*canvas.rectangle(x - half + 0.03, y0 + 0.135, x + half - 0.03, y0 + 0.165), lit(ink, 0.6, light))
    broken = fault.seed if fault is not None and fault.kind == "text" else None
    letters = canvas.letters(word, x - half + 0.02, y1 - 0.135, x + half - 0.02, y1 - 0.02, broken=broken)
    canvas.paint(*letters, lit((0.05, 0.05, 0.07), 1.0, light))


def _stool(
    canvas: Canvas,
    rng: Generator,
    light: Light,
    x: float,
    foot: float,
    colour: tuple[float, float, float],
    fault: Fault | None,
    index: int,
    count: int,
) -> float:
    """Paints a round stool and returns its seat's row; faults add legs or let the background hide their middle."""
    half, tall = rng.uniform(0.08, 0.1), rng.uniform(0.2, 0.25)
    seat = foot - tall
    cast(canvas, light, x, foot, half, tall, reversed_=hits(fault, "shadow", index, count))
    behind = canvas.rgb_CHW.copy() if hits(fault, "occlusion", index, count) else None
    legs: list[tuple[float, float]] = [(-0.8, -0.03), (0.8, -0.03), (-0.55, 0.02), (0.55, 0.02)]
    if hits(fault, "extra", index, count):
        legs += [(-1.7, 0.03), (1.6, 0.0), (0.1, 0.06)]
    for dx, dy in legs:
        bar(
            canvas,
            light,
            (x + dx * half * 0.7, seat),
            (x + dx * half, foot + dy),
            0.013,
            0.01,
            mix(colour, (0, 0, 0), 0.3),
        )
    if behind is not None:
        canvas.restore(behind, x - half * 1.3, foot - 0.62 * tall, x + half * 1.3, foot - 0.26 * tall)
    canvas.paint(*canvas.ellipse(x, seat + 0.016, half * 1.1, half * 0.36), lit(colour, 0.5, light))
    window, alpha = canvas.ellipse(x, seat, half * 1.1, half * 0.36)
    canvas.paint(window, alpha, lit(colour, 1.05 + 0.25 * light.side * (window.x - x) / half + 0 * window.y, light))
    return seat


KIND = SceneKind(
    "room",
    draw,
    {
        "shadow": SHADOW,
        "extra": "one stool has too many legs",
        "text": "the letters of the poster are [broken|mirrored and joined] and cannot be read",
        "occlusion": "the background [covers|hides] the legs of a stool that stands before it",
    },
)
