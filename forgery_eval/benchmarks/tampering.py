"""Images with masks: folders ``image`` and ``mask`` as in CASIA, IMD2020 and the like, or conversations that name them.

Images in a folder without ``mask`` beside it are real. A file of conversations (JSON, a list of ``image`` and
``conversations``) lies in or beside the folders that its paths start from.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from forgery_eval.benchmarks.base import Sample
from llava import tampered
from llava.errors import DataError
from llava.files import read_json

ON_DISK = "CASIA, IMD2020 and the like: folders image and mask; or a .json of conversations that name such images"
_FIELDS = ("image", "conversations")


def opens(path: Path) -> bool:
    """Whether there are such folders, or it is a file of conversations about images in such."""
    if path.is_dir():
        return tampered.opens(path)
    return path.suffix.lower() == ".json" and path.is_file() and bool(_names(path))


def read(path: Path) -> Iterator[Sample]:
    """Yields the images in order of path; of a file of conversations, those that it names.

    Raises:
        DataError: An image has no mask or a mask no image, or a named image is not there.
    """
    if path.is_dir():
        for image in tampered.read_tampered(path):
            yield _sample(image)
        return
    names = _names(path)
    root = _root_of(path, names)
    known = {image.name: image for image in tampered.read_tampered(root, texts_of=path)}
    for name in names:
        if name not in known:
            raise DataError(f"{path} names {name}, but {root} has no such image in a folder beside its masks")
        yield _sample(known[name])


def _sample(image: tampered.TamperedImage) -> Sample:
    groups = {"domain": image.domain} if image.domain else {}
    return Sample(
        image.name, image.image, image.label, image.set, reference=image.description, groups=groups, masks=image.masks
    )


def _names(file: Path) -> list[str]:
    """The images that a file of conversations names, each once; none if it is no such file."""
    content = read_json(file)
    entries = content if isinstance(content, list) else []
    if not entries or any(
        not isinstance(entry, dict) or any(name not in entry for name in _FIELDS) for entry in entries
    ):
        return []
    names = list(dict.fromkeys(str(entry["image"]) for entry in entries))
    return names if PurePosixPath(names[0]).parent.name == tampered.IMAGES and "label" not in entries[0] else []


def _root_of(file: Path, names: Sequence[str]) -> Path:
    """The folder that the paths of a file of conversations start from.

    Raises:
        DataError: None of the images is there.
    """
    roots = (file.parent, *file.parent.parents[:2])
    for name in names:
        for root in roots:
            if (root / name).is_file():
                return root
    where = ", ".join(map(str, roots))
    raise DataError(f"{file} names {names[0]} and others, but none lies in {where}; put the images of the set there")
