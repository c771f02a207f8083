"""Which pictures a path means."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image


def list_images(path: Path) -> Iterator[Path]:
    """Yields the pictures of a file, a folder (with its subfolders, in order of name) or a ``.txt`` list.

    Relative names in a list are relative to the list's folder. In a folder, files without a picture's ending are passed
    over; a file or a list's entry is taken whatever its ending. A subfolder that may not be read is yielded itself, so
    that who opens it can say so.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: A folder or list holds no picture.
    """
    if path.is_dir():
        yield from _at_least_one(sorted(_walk(path)), f"{path} and its subfolders hold no picture")
    elif path.suffix.lower() == ".txt" and path.is_file():
        yield from _at_least_one(_read_list(path), f"{path} lists no picture")
    elif path.exists():
        yield path
    else:
        raise FileNotFoundError(f"there is no file or folder {path}")


def _walk(path: Path) -> Iterator[Path]:
    endings = set(Image.registered_extensions())
    unread: list[OSError] = []
    for folder, _, names in os.walk(path, onerror=unread.append):
        yield from (Path(folder, name) for name in names if Path(name).suffix.lower() in endings)
    yield from (Path(error.filename) for error in unread)


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
        raise ValueError(complaint)
