"""Images with masks of what was changed in them: data sets' folders, manifests and tables. Imports no torch."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from llava.errors import DataError, MissingFileError
from llava.files import file_errors, read_json
from llava.images import walk_images
from llava.labels import FAKE, LABELS, REAL
from llava.tables import TABLE_SUFFIXES, Columns, NameFinder, image_name, read_label, read_rows

DOMAINS = ("aigc", "deepfake", "photoshop")
"""Folders of data sets by the kind of change."""
IMAGES, _MASKS = "image", "mask"
"""Names of the folders of images and of their masks."""
_SPLITS = ("train", "val", "test")
_MANIFEST = "manifest.jsonl"
_DESCRIPTIONS = ("output", "gt")
"""Who wrote a folder's descriptions: the explainer (``lisa_<split>_output.json``) or whoever annotated it (``_gt``)."""
CHANGED = 255
"""Grey value of changed pixels in masks as published; all others are unchanged."""


@dataclass(frozen=True)
class TamperedImage:
    """An image and where it was changed.

    Attributes:
        name: Its path below the data set's folder.
        image: Where it lies.
        masks: Files whose union is what was changed; none for a real image, or where that is not known.
        label: 0 for real, 1 for fake.
        set: The data set that it belongs to, its split included where that is part of the folder's name.
        domain: One of ``DOMAINS``; empty where it is not known.
        description: What is said of where it was changed and why one sees it; None where nothing is.
    """

    name: str
    image: Path
    masks: tuple[Path, ...]
    label: int
    set: str
    domain: str = ""
    description: str | None = None


def read_changed(masks: Sequence[Path], *, above: int = CHANGED - 1) -> np.ndarray:
    """Returns which pixels the union of some mask files marks, ``[height, width]`` bool.

    Args:
        masks: Grey images of one size.
        above: A pixel counts from the next grey value on; published: only 255 counts.

    Raises:
        DataError: A mask cannot be read, or sizes differ.
    """
    union: np.ndarray | None = None
    for file in masks:
        try:
            with Image.open(file) as image:
                marked = np.asarray(image.convert("L")) > above
        except Exception as error:  # Pillow's plugins raise many kinds
            raise DataError(f"the mask {file} cannot be read: {type(error).__name__}: {error}") from error
        if union is not None and union.shape != marked.shape:
            raise DataError(f"the mask {file} is of another size than {masks[0]}")
        union = marked if union is None else union | marked
    if union is None:
        raise DataError("there is no mask to read")
    return union


def is_mask(file: Path) -> bool:
    """Whether an image lies in a folder of masks beside a folder of images, so that it is no picture of anything."""
    return file.parent.name == _MASKS and (file.parent.parent / IMAGES).is_dir()


def opens(path: Path) -> bool:
    """Whether it is a folder in which, or up to two levels below, images and masks lie in ``image`` and ``mask``."""
    return path.is_dir() and next(_set_folders(path), None) is not None


def read_tampered(path: Path, *, described_by: str = "output", texts_of: Path | None = None) -> Iterator[TamperedImage]:
    """Lists the images of a data set.

    Args:
        path: Folders with ``image`` and, where the images were changed, ``mask``, in it or up to two levels below; an
            MMFR tree with a manifest; or a table with the columns ``image``, ``label``, and optionally ``mask``,
            ``description``, ``set`` and ``domain``.
        described_by: Whose descriptions are taken where a folder has several, see ``_DESCRIPTIONS``.
        texts_of: File of conversations whose first answers describe the images; default: those in ``MMTD_Set``.

    Raises:
        MissingFileError: There is nothing at the path.
        DataError: It is no such data set, or an image has no mask or a mask no image.
    """
    if not path.exists():
        raise MissingFileError(f"there is no file or folder {path}")
    if described_by not in _DESCRIPTIONS:
        raise DataError(f"descriptions are by {' or '.join(_DESCRIPTIONS)}, not {described_by!r}")
    if path.is_file() and path.suffix.lower() in TABLE_SUFFIXES:
        return _from_table(path)
    if (path / _MANIFEST).is_file():
        return _from_manifest(path)
    if opens(path):
        return _from_folders(path, described_by, texts_of)
    raise DataError(f"{path} holds no images with masks: no folder image beside mask, no {_MANIFEST}, and is no table")


# --- folders


def _set_folders(path: Path) -> Iterator[Path]:
    """Folders that have a folder of images, in order of path."""
    if _has_images(path):
        yield path
        return
    for folder in sorted(path.iterdir()):
        if _has_images(folder):
            yield folder
        elif folder.is_dir():
            yield from (inner for inner in sorted(folder.iterdir()) if _has_images(inner))


def _has_images(folder: Path) -> bool:
    return (folder / IMAGES).is_dir() and next(walk_images(folder / IMAGES), None) is not None


def _from_folders(root: Path, described_by: str, texts_of: Path | None) -> Iterator[TamperedImage]:
    root = root.resolve()
    texts = _conversations(sorted((root / "MMTD_Set").glob("*.json")) if texts_of is None else [texts_of])
    for folder in _set_folders(root):
        own = _folder_texts(folder, described_by)
        masks = _by_stem(folder / _MASKS) if (folder / _MASKS).is_dir() else None
        images = [*walk_images(folder / IMAGES)]
        if masks is not None:
            _check_pairs(folder, images, masks)
        for image in images:
            name = image.relative_to(root).as_posix()
            yield TamperedImage(
                name=name,
                image=image,
                masks=() if masks is None else (masks[image.stem],),
                label=REAL if masks is None else FAKE,
                set=set_name(folder.name),
                domain=next((part for part in reversed(folder.parts) if part in DOMAINS), ""),
                description=own.get(image.name) or texts.get(name),
            )


