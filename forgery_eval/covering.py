"""Covers the region of an image that a system names, or one of the same size and shape elsewhere. Imports no torch.

What is covered takes the colour of its surroundings: at each pixel the mean of the pixels that stay, weighed by a
Gaussian of an eighth of the image's longer side.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from forgery_eval.benchmarks import Sample
from forgery_eval.masks import read_mask
from llava.errors import DataError

TOP_SHARE = 0.1
"""Of a map, the share of the image that counts as named: its highest values, all equally high ones included."""
FROM = 128
"""Grey value from which a pixel of a mask is named."""
PLACEMENTS = 4
MOST_OVERLAP = 0.1
"""Share of the named region that a random one may cover too."""
_TRIES = 200
_REACH = 1 / 8
_GRID = 64
"""Cells along the longer side in which surroundings are averaged."""
SETTINGS = {"top_share": TOP_SHARE, "placements": PLACEMENTS, "overlap": MOST_OVERLAP, "reach": _REACH}
"""All that changes a covered image beside its mask and its id."""
METHOD = {
    "region": f"the pixels of a mask from one half on, or the highest {TOP_SHARE * 100:g} % of a map",
    "fill": "mean colour of the surroundings, weighed by a Gaussian of an eighth of the longer side",
    "random": f"the region moved at random {PLACEMENTS} times, over the border to the opposite one, covering at most "
    f"{MOST_OVERLAP * 100:g} % of where it was",
}
"""How it is done, in words."""


@dataclass(frozen=True)
class Covered(Sample):
    """A sample whose image is covered in part.

    Attributes:
        folder: Where predictions lie.
        named: File of the mask or map in it.
        is_map: Whether it is a map, which has no threshold of its own.
        placement: 0 for the region that is named, from 1 on for the random ones.
        seed: What random regions are drawn from.
    """

    folder: Path = Path()
    named: str = ""
    is_map: bool = False
    placement: int = 0
    seed: str = ""

    @property
    def regions(self) -> list[np.ndarray]:
        """The named region and the random ones, ``[height, width]`` bool; empty if there is none, or no room.

        Raises:
            DataError: The mask cannot be read.
        """
        mask = read_mask(self.folder, self.named)
        if mask is None:
            raise DataError(f"{self.folder / self.named} cannot be read; it was written with the predictions")
        region = named_region(np.asarray(mask), is_map=self.is_map)
        return [region, *random_regions(region, self.seed)] if region.any() else []


def named_region(grey: np.ndarray, *, is_map: bool) -> np.ndarray:
    """Returns which pixels a mask or map names, bool; none of an empty one.

    Args:
        grey: ``[height, width]`` uint8.
        is_map: Whether it is a map; one that is black and white is a mask all the same.
    """
    if not is_map or np.isin(grey, (0, 255)).all():
        return grey >= FROM
    count = max(1, round(TOP_SHARE * grey.size))
    return grey >= max(1, np.partition(grey.ravel(), -count)[-count])


def random_regions(region: np.ndarray, seed: str) -> list[np.ndarray]:
    """Moves a region to random places, see ``METHOD``.

    Args:
        region: ``[height, width]`` bool, not empty.
        seed: What the places are drawn from.

    Returns:
        ``PLACEMENTS`` regions, or none if so many places are not found.
    """
    digest = hashlib.sha256(seed.encode("utf-8", "surrogateescape")).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    most = MOST_OVERLAP * region.sum()
    found: list[np.ndarray] = []
    for _ in range(_TRIES):
        moved = np.roll(region, tuple(int(rng.integers(side)) for side in region.shape), axis=(0, 1))
        if (moved & region).sum() <= most:
            found.append(moved)
        if len(found) == PLACEMENTS:
            return found
    return []


def cover_image(sample: Sample, image: Image.Image) -> Image.Image:
    """Returns a ``Covered`` sample's image with its region covered.

    Raises:
        DataError: The mask cannot be read.
    """
    assert isinstance(sample, Covered)
    return cover(image, sample.regions[sample.placement])


def cover(image: Image.Image, region: np.ndarray) -> Image.Image:
    """Covers a region.

    Args:
        image: Any mode.
        region: ``[height, width]`` bool, of any size; something must stay.
    """
    pixels_HWC = np.asarray(image.convert("RGB"), np.float32)
    size = (image.width, image.height)
    covered_HW = np.asarray(Image.fromarray(region).resize(size, Image.Resampling.NEAREST))
    filled = np.where(covered_HW[..., None], _surroundings(pixels_HWC, ~covered_HW), pixels_HWC)
    return Image.fromarray(filled.round().astype(np.uint8))


def _surroundings(pixels_HWC: np.ndarray, kept_HW: np.ndarray) -> np.ndarray:
    """Weighed mean of the kept pixels around each pixel, computed in a coarse grid, float32 ``[H, W, 3]``."""
    height, width = kept_HW.shape
    scale = min(1.0, _GRID / max(height, width))
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    weights = [_gaussian(count, _REACH * max(rows, columns)) for count in (rows, columns)]

    def blurred(values_HW: np.ndarray) -> np.ndarray:
        cells = Image.fromarray(values_HW.astype(np.float32)).resize((columns, rows), Image.Resampling.BOX)
        return np.asarray(weights[0] @ np.asarray(cells, np.float64) @ weights[1])

    over = blurred(kept_HW)
    means = [(blurred(pixels_HWC[..., k] * kept_HW) / over).astype(np.float32) for k in range(3)]
    sized = [Image.fromarray(mean).resize((width, height), Image.Resampling.BILINEAR) for mean in means]
    return np.stack([np.asarray(mean) for mean in sized], axis=-1).clip(0, 255)


def _gaussian(count: int, sigma: float) -> np.ndarray:
    """Weight of each cell for each other one, symmetric, shape (count, count)."""
    steps = np.arange(count)
    return np.asarray(np.exp(-0.5 * ((steps[:, None] - steps) / sigma) ** 2))
