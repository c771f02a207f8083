"""Images of another world than photographs and rendered scenes, drawn at any size."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDES = ((160, 160), (320, 240), (512, 512), (640, 400))


def noise(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Plain noise, grey or coloured."""
    channels = (3,) if rng.random() < 0.5 else (1,)
    values = rng.normal(128, rng.uniform(20, 70), (size[1], size[0], *channels)).clip(0, 255)
    return Image.fromarray(np.broadcast_to(values, (size[1], size[0], 3)).astype(np.uint8))


def chart(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Bars and a line over axes."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    width, height = size
    count = int(rng.integers(4, 9))
    for index in range(count):
        top, left = height * rng.uniform(0.1, 0.8), width * (0.1 + 0.85 * index / count)
        colour = tuple(int(value) for value in rng.integers(0, 230, 3))
        draw.rectangle([left, top, left + 0.6 * width / count, height * 0.9], fill=colour)
    draw.line(
        [width * 0.08, height * 0.05, width * 0.08, height * 0.9, width * 0.97, height * 0.9], fill="black", width=2
    )
    points = [(width * (0.1 + 0.85 * i / 12), height * rng.uniform(0.1, 0.85)) for i in range(13)]
    draw.line(points, fill="red", width=2)
    for tick in range(8):
        draw.text((2, height * (0.05 + 0.1 * tick)), str(tick * 10), fill="black")
    return image


def text_page(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A page of words in the built-in font."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for top in range(8, size[1] - 10, 13):
        words = (
            "".join(chr(int(c)) for c in rng.integers(97, 123, int(rng.integers(2, 9)))) for _ in range(size[0] // 30)
        )
        draw.text((8, top), " ".join(words), fill="black")
    return image


def line_drawing(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Thin black curves on white."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(10, 25))):
        centre, radius = rng.uniform(0, 1, 2) * size, rng.uniform(5, max(size) / 2)
        box = [*(centre - radius), *(centre + radius)]
        start = rng.uniform(0, 360)
        draw.arc(box, start, start + rng.uniform(60, 360), fill="black", width=int(rng.integers(1, 4)))
    return image


def x_ray(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Grey soft blobs and ribs on black."""
    rows, columns = np.mgrid[0 : size[1], 0 : size[0]]
    values = np.zeros((size[1], size[0]))
    for _ in range(6):
        x, y, spread = (
            rng.uniform(0.2, 0.8) * size[0],
            rng.uniform(0.2, 0.8) * size[1],
            rng.uniform(0.08, 0.25) * size[0],
        )
        values += np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * spread**2))
    ribs = 0.15 * np.sin(rows / size[1] * 40 + 3 * np.sin(columns / size[0] * 3))
    values = (values / values.max() + ribs).clip(0, 1) * 220
    return Image.fromarray(values.astype(np.uint8)).filter(ImageFilter.GaussianBlur(1)).convert("RGB")


def cartoon(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Flat colours with black outlines."""
    image = Image.new("RGB", size, tuple(int(value) for value in rng.integers(120, 256, 3)))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(6, 14))):
        x, y = rng.uniform(0, 1, 2) * size
        half = rng.uniform(0.05, 0.25, 2) * min(size)
        shape = draw.ellipse if rng.random() < 0.6 else draw.rectangle
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        shape([x - half[0], y - half[1], x + half[0], y + half[1]], fill=colour, outline="black", width=3)
    return image


WORLDS = {
    "noise": noise,
    "chart": chart,
    "text_page": text_page,
    "line_drawing": line_drawing,
    "x_ray": x_ray,
    "cartoon": cartoon,
}


def draw_world(name: str, count: int, seed: int = 0) -> list[Image.Image]:
    """Draws images of one world, at sizes in turn."""
    rng = np.random.default_rng([seed, list(WORLDS).index(name)])
    return [WORLDS[name](rng, SIDES[index % len(SIDES)]) for index in range(count)]
