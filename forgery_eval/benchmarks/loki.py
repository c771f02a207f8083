"""LOKI's images (arXiv 2410.09732): ``data/image/*.json`` beside ``FakeImage_dataset``.

Every image comes twice, once with a question whether it was made by an AI, once whether it is of the real world. Both
rows must say the same; an image is one sample, and the system's own question is asked of it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from forgery_eval.benchmarks.base import Sample
from llava.cli import format_list, log
from llava.errors import DataError
from llava.files import read_json
from llava.labels import FAKE, LABELS, REAL

ON_DISK = "LOKI's images: data/image/*.json beside FakeImage_dataset"
NAME = "loki"
_LISTS = Path("data") / "image"
_IMAGES = "FakeImage_dataset"
_KIND = "image_fake_or_real_"
_ASKS = {"fake": FAKE, "real": REAL}
"""The class that a question's kind asks for."""
_LETTERS = "ABCDEFGH"


@dataclass
class _Image:
    """What the rows say of one image."""

    label: int
    category: str
    where: str
    ids: list[str] = field(default_factory=list)


def opens(path: Path) -> bool:
    """Whether it is the data set's folder, or one of its lists."""
    if path.is_file():
        return path.suffix == ".json" and path.parent.parts[-2:] == _LISTS.parts
    return any((path / _LISTS).glob("*.json"))


def read(path: Path) -> Iterator[Sample]:
    """Yields each image once, in the order in which the lists name them; groups are the category and its folder.

    Rows that do not say whether an image is real are named and left out. An image that is not there is yielded too, so
    that it is counted.

    Raises:
        UserError: A list cannot be read, or a row is none of the data set's or contradicts another one.
    """
    files = [path] if path.is_file() else sorted((path / _LISTS).glob("*.json"))
    images: dict[str, _Image] = {}
    others: list[str] = []
    for file in files:
        rows = read_json(file)
        if not isinstance(rows, list):
            raise DataError(f"{file} must hold a list of objects, as LOKI's lists do")
        for number, row in enumerate(rows, start=1):
            _add(row, f"{file}, row {number}", images, others)
    if others:
        log(f"{len(others)} questions do not say whether one image is real, and are left out:\n{format_list(others)}")
    root = files[0].parents[2]
    for name, image in images.items():
        parts = PurePosixPath(name).parts
        yield Sample(
            id=name,
            image=root / _IMAGES / name,
            label=image.label,
            set=NAME,
            groups={"category": image.category, "folder": "/".join(parts[:-1])},
        )


def _add(row: Any, where: str, images: dict[str, _Image], others: list[str]) -> None:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be an object, not {row!r}")
    kind = row.get("question_type")
    if not isinstance(kind, str) or not kind:
        raise DataError(f"{where}: question_type must be a text, not {kind!r}")
    asked, _, category = kind.removeprefix(_KIND).partition("_")
    if not kind.startswith(_KIND) or asked not in _ASKS or not category or not isinstance(row.get("image_path"), str):
        others.append(f"{where}: {kind}")
        return
    name = _relative(row["image_path"], where)
    label = _ASKS[asked] if _says_yes(row, where) else 1 - _ASKS[asked]
    known = images.setdefault(name, _Image(label, category, where))
    if known.label != label:
        raise DataError(f"{where}: {name} is {LABELS[label]}, but by {known.where} it is {LABELS[known.label]}")
    known.ids.append(str(row.get("id")))


def _says_yes(row: Mapping[str, Any], where: str) -> bool:
    """Whether the right answer is yes: the word itself, or the letter of the choice that is it."""
    answer, choices = row.get("answer"), row.get("choices") or []
    said = answer
    if isinstance(answer, str) and answer in _LETTERS and choices:
        number = _LETTERS.index(answer)
        if not isinstance(choices, list) or number >= len(choices):
            raise DataError(f"{where}: the answer {answer!r} is none of the choices {choices!r}")
        said = choices[number]
    word = said.strip().rstrip(".").lower() if isinstance(said, str) else said
    if word not in ("yes", "no"):
        raise DataError(f"{where}: the answer must be Yes or No, not {said!r}")
    return bool(word == "yes")


def _relative(path: str, where: str) -> str:
    """The path below the folder of images, wherever that lay when the list was written."""
    parts = PurePosixPath(path.replace("\\", "/")).parts
    if _IMAGES not in parts or parts[-1] == _IMAGES or ".." in parts:
        raise DataError(f"{where}: image_path must have a path below {_IMAGES}, not {path!r}")
    return "/".join(parts[parts.index(_IMAGES) + 1 :])
