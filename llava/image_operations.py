"""What happens to images on their way: resizing, cropping, compression, frames. Imports no torch.

Delivery of training data and the robustness grid of evaluation stand on the same operations. A ``Step`` is one of them
with its values, plain JSON, so that a manifest says what was done and doing it again gives the same pixels.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

KERNELS: dict[str, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
LEAST_SIDE = 16
"""No step makes an image smaller than this, in pixels."""
_GEOMETRIC = ("resize", "crop", "rotate", "letterbox", "screenshot")
_ROTATION_KERNELS = ("nearest", "bilinear", "bicubic")


@dataclass(frozen=True)
class Step:
    """One operation with its values.

    Attributes:
        name: A key of ``OPERATIONS``.
        values: Its arguments, plain JSON values.

    Raises:
        ValueError: There is no operation of that name.
    """

    name: str
    values: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in OPERATIONS:
            raise ValueError(f"unknown operation {self.name!r}; known: {', '.join(OPERATIONS)}")

    def __call__(self, image: Image.Image) -> Image.Image:
        """Returns the RGB image after this step."""
        return OPERATIONS[self.name](image, **self.values)

    def on_mask(self, mask_HW: np.ndarray) -> np.ndarray:
        """Returns where a mask lies after this step, bool; only geometric steps move it."""
        if self.name not in _GEOMETRIC:
            return mask_HW
        values = {**self.values, **({"kernel": "bilinear"} if "kernel" in self.values else {})}
        moved = OPERATIONS[self.name](Image.fromarray(mask_HW.astype(np.uint8) * 255), **values)
        return np.asarray(moved) >= 128

    def to_json(self) -> dict[str, Any]:
        """Returns name and values in one object."""
        return {"step": self.name, **self.values}


def apply_steps(
    image: Image.Image, steps: Sequence[Step], masks: Mapping[str, np.ndarray] | None = None
) -> tuple[Image.Image, dict[str, np.ndarray]]:
    """Applies steps one after the other, to an RGB image and to its masks (bool, its shape)."""
    moved = dict(masks or {})
    for step in steps:
        image = step(image)
        moved = {name: step.on_mask(mask) for name, mask in moved.items()}
    return image, moved


# --- geometry: these take RGB images and, for masks, grey ones


def resize(image: Image.Image, *, factor: float, kernel: str = "bicubic") -> Image.Image:
    """Scales both sides by a factor."""
    width, height = (max(LEAST_SIDE, round(side * factor)) for side in image.size)
    return image.resize((width, height), KERNELS[kernel])


def crop(image: Image.Image, *, left: float, top: float, right: float, bottom: float) -> Image.Image:
    """Cuts off a share of the width or height at each side; what is left has at least ``LEAST_SIDE`` pixels."""
    width, height = image.size
    x0, x1 = _kept(width, left, right)
    y0, y1 = _kept(height, top, bottom)
    return image.crop((x0, y0, x1, y1))


def _kept(side: int, before: float, after: float) -> tuple[int, int]:
    start, end = round(side * before), side - round(side * after)
    return (start, end) if end - start >= min(side, LEAST_SIDE) else (0, side)


def rotate(image: Image.Image, *, degrees: float, kernel: str = "bicubic") -> Image.Image:
    """Turns an image counter-clockwise and keeps the largest upright rectangle without empty corners."""
    resample = KERNELS[kernel if kernel in _ROTATION_KERNELS else "bicubic"]
    turned = image.rotate(degrees, resample)
    width, height = _inscribed(*image.size, math.radians(degrees))
    x0, y0 = (image.width - width) // 2, (image.height - height) // 2
    return turned.crop((x0, y0, x0 + width, y0 + height))


def _inscribed(width: int, height: int, angle: float) -> tuple[int, int]:
    """The largest upright rectangle of the image's own shape inside it after turning, a pixel's margin left out."""
    sine, cosine = abs(math.sin(angle)), abs(math.cos(angle))
    scale = min(width / (width * cosine + height * sine), height / (width * sine + height * cosine))
    return max(1, math.floor(width * scale) - 2), max(1, math.floor(height * scale) - 2)


def letterbox(
    image: Image.Image, *, left: float = 0, top: float = 0, right: float = 0, bottom: float = 0, grey: int = 0
) -> Image.Image:
    """Puts bars beside an image, each a share of its width or height; bars of masks are empty."""
    width, height = image.size
    x0, y0 = round(width * left), round(height * top)
    framed = Image.new(image.mode, (x0 + width + round(width * right), y0 + height + round(height * bottom)))
    framed.paste(_fill(image, grey), (0, 0, *framed.size))
    framed.paste(image, (x0, y0))
    return framed


def screenshot(
    image: Image.Image, *, factor: float, margin: float, bar: float, grey: int, kernel: str = "bilinear"
) -> Image.Image:
    """Shows an image as a screen does: scaled, on a plain ground, below a bar with some marks.

    Args:
        image: The image.
        factor: Scale of the image.
        margin: Ground at each side, as a share of the width.
        bar: Height of the bar, as a share of the height.
        grey: Of the ground, 0 to 255.
        kernel: Of the scaling.
    """
    shown = resize(image, factor=factor, kernel=kernel)
    width, height = shown.size
    side, bar_height = round(width * margin), max(4, round(height * bar))
    screen = Image.new(image.mode, (width + 2 * side, height + bar_height + side))
    screen.paste(_fill(image, grey), (0, 0, *screen.size))
    if image.mode == "RGB":
        pen, ink = ImageDraw.Draw(screen), 255 - grey
        unit = max(1, bar_height // 4)
        for start, length in ((0.04, 5), (0.75, 2), (0.85, 3)):
            x0 = round(screen.width * start)
            pen.rectangle((x0, unit, x0 + unit * length, 3 * unit - 1), fill=(ink, ink, ink))
    screen.paste(shown, (side, bar_height))
    return screen


def _fill(image: Image.Image, grey: int) -> Any:
    return (grey, grey, grey) if image.mode == "RGB" else 0


# --- pixels


def blur(image: Image.Image, *, sigma: float) -> Image.Image:
    """Blurs with a Gaussian of ``sigma`` pixels."""
    return _as_image(_gaussian(_as_array(image), sigma))


def sharpen(image: Image.Image, *, sigma: float, amount: float) -> Image.Image:
    """Adds ``amount`` times the difference to the blurred image (unsharp mask)."""
    values = _as_array(image)
    return _as_image(values + np.float32(amount) * (values - _gaussian(values, sigma)))


def noise(image: Image.Image, *, sigma: float, seed: int) -> Image.Image:
    """Adds white Gaussian noise of ``sigma`` grey levels to each colour."""
    values = _as_array(image)
    drawn = np.random.default_rng(seed).standard_normal(values.shape, dtype=np.float32)
    return _as_image(values + np.float32(sigma) * drawn)


def _as_array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32)


def _as_image(values_HWC: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(np.clip(values_HWC, 0, 255)).astype(np.uint8))


def _gaussian(values_HWC: np.ndarray, sigma: float) -> np.ndarray:
    reach = max(1, math.ceil(3 * sigma))
    positions = np.arange(-reach, reach + 1, dtype=np.float64)
    weights = np.exp(-0.5 * (positions / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (0, 1):
        moved = np.moveaxis(values_HWC, axis, 0)
        padded = np.pad(moved, [(reach, reach), (0, 0), (0, 0)], mode="edge")
        blurred = np.zeros_like(moved)
        for offset, weight in enumerate(weights):
            blurred += weight * padded[offset : offset + len(moved)]
        values_HWC = np.moveaxis(blurred, 0, axis)
    return values_HWC


# --- compression


def jpeg(image: Image.Image, *, quality: int, subsampling: int = 2) -> Image.Image:
    """Compresses and opens again; ``subsampling`` as in Pillow: 0 is 4:4:4, 1 is 4:2:2, 2 is 4:2:0."""
    return decode(encode(image, "JPEG", quality=quality, subsampling=subsampling))


def webp(image: Image.Image, *, quality: int) -> Image.Image:
    """Compresses as lossy WebP and opens again."""
    return decode(encode(image, "WEBP", quality=quality))


def avif(image: Image.Image, *, quality: int) -> Image.Image:
    """Compresses as AVIF and opens again."""
    return decode(encode(image, "AVIF", quality=quality))


def encode(image: Image.Image, format: str, **settings: Any) -> bytes:
    """Returns a file's bytes; ``settings`` are Pillow's for the format."""
    if format == "AVIF":
        settings = {"speed": 8, "max_threads": 1, **settings}  # several threads may give other bytes
    buffer = io.BytesIO()
    image.save(buffer, format, **settings)
    return buffer.getvalue()


def decode(data: bytes) -> Image.Image:
    """Opens a file's bytes as RGB."""
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


OPERATIONS: dict[str, Callable[..., Image.Image]] = {
    operation.__name__: operation
    for operation in (resize, crop, rotate, letterbox, screenshot, blur, sharpen, noise, jpeg, webp, avif)
}
