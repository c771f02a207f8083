"""FakeShield's files: the published folder and each of its parts, read and written.

``DTG.pth`` is the tagger, ``DTE-FDM/`` the explainer (a LLaVA with its CLIP), ``MFLM/`` the segmenter (a LLaVA without
a CLIP, SAM, and a region encoder that nothing uses).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llava.errors import CheckpointError, OptionError
from llava.model.builder import (
    check_device_map,
    load_tokenizer,
    materialize,
    quantization,
    resolve_attention,
    resolve_device,
    resolve_dtype,
    set_generation_defaults,
)
from llava.model.checkpoint import PLAIN, Checkpoint, check_keys, complete_config
from llava.model.checkpoint_files import TensorLike, list_keys, read_json, read_tensors
from llava.model.checkpoint_layout import KeyMap, Rename, stored_state_dict
from llava.model.configuration import LlavaConfig
from llava.model.decoding import set_decoding
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.builder import read_vision_tower
from llava.model.saving import save_sharded
from llava.systems.fakeshield import sam as sam_parts
from llava.systems.fakeshield.segmenter import Segmenter, prepare_tokenizer

TAGGER, EXPLAINER, SEGMENTER = "DTG.pth", "DTE-FDM", "MFLM"
MODEL_TYPE = "glamm"
CONTEXT_LENGTH = 1536
_TOWER = "model.vision_tower."
_LANGUAGE_MODEL, _SAM, _PROJECTION = "language_model.", "sam.", "text_hidden_fcs."
UNUSED = ("model.region_encoder.",)
"""Stored in the published segmenter and never run."""
_COMPUTED = "rotary_emb.inv_freq"
_SAM_FIELD = "sam"

KEY_MAP = KeyMap(
    (
        *sam_parts.sam_rules("model.grounding_encoder.", _SAM),
        Rename("model.text_hidden_fcs.{rest*}", f"{_PROJECTION}{{rest*}}"),
        Rename("{rest*}", f"{_LANGUAGE_MODEL}{{rest*}}"),
    )
)


# --- the published folder


@dataclass(frozen=True)
class Parts:
    """Where the parts lie; None for one that is not there."""

    tagger: Path | None = None
    explainer: Path | None = None
    segmenter: Path | None = None


def find_parts(path: Path) -> Parts:
    """Returns the parts of a published folder, or the one part that the path is itself.

    Raises:
        CheckpointError: There is none.
    """
    if path.is_file():
        return Parts(tagger=path)
    if (path / "config.json").is_file():
        is_segmenter = read_json(path / "config.json").get("model_type") == MODEL_TYPE
        return Parts(segmenter=path) if is_segmenter else Parts(explainer=path)
    if (path / "adapter_config.json").is_file():
        return Parts(explainer=path)
    found = Parts(
        tagger=next((file for file in (path / TAGGER, path / "DTG.safetensors") if file.is_file()), None),
        explainer=path / EXPLAINER if (path / EXPLAINER).is_dir() else None,
        segmenter=path / SEGMENTER if (path / SEGMENTER).is_dir() else None,
    )
    if found == Parts():
        raise CheckpointError(f"{path} holds no part of FakeShield: neither {TAGGER} nor {EXPLAINER} nor {SEGMENTER}")
    return found


# --- the segmenter


@dataclass(frozen=True)
class SegmenterFiles:
    """A segmenter's files, read lazily.

    Attributes:
        checkpoint: Its language model by the names of ``LlavaLlamaForCausalLM``, CLIP included.
        config: The language model's whole config.
        sam_config: SAM's.
        others: SAM and the text projection, by the names of ``Segmenter``.
        unused: Published tensors that nothing uses, by their published names.
        shares_tower: Whether its CLIP is the known tower of another model.
    """

    checkpoint: Checkpoint
    config: LlavaConfig
    sam_config: Any
    others: Mapping[str, TensorLike]
    unused: Mapping[str, TensorLike] = field(default_factory=dict)
    shares_tower: bool = False

    @property
    def context_length(self) -> int:
        """Longest sequence in tokens."""
        return self.config.tokenizer_model_max_length or CONTEXT_LENGTH


@dataclass(frozen=True)
class KnownTower:
    """A CLIP tower that another model brings: its config, tensors by ``LlavaLlamaForCausalLM``'s names, and pixels."""

    config: Mapping[str, Any]
    tensors: Mapping[str, TensorLike]
    image_processor: Mapping[str, Any] | None


