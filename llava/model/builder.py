"""``load_pretrained_model``: any published layout to a ready model, by its files and never by its folder's name."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BitsAndBytesConfig, GenerationConfig, PreTrainedTokenizerBase

from llava.cli import without_bars
from llava.errors import CheckpointError, OptionError
from llava.model.adapter import Adapter
from llava.model.branches import projector_name, tower_name
from llava.model.checkpoint import Checkpoint, check_keys, complete_config, has_tokenizer, open_checkpoint, stored_dtype
from llava.model.checkpoint_files import TensorLike, list_keys, read_json
from llava.model.checkpoint_layout import LORA_PREFIX, KeyMap, memory_names
from llava.model.configuration import LlavaConfig
from llava.model.cpu_bfloat16 import lay_out, multiplies_bfloat16, pack_head
from llava.model.decoding import set_decoding
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.static_steps import FIXED_MODES

DEFAULT_CONTEXT_LENGTH = 2048
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways to spread a model over several GPUs, by accelerate's names."""
ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Names of transformers' attentions that a language model here takes."""


ASPECT_RATIOS = ("crop", "pad")
"""How an image becomes a square: its middle, or all of it between margins."""


@without_bars()
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
    system: str | None = None,
    image_aspect_ratio: str | None = None,
    detector: str | os.PathLike[str] | None = None,
    for_inference: bool = False,
    decode: str = "auto",
    prompt_lookup: int = 0,
) -> tuple[PreTrainedTokenizerBase, LlavaLlamaForCausalLM, Any, int]:
    """Opens a checkpoint for inference or further training.

    It may be a merged published checkpoint, a LoRA folder in the published layout over its base, or a folder that this
    project saved; a local path or a hub id. No parameter is left at random: whatever is missing is an error.

    Args:
        model_path: Folder or hub id.
        model_base: Base model of a LoRA folder; default: the one that ``adapter_config.json`` names. For a whole model
            that lies without tokenizer and image processor, the model whose these are.
        model_name: Accepted for LLaVA's sake and ignored.
        device: ``auto`` (CUDA, else MPS, else CPU) or a torch device.
        dtype: ``auto`` (the checkpoint's; on a CPU bfloat16 for 16 bits if it multiplies that natively, else float32),
            or a torch dtype or its name.
        device_map: ``auto`` spreads the model over all GPUs; or a map as accelerate takes it. Overrides ``device``.
        load_8bit: Quantise the language model's linear layers to 8 bits (needs bitsandbytes).
        load_4bit: The same to 4 bits (NF4).
        attn_implementation: ``auto`` (flash-attn where installed and usable, else SDPA), or transformers' name.
        vision_tower: First tower instead of the checkpoint's: folder or hub id.
        dino_weights: Second tower instead of the checkpoint's: a DINOv2 ``.pth``, a folder, a hub id, or
            ``timm:<name>``.
        merge_lora: Whether a LoRA folder's adapter is merged into the weights; a quantised model keeps it apart.
        system: Name of the system, where the files do not tell it; a plain LLaVA needs none.
        image_aspect_ratio: How an image becomes a square, ``pad`` or ``crop``, instead of the checkpoint's way.
        detector: The detector whose token stands in the prompt, instead of the checkpoint's: folder or file; for
            systems that have one.
        for_inference: Lay the layers out for this processor, see ``lay_out``; the model must not be trained then.
        decode: How the steps of an answer are run: ``auto``, ``eager``, ``static`` or ``compile``, see ``StepRunner``.
        prompt_lookup: Ids of an answer that are guessed at a time and then checked, if greedy; 0 for none.

    Returns:
        Tokenizer, model in evaluation mode with frozen towers, image processor, and context length in tokens.

    Raises:
        CheckpointError: Something is missing, unexpected or of another shape; the message names it.
        OptionError: Arguments exclude each other or name something unknown.
    """
    if load_8bit and load_4bit:
        raise OptionError("load_8bit and load_4bit exclude each other")
    checkpoint = open_checkpoint(model_path, model_base, system=system)
    checkpoint, config = complete_config(checkpoint, {"clip": vision_tower, "dino": dino_weights}, detector)
    if image_aspect_ratio is not None:
        config.image_aspect_ratio = check_aspect_ratio(image_aspect_ratio)
    tokenizer = load_tokenizer(checkpoint.tokenizer_folder)
    target = resolve_device(device)
    tensor_dtype = resolve_dtype(dtype, checkpoint, target)
    check_keys(config, checkpoint)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= config.vocab_size:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    updated = checkpoint.with_update()
    is_merged = merge_lora and not (load_8bit or load_4bit)
    tensors, head = (updated if is_merged else checkpoint).tensors, None
    if for_inference and target.type == "cpu" and tensor_dtype == torch.bfloat16 and not config.tie_word_embeddings:
        tensors, head = pack_head(tensors)
    model = materialize(
        config,
        tensors,
        dtype=tensor_dtype,
        device_map={"": target} if device_map is None else check_device_map(device_map),
        quantization_config=quantization(config, load_8bit, load_4bit, tensor_dtype),
        attn_implementation=resolve_attention(attn_implementation, target, tensor_dtype, decode),
    )
    if head is not None:
        model.set_output_embeddings(head)
    set_decoding(model, decode, prompt_lookup)
    set_generation_defaults(model, checkpoint.tokenizer_folder, tokenizer)
    if checkpoint.adapter is not None and not is_merged:
        model = apply_lora(model, checkpoint.adapter, checkpoint.layout.key_map)
    model.get_model().freeze_towers()
    model.set_tokenizer(tokenizer)
    if for_inference:
        lay_out(model)
    context_length = config.tokenizer_model_max_length or DEFAULT_CONTEXT_LENGTH
    return tokenizer, model.eval(), model.image_processor, context_length


