"""The robustness grid: what happens to images before they are judged, by step and strength. Imports no torch.

Perturbed images are made in memory as they are needed.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from forgery_eval.benchmarks import Sample
from llava.errors import OptionError
from llava.files import atomic_file
from llava.image_operations import Step, apply_steps

Steps = tuple[Step, ...]


def _sides(share: float) -> dict[str, float]:
    return dict.fromkeys(("left", "top", "right", "bottom"), share)


_SINGLE: dict[str, dict[str, Steps]] = {
    "jpeg": {str(quality): (Step("jpeg", {"quality": quality}),) for quality in (95, 90, 75, 50)},
    "webp": {str(quality): (Step("webp", {"quality": quality}),) for quality in (80,)},
    "blur": {str(sigma): (Step("blur", {"sigma": sigma}),) for sigma in (0.5, 1.0, 2.0)},
    "resize": {str(f): (Step("resize", {"factor": f, "kernel": "bicubic"}),) for f in (0.75, 0.5)},
    "crop": {f"{share:.0%}": (Step("crop", _sides(share)),) for share in (0.05, 0.1)},
    "noise": {str(sigma): (Step("noise", {"sigma": sigma, "seed": 0}),) for sigma in (2.0, 4.0, 8.0)},
    "letterbox": {"20%": (Step("letterbox", {"top": 0.2, "bottom": 0.2, "grey": 0}),)},
    "screenshot": {
        "0.8": (Step("screenshot", {"factor": 0.8, "margin": 0.05, "bar": 0.08, "grey": 235, "kernel": "bilinear"}),)
    },
    # The last compression is then the same for all images, and cut off by half a block from any earlier one.
    "same-format": {
        "jpeg 90": (
            Step("crop", {"left": 0.02, "top": 0.02, "right": 0, "bottom": 0}),
            Step("jpeg", {"quality": 90, "subsampling": 2}),
        )
    },
}
"""Each step's strengths, from mild to strong; crop is the share that is cut off at each side."""
_CHAIN = "chain"
_CHAIN_LENGTHS = ("1", "2", "3", "4", "5")
_CHAINED = ("jpeg", "webp", "blur", "resize", "crop", "noise", "letterbox", "screenshot")
_CHAIN_STRENGTHS = {"blur": "0.5", "resize": "0.75", "noise": "2.0"}
"""Strengths in a chain, where not the last one of the step: light ones of those that alone erase traces."""


@dataclass(frozen=True)
class Perturbation:
    """One cell of the grid.

    Attributes:
        step: Its row.
        strength: Its column.
        fixed: What is done to every image; empty for a chain, which is drawn for each image from its id.
    """

    step: str
    strength: str
    fixed: Steps = field(default=(), hash=False)

    @property
    def name(self) -> str:
        """As options and files name it."""
        return f"{self.step}:{self.strength}"

    @property
    def folder(self) -> str:
        """Name of a folder."""
        return f"{self.step}_{self.strength}".replace(" ", "_").replace("%", "_percent")

    def steps(self, sample_id: str) -> Steps:
        """Returns what is done to an image: it depends on nothing but this and its id."""
        digest = hashlib.sha256(f"{self.name} {sample_id}".encode("utf-8", "surrogateescape")).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        steps = self.fixed
        if self.step == _CHAIN:
            names = [_CHAINED[int(k)] for k in rng.permutation(len(_CHAINED))[: int(self.strength)]]
            steps = tuple(step for name in names for step in _in_chain(name))
        seed = int(rng.integers(1 << 31))
        return tuple(Step("noise", {**s.values, "seed": seed}) if s.name == "noise" else s for s in steps)

    def __call__(self, sample: Sample, image: Image.Image) -> Image.Image:
        """Returns a sample's image after it."""
        return apply_steps(image, self.steps(sample.id))[0]


def _in_chain(name: str) -> Steps:
    strengths = _SINGLE[name]
    return strengths[_CHAIN_STRENGTHS.get(name, list(strengths)[-1])]


GRID: tuple[Perturbation, ...] = (
    *(Perturbation(step, strength, steps) for step, cells in _SINGLE.items() for strength, steps in cells.items()),
    *(Perturbation(_CHAIN, length) for length in _CHAIN_LENGTHS),
)


def choose_perturbations(names: Sequence[str] | None) -> list[Perturbation]:
    """Returns the cells that some names mean, in the grid's order.

    Args:
        names: ``step`` for all strengths, or ``step:strength``; an empty list means the whole grid, None nothing.

    Raises:
        OptionError: A name is none of the grid's.
    """
    if names is None:
        return []
    for name in names:
        if not any(name in (cell.step, cell.name) for cell in GRID):
            known = ", ".join(dict.fromkeys(cell.step for cell in GRID))
            own = [cell.name for cell in GRID if cell.step == name.partition(":")[0]]
            hint = f"its strengths are {', '.join(own)}" if own else f"known: {known}"
            raise OptionError(f"--perturb: there is no {name!r}; {hint}")
    return [cell for cell in GRID if not names or {cell.step, cell.name} & set(names)]


def keep_images(
    change: Callable[[Sample, Image.Image], Image.Image], folder: Path
) -> Callable[[Sample, Image.Image], Image.Image]:
    """Returns the same change, which also writes each image as PNG into a folder, named after the sample's id."""

    def changed(sample: Sample, image: Image.Image) -> Image.Image:
        result = change(sample, image)
        with atomic_file(folder / f"{sample.id.lstrip('/').replace('..', '__')}.png") as stream:
            result.save(stream, "PNG")
        return result

    return changed
