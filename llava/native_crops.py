"""A few crops of an image at its own resolution, which travel to the towers beside the whole image.

The traces that a camera, a generator or a file leaves in neighbouring pixels are lost where an image is shrunk to a
tower's input. A tower that looks for them gets crops instead, chosen the same way every time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava.errors import CheckpointError


@dataclass(frozen=True)
class NativeCrops:
    """Where crops lie: in the middle of the cells of a grid, moved inwards where they would leave the image.

    Attributes:
        size: Side of a crop in pixels.
        per_side: Crops along each side of the image.
    """

    size: int
    per_side: int

    @classmethod
    def from_config(cls, values: Mapping[str, Any] | None) -> "NativeCrops | None":
        """Reads the config's field ``mm_native_crops``; None where a model has none.

        Raises:
            CheckpointError: It is not of the form ``{"size": 64, "per_side": 3}``.
        """
        if values is None:
            return None
        size, per_side = (values.get("size"), values.get("per_side")) if isinstance(values, Mapping) else (None, None)
        if not (type(size) is int and type(per_side) is int and size > 0 and per_side > 0):
            raise CheckpointError(f"mm_native_crops must be like {{'size': 64, 'per_side': 3}}, not {values!r}")
        return cls(size, per_side)

    @property
    def count(self) -> int:
        """Number of crops K."""
        return self.per_side**2

    def origins(self, length: int) -> list[int]:
        """Returns where the crops begin along a side of this many pixels, at least ``size``."""
        middles = (length * (2 * index + 1) / (2 * self.per_side) for index in range(self.per_side))
        return [min(max(int(middle - self.size / 2), 0), length - self.size) for middle in middles]

    def cut(self, image: Image.Image) -> np.ndarray:
        """Cuts the crops of an RGB image, row by row: uint8 ``[K, size, size, 3]``.

        An image that is smaller than a crop is continued by its mirror image.
        """
        levels_HWC = np.asarray(image)
        missing = [max(self.size - side, 0) for side in levels_HWC.shape[:2]]
        if any(missing):
            margins = [(space // 2, space - space // 2) for space in missing]
            levels_HWC = np.pad(levels_HWC, [*margins, (0, 0)], mode="symmetric")
        down, across = (self.origins(side) for side in levels_HWC.shape[:2])
        return np.stack([levels_HWC[top : top + self.size, left : left + self.size] for top in down for left in across])

    def rows(self, side: int) -> int:
        """Returns how many rows of ``side`` pixels hold all crops."""
        return -(-self.count * self.size**2 // side)

    def pack(self, whole_3SS: Tensor, crops_KCC3: np.ndarray, mean: Tensor, std: Tensor) -> Tensor:
        """Writes normalised crops below the whole image ``[3, S + rows, S]``, so that all pixels are one tensor.

        Args:
            whole_3SS: The whole image, normalised.
            crops_KCC3: What ``cut`` returned.
            mean: Of each channel ``[3]``, of values from 0 to 1.
            std: Likewise.
        """
        side = whole_3SS.shape[-1]
        flat_3P = torch.from_numpy(crops_KCC3.reshape(-1, 3).T.astype(np.float32)) / 255
        rows = whole_3SS.new_zeros(3, self.rows(side) * side)
        rows[:, : flat_3P.shape[1]] = (flat_3P - mean[:, None]) / std[:, None]
        return torch.cat((whole_3SS, rows.view(3, -1, side)), dim=1)

    def unpack(self, pixels_B3HS: Tensor) -> Tensor:
        """Returns the crops ``[B, K, 3, size, size]`` of packed pixels."""
        side = pixels_B3HS.shape[-1]
        flat_B3P = pixels_B3HS[:, :, side:].flatten(2)[..., : self.count * self.size**2]
        return flat_B3P.unflatten(2, (self.count, self.size, self.size)).transpose(1, 2)
