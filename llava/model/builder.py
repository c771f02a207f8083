"""``load_pretrained_model``: any published layout to a ready model, judged by its files, never by its folder's name."""

import importlib.util
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from transformers import AutoTokenizer, BitsAndBytesConfig, GenerationConfig, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from llava.model.checkpoint_files import (
    CheckpointError,
    TensorLike,
    list_keys,
    read_json,
    read_tensor_file,
    read_tensors,
    resolve_folder,
)
from llava.model.configuration import LlavaConfig
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.base import TowerSource
from llava.model.multimodal_encoder.builder import VISION_TOWERS, read_vision_tower
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_encoder.dino_encoder import DinoVisionTower
from llava.model.multimodal_fusion.builder import fusion_class
from llava.model.probability_mapper import VerdictTokens
from llava.systems.fakereasoning import layout
from llava.systems.fakereasoning.text import VERDICT_PREFIX, VERDICT_WORDS

logger = logging.getLogger(__name__)

DEFAULT_CONTEXT_LENGTH = 2048
VISION_PREFIX, DINO_PREFIX = "model.vision_tower.", "model.dino_tower."
DINO_WEIGHT_VARIABLE = "DINO_WEIGHT"
"""Environment variable that the authors' code reads the DINOv2 weight file from."""

_FULL_PRECISION_PARTS = ["vision_tower", "dino_tower", "mm_projector", "dino_mm_projector", "fusion", "lm_head"]
"""What stays as it is when the language model is quantised."""
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


def load_pretrained_model(
    model_path: str | os.PathLike[str],
    model_base: str | os.PathLike[str] | None = None,
    model_name: str | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    device_map: str | dict[str, Any] | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    attn_implementation: str = "auto",
    vision_tower: str | os.PathLike[str] | None = None,
    dino_weights: str | os.PathLike[str] | None = None,
    merge_lora: bool = True,
) -> tuple[PreTrainedTokenizerBase, LlavaLlamaForCausalLM, Any, int]:
    """Opens a checkpoint for inference or further training.

    It may be a merged published checkpoint, a LoRA folder in the published layout over its base, or a folder that this
    project saved; a local path or a hub id. No parameter is left at random: whatever is missing is an error.

    Args:
        model_path: Folder or hub id.
        model_base: Base model of a LoRA folder; default: the one that ``adapter_config.json`` names.
        model_name: Accepted for LLaVA's sake and ignored.
        device: ``auto`` (CUDA, else MPS, else CPU) or a torch device.
        dtype: ``auto`` (the checkpoint's; float32 in the place of float16 on a CPU), or a torch dtype or its name.
        device_map: ``auto`` spreads the model over all GPUs; or a map as accelerate takes it. Overrides ``device``.
        load_8bit: Quantise the language model's linear layers to 8 bits (needs bitsandbytes).
        load_4bit: The same to 4 bits (NF4).
        attn_implementation: ``auto`` (flash-attn where installed and usable, else SDPA), or transformers' name.
        vision_tower: First tower in the place of the checkpoint's: folder or hub id.
        dino_weights: Second tower in the place of the checkpoint's: a DINOv2 ``.pth``, a folder, a hub id, or
            ``timm:<name>``.
        merge_lora: Whether a LoRA folder's adapter is merged into the weights; a quantised model keeps it apart.

    Returns:
        Tokenizer, model in evaluation mode with frozen towers, image processor, and context length in tokens.

    Raises:
        CheckpointError: Something is missing, unexpected or of another shape; the message names it.
        ValueError: Arguments exclude each other or name something unknown.
    """
    if load_8bit and load_4bit:
        raise ValueError("load_8bit and load_4bit exclude each other")
    checkpoint = open_checkpoint(model_path, model_base)
    checkpoint, config = complete_config(checkpoint, vision_tower, dino_weights)
    tokenizer = load_tokenizer(checkpoint.tokenizer_folder)
    target = torch.device(resolve_device(device))
    tensor_dtype = resolve_dtype(dtype, checkpoint, target)
    check_keys(config, checkpoint)
    model = _materialize(
        config,
        checkpoint.tensors,
        dtype=tensor_dtype,
        device_map=device_map if device_map is not None else {"": target},
        quantization_config=_quantization(load_8bit, load_4bit, tensor_dtype),
        attn_implementation=resolve_attention(attn_implementation, target, tensor_dtype),
    )
    _set_generation_defaults(model, checkpoint.tokenizer_folder, tokenizer)
    if checkpoint.adapter_folder is not None:
        model = apply_lora(model, checkpoint.adapter_folder, merge=merge_lora and not (load_8bit or load_4bit))
    model.get_model().freeze_towers()
    model.set_tokenizer(tokenizer, VerdictTokens.from_tokenizer(tokenizer, VERDICT_PREFIX, VERDICT_WORDS))
    context_length = config.tokenizer_model_max_length or DEFAULT_CONTEXT_LENGTH
    return tokenizer, model.eval(), model.image_processor, context_length


