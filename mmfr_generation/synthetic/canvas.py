"""A drawing surface in linear light: anti-aliased shapes, painted, shaded and shadowed.

Positions and lengths are fractions of the image's side; x runs to the right and y downwards. A shape is first an
alpha plane over a window of the image, so that its cost is that of its own area. Shape suffixes: C = colour,
H, W = the window's rows and columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmfr_generation.synthetic.numerics import Array, Generator

Colour = tuple[float, float, float]
Point = tuple[float, float]


class Window(NamedTuple):
    """A rectangle of the image with the positions of its pixel centres (x: (1, W), y: (H, 1))."""

    rows: slice
    cols: slice
    x: Array
    y: Array

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.y.shape[0], self.x.shape[1]


@dataclass(frozen=True)
class Light:
    """The one lamp or sun of a scene.

    Attributes:
        side: -1 when it stands on the left, +1 on the right.
        height: How steeply it shines, 0.5 (low) to 1 (high); low light casts long shadows.
        colour: Its tint.
        ambient: Share of the light that comes from everywhere.
    """

    side: int
    height: float
    colour: Colour
    ambient: float

    @staticmethod
    def draw(rng: Generator) -> "Light":
        """Draws a light: either side, low to high, cool to warm."""
        warmth = rng.uniform(-0.12, 0.16)
        return Light(
            side=1 if rng.random() < 0.5 else -1,
            height=rng.uniform(0.5, 1.0),
            colour=(1.0 + warmth, 1.0, 1.0 - warmth),
            ambient=rng.uniform(0.22, 0.38),
        )

    @property
    def name(self) -> str:
        """``left`` or ``right``."""
        return "right" if self.side > 0 else "left"

    def on(self, nx: Array, ny: Array, nz: Array) -> Array:
        """Returns the brightness of a surface with these unit normals (z towards the viewer)."""
        x, y, z = 0.78 * self.side, -0.25 - 0.45 * self.height, 0.5
        scale = (1 - self.ambient) / float(np.sqrt(x * x + y * y + z * z))
        return self.ambient + scale * np.maximum(nx * x + ny * y + nz * z, 0)


class Canvas:
    """A square image in linear light.

    Attributes:
        size: Side in pixels.
        rgb_CHW: float32 planes, shape (3, size, size).
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.rgb_CHW: Array = np.zeros((3, size, size), np.float32)

    def window(self, x0: float, y0: float, x1: float, y1: float) -> Window:
        """Returns the window between two corners, cut to the image and never empty."""
        rows, cols = self._span(y0, y1), self._span(x0, x1)
        centres = _centres(self.size)
        return Window(rows, cols, centres[None, cols], centres[rows, None])

    def everywhere(self) -> Window:
        """Returns the window of the whole image."""
        return self.window(0, 0, 1, 1)

    def cover(self, distance: Array, softness: float = 0.0) -> Array:
        """Turns a signed distance (inside negative) into alpha with an edge one pixel or ``softness`` wide."""
        return np.clip(0.5 - distance / max(1.0 / self.size, softness), 0, 1)

    def paint(self, window: Window, alpha: Array, colour: Colour | Array) -> None:
        """Blends a colour, or planes of shape (3, H, W), over the image."""
        target = self.rgb_CHW[:, window.rows, window.cols]
        for plane, value in zip(target, colour, strict=True):
            plane += alpha * (value - plane)

    def shade(self, window: Window, alpha: Array, factor: float) -> None:
        """Multiplies the image by ``factor`` where alpha is 1."""
        self.rgb_CHW[:, window.rows, window.cols] *= 1 - alpha * np.float32(1 - factor)

    def restore(self, before_CHW: Array, x0: float, y0: float, x1: float, y1: float) -> None:
        """Lets what the whole image showed before come to the front again in a rectangle."""
        window, alpha = self.rectangle(x0, y0, x1, y1)
        self.paint(window, alpha, before_CHW[:, window.rows, window.cols])

    def ellipse(self, cx: float, cy: float, rx: float, ry: float, softness: float = 0.0) -> tuple[Window, Array]:
        """Returns window and alpha of an upright ellipse."""
        reach = softness + 1.5 / self.size
        window = self.window(cx - rx - reach, cy - ry - reach, cx + rx + reach, cy + ry + reach)
        u, v = (window.x - cx) / rx, (window.y - cy) / ry
        return window, self.cover((np.sqrt(u * u + v * v) - 1) * min(rx, ry), softness)

    def limb(self, a: Point, b: Point, ra: float, rb: float, softness: float = 0.0) -> tuple[Window, Array, Array]:
        """Returns window, alpha and cross position (-1 to 1) of a rounded bar from ``a`` to ``b``."""
        reach = max(ra, rb) + softness + 1.5 / self.size
        window = self.window(
            min(a[0], b[0]) - reach, min(a[1], b[1]) - reach, max(a[0], b[0]) + reach, max(a[1], b[1]) + reach
        )
        dx, dy = b[0] - a[0], b[1] - a[1]
        length = max(float(np.sqrt(dx * dx + dy * dy)), 1e-6)
        px, py = window.x - a[0], window.y - a[1]
        along = np.clip((px * dx + py * dy) / length**2, 0, 1)
        qx, qy = px - along * dx, py - along * dy
        radius = ra + (rb - ra) * along
        across = (px * dy - py * dx) / length / radius
        return window, self.cover(np.sqrt(qx * qx + qy * qy) - radius, softness), np.clip(across, -1, 1)

    def polygon(self, points: Sequence[Point], softness: float = 0.0) -> tuple[Window, Array]:
        """Returns window and alpha of a convex polygon, its corners in either order."""
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        reach = softness + 1.5 / self.size
        window = self.window(min(xs) - reach, min(ys) - reach, max(xs) + reach, max(ys) + reach)
        edges = list(zip(points, [*points[1:], points[0]], strict=True))
        turn = 1.0 if sum(a[0] * b[1] - b[0] * a[1] for a, b in edges) > 0 else -1.0
        distance: Array = np.full(window.shape, -9.0, np.float32)
        for a, b in edges:
            dx, dy = (b[0] - a[0]) * turn, (b[1] - a[1]) * turn
            length = max(float(np.sqrt(dx * dx + dy * dy)), 1e-6)
            np.maximum(distance, ((window.x - a[0]) * dy - (window.y - a[1]) * dx) / length, out=distance)
        return window, self.cover(distance, softness)

    def fill(self, points: Sequence[Point], colour: Colour) -> None:
        """Paints a convex polygon in one colour."""
        self.paint(*self.polygon(points), colour)

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, softness: float = 0.0) -> tuple[Window, Array]:
        """Returns window and alpha of an upright rectangle."""
        reach = softness + 1.0 / self.size
        window = self.window(x0 - reach, y0 - reach, x1 + reach, y1 + reach)
        across = self.cover(np.maximum(x0 - window.x, window.x - x1), softness)
        down = self.cover(np.maximum(y0 - window.y, window.y - y1), softness)
        return window, across * down

    def letters(
        self, text: str, x0: float, y0: float, x1: float, y1: float, *, upright: bool = False, broken: int | None = None
    ) -> tuple[Window, Array]:
        """Returns window and alpha of a word fitted into a rectangle.

        Args:
            text: The word.
            x0: Left edge.
            y0: Upper edge.
            x1: Right edge.
            y1: Lower edge.
            upright: Turn the word so that it reads from the bottom to the top.
            broken: Seed of a scramble that mirrors, swaps and merges the letters' parts; None writes them well.
        """
        window = self.window(x0, y0, x1, y1)
        height, width = window.shape
        glyphs = _word(text, broken)
        if upright:
            glyphs = glyphs.transpose(Image.Transpose.ROTATE_90)
        scale = min(width / glyphs.width, height / glyphs.height)
        w, h = max(1, int(glyphs.width * scale)), max(1, int(glyphs.height * scale))
        placed = Image.new("L", (width, height))
        placed.paste(glyphs.resize((w, h), Image.Resampling.BOX), ((width - w) // 2, (height - h) // 2))
        return window, np.asarray(placed, np.float32) / 255

    def _span(self, low: float, high: float) -> slice:
        start = min(max(int(np.floor(low * self.size)), 0), self.size - 1)
        return slice(start, min(max(int(np.ceil(high * self.size)), start + 1), self.size))


@lru_cache(maxsize=8)
def _centres(size: int) -> Array:
    return ((np.arange(size) + 0.5) / size).astype(np.float32)


@lru_cache(maxsize=512)
def _letter(character: str) -> Image.Image:
    """Draws one letter, 64 pixels high, with the font that comes inside Pillow."""
    font = ImageFont.load_default(64)
    left, _, right, _ = font.getbbox(character)
    image = Image.new("L", (int(right - left) + 6, 64))
    ImageDraw.Draw(image).text((3 - left, -2), character, fill=255, font=font, stroke_width=2)
    return image


@lru_cache(maxsize=256)
def _word(text: str, broken: int | None) -> Image.Image:
    letters = [_letter(character) for character in text]
    if broken is not None:
        letters = _scramble(letters, np.random.default_rng(broken))
    overlap = 0 if broken is None else 9
    image = Image.new("L", (max(1, sum(x.width - overlap for x in letters) + overlap), 64))
    at = 0
    for letter in letters:
        image.paste(255, (at, 0), letter)
        at += letter.width - overlap
    return image


def _scramble(letters: list[Image.Image], rng: Generator) -> list[Image.Image]:
    """Mirrors each letter or joins its upper half to the lower half of another one."""
    out = []
    for letter in letters:
        other = letters[int(rng.integers(len(letters)))].resize(letter.size)
        joined = letter.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else letter.copy()
        joined.paste(other.transpose(Image.Transpose.FLIP_TOP_BOTTOM).crop((0, 0, letter.width, 32)), (0, 0))
        out.append(joined)
    return out
