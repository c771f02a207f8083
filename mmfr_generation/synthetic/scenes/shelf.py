"""Lettered books and a few ornaments on the boards of a wooden shelf."""

import numpy as np

from mmfr_generation.synthetic.canvas import Canvas, Light
from mmfr_generation.synthetic.numerics import Generator
from mmfr_generation.synthetic.scenes.base import SHADOW, Facts, Fault, SceneKind, Thing, hits
from mmfr_generation.synthetic.solids import PALETTE, ball, cast, lit, pick, texture, vary, vase

TITLES = ("ATLAS", "POEMS", "BIRDS", "OCEAN", "STARS", "WINTER", "GARDEN", "MAPS")
_COVERS = ("red", "blue", "green", "brown", "purple", "orange")


def draw(canvas: Canvas, rng: Generator, light: Light, fault: Fault | None) -> Facts:
    """Draws the scene and returns its facts."""
    wood = vary(rng, (0.34, 0.19, 0.09), 0.3)
    window = canvas.everywhere()
    back = lit(wood, 0.5 * texture(rng, window, "grain", 0.2) * (1 + 0.3 * light.side * (window.x - 0.5)), light)
    canvas.paint(window, np.ones(window.shape, np.float32), back)
    title = pick(rng, TITLES)
    groups = [int(rng.integers(3, 6)) for _ in range(2)]
    covers = [pick(rng, _COVERS) for _ in range(2)]
    ornament = pick(rng, ("vase", "ball"))
    ornament_colour = pick(rng, ("white", "yellow"))
    for board, floor in enumerate((0.47, 0.95)):
        _board(canvas, rng, light, floor, wood)
        right = rng.random() < 0.5
        x = 0.4 if right else 0.05
        books = groups[board]
        for k in range(books):
            thick = 0.55 / books * rng.uniform(0.8, 1.0)
            tall = rng.uniform(0.27, 0.36)
            book = (x, floor - tall, x + thick, floor)
            _book(canvas, rng, light, book, covers[board], title, fault, board * groups[0] + k, sum(groups))
            x += thick + 0.004
        stand = 0.19 if right else 0.8
        half = rng.uniform(0.08, 0.1)
        reversed_ = hits(fault, "shadow", board, 2)
        cast(canvas, light, stand, floor + 0.008, half, half * 1.6, reversed_=reversed_)
        _wall_shadow(canvas, light, stand, floor, half, reversed_=reversed_)
        behind = canvas.rgb_CHW.copy()
        colour = vary(rng, PALETTE[ornament_colour])
        if ornament == "vase":
            vase(canvas, rng, light, stand, floor + 0.01, half, half * 2.9, colour)
        else:
            ball(canvas, rng, light, stand, floor + 0.01 - half, half, colour, gloss=0.5)
        if hits(fault, "occlusion", board, 2):
            canvas.restore(behind, stand - 1.3 * half, floor - 1.4 * half, stand + 1.3 * half, floor - 0.7 * half)
    things = [Thing(2, ornament_colour, ornament)]
    if covers[0] == covers[1]:
        things.insert(0, Thing(sum(groups), covers[0], "book"))
    else:
        things[:0] = [Thing(groups[k], covers[k], "book") for k in (0, 1)]
    return Facts(
        kind="shelf",
        things=tuple(things),
        place="on a wooden shelf",
        texture="the wood of the shelf",
        edges="the books",
        sense=f"The books stand side by side and read {title.lower()}.",
        text=title.lower(),
        carrier="every book",
    )


def _board(canvas: Canvas, rng: Generator, light: Light, floor: float, wood: tuple[float, float, float]) -> None:
    window, alpha = canvas.rectangle(-0.1, floor - 0.02, 1.1, floor + 0.045)
    canvas.paint(window, alpha, lit(wood, 1.25 * texture(rng, window, "grain", 0.16), light))
    canvas.shade(*canvas.rectangle(-0.1, floor + 0.045, 1.1, floor + 0.09, softness=0.03), 0.45)


def _book(
    canvas: Canvas,
    rng: Generator,
    light: Light,
    box: tuple[float, float, float, float],
    cover: str,
    title: str,
    fault: Fault | None,
    index: int,
    count: int,
) -> None:
    x0, y0, x1, y1 = box
    middle, half = (x0 + x1) / 2, (x1 - x0) / 2
    colour = vary(rng, PALETTE[cover], 0.3)
    if hits(fault, "fused", index, count):
        y0, x1 = y0 + 0.1 * (y1 - y0), x1 + half * 0.9
    window, alpha = canvas.rectangle(x0, y0, x1, y1)
    bow = np.clip((window.x - middle) / half, -1, 1)
    bright = light.on(bow * 0.75, np.zeros_like(bow), np.sqrt(1 - 0.56 * bow * bow)) * texture(
        rng, window, "fine", 0.05
    )
    canvas.paint(window, alpha, lit(colour, 1.25 * bright, light))
    ink = lit((0.85, 0.7, 0.35), 1.0, light)
    for y in (y0 + 0.03, y1 - 0.04):
        canvas.paint(*canvas.rectangle(x0 + 0.004, y, x1 - 0.004, y + 0.008), ink)
    broken = fault.seed + index if fault is not None and fault.kind == "text" else None
    canvas.paint(*canvas.letters(title, x0 + 0.01, y0 + 0.05, x1 - 0.01, y1 - 0.05, upright=True, broken=broken), ink)
    canvas.shade(*canvas.rectangle(x1 - 0.004, y0, x1 + 0.006, y1, softness=0.006), 0.4)


def _wall_shadow(canvas: Canvas, light: Light, x: float, floor: float, half: float, *, reversed_: bool) -> None:
    """Casts an ornament's shadow on the shelf's back."""
    away = light.side if reversed_ else -light.side
    window, alpha = canvas.ellipse(x + away * half * 0.8, floor - 1.25 * half, half * 0.95, half * 1.3, softness=0.03)
    above = canvas.cover(window.y - floor + 0.02)
    canvas.shade(window, alpha * above, light.ambient + 0.1)


KIND = SceneKind(
    "shelf",
    draw,
    {
        "shadow": SHADOW,
        "fused": "one book [has grown|is melted] into the next one",
        "text": "the letters on the books are [broken|mirrored and joined] and cannot be read",
        "occlusion": "the back of the shelf [covers|hides] the middle of a thing that stands before it",
    },
)
