"""A JSONL file of answers, one line an image, written as they come and continued after an interruption."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from forgery_eval.files import claim

_BEGINNING = b'{"image": '
"""Of every line; what is cut and does not begin like this was not written here."""


class AnswersFile:
    """Answers on disk.

    Every line names the run that wrote it: a digest of model and settings. A line that was cut by a kill is removed.

    Args:
        path: The file; it is made if need be. What is no regular file (a pipe) is only written to.
        settings: What the answers depend on.

    Attributes:
        done: The images that have a line, each with its ``error``.

    Raises:
        ValueError: The file holds answers of another run, is no such file, or another process writes it.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.run = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.done: dict[str, str] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name's bytes that are no UTF-8 are half characters here; escaped they are what JSON means by them.
        self._stream = path.open("a", encoding="utf-8", errors="backslashreplace")
        if path.is_file():
            try:
                claim(self._stream, path)
                self._read()
            except ValueError:
                self._stream.close()
                raise

    def _read(self) -> None:
        whole = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n") and line.startswith(_BEGINNING[: len(line)]):
                    break
                try:
                    entry = json.loads(line)
                    run, image, error = entry["run"], entry["image"], entry.get("error", "")
                except (ValueError, KeyError, TypeError):
                    raise ValueError(
                        f"{self.path}, line {number}: this is no line of answers; name another file"
                    ) from None
                if run != self.run:
                    raise ValueError(
                        f"{self.path} holds answers of another model or other settings (line {number}); "
                        "name another file or remove it"
                    )
                self.done[image] = error
                whole += len(line)
        if whole != self.path.stat().st_size:
            os.truncate(self.path, whole)

    def write(self, image: str, answer: dict[str, Any]) -> None:
        """Adds a line, and hands it to the system before it returns."""
        self._stream.write(json.dumps({"image": image, **answer, "run": self.run}, ensure_ascii=False) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


def model_fingerprint(path: str | os.PathLike[str] | None) -> list[tuple[str, int, int]] | str | None:
    """Returns what tells a model apart from another in the same place: its files' names, sizes and times of change.

    A hub id stands for itself.
    """
    folder = Path(path).expanduser() if path else None
    if folder is None or not folder.is_dir():
        return None if path is None else str(path)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [(str(folder.resolve()), 0, 0)] + [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
