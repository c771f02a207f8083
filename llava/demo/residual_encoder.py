"""A small tower that looks at how an image was made: residuals and spectra of native crops, then a transformer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from llava.demo.residual_features import measure
from llava.errors import CheckpointError
from llava.files import make_folder, write_json
from llava.model.checkpoint_files import read_json, read_tensors, resolve_folder
from llava.model.multimodal_encoder.base import PixelFormat, TowerOutput, TowerSource, VisionTower
from llava.native_crops import NativeCrops

_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "tile_size")
_SUMMARY_FIELDS = {"hidden_size", "dropout"}
_CALIBRATION_BATCH = 64
_SPREAD_FLOOR = 0.05
"""Added to the spread of a measure, so that one that hardly varies is not blown up."""
MAX_DEVIATION = 6.0
"""Standard deviations to which measures are clamped."""


class Measures(NamedTuple):
    """The measures of B images.

    Attributes:
        tiles: Of each tile ``[B, P, F]``.
        crops: Of each crop ``[B, K, F]``.
    """

    tiles: Tensor
    crops: Tensor


class SelfAttention(nn.Module):
    """Self-attention that can return its attention; N tokens, C channels, G heads."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, x_BNC: Tensor, *, with_attention: bool) -> tuple[Tensor, Tensor | None]:
        """Returns ``[B, N, C]``, and the attention ``[B, G, N, N]`` if it is asked for."""
        q, k, v = self.qkv(x_BNC).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if not with_attention:
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), None
        # The fused kernel above does not return its softmax.
        attention = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.out((attention @ v).transpose(1, 2).flatten(2)), attention


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, hidden_size: int, num_heads: int, inner_size: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.attention = SelfAttention(hidden_size, num_heads)
        self.mlp_norm = nn.LayerNorm(hidden_size)
        self.mlp = nn.Sequential(nn.Linear(hidden_size, inner_size), nn.GELU(), nn.Linear(inner_size, hidden_size))

    def forward(self, x_BNC: Tensor, *, with_attention: bool = False) -> tuple[Tensor, Tensor | None]:
        """Returns ``[B, N, C]``, and the attention ``[B, G, N, N]`` if it is asked for."""
        attended, attention = self.attention(self.attention_norm(x_BNC), with_attention=with_attention)
        x_BNC = x_BNC + attended
        return x_BNC + self.mlp(self.mlp_norm(x_BNC)), attention


