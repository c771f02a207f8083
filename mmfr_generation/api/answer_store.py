"""Request files and their answers on disk."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import DataError, MissingFileError
from llava.files import digest_json, write_jsonl
from mmfr_generation.api.answers import image_of, read_answer, read_lines


def request_files(folder: Path) -> list[Path]:
    """Returns the request files of a folder by name.

    Raises:
        MissingFileError: There is none.
    """
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise MissingFileError(f"there is no .jsonl file in {folder}; write request files with get_jsonl.py first")
    return files


@dataclass(frozen=True)
class Requests:
    """What a request file asks.

    Attributes:
        ids: The ``custom_id`` of each request, in order.
        setting: Digest of what all its requests have in common: all but the image; empty where they show no image.
    """

    ids: list[str]
    setting: str


def read_requests(path: Path) -> Requests:
    """Reads a request file.

    Raises:
        DataError: A line is no request, an id occurs twice, or two requests ask for different things.
    """
    ids: dict[str, int] = {}
    setting = ""
    for number, request in read_lines(path):
        custom_id = (request or {}).get("custom_id")
        if request is None or not isinstance(custom_id, str) or not isinstance(request.get("body"), dict):
            raise DataError(f"{path}, line {number}, is not a request with a custom_id and a body")
        if custom_id in ids:
            raise DataError(f"{path}, line {number}, asks about {custom_id} again, as line {ids[custom_id]} does")
        ids[custom_id] = number
        asked = _setting_of(request["body"])
        if asked and setting and asked != setting:
            raise DataError(f"{path}, line {number}, asks another thing than the lines before; {_ONE_SETTING}")
        setting = asked or setting
    if not ids:
        raise DataError(f"{path} holds no request")
    return Requests(list(ids), setting)


_ONE_SETTING = "a request folder is of one task, label, model and limit: put the others into a folder of their own"


def check_one_setting(settings: Mapping[Path, str]) -> None:
    """Checks that request files ask the same; a setting may be unknown, which is an empty text.

    Raises:
        DataError: They do not.
    """
    first: dict[str, Path] = {}
    for path, setting in settings.items():
        if setting:
            first.setdefault(setting, path)
    if len(first) > 1:
        one, other, *_ = first.values()
        raise DataError(f"{one} and {other} ask for different things; {_ONE_SETTING}")


def _setting_of(body: dict[str, Any]) -> str:
    bare = _without_images(body)
    return digest_json(bare) if bare != body else ""


def _without_images(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: "" if key == "url" else _without_images(item) for key, item in value.items()}
    return [_without_images(item) for item in value] if isinstance(value, list) else value


class AnswerStore:
    """The answers of a folder of request files on disk.

    Args:
        input_folder: Folder of request files.
        output_folder: Folder for the answers; ``.batch_api`` in it holds what is needed to resume.
    """

    def __init__(self, input_folder: Path | str, output_folder: Path | str) -> None:
        self.input_folder = Path(input_folder)
        self.output_folder = Path(output_folder)
        self.work_folder = self.output_folder / ".batch_api"
        self.files = request_files(self.input_folder)
        self._requests: dict[Path, Requests] = {}

    def requests(self, path: Path) -> Requests:
        """Returns what a request file asks; it is read once: request files are large."""
        if path not in self._requests:
            self._requests[path] = read_requests(path)
        return self._requests[path]

    def ids(self, path: Path) -> list[str]:
        """Returns the ``custom_id`` of each request in a file."""
        return self.requests(path).ids

    def raw_path(self, path: Path, origin: str) -> Path:
        """Returns where answers to a request file lie as they came; ``origin`` as in ``raw_answers``."""
        return self.work_folder / f"{path.stem}.{origin}.jsonl"

    def raw_answers(self, name: str) -> list[Path]:
        """Returns every file with answers to a request file: ``direct``, then ``batch1.output`` and so on."""
        stem = re.escape(Path(name).stem)
        pattern = re.compile(rf"{stem}\.(?:batch(\d+)\.(?:error|output)|direct)\.jsonl")
        found = [(match, path) for path in self.work_folder.glob("*.jsonl") if (match := pattern.fullmatch(path.name))]
        return [path for match, path in sorted(found, key=lambda pair: (int(pair[0][1] or 0), pair[1].name))]

    def answers(self, name: str) -> dict[str, dict[str, Any]]:
        """Returns the best line for each request of a file: its last answer, else its last failure."""
        best: dict[str, dict[str, Any]] = {}
        answered: set[str] = set()
        for path in self.raw_answers(name):
            for _, line in read_lines(path):
                if line is None:
                    continue
                answer = read_answer(line)
                if not answer.failure:
                    answered.add(answer.custom_id)
                if not answer.failure or answer.custom_id not in answered:
                    best[answer.custom_id] = line
        return best

    def unanswered(self, path: Path) -> list[str]:
        """Returns the requests of a file that have neither an answer nor a failure that would recur."""
        best = self.answers(path.name)
        return [
            custom_id
            for custom_id in self.ids(path)
            if custom_id not in best or ((answer := read_answer(best[custom_id])).failure and answer.retryable)
        ]

    def publish(self, path: Path) -> list[str]:
        """Writes the answers of a request file in the order of its requests; returns those without an answer."""
        best = self.answers(path.name)
        lines, failed = [], []
        for custom_id in self.ids(path):
            line = best.get(custom_id) or {
                "custom_id": custom_id,
                "response": None,
                "error": {"code": "no_answer", "message": "the server gave neither an answer nor an error"},
            }
            failure = read_answer(line).failure
            if failure:
                failed.append(f"{image_of(custom_id)}: {failure}")
            lines.append(line)
        write_jsonl(self.output_folder / path.name, lines)
        return failed
