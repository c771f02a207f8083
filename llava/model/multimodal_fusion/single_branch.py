"""One branch alone: CLIP for a plain LLaVA, either for ablation."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from llava.model.multimodal_fusion.base import Fusion, FusionOutput


class ClipOnlyFusion(Fusion):
    """The CLIP branch as it is."""

    branches: ClassVar[tuple[str, ...]] = ("clip",)

    @classmethod
    def from_config(cls, hidden_size: int, heads: Mapping[str, int], config: dict[str, Any]) -> "ClipOnlyFusion":
        """Builds it; there is nothing to configure."""
        return cls()

    def forward(self, inputs: Mapping[str, Tensor], *, return_attention: bool = False) -> FusionOutput:
        """Returns the branch's patches."""
        self._check_attention(return_attention)
        return FusionOutput(inputs[self.branches[0]])


class DinoOnlyFusion(ClipOnlyFusion):
    """The DINO branch as it is."""

    branches: ClassVar[tuple[str, ...]] = ("dino",)
