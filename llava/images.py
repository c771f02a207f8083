"""Finding and opening images, the same for inference, evaluation, training and annotation. Imports no torch."""

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from llava.errors import DataError, FileError, ImageReadError, MissingFileError

_SUFFIXES = """
    apng avif avifs blp bmp bw cur dds dib fits gif icb icns ico im j2c j2k jfif jp2 jpc jpe jpeg jpf jpg jpx pbm pcx
    pfm pgm png pnm ppm psd qoi ras rgb rgba sgi tga tif tiff vda vst webp xbm xpm
"""
IMAGE_SUFFIXES = frozenset(f".{name}" for name in _SUFFIXES.split())
"""Endings of the formats that can be opened; in a folder, other files are no images."""

_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def list_images(path: Path) -> Iterator[Path]:
    """Yields the images of a file, a folder (with its subfolders, in order of name) or a ``.txt`` list.

    Relative names in a list are relative to the list's folder. A file or a list's entry is taken whatever its ending.
    A subfolder that may not be read is yielded itself, so that whoever opens it can say so.

    Raises:
        MissingFileError: The path does not exist.
        DataError: A folder or list holds no image.
    """
    if path.is_dir():
        yield from _at_least_one(walk_images(path), f"{path} and its subfolders hold no image")
    elif path.suffix.lower() == ".txt" and path.is_file():
        yield from _at_least_one(_read_list(path), f"{path} lists no image")
    elif path.exists():
        yield path
    else:
        raise MissingFileError(f"there is no file or folder {path}")


def walk_images(folder: Path, *, sniff: bool = False) -> Iterator[Path]:
    """Yields the images below a folder by their endings, sorted by path; links to folders are followed once.

    Hidden files and folders are left out. Subfolders that may not be read are yielded last.

    Args:
        folder: Where to begin.
        sniff: Whether to open each file with another ending too, and to take it if its content is an image.
    """
    unread: list[Path] = []
    yield from sorted(_walk(folder, unread, set(), sniff))
    yield from sorted(unread)


def _walk(folder: Path, unread: list[Path], visited: set[tuple[int, int]], sniff: bool) -> Iterator[Path]:
    try:
        status = folder.stat()
        if (status.st_dev, status.st_ino) in visited:  # a link that leads back
            return
        visited.add((status.st_dev, status.st_ino))
        entries = list(os.scandir(folder))
    except OSError:
        unread.append(folder)
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(folder / entry.name, unread, visited, sniff)
        elif Path(entry.name).suffix.lower() in IMAGE_SUFFIXES or (sniff and _opens(folder / entry.name)):
            yield folder / entry.name


def _opens(file: Path) -> bool:
    try:
        with open_image(file):
            return True
    except ImageReadError:
        return False


def _read_list(path: Path) -> Iterator[Path]:
    # Names need not be UTF-8: what is not stands for its bytes, as in every path.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for line in lines:
            if line.strip():
                yield path.parent / line.strip()


def _at_least_one(files: Iterable[Path], complaint: str) -> Iterator[Path]:
    empty = True
    for file in files:
        empty = False
        yield file
    if empty:
        raise DataError(complaint)


@contextmanager
def image_errors(file: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what a decoder raises inside the block, which can be nearly any exception, into an ``ImageReadError``."""
    try:
        yield
    except Exception as error:
        raise _read_error(file, error) from error


def open_image(file: str | os.PathLike[str]) -> Image.Image:
    """Opens an image without decoding its pixels.

    Raises:
        ImageReadError: The file is missing, is no image, or its header is damaged.
    """
    if not isinstance(file, (str, os.PathLike)):
        raise ImageReadError(f"an image or its path is needed, not {type(file).__name__}")
    with image_errors(file), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # large images are refused by an error, smaller ones are welcome
        path = Path(file)
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ImageReadError(f"{file}: a pipe or a device, not a file")
        if path.is_file() and path.stat().st_size == 0:
            raise ImageReadError(f"{file}: the file is empty")
        return Image.open(path)


def load_image(file: str | os.PathLike[str], *, apply_orientation: bool = True) -> Image.Image:
    """Opens an image as 8-bit RGB.

    Alpha is dropped, 16 bits are scaled to 8, and the first frame of an animation is taken.

    Args:
        file: Path of the image.
        apply_orientation: Whether the EXIF orientation is applied.

    Raises:
        ImageReadError: The file is missing, is no image, is damaged, too large, or has floating-point pixels.
    """
    with open_image(file) as image, image_errors(file):
        image.seek(0)
        image.load()
        if image.mode == "F":
            raise ImageReadError(
                f"{file}: its pixels are floating-point numbers, and nothing says which of them is white; "
                "save it with 8 or 16 bits"
            )
        return to_rgb(ImageOps.exif_transpose(image) if apply_orientation else image)


def _read_error(file: str | os.PathLike[str], error: Exception) -> ImageReadError:
    """Says in one way what Pillow and its plugins, which raise many kinds of exceptions, found wrong with a file."""
    if isinstance(error, ImageReadError):
        return error
    if isinstance(error, FileError):
        return ImageReadError(str(error))
    if isinstance(error, FileNotFoundError):
        return ImageReadError(f"{file}: there is no such file")
    if isinstance(error, Image.UnidentifiedImageError):
        return ImageReadError(f"{file}: no image in a known format")
    if isinstance(error, OSError):
        return ImageReadError(f"{file}: {error.strerror or error}")
    if isinstance(error, MemoryError):
        return ImageReadError(f"{file}: not enough memory for its pixels")
    return ImageReadError(f"{file}: {type(error).__name__}: {error}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any image to 8-bit RGB: alpha is dropped, 16 bits are scaled to 8."""
    if image.mode in _SIXTEEN_BIT_MODES:
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")
