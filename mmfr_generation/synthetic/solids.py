"""Things that stand in a scene: shaded by the scene's light, textured, and casting shadows.

Each function paints one thing on a canvas. Positions and lengths are fractions of the image's side.
"""

import math

import numpy as np

from mmfr_generation.synthetic.canvas import Canvas, Colour, Light, Point, Window
from mmfr_generation.synthetic.numerics import Array, Generator, Texture, exp, field, sin

PALETTE: dict[str, Colour] = {
    "red": (0.55, 0.05, 0.05),
    "orange": (0.72, 0.26, 0.03),
    "yellow": (0.78, 0.58, 0.06),
    "green": (0.07, 0.34, 0.08),
    "blue": (0.05, 0.13, 0.52),
    "purple": (0.25, 0.06, 0.38),
    "white": (0.78, 0.77, 0.74),
    "brown": (0.24, 0.11, 0.05),
    "grey": (0.26, 0.26, 0.27),
}
"""Colours by the names that captions use, in linear light."""
SKIN: tuple[Colour, ...] = ((0.62, 0.38, 0.27), (0.45, 0.25, 0.15), (0.24, 0.12, 0.07))


def pick(rng: Generator, names: list[str] | tuple[str, ...]) -> str:
    """Draws one name."""
    return names[int(rng.integers(len(names)))]


def vary(rng: Generator, colour: Colour, amount: float = 0.12) -> Colour:
    """Changes a colour's brightness a little."""
    gain = 1 + rng.uniform(-amount, amount)
    return colour[0] * gain, colour[1] * gain, colour[2] * gain


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """Returns ``a`` with this share of ``b``."""
    return (
        a[0] + (b[0] - a[0]) * share,
        a[1] + (b[1] - a[1]) * share,
        a[2] + (b[2] - a[2]) * share,
    )


def lit(colour: Colour, brightness: Array | float, light: Light) -> Array:
    """Returns planes (3, H, W), or three numbers, of a colour under a light."""
    return np.stack([np.asarray(brightness * (c * t), np.float32) for c, t in zip(colour, light.colour, strict=True)])


def texture(rng: Generator, window: Window, kind: Texture, amount: float) -> Array:
    """Returns a factor about 1 over a window, deviating by ``amount``."""
    return np.maximum(1 + np.float32(amount) * field(rng, *window.shape, kind), 0.1)


def surface(canvas: Canvas, rng: Generator, light: Light, y0: float, y1: float, colour: Colour, kind: Texture) -> None:
    """Paints a level surface from row y0 to y1, brighter towards the light and the viewer."""
    window, alpha = canvas.rectangle(-0.1, y0, 1.1, y1)
    towards = 1 + 0.22 * light.side * (window.x - 0.5)
    nearer = 0.82 + 0.25 * (window.y - y0) / max(y1 - y0, 1e-3)
    canvas.paint(window, alpha, lit(colour, texture(rng, window, kind, 0.13) * towards * nearer, light))


def cast(canvas: Canvas, light: Light, x: float, y: float, half: float, height: float, *, reversed_: bool) -> None:
    """Darkens the ground where a thing that stands at (x, y) keeps the light away.

    Args:
        canvas: Where to draw.
        light: The shadow falls away from it.
        x: Middle of the thing's foot.
        y: Its foot's row.
        half: Half its width.
        height: Its height.
        reversed_: Let the shadow fall towards the light, as it cannot.
    """
    away = light.side if reversed_ else -light.side
    length = height * (1.7 - 0.9 * light.height)
    end = (x + away * (half * 0.6 + length), y - 0.16 * length)
    window, alpha, _ = canvas.limb((x + away * half * 0.3, y), end, half * 0.7, half * 0.55, softness=0.016)
    fade = np.clip(1.35 - np.abs(window.x - x) / max(abs(end[0] - x) * 1.5, 1e-3), 0, 1)
    canvas.shade(window, alpha * fade, light.ambient)
    window, alpha = canvas.ellipse(x, y, half * 1.05, half * 0.3, softness=0.03)
    canvas.shade(window, alpha, 0.55)


def ball(
    canvas: Canvas, rng: Generator, light: Light, x: float, y: float, r: float, colour: Colour, gloss: float
) -> None:
    """Paints a sphere with its highlight."""
    window, alpha = canvas.ellipse(x, y, r, r)
    nx, ny = (window.x - x) / r, (window.y - y) / r
    nz = np.sqrt(np.maximum(1 - nx * nx - ny * ny, 0))
    bright = light.on(nx, ny, nz) * texture(rng, window, "rough", 0.08)
    hx, hy = 0.42 * light.side, -0.5
    spot = np.maximum(1 - ((nx - hx) ** 2 + (ny - hy) ** 2) * 9, 0)
    canvas.paint(window, alpha, lit(colour, bright, light) + gloss * spot * spot)


