"""Where the parts of the published archive come from: a folder, or the hub."""

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava.errors import FileError, MissingFileError, UserError
from llava.files import digest_file, file_errors

_PART_NAME = re.compile(r"(?:.*/)?dataset\.part0*(\d+)\.tar")
_TRIES = 4


class Source:
    """Where the parts come from.

    Attributes:
        paths: Where each part is, or will be after ``fetch``, by its number.
        sizes: Size of each part in bytes.
    """

    paths: dict[int, Path]
    sizes: dict[int, int]

    def fetch(self, part: int) -> Path:
        """Returns a part as a file, complete and checked."""
        return self.paths[part]

    def discard(self, part: int) -> None:
        """Deletes a part from the disk if it is there."""
        with file_errors(self.paths[part], "deleted"):
            self.paths[part].unlink(missing_ok=True)


class FolderSource(Source):
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
            matches = [(path, _PART_NAME.fullmatch(path.name)) for path in sorted(folder.iterdir())]
            self.paths = {int(match[1]): path for path, match in matches if match}
            self.sizes = {part: path.stat().st_size for part, path in self.paths.items()}


class HubSource(Source):
    """Parts on the hub; each is downloaded when it is its turn, and a download that was stopped is resumed.

    ``hf_hub_download`` starts a file from scratch after a kill, and parts are large. So its transfer function
    ``http_get``, which resumes, appends to a file that is kept here.

    Args:
        repository: Hub id of the data set.
        revision: Branch, tag or commit.
        folder: Where downloaded parts are put.

    Raises:
        UserError: The hub cannot be reached, or has no such data set.
    """

    def __init__(self, repository: str, revision: str, folder: Path) -> None:
        from huggingface_hub import HfApi

        self._repository = repository
        with _hub_errors(repository):
            info = HfApi().dataset_info(repository, revision=revision, files_metadata=True)
        self._revision = info.sha or revision
        self._files = {
            int(match[1]): file
            for file in info.siblings or []
            if (match := _PART_NAME.fullmatch(file.rfilename)) and file.size is not None
        }
        if not self._files:
            raise UserError(f"{repository} at {revision} holds no file dataset.part<number>.tar")
        self.paths = {part: folder / str(file.rfilename) for part, file in self._files.items()}
        self.sizes = {part: int(file.size) for part, file in self._files.items()}

    def fetch(self, part: int) -> Path:
        """Downloads a part, or the rest of it, and checks its size and hash.

        Raises:
            UserError: The disk is too full, the hub fails, or the part is damaged.
        """
        file, path = self._files[part], self.paths[part]
        if path.exists():
            return path
        partial = path.with_name(path.name + ".partial")
        with file_errors(partial, "written"):
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()
            missing = file.size - partial.stat().st_size
            free = shutil.disk_usage(path.parent).free
        if free < missing:
            raise FileError(
                f"part {part} needs {missing:,} more bytes, but only {free:,} are free in {path.parent}; make room, "
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

        url = hf_hub_url(self._repository, file.rfilename, repo_type="dataset", revision=self._revision)
        failures = 0
        while (size := partial.stat().st_size) < file.size:
            try:
                with (
                    file_errors(partial, "written"),
                    _hub_errors(self._repository),
                    partial.open("ab", buffering=0) as stream,
                ):
                    http_get(url, stream, resume_size=size, headers=build_hf_headers(), expected_size=file.size)
            except _HubError:
                # A try that brought some bytes counts as the first failure again: the line is slow, not dead.
                failures = failures + 1 if partial.stat().st_size == size else 1
                if failures == _TRIES:
                    raise
                time.sleep(failures)


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
