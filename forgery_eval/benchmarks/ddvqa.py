"""DD-VQA (arXiv 2402.00126): ``DQ_FF++/{train_set,test_set}/<method>/<method>.json``, questions on frames of FF++.

The data set has no images. Frames lie in ``frames/<method>/<video>`` beside ``DQ_FF++``, and the k-th question is on
the k-th of them in order of name; or one image a video lies in ``images`` under the key of its questions.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from forgery_eval.benchmarks.base import Sample
from llava.errors import DataError
from llava.files import read_json
from llava.images import IMAGE_SUFFIXES
from llava.labels import FAKE, REAL

ON_DISK = "DD-VQA: DQ_FF++/{train_set,test_set}/<method>/<method>.json beside frames/<method>/<video> or images"
NAME = "ddvqa"
_QUESTIONS = "DQ_FF++"
_SETS = ("train_set", "test_set")
_DEFAULT_SET = "test_set"
METHODS = {
    "0": "Deepfakes",
    "1": "Face2Face",
    "2": "FaceShifter",
    "3": "FaceSwap",
    "5": "Original",
    "6": "Neuraltexture",
}
"""Folder of each method by the number that its videos' keys begin with."""
_REAL = "Original"
_ON_THE_IMAGE = "0"
"""Number of the question on the image as a whole; the others are on parts of the face."""


def opens(path: Path) -> bool:
    """Whether it is the data set's folder, ``DQ_FF++`` itself, or one of its two sets."""
    return _questions_folder(path) is not None


def read(path: Path) -> Iterator[Sample]:
    """Yields the videos of the test set, or of the set that is named, with their frame of the question on the image.

    ``reference`` is the first answer without its verdict, ``answers`` are all of them, and ``questions`` are those on
    parts of the face with their answers. A frame that is not there is yielded too, so that it is counted.

    Raises:
        UserError: A file cannot be read, or is none of the data set's; the message names file and key.
    """
    folder = _questions_folder(path)
    assert folder is not None
    root = folder.parent.parent
    files = sorted(file for file in folder.glob("*/*.json") if file.stem == file.parent.name)
    if not files:
        raise DataError(f"{folder} has no <method>/<method>.json")
    for file in files:
        if file.stem not in METHODS.values():
            raise DataError(f"{file}: unknown method; known: {', '.join(METHODS.values())}")
        content = read_json(file)
        if not isinstance(content, dict):
            raise DataError(f"{file} must hold an object whose keys are videos")
        for key, questions in content.items():
            yield _sample(key, questions, file, root)


def _questions_folder(path: Path) -> Path | None:
    path = path.resolve()
    places = (path / _QUESTIONS / _DEFAULT_SET, path / _DEFAULT_SET, path)
    known = (place for place in places if place.name in _SETS and place.parent.name == _QUESTIONS)
    return next((place for place in known if place.is_dir()), None)


def _sample(key: str, given: Any, file: Path, root: Path) -> Sample:
    number, _, video = key.partition("_")
    where = f"{file}: {key!r}"
    if METHODS.get(number) != file.stem or not video:
        known = ", ".join(f"{own} {name}" for own, name in METHODS.items())
        raise DataError(f"{where} is no video of {file.stem}: a key is <number of the method>_<video> ({known})")
    questions = _questions(given, where)
    if _ON_THE_IMAGE not in questions:
        raise DataError(f"{where} has no question {_ON_THE_IMAGE!r}, the one on the image as a whole")
    answers = questions[_ON_THE_IMAGE][1]
    return Sample(
        id=key,
        image=_find_frame(root, file.stem, key, video),
        label=REAL if file.stem == _REAL else FAKE,
        set=NAME,
        reference=answers[0].partition(". ")[2].strip() or answers[0],
        groups={"method": file.stem},
        answers=answers,
        questions=dict(own for name, own in questions.items() if name != _ON_THE_IMAGE),
    )


def _questions(given: Any, where: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Each question with its answers, by its number."""
    found = {}
    for name, entry in given.items() if isinstance(given, Mapping) else [("", None)]:
        question = entry.get("question") if isinstance(entry, Mapping) else None
        answers = entry.get("answer") if isinstance(entry, Mapping) else None
        texts = isinstance(answers, list) and answers and all(isinstance(text, str) and text for text in answers)
        if not isinstance(question, str) or not texts:
            raise DataError(f'{where} must have questions, each {{"question": text, "answer": [text, …]}}')
        found[name] = (question, tuple(answers or ()))
    return found


def _find_frame(root: Path, method: str, key: str, video: str) -> Path:
    """The frame of the question on the image; where there is none, the path at which the first frame would lie."""
    folder = root / "frames" / method / video
    frames = sorted(file for file in folder.glob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if frames:
        return frames[int(_ON_THE_IMAGE)]
    single = (root / "images" / f"{key}{suffix}" for suffix in (".jpg", ".png"))
    return next((file for file in single if file.is_file()), folder / "0000.png")
