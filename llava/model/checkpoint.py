"""Opens a checkpoint's files and completes its config, before any weight is read."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from llava.errors import CheckpointError
from llava.model.checkpoint_files import (
    TensorLike,
    list_keys,
    read_json,
    read_tensor_file,
    read_tensors,
    resolve_folder,
)
from llava.model.checkpoint_layout import stored_state_dict
from llava.model.configuration import LlavaConfig
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.base import PixelFormat, TowerSource
from llava.model.multimodal_encoder.builder import build_vision_tower, read_vision_tower
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_encoder.dino_encoder import DinoVisionTower
from llava.model.multimodal_fusion.builder import fusion_class
from llava.systems.fakereasoning import checkpoint as layout

logger = logging.getLogger(__name__)

VISION_PREFIX, DINO_PREFIX = "model.vision_tower.", "model.dino_tower."
DINO_WEIGHT_VARIABLE = "DINO_WEIGHT"
"""Environment variable that the authors' code reads the DINOv2 weight file from."""

_BUFFERS = ("rotary_emb.inv_freq", "position_ids")
"""Stored by old versions of transformers; computed now."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's files, read lazily, by our names.

    Attributes:
        folder: Where config and weights lie.
        config: Contents of ``config.json``.
        tensors: All tensors, those that a LoRA folder brings beside its adapter included.
        tokenizer_folder: Where the tokenizer lies: the base's folder for a LoRA folder without one.
        adapter_folder: The LoRA folder, or None.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorLike]
    tokenizer_folder: Path
    adapter_folder: Path | None = None


def open_checkpoint(model_path: str | os.PathLike[str], model_base: str | os.PathLike[str] | None = None) -> Checkpoint:
    """Reads a checkpoint's config and lists its tensors, by our names; no weight is read.

    Raises:
        CheckpointError: It is no checkpoint, or a LoRA folder lacks its base or a file.
    """
    folder = resolve_folder(model_path, "model")
    if not (folder / "adapter_config.json").is_file():
        if model_base is not None:
            raise CheckpointError(
                f"a base model is given, but {folder} has no adapter_config.json: it is no LoRA folder"
            )
        config = read_json(folder / "config.json")
        tensors = read_tensors(folder)
        if not _is_ours(config):
            tensors = layout.KEY_MAP.to_ours(tensors)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(_BUFFERS)}
        return Checkpoint(folder, config, tensors, folder)
    base = model_base or read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise CheckpointError(f"{folder} is a LoRA folder that does not name its base model; pass model_base")
    try:
        opened = open_checkpoint(base)
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is a LoRA folder whose base model cannot be opened: {error}") from error
    beside = read_tensor_file(folder / layout.NON_LORA_FILE)
    tensors = opened.tensors | layout.KEY_MAP.to_ours(layout.strip_lora_prefix(beside))
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else opened.config
    tokenizer_folder = folder if has_tokenizer(folder) else opened.tokenizer_folder
    return Checkpoint(folder, config, tensors, tokenizer_folder, adapter_folder=folder)


def _is_ours(config: Mapping[str, Any]) -> bool:
    return config.get("vision_tower_config") is not None


def complete_config(
    checkpoint: Checkpoint,
    vision_tower: str | os.PathLike[str] | None = None,
    dino_weights: str | os.PathLike[str] | None = None,
) -> tuple[Checkpoint, LlavaConfig]:
    """Finds the towers and writes into the config what only the tensors tell.

    A tower comes from the argument, else from complete tensors in the checkpoint, else from the path or hub id in the
    config (``mm_vision_tower``, ``mm_dino_tower``), else (DINO) from the environment variable ``DINO_WEIGHT``.

    Returns:
        The checkpoint with the towers' tensors, and the whole config.

    Raises:
        CheckpointError: A tower is nowhere to be had, or the config holds something that is not supported.
    """
    values = dict(checkpoint.config)
    _refuse_unsupported(values, checkpoint.folder)
    if "mm_fusion_type" not in values:
        values |= layout.infer_fusion(checkpoint.tensors)
    fusion = fusion_class(values["mm_fusion_type"])
    first = _find_first_tower(checkpoint, values, vision_tower)
    values["vision_tower_config"] = first.config
    if first.image_processor is not None:
        values["mm_image_processor"] = first.image_processor
    towers = {f"{VISION_PREFIX}{name}": tensor for name, tensor in first.tensors.items()}
    if fusion.uses_dino:
        second = _find_second_tower(checkpoint, values, dino_weights)
        values["dino_tower_config"] = second.config
        towers |= {f"{DINO_PREFIX}{name}": tensor for name, tensor in second.tensors.items()}
    others = {
        name: tensor for name, tensor in checkpoint.tensors.items() if not name.startswith((VISION_PREFIX, DINO_PREFIX))
    }
    try:
        config = LlavaConfig.from_dict(values)
    except StrictDataclassError as error:
        raise CheckpointError(f"{checkpoint.folder}: config.json is wrong: {error.__cause__ or error}") from error
    return replace(checkpoint, tensors=others | towers), config


def _refuse_unsupported(values: Mapping[str, Any], folder: Path) -> None:
    if values.get("mm_use_im_start_end") or values.get("mm_use_im_patch_token"):
        raise CheckpointError(f"{folder}: image start, end or patch tokens in the prompt are not supported")
    if values.get("mm_patch_merge_type", "flat") != "flat":
        raise CheckpointError(f"{folder}: mm_patch_merge_type {values['mm_patch_merge_type']!r} is not supported")


def _tower_part(checkpoint: Checkpoint, prefix: str) -> dict[str, TensorLike]:
    return {name.removeprefix(prefix): tensor for name, tensor in checkpoint.tensors.items() if name.startswith(prefix)}


def _find_first_tower(
    checkpoint: Checkpoint, values: Mapping[str, Any], given: str | os.PathLike[str] | None
) -> TowerSource:
    if given is not None:
        return _logged("vision tower", read_vision_tower(os.fspath(given)))
    stored = _tower_part(checkpoint, VISION_PREFIX)
    own = values.get("vision_tower_config")
    if stored and own is not None:
        return _logged("vision tower", TowerSource(own, stored, "the checkpoint"))
    named = values.get("mm_vision_tower")
    inferred = CLIPVisionTower.infer(named, stored) if named else None
    if inferred is not None:
        return _logged("vision tower", inferred)
    if not named:
        raise CheckpointError(
            f"{checkpoint.folder} neither holds nor names its vision tower; pass vision_tower=<folder or hub id>"
        )
    try:
        source = read_vision_tower(named)
    except CheckpointError as error:
        raise CheckpointError(f"{error}\nPass vision_tower=<folder or hub id> to take it from elsewhere.") from error
    if stored and _missing(source.config, stored) == []:
        source = replace(source, tensors=stored, origin="the checkpoint")
    return _logged("vision tower", source)


def _find_second_tower(
    checkpoint: Checkpoint, values: Mapping[str, Any], given: str | os.PathLike[str] | None
) -> TowerSource:
    heads = layout.infer_dino_heads(checkpoint.tensors)
    own = values.get("dino_tower_config")
    stored = _tower_part(checkpoint, DINO_PREFIX)
    if given is None and stored:
        if own is not None:
            return _logged("DINO tower", TowerSource(own, stored, "the checkpoint"))
        config = DinoVisionTower.infer_config(stored, heads)
        if not _missing(config, stored):
            return _logged("DINO tower", TowerSource(config, stored, "the checkpoint"))
    place = given or values.get("mm_dino_tower") or os.environ.get(DINO_WEIGHT_VARIABLE)
    if place is None:
        raise CheckpointError(
            f"{checkpoint.folder} does not hold its DINO tower whole; pass dino_weights=<dinov2_vitl14_pretrain.pth> "
            f"or set {DINO_WEIGHT_VARIABLE}"
        )
    source = read_vision_tower(os.fspath(place))
    if heads is not None and source.config["type"] == DinoVisionTower.tower_type:
        source = replace(source, config={**source.config, "num_attention_heads": heads})
    if own is not None:
        kept = {name: own[name] for name in ("pixel_mean", "pixel_std") if name in own}
        source = replace(source, config={**source.config, **kept})
    return _logged("DINO tower", source)


def _logged(name: str, source: TowerSource) -> TowerSource:
    logger.info("%s: %s from %s", name, source.config["type"], source.origin)
    return source


def _missing(config: Mapping[str, Any], stored: Mapping[str, TensorLike]) -> list[str]:
    """Names that a tower of this config needs and the stored tensors lack."""
    size = config.get("image_size") or config.get("native_image_size") or 224
    with torch.device("meta"):
        tower = build_vision_tower(config, PixelFormat(size, (0, 0, 0), (1, 1, 1)))
    return sorted(set(stored_state_dict(tower)) - set(stored))


def check_keys(config: LlavaConfig, checkpoint: Checkpoint) -> None:
    """Compares the tensors with what the model needs, before any weight is read.

    Raises:
        CheckpointError: Tensors are missing, unexpected, or of another shape; the message names them.
    """
    with torch.device("meta"):
        model = LlavaLlamaForCausalLM(config)
    needed = stored_state_dict(model)
    if config.tie_word_embeddings:
        needed.pop("lm_head.weight")
    found = checkpoint.tensors
    problems = []
    missing = set(needed) - set(found)
    if missing:
        problems.append(f"missing: {list_keys(missing)}")
    unexpected = set(found) - set(needed) - {"lm_head.weight"}
    if unexpected:
        problems.append(f"unexpected: {list_keys(unexpected)}")
    other = [
        f"{name} {list(found[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in needed.items()
        if name in found and tuple(found[name].shape) != tuple(tensor.shape)
    ]
    if other:
        problems.append(f"of another shape: {list_keys(other)}")
    if problems:
        details = "\n  ".join(problems)
        raise CheckpointError(f"{checkpoint.folder} does not fit the model that it describes\n  {details}")


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Returns the dtype of the language model's layers in the checkpoint.

    Raises:
        CheckpointError: There are no such layers.
    """
    for name, tensor in checkpoint.tensors.items():
        if name.startswith("model.layers."):
            return tensor.dtype
    raise CheckpointError(f"{checkpoint.folder} holds no language model: no tensor is named model.layers.…")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