class CropSummary(nn.Module):
    """A perceptron on the mean and the spread of an image's crops; K crops, F measures, C channels.

    It sees thousands of measures, of which few show a trace: dropout keeps it from relying on single ones.

    Args:
        measures: Number of measures F.
        hidden_size: Width of its one hidden layer.
        width: Width of its output.
        dropout: Share of the measures that are left out in training, and of the hidden layer.
    """

    def __init__(self, measures: int, hidden_size: int, width: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Linear(2 * measures, hidden_size)
        self.outer = nn.Linear(hidden_size, width)
        self.dropout = nn.Dropout(dropout)

    @staticmethod
    def moments(crops_BKF: Tensor) -> Tensor:
        """Returns mean and spread over the crops ``[B, 2 F]``."""
        mean_BF = crops_BKF.mean(1)
        # Written out: torch's std over a middle dimension takes ten times as long on a CPU.
        return torch.cat((mean_BF, (crops_BKF - mean_BF[:, None]).square().mean(1).sqrt()), dim=-1)

    def forward(self, moments_BF: Tensor) -> Tensor:
        """Returns what ``moments`` tell ``[B, C]``."""
        return self.outer(self.dropout(F.gelu(self.inner(self.dropout(moments_BF)))))


class ResidualVisionTower(VisionTower):
    """A tower that looks at crops of an image at its own resolution, and not at the whole image.

    Its tokens are measures of the crops' tiles, P of them in a square grid. Before them stand those of each crop and of
    all crops' mean. ``residual_features`` defines the measures; ``calibrate`` finds the mean and deviation that
    standardise them. The measures need pixels exact to one level in 256: float32 or float16, whatever the weights have.

    Config: ``hidden_size``, ``num_hidden_layers``, ``num_attention_heads``, ``mlp_ratio``; and ``tile_size``, side of
    the tiles that a crop is cut into. With ``summary``, a mapping of ``hidden_size`` and ``dropout``, a perceptron sees
    mean and spread of the crops (``CropSummary``), and what it says goes past the blocks to every tile; a gate, which
    is closed at first, then adds what the blocks find. Without it, a linear layer sees the mean alone.

    Suffixes: B images, K crops, T tiles of a crop, P = K T tiles of an image, F measures, C channels.

    Raises:
        CheckpointError: Sizes are missing or do not fit each other, or the shared pixels hold no crops.
    """

    tower_type: ClassVar[str] = "residual"
    exact_pixels: ClassVar[bool] = True

    tile_mean: Tensor
    tile_spread: Tensor
    crop_mean: Tensor
    crop_spread: Tensor

    def __init__(self, config: Mapping[str, Any], shared: PixelFormat) -> None:
        super().__init__(config, shared)
        self.crops = _checked_crops(config, shared)
        width, heads = config["hidden_size"], config["num_attention_heads"]
        self.tile_size: int = config["tile_size"]
        self.image_size = self.crops.size
        with torch.device("cpu"):
            blank = measure(torch.zeros(1, 3, self.crops.size, self.crops.size, dtype=torch.float32), self.tile_size)
        for name, count in (("tile", blank.tiles.shape[-1]), ("crop", blank.image.shape[-1])):
            self.register_buffer(f"{name}_mean", torch.zeros(count))
            self.register_buffer(f"{name}_spread", torch.ones(count))
        self.tile_layer = nn.Linear(blank.tiles.shape[-1], width)
        self.crop_layer = nn.Linear(blank.image.shape[-1], width)
        summary: Mapping[str, Any] | None = config.get("summary")
        self.whole_layer: nn.Module
        if summary is None:
            self.whole_layer = nn.Linear(blank.image.shape[-1], width)
        else:
            self.whole_layer = CropSummary(blank.image.shape[-1], summary["hidden_size"], width, summary["dropout"])
            self.gate = nn.Parameter(torch.zeros(width))
        self.position_embeddings = nn.Parameter(torch.randn(1, self.num_prefix_tokens + self.num_patches, width) * 0.02)
        inner = int(width * config["mlp_ratio"])
        self.blocks = nn.ModuleList(Block(width, heads, inner) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.LayerNorm(width)

    @classmethod
    def opens(cls, source: str) -> bool:
        """Whether it is a folder whose config names this type."""
        config_file = Path(source).expanduser() / "config.json"
        return config_file.is_file() and read_json(config_file).get("model_type") == cls.tower_type

    @classmethod
    def read(cls, source: str) -> TowerSource:
        """Reads a folder that ``save_pretrained`` wrote."""
        folder = resolve_folder(source, "residual tower")
        config = read_json(folder / "config.json")
        if config.pop("model_type", None) != cls.tower_type:
            raise CheckpointError(f"{folder} holds no residual tower")
        return TowerSource({"type": cls.tower_type, **config}, read_tensors(folder), str(folder))

    def save_pretrained(self, folder: Path) -> None:
        """Writes config and weights into a folder that ``read`` opens."""
        make_folder(folder, "tower")
        config = {**self.config, "model_type": self.tower_type}
        del config["type"]
        write_json(folder / "config.json", config, indent=2)
        save_file(self.state_dict(), folder / "model.safetensors", {"format": "pt"})

    @property
    def hidden_size(self) -> int:
        """Width of the features."""
        return self.config["hidden_size"]

    @property
    def num_heads(self) -> int:
        """Number of attention heads."""
        return self.config["num_attention_heads"]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles, those of all crops."""
        side = self.crops.per_side * (self.crops.size // self.tile_size)
        return side, side

    @property
    def num_prefix_tokens(self) -> int:
        """The mean of all crops, and each crop."""
        return 1 + self.crops.count

    @property
    def blocks_run(self) -> Sequence[nn.Module]:
        """All blocks."""
        return list(self.blocks)

    def own_pixels(self, shared_pixels: Tensor) -> Tensor:
        """Returns the crops ``[B, K, 3, S, S]`` of packed pixels, normalised as shared."""
        return self.crops.unpack(shared_pixels)

    @torch.no_grad()
    def calibrate(self, shared_pixels: Tensor) -> None:
        """Takes mean and spread of every measure from typical images."""
        parts = [self._measure(self.own_pixels(part)) for part in shared_pixels.split(_CALIBRATION_BATCH)]
        for name in ("tile", "crop"):
            values_NF = torch.cat([getattr(part, f"{name}s") for part in parts]).flatten(0, 1)
            getattr(self, f"{name}_mean").copy_(values_NF.mean(0))
            getattr(self, f"{name}_spread").copy_(values_NF.std(0, correction=0) + _SPREAD_FLOOR)

    def measure(self, shared_pixels: Tensor) -> Measures:
        """Measures images, each measure in standard deviations from that of a typical one."""
        return self._standardize(self._measure(self.own_pixels(shared_pixels)))

    def encode(self, pixels: Tensor, *, with_attention: bool) -> TowerOutput:
        """Returns the normed tokens of the tiles, and the last block's attention."""
        return self.encode_measures(self._standardize(self._measure(pixels)), with_attention=with_attention)

    def encode_measures(self, measures: Measures, *, with_attention: bool = False) -> TowerOutput:
        """Encodes what ``measure`` returns."""
        dtype = self.position_embeddings.dtype
        tiles_BPF, crops_BKF = measures.tiles.to(dtype), measures.crops.to(dtype)
        summarised = isinstance(self.whole_layer, CropSummary)
        whole_B1C = self.whole_layer(CropSummary.moments(crops_BKF) if summarised else crops_BKF.mean(1))[:, None]
        parts = (whole_B1C, self.crop_layer(crops_BKF), self.tile_layer(tiles_BPF))
        hidden_BNC = torch.cat(parts, dim=1) + self.position_embeddings
        *blocks, last = self.blocks
        for block in blocks:
            hidden_BNC, _ = block(hidden_BNC)
        hidden_BNC, attention = last(hidden_BNC, with_attention=True)
        if summarised:
            hidden_BNC = whole_B1C + self.gate * hidden_BNC
        # Features were trained to forget all of an image but its traces; its measures were not.
        return TowerOutput(
            self.norm(hidden_BNC)[:, self.num_prefix_tokens :],
            attention if with_attention else None,
            described=measures.crops.mean(1),
        )

    def _standardize(self, measures: Measures) -> Measures:
        tiles = (measures.tiles - self.tile_mean) / self.tile_spread
        crops = (measures.crops - self.crop_mean) / self.crop_spread
        return Measures(tiles.clamp(-MAX_DEVIATION, MAX_DEVIATION), crops.clamp(-MAX_DEVIATION, MAX_DEVIATION))

    @torch.no_grad()
    def _measure(self, pixels_BK3SS: Tensor) -> Measures:
        """Measures crops in float32, whatever dtype the weights have."""
        if pixels_BK3SS.is_meta:  # where only shapes and matrix products are counted, there are no levels to measure
            count = len(pixels_BK3SS)
            tiles_BPF = pixels_BK3SS.new_zeros(count, self.num_patches, self.tile_mean.numel(), dtype=torch.float32)
            crops_BKF = pixels_BK3SS.new_zeros(count, self.crops.count, self.crop_mean.numel(), dtype=torch.float32)
            return Measures(tiles_BPF, crops_BKF)
        with torch.autocast(pixels_BK3SS.device.type, enabled=False):
            exact = pixels_BK3SS.flatten(0, 1).float()
            mean, std = (
                exact.new_tensor(self.config.get(f"pixel_{name}") or values).view(1, 3, 1, 1)
                for name, values in (("mean", self.shared.mean), ("std", self.shared.std))
            )
            # Back to the whole levels of the decoded image: residuals near 0 would drown in the error of float16.
            levels = ((exact * std + mean) * 255).round().clamp(0, 255)
            measured = measure(levels, self.tile_size)
        return Measures(self._in_grid(measured.tiles), measured.image.unflatten(0, (-1, self.crops.count)))

    def _in_grid(self, tiles_NTF: Tensor) -> Tensor:
        """Orders the tiles of all crops row by row over the image: ``[B K, T, F]`` to ``[B, P, F]``."""
        per_side, within = self.crops.per_side, self.crops.size // self.tile_size
        grid = tiles_NTF.unflatten(0, (-1, per_side, per_side)).unflatten(3, (within, within))
        return grid.transpose(2, 3).flatten(1, 4)


def _checked_crops(config: Mapping[str, Any], shared: PixelFormat) -> NativeCrops:
    missing = [name for name in _FIELDS if name not in config]
    if missing:
        raise CheckpointError(f"the config of a residual tower lacks {', '.join(missing)}")
    summary = config.get("summary")
    if summary is not None and not (isinstance(summary, Mapping) and summary.keys() == _SUMMARY_FIELDS):
        raise CheckpointError(f"summary of a residual tower needs {' and '.join(sorted(_SUMMARY_FIELDS))}: {summary!r}")
    if config["hidden_size"] % config["num_attention_heads"]:
        raise CheckpointError(
            f"the width {config['hidden_size']} is no multiple of {config['num_attention_heads']} heads"
        )
    if shared.crops is None:
        raise CheckpointError("a residual tower looks at native crops, but the config has no mm_native_crops")
    if config["tile_size"] < 1 or shared.crops.size % config["tile_size"]:
        raise CheckpointError(f"crops of {shared.crops.size} pixels cannot be cut into tiles of {config['tile_size']}")
    return shared.crops
