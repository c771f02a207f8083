"""Writes what was trained as a folder that ``load_pretrained_model`` opens, and reads it back to be sure."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from llava.errors import CheckpointError
from llava.files import atomic_folder, replace_folder
from llava.model.adapter import LowRank, Updated, describe_lost, measure_lost
from llava.model.branches import LORA
from llava.model.checkpoint import check_keys, complete_config, open_checkpoint
from llava.model.checkpoint_files import (
    TensorLike,
    list_keys,
    main_dtype,
    read_json,
    read_tensor_file,
    read_tensors,
)
from llava.model.checkpoint_layout import LORA_PREFIX, NON_LORA_FILE, stored_state_dict
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.saving import (
    describes_itself,
    published_config,
    published_layout,
    save_sharded,
    write_published_files,
)
from llava.train.checkpointing import disk_errors
from llava.train.lora import bare_name, parameter_part

logger = logging.getLogger(__name__)

LAYOUTS = ("adapter", "merged", "published")
ADAPTER_FILE = "adapter_model.safetensors"
_PUBLISHED_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def export_model(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    folder: Path,
    *,
    layout_name: str,
    base: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a trained model; the folder appears, instead of an earlier one, only when all is written and checked.

    Args:
        model: The model, in PEFT's wrapper if it has adapters.
        state_dict: Its tensors by their names in memory: all of them for ``merged`` or a model without adapters, else
            at least those of parts that are trained.
        folder: Folder to write.
        layout_name: ``adapter``: LoRA files over the base, with everything this project knows of the model;
            ``merged``: one self-contained model; ``published``: the files and names of the authors' release, LoRA
            over the base or, without adapters, whole.
        base: Where the base model is; a LoRA folder names it.
        dtype: Of what is written; default: what it is, and for a merged adapter the adapter's.

    Raises:
        FileError: It cannot be written.
        CheckpointError: What was written is not what was to be written, or cannot be opened.
    """
    adapted = isinstance(model, PeftModel)
    core = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(core, LlavaLlamaForCausalLM)
    waiting = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(waiting, ignore_errors=True)
    # Outermost, so that the message names the folder and not the one that waits to take its name.
    with disk_errors(folder), atomic_folder(waiting) as partial:
        if adapted and layout_name != "merged":
            tensors = {name: _in_dtype(tensor, dtype) for name, tensor in state_dict.items()}
            _write_adapter(model, core, tensors, partial, published=layout_name == "published", base=base)
        else:
            tensors = merged_tensors(model, state_dict, dtype)
            if layout_name == "published":
                _write_published(core, tensors, partial)
            else:
                _write_merged(core, tensors, partial)
        if layout_name != "published" or (describes_itself(published_layout(core)) and not adapted):
            check_opens(partial)
    replace_folder(waiting, folder)


def check_opens(folder: Path) -> None:
    """Opens a folder as ``load_pretrained_model`` does, up to where weights would be read.

    Raises:
        CheckpointError: It cannot be opened.
    """
    checkpoint, config = complete_config(open_checkpoint(folder))
    check_keys(config, checkpoint)


