"""Images as pages and programs take them: previews, maps of attention, masks. Imports no torch."""

import base64
import io

import numpy as np
from PIL import Image

SIDE = 1024
"""Longest side of what is drawn, in pixels."""


def preview_jpeg(image: Image.Image) -> bytes:
    """Returns an RGB image as JPEG, shrunk if it is larger than a page needs."""
    shown = image.copy()
    shown.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return _encoded(shown, "JPEG", quality=85)


def attention_png(attention: np.ndarray) -> bytes:
    """Returns where the model looked as grey PNG, black where least and white where most.

    Args:
        attention: ``[height, width]`` of the image, any scale.
    """
    values = _shrunk(attention)
    low, high = float(values.min()), float(values.max())
    relative = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return _grey(relative)


def mask_png(mask: np.ndarray) -> bytes:
    """Returns which pixels are forged as grey PNG, white where surely, black where surely not.

    Args:
        mask: ``[height, width]`` of the image, bool or in 0..1.
    """
    return _grey(_shrunk(mask))


def data_url(content: bytes, kind: str) -> str:
    """Returns an encoded image (``png``, ``jpeg``) as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _shrunk(values: np.ndarray) -> np.ndarray:
    plain = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    plain.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(plain)


def _grey(values: np.ndarray) -> bytes:
    return _encoded(Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8)), "PNG")


def _encoded(image: Image.Image, format_name: str, **settings: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format_name, **settings)
    return stream.getvalue()