def vase(
    canvas: Canvas, rng: Generator, light: Light, x: float, foot: float, half: float, height: float, colour: Colour
) -> None:
    """Paints a turned vessel: a smooth profile, a dark mouth and a painted band."""
    bumps = rng.uniform(0.45, 1.0, 4)
    window = canvas.window(x - half - 0.02, foot - height - 0.03, x + half + 0.02, foot + 0.03)
    t = np.clip((foot - window.y) / height, 0, 1)
    knots = np.asarray([0.75, bumps[0] * 0.3 + 0.7, 1.0, bumps[1] * 0.6 + 0.25, bumps[2] * 0.4 + 0.3])
    width = half * np.interp(t, [0, 0.25, 0.5, 0.8, 1], knots).astype(np.float32)
    u = (window.x - x) / width
    bow = 0.14 * half * np.sqrt(np.maximum(1 - u * u, 0))
    distance = np.maximum(np.abs(window.x - x) - width, np.maximum(window.y - foot - bow, foot - height - window.y))
    nx = np.clip(u, -1, 1)
    bright = light.on(nx, np.full_like(nx, -0.1), np.sqrt(1 - nx * nx)) * texture(rng, window, "rough", 0.07)
    band = np.abs(t - rng.uniform(0.35, 0.65)) < 0.05
    bright = bright * np.where(band, np.float32(0.55), np.float32(1))
    gleam = 0.35 * exp(-((u - 0.45 * light.side) ** 2) * 60)
    canvas.paint(window, canvas.cover(distance), lit(colour, bright, light) + gleam)
    mouth = half * float(knots[-1])
    canvas.paint(*canvas.ellipse(x, foot - height, mouth, mouth * 0.22), lit(colour, 0.9, light))
    inner = canvas.ellipse(x, foot - height + 0.006, mouth * 0.86, mouth * 0.17)
    canvas.paint(*inner, mix(colour, (0, 0, 0), 0.85))


def crate(
    canvas: Canvas, rng: Generator, light: Light, x: float, foot: float, half: float, height: float, colour: Colour
) -> None:
    """Paints a box seen from a little above: front, top and one flank, its boards showing."""
    slant, lift = half * 0.5, half * 0.38
    front, alpha = canvas.rectangle(x - half, foot - height, x + half, foot)
    boards = np.where(window_phase(front.y, foot, height / 3) < 0.08, np.float32(0.65), np.float32(1))
    canvas.paint(front, alpha, lit(colour, 0.62 * boards * texture(rng, front, "grain", 0.14), light))
    top = [(x - half, foot - height), (x + half, foot - height), (x + half + slant, foot - height - lift)]
    window, alpha = canvas.polygon([*top, (x - half + slant, foot - height - lift)])
    canvas.paint(window, alpha, lit(colour, texture(rng, window, "grain", 0.1), light))
    flank = [(x + half, foot), (x + half, foot - height), (x + half + slant, foot - height - lift)]
    window, alpha = canvas.polygon([*flank, (x + half + slant, foot - lift)])
    shade = 0.85 if light.side > 0 else 0.3
    canvas.paint(window, alpha, lit(colour, shade * texture(rng, window, "grain", 0.12), light))


def window_phase(position: Array, origin: float, period: float) -> Array:
    """Returns how far along its period each position is, 0 to 1."""
    turns = (position - origin) / period
    return turns - np.floor(turns)


def bar(canvas: Canvas, light: Light, a: Point, b: Point, ra: float, rb: float, colour: Colour) -> None:
    """Paints a round bar, shaded across."""
    window, alpha, across = canvas.limb(a, b, ra, rb)
    dx, dy = b[0] - a[0], b[1] - a[1]
    length = max(math.sqrt(dx * dx + dy * dy), 1e-6)
    nx, ny = across * (dy / length), across * (-dx / length)
    canvas.paint(window, alpha, lit(colour, light.on(nx, ny, np.sqrt(1 - across * across)), light))


def foliage(
    canvas: Canvas, rng: Generator, light: Light, x: float, y: float, rx: float, ry: float, colour: Colour
) -> None:
    """Paints a leafy crown with a ragged outline and dark gaps."""
    reach = 1.25
    window = canvas.window(x - reach * rx, y - reach * ry, x + reach * rx, y + reach * ry)
    nx, ny = (window.x - x) / rx, (window.y - y) / ry
    radius = np.sqrt(nx * nx + ny * ny)
    leaves = field(rng, *window.shape, "rough")
    alpha = canvas.cover((radius - 0.9 - 0.14 * leaves) * min(rx, ry), 0.012)
    nz = np.sqrt(np.maximum(1.05 - np.minimum(radius, 1) ** 2, 0))
    bright = light.on(nx, ny, nz) * np.clip(0.85 + 0.3 * leaves, 0.25, 1.7)
    canvas.paint(window, alpha, lit(colour, bright, light))


