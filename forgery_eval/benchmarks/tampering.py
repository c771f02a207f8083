"""Images with masks: folders ``image`` and ``mask`` as in CASIA, IMD2020 and the like, or conversations that name them.

Images in a folder without ``mask`` beside it are real. A file of conversations (JSON, a list of ``image`` and
``conversations``) lies in or beside the folders that its paths start from.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from forgery_eval.benchmarks.base import Sample
from llava import tampered
from llava.errors import DataError
from llava.files import read_json

ON_DISK = "CASIA, IMD2020 and the like: folders image and mask; or a .json of conversations that name such images"
_FIELDS = ("image", "conversations")


def opens(path: Path) -> bool:
    """Whether there are such folders, or it is a file of conversations whose images lie in such."""
    if path.is_dir():
        return tampered.opens(path)
    return path.suffix.lower() == ".json" and _root_of(path) is not None


def read(path: Path) -> Iterator[Sample]:
    """Yields the images in order of path; of a file of conversations, those that it names.

    Raises:
        DataError: An image has no mask or a mask no image, or a named image is not there.
    """
    if path.is_dir():
        for image in tampered.read_tampered(path):
            yield _sample(image)
        return
    root = _root_of(path)
    assert root is not None
    known = {image.name: image for image in tampered.read_tampered(root, texts_of=path)}
    for name in dict.fromkeys(str(entry["image"]) for entry in read_json(path)):
        if name not in known:
            raise DataError(f"{path} names {name}, but {root} has no such image in a folder beside its masks")
        yield _sample(known[name])


def _sample(image: tampered.TamperedImage) -> Sample:
    groups = {"domain": image.domain} if image.domain else {}
    return Sample(
        image.name, image.image, image.label, image.set, reference=image.description, groups=groups, masks=image.masks
    )


def _root_of(file: Path) -> Path | None:
    """The folder that the paths of a file of conversations start from."""
    if not file.is_file():
        return None
    content = read_json(file)
    first = content[0] if isinstance(content, list) and content else None
    if not isinstance(first, dict) or any(name not in first for name in _FIELDS):
        return None
    name = str(first["image"])
    if PurePosixPath(name).parent.name != tampered.IMAGES:
        return None
    return next((root for root in (file.parent, *file.parent.parents[:2]) if (root / name).is_file()), None)
