"""Training files: what a record is, and how a file of records is read and checked. Imports no torch."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava.errors import DataError, FileError, MissingFileError
from llava.files import read_text
from llava.labels import FAKE, LABELS, REAL
from llava.screening import find_fault
from llava.systems import registry
from llava.systems.base import AnswerFormat, ParsedAnswer
from llava.tables import CSV_SUFFIXES, IMAGE_HEADERS, Row, find_column, read_rows

SPEAKERS = ("human", "gpt")
"""Who speaks, in turn."""

_QUESTION_HEADERS = ("question", "prompt", "instruction", "query", "human")
_ANSWER_HEADERS = ("answer", "response", "output", "gpt")
_ONE_IMAGE = "one conversation on several images is not supported, split it or remove it"
_SPACE = re.compile(r"[ \t\r\n]*")
_LAYOUT = '{"image": file, "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": text}]}'


@dataclass(frozen=True)
class Record:
    """One conversation of a training file.

    Attributes:
        image: The image's path below the image folder; None for a conversation without an image.
        turns: ``from`` and ``value`` of each turn: human and gpt alternate, human first, gpt last.
        origin: File and row, counted from 1, for messages.
        system_prompt: What stands before the conversation instead of the template's own text; empty for that.
        label: The class that the record gives beside its answers, real = 0 and fake = 1; None if it gives none.
    """

    image: str | None
    turns: tuple[dict[str, str], ...]
    origin: str
    system_prompt: str = ""
    label: int | None = None

    @property
    def answers(self) -> list[str]:
        """Texts of the assistant's turns."""
        return [turn["value"] for turn in self.turns if turn["from"] == SPEAKERS[1]]

    def verdict(self, answer_format: AnswerFormat) -> ParsedAnswer:
        """Returns what its answers conclude; if there is no verdict, ``problem`` says why.

        Args:
            answer_format: Words of the system that is trained; answers that bear another's marks are read in its.
        """
        return (registry.marked_words(self.answers) or answer_format).parse_training(self.answers)

    def problem(self, answer_format: AnswerFormat) -> str:
        """Says why its answers must not be learnt, whatever the tokenizer: no verdict, or what ``screen`` finds."""
        conclusion = self.verdict(answer_format)
        screen = getattr(answer_format, "screen", _screen)
        return screen(self.answers) if conclusion.verdict else conclusion.problem

    def forgery_label(self, answer_format: AnswerFormat) -> int:
        """Returns real = 0, fake = 1, -100 if there is no verdict."""
        verdict = self.verdict(answer_format).verdict
        return IGNORE_INDEX if verdict is None else LABELS.index(verdict)


def _screen(answers: Sequence[str]) -> str:
    """Screens the answers of a system that does not say how."""
    fault = next((fault for answer in answers if (fault := find_fault(answer, prose=False))), None)
    return f"an answer must not be learnt: {fault}" if fault else ""


def read_records(paths: Sequence[Path], faults: dict[str, str] | None = None) -> list[Record]:
    """Reads training files: a JSON list of records (alone or under ``data``), or one record a line.

    A CSV table has the columns image, question and answer, a conversation of one turn each. Encodings, delimiters and
    the names of the image's column are those of ``llava.tables``.

    Args:
        paths: The files.
        faults: Takes what is wrong with each row that is no record, by its origin; without it such a row is an error.

    Raises:
        DataError: A file is missing, empty or damaged, or a row is no record; the message names it.
    """
    return [record for path in paths for record in _read_file(path, faults)]


def _read_file(path: Path, faults: dict[str, str] | None) -> list[Record]:
    records, is_empty = [], True
    try:
        for value, origin in _entries(path, lenient=faults is not None):
            is_empty = False
            try:
                records.append(_to_record(value, origin))
            except DataError as error:
                if faults is None:
                    raise
                faults[origin] = str(error).removeprefix(origin).lstrip(":, ")
    except MissingFileError:
        raise DataError(f"there is no data file {path}") from None
    except FileError as error:
        raise DataError(str(error)) from error
    if is_empty:
        raise DataError(f"{path} is empty; it must hold a list of records, each {_LAYOUT}")
    return records


def _entries(path: Path, *, lenient: bool) -> Iterator[tuple[Any, str]]:
    """Gives what a file holds, one record after the other, each with its origin; see ``_json_values``."""
    if path.suffix.lower() in CSV_SUFFIXES:
        for row in read_rows(path):
            yield _conversation(row), row.where
        return
    row_number = 0
    for value in _json_values(read_text(path), path, lenient=lenient):
        under_data = isinstance(value, dict) and "conversations" not in value and isinstance(value.get("data"), list)
        for entry in value["data"] if under_data else [value]:
            row_number += 1
            yield entry, f"{path}, row {row_number}"


def _conversation(row: Row) -> dict[str, Any]:
    """Returns a table's row as a record: a question about an image, and its answer."""
    columns = [name for name in row.values if name is not None]
    image, question, answer = (
        find_column(columns, known, role, row.where)
        for known, role in ((IMAGE_HEADERS, "image"), (_QUESTION_HEADERS, "question"), (_ANSWER_HEADERS, "answer"))
    )
    if question is None or answer is None:
        raise DataError(
            f"{row.where} needs the columns question and answer (and image); it has {', '.join(columns) or 'none'}. "
            "A table of images and labels becomes a training file by forgery data from-folder --to train"
        )
    file, asked = row.values[image] if image else None, row.values[question]
    if file and asked and DEFAULT_IMAGE_TOKEN not in asked:
        asked = f"{DEFAULT_IMAGE_TOKEN}\n{asked}"
    turns = zip(SPEAKERS, (asked, row.values[answer]), strict=True)
    return {"image": file or None, "conversations": [{"from": speaker, "value": text} for speaker, text in turns]}


