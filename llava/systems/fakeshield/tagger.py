"""The domain tagger: a ResNet-50 that says from which kind of data an image comes (arXiv 2410.02761, section 4.1)."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from llava.errors import CheckpointError
from llava.files import atomic_write
from llava.images import to_rgb
from llava.model.checkpoint_files import TensorLike, list_keys, read_tensor_file
from llava.model.checkpoint_layout import KeyMap, Rename
from llava.systems.fakeshield.answer import DOMAINS

SHORTER_SIDE, CROP = 256, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STAGES = (3, 4, 6, 3)
"""Blocks of each stage of a ResNet-50."""


def _block_rules() -> list[Rename]:
    """Torchvision counts stages from 1 and layers by name, transformers from 0 and by place."""
    rules = []
    for stage in range(1, len(STAGES) + 1):
        own = f"resnet.encoder.stages.{stage - 1}.layers.{{n}}"
        for layer in (1, 2, 3):
            for theirs, ours in (("conv", "convolution"), ("bn", "normalization")):
                rules.append(
                    Rename(f"layer{stage}.{{n}}.{theirs}{layer}.{{p}}", f"{own}.layer.{layer - 1}.{ours}.{{p}}")
                )
        for place, ours in ((0, "convolution"), (1, "normalization")):
            rules.append(Rename(f"layer{stage}.{{n}}.downsample.{place}.{{p}}", f"{own}.shortcut.{ours}.{{p}}"))
    return rules


KEY_MAP = KeyMap(
    (
        Rename("conv1.{p}", "resnet.embedder.embedder.convolution.{p}"),
        Rename("bn1.{p}", "resnet.embedder.embedder.normalization.{p}"),
        *_block_rules(),
        Rename("fc.{p}", "classifier.1.{p}"),
    )
)


def crop_image(image: Image.Image) -> np.ndarray:
    """Returns the middle of an image, ``[224, 224, 3]`` uint8, its shorter side first resized to 256."""
    image = to_rgb(image)
    width, height = image.size
    shorter, longer = min(width, height), max(width, height)
    other = SHORTER_SIDE * longer // shorter
    size = (SHORTER_SIDE, other) if width <= height else (other, SHORTER_SIDE)
    # Of a very oblong image only the part around the middle is resized, so that memory stays flat.
    box, size = _middle(image.size, size)
    resized = image.resize(size, Image.Resampling.BILINEAR, box=box)
    left, top = (round((side - CROP) / 2) for side in resized.size)
    return np.asarray(resized.crop((left, top, left + CROP, top + CROP)))


_LONGEST = 8192


def _middle(
    size: tuple[int, int], wanted: tuple[int, int]
) -> tuple[tuple[float, float, float, float] | None, tuple[int, int]]:
    """The part of an image that is resized, and to what; all of it unless that would be huge."""
    if max(wanted) <= _LONGEST:
        return None, wanted
    width, height = size
    side = 2 * min(size)
    if width > height:
        left = (width - side) / 2
        return (left, 0, left + side, height), (2 * SHORTER_SIDE, SHORTER_SIDE)
    top = (height - side) / 2
    return (0, top, width, top + side), (SHORTER_SIDE, 2 * SHORTER_SIDE)


def normalize(crops: Sequence[np.ndarray]) -> Tensor:
    """Returns pixels ``[B, 3, 224, 224]`` of crops, with ImageNet's mean and deviation."""
    pixels_BHWC = torch.from_numpy(np.stack(crops)).float() / 255
    pixels_BHWC = (pixels_BHWC - torch.tensor(MEAN)) / torch.tensor(STD)
    return pixels_BHWC.permute(0, 3, 1, 2).contiguous()


class Tagger(nn.Module):
    """Tells the domains apart.

    Args:
        depths: Blocks of each stage; those of a ResNet-50 are published.
    """

    def __init__(self, depths: Sequence[int] = STAGES) -> None:
        super().__init__()
        self.net = ResNetForImageClassification(ResNetConfig(depths=list(depths), num_labels=len(DOMAINS)))

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns logits of the domains ``[B, 3]`` from pixels ``[B, 3, 224, 224]``."""
        logits: Tensor = self.net(pixels).logits
        return logits

    def published_state(self) -> dict[str, Tensor]:
        """Returns the tensors by torchvision's names, as ``DTG.pth`` has them."""
        return KEY_MAP.to_published(self.net.state_dict())

    def load_published(self, tensors: Mapping[str, TensorLike], where: str) -> None:
        """Takes tensors by torchvision's names.

        Raises:
            CheckpointError: Names or shapes differ; the message lists them.
        """
        native = KEY_MAP.to_native(tensors)
        own = self.net.state_dict()
        wrong = set(own) ^ set(native)
        wrong |= {name for name in set(own) & set(native) if tuple(own[name].shape) != tuple(native[name].shape)}
        if wrong:
            raise CheckpointError(
                f"{where} is no tagger of {len(DOMAINS)} domains: missing or unlike: {list_keys(wrong)}"
            )
        self.net.load_state_dict({name: tensor[...].to(own[name].dtype) for name, tensor in native.items()})


def open_tagger(file: Path) -> Tagger:
    """Opens ``DTG.pth``, or safetensors of the same names, in evaluation mode and float32.

    Raises:
        CheckpointError: It is no tagger.
    """
    tensors = read_tensor_file(file)
    blocks = [{name.split(".")[1] for name in tensors if name.startswith(f"layer{stage}.")} for stage in (1, 2, 3, 4)]
    if not all(blocks):
        raise CheckpointError(f"{file} is no tagger of {len(DOMAINS)} domains: it has not the four stages of a ResNet")
    tagger = Tagger([len(own) for own in blocks])
    tagger.load_published(tensors, str(file))
    return tagger.eval()


def save_tagger(tagger: Tagger, file: Path) -> None:
    """Writes a tagger as ``open_tagger`` and torchvision read it; the file appears only when it is whole."""
    stream = io.BytesIO()
    torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tagger.published_state().items()}, stream)
    atomic_write(file, stream.getvalue())
