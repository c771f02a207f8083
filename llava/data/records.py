"""Training files: what a record is, and how a file of records is read and checked. Imports no torch."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava.errors import DataError
from llava.labels import FAKE, LABELS, REAL
from llava.systems import registry
from llava.systems.base import AnswerFormat, ParsedAnswer

SPEAKERS = ("human", "gpt")
"""Who speaks, in turn."""

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

    def forgery_label(self, answer_format: AnswerFormat) -> int:
        """Returns real = 0, fake = 1, -100 if there is no verdict."""
        verdict = self.verdict(answer_format).verdict
        return IGNORE_INDEX if verdict is None else LABELS.index(verdict)


def read_records(paths: Sequence[Path]) -> list[Record]:
    """Reads training files: a JSON list of records, or one record a line.

    Raises:
        DataError: A file is missing, empty or damaged, or a row is no record; the message names it.
    """
    return [record for path in paths for record in _read_file(path)]


def _read_file(path: Path) -> list[Record]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"there is no data file {path}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8 (byte {error.start}); name a JSON file") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    records = [_to_record(value, f"{path}, row {row}") for row, value in enumerate(_json_values(text, path), 1)]
    if not records:
        raise DataError(f"{path} is empty; it must hold a list of records, each {_LAYOUT}")
    return records


def _json_values(text: str, path: Path) -> Iterator[Any]:
    """Gives the entries of a JSON list, or the values that stand one after the other."""
    decoder = json.JSONDecoder(object_pairs_hook=_without_repeated_keys)
    position = _after_space(text, 0)
    in_list = text.startswith("[", position)
    position = _after_space(text, position + in_list)
    row = 1
    while position < len(text) and not (in_list and row == 1 and text[position] == "]"):
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            place = f"line {error.lineno}, column {error.colno}"
            raise DataError(f"{path}, row {row}: this is not JSON: {error.msg} ({place})") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, row {row}: {error}") from None
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
    image = value.get("image")
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
