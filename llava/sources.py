"""What a caller of the Python API may give for an image. Imports no torch.

A path (also with ``~`` or ``file://``), data URL, PIL image, numpy array, torch tensor, bytes, or file object.
"""

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import numpy as np
from PIL import Image

from llava.errors import ImageReadError
from llava.fetching import fetch_image
from llava.images import decode, load_image, open_bytes
from llava.tables import is_url

_MOST_BYTES = 1 << 30
"""What is read of a file object."""


def refuse_url(url: str) -> ImageReadError:
    """Returns the error for an address that nobody allowed to fetch."""
    whole = re.sub(r"^(https?:)/+", r"\1//", url, flags=re.IGNORECASE)  # a path has lost one of its slashes
    return ImageReadError(
        f"{whole}: addresses are not fetched; download the image and give its path (or forgery detect --allow-urls)"
    )


class EncodedSource:
    """An encoded image that is no file, read when it is needed, and once.

    Attributes:
        name: What messages and reports call it.
    """

    def __init__(self, name: str, read: Callable[[], bytes]) -> None:
        self.name = name
        self._read = read

    def __str__(self) -> str:
        return self.name

    @cached_property
    def content(self) -> bytes:
        """The encoded image."""
        return self._read()

    @property
    def content_if_read(self) -> bytes | None:
        """The encoded image if it was read, which is not tried again."""
        return vars(self).get("content")

    def read(self, size: int = -1) -> bytes:
        """Returns the content, at most ``size`` bytes of it: what ``load_source`` asks of a file object."""
        return self.content if size < 0 else self.content[:size]


def standard_input(stream: IO[bytes]) -> EncodedSource:
    """Returns the image on standard input, named by its content, so that a resumed run knows it again.

    Raises:
        ImageReadError: It cannot be read, or is too large.
    """
    content = _read_all(stream, "standard input")
    return EncodedSource(f"stdin-{hashlib.sha256(content).hexdigest()[:12]}", lambda: content)


def web_image(url: str, *, allowed: bool) -> EncodedSource:
    """Returns the image at an address, which is fetched when it is needed, or then refused if that is not allowed."""

    def read() -> bytes:
        if not allowed:
            raise refuse_url(url)
        return fetch_image(url)

    return EncodedSource(url, read)


def load_source(
    source: Any,
    *,
    apply_orientation: bool = True,
    apply_profile: bool = True,
    if_large: Callable[[], object] | None = None,
) -> Image.Image:
    """Returns any image as 8-bit RGB.

    Arrays are ``[H, W]`` or ``[H, W, C]``, tensors ``[H, W]`` or ``[C, H, W]`` (``[H, W, C]`` where only that can be
    meant), with 1, 3 or 4 channels, as uint8, bool, uint16, or floating point within 0..1. Alpha is dropped.

    Args:
        source: The image.
        apply_orientation: As for ``load_image``.
        apply_profile: As for ``load_image``.
        if_large: As for ``decode``.

    Raises:
        ImageReadError: It cannot be read, or is nothing that an image can be made of.
    """
    reading: dict[str, Any] = {
        "apply_orientation": apply_orientation,
        "apply_profile": apply_profile,
        "if_large": if_large,
    }
    if isinstance(source, Image.Image):
        return decode(source, "the given image", **reading)
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        if isinstance(text, str) and text[:5].lower() == "data:":
            return decode(open_bytes(_data_of(text), "the data URL"), "the data URL", **reading)
        return load_image(_path_of(text), **reading)
    if isinstance(source, bytes | bytearray | memoryview):
        return decode(open_bytes(bytes(source), "the given bytes"), "the given bytes", **reading)
    if callable(getattr(source, "read", None)):
        name = str(getattr(source, "name", "the given file object"))
        return decode(open_bytes(_read_all(source, name), name), name, **reading)
    if isinstance(source, np.ndarray):
        return _from_array(source, "array")
    if type(source).__module__.partition(".")[0] == "torch" and hasattr(source, "detach"):
        return _from_array(_channels_last(_tensor_values(source)), "tensor")
    raise ImageReadError(
        f"an image, its path, bytes, a file object, an array or a tensor is needed, not {type(source).__name__}"
    )


def _path_of(text: str | bytes) -> Path:
    name = os.fsdecode(text)
    if is_url(name):
        raise refuse_url(name)
    if name.lower().startswith("file://"):
        return Path(unquote(urlsplit(name).path))
    try:
        return Path(name).expanduser() if name.startswith("~") and not Path(name).exists() else Path(name)
    except (OSError, RuntimeError) as error:
        raise ImageReadError(f"{name}: {error}") from error


def _data_of(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise ImageReadError(f"the data URL {url[:40]!r} … has no comma before its data")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode("".join(unquote(body).split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageReadError(f"the data URL {url[:40]!r} … is no base64: {error}") from None


def _read_all(stream: Any, name: str) -> bytes:
    try:
        content = stream.read(_MOST_BYTES + 1)
    except ImageReadError:
        raise
    except (OSError, ValueError) as error:
        raise ImageReadError(f"{name}: it cannot be read: {error}") from error
    if not isinstance(content, bytes):
        raise ImageReadError(f"{name}: open it in binary mode, it gives {type(content).__name__}")
    if len(content) > _MOST_BYTES:
        raise ImageReadError(f"{name}: it has more than {_MOST_BYTES:,} bytes")
    return content


def _tensor_values(tensor: Any) -> np.ndarray:
    plain = tensor.detach().cpu()
    return np.asarray((plain.float() if plain.is_floating_point() else plain).numpy())


def _channels_last(values: np.ndarray) -> np.ndarray:
    channels = (1, 3, 4)
    if values.ndim == 3 and values.shape[0] in channels:
        return np.moveaxis(values, 0, -1)
    return values


def _from_array(values: np.ndarray, kind: str) -> Image.Image:
    shape = "×".join(map(str, values.shape))
    if values.ndim == 4:
        raise ImageReadError(f"the {kind} of {shape} is a batch; give its images one by one")
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[-1] not in (1, 3, 4)) or not values.size:
        layout = "[H, W, C]; transpose(1, 2, 0) moves the channels last" if kind == "array" else "[C, H, W]"
        raise ImageReadError(f"the {kind} of {shape} is no image: it must be [H, W] or {layout}")
    pixels = _eight_bits(values, kind)
    if pixels.ndim == 3:
        pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3]
    return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")


def _eight_bits(values: np.ndarray, kind: str) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype == np.uint16:
        return (values >> 8).astype(np.uint8)
    if not np.issubdtype(values.dtype, np.floating):
        raise ImageReadError(f"the {kind} is of {values.dtype}; it must be uint8, or floating point within 0..1")
    if not np.isfinite(values).all():
        raise ImageReadError(f"the {kind} holds values that are no numbers (NaN or infinite)")
    if values.min() < 0 or values.max() > 1:
        raise ImageReadError(
            f"the {kind} holds values from {values.min():.4g} to {values.max():.4g}; floating-point pixels must lie "
            "within 0..1 (divide by 255, or undo the normalisation)"
        )
    return np.rint(values.astype(np.float64) * 255).astype(np.uint8)
