"""A small tower that looks at how an image was made: residuals and spectra of tiles, then a transformer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from llava.demo.residual_features import Measured, measure
from llava.errors import CheckpointError
from llava.files import make_folder, write_json
from llava.model.checkpoint_files import read_json, read_tensors, resolve_folder
from llava.model.multimodal_encoder.base import PixelFormat, TowerOutput, TowerSource, VisionTower

_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "patch_size", "tile_size")
_CALIBRATION_BATCH = 64
_SPREAD_FLOOR = 0.05
"""Added to the spread of a measure, so that one that hardly varies is not blown up."""
MAX_DEVIATION = 6.0
"""Standard deviations to which measures are clamped."""


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


class ResidualVisionTower(VisionTower):
    """A tower whose tokens are measures of tiles; a prefix token holds those of the whole image.

    ``residual_features`` defines the measures; ``calibrate`` finds the mean and deviation that standardise them.
    The measures need pixels exact to one level in 256, so float32 or float16.

    Config: ``hidden_size``, ``num_hidden_layers``, ``num_attention_heads``, ``mlp_ratio``; ``patch_size``; and
    ``tile_size``, side of the tiles around each patch whose spectra are taken.

    Raises:
        CheckpointError: Sizes are missing or do not fit each other.
    """

    tower_type: ClassVar[str] = "residual"

    tile_mean: Tensor
    tile_spread: Tensor
    picture_mean: Tensor
    picture_spread: Tensor

    def __init__(self, config: Mapping[str, Any], shared: PixelFormat) -> None:
        super().__init__(config, shared)
        _check_sizes(config, self.image_size)
        width, heads = config["hidden_size"], config["num_attention_heads"]
        self.patch_size, self.tile_size = config["patch_size"], config["tile_size"]
        self.image_size -= self.image_size % self.patch_size
        with torch.device("cpu"):
            levels = torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.float32)
            blank = measure(levels, self.tile_size, self.patch_size)
        # The names of tensors, "picture" too, are those of saved checkpoints.
        for name, count in (("tile", blank.tiles.shape[-1]), ("picture", blank.image.shape[-1])):
            self.register_buffer(f"{name}_mean", torch.zeros(count))
            self.register_buffer(f"{name}_spread", torch.ones(count))
        self.patches = nn.Linear(blank.tiles.shape[-1], width)
        self.picture = nn.Linear(blank.image.shape[-1], width)
        self.position_embeddings = nn.Parameter(torch.randn(1, self.num_patches, width) * 0.02)
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
        config = {**self.config, "image_size": self.image_size, "model_type": self.tower_type}
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
        """Rows and columns of patches."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def blocks_run(self) -> Sequence[nn.Module]:
        """All blocks."""
        return list(self.blocks)

    @torch.no_grad()
    def calibrate(self, shared_pixels: Tensor) -> None:
        """Takes mean and spread of every measure from typical images."""
        parts = [self._measure(self.own_pixels(part)) for part in shared_pixels.split(_CALIBRATION_BATCH)]
        for name, values in (
            ("tile", torch.cat([part.tiles for part in parts]).flatten(0, 1)),
            ("picture", torch.cat([part.image for part in parts])),
        ):
            getattr(self, f"{name}_mean").copy_(values.mean(0))
            getattr(self, f"{name}_spread").copy_(values.std(0, correction=0) + _SPREAD_FLOOR)

    def measure(self, shared_pixels: Tensor) -> Measured:
        """Measures images, each measure in standard deviations from that of a typical one."""
        return self._standardize(self._measure(self.own_pixels(shared_pixels)))

    def encode(self, pixels: Tensor, *, with_attention: bool) -> TowerOutput:
        """Returns the normed patch tokens, and the last block's attention with the image's token first."""
        return self.encode_measured(self._standardize(self._measure(pixels)), with_attention=with_attention)

    def encode_measured(self, measured: Measured, *, with_attention: bool = False) -> TowerOutput:
        """Encodes what ``measure`` returns."""
        tiles_BPF, image_BF = (part.to(self.position_embeddings.dtype) for part in measured)
        patches_BPC = self.patches(tiles_BPF) + self.position_embeddings
        hidden_BNC = torch.cat((self.picture(image_BF)[:, None].to(patches_BPC.dtype), patches_BPC), dim=1)
        *blocks, last = self.blocks
        for block in blocks:
            hidden_BNC, _ = block(hidden_BNC)
        hidden_BNC, attention = last(hidden_BNC, with_attention=True)
        return TowerOutput(self.norm(hidden_BNC)[:, 1:], attention if with_attention else None)

    def _standardize(self, measured: Measured) -> Measured:
        tiles = (measured.tiles - self.tile_mean) / self.tile_spread
        image = (measured.image - self.picture_mean) / self.picture_spread
        return Measured(tiles.clamp(-MAX_DEVIATION, MAX_DEVIATION), image.clamp(-MAX_DEVIATION, MAX_DEVIATION))

    @torch.no_grad()
    def _measure(self, pixels: Tensor) -> Measured:
        """Measures the tower's own pixels in float32, whatever dtype its weights have."""
        if pixels.is_meta:  # where only matrix products are counted, there are no levels to measure
            tiles_BTF = pixels.new_zeros(len(pixels), self.num_patches, self.tile_mean.numel(), dtype=torch.float32)
            return Measured(tiles_BTF, tiles_BTF.new_zeros(len(pixels), self.picture_mean.numel()))
        with torch.autocast(pixels.device.type, enabled=False):
            exact = pixels.float()
            mean, std = (
                exact.new_tensor(self.config.get(f"pixel_{name}") or values).view(1, 3, 1, 1)
                for name, values in (("mean", self.shared.mean), ("std", self.shared.std))
            )
            # Back to the whole levels of the decoded image: residuals near 0 would drown in the error of float16.
            levels = ((exact * std + mean) * 255).round().clamp(0, 255)
            return measure(levels, self.tile_size, self.patch_size)


def _check_sizes(config: Mapping[str, Any], image_size: int) -> None:
    missing = [name for name in _FIELDS if name not in config]
    if missing:
        raise CheckpointError(f"the config of a residual tower lacks {', '.join(missing)}")
    patch, tile = config["patch_size"], config["tile_size"]
    if config["hidden_size"] % config["num_attention_heads"]:
        raise CheckpointError(
            f"the width {config['hidden_size']} is no multiple of {config['num_attention_heads']} heads"
        )
    if not patch <= tile <= image_size:
        raise CheckpointError(f"tile_size {tile} must be from patch_size {patch} to the image's {image_size}")
