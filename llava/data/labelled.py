"""Images with a class, for plain networks: folders, tables, training records, MMFR trees, packs of frames."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from llava.data.records import read_records
from llava.errors import DataError, MissingFileError
from llava.frames import Frames, has_packs, read_videos
from llava.images import walk_images
from llava.labels import LABELS
from llava.systems.base import AnswerFormat
from llava.tables import TABLE_SUFFIXES, Columns, NameFinder, image_name, read_label, read_rows
from llava.tampered import is_mask

RECORDS_FILE = "forgery_reasoning_cot.json"
"""Training records of an MMFR tree."""
_NUMBERED = ("0_real", "1_fake")


@dataclass(frozen=True)
class LabelledImage:
    """An image and its class.

    Attributes:
        images: Where it lies; the frames of a video, of which training draws one.
        label: Number of the class.
        origin: File and row, or the image itself, for messages.
    """

    images: Sequence[Path]
    label: int
    origin: str

    def choose(self, random: Random | None) -> Path:
        """Returns a random frame, or the middle one; a single image is both."""
        index = len(self.images) // 2 if random is None else random.randrange(len(self.images))
        return self.images[index]


def read_labelled(
    paths: Sequence[Path],
    classes: Sequence[str],
    *,
    answer_format: AnswerFormat | None,
    image_folder: Path | None = None,
    label_map: Mapping[str, int] | None = None,
    split: str = "train",
) -> list[LabelledImage]:
    """Lists images with their classes; no image is opened.

    Args:
        paths: Folders with a subfolder for each class (also ``0_real`` and ``1_fake``), in themselves or in folders
            below; MMFR trees; folders with packs of FaceForensics++; tables with a column of images and one of labels;
            training records (JSON).
        classes: Words of the classes, by number.
        answer_format: Reads the verdicts of training records; None where there are none.
        image_folder: What the names in records and tables start from; default: their file's folder.
        label_map: What further label words mean.
        split: Which list of pairs counts, of packs of FaceForensics++ that have some.

    Raises:
        MissingFileError: There is nothing at a path.
        DataError: A layout is not known, a label is none of the classes, or a class has no image.
    """
    read = partial(
        _read,
        classes=classes,
        answer_format=answer_format,
        image_folder=image_folder,
        meanings=label_map or {},
        split=split,
    )
    found = [image for path in paths for image in read(path)]
    counts = [sum(image.label == number for image in found) for number in range(len(classes))]
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if empty:
        given = ", ".join(map(str, paths))
        raise DataError(f"{given}: there is no image of {', '.join(empty)}; each class needs some")
    return found


def _read(
    path: Path,
    *,
    classes: Sequence[str],
    answer_format: AnswerFormat | None,
    image_folder: Path | None,
    meanings: Mapping[str, int],
    split: str,
) -> Iterator[LabelledImage]:
    if not path.exists():
        raise MissingFileError(f"there is no file or folder {path}")
    if has_packs(path):
        return _from_packs(path, classes, split)
    if path.is_dir():
        if tuple(classes) == LABELS and _has_records(path / RECORDS_FILE):
            return _from_records(path / RECORDS_FILE, answer_format, image_folder)
        return _from_folder(path, classes)
    if path.suffix.lower() in (".json", ".jsonl") and _holds_conversations(path):
        if tuple(classes) != LABELS:
            raise DataError(f"{path}: verdicts of records are real or fake, but the classes are {', '.join(classes)}")
        return _from_records(path, answer_format, image_folder)
    if path.suffix.lower() in TABLE_SUFFIXES:
        return _from_table(path, classes, image_folder, meanings)
    raise DataError(f"{path} is no folder, table or file of training records")


def _from_packs(folder: Path, classes: Sequence[str], split: str) -> Iterator[LabelledImage]:
    """Yields videos; as published, a training never draws the last frame."""
    if tuple(classes) != LABELS:
        raise DataError(f"{folder}: these videos are real or fake, but the classes are {', '.join(classes)}")
    for video in read_videos(folder, split):
        frames = Frames(video.frames.pack, video.key, max(1, len(video.frames) - 1))
        yield LabelledImage(frames, video.label, f"{video.frames.pack}/{video.key}")


def _has_records(file: Path) -> bool:
    """Whether a tree has training records; one of evaluation sets alone has an empty list."""
    return file.is_file() and file.read_text("utf-8").strip() not in ("", "[]")


def _holds_conversations(file: Path) -> bool:
    row = next(iter(read_rows(file)), None)
    return row is not None and "conversations" in row.values


def _from_records(file: Path, answer_format: AnswerFormat | None, folder: Path | None) -> Iterator[LabelledImage]:
    if answer_format is None:
        raise DataError(f"{file}: these are training records, but this network's system has no words for a verdict")
    for record in read_records([file]):
        if record.image is None:
            raise DataError(f"{record.origin}: there is no image, so the network cannot learn from it")
        answer = record.verdict(answer_format)
        if answer.verdict is None:
            raise DataError(f"{record.origin}: {answer.problem}")
        yield LabelledImage(((folder or file.parent) / record.image,), LABELS.index(answer.verdict), record.origin)


def _from_table(
    file: Path, classes: Sequence[str], folder: Path | None, meanings: Mapping[str, int]
) -> Iterator[LabelledImage]:
    finder = NameFinder(folder or file.parent)
    for row in read_rows(file):
        columns = Columns.find(row.values, row.where)
        value = row.values.get(columns.label) if columns.label else None
        if tuple(classes) == LABELS:
            label = read_label(value, columns.label, meanings, row.where)
        else:
            label = _class_number(str(value), classes, row.where)
        yield LabelledImage((finder.find(image_name(row, columns)),), label, row.where)
    finder.report(file)


def _class_number(word: str, classes: Sequence[str], where: str) -> int:
    names = [name.lower() for name in classes]
    plain = word.strip().lower()
    if plain in names:
        return names.index(plain)
    if plain.isdigit() and int(plain) < len(names):
        return int(plain)
    raise DataError(f"{where}: the label must be one of {', '.join(classes)} or its number, not {word!r}")


def _from_folder(folder: Path, classes: Sequence[str]) -> Iterator[LabelledImage]:
    names = {name: number for number, name in enumerate(classes)}
    if tuple(classes) == LABELS:
        names |= {name: number for number, name in enumerate(_NUMBERED)}
    found = [*_class_folders(folder.resolve(), names)]
    if not found:
        raise DataError(
            f"{folder} is no data set of a known layout: subfolders {' and '.join(classes)}, in it or in folders below"
        )
    for root, label in found:
        for file in walk_images(root):
            if not is_mask(file):
                yield LabelledImage((file,), label, str(file))


def _class_folders(folder: Path, names: Mapping[str, int]) -> Iterator[tuple[Path, int]]:
    """Yields the folders of classes, down to where one is found."""
    below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    own = [(path, names[path.name.lower()]) for path in below if path.name.lower() in names]
    yield from own
    if not own:
        for path in below:
            yield from _class_folders(path, names)
