"""Reading and writing files so that a kill at any point leaves either the old file or the new one."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from filelock import FileLock, Timeout

from llava.errors import UserError


@contextlib.contextmanager
def replaced_when_complete(path: Path) -> Iterator[IO[bytes]]:
    """Gives a file to write; it takes the name ``path``, durably, only if the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Always the same name, so that what a kill leaves behind is taken up by the next run.
    temporary = path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Writes JSON as UTF-8, atomically."""
    with replaced_when_complete(path) as file:
        file.write(_encode(value, indent))


def write_json_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes one JSON object a line as UTF-8, atomically."""
    with replaced_when_complete(path) as file:
        for record in records:
            file.write(_encode(record))


def _encode(value: Any, indent: int | None = None) -> bytes:
    # Half a character, which UTF-8 cannot hold, becomes the escape that JSON has for it.
    return (json.dumps(value, ensure_ascii=False, indent=indent) + "\n").encode("utf-8", "backslashreplace")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: There is no such file, or it is not JSON in UTF-8; the text says where.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class JsonLog:
    """A file of JSON lines that only grows; each line is on disk before ``append`` returns.

    A line that a kill has torn is cut off when the log is opened.

    Attributes:
        records: What the log held when it was opened.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records: list[dict[str, Any]] = []
        whole = 0
        if path.exists():
            with path.open("rb") as file:
                for line in file:
                    try:
                        record = json.loads(line) if line.endswith(b"\n") else None
                    except ValueError:
                        record = None
                    if not isinstance(record, dict):
                        break
                    self.records.append(record)
                    whole += len(line)
        self._file = path.open("ab")
        self._file.truncate(whole)

    def append(self, record: dict[str, Any]) -> None:
        """Adds a line and waits until it is on disk."""
        self._file.write(_encode(record))
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> "JsonLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


@contextlib.contextmanager
def only_one_at_work(folder: Path) -> Iterator[None]:
    """Holds a folder for this process alone; a kill frees it.

    Raises:
        UserError: Another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process is at work in {folder.parent}; wait for it, or stop it first") from None
    try:
        yield
    finally:
        lock.release()
