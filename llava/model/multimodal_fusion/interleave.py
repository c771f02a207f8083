"""Interleaved branches, as in LLaVA-MoF (arXiv 2401.06209)."""

from typing import Any

import torch

from llava.model.multimodal_fusion.base import Fusion, FusionInput, FusionOutput


class InterleaveFusion(Fusion):
    """Token 2i is CLIP patch i, token 2i + 1 is DINO patch i."""

    @classmethod
    def from_config(cls, hidden_size: int, dino_heads: int, config: dict[str, Any]) -> "InterleaveFusion":
        """Builds it; there is nothing to configure."""
        return cls()

    def num_tokens(self, clip_patches: int, dino_patches: int) -> int:
        """Returns the patches of both branches."""
        return clip_patches + dino_patches

    def forward(self, branches: FusionInput, *, return_attention: bool = False) -> FusionOutput:
        """Returns ``[B, 2P, D]``."""
        self._refuse_attention(return_attention)
        assert branches.clip is not None and branches.dino is not None
        pairs_BP2D = torch.stack((branches.clip, branches.dino), dim=2)
        return FusionOutput(pairs_BP2D.flatten(1, 2))
