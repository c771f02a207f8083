"""Reading and writing files so that a kill at any point leaves the old file or the new one. Imports no torch."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from uuid import uuid4

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from llava.errors import DataError, FileError, MissingFileError, UserError

_CHUNK = 1 << 20
_READERS = 4


@contextmanager
def file_errors(path: str | os.PathLike[str], action: str) -> Iterator[None]:
    """Turns what the system refuses inside the block into a ``FileError`` that names the path.

    Args:
        path: What is worked on.
        action: What it is, for the message: ``read``, ``written``.
    """
    try:
        yield
    except (UserError, BrokenPipeError):
        raise
    except FileNotFoundError as error:
        raise MissingFileError(f"there is no file or folder {error.filename or path}") from error
    except SafetensorError as error:  # its writer reports a full disk in its own way
        raise FileError(f"{path} cannot be {action}: {error}") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "the disk is full; make room, then run the same command again"
        else:
            reason = error.strerror or str(error)
        raise FileError(f"{path} cannot be {action}: {reason}") from error


# --- writing


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Gives a file to write; it takes the name ``path``, durably, only if the block ends without an exception.

    What is there and is no regular file (a pipe, a device) is written to directly.

    Raises:
        FileError: It cannot be written.
    """
    with file_errors(path, "written"):
        if path.exists() and not path.is_file():
            with path.open("wb") as stream:
                yield stream
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        # Always the same name, so that what a kill leaves behind is taken up by the next run.
        partial = path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.partial")
        try:
            with partial.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Writes a whole file, atomically; half a character, which UTF-8 cannot hold, becomes an escape.

    Raises:
        FileError: It cannot be written.
    """
    with atomic_file(path) as stream:
        stream.write(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Gives a new folder to write into, which takes the name ``folder`` only when the block ends without an exception.

    Raises:
        FileError: ``folder`` exists and is not empty, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileError(f"{folder} exists and is not empty; name a new folder or remove it first")
    partial = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}.partial")
    with file_errors(folder, "written"):
        partial.mkdir(parents=True)
        try:
            yield partial
            _share_mode(partial)
            if folder.exists():
                folder.rmdir()
            partial.replace(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _share_mode(folder: Path) -> None:
    """Lets whoever may read the folder read its files; safetensors writes for their owner alone."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        with suppress(OSError):  # some file systems keep no modes
            # A link's target is somebody else's file, and so is one that has other names.
            if file.is_file() and not file.is_symlink() and file.stat().st_nlink == 1:
                file.chmod(mode)


def replace_folder(new: Path, folder: Path) -> None:
    """Replaces a folder by another one, whole.

    Raises:
        FileError: It cannot be done.
    """
    old = folder.with_name(f".{folder.name}.old")
    with file_errors(folder, "replaced"):
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.replace(old)
        new.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def make_folder(folder: Path, option: str) -> None:
    """Makes the folder that an option names, before the work whose results go there.

    Raises:
        FileError: It cannot be made, or nothing may be written into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{option}: the folder {folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise FileError(f"{option}: nothing may be written into {folder}")


def is_file(path: Path) -> bool:
    """Whether there is a file; a name that no file can have is none."""
    try:
        return path.is_file()
    except OSError:
        return False


# --- JSON


def encode_json(value: Any, indent: int | None = None) -> bytes:
    """Returns JSON in UTF-8 with a line's end; half a character becomes the escape that JSON has for it."""
    return (json.dumps(value, ensure_ascii=False, indent=indent) + "\n").encode("utf-8", "backslashreplace")


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Writes JSON, atomically."""
    atomic_write(path, encode_json(value, indent))


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, atomically."""
    with atomic_file(path) as stream:
        for record in records:
            stream.write(encode_json(record))


def read_text(path: Path) -> str:
    """Reads a text file in UTF-8 or UTF-16, with or without a byte-order mark.

    Raises:
        UserError: It cannot be read, or it is in another encoding.
    """
    with file_errors(path, "read"):
        content = path.read_bytes()
    try:
        return content.decode(text_encoding(content))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8 or UTF-16 (byte {error.start}); save it again as UTF-8") from None