def open_checkpoint(
    model_path: str | os.PathLike[str], model_base: str | os.PathLike[str] | None = None
) -> Checkpoint:
    """Reads a checkpoint's config and lists its tensors, by our names; no weight is read.

    Raises:
        CheckpointError: It is no checkpoint, or a LoRA folder lacks its base or a file.
    """
    folder = resolve_folder(model_path, "model")
    if not (folder / "adapter_config.json").is_file():
        if model_base is not None:
            raise CheckpointError(f"a base model is given, but {folder} is no LoRA folder: it has no adapter_config.json")
        tensors = layout.KEY_MAP.to_ours(read_tensors(folder))
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(_BUFFERS)}
        return Checkpoint(folder, read_json(folder / "config.json"), tensors, folder)
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
    tokenizer_folder = folder if _has_tokenizer(folder) else opened.tokenizer_folder
    return Checkpoint(folder, config, tensors, tokenizer_folder, adapter_folder=folder)


def complete_config(
    checkpoint: Checkpoint,
    vision_tower: str | os.PathLike[str] | None = None,
    dino_weights: str | os.PathLike[str] | None = None,
) -> tuple[Checkpoint, LlavaConfig]:
    """Finds the towers and writes into the config what only the tensors tell.

    A tower comes from the argument, else from complete tensors in the checkpoint, else from the path or hub id in the
    config, else (DINO) from the environment variable ``DINO_WEIGHT``.

    Returns:
        The checkpoint with the towers' tensors, and the whole config.

    Raises:
        CheckpointError: A tower is nowhere to be had, or the config asks for something that is not supported.
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
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if not name.startswith((VISION_PREFIX, DINO_PREFIX))
    }
    return replace(checkpoint, tensors=others | towers), LlavaConfig.from_dict(values)


def _refuse_unsupported(values: Mapping[str, Any], folder: Path) -> None:
    if values.get("mm_use_im_start_end") or values.get("mm_use_im_patch_token"):
        raise CheckpointError(f"{folder}: image start, end or patch tokens in the prompt are not supported")
    if values.get("mm_patch_merge_type", "flat") != "flat":
        raise CheckpointError(f"{folder}: mm_patch_merge_type {values['mm_patch_merge_type']!r} is not supported")


def _tower_part(checkpoint: Checkpoint, prefix: str) -> dict[str, TensorLike]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(prefix)
    }


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
    place = given or os.environ.get(DINO_WEIGHT_VARIABLE)
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
    from llava.model.multimodal_encoder.base import PixelFormat

    size = config.get("image_size") or config.get("native_image_size") or 224
    with torch.device("meta"):
        tower = VISION_TOWERS[config["type"]](config, PixelFormat(size, (0, 0, 0), (1, 1, 1)))
    return sorted(set(stored_state_dict(tower)) - set(stored))


def stored_state_dict(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns a module's tensors by the names under which checkpoints hold them.

    Transformers keeps some towers under other names in memory, and which ones depends on its version; stored names do
    not change.
    """
    tensors = dict(module.state_dict())
    for path, tower in [(path, part) for path, part in module.named_modules() if _is_hub_model(part)]:
        inside = f"{path}." if path else ""
        part = {name: tensors.pop(f"{inside}{name}") for name in tower.state_dict()}
        stored = revert_weight_conversion(tower, part)
        prefix = "" if any(name.startswith("vision_model.") for name in stored) else _stored_prefix(tower)
        tensors |= {f"{inside}{prefix}{name}": tensor for name, tensor in stored.items()}
    return tensors


def _is_hub_model(module: torch.nn.Module) -> bool:
    return type(module).__name__ in ("CLIPVisionModel", "Dinov2Model")


def _stored_prefix(tower: torch.nn.Module) -> str:
    return "vision_model." if type(tower).__name__ == "CLIPVisionModel" else ""


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
        raise CheckpointError(f"{checkpoint.folder} does not fit the model that it describes\n  " + "\n  ".join(problems))


