"""Opens every image of a training before its first step; what opened is kept, so that it costs once."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from llava.cli import note, progress
from llava.errors import FileError, ImageReadError
from llava.files import digest_file, encode_json
from llava.images import load_image
from llava.interrupts import COMMAND

CACHE_VARIABLE = "FORGERY_CACHE"
"""Environment variable that names the folder of what is kept between runs."""
_AT_ONCE = 512
"""Images between two writes of what opened."""

_Stamp = tuple[str, int, int]
"""Path, bytes, and time of the last change in nanoseconds."""


@dataclass(frozen=True)
class OpenedImage:
    """What became of an image.

    Attributes:
        sha256: Digest of the file; empty if it cannot be read.
        problem: Why it does not open; empty if it does.
    """

    sha256: str
    problem: str = ""


def cache_file(image_folder: Path | None) -> Path:
    """Returns where it is kept which images of a folder open."""
    folder = os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / COMMAND
    name = hashlib.sha256(os.fsencode((image_folder or Path()).resolve())).hexdigest()[:16]
    return Path(folder) / "opened_images" / f"{name}.jsonl"


def open_images(paths: Sequence[Path], kept: Path, workers: int | None = None) -> dict[Path, OpenedImage]:
    """Decodes images, several at a time, with a progress bar.

    An image is known by its path, size and time of change, or else by the digest of its bytes; one that is known to
    open is not decoded again. Processes that ask at the same time wait for the first, and find its work done.

    Args:
        paths: The images.
        kept: File of what is known, made if need be; where it cannot be written, nothing is kept.
        workers: Threads; by default one for each core.

    Returns:
        What became of each.
    """
    wanted = list(dict.fromkeys(paths))
    with _alone(kept) as may_write:
        by_stamp = _read(kept)
        known = set(by_stamp.values())
        found: dict[Path, OpenedImage] = {}
        stamps: dict[Path, _Stamp | None] = {path: _stamp(path) for path in wanted}
        for path, stamp in stamps.items():
            if stamp is not None and stamp in by_stamp:
                found[path] = OpenedImage(by_stamp[stamp])
        rest = [path for path in wanted if path not in found]
        with (
            ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as threads,
            progress(total=len(rest), desc="opening images", unit=" images", delay=1, leave=False) as bar,
        ):
            for start in range(0, len(rest), _AT_ONCE):
                part = rest[start : start + _AT_ONCE]
                for path, opened in zip(part, threads.map(lambda path: _open(path, known), part), strict=True):
                    found[path] = opened
                    bar.update()
                if may_write:
                    _append(kept, [(stamps[path], found[path]) for path in part])
    return found


def _open(path: Path, known: set[str]) -> OpenedImage:
    try:
        digest = digest_file(path)
    except FileError as error:
        return OpenedImage("", str(error))
    if digest not in known:
        try:
            load_image(path)
        except ImageReadError as error:
            return OpenedImage(digest, str(error))
    return OpenedImage(digest)


def _stamp(path: Path) -> _Stamp | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return str(path.absolute()), status.st_size, status.st_mtime_ns


@contextmanager
def _alone(kept: Path) -> Iterator[bool]:
    """Waits until no other process works on the file; gives whether it may be written."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(kept.with_name(f".{kept.name}.lock"))
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        note(f"which images open is not kept: {kept}: {error}; {CACHE_VARIABLE} names another folder")
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _read(kept: Path) -> dict[_Stamp, str]:
    """What is known to open: the digest by stamp. A line that a kill has torn is passed over."""
    found: dict[_Stamp, str] = {}
    with suppress(OSError), kept.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                found[entry["path"], entry["bytes"], entry["changed"]] = entry["sha256"]
    return found


def _append(kept: Path, opened: Sequence[tuple[_Stamp | None, OpenedImage]]) -> None:
    lines = [
        encode_json({"path": stamp[0], "bytes": stamp[1], "changed": stamp[2], "sha256": image.sha256})
        for stamp, image in opened
        if stamp is not None and not image.problem
    ]
    # A torn last line is ended first, so that it spoils no other; what a full disk refuses is done again next time.
    with suppress(OSError), kept.open("ab") as stream:
        stream.write(b"".join([b"\n", *lines]))
