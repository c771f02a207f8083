"""Any vision transformer of timm as a tower: ``timm:<name>``, optionally ``timm:<name>:<weight file>``."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llava.errors import CheckpointError
from llava.model.multimodal_encoder.base import PixelFormat, TowerOutput, TowerSource, VisionTower

_PREFIX = "timm:"


class TimmVisionTower(VisionTower):
    """A timm vision transformer without its final norm.

    Config: ``name``, timm's model name; ``image_size``, the side it is built for (default: the largest multiple of
    its patch within the shared side); ``pixel_mean`` and ``pixel_std``, timm's normalisation of that model.
    """

    tower_type: ClassVar[str] = "timm"

    def __init__(self, config: Mapping[str, Any], shared: PixelFormat) -> None:
        super().__init__(config, shared)
        self.vision_tower = _create(self.config["name"], img_size=self.image_size)
        self._last_attention().fused_attn = False

    @classmethod
    def opens(cls, source: str) -> bool:
        """Whether the source begins with ``timm:``."""
        return source.startswith(_PREFIX)

    @classmethod
    def read(cls, source: str) -> TowerSource:
        """Reads timm's pretrained weights of a model, or a weight file in that model's layout."""
        name, _, file = source.removeprefix(_PREFIX).partition(":")
        weights = {"pretrained_cfg_overlay": {"file": file}} if file else {}
        with torch.device("meta"):
            _create(name)
        try:
            model = _create(name, pretrained=True, **weights)
        except Exception as error:
            raise CheckpointError(f"{source}: timm could not load it: {type(error).__name__}: {error}") from error
        config = {
            "type": cls.tower_type,
            "name": name,
            "image_size": model.patch_embed.img_size[0],
            "pixel_mean": list(model.pretrained_cfg["mean"]),
            "pixel_std": list(model.pretrained_cfg["std"]),
        }
        tensors = {f"vision_tower.{key}": value for key, value in model.state_dict().items()}
        return TowerSource(config, tensors, source)

    @property
    def hidden_size(self) -> int:
        """Width of the features."""
        return self.vision_tower.embed_dim

    @property
    def num_heads(self) -> int:
        """Number of attention heads."""
        return self._last_attention().num_heads

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns = self.vision_tower.patch_embed.grid_size
        return rows, columns

    @property
    def blocks_run(self) -> Sequence[nn.Module]:
        """All blocks."""
        return self.vision_tower.blocks

    @property
    def num_prefix_tokens(self) -> int:
        """CLS and register tokens before the patches."""
        return self.vision_tower.num_prefix_tokens

    def encode(self, pixels: Tensor, *, with_attention: bool) -> TowerOutput:
        """Returns the last block's output before the final norm, prefix tokens dropped, and that block's attention."""
        seen: list[Tensor] = []
        handle = self._last_attention().attn_drop.register_forward_hook(
            lambda module, inputs, output: seen.append(output)
        )
        try:
            features = self.vision_tower.forward_intermediates(
                pixels, indices=1, norm=False, output_fmt="NLC", intermediates_only=True
            )[-1]
        finally:
            handle.remove()
        return TowerOutput(features, seen[0] if with_attention else None)

    def _last_attention(self) -> Any:
        """The last block's attention, whose softmax is computed openly so that a hook on ``attn_drop`` sees it."""
        attention = getattr(self.vision_tower.blocks[-1], "attn", None)
        if not hasattr(attention, "fused_attn"):
            raise CheckpointError(f"timm:{self.config['name']} does not show its last attention")
        return attention


def _create(name: str, **options: Any) -> Any:
    try:
        import timm
    except ImportError as error:
        raise CheckpointError(f"the tower timm:{name} needs timm: pip install 'fakereasoning[timm]'") from error
    if not timm.is_model(name):
        raise CheckpointError(f"timm has no model {name!r}")
    model = timm.create_model(name, num_classes=0, **options)
    if not isinstance(model, timm.models.VisionTransformer):
        raise CheckpointError(f"timm:{name} is a {type(model).__name__}, but a vision transformer is needed")
    return model
