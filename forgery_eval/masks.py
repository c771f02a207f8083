"""Masks on disk: which pixels a system calls forged, as grey PNG files beside the records that name them."""

import hashlib
import io
import os
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from llava.files import atomic_write

FOLDER = "masks"
_ENDING = ".png"
_LONGEST_NAME = 200
"""Bytes of a name that every file system takes, an ending added."""


def write_mask(folder: Path, run: str, name: str, mask: np.ndarray) -> str:
    """Writes a mask as an 8-bit grey PNG: 255 where it is surely forged, 0 where it is surely not.

    Args:
        folder: Where the records lie that name the mask.
        run: Of the records; masks of different runs must not overwrite each other.
        name: Of the image, as its record gives it.
        mask: ``[height, width]``, bool or in 0..1.

    Returns:
        The file's path relative to ``folder``.

    Raises:
        FileError: It cannot be written.
    """
    values = np.asarray(mask, dtype=np.float32)
    if values.ndim != 2 or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"{name}: a mask must have two dimensions and values in 0..1, not shape {values.shape}")
    stream = io.BytesIO()
    Image.fromarray((values * 255).round().astype(np.uint8)).save(stream, format="PNG")
    path = PurePosixPath(FOLDER, run, mask_name(name))
    atomic_write(folder / path, stream.getvalue())
    return str(path)


def mask_name(name: str) -> PurePosixPath:
    """Returns a relative path for an image's mask that never leads out of its folder: readable, or else a digest."""
    inside = PurePosixPath(name)
    parts = ("root", *inside.parts[1:]) if inside.is_absolute() else inside.parts
    if not parts or str(inside) != name or not all(map(_is_plain, parts)):
        return PurePosixPath(hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest() + _ENDING)
    return PurePosixPath(*parts[:-1], parts[-1] + _ENDING)


def _is_plain(part: str) -> bool:
    """Whether a part of a path is a name that every file system takes."""
    try:
        return part != ".." and not set(part) & set("\\:\0") and len(os.fsencode(part)) <= _LONGEST_NAME
    except UnicodeEncodeError:
        return False


def scaled_map(attention: np.ndarray) -> np.ndarray:
    """Returns a map of any scale as values in 0..1, 0 where it is least."""
    low, high = float(attention.min()), float(attention.max())
    return np.zeros_like(attention) if high <= low else (attention - low) / (high - low)


def read_mask(folder: Path, path: str) -> Image.Image | None:
    """Opens a mask that a record names; None for one outside the records' folder, or that cannot be read."""
    file = (folder / path).resolve()
    if not path or not file.is_relative_to(folder.resolve()):
        return None
    try:
        with Image.open(file) as mask:
            return mask.convert("L")
    except Exception:  # Pillow's plugins raise many kinds; the page does without a mask that cannot be read
        return None