def merged_tensors(
    model: nn.Module, state_dict: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Returns a model's tensors by their bare names, each LoRA update added to its weight in float32.

    Args:
        model: The model, in PEFT's wrapper if it has adapters.
        state_dict: Its tensors by their names in memory.
        dtype: Of all numbers in the result; default: the adapter's, or without one as they are. What it loses of the
            update is logged.
    """
    base: dict[str, TensorLike] = {bare_name(name): value for name, value in state_dict.items() if "lora_" not in name}
    updated: dict[str, TensorLike] = {}
    for name, down in state_dict.items():
        if ".lora_A." not in name:
            continue
        path = name[: name.index(".lora_A.")]
        scaling: Any = model.get_submodule(path).scaling
        weight = f"{bare_name(path)}.weight"
        update = LowRank(down, state_dict[name.replace(".lora_A.", ".lora_B.")], scaling["default"])
        updated[weight] = Updated(base[weight], update)
        dtype = dtype or down.dtype
    if updated and dtype not in (torch.float32, torch.float64):
        assert dtype is not None
        logger.info("%s", describe_lost(measure_lost(base, updated, dtype), dtype, "--save_dtype float32"))
    return {name: _in_dtype(tensor[...], dtype) for name, tensor in {**base, **updated}.items()}


def _in_dtype(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _write_adapter(
    model: nn.Module,
    core: LlavaLlamaForCausalLM,
    state_dict: Mapping[str, Tensor],
    folder: Path,
    *,
    published: bool,
    base: str,
) -> None:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapter = {
        name.replace(".default.", "."): tensor.detach().cpu().contiguous()
        for name, tensor in state_dict.items()
        if "lora_" in name
    }
    save_file(adapter, folder / ADAPTER_FILE, {"format": "pt"})
    _compare(read_tensor_file(folder / ADAPTER_FILE), adapter, folder)
    # Parts whole, also those of which a layer stays frozen, so that whoever opens them can tell whether one is missing.
    parts = {parameter_part(name) for name in trained} - {LORA}
    beside = {bare_name(name): value for name, value in state_dict.items() if parameter_part(name) in parts}
    stored = stored_state_dict(core, beside)
    published_names = published_layout(core).key_map.to_published(stored)
    trained_whole = {f"{LORA_PREFIX}{name}": t.detach().cpu().clone() for name, t in published_names.items()}
    torch.save(trained_whole, folder / NON_LORA_FILE)
    _compare(read_tensor_file(folder / NON_LORA_FILE), trained_whole, folder)
    assert isinstance(model, PeftModel)
    settings = model.peft_config["default"].to_dict()
    settings["base_model_name_or_path"] = base
    settings["inference_mode"] = True
    settings["target_modules"] = _PUBLISHED_TARGETS if published else sorted(settings["target_modules"])
    _write_json(settings, folder / "adapter_config.json")
    config = core.config.to_dict()
    # The base is not quantised, and who opens the folder chooses again.
    config.pop("quantization_config", None)
    _write_json(published_config(config, core) if published else config, folder / "config.json")
    if not published:
        assert core.tokenizer is not None
        core.tokenizer.save_pretrained(folder)


def _write_merged(core: LlavaLlamaForCausalLM, tensors: Mapping[str, Tensor], folder: Path) -> None:
    # A tied output layer is stored once, as the embedding.
    tied = {"lm_head.weight"} if core.config.tie_word_embeddings else set()
    kept = {name: tensor for name, tensor in tensors.items() if name not in tied}
    core.save_pretrained(folder, state_dict=kept)
    # The towers are in the folder, so where they came from is of no use elsewhere.
    towers = {"mm_vision_tower": None, "mm_dino_tower": None}
    config = read_json(folder / "config.json") | towers | {"dtype": _dtype_name(kept)}
    _write_json(config, folder / "config.json")
    _compare(read_tensors(folder), stored_state_dict(core, kept), folder)


def _write_published(core: LlavaLlamaForCausalLM, tensors: Mapping[str, Tensor], folder: Path) -> None:
    layout = published_layout(core)
    published = layout.key_map.to_published(stored_state_dict(core, tensors))
    save_sharded(published, folder)
    _compare(read_tensors(folder), published, folder)
    assert core.tokenizer is not None
    core.tokenizer.save_pretrained(folder)
    write_published_files(layout, core, core.config.to_dict(), folder)
    config = read_json(folder / "config.json")
    if "torch_dtype" in config:
        _write_json(config | {"torch_dtype": _dtype_name(published)}, folder / "config.json")


def _dtype_name(tensors: Mapping[str, Tensor]) -> str:
    return str(main_dtype(tensors)).removeprefix("torch.")


def _write_json(values: Mapping[str, Any], file: Path) -> None:
    text = json.dumps(values, indent=2, sort_keys=True, default=_plain)
    file.write_text(f"{text}\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)


def _compare(written: Mapping[str, TensorLike], wanted: Mapping[str, Tensor], folder: Path) -> None:
    """Reads tensors back.

    Raises:
        CheckpointError: One is missing or differs, or is no finite number.
    """
    wide = [name for name, tensor in wanted.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if wide:
        raise CheckpointError(
            f"{folder} is not written, since these tensors are NaN or infinite: {list_keys(wide)}; numbers too large "
            "for float16 fit in --save_dtype bfloat16 or float32"
        )
    missing = set(wanted) - set(written)
    wrong = [
        name
        for name, tensor in written.items()
        if name not in wanted or not torch.equal(tensor[...], wanted[name].detach().cpu().to(tensor.dtype))
    ]
    if missing or wrong:
        raise CheckpointError(
            f"{folder} was written but does not hold what it should: {list_keys(missing | set(wrong))}; "
            "is the disk full or failing?"
        )