def read_segmenter(
    folder: Path, *, vision_tower: str | None = None, known_tower: KnownTower | None = None
) -> SegmenterFiles:
    """Reads what a segmenter's files hold; no weight is read.

    Args:
        folder: The published folder ``MFLM``, or one that was written here.
        vision_tower: CLIP's folder or hub id, instead of where else it would be found.
        known_tower: The explainer's, which was opened with the same ``vision_tower``; taken if that is named, or if
            the folder brings none.

    Raises:
        CheckpointError: A part is missing or of another shape; the message names it.
    """
    values = read_json(folder / "config.json")
    tensors = read_tensors(folder)
    unused = {name: tensor for name, tensor in tensors.items() if name.startswith(UNUSED)}
    used = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in unused and _COMPUTED not in name and not name.endswith(sam_parts.DROPPED)
    }
    native = KEY_MAP.to_native(used)
    prefix = len(_LANGUAGE_MODEL)
    own = {name[prefix:]: tensor for name, tensor in native.items() if name.startswith(_LANGUAGE_MODEL)}
    others = {name: tensor for name, tensor in native.items() if not name.startswith(_LANGUAGE_MODEL)}
    bare = {name.removeprefix(_SAM): tensor for name, tensor in others.items() if name.startswith(_SAM)}
    sam_config = sam_parts.infer_config(bare, values.get(_SAM_FIELD, {}), str(folder))
    others[f"{_SAM}{sam_parts.REPEATED_POSITIONS}"] = others[f"{_SAM}{sam_parts.SHARED_POSITIONS}"]
    values = _language_model_values(values)
    brings_tower = any(name.startswith(_TOWER) for name in own)
    shares = known_tower is not None and (vision_tower is not None or not brings_tower)
    if known_tower is not None and shares:
        values |= {"vision_tower_config": dict(known_tower.config), "mm_image_processor": known_tower.image_processor}
        own = {name: tensor for name, tensor in own.items() if not name.startswith(_TOWER)} | dict(known_tower.tensors)
    checkpoint = Checkpoint(folder, values, own, folder, PLAIN, "")
    checkpoint, config = complete_config(checkpoint, {"clip": None if shares else vision_tower})
    check_keys(config, checkpoint)
    return SegmenterFiles(checkpoint, config, sam_config, others, unused, shares)


