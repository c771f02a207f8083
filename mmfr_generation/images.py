"""What annotation needs of images: their encoding for the API, and near-duplicates."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from llava.cli import inform
from llava.errors import FileError, MissingFileError
from llava.images import describe_passed_over, image_errors, open_image, to_rgb, walk_images

MEDIA_TYPES = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "MPO": "image/jpeg",
    "WEBP": "image/webp",
    "GIF": "image/gif",
}
"""Media type of each format that the chat API takes, by Pillow's name; an MPO file is a JPEG with an appendix."""

_PNG_MODES = frozenset({"L", "LA", "RGB", "RGBA", "P", "1", "I;16"})

_HASH_SIDE = 8
_DCT_SIDE = 32
_FLAT = 2.0
_THUMB_SIDE = 16


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


def list_images(folder: Path) -> list[str]:
    """Returns the path, relative to ``folder`` and with ``/``, of every file below it that is an image, sorted.

    A file counts as an image if its name ends like one, so that damaged images are met later and not passed over,
    or if its content is one whatever its name. Hidden files and folders are left out; other files are named to the
    user.

    Raises:
        MissingFileError: There is no such folder.
    """
    if not folder.is_dir():
        raise MissingFileError(f"there is no folder {folder}")
    others: list[Path] = []
    images = [path.relative_to(folder).as_posix() for path in walk_images(folder, sniff=True, passed_over=others)]
    if others:
        inform(f"{folder}: {describe_passed_over(others)}")
    return images


def encode_image(path: Path) -> EncodedImage:
    """Reads an image and gives it in a format that the chat API takes.

    Raises:
        ImageReadError: The file cannot be read, is no image, or is damaged.
    """
    with open_image(path) as image, image_errors(path):
        image.load()
        media_type = MEDIA_TYPES.get(image.format or "")
        animated = image.format != "MPO" and getattr(image, "n_frames", 1) > 1
        if media_type and not animated:
            return EncodedImage(media_type, path.read_bytes(), *image.size)
        first = image if image.mode in _PNG_MODES else to_rgb(image)
        buffer = io.BytesIO()
        first.save(buffer, "PNG")
        return EncodedImage(MEDIA_TYPES["PNG"], buffer.getvalue(), *first.size)


def read_reason(error: FileError, path: Path) -> str:
    """Returns why an image cannot be read, without its path."""
    return str(error).removeprefix(f"{path}: ")


def perceptual_hash(image: Image.Image) -> int | None:
    """Returns a 64-bit hash that hardly changes when an image is scaled or compressed again.

    Each bit says whether one of the 64 lowest frequencies of the grey image's cosine transform lies above their
    median. Mirrored, turned or cropped copies hash differently. A nearly uniform image has no hash (None).
    """
    grey = np.asarray(image.convert("L").resize((_DCT_SIDE, _DCT_SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    if grey.std() < _FLAT:
        return None
    steps = np.arange(_DCT_SIDE)
    # Rows 1 to 8 of the DCT-II; row 0, the mean, is left out, so that brightness does not matter.
    cosines = np.cos(np.pi * np.outer(np.arange(1, _HASH_SIDE + 1), 2 * steps + 1) / (2 * _DCT_SIDE))
    frequencies = cosines @ grey @ cosines.T
    # Against the median, half of the bits are set whatever the contrast.
    bits = (frequencies > np.median(frequencies)).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def thumbnail(image: Image.Image) -> np.ndarray:
    """Returns a grey image of 16 x 16 pixels as 256 numbers of mean 0 and length 1; zeros for a uniform image."""
    grey = np.asarray(image.convert("L").resize((_THUMB_SIDE, _THUMB_SIDE), Image.Resampling.BOX), dtype=np.float32)
    centred = grey.ravel() - grey.mean()
    length = float(np.linalg.norm(centred))
    return centred / length if length > 0 else centred


_ONES = np.array([value.bit_count() for value in range(1 << 16)], dtype=np.uint8)
"""Number of set bits of every 16-bit number."""


def hamming_distances(hash_: int, others: np.ndarray) -> np.ndarray:
    """Returns in how many bits a hash differs from each of ``others`` (uint64)."""
    # Four 16-bit pieces a hash, each looked up in a table: numpy counts bits itself only from version 2 on.
    different = np.bitwise_xor(others, np.uint64(hash_))
    return _ONES[different.view(np.uint16).reshape(-1, 4)].sum(axis=1)
