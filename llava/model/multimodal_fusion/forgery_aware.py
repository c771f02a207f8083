"""Forgery-Aware Feature Fusion (arXiv 2503.21210): cross-attention led by the DINO tower's own attention."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llava.model.multimodal_fusion.cross_attention import CrossAttentionFusion, block_settings

_LOG_FLOOR = 1e-6
"""Added to the attention before its logarithm; the published weights were trained with it."""
_PAIRS_CPU = 16384
"""Pairs of patches that a CPU takes through the convolutions at a time: what lies between them stays in its caches."""


class ForgeryAwareFusion(CrossAttentionFusion):
    """Cross-attention whose scores get a bias computed from the DINO tower's last attention map.

    ``bias = Conv1x1(GELU(Conv1x1(log(attention + 1e-6))))``, from the tower's G heads to the fusion's H heads.

    Args:
        hidden_size: Width D of the tokens.
        dino_heads: Number of heads G of the DINO tower.
        bias_hidden_channels: Channels between the two convolutions; published: 32.
        **block: Settings of ``CrossAttentionFusion``.
    """

    attention_branch: ClassVar[str | None] = "dino"
    equal_grids: ClassVar[bool] = True

    def __init__(self, hidden_size: int, dino_heads: int, bias_hidden_channels: int, **block: Any) -> None:
        super().__init__(hidden_size, **block)
        self.attention_mlp = nn.Sequential(
            nn.Conv2d(dino_heads, bias_hidden_channels, kernel_size=1),
            nn.GELU(),
            nn.Conv2d(bias_hidden_channels, self.num_heads, kernel_size=1),
        )

    @classmethod
    def from_config(cls, hidden_size: int, heads: Mapping[str, int], config: dict[str, Any]) -> "ForgeryAwareFusion":
        """Builds it; ``bias_hidden_channels`` (published: 32) beside the fields of ``block_settings``."""
        channels = config.get("bias_hidden_channels", 32)
        return cls(hidden_size, heads["dino"], channels, **block_settings(hidden_size, config))

    def attention_bias(self, tower_attention_BGPP: Tensor | None) -> Tensor:
        """Returns the bias ``[B, H, P, P]`` from the DINO tower's attention ``[B, G, P, P]``."""
        assert tower_attention_BGPP is not None
        weight = next(self.attention_mlp.parameters())
        # Weights that ZeRO-3 has put away have one dimension, and come back for the layers' own call only.
        if weight.device.type == "cpu" and weight.ndim == 4 and not torch.is_grad_enabled():
            return self._bias_in_parts(tower_attention_BGPP, weight.dtype)
        log_attention = torch.log(tower_attention_BGPP.float() + _LOG_FLOOR)
        return self.attention_mlp(log_attention.to(weight.dtype))

    def _bias_in_parts(self, attention_BGPP: Tensor, dtype: torch.dtype) -> Tensor:
        """The same with the convolutions as matrix products over a part of the pairs, between them in float32."""
        first_w, first_b, last_w, last_b = (own.float() for own in self.attention_mlp.parameters())
        w1_CG, b1_C, w2_HC, b2_H = first_w.flatten(1), first_b[:, None], last_w.flatten(1), last_b[:, None]
        pairs_BGN = attention_BGPP.flatten(2)
        bias_BHN = pairs_BGN.new_empty((len(pairs_BGN), self.num_heads, pairs_BGN.shape[-1]), dtype=dtype)
        for pairs_GN, bias_HN in zip(pairs_BGN, bias_BHN, strict=True):
            for part_GN, place_HN in zip(pairs_GN.split(_PAIRS_CPU, 1), bias_HN.split(_PAIRS_CPU, 1), strict=True):
                inner_CN = torch.addmm(b1_C, w1_CG, (part_GN.float() + _LOG_FLOOR).log_())
                place_HN.copy_(torch.addmm(b2_H, w2_HC, self.attention_mlp[1](inner_CN)))
        return bias_BHN.unflatten(2, attention_BGPP.shape[2:])
