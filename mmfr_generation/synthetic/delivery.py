"""What happens to an image between its making and whoever judges it: the same draw for reals and fakes.

The first file of an image is what a camera or a generator saves. Its frame, a native crop to some shape, belongs to
the making. Half of the images stay as they are then; the others go through a chain of one to four steps and are
saved again. All is drawn from the image's own random numbers, and never from its class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from llava.image_operations import Step, apply_steps, decode, encode
from mmfr_generation.synthetic.numerics import Array, Generator

Delivery = Literal["none", "mixed"]
DELIVERIES: tuple[Delivery, ...] = get_args(Delivery)
"""``none``: the square image in its first file; ``mixed``: frames, and chains for half of the images."""

UNTOUCHED_SHARE = 0.5
FRAMED_SHARE = 0.6
LONGEST_CHAIN = 4
WIDEST_FRAME = 0.18
"""Most that a frame cuts off at each side, as a share of it. With the widest crop and turn of a chain, what lies
within 0.28 to 0.72 of both sides stays in the image; local traces have their middle there."""
_KERNELS = ("box", "bilinear", "bicubic", "lanczos")
_FILES = (("JPEG", ".jpg", 0.55), ("PNG", ".png", 0.25), ("WEBP", ".webp", 0.15), ("AVIF", ".avif", 0.05))
_CUTTING = ("crop", "rotate")
_COMPRESSING = ("jpeg", "webp", "avif")


@dataclass(frozen=True)
class Delivered:
    """An image as it arrives.

    Attributes:
        data: The file's bytes.
        suffix: Its ending.
        pixels_HWC: The decoded image, uint8.
        masks: Where its masks lie now.
        steps: What happened to it; empty if nothing did.
    """

    data: bytes
    suffix: str
    pixels_HWC: Array
    masks: dict[str, Array]
    steps: tuple[Step, ...]


def draw_frame(rng: Generator) -> Step | None:
    """Draws the crop that gives an image its shape; None leaves it whole."""
    shares = rng.uniform(0, WIDEST_FRAME, 2)
    lean = rng.uniform(0.5, 1, 2)
    flat = rng.random() < 0.5
    if rng.random() >= FRAMED_SHARE:
        return None
    across, along = shares * (0.3, 1.0) if flat else shares * (1.0, 0.3)
    cut = [across * lean[0], along * lean[1], across, along]
    return Step("crop", dict(zip(("left", "top", "right", "bottom"), (round(float(x), 4) for x in cut), strict=True)))


def draw_chain(rng: Generator) -> tuple[Step, ...]:
    """Draws one to four steps; only compression occurs more than once."""
    names: list[str] = []
    for _ in range(int(rng.integers(1, LONGEST_CHAIN + 1))):
        left = [name for name in _DRAWS if name not in names or name in _COMPRESSING]
        weights = np.array([_DRAWS[name][0] for name in left])
        names.append(left[int(np.searchsorted(np.cumsum(weights / weights.sum()), rng.random()))])
    return tuple(Step(name, _DRAWS[name][1](rng)) for name in names)


def deliver(pixels_HWC: Array, data: bytes, suffix: str, masks: Mapping[str, Array], rng: Generator) -> Delivered:
    """Sends an image on its way.

    Args:
        pixels_HWC: The image in its first file, uint8.
        data: That file's bytes.
        suffix: Its ending.
        masks: Masks by name, bool, shape (H, W).
        rng: Decides all.
    """
    touched, steps = rng.random() >= UNTOUCHED_SHARE, draw_chain(rng)
    if not touched:
        return Delivered(data, suffix, pixels_HWC, dict(masks), ())
    image, moved = apply_steps(Image.fromarray(pixels_HWC), steps, masks)
    data, suffix = _save(image, rng)
    return Delivered(data, suffix, np.asarray(decode(data)), moved, steps)


def is_cut(steps: Sequence[Step]) -> bool:
    """Whether something of what the image showed may be lost."""
    return any(step.name in _CUTTING for step in steps)


def unsure_attributes(steps: Sequence[Step]) -> set[str]:
    """Returns the authentic attributes that can no longer be claimed of a real image after some steps."""
    unsure = {"High Image Quality"} if steps else set()
    names = {step.name for step in steps}
    if names & {"resize", "screenshot", "rotate", "blur", "sharpen", "noise", *_COMPRESSING}:
        unsure.add("Natural and Consistent Image Texture")
    if names & {"sharpen", "letterbox", "screenshot", *_COMPRESSING}:
        unsure.add("Smooth and Natural Image Edges")
    if is_cut(steps):
        unsure.add("Semantic Rationality")
    return unsure


def _save(image: Image.Image, rng: Generator) -> tuple[bytes, str]:
    """Saves in one of the usual formats."""
    chosen = int(np.searchsorted(np.cumsum([share for _, _, share in _FILES]), rng.random()))
    format, suffix, _ = _FILES[min(chosen, len(_FILES) - 1)]
    quality, subsampling = int(rng.integers(60, 98)), int(rng.integers(2)) * 2
    settings: dict[str, dict[str, Any]] = {
        "JPEG": {"quality": quality, "subsampling": subsampling},
        "PNG": {"compress_level": 3},
        "WEBP": {"quality": quality},
        "AVIF": {"quality": quality},
    }
    return encode(image, format, **settings[format]), suffix


# --- values of each step


def _uniform(rng: Generator, low: float, high: float) -> float:
    return round(float(rng.uniform(low, high)), 3)


def _kernel(rng: Generator) -> str:
    return _KERNELS[int(rng.integers(len(_KERNELS)))]


def _draw_resize(rng: Generator) -> dict[str, Any]:
    return {"factor": round(2.0 ** float(rng.uniform(-1.2, 1)), 3), "kernel": _kernel(rng)}


def _draw_crop(rng: Generator) -> dict[str, Any]:
    return {name: _uniform(rng, 0, 0.06) for name in ("left", "top", "right", "bottom")}


def _draw_rotate(rng: Generator) -> dict[str, Any]:
    degrees = _uniform(rng, 0.3, 4) * (1 if rng.random() < 0.5 else -1)
    return {"degrees": degrees, "kernel": "bicubic" if rng.random() < 0.5 else "bilinear"}


def _draw_letterbox(rng: Generator) -> dict[str, Any]:
    bars = {name: _uniform(rng, 0.04, 0.2) for name in (("left", "right") if rng.random() < 0.5 else ("top", "bottom"))}
    return {**bars, "grey": (0, 255, int(rng.integers(256)))[int(rng.integers(3))]}


def _draw_screenshot(rng: Generator) -> dict[str, Any]:
    return {
        "factor": _uniform(rng, 0.6, 1.3),
        "margin": _uniform(rng, 0, 0.1),
        "bar": _uniform(rng, 0.04, 0.12),
        "grey": int(rng.integers(256)),
        "kernel": _kernel(rng),
    }


def _draw_jpeg(rng: Generator) -> dict[str, Any]:
    return {"quality": int(rng.integers(40, 96)), "subsampling": int(rng.integers(3))}


def _draw_webp(rng: Generator) -> dict[str, Any]:
    return {"quality": int(rng.integers(50, 96))}


def _draw_avif(rng: Generator) -> dict[str, Any]:
    return {"quality": int(rng.integers(45, 91))}


def _draw_blur(rng: Generator) -> dict[str, Any]:
    return {"sigma": _uniform(rng, 0.3, 1.2)}


def _draw_sharpen(rng: Generator) -> dict[str, Any]:
    return {"sigma": _uniform(rng, 0.6, 1.5), "amount": _uniform(rng, 0.2, 1)}


def _draw_noise(rng: Generator) -> dict[str, Any]:
    # Up to strong noise: a detector that has seen no real image with it takes it for the grain of a generator.
    return {"sigma": round(12 ** float(rng.random()), 3), "seed": int(rng.integers(1 << 31))}


_DRAWS: dict[str, tuple[float, Any]] = {
    "resize": (0.18, _draw_resize),
    "crop": (0.1, _draw_crop),
    "rotate": (0.06, _draw_rotate),
    "letterbox": (0.05, _draw_letterbox),
    "screenshot": (0.05, _draw_screenshot),
    "blur": (0.08, _draw_blur),
    "sharpen": (0.08, _draw_sharpen),
    "noise": (0.08, _draw_noise),
    "jpeg": (0.2, _draw_jpeg),
    "webp": (0.09, _draw_webp),
    "avif": (0.03, _draw_avif),
}
"""Share of each step, and what draws its values."""
