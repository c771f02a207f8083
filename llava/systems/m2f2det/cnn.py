"""The two CNNs of the detector, DenseNet and EfficientNet, with torchvision's names for their tensors."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TAPS = (4, 5, 6)
"""Children of the CNN whose outputs the bridge takes."""
EFFICIENTNET_STRIDES = (1, 2, 2, 2, 1, 2, 1)
STOCHASTIC_DEPTH = 0.2
CNNS: dict[str, dict[str, Any]] = {
    "densenet121": {"type": "densenet", "growth": 32, "blocks": [6, 12, 24, 16], "stem": 64, "bottleneck": 4},
    "efficientnet_b4": {
        "type": "efficientnet",
        "settings": [
            [1, 3, 1, 48, 24, 2],
            [6, 3, 2, 24, 32, 4],
            [6, 5, 2, 32, 56, 4],
            [6, 3, 2, 56, 112, 6],
            [6, 5, 1, 112, 160, 6],
            [6, 5, 2, 160, 272, 8],
            [6, 3, 1, 272, 448, 2],
        ],
        "head": 1792,
    },
}
"""Settings of the published CNNs, by torchvision's names."""


class DenseLayer(nn.Module):
    """Two convolutions whose output joins all that came before (arXiv 1608.06993, section 3)."""

    def __init__(self, width: int, inner: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, inner, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the input ``[B, C, H, W]`` with the new channels behind it."""
        inner = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(inner)))], dim=1)


class Transition(nn.Module):
    """Halves the map between two blocks."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[B, out, H/2, W/2]``."""
        return F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)


