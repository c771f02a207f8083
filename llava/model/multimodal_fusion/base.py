"""What every fusion takes and gives.

Shapes: B images, P patches, D width of the language model, H heads of the fusion, G heads of a tower.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from llava.errors import OptionError


@dataclass(frozen=True)
class FusionOutput:
    """Image tokens for the language model.

    Attributes:
        tokens: ``[B, P, D]`` (``[B, 2P, D]`` for ``interleave``).
        attention: The fusion's own attention ``[B, H, P, P]`` from queries of the first branch to keys of the second;
            None unless asked for.
        description: What tells known images from others, of all towers together ``[B, F]``; None where no towers ran.
    """

    tokens: Tensor
    attention: Tensor | None = None
    description: Tensor | None = None


class Fusion(nn.Module, ABC):
    """One way to join branches.

    Attributes:
        branches: Names of the branches that it takes, in order.
        attention_branch: The branch whose tower's last attention it takes as well; None for none.
        equal_grids: Whether all branches must have the same number of patches.
        has_attention: Whether it can say where it looked.
    """

    branches: ClassVar[tuple[str, ...]]
    attention_branch: ClassVar[str | None] = None
    equal_grids: ClassVar[bool] = True
    has_attention: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def from_config(cls, hidden_size: int, heads: Mapping[str, int], config: dict[str, Any]) -> "Fusion":
        """Builds the fusion.

        Args:
            hidden_size: Width D of the tokens.
            heads: Number of attention heads G of each branch's tower.
            config: ``config.mm_fusion_config``.
        """

    def num_tokens(self, patches: Mapping[str, int]) -> int:
        """Returns how many tokens an image becomes, from the patches of each of its branches."""
        return patches[self.branches[0]]

    @abstractmethod
    def forward(self, inputs: Mapping[str, Tensor], *, return_attention: bool = False) -> FusionOutput:
        """Joins the branches.

        Args:
            inputs: Projected patches ``[B, P, D]`` of each branch by its name; for ``attention_branch`` also
                ``<branch>_attention``, the softmax attention of its tower's last block between patches
                ``[B, G, P, P]``, not renormalised after the prefix tokens were dropped.
            return_attention: Also give the fusion's own attention.

        Raises:
            OptionError: The attention is asked for, but this fusion has none.
        """

    def _check_attention(self, return_attention: bool) -> None:
        if return_attention:
            raise OptionError(f"{type(self).__name__} has no attention, so it cannot say where the model looked")