def set_name(folder: str) -> str:
    """Returns the data set of a folder: without what tells its authentic images from the others."""
    for ending in ("_Tp", "_Au"):
        folder = folder.removesuffix(ending)
    real = {"FFHQ": "DeepFake", "FaceAPP": "DeepFake", "COCO2017": "AIGC", "SD_inpaint": "AIGC"}
    for name, joined in real.items():
        if folder == name or folder.startswith(f"{name}_"):
            return f"{joined}{folder.removeprefix(name)}"
    return folder


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in walk_images(folder):
        if file.stem in found:
            raise DataError(f"{folder} has two masks of one name: {found[file.stem].name} and {file.name}")
        found[file.stem] = file
    return found


def _check_pairs(folder: Path, images: Sequence[Path], masks: Mapping[str, Path]) -> None:
    stems: dict[str, Path] = {}
    for image in images:
        if (other := stems.setdefault(image.stem, image)) != image:
            raise DataError(f"{folder} has two images of one name for one mask: {other.name} and {image.name}")
    without = sorted(image.name for image in images if image.stem not in masks)
    lonely = sorted(file.name for stem, file in masks.items() if stem not in stems)
    if without or lonely:
        parts = [f"no mask for {', '.join(without[:5])}"] if without else []
        parts += [f"no image for the mask {', '.join(lonely[:5])}"] if lonely else []
        raise DataError(f"{folder}: {'; '.join(parts)}; an image and its mask must have one name")


def _folder_texts(folder: Path, described_by: str) -> dict[str, str]:
    """Descriptions beside a folder's images, by file name."""
    for split in _SPLITS:
        file = folder / f"lisa_{split}_{described_by}.json"
        if file.is_file():
            return {str(entry["image"]): str(entry["outputs"]) for entry in _entries(file, ("image", "outputs"))}
    return {}


def _conversations(files: Sequence[Path]) -> dict[str, str]:
    """First answers of conversations, by the images' paths."""
    found: dict[str, str] = {}
    for file in files:
        for entry in _entries(file, ("image", "conversations")):
            turns = entry["conversations"]
            answers = [turn.get("value") for turn in turns if isinstance(turn, dict) and turn.get("from") == "gpt"]
            if answers and isinstance(answers[0], str):
                found[PurePosixPath(str(entry["image"])).as_posix()] = answers[0]
    return found


def read_descriptions(file: Path) -> dict[str, str]:
    """Reads answers about images, one JSON object a line: ``image``, and ``text`` or ``outputs``.

    Returns:
        The answers by the images' names as they stand there, and by their whole paths.

    Raises:
        DataError: A line is no such object.
    """
    found: dict[str, str] = {}
    for row in read_rows(file):
        name, text = row.values.get("image"), row.values.get("text") or row.values.get("outputs")
        if not isinstance(name, str):
            raise DataError(f"{row.where}: a description needs image, and text or outputs")
        if isinstance(text, str) and text.strip():
            found[name] = text
            found[str((file.parent / name).resolve())] = text
            found.setdefault(str(Path(name).resolve()), text)
    return found


def _entries(file: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    content = read_json(file)
    if not isinstance(content, list):
        raise DataError(f"{file} must hold a list of objects")
    for number, entry in enumerate(content, start=1):
        if not isinstance(entry, dict) or any(name not in entry for name in needed):
            raise DataError(f"{file}, row {number}: an entry needs {' and '.join(needed)}")
    return content


# --- manifests and tables


def _from_manifest(root: Path) -> Iterator[TamperedImage]:
    file = root / _MANIFEST
    with file_errors(file, "read"), file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                name, label = str(entry["image"]), LABELS.index(entry["label"])
                masks = manifest_masks(root, entry)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise DataError(f"{file}, line {number}: this is no line of a manifest") from None
            found = entry.get("set") or entry.get("split") or root.name
            yield TamperedImage(name, root / name, masks, label, str(found), description=_sentences(entry))


def _sentences(entry: Mapping[str, Any]) -> str | None:
    """What a manifest's line says of its image."""
    given = entry.get("attributes")
    texts = given.values() if isinstance(given, Mapping) else ()
    return " ".join(str(text) for text in texts if text) or None


def manifest_masks(root: Path, entry: Mapping[str, Any]) -> tuple[Path, ...]:
    """Returns the mask files that a manifest's line names."""
    return tuple(root / str(path) for path in (entry.get("masks") or {}).values())


def _from_table(file: Path) -> Iterator[TamperedImage]:
    finder = NameFinder(file.parent)
    for row in read_rows(file):
        columns = Columns.find(row.values, row.where)
        name = image_name(row, columns)
        values = row.values
        label = read_label(values.get(columns.label) if columns.label else None, columns.label, {}, row.where)
        description = values.get("description")
        yield TamperedImage(
            name=name,
            image=finder.find(name),
            masks=row_masks(values, finder),
            label=label,
            set=str(values.get("set") or file.stem),
            domain=str(values.get("domain") or ""),
            description=str(description) if description else None,
        )
    finder.report(file)


def row_masks(values: Mapping[str, Any], finder: NameFinder) -> tuple[Path, ...]:
    """Returns the mask that a table's row names in its column ``mask``, if any."""
    mask = values.get("mask")
    return (finder.find(str(mask)),) if mask else ()
