"""Cross-attention from CLIP to DINO: one block in the manner of MCAN (arXiv 1906.10770)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from llava.errors import CheckpointError
from llava.model.branches import attention_name
from llava.model.multimodal_fusion.base import Fusion, FusionOutput


class CrossAttentionFusion(Fusion):
    """Post-norm block: CLIP patches ask, DINO patches answer, then a feed-forward network.

    ``x = LN(clip + Attention(q=clip, k=dino, v=dino))``, ``out = LN(x + FFN(x))``. Suffixes: B images, P patches,
    D width, H heads, K = D / H.

    Args:
        hidden_size: Width D of the tokens.
        num_heads: Number of heads H; published: 16.
        ffn_hidden_size: Inner width of the feed-forward network; published: 4 D.
        dropout: Dropout after the attention, the feed-forward network's inner layer and both branches.
        layer_norm_eps: Added to the (population) variance inside the root.

    Raises:
        CheckpointError: The width is not a multiple of the number of heads.
    """

    branches: ClassVar[tuple[str, ...]] = ("clip", "dino")
    equal_grids: ClassVar[bool] = False
    has_attention: ClassVar[bool] = True

    def __init__(
        self, hidden_size: int, num_heads: int, ffn_hidden_size: int, dropout: float, layer_norm_eps: float
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise CheckpointError(f"the fusion's width {hidden_size} is no multiple of its {num_heads} heads")
        self.num_heads = num_heads
        self.dropout = dropout
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.attention_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.ffn = nn.Sequential(
            nn.Linear(hidden_size, ffn_hidden_size),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(ffn_hidden_size, hidden_size),
        )
        self.ffn_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)

    @classmethod
    def from_config(cls, hidden_size: int, heads: Mapping[str, int], config: dict[str, Any]) -> "CrossAttentionFusion":
        """Builds it; see ``block_settings`` for the fields and their defaults."""
        return cls(hidden_size, **block_settings(hidden_size, config))

    def attention_bias(self, tower_attention_BGPP: Tensor | None) -> Tensor | None:
        """What is added to the attention scores; nothing here."""
        return None

    def forward(self, inputs: Mapping[str, Tensor], *, return_attention: bool = False) -> FusionOutput:
        """Returns fused tokens ``[B, P, D]``, and the attention ``[B, H, P, P]`` if asked for."""
        clip_BPD, dino_BPD = (inputs[branch] for branch in self.branches)
        q_BHPK = self._split_heads(self.q_proj(clip_BPD))
        k_BHPK = self._split_heads(self.k_proj(dino_BPD))
        v_BHPK = self._split_heads(self.v_proj(dino_BPD))
        led_by = self.attention_branch
        bias_BHPP = self.attention_bias(None if led_by is None else inputs[attention_name(led_by)])
        bias_BHPP = None if bias_BHPP is None else bias_BHPP.to(q_BHPK.dtype)
        attention_BHPP = None
        if return_attention:
            scores_BHPP = q_BHPK @ k_BHPK.transpose(-2, -1) * q_BHPK.shape[-1] ** -0.5
            attention_BHPP = (scores_BHPP if bias_BHPP is None else scores_BHPP + bias_BHPP).softmax(dim=-1)
            attended_BHPK = F.dropout(attention_BHPP, self.dropout, self.training) @ v_BHPK
        else:
            attended_BHPK = F.scaled_dot_product_attention(
                q_BHPK, k_BHPK, v_BHPK, attn_mask=bias_BHPP, dropout_p=self.dropout if self.training else 0.0
            )
        attended_BPD = self.out_proj(attended_BHPK.transpose(1, 2).flatten(2))
        x_BPD = self.attention_norm(clip_BPD + self._drop(attended_BPD))
        tokens_BPD = self.ffn_norm(x_BPD + self._drop(self.ffn(x_BPD)))
        return FusionOutput(tokens_BPD, attention_BHPP)

    def _split_heads(self, x_BPD: Tensor) -> Tensor:
        return x_BPD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


def block_settings(hidden_size: int, config: dict[str, Any]) -> dict[str, Any]:
    """Returns the block's settings from ``mm_fusion_config``, the published ones where it says nothing."""
    return {
        "num_heads": config.get("num_heads", 16),
        "ffn_hidden_size": config.get("ffn_hidden_size", 4 * hidden_size),
        "dropout": config.get("dropout", 0.1),
        "layer_norm_eps": config.get("layer_norm_eps", 1e-6),
    }
