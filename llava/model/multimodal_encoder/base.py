"""What every vision tower takes and gives.

All towers of a model get one shared pixel tensor, made by the model's image processor. What a tower makes of it
(another size, another normalisation) is its own business and is recorded in its config.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from llava.errors import CheckpointError
from llava.model.checkpoint_files import TensorLike
from llava.native_crops import NativeCrops


@dataclass(frozen=True)
class PixelFormat:
    """How the shared pixels are made.

    Attributes:
        size: Side S of the whole image in pixels.
        mean: Of each channel, of values from 0 to 1.
        std: Standard deviation of each channel.
        crops: Crops at the image's own resolution that lie below the whole image; None if there are none.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crops: NativeCrops | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image's shared pixels: ``[3, S, S]``, or ``[3, S + rows, S]`` with crops."""
        rows = self.crops.rows(self.size) if self.crops else 0
        return 3, self.size + rows, self.size


@dataclass(frozen=True)
class TowerOutput:
    """What a tower sees in B images.

    Attributes:
        features: Patch features ``[B, P, C]``.
        attention: Softmax attention of the last block ``[B, G, N, N]`` with the prefix tokens (CLS, registers) first,
            N = prefix + P; None unless asked for.
        described: What tells known images from others ``[B, F]``, where that is not the features' mean and deviation.
    """

    features: Tensor
    attention: Tensor | None = None
    described: Tensor | None = None

    @property
    def description(self) -> Tensor:
        """What tells known images from others, float32 ``[B, F]``: by default mean and deviation over the patches."""
        if self.described is not None:
            return self.described
        patches_BPC = self.features.detach().float()
        return torch.cat([patches_BPC.mean(dim=1), patches_BPC.std(dim=1, correction=0)], dim=1)


@dataclass(frozen=True)
class TowerSource:
    """A tower as found outside the model's own checkpoint.

    Attributes:
        config: What the model's config will hold of it.
        tensors: Weights by their names within the tower.
        origin: Where they were found, for messages.
        image_processor: Settings of the image processor that comes with them, if any.
    """

    config: dict[str, Any]
    tensors: dict[str, TensorLike]
    origin: str
    image_processor: dict[str, Any] | None = None


class VisionTower(nn.Module, ABC):
    """A frozen encoder from the shared pixels to patch features.

    Args:
        config: The tower's own settings, ``type`` being its name in the registry. ``image_size`` is the side that it
            wants (default: as shared); ``pixel_mean`` and ``pixel_std`` its normalisation (default: as shared).
        shared: Format of the shared pixels.
    """

    tower_type: ClassVar[str]
    exact_pixels: ClassVar[bool] = False
    """Whether it gets its pixels in the precision that they come in, not in that of its weights."""
    vision_tower: Any

    def __init__(self, config: Mapping[str, Any], shared: PixelFormat) -> None:
        super().__init__()
        self.config = dict(config)
        self.shared = shared
        self.image_size: int = self.config.get("image_size") or shared.size

    @classmethod
    @abstractmethod
    def opens(cls, source: str) -> bool:
        """Whether ``source`` (a path, a hub id, or a name with the tower's own prefix) is such a tower."""

    @classmethod
    @abstractmethod
    def read(cls, source: str) -> TowerSource:
        """Reads config and weights of a tower.

        Raises:
            CheckpointError: The source is not to be had or is no such tower.
        """

    @classmethod
    def infer(
        cls, source: str | None, tensors: Mapping[str, TensorLike], facts: Mapping[str, Any]
    ) -> TowerSource | None:
        """Returns the tower that weights in a checkpoint are, where they and the tower's name tell enough of it.

        Args:
            source: Where the config says that the tower came from, if anywhere.
            tensors: Weights by their stored names within the tower.
            facts: Fields of the tower's config that are known otherwise.
        """
        return None

    @property
    def hidden_size(self) -> int:
        """Width C of the features; by default what a model of transformers in ``vision_tower`` says."""
        return self.vision_tower.config.hidden_size

    @property
    def num_heads(self) -> int:
        """Number of attention heads G; by default what a model of transformers in ``vision_tower`` says."""
        return self.vision_tower.config.num_attention_heads

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""

    @property
    def blocks_run(self) -> Sequence[nn.Module]:
        """The transformer blocks that are run, in order; by default none are known."""
        return ()

    @property
    def parts_behind_output(self) -> Sequence[nn.Module]:
        """What the features do not depend on, so that no gradient reaches it; by default nothing."""
        return ()

    @property
    def num_patches(self) -> int:
        """Number of patches P."""
        return self.grid[0] * self.grid[1]

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches in the attention."""
        return 1

    def calibrate(self, shared_pixels: Tensor) -> None:
        """Sets what is measured on typical images before training from scratch; by default there is nothing.

        Args:
            shared_pixels: ``[B, 3, S, S]``, of some hundred images.
        """

    def save_pretrained(self, folder: Path) -> None:
        """Writes config and weights into a folder that ``read`` opens; by default as transformers does.

        Raises:
            CheckpointError: This kind of tower cannot be written by itself.
        """
        if not isinstance(self.vision_tower, PreTrainedModel):
            raise CheckpointError(f"a tower of type {self.tower_type!r} cannot be saved by itself")
        self.vision_tower.save_pretrained(folder)

    @abstractmethod
    def encode(self, pixels: Tensor, *, with_attention: bool) -> TowerOutput:
        """Encodes the tower's own pixels."""

    def forward(self, shared_pixels: Tensor, *, with_attention: bool = False) -> TowerOutput:
        """Encodes shared pixels ``[B, 3, S, S]``, with the crops of ``PixelFormat`` below if there are any."""
        parameter = next(self.parameters())
        pixels = self.own_pixels(shared_pixels)
        pixels = pixels if self.exact_pixels else pixels.to(parameter.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.is_trained):
            return self.encode(pixels, with_attention=with_attention)

    @property
    def is_trained(self) -> bool:
        """Whether any of its parameters is trained; with adapters, only theirs are."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def train(self, mode: bool = True) -> "VisionTower":
        """Sets the mode of a tower that is trained; a frozen one stays as it is used, without dropout."""
        return super().train(mode and self.is_trained)

    def own_pixels(self, shared_pixels: Tensor) -> Tensor:
        """Turns the whole image of shared pixels into the tower's size and normalisation."""
        side = self.shared.size
        pixels = shared_pixels if shared_pixels.shape[-2] == side else shared_pixels[..., :side, :]
        if self.config.get("pixel_mean") is not None:
            mean, std = self.config["pixel_mean"], self.config["pixel_std"]
            pixels = (pixels * _per_channel(pixels, self.shared.std) + _per_channel(pixels, self.shared.mean)).sub(
                _per_channel(pixels, mean)
            ) / _per_channel(pixels, std)
        if pixels.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            pixels = F.interpolate(pixels.float(), size=size, mode="bicubic", antialias=True).to(pixels.dtype)
        return pixels


def _per_channel(pixels: Tensor, values: "tuple[float, ...] | list[float]") -> Tensor:
    return torch.tensor(values, dtype=pixels.dtype, device=pixels.device).view(1, -1, 1, 1)