def text_encoding(content: bytes) -> str:
    """UTF-16 by its mark, or by the zeros that stand at every other byte of a text in mostly Latin letters."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    head = content[:512]
    for offset, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        half = head[offset::2]
        if len(half) >= 2 and half.count(0) > 0.9 * len(half):
            return name
    return "utf-8-sig"


def read_json(path: Path) -> Any:
    """Reads a JSON file, see ``read_text``.

    Raises:
        UserError: There is no such file, it cannot be read, or it is not JSON; the message says where.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except RecursionError:
        raise DataError(f"{path} is not usable JSON: it is nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the objects of a file that has one a line, each with file and line for messages; blank lines are passed.

    Raises:
        UserError: It cannot be read, see ``read_text``, or a line is no JSON object.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except RecursionError:
            raise DataError(f"{where}: this is no usable JSON: it is nested too deeply") from None
        except ValueError as error:
            raise DataError(f"{where}: this is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise DataError(f"{where}: this is no object")
        yield where, value


class JsonlLog:
    """A file of JSON objects, one a line, that only grows; what ``append`` was given is on disk when it returns.

    Opening it takes it for this process alone and cuts off a last line that a kill has torn. What is no regular file
    (a pipe, a device) is only written to.

    Args:
        path: The file; it is made if need be.
        read: Called with the number (from 1) and content of each whole line that is there.
        start: How every line begins; a torn line that begins otherwise was not written here and is left alone.

    Raises:
        UserError: Another process writes it, it cannot be written, or a line in it is no JSON object.
    """

    def __init__(
        self,
        path: Path,
        read: Callable[[int, dict[str, Any]], None] = lambda number, record: None,
        *,
        start: bytes = b"{",
    ) -> None:
        self.path = path
        with file_errors(path, "written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._regular = not path.exists() or path.is_file()
            self._lock = _acquire(path) if self._regular else None
            try:
                self._stream = path.open("ab")
                if self._regular:
                    self._stream.truncate(self._read(read, start))
            except BaseException:
                self.close()
                raise

    def _read(self, read: Callable[[int, dict[str, Any]], None], start: bytes) -> int:
        """Reads the whole lines; returns how many bytes they take."""
        whole = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n") and line.startswith(start[: len(line)]):
                    break
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    record = None
                if not isinstance(record, dict):
                    raise DataError(
                        f"{self.path}, line {number}: this is no line of such a file; name another file or remove it"
                    )
                read(number, record)
                whole += len(line)
        return whole

    def keep(self, lines: int) -> None:
        """Cuts the file after so many lines."""
        with file_errors(self.path, "written"):
            with self.path.open("rb") as kept:
                size = sum(len(line) for _, line in zip(range(lines), kept, strict=False))
            self._stream.truncate(size)

    def rewrite(self, keeps: Callable[[int], bool]) -> None:
        """Leaves out the lines whose number (from 1) is not kept, atomically."""
        with atomic_file(self.path) as kept, self.path.open("rb") as lines:
            kept.writelines(line for number, line in enumerate(lines, start=1) if keeps(number))
        self._stream.close()
        with file_errors(self.path, "written"):
            self._stream = self.path.open("ab")

    def append(self, *records: Mapping[str, Any]) -> None:
        """Adds lines, in one write, and waits until they are on disk.

        Raises:
            FileError: They cannot be written.
        """
        with file_errors(self.path, "written"):
            self._stream.write(b"".join(map(encode_json, records)))
            self._stream.flush()
            if self._regular:
                os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Closes the file and lets others have it."""
        if hasattr(self, "_stream"):
            self._stream.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> "JsonlLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# --- locks


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Holds a file or folder for this process alone; a kill frees it.

    Raises:
        UserError: Another process holds it.
    """
    with file_errors(path, "locked"):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquire(path)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _acquire(path: Path) -> FileLock | None:
    """A lock on a path; None where the file system has no locks."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FileError(f"another process is writing {path}: wait for it, stop it, or name another place") from None
    except NotImplementedError:
        return None
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            return None
        raise
    return lock


# --- digests


def digest_file(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes in hexadecimal.

    Raises:
        FileError: It cannot be read.
    """
    digest = hashlib.sha256()
    with file_errors(path, "read"), path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digest_json(value: Any) -> str:
    """Returns the SHA-256 of a value as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def digest_files(files: Sequence[Path]) -> Iterator[str]:
    """Yields the digest of each file in order, several at a time; an empty one for what cannot be read."""

    def digest(file: Path) -> str:
        try:
            return digest_file(file) if file.is_file() else ""  # a pipe would be waited for
        except OSError:
            return ""

    with ThreadPoolExecutor(_READERS) as readers:
        yield from readers.map(digest, files)