def _language_model_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config's fields as a plain LLaVA has them: the image marks stand in the prompt's own text here."""
    marks = ("mm_use_im_start_end", "mm_use_im_patch_token", "mm_use_image_start_end", "use_image_patch_token")
    kept = {name: value for name, value in values.items() if name not in (*marks, _SAM_FIELD, "max_length")}
    return {
        **kept,
        "model_type": LlavaConfig.model_type,
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_fusion_type": "clip",
        "tokenizer_model_max_length": values.get("tokenizer_model_max_length") or CONTEXT_LENGTH,
        "system": "",
    }


def load_segmenter(
    files: SegmenterFiles,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    device_map: str | dict[str, Any] | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    attn_implementation: str = "auto",
    decode: str = "auto",
) -> tuple[PreTrainedTokenizerBase, Segmenter]:
    """Reads a segmenter's weights.

    Args:
        files: What ``read_segmenter`` returned.
        device: As for ``load_pretrained_model``.
        dtype: As there; SAM has it too, as published.
        device_map: As there, for the language model; SAM lies on the first device.
        load_8bit: Quantise the language model.
        load_4bit: The same, to 4 bits.
        attn_implementation: Of the language model.
        decode: As for ``load_pretrained_model``.

    Returns:
        The tokenizer, and the segmenter in evaluation mode.

    Raises:
        CheckpointError: Tensors are missing, unknown or of another shape.
        OptionError: Options exclude each other or name something unknown.
    """
    if load_8bit and load_4bit:
        raise OptionError("load_8bit and load_4bit exclude each other")
    target = resolve_device(device)
    own_dtype = resolve_dtype(dtype, files.checkpoint, target)
    tokenizer = prepare_tokenizer(load_tokenizer(files.checkpoint.tokenizer_folder, legacy=True))
    model = materialize(
        files.config,
        files.checkpoint.tensors,
        dtype=own_dtype,
        device_map={"": target} if device_map is None else check_device_map(device_map),
        quantization_config=quantization(files.config, load_8bit, load_4bit, own_dtype),
        attn_implementation=resolve_attention(attn_implementation, target, own_dtype, decode),
    )
    set_decoding(model, decode)
    set_generation_defaults(model, files.checkpoint.tokenizer_folder, tokenizer)
    model.tokenizer = tokenizer
    with torch.device("meta"):
        segmenter = Segmenter(files.config, files.sam_config, model)
    _load_others(segmenter, files, own_dtype, target)
    model.get_model().freeze_towers()
    return tokenizer, segmenter.eval()


def _load_others(segmenter: Segmenter, files: SegmenterFiles, dtype: torch.dtype, device: torch.device) -> None:
    """Puts SAM and the text projection into a segmenter whose own are only shapes so far."""
    wanted = {
        name: tuple(value.shape)
        for name, value in segmenter.state_dict().items()
        if not name.startswith(_LANGUAGE_MODEL)
    }
    given = {name: tuple(value.shape) for name, value in files.others.items()}
    wrong = {name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name)}
    if wrong:
        raise CheckpointError(f"{files.checkpoint.folder}: missing, unknown or of another shape: {list_keys(wrong)}")
    for part, prefix in ((segmenter.sam, _SAM), (segmenter.text_hidden_fcs, _PROJECTION)):
        tensors = {
            name.removeprefix(prefix): tensor[...].to(device, dtype)
            for name, tensor in files.others.items()
            if name.startswith(prefix)
        }
        part.load_state_dict(tensors, assign=True)  # copies of no memory that is shared with the file


def segmenter_tensors(segmenter: Segmenter, *, with_tower: bool) -> dict[str, Tensor]:
    """Returns a segmenter's tensors by their published names.

    Args:
        segmenter: One without adapters.
        with_tower: Whether CLIP is among them, which the published file leaves out.
    """
    language_model = stored_state_dict(segmenter.language_model)
    native = {f"{_LANGUAGE_MODEL}{name}": tensor for name, tensor in language_model.items()}
    if not with_tower:
        native = {name: t for name, t in native.items() if not name.startswith(f"{_LANGUAGE_MODEL}{_TOWER}")}
    native |= {name: t for name, t in segmenter.state_dict().items() if not name.startswith(_LANGUAGE_MODEL)}
    native.pop(f"{_SAM}{sam_parts.REPEATED_POSITIONS}")
    return KEY_MAP.to_published(native)


def write_segmenter(
    segmenter: Segmenter,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    unused: Mapping[str, TensorLike] | None = None,
) -> None:
    """Writes a segmenter with the published names and its CLIP, so that the folder needs nothing else.

    Args:
        segmenter: The segmenter.
        tokenizer: Its tokenizer.
        folder: An empty folder.
        tensors: Its tensors by their published names; default: ``segmenter_tensors``, for one without adapters.
        unused: Published tensors that nothing here uses, for the authors' code.
    """
    own = segmenter_tensors(segmenter, with_tower=True) if tensors is None else dict(tensors)
    rest = {name: tensor[...] for name, tensor in (unused or {}).items()}
    save_sharded({**own, **rest}, folder)
    decoder = segmenter.sam.config.mask_decoder_config
    values = segmenter.language_model.config.to_dict()
    values |= {
        "model_type": MODEL_TYPE,
        "architectures": ["GLaMMForCausalLM"],
        "mm_use_im_start_end": True,
        "mm_vision_tower": None,
        "train_mask_decoder": True,
        "with_region": bool(rest),
        "out_dim": decoder.hidden_size,
        "system": "fakeshield",
        _SAM_FIELD: {"decoder": {"num_attention_heads": decoder.num_attention_heads}},
    }
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)


def new_segmenter(values: Mapping[str, Any]) -> tuple[PreTrainedTokenizerBase, Segmenter]:
    """Returns a segmenter with random weights but for its CLIP.

    Args:
        values: ``language_model``, fields of the language model's config; ``tower``, folder or hub id of its CLIP;
            ``sam``, fields of SAM's parts ``vision``, ``prompt`` and ``decoder``; ``tokenizer``, a folder, whose
            vocabulary the segmenter's tokens are added to.

    Raises:
        OptionError: One is missing or unknown.
        CheckpointError: The tower or the tokenizer cannot be opened.
    """
    needed = {"language_model", "tower", "sam", "tokenizer"}
    if set(values) != needed:
        wrong = ", ".join(sorted(needed ^ set(values)))
        raise OptionError(f"a new segmenter is described by {', '.join(sorted(needed))}; missing or unknown: {wrong}")
    tokenizer = prepare_tokenizer(load_tokenizer(Path(values["tokenizer"]), legacy=True))
    tower = read_vision_tower(str(values["tower"]))
    own = {
        **_language_model_values({"tokenizer_model_max_length": CONTEXT_LENGTH, **values["language_model"]}),
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "image_aspect_ratio": "square",
        "vision_tower_config": tower.config,
        "mm_image_processor": tower.image_processor,
    }
    config = LlavaConfig.from_dict(own)
    stored = {f"{_TOWER}{name}": tensor for name, tensor in tower.tensors.items()}
    tensors = stored_state_dict(LlavaLlamaForCausalLM(config))
    if unknown := set(stored) - set(tensors):
        raise CheckpointError(f"{values['tower']} holds tensors that the model does not have: {list_keys(unknown)}")
    model = materialize(config, {**tensors, **stored}, dtype=torch.float32, device_map={"": "cpu"})
    model.tokenizer = tokenizer
    model.get_model().freeze_towers()
    return tokenizer, Segmenter(config, sam_parts.build_config(values["sam"]), model)


# --- CLIP


def known_tower(model: LlavaLlamaForCausalLM) -> KnownTower:
    """Returns the CLIP tower of an opened explainer."""
    config = model.config
    assert config.vision_tower_config is not None
    tower = model.model.vision_tower
    assert tower is not None
    tensors = {f"{_TOWER}{name}": tensor for name, tensor in stored_state_dict(tower).items()}
    return KnownTower(config.vision_tower_config, tensors, config.mm_image_processor)
