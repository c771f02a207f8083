"""FakeClue (arXiv 2503.14905): ``data_json/{train,test}.json`` beside the folders ``train`` and ``test``.

Its labels say 1 for real; they are turned round here. An answer is a sentence with the verdict, and then the clues.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from forgery_eval.benchmarks.base import Sample
from llava.errors import DataError
from llava.files import read_json
from llava.labels import FAKE, REAL

ON_DISK = "FakeClue: data_json/test.json (or train.json, named itself) beside the folders test and train"
NAME = "fakeclue"
_LISTS = "data_json"
_DEFAULT_SPLIT = "test"
_LABELS = {1: REAL, 0: FAKE}


def opens(path: Path) -> bool:
    """Whether it is the data set's folder, or one of its lists."""
    if path.is_file():
        return path.suffix == ".json" and path.parent.name == _LISTS
    return any((path / _LISTS).glob("*.json"))


def read(path: Path) -> Iterator[Sample]:
    """Yields the images of a list in its order; of the folder, those of the test split.

    An image that is not there is yielded too, so that it is counted. Groups are the category and the source, which is
    the first part of an image's path.

    Raises:
        UserError: The list is missing, or a row is none of the data set's; the message names it.
    """
    file = path if path.is_file() else path / _LISTS / f"{_DEFAULT_SPLIT}.json"
    rows = read_json(file)
    if not isinstance(rows, list):
        raise DataError(f"{file} must hold a list of objects, as FakeClue's lists do")
    root = file.parent.parent
    for number, row in enumerate(rows, start=1):
        yield _sample(row, root, file.stem, f"{file}, row {number}")


def _sample(row: Any, root: Path, split: str, where: str) -> Sample:
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be an object, not {row!r}")
    image, label, category = row.get("image"), row.get("label"), row.get("cate")
    if not isinstance(image, str) or not image or ".." in PurePosixPath(image).parts:
        raise DataError(f"{where}: image must be a path below {split}, not {image!r}")
    if not isinstance(label, int) or isinstance(label, bool) or label not in _LABELS:
        raise DataError(f"{where}: label must be 1 (real) or 0 (fake), not {label!r}")
    if not isinstance(category, str) or not category:
        raise DataError(f"{where}: cate must name a category, not {category!r}")
    answer = _answer(row.get("conversations"), where)
    return Sample(
        id=f"{split}/{image}",
        image=_find(root, split, image),
        label=_LABELS[label],
        set=NAME,
        reference=(answer.partition(". ")[2].strip() or answer) if answer else None,
        groups={"category": category, "source": PurePosixPath(image).parts[0]},
        answers=(answer,) if answer else (),
    )


def _answer(turns: Any, where: str) -> str:
    """The first answer of a conversation; empty if there is none."""
    if turns is None:
        return ""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f"{where}: conversations must be a list of turns")
    answer = next((turn.get("value") for turn in turns if turn.get("from") == "gpt"), "")
    if not isinstance(answer, str):
        raise DataError(f"{where}: the answer must be a text, not {answer!r}")
    return answer.strip()


def _find(root: Path, split: str, image: str) -> Path:
    """Where an image lies: below the split's folder, which a careless unpacking puts into a folder of its own name."""
    places = (root / split / image, root / split / split / image)
    return next((place for place in places if place.is_file()), places[0])
