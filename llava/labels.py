"""The two classes, by number and by word. Imports no torch."""

from typing import Literal

Label = Literal["real", "fake"]

LABELS: tuple[Label, Label] = ("real", "fake")
"""Class names by their number."""
REAL, FAKE = 0, 1

_WORDS = {"real": REAL, "fake": FAKE, "0": REAL, "1": FAKE}


def parse_label(value: object) -> int | None:
    """Returns the class number of a label given as number or word, in any case; None if it is neither."""
    return _WORDS.get(str(value).strip().lower())
