"""The DINOv2 tower: patch features before the final norm, and the last block's attention."""

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings

from llava.errors import CheckpointError
from llava.model.checkpoint_files import TensorLike, read_json, read_tensor_file, read_tensors, resolve_folder
from llava.model.checkpoint_layout import KeyMap, Rename, Rule, Stacked
from llava.model.multimodal_encoder.base import PixelFormat, TowerOutput, TowerSource, VisionTower

_INTERPOLATION_OFFSET = 0.1
_HEAD_WIDTH = 64
"""Width of a head in every published DINOv2 model."""
_MODEL_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "mlp_ratio",
    "native_image_size",
    "patch_size",
    "use_swiglu_ffn",
    "use_mask_token",
)


@strict
class DinoConfig(Dinov2Config):
    """DINOv2's config with a feed-forward width that may be any multiple of the hidden one."""

    mlp_ratio: int | float = 4


def original_rules(published: str, native: str) -> tuple[Rule, ...]:
    """Returns the rules from the original repository's tensor names to transformers' stored names.

    Args:
        published: What stands before every original name.
        native: What stands before every native name.
    """
    block, layer = f"{published}blocks.{{n}}.", f"{native}encoder.layer.{{n}}."
    attention = f"{layer}attention.attention."
    return (
        Rename(f"{published}cls_token", f"{native}embeddings.cls_token"),
        Rename(f"{published}mask_token", f"{native}embeddings.mask_token"),
        Rename(f"{published}pos_embed", f"{native}embeddings.position_embeddings"),
        Rename(f"{published}patch_embed.proj.{{p}}", f"{native}embeddings.patch_embeddings.projection.{{p}}"),
        Rename(f"{published}norm.{{p}}", f"{native}layernorm.{{p}}"),
        Rename(f"{block}norm1.{{p}}", f"{layer}norm1.{{p}}"),
        Rename(f"{block}norm2.{{p}}", f"{layer}norm2.{{p}}"),
        Stacked(
            f"{block}attn.qkv.{{p}}", (f"{attention}query.{{p}}", f"{attention}key.{{p}}", f"{attention}value.{{p}}")
        ),
        Rename(f"{block}attn.proj.{{p}}", f"{layer}attention.output.dense.{{p}}"),
        Rename(f"{block}ls1.gamma", f"{layer}layer_scale1.lambda1"),
        Rename(f"{block}ls2.gamma", f"{layer}layer_scale2.lambda1"),
        Rename(f"{block}mlp.fc1.{{p}}", f"{layer}mlp.fc1.{{p}}"),
        Rename(f"{block}mlp.fc2.{{p}}", f"{layer}mlp.fc2.{{p}}"),
        Rename(f"{block}mlp.w12.{{p}}", f"{layer}mlp.weights_in.{{p}}"),
        Rename(f"{block}mlp.w3.{{p}}", f"{layer}mlp.weights_out.{{p}}"),
    )


class OriginalEmbeddings(Dinov2Embeddings):
    """DINOv2's embeddings with the position embedding resampled as in the original repository.

    The original resamples by ``scale_factor = (n + 0.1) / M`` and not to a ``size``, which samples at other places:
    at 336 pixels the difference is up to 0.12. The result is kept until the stored embedding changes.
    """

    _kept: tuple[Any, Tensor] | None = None

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """Returns ``[1, 1 + P, C]`` for an image of this height and width."""
        stored = self.position_embeddings
        patch_height, patch_width = self.patch_embeddings.patch_size
        rows, columns = height // patch_height, width // patch_width
        if stored.requires_grad:
            return resample_positions(stored, rows, columns)
        key = (rows, columns, stored.data_ptr(), stored._version, stored.dtype, stored.device)
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, resample_positions(stored, rows, columns))
        return self._kept[1]


def resample_positions(positions: Tensor, rows: int, columns: int) -> Tensor:
    """Resamples position embeddings ``[1, 1 + M * M, C]`` to ``[1, 1 + rows * columns, C]``, CLS kept first."""
    native = round((positions.shape[1] - 1) ** 0.5)
    if (rows, columns) == (native, native):
        return positions
    grid_1CMM = positions[:, 1:].float().unflatten(1, (native, native)).permute(0, 3, 1, 2)
    scale = ((rows + _INTERPOLATION_OFFSET) / native, (columns + _INTERPOLATION_OFFSET) / native)
    resampled_1CRQ = F.interpolate(grid_1CMM, scale_factor=scale, mode="bicubic", antialias=False)
    patches_1PC = resampled_1CRQ.flatten(2).transpose(1, 2)
    if patches_1PC.shape[1] != rows * columns:
        raise CheckpointError(f"a {native}x{native} position grid cannot be resampled to {rows}x{columns}")
    return torch.cat((positions[:, :1], patches_1PC.to(positions.dtype)), dim=1)


