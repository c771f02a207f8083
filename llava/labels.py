"""The two classes, by number and by word. Imports no torch."""

from collections.abc import Mapping
from typing import Literal

Label = Literal["real", "fake"]

LABELS: tuple[Label, Label] = ("real", "fake")
"""Class names by their number."""
REAL, FAKE = 0, 1

CLASS_FOLDERS: dict[str, Label] = {"real": "real", "0_real": "real", "fake": "fake", "1_fake": "fake"}
"""What the name of a folder says of the images below it."""
PUBLISHED_FOLDERS: dict[str, Label] = {"laion": "real", "diffusiondb": "fake"}
"""The same for folders of the published training data, if no other folder says it."""

_WORDS = {"real": REAL, "fake": FAKE, "0": REAL, "1": FAKE}


def parse_label(value: object) -> int | None:
    """Returns the class number of a label given as number or word, in any case; None if it is neither."""
    return _WORDS.get(str(value).strip().lower())


def label_from_folders(path: str) -> Label | None:
    """Returns the class that the folders of a path name, or None if they name none or both."""
    return _label_from(path, CLASS_FOLDERS)


def published_label(path: str) -> Label | None:
    """Returns the class of an image by the folders of the published data too, or None if they do not say."""
    folders = {name.lower() for name in path.split("/")[:-1]}
    return _label_from(path, CLASS_FOLDERS if folders & CLASS_FOLDERS.keys() else PUBLISHED_FOLDERS)


def _label_from(path: str, meanings: Mapping[str, Label]) -> Label | None:
    labels = {meanings[name.lower()] for name in path.split("/")[:-1] if name.lower() in meanings}
    return labels.pop() if len(labels) == 1 else None
