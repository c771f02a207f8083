"""What a published system must offer to live here. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from PIL import Image

    from llava.report import ForgeryReport


@dataclass(frozen=True)
class CheckpointFiles:
    """What can be told of a checkpoint before any weight is read.

    Attributes:
        folder: Where the files lie.
        config: Contents of ``config.json``; empty if there is none.
        keys: Names of the stored tensors.
    """

    folder: Path
    config: dict[str, Any]
    keys: frozenset[str]


@runtime_checkable
class System(Protocol):
    """One published way to judge an image, from files to reports."""

    name: str

    @classmethod
    def opens(cls, files: CheckpointFiles) -> bool:
        """Whether these files are a checkpoint of this system, judged by their contents alone."""
        ...

    @classmethod
    def load(cls, path: str, **options: Any) -> "System":
        """Opens the checkpoint; ``options`` are those of ``load_pretrained_model``."""
        ...

    def analyze_batch(self, images: "Sequence[Image.Image]", options: Any) -> "list[ForgeryReport]":
        """Judges a batch of images; one report an image, in order."""
        ...