class DinoVisionTower(VisionTower):
    """DINOv2 (arXiv 2304.07193) without its final norm.

    Config: ``hidden_size``, ``num_hidden_layers``, ``num_attention_heads``, ``mlp_ratio``, ``patch_size``,
    ``native_image_size`` (side that the stored position grid is for), ``use_swiglu_ffn``. The published FakeReasoning
    weights need the shared, CLIP-normalised pixels as they are: ``pixel_mean`` and ``pixel_std`` stay unset.
    """

    tower_type: ClassVar[str] = "dinov2"

    def __init__(self, config: Mapping[str, Any], shared: PixelFormat) -> None:
        super().__init__(config, shared)
        model_config = DinoConfig(
            image_size=config.get("native_image_size") or self.image_size,
            **{name: config[name] for name in _MODEL_FIELDS if name in config and name != "native_image_size"},
        )
        self.vision_tower = Dinov2Model(model_config)
        self.vision_tower.embeddings = OriginalEmbeddings(model_config)
        _keep_attention(self._last_attention())
        self.image_size -= self.image_size % model_config.patch_size

    @classmethod
    def opens(cls, source: str) -> bool:
        """Whether it is a DINOv2 weight file, or a folder or hub id with a DINOv2 model."""
        if source.endswith((".pth", ".pt", ".bin")):
            return True
        config_file = Path(source).expanduser() / "config.json"
        if config_file.is_file():
            return read_json(config_file).get("model_type") == "dinov2"
        return "dinov2" in source.lower() and not Path(source).expanduser().exists()

    @classmethod
    def read(cls, source: str) -> TowerSource:
        """Reads the original repository's weight file, or a folder or hub id in transformers' layout."""
        if source.endswith((".pth", ".pt", ".bin")):
            original = read_tensor_file(Path(source).expanduser())
            if "pos_embed" not in original:
                raise CheckpointError(f"{source} is no DINOv2 weight file: it has no pos_embed")
            tensors = KeyMap(original_rules("", "vision_tower.")).to_native(original)
            return TowerSource(cls.infer_config(tensors), tensors, source)
        folder = resolve_folder(source, "DINOv2 tower")
        tensors = {f"vision_tower.{name}": value for name, value in read_tensors(folder).items()}
        config = cls.infer_config(tensors)
        config["num_attention_heads"] = read_json(folder / "config.json")["num_attention_heads"]
        return TowerSource(config, tensors, str(folder))

    @classmethod
    def infer(
        cls, source: str | None, tensors: Mapping[str, TensorLike], facts: Mapping[str, Any]
    ) -> TowerSource | None:
        """Returns the tower that the tensors are: their shapes tell all but the number of heads."""
        try:
            config = cls.infer_config(tensors, facts.get("num_attention_heads"))
        except CheckpointError:
            return None
        return TowerSource(config, dict(tensors), "the checkpoint")

    @classmethod
    def infer_config(cls, tensors: Mapping[str, TensorLike], num_heads: int | None = None) -> dict[str, Any]:
        """Returns the config that a tower's tensors tell of.

        Args:
            tensors: Weights by their stored names within the tower.
            num_heads: Number of heads, which no shape tells; by default heads are 64 wide, as in all published models.

        Raises:
            CheckpointError: Needed tensors are missing.
        """
        position = tensors.get("vision_tower.embeddings.position_embeddings")
        patch = tensors.get("vision_tower.embeddings.patch_embeddings.projection.weight")
        mlp = "vision_tower.encoder.layer.0.mlp."
        inner = tensors.get(f"{mlp}fc1.weight")
        swiglu = f"{mlp}weights_in.weight" in tensors
        if position is None or patch is None or (inner is None and not swiglu):
            raise CheckpointError("the DINOv2 weights lack their position embedding, patch embedding or first block")
        hidden_size = position.shape[-1]
        native, patch_size = round((position.shape[1] - 1) ** 0.5), patch.shape[-1]
        layers = {int(n) for name in tensors for n in re.findall(r"encoder\.layer\.(\d+)\.", name)}
        return {
            "type": cls.tower_type,
            "hidden_size": hidden_size,
            "num_hidden_layers": max(layers) + 1,
            "num_attention_heads": num_heads or max(1, hidden_size // _HEAD_WIDTH),
            "mlp_ratio": 4 if inner is None else _ratio(inner.shape[0], hidden_size),
            "native_image_size": native * patch_size,
            "patch_size": patch_size,
            "use_swiglu_ffn": swiglu,
            "use_mask_token": "vision_tower.embeddings.mask_token" in tensors,
        }

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.image_size // self.vision_tower.config.patch_size
        return side, side

    @property
    def blocks_run(self) -> Sequence[nn.Module]:
        """All blocks."""
        return self.vision_tower.encoder.layer

    def encode(self, pixels: Tensor, *, with_attention: bool) -> TowerOutput:
        """Returns the output of the last block before the final norm, CLS dropped, and that block's attention."""
        hidden = self.vision_tower.embeddings(pixels)
        *blocks, last = self.blocks_run
        for block in blocks:
            hidden = block(hidden)
        seen: list[Tensor] = []
        handle = self._last_attention().register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
        try:
            hidden = last(hidden)
        finally:
            handle.remove()
        return TowerOutput(hidden[:, 1:], seen[0] if with_attention else None)

    def _last_attention(self) -> Any:
        """The module that computes the last block's softmax; transformers before 5.18 nests it one deeper."""
        attention = self.vision_tower.encoder.layer[-1].attention
        return getattr(attention, "attention", attention)


def _keep_attention(attention: Any) -> None:
    """Makes one attention module, and no other, compute its softmax openly and return it."""
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation = "eager"


def _ratio(inner: int, hidden_size: int) -> int | float:
    return inner // hidden_size if inner % hidden_size == 0 else inner / hidden_size
