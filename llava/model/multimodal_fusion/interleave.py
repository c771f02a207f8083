"""Interleaved branches, as in LLaVA-MoF (arXiv 2401.06209)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from llava.model.multimodal_fusion.base import Fusion, FusionOutput


class InterleaveFusion(Fusion):
    """Token 2i is CLIP patch i, token 2i + 1 is DINO patch i."""

    branches: ClassVar[tuple[str, ...]] = ("clip", "dino")

    @classmethod
    def from_config(cls, hidden_size: int, heads: Mapping[str, int], config: dict[str, Any]) -> "InterleaveFusion":
        """Builds it; there is nothing to configure."""
        return cls()

    def num_tokens(self, patches: Mapping[str, int]) -> int:
        """Returns the patches of both branches."""
        return sum(patches[branch] for branch in self.branches)

    def forward(self, inputs: Mapping[str, Tensor], *, return_attention: bool = False) -> FusionOutput:
        """Returns ``[B, 2P, D]``."""
        self._check_attention(return_attention)
        pairs_BP2D = torch.stack([inputs[branch] for branch in self.branches], dim=2)
        return FusionOutput(pairs_BP2D.flatten(1, 2))
