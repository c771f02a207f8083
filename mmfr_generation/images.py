"""Images on disk: which files are images, what they hold, and which look alike."""

import io
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from llava.errors import UserError
from llava.labels import Label

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".pgm"}
)
MEDIA_TYPES = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "MPO": "image/jpeg",
    "WEBP": "image/webp",
    "GIF": "image/gif",
}
"""Media type of each format that the chat API takes, by Pillow's name; an MPO file is a JPEG with an appendix."""

CLASS_FOLDERS: dict[str, Label] = {
    "real": "real",
    "0_real": "real",
    "fake": "fake",
    "1_fake": "fake",
}
"""What the name of a folder says of the images below it."""
PUBLISHED_FOLDERS: dict[str, Label] = {"laion": "real", "diffusiondb": "fake"}
"""The same for folders of the published training data, where no other folder says it."""

_HASH_SIDE = 8
_DCT_SIDE = 32
_FLAT = 2.0


class UnreadableImage(ValueError):
    """A file that is no image, is damaged, or is too large to open; the text says which."""


@dataclass(frozen=True)
class EncodedImage:
    """An image as it is sent.

    Attributes:
        media_type: For example ``image/png``; read from the content, not from the file's name.
        data: The encoded bytes: those of the file itself if the API takes its format, else a PNG of the first frame.
        width: In pixels.
        height: In pixels.
    """

    media_type: str
    data: bytes
    width: int
    height: int


def list_images(folder: Path) -> Iterator[str]:
    """Yields the path, relative to ``folder`` and with ``/``, of every file below it that is an image, sorted.

    A file counts as an image if its name ends like one, so that damaged images are met later and not passed over,
    or if its content is one whatever its name. Hidden files and folders are left out.

    Raises:
        UserError: There is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            if not name.startswith(".") and (path.suffix.lower() in IMAGE_SUFFIXES or _looks_like_image(path)):
                yield path.relative_to(folder).as_posix()


def _looks_like_image(path: Path) -> bool:
    try:
        with open_image(path):
            return True
    except UnreadableImage:
        return False


def open_image(path: Path) -> Image.Image:
    """Opens an image without decoding its pixels.

    Raises:
        UnreadableImage: The file cannot be read or is no image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(path)
    except Exception as error:
        raise UnreadableImage(_describe(error)) from error


def load_image(path: Path) -> Image.Image:
    """Opens an image and decodes it whole, which finds damage; the file is closed again.

    Raises:
        UnreadableImage: The file cannot be read, is no image, or is damaged.
    """
    with open_image(path) as image:
        try:
            image.load()
            return image.copy()
        except Exception as error:
            raise UnreadableImage(_describe(error)) from error


def encode_image(path: Path) -> EncodedImage:
    """Reads an image and gives it in a format that the chat API takes.

    Raises:
        UnreadableImage: The file cannot be read, is no image, or is damaged.
    """
    with open_image(path) as image:
        try:
            image.load()
            media_type = MEDIA_TYPES.get(image.format or "")
            moving = image.format != "MPO" and getattr(image, "n_frames", 1) > 1
            if media_type and not moving:
                return EncodedImage(media_type, path.read_bytes(), *image.size)
            if image.mode not in {"L", "LA", "RGB", "RGBA", "P", "1", "I;16"}:
                image = image.convert("RGB")
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            return EncodedImage(MEDIA_TYPES["PNG"], buffer.getvalue(), *image.size)
        except Exception as error:
            raise UnreadableImage(_describe(error)) from error


def _describe(error: Exception) -> str:
    # Pillow's decoders raise nearly any exception on damaged input, and some of them carry the path or no text at all.
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is not an image, or of an unknown format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def label_from_folders(path: str) -> Label | None:
    """Returns the class that the folders of a relative path name, or None if they name none or both."""
    return _label_from(path, CLASS_FOLDERS)


def published_label(path: str) -> Label | None:
    """Returns the class of an image by the folders of the published data, or None if they do not say."""
    folders = {name.lower() for name in path.split("/")[:-1]}
    return _label_from(path, CLASS_FOLDERS if folders & CLASS_FOLDERS.keys() else PUBLISHED_FOLDERS)


def _label_from(path: str, meanings: Mapping[str, Label]) -> Label | None:
    labels = {meanings[name.lower()] for name in path.split("/")[:-1] if name.lower() in meanings}
    return labels.pop() if len(labels) == 1 else None


def perceptual_hash(image: Image.Image) -> int | None:
    """Returns a 64-bit hash that hardly changes when an image is scaled or compressed again.

    Each bit says whether one of the 64 lowest frequencies of the grey image's cosine transform lies above their
    median. Mirrored, turned or cropped copies hash differently. A nearly uniform image has no hash (None).
    """
    grey = np.asarray(image.convert("L").resize((_DCT_SIDE, _DCT_SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    if grey.std() < _FLAT:
        return None
    steps = np.arange(_DCT_SIDE)
    cosines = np.cos(np.pi * np.outer(np.arange(1, _HASH_SIDE + 1), 2 * steps + 1) / (2 * _DCT_SIDE))
    frequencies = cosines @ grey @ cosines.T
    bits = (frequencies > np.median(frequencies)).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


_ONES = np.array([value.bit_count() for value in range(1 << 16)], dtype=np.uint8)
"""Number of set bits of every 16-bit number."""


def hamming_distances(hash_: int, others: np.ndarray) -> np.ndarray:
    """Returns in how many bits a hash differs from each of ``others`` (uint64)."""
    different = np.bitwise_xor(others, np.uint64(hash_))
    return _ONES[different.view(np.uint16).reshape(-1, 4)].sum(axis=1)