def materialize(config: LlavaConfig, tensors: Mapping[str, TensorLike], **options: Any) -> LlavaLlamaForCausalLM:
    """Lets transformers cast, quantise and place the tensors one by one."""
    model, info = LlavaLlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=dict(tensors), output_loading_info=True, **options
    )
    left = {name for name in info["missing_keys"] if name != "lm_head.weight" or not config.tie_word_embeddings}
    if left or info["unexpected_keys"] or info["mismatched_keys"]:
        raise CheckpointError(f"transformers did not load {list_keys(left | set(info['unexpected_keys']))}")
    return model


def apply_lora(model: LlavaLlamaForCausalLM, adapter: Adapter, key_map: KeyMap) -> LlavaLlamaForCausalLM:
    """Puts a LoRA adapter on exactly the modules that its file names, apart from their weights.

    Args:
        model: The base.
        adapter: The adapter, which ``Checkpoint.with_update`` found to fit.
        key_map: How the names in its file correspond to the native ones.

    Raises:
        CheckpointError: It is on something that is no module of its own here, so that it can only be merged.
    """
    from peft import PeftModel, set_peft_model_state_dict  # slow to import, and needed for adapters only

    in_memory = memory_names(model)
    paths = {
        path: in_memory.get(f"{native}.weight", f"{native}.weight").removesuffix(".weight")
        for path, native in adapter.module_paths(key_map).items()
    }
    absent = [path for path in paths.values() if not _has_module(model, path)]
    if absent:
        raise CheckpointError(
            f"{adapter.folder}: the adapter is for modules that the model lacks: {list_keys(absent)}; merge it first: "
            f"forgery merge --model-path {adapter.folder}"
        )
    adapted = PeftModel(model, adapter.config.for_modules(paths))
    tensors = {
        f"{LORA_PREFIX}{paths[path]}{name.removeprefix(path)}": tensor[...]
        for name, tensor in adapter.parts.items()
        if (path := name.split(".lora_")[0])
    }
    result = set_peft_model_state_dict(adapted, tensors)
    left = [name for name in result.missing_keys if "lora_" in name]
    if left or result.unexpected_keys:
        raise CheckpointError(
            f"{adapter.folder}: adapter tensors without a place or missing: "
            f"{list_keys([*left, *result.unexpected_keys])}"
        )
    return adapted.get_base_model()


