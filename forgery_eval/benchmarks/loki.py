"""LOKI's images (arXiv 2410.09732): ``data/image/*.json`` beside ``FakeImage_dataset``.

LOKI has four types of questions. Judgements come twice an image, once whether it was made by an AI, once whether it is
of the real world, as yes/no or as a choice of the two. Both rows must say the same; an image is one sample, and the
system's own question is asked of it. A choice between images, which of them is generated or is not, says the same of
its images, and is answered by their scores. An open question about what is wrong with an image gives the reference text
that explanations are compared with. A choice of anomalies would have to be asked: it is named.
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
_BETWEEN = {"image_fake_from_real_": FAKE, "image_real_from_fake_": REAL}
"""The class of the image that a choice between images asks for, by the beginning of its kind."""
_LETTERS = "ABCDEFGH"
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


@dataclass
class _Image:
    """What the rows say of one image."""

    label: int
    category: str
    where: str
    chosen_from: list[tuple[str, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class _Explanation:
    """An open question's answer: what is wrong with an image."""

    kind: str
    text: str
    where: str


def opens(path: Path) -> bool:
    """Whether it is the data set's folder, or one of its lists."""
    if path.is_file():
        return path.suffix == ".json" and path.parent.parts[-2:] == _LISTS.parts
    return any((path / _LISTS).glob("*.json"))


def read(path: Path) -> Iterator[Sample]:
    """Yields each image once, in the order in which the lists name them; groups are the category and its folder.

    ``reference`` is the first explanation of an image. Choices of anomalies, and explanations of images that no row
    judges, are named and left out. Of two wordings of a choice between the same two images one is kept. An image that
    is not there is yielded too, so that it is counted.

    Raises:
        UserError: A list cannot be read, or a row is none of the data set's or contradicts another one.
    """
    files = [path] if path.is_file() else sorted((path / _LISTS).glob("*.json"))
    images: dict[str, _Image] = {}
    explanations: dict[str, _Explanation] = {}
    others: list[str] = []
    for file in files:
        rows = read_json(file)
        if not isinstance(rows, list):
            raise DataError(f"{file} must hold a list of objects, as LOKI's lists do")
        for number, row in enumerate(rows, start=1):
            _add(row, f"{file}, row {number}", images, explanations, others)
    others += [f"{one.where}: {one.kind}" for name, one in explanations.items() if name not in images]
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
            reference=explanations[name].text if name in explanations else None,
            groups={"category": image.category, "folder": "/".join(parts[:-1])},
            chosen_from=tuple(image.chosen_from),
        )


def _add(
    row: Any, where: str, images: dict[str, _Image], explanations: dict[str, _Explanation], others: list[str]
) -> None:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be an object, not {row!r}")
    kind = row.get("question_type")
    if not isinstance(kind, str) or not kind:
        raise DataError(f"{where}: question_type must be a text, not {kind!r}")
    between = next((start for start in _BETWEEN if kind.startswith(start)), None)
    if between:
        _add_choice(row, _BETWEEN[between], kind.removeprefix(between), where, images)
        return
    asked, _, category = kind.removeprefix(_KIND).partition("_")
    if not kind.startswith(_KIND) or asked not in _ASKS or not category or not isinstance(row.get("image_path"), str):
        if _is_explanation(row):
            explanation = _Explanation(kind, row["answer"].strip(), where)
            explanations.setdefault(_relative(row["image_path"], where), explanation)
        else:
            others.append(f"{where}: {kind}")
        return
    name = _relative(row["image_path"], where)
    label = _ASKS[asked] if _says_yes(row, where) else 1 - _ASKS[asked]
    _judge(name, label, category, where, images)


def _judge(name: str, label: int, category: str, where: str, images: dict[str, _Image]) -> _Image:
    """Notes what a row says of an image, which must be what all rows say."""
    known = images.setdefault(name, _Image(label, category, where))
    if known.label != label:
        raise DataError(f"{where}: {name} is {LABELS[label]}, but by {known.where} it is {LABELS[known.label]}")
    return known


def _add_choice(row: Mapping[str, Any], label: int, category: str, where: str, images: dict[str, _Image]) -> None:
    """Notes a choice between images: the right one is of a class, the others are of the other."""
    paths = row.get("image_path")
    if not isinstance(paths, list) or len(paths) < 2 or not all(isinstance(path, str) for path in paths):
        raise DataError(f"{where}: image_path must list the images to choose from, not {paths!r}")
    names = [_relative(path, where) for path in paths]
    if len(set(names)) < len(names):
        raise DataError(f"{where}: image_path lists an image twice")
    right = _chosen(row, where)
    if right >= len(names):
        raise DataError(f"{where}: the right choice is image {right + 1}, but there are {len(names)}")
    for number, name in enumerate(names):
        _judge(name, label if number == right else 1 - label, category, where, images)
    # Between two images either wording asks the same: which of them is the fake one.
    odd = names[right] if label == FAKE or len(names) > 2 else names[1 - right]
    others = tuple(sorted(name for name in names if name != odd))
    if others not in images[odd].chosen_from:
        images[odd].chosen_from.append(others)


def _is_explanation(row: Mapping[str, Any]) -> bool:
    """Whether it is an open question about one image, with an answer."""
    answer = row.get("answer")
    texts = isinstance(row.get("image_path"), str) and isinstance(answer, str) and bool(answer.strip())
    return texts and not row.get("choices") and not str(row.get("question_type")).startswith(_KIND)


def _said(row: Mapping[str, Any], where: str) -> Any:
    """The right answer, or the choice whose letter it is."""
    answer, choices = row.get("answer"), row.get("choices") or []
    if not (isinstance(answer, str) and len(answer) == 1 and answer in _LETTERS and choices):
        return answer
    number = _LETTERS.index(answer)
    if not isinstance(choices, list) or number >= len(choices):
        raise DataError(f"{where}: the answer {answer!r} is none of the choices {choices!r}")
    return choices[number]


def _chosen(row: Mapping[str, Any], where: str) -> int:
    """The number of the image that is the right choice, which is named by its place: "The first one."."""
    said = _said(row, where)
    words = said.lower().rstrip(".").split() if isinstance(said, str) else []
    named = [number for number, ordinal in enumerate(_ORDINALS) if ordinal in words]
    if len(named) != 1:
        raise DataError(f"{where}: the answer must name one image by its place, as in 'The first one.', not {said!r}")
    return named[0]


def _says_yes(row: Mapping[str, Any], where: str) -> bool:
    """Whether the right answer is yes: the word itself, or the letter of the choice that is it."""
    said = _said(row, where)
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
