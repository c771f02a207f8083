"""Evaluation sets: a stream of samples, whatever the layout on disk."""

from collections.abc import Mapping
from pathlib import Path

from forgery_eval.benchmarks import ddvqa, fakeclue, ffpp, folders, loki, mmfr, synthetic, table, tampering, trees
from forgery_eval.benchmarks.base import Sample
from llava.errors import DataError, MissingFileError
from llava.images import walk_images
from llava.labels import LABELS

__all__ = ["Sample", "describe_layouts", "list_passed_over", "open_benchmark"]

_LAYOUTS = (fakeclue, loki, ddvqa, ffpp, tampering, table, synthetic, trees, mmfr, folders)
"""Each offers ``ON_DISK``, ``opens(path)`` and ``read(path)``; data go to the first that knows their layout."""


def open_benchmark(
    path: Path,
    *,
    sets: list[str] | None = None,
    max_sample: int | None = None,
    label_map: Mapping[str, int] | None = None,
) -> list[Sample]:
    """Lists the samples of a data set.

    Args:
        path: An MMFR tree or one of its sets, FakeClue, LOKI's images, DD-VQA, FaceForensics++ in packs,
            trees by generator, folders ``real`` and ``fake``, or a CSV, JSON or JSONL manifest.
        sets: Only these evaluation sets.
        max_sample: The first so many of each class and set.
        label_map: What further label words of a table mean.

    Raises:
        MissingFileError: There is nothing at the path.
        DataError: The layout is not known, there is no image, an id stands twice, or a set is not there.
    """
    if not path.exists():
        raise MissingFileError(f"there is no file or folder {path}")
    layout = next((layout for layout in _LAYOUTS if layout.opens(path)), None)
    if layout is None:
        raise DataError(
            f"{path} is no data set of a known layout: folders 0_real and 1_fake, real and fake, or image and "
            "mask, in it or in its subfolders, or a .csv, .tsv, .json or .jsonl file"
        )
    samples = list(table.read(path, label_map) if layout is table else layout.read(path))
    if sets:
        missing = sorted(set(sets) - {sample.set for sample in samples})
        if missing:
            raise DataError(f"{path} has no set {', '.join(missing)}; it has {', '.join(_sets(samples))}")
        samples = [sample for sample in samples if sample.set in sets]
    if not samples:
        raise DataError(f"{path} holds no image")
    _check_ids(samples)
    return samples if max_sample is None else _first_of_each(samples, max_sample)


def describe_layouts() -> str:
    """Says what each data set needs on disk, a line each."""
    return "\n".join(layout.ON_DISK for layout in _LAYOUTS)


def list_passed_over(path: Path) -> list[Path]:
    """Returns the files in a data set's folders of real and of fake images that are no images, sorted."""
    others: list[Path] = []
    if path.is_dir():
        for _ in walk_images(path, passed_over=others):
            pass
    classes = {*LABELS, *mmfr.CLASS_FOLDERS}
    return [file for file in others if classes & {*file.relative_to(path).parts[:-1]}]


def _sets(samples: list[Sample]) -> list[str]:
    return list(dict.fromkeys(sample.set for sample in samples))


def _check_ids(samples: list[Sample]) -> None:
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise DataError(f"the id {sample.id!r} stands more than once")
        seen.add(sample.id)


def _first_of_each(samples: list[Sample], most: int) -> list[Sample]:
    taken: dict[tuple[str, int], int] = {}
    kept = []
    for sample in samples:
        group = (sample.set, sample.label)
        taken[group] = taken.get(group, 0) + 1
        if taken[group] <= most:
            kept.append(sample)
    return kept
