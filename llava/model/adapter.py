"""A LoRA folder's update: read, added to the base's weights in float32, and what a dtype would lose of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from llava.errors import CheckpointError
from llava.model.checkpoint_files import TensorLike, list_keys, read_json, read_tensor_file
from llava.model.checkpoint_layout import LORA_PREFIX

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Updated:
    """A weight with its LoRA update, ``W + s B A`` (arXiv 2106.09685), computed in float32 when indexed."""

    weight: TensorLike
    down: Tensor
    up: Tensor
    scale: float

    @property
    def shape(self) -> Any:
        """Sizes of the dimensions."""
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        """Type of the elements."""
        return torch.float32

    def __getitem__(self, index: "slice | EllipsisType") -> Tensor:
        up = self.up if index is Ellipsis else self.up[index]
        return self.weight[index].float() + (up.float() @ self.down.float()) * self.scale


@dataclass(frozen=True)
class Lost:
    """What a dtype loses of an update.

    Attributes:
        share: Norm of what rounding changes over the update's norm.
        unmoved: Share of the changed weights that are, once rounded, what they were before.
    """

    share: float
    unmoved: float


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """Returns an adapter's tensors.

    Raises:
        CheckpointError: There are none, or some are NaN or infinite.
    """
    file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder} has an adapter_config.json but neither {' nor '.join(_FILES)}")
    tensors = {name: tensor[...] for name, tensor in read_tensor_file(file).items()}
    check_finite(tensors, f"the adapter {file}")
    return tensors


def add_update(tensors: Mapping[str, TensorLike], folder: Path) -> dict[str, TensorLike]:
    """Returns a base's tensors with a LoRA folder's update, each computed in float32 when it is read.

    Raises:
        CheckpointError: The adapter is of another kind, or does not fit the base.
    """
    try:
        settings = LoraConfig(**_lora_fields(read_json(folder / "adapter_config.json")))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: adapter_config.json is wrong: {error}") from error
    weights = read_adapter(folder)
    downs = [name for name in weights if name.endswith(_DOWN)]
    other = set(weights) - set(downs) - {name.replace(_DOWN, _UP) for name in downs}
    if settings.use_dora or other:
        what = "DoRA" if settings.use_dora else f"more than LoRA: {list_keys(other)}"
        raise CheckpointError(f"{folder} holds {what}; merge it first: forgery merge --model-path {folder}")
    updated = dict(tensors)
    for name in downs:
        path = name.removesuffix(_DOWN).removeprefix(LORA_PREFIX)
        target, up = f"{path}.weight", weights.get(name.replace(_DOWN, _UP))
        shape = None if up is None else (up.shape[0], weights[name].shape[1])
        if up is None or target not in tensors or tuple(tensors[target].shape) != shape:
            raise CheckpointError(f"{folder}: the adapter does not fit its base at {path}")
        updated[target] = Updated(tensors[target], weights[name], up, _scale(settings, path))
    return updated


def _lora_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    names = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_modules")
    return {name: values[name] for name in names if values.get(name) is not None}


def _scale(settings: LoraConfig, path: str) -> float:
    """Alpha over r, or over its root for rsLoRA, by the patterns that a module's path matches."""
    rank = settings.rank_pattern.get(get_pattern_key(settings.rank_pattern.keys(), path), settings.r)
    alpha = settings.alpha_pattern.get(get_pattern_key(settings.alpha_pattern.keys(), path), settings.lora_alpha)
    return float(alpha / math.sqrt(rank) if settings.use_rslora else alpha / rank)


def check_finite(tensors: Mapping[str, TensorLike], what: str) -> None:
    """Refuses tensors that hold NaN or infinity.

    Args:
        tensors: The tensors.
        what: What they are, for the message.

    Raises:
        CheckpointError: Some do; the message names them.
    """
    wrong = [
        name for name, tensor in tensors.items() if tensor.dtype.is_floating_point and not tensor[...].isfinite().all()
    ]
    if wrong:
        raise CheckpointError(f"{what} holds NaN or infinity in {list_keys(wrong)}; get it again or train again")


def measure_lost(before: Mapping[str, TensorLike], after: Mapping[str, Tensor], dtype: torch.dtype) -> Lost:
    """Measures what a dtype loses of an update.

    Args:
        before: Weights without the update.
        after: The same weights with it, in float32.
        dtype: What they will be written in.
    """
    lost = total = 0.0
    changed = unmoved = 0
    for name, merged in after.items():
        base, written = before[name][...].float(), merged.to(dtype).float()
        update = merged - base
        lost += float((written - merged).double().square().sum())
        total += float(update.double().square().sum())
        moves = update != 0
        changed += int(moves.sum())
        unmoved += int((moves & (written == base.to(dtype).float())).sum())
    return Lost(math.sqrt(lost / total) if total else 0.0, unmoved / max(1, changed))