def _has_module(model: torch.nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def load_tokenizer(folder: Path, *, legacy: bool | None = None) -> PreTrainedTokenizerBase:
    """Loads a folder's tokenizer.

    Args:
        folder: The folder.
        legacy: Whether pieces behind an added token begin like a text of their own; None: as the folder says.

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    if not has_tokenizer(folder):
        raise CheckpointError(f"{folder} has no tokenizer: neither tokenizer.json nor tokenizer.model")
    options: dict[str, Any] = {}
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and read_json(settings).get("add_eos_token"):
        options["add_eos_token"] = False  # an end mark would stand between the prompt and the answer
    if legacy is not None:
        options["legacy"] = legacy
    elif not (folder / "tokenizer.json").is_file():
        # A bare SentencePiece file is read differently by different versions unless it is told.
        options["legacy"] = read_json(settings).get("legacy", True) if settings.is_file() else True
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), config=LlavaConfig(), **options)
    except Exception as error:
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {type(error).__name__}: {error}") from error
    if tokenizer.eos_token_id is not None and tokenizer("x").input_ids[-1:] == [tokenizer.eos_token_id]:
        raise CheckpointError(
            f"the tokenizer in {folder} ends every text with {tokenizer.eos_token}, so that the answer would come "
            "after the end; set add_eos_token to false in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def set_generation_defaults(
    model: LlavaLlamaForCausalLM, folder: Path | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Takes the special ids from the checkpoint, but not its sampling settings: decoding is greedy unless asked."""
    file = None if folder is None else folder / "generation_config.json"
    stored = read_json(file) if file is not None and file.is_file() else {}
    model.generation_config = GenerationConfig(
        bos_token_id=stored.get("bos_token_id", tokenizer.bos_token_id),
        eos_token_id=stored.get("eos_token_id", tokenizer.eos_token_id),
        pad_token_id=tokenizer.pad_token_id,
    )


def resolve_device(device: str | torch.device) -> torch.device:
    """Returns a device; ``auto`` is CUDA, else MPS, else the CPU.

    Raises:
        OptionError: There is no such device here.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise OptionError(f"unknown device {device!r}; it must be auto, cpu, mps, cuda or cuda:<number>") from None
    if found.type not in ("cpu", "mps", "cuda"):
        raise OptionError(f"unsupported device {device!r}; it must be auto, cpu, mps, cuda or cuda:<number>")
    missing_cuda = found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count()
    if missing_cuda or (found.type == "mps" and not torch.backends.mps.is_available()):
        raise OptionError(f"there is no device {device} on this machine; device='auto' takes what there is")
    return found


def check_aspect_ratio(name: str) -> str:
    """Returns a way to make images square.

    Raises:
        OptionError: There is no such way.
    """
    if name not in ASPECT_RATIOS:
        raise OptionError(f"unknown image_aspect_ratio {name!r}; known: {', '.join(ASPECT_RATIOS)}")
    return name


def check_device_map(device_map: str | dict[str, Any]) -> str | dict[str, Any]:
    """Returns a device map.

    Raises:
        OptionError: It is a word that accelerate does not know.
    """
    if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
        raise OptionError(f"unknown device_map {device_map!r}; known: {', '.join(DEVICE_MAPS)}, or a map of modules")
    return device_map


def resolve_dtype(dtype: str | torch.dtype, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """Returns the dtype for ``auto`` or a name.

    ``auto`` follows from that of the language model in the checkpoint, see ``automatic_dtype``.

    Raises:
        OptionError: The name is no floating-point dtype.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise OptionError(f"unknown dtype {dtype!r}; it must be auto, float32, bfloat16 or float16")
        return found
    return automatic_dtype(stored_dtype(checkpoint), device)


def automatic_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns what ``auto`` is for weights that are stored so.

    It is the same, but on a CPU 16 bits are bfloat16 where the processor multiplies it natively, else float32: others
    compute half precision slowly or not at all.
    """
    if device.type != "cpu" or stored.itemsize > 2:
        return stored
    return torch.bfloat16 if multiplies_bfloat16() else torch.float32


def resolve_attention(attn_implementation: str, device: torch.device, dtype: torch.dtype, decode: str = "auto") -> str:
    """Returns the attention for ``auto``: flash-attn where it is installed and can run, else SDPA.

    It is SDPA too where a cache of fixed size is asked for, which flash-attn does not take.

    Raises:
        OptionError: The name is unknown, or flash-attn is asked for but not installed.
    """
    if attn_implementation == "flash_attention_2" and not importlib.util.find_spec("flash_attn"):
        raise OptionError("flash_attention_2 needs flash-attn: pip install 'fakereasoning[flash]' --no-build-isolation")
    if attn_implementation not in ("auto", *ATTENTIONS):
        known = ", ".join(("auto", *ATTENTIONS))
        raise OptionError(f"unknown attn_implementation {attn_implementation!r}; known: {known}")
    if attn_implementation != "auto":
        return attn_implementation
    usable = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and decode not in FIXED_MODES
    return "flash_attention_2" if usable and importlib.util.find_spec("flash_attn") else "sdpa"


_PACKED_ROWS, _PACKED_COLUMNS = 32, 64
"""bitsandbytes packs 4-bit weights for a CPU in blocks of this size, and fails on a layer that does not fill them."""


def quantization(
    config: LlavaConfig, load_8bit: bool, load_4bit: bool, dtype: torch.dtype
) -> BitsAndBytesConfig | None:
    """Returns how the language model is quantised, everything else left as it is; None if it is not.

    Layers of a model so small that they cannot be packed in 4 bits stay as they are too.

    Raises:
        OptionError: bitsandbytes is not installed.
    """
    if not (load_8bit or load_4bit):
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise OptionError("load_8bit and load_4bit need bitsandbytes: pip install 'fakereasoning[quant]'")
    return BitsAndBytesConfig(
        load_in_8bit=load_8bit,
        load_in_4bit=load_4bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[*_vision_parts(config), "lm_head", *(_unpackable_layers(config) if load_4bit else ())],
    )


def _unpackable_layers(config: LlavaConfig) -> list[str]:
    head, width, inner = config.head_dim, config.hidden_size, config.intermediate_size
    head = head or width // config.num_attention_heads
    queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads
    shapes = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    return [name for name, (rows, columns) in shapes.items() if rows % _PACKED_ROWS or columns % _PACKED_COLUMNS]


def _vision_parts(config: LlavaConfig) -> list[str]:
    branches = config.tower_configs()
    parts = [name(branch) for branch in branches for name in (tower_name, projector_name)]
    return [f"model.{part}" for part in (*parts, "fusion", "token_sources")]
