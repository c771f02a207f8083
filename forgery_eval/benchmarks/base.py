"""What every data set is turned into."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """An image to analyse, and the truth.

    Attributes:
        id: Name that no other sample of the data set has.
        image: Where the image lies; it need not be there.
        label: 0 for real, 1 for fake.
        set: Evaluation set that it belongs to.
        reference: What a good explanation says; None if that is not known.
        groups: Further partitions, by their name, for example ``split_role``: ``seen``.
        attributes: Names of the attributes that the image shows; None if that is not known.
        answers: What good answers say, verdict included; empty if that is not known.
        questions: Further questions about the image, each with what good answers to it say.
        masks: Files whose union is what was changed in the image; none for a real one, or where that is not known.
        video: Video that the image is a frame of; empty for a single image.
        chosen_from: For each question that asks which of several images is of this one's class: the ids of the others,
            none of which is.
    """

    id: str
    image: Path
    label: int
    set: str
    reference: str | None = None
    groups: Mapping[str, str] = field(default_factory=dict)
    attributes: tuple[str, ...] | None = None
    answers: tuple[str, ...] = ()
    questions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    masks: tuple[Path, ...] = ()
    video: str = ""
    chosen_from: tuple[tuple[str, ...], ...] = ()
