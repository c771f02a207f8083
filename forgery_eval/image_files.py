"""Which pictures a path means."""

from collections.abc import Iterator
from pathlib import Path

from PIL import Image


def list_images(path: Path) -> Iterator[Path]:
    """Yields the pictures of a file, a folder (with its subfolders, in order of name) or a ``.txt`` list.

    Relative names in a list are relative to the list's folder. In a folder, files without a picture's ending are passed
    over; a file or a list's entry is taken whatever its ending.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: A folder or list holds no picture.
    """
    if path.is_dir():
        endings = set(Image.registered_extensions())
        found = (file for file in sorted(path.rglob("*")) if file.suffix.lower() in endings and file.is_file())
        yield from _at_least_one(found, f"{path} and its subfolders hold no picture")
    elif path.suffix.lower() == ".txt" and path.is_file():
        yield from _at_least_one(_read_list(path), f"{path} lists no picture")
    elif path.exists():
        yield path
    else:
        raise FileNotFoundError(f"there is no file or folder {path}")


def _read_list(path: Path) -> Iterator[Path]:
    with path.open(encoding="utf-8-sig") as lines:
        for line in lines:
            if line.strip():
                yield path.parent / line.strip()


def _at_least_one(files: Iterator[Path], complaint: str) -> Iterator[Path]:
    empty = True
    for file in files:
        empty = False
        yield file
    if empty:
        raise ValueError(complaint)
