"""A LoRA adapter: its tensors checked, and its update added to the base's weights in float32 when they are read."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from llava.errors import CheckpointError
from llava.model.adapter_config import AdapterConfig, read_adapter_config
from llava.model.branches import LANGUAGE_MODEL, part_of
from llava.model.checkpoint_files import TensorLike, list_keys, read_tensor_file
from llava.model.checkpoint_layout import KeyMap, strip_lora_prefix

_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_DOWN, _UP, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_EMBEDDING_DOWN, _EMBEDDING_UP = ".lora_embedding_A", ".lora_embedding_B"
_TIED = ("lm_head.", "model.embed_tokens.")


@dataclass(frozen=True)
class LowRank:
    """The update ``s B A`` of a weight (arXiv 2106.09685), computed in float32 when indexed.

    Attributes:
        down: A, ``[r, in]``.
        up: B, ``[out, r]``.
        scale: s.
    """

    down: TensorLike
    up: TensorLike
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Sizes of the dimensions."""
        return (self.up.shape[0], self.down.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """Type of the elements."""
        return torch.float32

    def __getitem__(self, index: "slice | EllipsisType") -> Tensor:
        return (self.up[index].float() @ self.down[...].float()) * self.scale


@dataclass(frozen=True)
class Transposed:
    """A matrix read by its columns, as an embedding's adapter is stored."""

    stored: TensorLike

    @property
    def shape(self) -> tuple[int, int]:
        """Sizes of the dimensions."""
        return (self.stored.shape[1], self.stored.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        """Type of the elements."""
        return self.stored.dtype

    def __getitem__(self, index: "slice | EllipsisType") -> Tensor:
        return self.stored[...].T[index]


@dataclass(frozen=True)
class Updated:
    """A weight with its update, computed in float32 when indexed.

    Attributes:
        weight: The base's.
        update: What is added.
        magnitude: Norms ``[out]`` that the rows of the sum are scaled to (DoRA, arXiv 2402.09353), or None.
    """

    weight: TensorLike
    update: TensorLike
    magnitude: TensorLike | None = None

    @property
    def shape(self) -> Any:
        """Sizes of the dimensions."""
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        """Type of the elements."""
        return torch.float32

    def __getitem__(self, index: "slice | EllipsisType") -> Tensor:
        total = self.weight[index].float() + self.update[index]
        if self.magnitude is None:
            return total
        return total * (self.magnitude[index].float() / total.norm(dim=1)).unsqueeze(1)


@dataclass(frozen=True)
class Lost:
    """What a dtype loses of an update.

    Attributes:
        share: Norm of what rounding changes over the update's norm.
        unmoved: Share of the changed weights that are, once rounded, what they were before.
    """

    share: float
    unmoved: float


@dataclass(frozen=True)
class Adapter:
    """A LoRA folder's adapter, by the names in its file; no tensor is read.

    Attributes:
        config: What its config says.
        updates: The update of each module.
        magnitudes: DoRA's norms of each module.
        parts: The tensors that updates and norms are made of.
        whole: Weights that the file holds whole.
    """

    config: AdapterConfig
    updates: dict[str, LowRank]
    magnitudes: dict[str, TensorLike]
    parts: dict[str, TensorLike]
    whole: dict[str, TensorLike]

    @property
    def dtype(self) -> torch.dtype:
        """Type of its tensors."""
        return next(iter({**self.parts, **self.whole}.values())).dtype

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.config.file.parent

    def add_to(
        self, tensors: Mapping[str, TensorLike], key_map: KeyMap, *, is_tied: bool = False
    ) -> dict[str, TensorLike]:
        """Returns a base's tensors with the updates, each computed in float32 when it is read.

        Args:
            tensors: The base's, by native names, with ``whole`` in them.
            key_map: How the names in the adapter's file correspond to the native ones.
            is_tied: Whether the output layer is the embedding.

        Raises:
            CheckpointError: The adapter does not fit the base, or holds NaN or infinity.
        """
        check_finite({**self.parts, **self.whole}, f"the adapter in {self.folder}")
        updates, magnitudes = _by_weight(self.updates, key_map), _by_weight(self.magnitudes, key_map)
        _check_fits(updates, tensors, self.folder)
        self._check_complete(updates, tensors)
        if is_tied and any(name.startswith(_TIED) for name in (*updates, *key_map.to_native(self.whole))):
            raise CheckpointError(
                f"{self.folder} changes the embedding or the output layer of a model in which both are one "
                "(tie_word_embeddings), which is not supported"
            )
        return {**tensors, **{n: Updated(tensors[n], update, magnitudes.get(n)) for n, update in updates.items()}}

    def module_paths(self, key_map: KeyMap) -> dict[str, str]:
        """Returns the native path of each module that has an update.

        Raises:
            CheckpointError: A module of the file is several ones here.
        """
        paths = {path: list(_by_weight({path: update}, key_map)) for path, update in self.updates.items()}
        several = [path for path, names in paths.items() if len(names) != 1]
        if several:
            raise CheckpointError(
                f"{self.folder}: modules of the adapter are several ones here: {list_keys(several)}; merge it first: "
                f"forgery merge --model-path {self.folder}"
            )
        return {path: names[0].removesuffix(".weight") for path, names in paths.items()}

    def _check_complete(self, updates: Mapping[str, TensorLike], tensors: Mapping[str, TensorLike]) -> None:
        """Refuses an adapter that lacks modules which its config names, since those would silently be the base's."""
        known = {_numberless(name) for name in updates}
        linear = [name for name, tensor in tensors.items() if name.endswith(".weight") and len(tensor.shape) == 2]
        alike = [name for name in linear if part_of(name) == LANGUAGE_MODEL or _numberless(name) in known]
        named = self.config.targeted(name.removesuffix(".weight") for name in alike)
        missing = [path for path in named if f"{path}.weight" not in updates]
        if missing:
            raise CheckpointError(
                f"{self.folder}: the adapter lacks tensors of modules that its config names: {list_keys(missing)}; get "
                "it again"
            )


def read_adapter(folder: Path) -> Adapter:
    """Reads a LoRA folder's config and lists its adapter's tensors.

    Raises:
        CheckpointError: The adapter is of another kind, holds nothing, or config and tensors contradict each other.
    """
    config = read_adapter_config(folder)
    file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder} has an {config.file.name} but neither {' nor '.join(_FILES)}")
    tensors = strip_lora_prefix(read_tensor_file(file))
    if not tensors:
        raise CheckpointError(f"{file} holds no tensors")
    left = dict(tensors)
    updates = {**_linear_updates(left, config), **_embedding_updates(left, config)}
    magnitudes = {name.removesuffix(_MAGNITUDE): left.pop(name) for name in list(left) if name.endswith(_MAGNITUDE)}
    odd = [name for name in left if "lora_" in name]
    if odd:
        raise CheckpointError(f"{file} holds more than LoRA, or a part without its counterpart: {list_keys(odd)}")
    _check_magnitudes(magnitudes, updates, config)
    whole = {name.replace(".base_layer.", "."): tensor for name, tensor in left.items()}
    _check_whole(whole, config)
    parts = {name: tensor for name, tensor in tensors.items() if name not in left}
    return Adapter(config, updates, magnitudes, parts, whole)


def _linear_updates(left: dict[str, TensorLike], config: AdapterConfig) -> dict[str, LowRank]:
    paths = [name.removesuffix(_DOWN) for name in left if name.endswith(_DOWN)]
    pairs = {path: (left[f"{path}{_DOWN}"], left.get(f"{path}{_UP}")) for path in paths}
    return _take(left, pairs, (_DOWN, _UP), config)


def _embedding_updates(left: dict[str, TensorLike], config: AdapterConfig) -> dict[str, LowRank]:
    """An embedding's update is stored transposed: its A is ``[r, tokens]``, its B ``[width, r]``."""
    paths = [name.removesuffix(_EMBEDDING_DOWN) for name in left if name.endswith(_EMBEDDING_DOWN)]
    pairs: dict[str, tuple[TensorLike, TensorLike | None]] = {}
    for path in paths:
        first, second = left[f"{path}{_EMBEDDING_DOWN}"], left.get(f"{path}{_EMBEDDING_UP}")
        if second is not None and len(first.shape) == len(second.shape) == 2:
            pairs[path] = (Transposed(second), Transposed(first))
    return _take(left, pairs, (_EMBEDDING_DOWN, _EMBEDDING_UP), config)


def _take(
    left: dict[str, TensorLike],
    pairs: Mapping[str, tuple[TensorLike, TensorLike | None]],
    ends: tuple[str, str],
    config: AdapterConfig,
) -> dict[str, LowRank]:
    """Makes updates of pairs and takes their tensors out of what is left."""
    updates = {}
    for path, (down, up) in pairs.items():
        if up is None:
            continue  # named with all that has no counterpart
        rank = config.rank_of(path)
        if len(down.shape) != 2 or len(up.shape) != 2 or (down.shape[0], up.shape[1]) != (rank, rank):
            raise CheckpointError(
                f"{config.file.parent}: the adapter of {path} has shapes {list(down.shape)} and {list(up.shape)}, but "
                f"{config.file.name} gives it rank {rank}"
            )
        updates[path] = LowRank(down, up, config.scale_of(path))
        for end in ends:
            del left[f"{path}{end}"]
    return updates


def _check_magnitudes(
    magnitudes: Mapping[str, TensorLike], updates: Mapping[str, LowRank], config: AdapterConfig
) -> None:
    wanted = set(updates) if config.has_magnitudes else set()
    if set(magnitudes) != wanted:
        problem = "differs from what its tensors are" if magnitudes else "asks for norms that its tensors lack"
        names = list_keys(set(magnitudes) ^ wanted)
        raise CheckpointError(f"{config.file}: use_dora is {config.has_magnitudes}, which {problem}: {names}")
    odd = [path for path, values in magnitudes.items() if tuple(values.shape) != (updates[path].shape[0],)]
    if odd:
        raise CheckpointError(f"{config.file.parent}: norms (use_dora) are of another shape: {list_keys(odd)}")


def _check_whole(whole: Mapping[str, TensorLike], config: AdapterConfig) -> None:
    """Refuses a config that says of tensors that they were trained whole, if the file lacks them."""
    missing = [name for name in config.modules_to_save if not any(f".{name}." in f".{path}" for path in whole)]
    if missing:
        raise CheckpointError(
            f"{config.file}: modules_to_save names {list_keys(missing)}, but the adapter holds no such tensors"
        )
    if config.bias == "all" and not any(path.endswith(".bias") for path in whole):
        raise CheckpointError(f"{config.file}: bias is 'all', but the adapter holds no bias")


def whole_tensors(adapter: Adapter, base: Mapping[str, TensorLike], key_map: KeyMap) -> dict[str, TensorLike]:
    """Returns what an adapter's file holds whole, by native names.

    Raises:
        CheckpointError: The base has no such tensors, or lacks of a module are the base's in silence.
    """
    whole = key_map.to_native(adapter.whole)
    unknown = set(whole) - set(base)
    if unknown:
        raise CheckpointError(f"{adapter.folder}: the adapter holds tensors that its base lacks: {list_keys(unknown)}")
    inside = [f".{module}." for module in adapter.config.modules_to_save]
    missing = [name for name in base if name not in whole and any(module in f".{name}" for module in inside)]
    if adapter.config.bias == "lora_only":
        biases = [name.removesuffix("weight") + "bias" for name in _by_weight(adapter.updates, key_map)]
        missing += [name for name in biases if name in base and name not in whole]
    if missing:
        raise CheckpointError(
            f"{adapter.folder}: the adapter lacks tensors of parts that were trained whole: {list_keys(missing)}; get "
            "it again"
        )
    return whole


def _by_weight(parts: Mapping[str, TensorLike], key_map: KeyMap) -> dict[str, TensorLike]:
    """What belongs to modules of the adapter's file, by the native names of their weights."""
    return key_map.to_native({f"{path}.weight": part for path, part in parts.items()})


def _check_fits(updates: Mapping[str, TensorLike], tensors: Mapping[str, TensorLike], folder: Path) -> None:
    absent = [name.removesuffix(".weight") for name in updates if name not in tensors]
    if absent:
        raise CheckpointError(f"{folder}: the adapter is for modules that the model lacks: {list_keys(absent)}")
    other = [
        f"{name} {list(update.shape)} instead of {list(tensors[name].shape)}"
        for name, update in updates.items()
        if tuple(update.shape) != tuple(tensors[name].shape)
    ]
    if other:
        raise CheckpointError(f"{folder}: the adapter does not fit the model: {list_keys(other)}")


def _numberless(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


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


def measure_lost(before: Mapping[str, TensorLike], after: Mapping[str, TensorLike], dtype: torch.dtype) -> Lost:
    """Measures what a dtype loses of an update.

    Args:
        before: Weights without the update.
        after: The same weights with it, in float32.
        dtype: What they will be written in.
    """
    lost = total = 0.0
    changed = unmoved = 0
    for name, tensor in after.items():
        merged = tensor[...]
        base, written = before[name][...].float(), merged.to(dtype).float()
        update = merged - base
        lost += float((written - merged).double().square().sum())
        total += float(update.double().square().sum())
        moves = update != 0
        changed += int(moves.sum())
        unmoved += int((moves & (written == base.to(dtype).float())).sum())
    return Lost(math.sqrt(lost / total) if total else 0.0, unmoved / max(1, changed))
