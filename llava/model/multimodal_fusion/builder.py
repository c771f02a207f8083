"""The registry of fusions."""

from collections.abc import Mapping
from typing import Any

from llava.model.components import component_class
from llava.model.multimodal_fusion.base import Fusion

_HERE = "llava.model.multimodal_fusion"
FUSIONS = {
    "forgery_aware": f"{_HERE}.forgery_aware:ForgeryAwareFusion",
    "cross_attention": f"{_HERE}.cross_attention:CrossAttentionFusion",
    "interleave": f"{_HERE}.interleave:InterleaveFusion",
    "clip": f"{_HERE}.single_branch:ClipOnlyFusion",
    "dino": f"{_HERE}.single_branch:DinoOnlyFusion",
}
"""Class of each ``mm_fusion_type``; one that only a system has is named ``<system>:<type>``."""


def fusion_class(fusion_type: str) -> type[Fusion]:
    """Returns the class behind ``config.mm_fusion_type``.

    Raises:
        CheckpointError: The name is unknown.
    """
    found: type[Fusion] = component_class("mm_fusion", FUSIONS, fusion_type)
    return found


def build_fusion(fusion_type: str, hidden_size: int, heads: Mapping[str, int], config: dict[str, Any] | None) -> Fusion:
    """Builds the fusion that ``mm_fusion_type`` and ``mm_fusion_config`` describe; ``heads`` are the towers'."""
    return fusion_class(fusion_type).from_config(hidden_size, heads, config or {})
