"""The registry of fusions."""

from typing import Any

from llava.model.multimodal_fusion.base import Fusion
from llava.model.multimodal_fusion.cross_attention import CrossAttentionFusion
from llava.model.multimodal_fusion.forgery_aware import ForgeryAwareFusion
from llava.model.multimodal_fusion.interleave import InterleaveFusion
from llava.model.multimodal_fusion.single_branch import ClipOnlyFusion, DinoOnlyFusion

FUSIONS: dict[str, type[Fusion]] = {
    "forgery_aware": ForgeryAwareFusion,
    "cross_attention": CrossAttentionFusion,
    "interleave": InterleaveFusion,
    "clip": ClipOnlyFusion,
    "dino": DinoOnlyFusion,
}


def fusion_class(fusion_type: str) -> type[Fusion]:
    """Returns the class behind ``config.mm_fusion_type``.

    Raises:
        ValueError: The name is unknown.
    """
    if fusion_type not in FUSIONS:
        raise ValueError(f"unknown mm_fusion_type {fusion_type!r}; known: {', '.join(FUSIONS)}")
    return FUSIONS[fusion_type]


def build_fusion(fusion_type: str, hidden_size: int, dino_heads: int, config: dict[str, Any] | None) -> Fusion:
    """Builds the fusion that ``mm_fusion_type`` and ``mm_fusion_config`` describe."""
    return fusion_class(fusion_type).from_config(hidden_size, dino_heads, config or {})