def _json_values(text: str, path: Path, *, lenient: bool) -> Iterator[Any]:
    """Gives the entries of a JSON list, or the values that stand one after the other.

    A list that breaks off has lost what follows and is always an error. Where values stand on lines of their own,
    ``lenient`` gives the error in the place of one that is no JSON, and goes on with the next line.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_without_repeated_keys)
    position = _after_space(text, 0)
    in_list = text.startswith("[", position)
    position = _after_space(text, position + in_list)
    row = 1
    while position < len(text) and not (in_list and row == 1 and text[position] == "]"):
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            value = DataError(f"{path}, row {row}: {_why_not_json(error)}")
            if in_list or not lenient:
                raise value from None
            position = text.find("\n", position) % (len(text) + 1)  # the end where there is no further line
        yield value
        position = _after_space(text, position)
        if in_list:
            if text.startswith("]", position):
                break
            if not text.startswith(",", position):
                raise DataError(f"{path}: the list breaks off after row {row}; is the file complete?")
            position = _after_space(text, position + 1)
        row += 1
    if in_list:
        if not text.startswith("]", position):
            raise DataError(f"{path}: the list breaks off in row {row}; is the file complete?")
        if _after_space(text, position + 1) != len(text):
            raise DataError(f"{path}: there is more after the end of the list; one file must hold one list")


def _why_not_json(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"this is not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
    if isinstance(error, RecursionError):
        return "this is no usable JSON: it is nested too deeply"
    return str(error)


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r} stands twice in one object, so one value would be lost; remove one")
    return found


def _to_record(value: Any, origin: str) -> Record:
    if isinstance(value, DataError):
        raise value
    if not isinstance(value, dict):
        raise DataError(f"{origin}: a record must be an object {_LAYOUT}, not {_shown(value)}")
    given = value.get("conversations")
    if not isinstance(given, list) or not given:
        raise DataError(f"{origin}: there are no conversations; a record is {_LAYOUT}")
    turns = tuple(_to_turn(turn, f"{origin}, turn {number}") for number, turn in enumerate(given, start=1))
    for number, turn in enumerate(turns, start=1):
        if turn["from"] != SPEAKERS[(number - 1) % 2]:
            raise DataError(f"{origin}, turn {number}: human and gpt must take turns, human first")
    if len(turns) % 2:
        raise DataError(f"{origin}: the last turn is a question without an answer; add a gpt turn or remove it")
    image = _image_of(value, turns, origin)
    if image is not None and (not isinstance(image, str) or not image.strip()):
        raise DataError(f"{origin}: the image must be one file's path as text, not {_shown(image)}; {_ONE_IMAGE}")
    if image and _has_half_letter(image):
        raise DataError(f"{origin}: the image has half a surrogate pair (\\ud800 to \\udfff), which is no letter")
    _check_marks(turns, image, origin)
    system_prompt = value.get("system_prompt") or ""
    if not isinstance(system_prompt, str):
        raise DataError(f"{origin}: system_prompt must be a text, not {_shown(system_prompt)}")
    return Record(image, turns, origin, system_prompt, _label(value, origin))


def _label(value: dict[str, Any], origin: str) -> int | None:
    """The class that a record of FakeClue gives, which says 1 for real; other data sets mean other things by it."""
    if "label" not in value or "cate" not in value:
        return None
    label = value["label"]
    if isinstance(label, bool) or label not in (0, 1):
        raise DataError(f"{origin}: label must be 1 (real) or 0 (fake), not {_shown(label)}")
    return REAL if label == 1 else FAKE


def _image_of(value: dict[str, Any], turns: Sequence[dict[str, str]], origin: str) -> Any:
    """Returns a record's image, under another known name too if a question shows one."""
    if "image" in value or not any(DEFAULT_IMAGE_TOKEN in turn["value"] for turn in turns):
        return value.get("image")
    column = find_column(list(value), IMAGE_HEADERS, "image", origin)
    return None if column is None else value[column]


def _to_turn(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise DataError(f"{where}: a turn must be an object with from and value, not {_shown(turn)}")
    speaker, value = turn.get("from"), turn.get("value")
    if speaker not in SPEAKERS:
        raise DataError(f"{where}: unknown speaker {_shown(speaker)}; it must be human or gpt")
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: the value must be a text that says something, not {_shown(value)}")
    if _has_half_letter(value):
        raise DataError(f"{where}: the value has half a surrogate pair (\\ud800 to \\udfff), which is no letter")
    return {"from": speaker, "value": value}


def _has_half_letter(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)


def _check_marks(turns: Sequence[dict[str, str]], image: str | None, origin: str) -> None:
    marks = [turn["value"].count(DEFAULT_IMAGE_TOKEN) for turn in turns]
    if any(marks[1::2]):
        raise DataError(f"{origin}: an answer holds {DEFAULT_IMAGE_TOKEN}; only a question may show an image")
    if image is None and any(marks):
        raise DataError(f"{origin}: a question shows {DEFAULT_IMAGE_TOKEN}, but the record names no image")
    if image is not None and sum(marks) != 1:
        raise DataError(f"{origin}: {DEFAULT_IMAGE_TOKEN} stands {sum(marks)} times for one image, not once")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
