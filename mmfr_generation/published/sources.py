"""Where the parts of the published archive come from: a folder, or the hub."""

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from llava.errors import FileError, MissingFileError, UserError
from llava.files import digest_file, file_errors

_PART_NAME = re.compile(r"(?:.*/)?dataset\.part0*(\d+)\.tar")
_TRIES = 4


class Source(Protocol):
    """Where the parts come from."""

    def available(self) -> frozenset[int]:
        """Returns the numbers of the parts that exist."""

    def size(self, part: int) -> int:
        """Returns the size of a part in bytes."""

    def fetch(self, part: int) -> Path:
        """Returns a part as a file, complete and checked."""

    def discard(self, part: int) -> None:
        """Deletes a part from the disk if it is there."""


class FolderSource:
    """Parts that are on disk already.

    Args:
        folder: Folder with files named ``dataset.part<number>.tar``.

    Raises:
        FileError: There is no such folder, or it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise MissingFileError(f"there is no folder {folder}")
        with file_errors(folder, "read"):
            self._paths = {
                int(match[1]): path for path in sorted(folder.iterdir()) if (match := _PART_NAME.fullmatch(path.name))
            }

    def available(self) -> frozenset[int]:
        """Returns the numbers of the parts in the folder."""
        return frozenset(self._paths)

    def size(self, part: int) -> int:
        """Returns the size of a part in bytes."""
        with file_errors(self._paths[part], "read"):
            return self._paths[part].stat().st_size

    def fetch(self, part: int) -> Path:
        """Returns the path of a part."""
        return self._paths[part]

    def discard(self, part: int) -> None:
        """Deletes a part."""
        with file_errors(self._paths[part], "deleted"):
            self._paths[part].unlink(missing_ok=True)


class HubSource:
    """Parts on the hub; each is downloaded when it is its turn, and a download that was stopped is resumed.

    ``hf_hub_download`` starts a file from scratch after a kill, and parts are large; so its transfer function
    ``http_get``, which resumes, appends to a file of ours here.

    Args:
        repository: Hub id of the data set.
        revision: Branch, tag or commit.
        folder: Where downloaded parts are put.

    Raises:
        UserError: The hub cannot be reached, or has no such data set.
    """

    def __init__(self, repository: str, revision: str, folder: Path) -> None:
        from huggingface_hub import HfApi

        self.repository = repository
        self._folder = folder
        with _hub_errors(repository):
            info = HfApi().dataset_info(repository, revision=revision, files_metadata=True)
        self.revision = info.sha or revision
        self._files = {
            int(match[1]): file
            for file in info.siblings or []
            if (match := _PART_NAME.fullmatch(file.rfilename)) and file.size is not None
        }
        if not self._files:
            raise UserError(f"{repository} at {revision} holds no file dataset.part<number>.tar")

    def available(self) -> frozenset[int]:
        """Returns the numbers of the parts on the hub."""
        return frozenset(self._files)

    def size(self, part: int) -> int:
        """Returns the size of a part in bytes."""
        return int(self._files[part].size)

    def fetch(self, part: int) -> Path:
        """Downloads a part, or the rest of it, and checks its size and hash.

        Raises:
            UserError: The disk is too full, the hub fails, or the part is damaged.
        """
        file, path = self._files[part], self._path(part)
        if path.exists():
            return path
        partial = path.with_name(path.name + ".partial")
        with file_errors(partial, "written"):
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()
            missing = file.size - partial.stat().st_size
            free = shutil.disk_usage(self._folder).free
        if free < missing:
            raise FileError(
                f"part {part} needs {missing:,} more bytes, but only {free:,} are free in {self._folder}; make room, "
                "then run the same command again: what is done is kept"
            )
        self._complete(file, partial)
        expected = file.lfs.sha256 if file.lfs else None
        with file_errors(partial, "read"):
            if partial.stat().st_size != file.size or (expected and digest_file(partial) != expected):
                partial.unlink()
                raise UserError(f"part {part} arrived damaged and was removed; run the same command again")
            partial.replace(path)
        return path

    def _complete(self, file: Any, partial: Path) -> None:
        """Downloads what is missing at the end of a partial file."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.repository, file.rfilename, repo_type="dataset", revision=self.revision)
        failures = 0
        while (size := partial.stat().st_size) < file.size:
            try:
                with (
                    file_errors(partial, "written"),
                    _hub_errors(self.repository),
                    partial.open("ab", buffering=0) as stream,
                ):
                    http_get(url, stream, resume_size=size, headers=build_hf_headers(), expected_size=file.size)
            except _HubError:
                # A try that brought some bytes counts as the first failure again: the line is slow, not dead.
                failures = failures + 1 if partial.stat().st_size == size else 1
                if failures == _TRIES:
                    raise
                time.sleep(failures)

    def discard(self, part: int) -> None:
        """Deletes a downloaded part."""
        with file_errors(self._path(part), "deleted"):
            self._path(part).unlink(missing_ok=True)

    def _path(self, part: int) -> Path:
        return self._folder / str(self._files[part].rfilename)


class _HubError(UserError):
    """The hub failed or cannot be reached."""


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Turns what the hub's client raises into one line."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's own, such as a full disk
        first_line = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise _HubError(
            f"{repository} could not be fetched from the hub: {first_line}; "
            "what is done is kept, and the same command resumes"
        ) from None