def _materialize(config: LlavaConfig, tensors: Mapping[str, TensorLike], **options: Any) -> LlavaLlamaForCausalLM:
    """Lets transformers cast, quantise and place the tensors one by one."""
    model, info = LlavaLlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=dict(tensors), output_loading_info=True, **options
    )
    left = {name for name in info["missing_keys"] if name != "lm_head.weight" or not config.tie_word_embeddings}
    if left or info["unexpected_keys"] or info["mismatched_keys"]:
        raise CheckpointError(f"transformers did not load {list_keys(left | set(info['unexpected_keys']))}")
    return model


def apply_lora(model: LlavaLlamaForCausalLM, folder: Path, *, merge: bool) -> LlavaLlamaForCausalLM:
    """Puts a LoRA adapter on exactly the modules that its file names, and merges it if asked to.

    Raises:
        CheckpointError: The adapter's tensors do not fit the model.
    """
    weights = {name: tensor[...] for name, tensor in read_tensor_file(_adapter_file(folder)).items()}
    modules = sorted({name.split(".lora_")[0].removeprefix(layout.LORA_PREFIX) for name in weights})
    settings = LoraConfig.from_pretrained(str(folder))
    settings.target_modules = set(modules)
    absent = [name for name in modules if not _has_module(model, name)]
    if absent:
        raise CheckpointError(f"{folder}: the adapter is for modules that the model lacks: {list_keys(absent)}")
    adapted = PeftModel(model, settings)
    try:
        result = set_peft_model_state_dict(adapted, weights)
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: the adapter does not fit the model: {error}") from error
    left = [name for name in result.missing_keys if "lora_" in name]
    if left or result.unexpected_keys:
        raise CheckpointError(f"{folder}: adapter tensors without a place or missing: "
                              f"{list_keys([*left, *result.unexpected_keys])}")
    return adapted.merge_and_unload() if merge else adapted.get_base_model()


def _adapter_file(folder: Path) -> Path:
    names = ("adapter_model.safetensors", "adapter_model.bin")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} has an adapter_config.json but neither {' nor '.join(names)}")


def _has_module(model: torch.nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads a folder's tokenizer.

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    if not _has_tokenizer(folder):
        raise CheckpointError(f"{folder} has no tokenizer: neither tokenizer.json nor tokenizer.model")
    options: dict[str, Any] = {}
    if not (folder / "tokenizer.json").is_file():
        # A bare SentencePiece file is read differently by different versions unless this is said.
        settings = folder / "tokenizer_config.json"
        options["legacy"] = read_json(settings).get("legacy", True) if settings.is_file() else True
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
    except Exception as error:
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {type(error).__name__}: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def _set_generation_defaults(
    model: LlavaLlamaForCausalLM, folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Takes the special ids from the checkpoint, but not its sampling settings: decoding is greedy unless asked."""
    stored = read_json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    model.generation_config = GenerationConfig(
        bos_token_id=stored.get("bos_token_id", tokenizer.bos_token_id),
        eos_token_id=stored.get("eos_token_id", tokenizer.eos_token_id),
        pad_token_id=tokenizer.pad_token_id,
    )


def resolve_device(device: str | torch.device) -> str | torch.device:
    """Returns the device for ``auto``: CUDA, else MPS, else CPU."""
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def resolve_dtype(dtype: str | torch.dtype, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """Returns the dtype for ``auto`` or a name.

    ``auto`` is that of the language model in the checkpoint, but float32 for float16 on a CPU, which computes half
    precision slowly or not at all.

    Raises:
        ValueError: The name is no floating-point dtype.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise ValueError(f"unknown dtype {dtype!r}; it must be auto, float32, bfloat16 or float16")
        return found
    stored = next(tensor.dtype for name, tensor in checkpoint.tensors.items() if name.startswith("model.layers."))
    return torch.float32 if stored == torch.float16 and device.type == "cpu" else stored


def resolve_attention(attn_implementation: str, device: torch.device, dtype: torch.dtype) -> str:
    """Returns the attention for ``auto``: flash-attn where it is installed and can run, else SDPA."""
    if attn_implementation != "auto":
        return attn_implementation
    usable = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    return "flash_attention_2" if usable and importlib.util.find_spec("flash_attn") else "sdpa"


def _quantization(load_8bit: bool, load_4bit: bool, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if not (load_8bit or load_4bit):
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("load_8bit and load_4bit need bitsandbytes: pip install 'fakereasoning[quant]'")
    return BitsAndBytesConfig(
        load_in_8bit=load_8bit,
        load_in_4bit=load_4bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=_FULL_PRECISION_PARTS,
    )
