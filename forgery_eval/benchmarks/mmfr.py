"""MMFR evaluation sets: ``<set>/{0_real,1_fake}/…`` with ``<set>/<set>_reasoning.json``."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from forgery_eval.answers import attribute_name
from forgery_eval.benchmarks.base import Sample
from llava.errors import DataError
from llava.files import read_json
from llava.images import walk_images

ON_DISK = "MMFR: <set>/0_real and 1_fake, with <set>/<set>_reasoning.json for texts; also below evaluation_sets"
CLASS_FOLDERS = ("0_real", "1_fake")
TREE = "evaluation_sets"


def opens(path: Path) -> bool:
    """Whether it is a set, or a folder of sets."""
    return bool(_set_folders(path))


def read(path: Path) -> Iterator[Sample]:
    """Yields the images that a set's reasoning file names, in its order, then those that it does not name.

    An image that the file names and that is not there is yielded too, so that it is counted.

    Raises:
        UserError: A reasoning file is not of the published form.
    """
    for folder in _set_folders(path):
        reasoning = _read_reasoning(folder)
        found = (f"{folder.name}/{file.relative_to(folder).as_posix()}" for file in _images(folder))
        for name in dict.fromkeys([*reasoning, *found]):
            sentences = reasoning.get(name)
            yield Sample(
                id=name,
                image=folder.parent / name,
                label=CLASS_FOLDERS.index(PurePosixPath(name).parts[1]),
                set=folder.name,
                reference=None if sentences is None else reference_text(sentences),
                attributes=None if sentences is None else attribute_names(sentences),
            )


def reference_text(sentences: dict[str, str | None]) -> str:
    """Joins the sentences that are there, in alphabetical order of their attributes."""
    return " ".join(sentence for _, sentence in sorted(sentences.items()) if sentence is not None)


def attribute_names(sentences: dict[str, str | None]) -> tuple[str, ...]:
    """Returns the known attributes that have a sentence."""
    return tuple(known for name, sentence in sentences.items() if sentence and (known := attribute_name(name)))


def _set_folders(path: Path) -> list[Path]:
    """The sets in order of name; the resolved path gives a set its name where it was given as a dot."""
    root = (path / TREE if (path / TREE).is_dir() else path).resolve()
    if not root.is_dir():
        return []
    candidates = [root] if _is_set(root) else sorted(root.iterdir())
    return [folder for folder in candidates if folder.is_dir() and _is_set(folder)]


def _is_set(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in CLASS_FOLDERS)


def _images(folder: Path) -> Iterator[Path]:
    for name in CLASS_FOLDERS:
        if (folder / name).is_dir():
            yield from walk_images(folder / name)


def _read_reasoning(folder: Path) -> dict[str, dict[str, Any]]:
    file = folder / f"{folder.name}_reasoning.json"
    if not file.exists():
        return {}
    content = read_json(file)
    if not isinstance(content, dict):
        raise DataError(f"{file} must hold an object whose keys are image paths")
    for name, sentences in content.items():
        parts = PurePosixPath(name).parts
        if len(parts) < 3 or parts[0] != folder.name or parts[1] not in CLASS_FOLDERS or ".." in parts:
            raise DataError(f"{file}: {name!r} is no image of {folder.name}/0_real or {folder.name}/1_fake")
        if not isinstance(sentences, dict) or not all(s is None or isinstance(s, str) for s in sentences.values()):
            raise DataError(f"{file}: {name!r} must have an object of sentences or nulls")
    return content
