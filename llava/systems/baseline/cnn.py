"""A small convolutional network on colour and second differences, and how it is trained."""

from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from llava.errors import CheckpointError
from llava.files import write_json
from llava.labels import LABELS
from llava.model.checkpoint_files import list_keys, read_json, read_tensor_file
from llava.systems.baseline import CNN

SIDE = 112
WEIGHTS = "model.safetensors"


class SmallCnn(nn.Module):
    """Some 0.5 million weights; it sees colour and second differences, both at full resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.PixelUnshuffle(2), _block(36, 48, 1))
        self.body = nn.Sequential(_block(48, 64, 2), Residual(64), _block(64, 96, 2), Residual(96))
        self.head = nn.Linear(192, 1)

    def forward(self, rgb_B3HW: Tensor) -> Tensor:
        """Returns the logit of being fake ``[B]`` of images in 0..1 with even sides."""
        x = F.pad(rgb_B3HW, (1, 1, 1, 1), mode="replicate")
        middle = x[..., 1:-1, 1:-1]
        across = 2 * middle - x[..., 1:-1, 2:] - x[..., 1:-1, :-2]
        down = 2 * middle - x[..., 2:, 1:-1] - x[..., :-2, 1:-1]
        details = torch.clamp(torch.cat([across, down], 1) * 12, -3, 3)
        maps = self.body(self.stem(torch.cat([rgb_B3HW - 0.5, details], 1)))
        logits: Tensor = self.head(torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1))[:, 0]
        return logits


class Residual(nn.Module):
    """Two convolutions around which the input is carried."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(_block(width, width, 1), _block(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Returns maps of the same shape."""
        carried: Tensor = x + self.inner(x)
        return carried


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class TwoLogits(nn.Module):
    """The network with logits of real and fake."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = SmallCnn()

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        """Returns ``[B, 2]``, the logit of real being 0."""
        fake_B = self.cnn(pixels_B3SS)
        return torch.stack((torch.zeros_like(fake_B), fake_B), dim=1)


class CnnTraining:
    """The network and its training: a crop of ``side`` pixels that is mirrored by chance; in use the middle one.

    Settings: ``side``, even. Images are cropped, never scaled, since scaling takes away what the network looks at; a
    smaller image is repeated.
    """

    classes: tuple[str, ...] = LABELS

    def __init__(self, side: int) -> None:
        if side < 16 or side % 2:
            raise CheckpointError(f"side must be even and at least 16, not {side!r}")
        self.side = side
        self.network = TwoLogits()

    @classmethod
    def open(cls, path: str | None, config: Mapping[str, Any]) -> "CnnTraining":
        """Opens a folder of ``save``, or makes a new network.

        Raises:
            CheckpointError: It cannot be opened, or a setting is unknown.
        """
        if unknown := set(config) - {"side"}:
            raise CheckpointError(f"unknown settings {', '.join(sorted(unknown))}; known: side")
        if path is None:
            return cls(int(config.get("side", SIDE)))
        folder = Path(path).expanduser()
        stored = read_json(folder / "config.json")
        if stored.get("model_type") != CNN:
            raise CheckpointError(f"{folder} holds no network of this kind: its model_type is not {CNN!r}")
        opened = cls(int(config.get("side", stored.get("side", SIDE))))
        tensors = read_tensor_file(folder / WEIGHTS)
        own = opened.network.cnn.state_dict()
        if wrong := {n for n in set(own) | set(tensors) if n not in own or n not in tensors}:
            raise CheckpointError(f"{folder / WEIGHTS} does not fit the network: {list_keys(wrong)}")
        opened.network.cnn.load_state_dict({name: tensor[...] for name, tensor in tensors.items()})
        return opened

    def prepare(self, image: Image.Image, random: "Random | None") -> Tensor:
        """Returns pixels in 0..1 ``[3, S, S]``."""
        pixels_3HW = _pixels(image)
        rows, columns = (torch.arange(max(side, self.side)) % side for side in pixels_3HW.shape[1:])
        pixels_3HW = pixels_3HW[:, rows][:, :, columns]
        height, width = pixels_3HW.shape[1:]
        spare = (height - self.side, width - self.side)
        top, left = (n // 2 if random is None else random.randint(0, n) for n in spare)
        crop = pixels_3HW[:, top : top + self.side, left : left + self.side]
        return crop.flip(2) if random is not None and random.random() < 0.5 else crop

    def optimizer(self, learning_rate: float, weight_decay: float) -> None:
        """Returns nothing: the options name the optimizer."""
        return

    def save(self, folder: Path) -> None:
        """Writes config and weights."""
        save_file({n: t.contiguous() for n, t in self.network.cnn.state_dict().items()}, folder / WEIGHTS)
        write_json(folder / "config.json", {"model_type": CNN, "system": "baseline", "side": self.side})


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