def tree(
    canvas: Canvas,
    rng: Generator,
    light: Light,
    x: float,
    foot: float,
    height: float,
    colour: Colour,
    *,
    trunks: int = 1,
) -> None:
    """Paints a tree; with more than one trunk the others stand beside the first under one crown."""
    bark: Colour = (0.16, 0.09, 0.05)
    for k in range(trunks):
        lean = 0.0 if k == 0 else height * 0.34 * (1 if k % 2 else -1)
        bar(canvas, light, (x + lean, foot), (x + lean * 0.3, foot - 0.6 * height), height * 0.05, height * 0.03, bark)
    wide = height * rng.uniform(0.26, 0.36)
    for dx, dy, scale in ((-0.5, 0.52, 0.8), (0.5, 0.55, 0.8), (0.0, 0.72, 1.0)):
        foliage(canvas, rng, light, x + dx * wide, foot - dy * height, wide * scale, height * 0.27 * scale, colour)


def person(
    canvas: Canvas,
    rng: Generator,
    light: Light,
    x: float,
    foot: float,
    height: float,
    shirt: Colour,
    *,
    arms: int = 2,
    heads: int = 1,
) -> None:
    """Paints a standing person; a third arm or a second head are for faults."""
    trousers = vary(rng, PALETTE[pick(rng, ("grey", "brown", "blue"))])
    skin = SKIN[int(rng.integers(len(SKIN)))]
    hair = vary(rng, (0.07, 0.05, 0.03), 0.5)
    stride, swing = rng.uniform(0.03, 0.1) * height, rng.uniform(0.05, 0.16) * height
    face = int(rng.integers(1 << 32))
    hip, neck = foot - 0.48 * height, foot - 0.83 * height
    for side in (-1, 1):
        bar(
            canvas,
            light,
            (x + side * 0.03 * height, hip),
            (x + side * stride, foot),
            0.058 * height,
            0.035 * height,
            trousers,
        )
        window, alpha = canvas.ellipse(x + side * stride + 0.015 * height, foot, 0.05 * height, 0.022 * height)
        canvas.paint(window, alpha, (0.03, 0.03, 0.03))
    reach = [(-1, 0.5), (1, 0.5), (1 if swing > 0.1 * height else -1, 0.9)][:arms]
    for side, level in reach:
        shoulder = (x + side * 0.1 * height, neck + 0.06 * height)
        hand = (x + side * (0.13 * height + swing * (1 if level < 0.6 else 2.2)), foot - level * height)
        elbow = ((shoulder[0] + hand[0]) / 2 + side * 0.025 * height, (shoulder[1] + hand[1]) / 2)
        bar(canvas, light, shoulder, elbow, 0.04 * height, 0.034 * height, shirt)
        bar(canvas, light, elbow, hand, 0.032 * height, 0.024 * height, skin)
    bar(canvas, light, (x, hip - 0.02 * height), (x, neck + 0.05 * height), 0.085 * height, 0.105 * height, shirt)
    for k in range(heads):
        hx = x + (0.0 if heads == 1 else (k - 0.5) * 0.17 * height)
        bar(canvas, light, (x, neck + 0.02 * height), (hx, neck - 0.05 * height), 0.03 * height, 0.03 * height, skin)
        ball(canvas, np.random.default_rng(face), light, hx, foot - 0.925 * height, 0.068 * height, skin, 0.0)
        window, alpha = canvas.ellipse(hx, foot - 0.955 * height, 0.069 * height, 0.045 * height)
        canvas.paint(window, alpha, lit(hair, 0.9, light))


def blossom(
    canvas: Canvas, light: Light, x: float, y: float, r: float, petals: int, turn: float, colour: Colour
) -> None:
    """Paints a flower head: petals about a disc."""
    for k in range(petals):
        angle = turn + 2 * math.pi * k / petals
        tip = (x + math.cos(angle) * r * 0.72, y + math.sin(angle) * r * 0.72)
        bar(canvas, light, (x, y), tip, r * 0.16, r * 0.27, colour)
    disc: Colour = (0.5, 0.33, 0.04)
    window, alpha = canvas.ellipse(x, y, r * 0.3, r * 0.3)
    nx, ny = (window.x - x) / r / 0.3, (window.y - y) / r / 0.3
    canvas.paint(window, alpha, lit(disc, light.on(nx, ny, np.full(window.shape, 0.5, np.float32)), light))


def ripple(x: Array, rng: Generator, amount: float) -> Array:
    """Returns a smooth curve over x: a sum of three waves of random phase, up to about ``amount``."""
    total = np.zeros_like(x)
    for k in (1, 2, 4):
        total = total + sin(2 * math.pi * (k * rng.uniform(0.7, 1.3) * x + rng.uniform(0, 1))) * np.float32(amount / k)
    return total
