"""What every fusion takes and gives.

Shapes: B images, P patches, D width of the language model, H heads of the fusion, G heads of the DINO tower.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn


class FusionInput(NamedTuple):
    """What the two branches saw, projected to the language model's width.

    A tuple, so that a model that is spread over several devices moves all parts to the fusion's.

    Attributes:
        clip: CLIP patches ``[B, P, D]``, or None where the fusion does not use them.
        dino: DINO patches ``[B, P, D]``, or None where the fusion does not use them.
        dino_attention: Softmax attention of the DINO tower's last block between patches ``[B, G, P, P]``, not
            renormalised after the prefix tokens were dropped; None where the fusion does not use it.
    """

    clip: Tensor | None = None
    dino: Tensor | None = None
    dino_attention: Tensor | None = None


@dataclass(frozen=True)
class FusionOutput:
    """Image tokens for the language model.

    Attributes:
        tokens: ``[B, P, D]`` (``[B, 2P, D]`` for ``interleave``).
        attention: The fusion's own attention ``[B, H, P, P]`` from CLIP queries to DINO keys; None unless asked for.
    """

    tokens: Tensor
    attention: Tensor | None = None


class Fusion(nn.Module, ABC):
    """One way to join the branches.

    Attributes:
        uses_clip: Whether it takes CLIP patches.
        uses_dino: Whether it takes DINO patches.
        uses_dino_attention: Whether it takes the DINO tower's last attention.
        equal_grids: Whether both branches must have the same number of patches.
        has_attention: Whether it can say where it looked.
    """

    uses_clip: ClassVar[bool] = True
    uses_dino: ClassVar[bool] = True
    uses_dino_attention: ClassVar[bool] = False
    equal_grids: ClassVar[bool] = True
    has_attention: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def from_config(cls, hidden_size: int, dino_heads: int, config: dict[str, Any]) -> "Fusion":
        """Builds the fusion for tokens of width ``hidden_size`` from ``config.mm_fusion_config``."""

    def num_tokens(self, clip_patches: int, dino_patches: int) -> int:
        """Returns how many tokens an image becomes, from the patches of each branch; 0 where there is no branch."""
        return clip_patches or dino_patches

    @abstractmethod
    def forward(self, branches: FusionInput, *, return_attention: bool = False) -> FusionOutput:
        """Joins the branches.

        Raises:
            ValueError: The attention is asked for, but this fusion has none.
        """

    def _refuse_attention(self, return_attention: bool) -> None:
        if return_attention:
            raise ValueError(f"{type(self).__name__} has no attention, so it cannot say where the model looked")
