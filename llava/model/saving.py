"""Writes checkpoints in a published layout; ``model.save_pretrained`` writes the native one."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from llava.errors import CheckpointError
from llava.files import atomic_folder
from llava.model.checkpoint import PLAIN
from llava.model.checkpoint_layout import stored_state_dict
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.systems import registry
from llava.systems.base import CheckpointFormat

MAX_SHARD_SIZE = "5GB"
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
_NATIVE_FIELDS = (
    "system",
    "vision_tower_config",
    "dino_tower_config",
    "extra_tower_configs",
    "token_source_configs",
    "mm_dino_tower",
    "mm_image_processor",
    "mm_fusion_type",
    "mm_fusion_config",
    "cpm_search",
    "cpm_temperature",
    "cpm_weight",
    "cpm_tokens",
    "conv_mode",
    "verdict_only_share",
    "default_score",
    "notice",
)
"""Config fields that the published layout does not have."""


def save_published(
    model: LlavaLlamaForCausalLM, folder: Path, config: Mapping[str, Any], tokenizer_folder: Path
) -> None:
    """Writes a merged model with the published names, for the authors' code.

    Args:
        model: A model without adapters, its towers of the types that the layout holds.
        folder: New folder, which appears only when all is written.
        config: ``config.json`` of the checkpoint that the model was opened from.
        tokenizer_folder: Folder whose tokenizer files are copied as they are.

    Raises:
        CheckpointError: The model has adapters or towers that the published layout cannot hold.
        FileError: The folder exists and is not empty, or cannot be written.
    """
    layout = published_layout(model)
    for branch, tower in model.config.tower_configs().items():
        kind = layout.tower_types.get(branch)
        if tower["type"] != kind:
            raise CheckpointError(f"the published layout holds a {kind} tower, but this model has {tower['type']!r}")
    stored = stored_state_dict(model)
    adapters = [name for name in stored if "lora_" in name]
    if adapters:
        raise CheckpointError(f"the model has adapters that are not merged: {adapters[0]}, …")
    with atomic_folder(folder) as partial:
        save_sharded(layout.key_map.to_published(stored), partial)
        for name in TOKENIZER_FILES:
            if (tokenizer_folder / name).is_file():
                shutil.copyfile(tokenizer_folder / name, partial / name)
        write_published_files(layout, model, config, partial)


def describes_itself(layout: CheckpointFormat) -> bool:
    """Whether the published files of a layout describe the whole model, towers and image processor too."""
    return hasattr(layout, "published_files")


def write_published_files(
    layout: CheckpointFormat, model: LlavaLlamaForCausalLM, config: Mapping[str, Any], folder: Path
) -> None:
    """Writes what lies beside weights and tokenizer in a layout.

    Args:
        layout: The layout.
        model: The model.
        config: Its config, from which ``config.json`` is made where the layout has no more files than that.
        folder: Where they go.

    Raises:
        CheckpointError: The layout cannot hold the model.
    """
    own = getattr(layout, "published_files", None)
    files = {"config.json": published_config(config, model)} if own is None else own(model)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2, sort_keys=True) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def published_layout(model: LlavaLlamaForCausalLM) -> CheckpointFormat:
    """Returns the layout of the model's system.

    Raises:
        CheckpointError: It has none.
    """
    name = model.config.system
    found: CheckpointFormat | None = registry.component(name, "checkpoint_format") if name else PLAIN
    if found is None:
        raise CheckpointError(f"the system {name!r} has no published layout to write")
    return found


def published_config(config: Mapping[str, Any], model: LlavaLlamaForCausalLM) -> dict[str, Any]:
    """Returns a config that transformers 4 and the authors' code read, without the native fields."""
    values = {name: value for name, value in config.items() if name not in _NATIVE_FIELDS}
    rope = values.pop("rope_parameters", None)
    if rope is not None:
        scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "rope_type", "type")}
        kind = rope.get("rope_type", "default")
        # Transformers 4.31 reads the first name, later versions either.
        scaled = None if kind == "default" else {"type": kind, "rope_type": kind, **scaling}
        values |= {"rope_theta": rope.get("rope_theta", 10000.0), "rope_scaling": scaled}
    values.pop("dtype", None)
    values["torch_dtype"] = str(model.dtype).removeprefix("torch.")
    return values


def save_sharded(tensors: Mapping[str, torch.Tensor], folder: Path, max_shard_size: str = MAX_SHARD_SIZE) -> None:
    """Writes tensors as safetensors, with an index if there are several files; names are kept one for one."""
    plan = split_torch_state_dict_into_shards(
        # Stand-ins without memory, so that a tensor that is stored twice is planned for twice.
        {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()},
        max_shard_size=max_shard_size,
    )
    for file, names in plan.filename_to_tensors.items():
        # Cloned, since safetensors refuses tensors that share memory, as a repeated tower does.
        save_file({name: tensors[name].detach().cpu().clone() for name in names}, folder / file, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