class DenseNet(nn.Sequential):
    """The features of a DenseNet; no ReLU behind the last norm.

    Args:
        growth: Channels that a layer adds.
        blocks: Layers of each block.
        stem: Channels of the first convolution.
        bottleneck: Inner width of a layer, in growths.
    """

    def __init__(self, growth: int, blocks: Sequence[int], stem: int, bottleneck: int) -> None:
        super().__init__()
        self.add_module("conv0", nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False))
        self.add_module("norm0", nn.BatchNorm2d(stem))
        self.add_module("relu0", nn.ReLU())
        self.add_module("pool0", nn.MaxPool2d(3, stride=2, padding=1))
        width = stem
        for number, layers in enumerate(blocks, start=1):
            block = nn.Sequential()
            for layer in range(1, layers + 1):
                block.add_module(f"denselayer{layer}", DenseLayer(width, bottleneck * growth, growth))
                width += growth
            self.add_module(f"denseblock{number}", block)
            if number < len(blocks):
                self.add_module(f"transition{number}", Transition(width, width // 2))
                width //= 2
        self.add_module("norm5", nn.BatchNorm2d(width))
        self.width = width


def _conv_norm(width: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(width, out, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out)]


class SqueezeExcitation(nn.Module):
    """Weighs channels by what the whole map holds (arXiv 1709.01507)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, inner, 1)
        self.fc2 = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the weighed map ``[B, C, H, W]``."""
        return x * torch.sigmoid(self.fc2(F.silu(self.fc1(x.mean((2, 3), keepdim=True)))))


class MBConv(nn.Module):
    """Expand, convolve each channel, weigh, project (arXiv 1905.11946)."""

    def __init__(self, expand: int, kernel: int, stride: int, width: int, out: int, drop: float) -> None:
        super().__init__()
        inner = expand * width
        parts: list[nn.Module] = []
        if expand != 1:
            parts.append(nn.Sequential(*_conv_norm(width, inner, 1), nn.SiLU()))
        parts.append(nn.Sequential(*_conv_norm(inner, inner, kernel, stride, inner), nn.SiLU()))
        parts.append(SqueezeExcitation(inner, max(1, width // 4)))
        parts.append(nn.Sequential(*_conv_norm(inner, out, 1)))
        self.block = nn.Sequential(*parts)
        self.residual = stride == 1 and width == out
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``[B, out, H/stride, W/stride]``; in training a row's block is left out at random."""
        result: Tensor = self.block(x)
        if not self.residual:
            return result
        if self.training and self.drop > 0:
            kept = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.drop
            result = result * kept.to(result.dtype) / (1 - self.drop)
        return x + result


class EfficientNet(nn.Sequential):
    """The features of an EfficientNet: a stem, stages, and a head, each a numbered child.

    Args:
        settings: Of each stage: expansion, kernel, stride, input width, output width, layers.
        head: Channels of the last convolution.
    """

    def __init__(self, settings: Sequence[Sequence[int]], head: int) -> None:
        stages: list[nn.Module] = [nn.Sequential(*_conv_norm(3, settings[0][3], 3, 2), nn.SiLU())]
        total, done = sum(stage[5] for stage in settings), 0
        for expand, kernel, stride, width, out, layers in settings:
            blocks = []
            for layer in range(layers):
                drop = STOCHASTIC_DEPTH * done / total
                blocks.append(MBConv(expand, kernel, 1 if layer else stride, out if layer else width, out, drop))
                done += 1
            stages.append(nn.Sequential(*blocks))
        super().__init__(*stages, nn.Sequential(*_conv_norm(settings[-1][4], head, 1), nn.SiLU()))
        self.width = head


def infer_cnn(shapes: Mapping[str, Sequence[int]], strides: Sequence[int] = EFFICIENTNET_STRIDES) -> dict[str, Any]:
    """Returns a CNN's settings from the shapes of its tensors, by their names below the CNN.

    Args:
        shapes: Shape of each tensor.
        strides: Stride of each EfficientNet stage, which no shape tells.
    """
    if "conv0.weight" in shapes:
        growth = shapes["denseblock1.denselayer1.conv2.weight"][0]
        counts: dict[int, int] = {}
        for name in shapes:
            found = re.match(r"denseblock(\d+)\.denselayer(\d+)\.conv1\.", name)
            if found:
                counts[int(found[1])] = max(counts.get(int(found[1]), 0), int(found[2]))
        return {
            "type": "densenet",
            "growth": growth,
            "blocks": [counts[block] for block in sorted(counts)],
            "stem": shapes["conv0.weight"][0],
            "bottleneck": shapes["denseblock1.denselayer1.conv1.weight"][0] // growth,
        }
    settings = [_stage(shapes, number, stride) for number, stride in enumerate(strides, start=1)]
    return {"type": "efficientnet", "settings": settings, "head": shapes[f"{len(strides) + 1}.0.weight"][0]}


def _stage(shapes: Mapping[str, Sequence[int]], number: int, stride: int) -> list[int]:
    """Returns the settings of one EfficientNet stage."""
    found = [match for name in shapes if (match := re.match(rf"{number}\.(\d+)\.block\.(\d+)\.0\.weight", name))]
    layers = 1 + max((int(match[1]) for match in found), default=0)
    # Without any block the lookup below says which tensor is missing.
    project = max((int(match[2]) for match in found if match[1] == "0"), default=2)
    depthwise = shapes[f"{number}.0.block.{project - 2}.0.weight"]
    width = shapes[f"{number}.0.block.0.0.weight"][1] if project == 3 else depthwise[0]
    return [
        depthwise[0] // width,
        depthwise[2],
        stride,
        width,
        shapes[f"{number}.0.block.{project}.0.weight"][0],
        layers,
    ]


def build_cnn(config: Mapping[str, Any]) -> DenseNet | EfficientNet:
    """Builds a CNN from its settings, with random weights."""
    own = {name: value for name, value in config.items() if name != "type"}
    return DenseNet(**own) if config["type"] == "densenet" else EfficientNet(**own)


def run_with_taps(cnn: nn.Sequential, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Returns the last map ``[B, C, H, W]`` and the outputs of the children ``TAPS``."""
    taps = []
    for index, child in enumerate(cnn):
        pixels = child(pixels)
        if index in TAPS:
            taps.append(pixels)
    return pixels, taps
