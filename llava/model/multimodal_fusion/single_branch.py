"""One branch alone, for ablation."""

from typing import Any, ClassVar

from llava.model.multimodal_fusion.base import Fusion, FusionInput, FusionOutput


class ClipOnlyFusion(Fusion):
    """The CLIP branch as it is; no DINO tower is built."""

    uses_dino: ClassVar[bool] = False

    @classmethod
    def from_config(cls, hidden_size: int, dino_heads: int, config: dict[str, Any]) -> "ClipOnlyFusion":
        """Builds it; there is nothing to configure."""
        return cls()

    def forward(self, branches: FusionInput, *, return_attention: bool = False) -> FusionOutput:
        """Returns the CLIP patches."""
        self._refuse_attention(return_attention)
        assert branches.clip is not None
        return FusionOutput(branches.clip)


class DinoOnlyFusion(Fusion):
    """The DINO branch as it is."""

    uses_clip: ClassVar[bool] = False

    @classmethod
    def from_config(cls, hidden_size: int, dino_heads: int, config: dict[str, Any]) -> "DinoOnlyFusion":
        """Builds it; there is nothing to configure."""
        return cls()

    def forward(self, branches: FusionInput, *, return_attention: bool = False) -> FusionOutput:
        """Returns the DINO patches."""
        self._refuse_attention(return_attention)
        assert branches.dino is not None
        return FusionOutput(branches.dino)
