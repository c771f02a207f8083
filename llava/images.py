"""Finding and opening images, the same for inference, evaluation, training and annotation. Imports no torch."""

import io
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np
import pillow_heif
from PIL import Image, ImageCms, ImageOps

from llava.errors import DataError, FileError, ImageReadError, MissingFileError
from llava.frames import is_frame, read_frame
from llava.tables import LIST_SUFFIXES, read_names

_SUFFIXES = """
    apng avif avifs blp bmp bw cur dds dib fits gif heic heics heif heifs hif icb icns ico im j2c j2k jfif jp2 jpc jpe
    jpeg jpf jpg jpx pbm pcx pfm pgm png pnm ppm psd qoi ras rgb rgba sgi tga tif tiff vda vst webp xbm xpm
"""
_JPEG_XL_PLUGIN = "pillow_jxl"
pillow_heif.register_heif_opener()
if find_spec(_JPEG_XL_PLUGIN):
    import_module(_JPEG_XL_PLUGIN)
    _SUFFIXES += " jxl"
IMAGE_SUFFIXES = frozenset(f".{name}" for name in _SUFFIXES.split())
"""Endings of the formats that can be opened; in a folder, other files are no images."""
_LITTER = frozenset(
    {"thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "__macosx", "$recycle.bin"}
)
"""What file systems leave lying, in lower case, beside what begins with a dot."""

_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_SAMPLE_FORMAT_TAG, _UNSIGNED = 339, 1
_PLANES_TAG, _SEPARATE = 284, 2
_BITS_TAG = 258


# --- finding


def list_images(path: Path, passed_over: list[Path] | None = None) -> Iterator[Path]:
    """Yields the images of a file, a folder (with its subfolders, in order of name), a ``.txt`` list or a table.

    Relative names in a list are relative to the list's folder. A file or a list's entry is taken whatever its ending.
    A subfolder that may not be read is yielded itself, so that whoever opens it can say so.

    Args:
        path: The file or folder.
        passed_over: Takes each file of a folder that is no image, see ``walk_images``.

    Raises:
        MissingFileError: The path does not exist.
        DataError: A folder or list holds no image.
    """
    if path.is_dir():
        others: list[Path] = [] if passed_over is None else passed_over
        found = False
        for file in walk_images(path, passed_over=others):
            found = True
            yield file
        if not found:
            reason = f"; {describe_passed_over(others)}" if others else ""
            raise DataError(f"{path} and its subfolders hold no image{reason}")
    elif path.suffix.lower() in LIST_SUFFIXES and path.is_file():
        yield from _at_least_one(read_names(path), f"{path} lists no image")
    elif path.exists():
        yield path
    else:
        raise MissingFileError(f"there is no file or folder {path}")


def describe_passed_over(files: Sequence[Path], limit: int = 5) -> str:
    """Says how many files of a folder are no images, of which endings, and names the first of them."""
    endings = Counter(file.suffix.lower() or "no ending" for file in files)
    kinds = ", ".join(f"{count} {ending}" for ending, count in endings.most_common())
    named = ", ".join(file.name for file in files[:limit]) + (" …" if len(files) > limit else "")
    return f"passed over, no image: {len(files)} files ({kinds}): {named}"


def walk_images(folder: Path, *, sniff: bool = False, passed_over: list[Path] | None = None) -> Iterator[Path]:
    """Yields the images below a folder by their endings, sorted by path.

    Links to folders are followed wherever they stand, except those that lead back up; a link below a link is followed
    once, so that a walk ends whatever the links. Hidden files and folders, and what file systems leave lying
    (``Thumbs.db``), are left out. Subfolders that may not be read are yielded last.

    Args:
        folder: Where to begin.
        sniff: Whether to open each file with another ending too, and to take it if its content is an image.
        passed_over: Takes each other file, sorted by path.
    """
    unread: list[Path] = []
    others: list[Path] = []
    yield from _walk(folder, frozenset(), None, (unread, others), sniff)
    yield from sorted(unread)
    if passed_over is not None:
        passed_over.extend(sorted(others))


_FILE, _FOLDER, _LINK = "file", "folder", "link"
_Folder = tuple[int, int]
"""Device and inode."""


def _walk(
    folder: Path,
    above: frozenset[_Folder],
    linked: set[_Folder] | None,
    notes: tuple[list[Path], list[Path]],
    sniff: bool,
) -> Iterator[Path]:
    """Yields images in order of path, as they are found.

    Args:
        folder: Where to begin.
        above: The folders above it, as they were walked.
        linked: The folders that were walked below the link that led here; None where none did.
        notes: Take folders that cannot be read, and files that are no images.
        sniff: As for ``walk_images``.
    """
    unread, others = notes
    try:
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        if here in above or (linked is not None and here in linked):
            return
        if linked is not None:
            linked.add(here)
        listing = _listing(folder)
    except OSError:
        unread.append(folder)
        return
    for line in listing:
        name, kind = line.split("\0")
        if name.startswith(".") or name.lower() in _LITTER:
            continue
        path = folder / name
        # Where links lead is asked when they are reached: of a million links, that takes long.
        if kind == _FOLDER or (kind == _LINK and _is_folder(path)):
            below = set[_Folder]() if linked is None and kind == _LINK else linked
            yield from _walk(path, above | {here}, below, notes, sniff)
        elif path.suffix.lower() in IMAGE_SUFFIXES or (sniff and _opens(path)):
            yield path
        else:
            others.append(path)


def _listing(folder: Path) -> list[str]:
    """The names in a folder, sorted, each with a zero and its kind; a million entries or pairs would be large."""
    with os.scandir(folder) as scan:
        return sorted(f"{entry.name}\0{_kind(entry)}" for entry in scan)


def _kind(entry: "os.DirEntry[str]") -> str:
    if entry.is_symlink():
        return _LINK
    return _FOLDER if entry.is_dir(follow_symlinks=False) else _FILE


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a link to itself: whoever opens it says so
        return False


def _opens(file: Path) -> bool:
    try:
        with open_image(file):
            return True
    except ImageReadError:
        return False


def _at_least_one(files: Iterable[Path], complaint: str) -> Iterator[Path]:
    empty = True
    for file in files:
        empty = False
        yield file
    if empty:
        raise DataError(complaint)


# --- opening


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
    with image_errors(file):
        path = Path(file)
        if is_frame(path):
            return read_frame(path)
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ImageReadError(f"{file}: a pipe or a device, not a file")
        if path.is_file() and path.stat().st_size == 0:
            raise ImageReadError(f"{file}: the file is empty")
        return _open(path)


def open_bytes(
    content: bytes, name: str, *, formats: tuple[str, ...] | None = None, most_pixels: int | None = None
) -> Image.Image:
    """Opens an encoded image without decoding its pixels.

    Args:
        content: The file's bytes.
        name: Stands in messages.
        formats: Pillow's names of the formats that are taken; None takes all.
        most_pixels: Larger images are refused; None leaves that to Pillow.

    Raises:
        ImageReadError: It is no image of these formats, it is too large, or its header is damaged.
    """
    with image_errors(name):
        if not content:
            raise ImageReadError(f"{name}: it is empty")
        image = _open(io.BytesIO(content), formats, most_pixels)
        _check_pixels(image.width * image.height, most_pixels)
        return image


class PixelLimitError(ImageReadError):
    """An image has more pixels than are taken."""


def _check_pixels(pixels: int, most: int | None) -> None:
    if most is not None and pixels > most:
        raise PixelLimitError(f"it has {pixels:,} pixels, and at most {most:,} are taken")


def _open(
    source: Path | IO[bytes], formats: tuple[str, ...] | None = None, most_pixels: int | None = None
) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # large images are refused by an error, smaller ones are welcome
        try:
            image = Image.open(source, formats=formats)
        except Image.UnidentifiedImageError:
            if _tiff_start(source) in _TIFF_STARTS and (formats is None or "TIFF" in formats):
                return _open_odd_tiff(source, most_pixels)
            raise
        return _open_odd_tiff(source, most_pixels) if _is_deep_and_planar(image) else image


def _is_deep_and_planar(image: Image.Image) -> bool:
    """Whether it is a TIFF with a plane of more than 8 bits for each channel, which Pillow decodes wrongly."""
    tags = getattr(image, "tag_v2", {})
    return tags.get(_PLANES_TAG) == _SEPARATE and max(tags.get(_BITS_TAG, (8,))) > 8


def _tiff_start(source: Path | IO[bytes]) -> bytes:
    if isinstance(source, Path):
        with source.open("rb") as stream:
            return stream.read(4)
    source.seek(0)
    return source.read(4)


def _open_odd_tiff(source: Path | IO[bytes], most_pixels: int | None = None) -> Image.Image:
    """Opens the first page of a TIFF whose samples Pillow has no mode for: more than four, or of 16 and 32 bits.

    The first three samples are taken for red, green and blue, or the first alone for grey where there are fewer.
    """
    import tifffile

    if not isinstance(source, Path):
        source.seek(0)
    with tifffile.TiffFile(source) as file:
        page: Any = file.pages[0]
        # Its pixels are decoded here, so they are counted before, by all their bytes.
        _check_pixels(page.imagelength * page.imagewidth, most_pixels)
        _check_pixels(page.nbytes // 16, most_pixels)
        most = 2 * (Image.MAX_IMAGE_PIXELS or 1 << 28)
        if page.imagelength * page.imagewidth * page.imagedepth > most or page.nbytes > 4 * most:
            raise Image.DecompressionBombError(f"{page.imagelength * page.imagewidth} pixels are more than {most}")
        values = np.asarray(page.asarray())
    if values.ndim == 3 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
        values = np.moveaxis(values, 0, -1)
    if values.ndim not in (2, 3) or not values.size:
        raise ImageReadError(f"its samples have the shape {values.shape}, which is no image")
    if not np.issubdtype(values.dtype, np.integer) and values.dtype != bool:
        raise ImageReadError(_FLOATING)
    grey = values if values.ndim == 2 else values[..., 0]
    samples = values[..., :3] if values.ndim == 3 and values.shape[-1] >= 3 else grey
    shift = 8 * (values.dtype.itemsize - 1)
    if values.dtype.itemsize > 2:
        return Image.fromarray(_fit_eight_bits(samples))
    if np.issubdtype(values.dtype, np.signedinteger):
        samples = samples.astype(np.int64) - np.iinfo(values.dtype).min
    return Image.fromarray((samples >> shift).astype(np.uint8))


LARGE = 1 << 25
"""Pixels above which an image takes so much memory that few should be held at a time."""
_FLOATING = "its pixels are floating-point numbers, and nothing says which of them is white; save it with 8 or 16 bits"


def load_image(
    file: str | os.PathLike[str],
    *,
    apply_orientation: bool = True,
    apply_profile: bool = True,
    if_large: Callable[[], object] | None = None,
) -> Image.Image:
    """Opens an image as 8-bit RGB.

    Alpha is dropped, 16 bits are scaled to 8, and the first frame of an animation is taken.

    Args:
        file: Path of the image.
        apply_orientation: Whether the EXIF orientation is applied.
        apply_profile: Whether the colours are converted to sRGB by the image's profile.
        if_large: As for ``decode``.

    Raises:
        ImageReadError: The file is missing, is no image, is damaged, too large, or has floating-point pixels.
    """
    with open_image(file) as image:
        reading: dict[str, Any] = {"apply_orientation": apply_orientation, "apply_profile": apply_profile}
        return decode(image, file, **reading, if_large=if_large)


def decode(
    image: Image.Image,
    name: str | os.PathLike[str],
    *,
    apply_orientation: bool = True,
    apply_profile: bool = True,
    if_large: Callable[[], object] | None = None,
) -> Image.Image:
    """Decodes an opened image as ``load_image`` does; ``name`` stands in messages.

    ``if_large`` is called before an image of more than ``LARGE`` pixels is decoded.
    """
    with image_errors(name):
        if if_large is not None and image.width * image.height > LARGE:
            if_large()
        if getattr(image, "is_animated", False):
            image.seek(0)
        image.load()
        if image.mode == "F":
            raise ImageReadError(_FLOATING)
        profile = image.info.get("icc_profile") if apply_profile else None
        turned = ImageOps.exif_transpose(_without_wide_samples(image)) if apply_orientation else image
        decoded = to_rgb(_to_srgb(turned, profile) if profile else turned)
        # What was applied, or asked not to be, is not applied again by whoever gets this image.
        decoded = decoded.copy() if decoded is image else decoded
        decoded.info = {}
        decoded.getexif().clear()
        return decoded


def _without_wide_samples(image: Image.Image) -> Image.Image:
    """Returns an image whose 32-bit integers, which stand in no known range, are scaled to 8 bits."""
    if image.mode != "I" or image.format != "TIFF":
        return image
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if tags.get(_SAMPLE_FORMAT_TAG, (_UNSIGNED,)) in (_UNSIGNED, (_UNSIGNED,)):
        values = values.view(np.uint32)
    scaled = Image.fromarray(_fit_eight_bits(values))
    scaled.info = dict(image.info)
    exif = image.getexif()
    scaled.info["exif"] = exif.tobytes() if exif else b""
    return scaled


def _fit_eight_bits(values: np.ndarray) -> np.ndarray:
    """Scales integers of unknown range: to 8 bits as they are, else from the fewest whole bits that hold all."""
    wide = values.astype(np.int64)
    wide -= min(0, int(wide.min()))
    bits = int(wide.max()).bit_length()
    # 9 to 16 bits count as 16, like all images that are said to have 16.
    shift = 0 if bits <= 8 else max(bits, 16) - 8
    return (wide >> shift).astype(np.uint8)


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Converts colours by a profile; one that is damaged, or of other colours than the image's, is as good as none."""
    flat = image if image.mode in ("L", "RGB", "CMYK", "LAB") else to_rgb(image)
    if image.mode == "LA" or image.mode in _SIXTEEN_BIT_MODES:
        flat = to_rgb(image).convert("L")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image
        converted = ImageCms.profileToProfile(flat, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    return converted or image


def _read_error(file: str | os.PathLike[str], error: Exception) -> ImageReadError:
    """Says in one way what Pillow and its plugins, which raise many kinds of exceptions, found wrong with a file."""
    if isinstance(error, FileError):
        text = str(error)
        kind = PixelLimitError if isinstance(error, PixelLimitError) else ImageReadError
        return kind(text if str(file) in text else f"{file}: {text}")
    if isinstance(error, FileNotFoundError):
        return ImageReadError(f"{file}: there is no such file")
    if isinstance(error, Image.UnidentifiedImageError):
        return ImageReadError(f"{file}: no image in a known format")
    if isinstance(error, OSError):
        return ImageReadError(f"{file}: {error.strerror or error}")
    if isinstance(error, Image.DecompressionBombError):
        return PixelLimitError(f"{file}: {type(error).__name__}: {error}")
    if isinstance(error, MemoryError):
        return ImageReadError(f"{file}: not enough memory for its pixels")
    return ImageReadError(f"{file}: {type(error).__name__}: {error}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any image to 8-bit RGB: alpha is dropped, 16 bits are scaled to 8."""
    if image.mode in _SIXTEEN_BIT_MODES:
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image
    return image if image.mode == "RGB" else image.convert("RGB")
