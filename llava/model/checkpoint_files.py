"""Reads weight files lazily and safely: safetensors, or pickled tensors with ``weights_only=True``."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava.errors import CheckpointError

SAFETENSORS_NAMES = ("model.safetensors",)
BIN_NAMES = ("pytorch_model.bin",)
WEIGHT_PATTERNS = ["*.json", "*.safetensors", "*.bin", "*.pth", "*.model", "*.txt"]
WORD_PATTERNS = ["*.json", "*.model", "*.txt"]
"""Of a tokenizer and an image processor alone."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorLike(Protocol):
    """A tensor, or the promise of one: reading ``x[...]`` gives a ``torch.Tensor``."""

    @property
    def shape(self) -> Any:
        """Sizes of the dimensions."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the elements."""

    def __getitem__(self, index: Any) -> Tensor:
        """Reads the tensor, or rows of it."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, read when indexed."""

    handle: Any
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __getitem__(self, index: "slice | EllipsisType") -> Tensor:
        return self.handle.get_slice(self.name)[index]


@dataclass(frozen=True)
class Rows:
    """Rows ``start`` to ``stop`` of a tensor, read when indexed."""

    whole: TensorLike
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions."""
        return (self.stop - self.start, *self.whole.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Type of the elements."""
        return self.whole.dtype

    def __getitem__(self, index: "slice | EllipsisType") -> Tensor:
        first, last = (None, None) if index is Ellipsis else (index.start, index.stop)
        first, last, _ = slice(first, last).indices(self.stop - self.start)
        return self.whole[self.start + first : self.start + last]


def resolve_folder(
    path_or_id: str | os.PathLike[str],
    what: str,
    patterns: Sequence[str] = tuple(WEIGHT_PATTERNS),
    revision: str | None = None,
) -> Path:
    """Returns the local folder of a checkpoint, downloading a hub id's files if need be.

    Args:
        path_or_id: Folder or hub id.
        what: What it is, for messages.
        patterns: Which of a hub id's files.
        revision: Branch, tag or commit of a hub id; default: its main branch.

    Raises:
        CheckpointError: It is no folder, and the hub cannot provide it.
    """
    local = Path(path_or_id).expanduser()
    if local.is_dir():
        return local
    if local.exists():
        raise CheckpointError(f"{what}: {local} is a file, but a folder with config.json and weights is needed")
    name = str(path_or_id)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{what}: there is no folder {name}, and this is no hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:
        full = f"{name} in revision {revision}" if revision else "it"
        raise CheckpointError(
            f"{what}: there is no folder {name}, and the hub did not give {full} ({type(error).__name__}: {error}). "
            "Download it on a machine with access and pass the folder's path."
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: The file is missing, is not JSON, or holds no object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent} has no {file.name}, so it is no checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    except RecursionError:
        raise CheckpointError(f"{file} cannot be read as JSON: it is nested too deeply") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return content


def read_tensors(folder: Path) -> dict[str, TensorLike]:
    """Returns every tensor of a model folder by name, single file or sharded, without reading any weight.

    Raises:
        CheckpointError: There are no weights, a shard is missing, or a file is damaged.
    """
    for names, suffix in ((SAFETENSORS_NAMES, ".safetensors"), (BIN_NAMES, ".bin")):
        for name in names:
            if (folder / f"{name}.index.json").is_file():
                return _read_shards(folder / f"{name}.index.json")
            if (folder / name).is_file():
                return read_tensor_file(folder / name)
        shards = sorted(folder.glob(f"*-of-*{suffix}"))
        if shards:
            raise CheckpointError(f"{folder} has shards ({shards[0].name}, …) but no {names[0]}.index.json")
    raise CheckpointError(f"{folder} has no weights: neither {SAFETENSORS_NAMES[0]} nor {BIN_NAMES[0]}, nor shards")


def _read_shards(index: Path) -> dict[str, TensorLike]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map")
    odd = [key for key, name in weight_map.items() if not isinstance(name, str) or Path(name).name != name]
    if odd:
        raise CheckpointError(f"{index} must give each tensor the name of a file beside it: {list_keys(odd)}")
    files = {name: index.parent / Path(name).name for name in sorted(set(weight_map.values()))}
    missing = [name for name, file in files.items() if not file.is_file()]
    if missing:
        raise CheckpointError(f"{index.parent} lacks shards that {index.name} names: {', '.join(missing)}")
    shards = {name: read_tensor_file(file) for name, file in files.items()}
    absent = [f"{key} ({name})" for key, name in weight_map.items() if key not in shards[name]]
    if absent:
        raise CheckpointError(f"{index.parent}: shards lack tensors that {index.name} names: {list_keys(absent)}")
    return {key: shards[name][key] for key, name in weight_map.items()}


def stored_names(folder: Path) -> list[str]:
    """Returns the names of the tensors in a checkpoint's own files, without reading any weight.

    Those of a LoRA folder are its adapter's and what lies beside it. A file that cannot be read has none: whoever opens
    it says why.
    """
    if folder.is_file():
        return list(read_tensor_file(folder))
    if (folder / "adapter_config.json").is_file():
        files = [file for pattern in ("*.safetensors", "*.bin") for file in sorted(folder.glob(pattern))]
        return [name for file in files for name in _names_or_none(file)]
    try:
        return list(read_tensors(folder))
    except CheckpointError:
        return []


def _names_or_none(file: Path) -> list[str]:
    try:
        return list(read_tensor_file(file))
    except CheckpointError:
        return []


def read_tensor_file(file: Path) -> dict[str, TensorLike]:
    """Returns the tensors of one weight file; pickled ones are memory-mapped and can hold nothing but tensors.

    Raises:
        CheckpointError: The file is missing, damaged, or holds something else.
    """
    if not file.is_file():
        raise CheckpointError(f"there is no weight file {file}")
    if file.suffix == ".safetensors":
        try:
            handle = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged or no safetensors file: {error}") from error
        return {name: _stored(handle, name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read as tensors: {type(error).__name__}: {error}") from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{file} holds something else than named tensors")
    return dict(content)


def main_dtype(tensors: Mapping[str, TensorLike]) -> torch.dtype:
    """Returns the dtype of most floating-point numbers, which one tensor of another dtype does not change."""
    counts: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.dtype.is_floating_point:
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return max(counts, key=lambda dtype: counts[dtype]) if counts else torch.float32


def _stored(handle: Any, name: str) -> StoredTensor:
    entry = handle.get_slice(name)
    if entry.get_dtype() not in _DTYPES:
        raise CheckpointError(
            f"{name} is stored as {entry.get_dtype()}, which is not supported; get the model in float32, bfloat16 or "
            "float16"
        )
    return StoredTensor(handle, name, tuple(entry.get_shape()), _DTYPES[entry.get_dtype()])


def _is_zip(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(2) == b"PK"


def list_keys(keys: "list[str] | set[str]", at_most: int = 12) -> str:
    """Returns sorted names for a message, cut after ``at_most``."""
    shown = sorted(keys)
    more = f" … and {len(shown) - at_most} more" if len(shown) > at_most else ""
    return ", ".join(shown[:at_most]) + more
