"""Opens a checkpoint's files and completes its config, before any weight is read."""

import logging
import os
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.cli import note_once
from llava.errors import CheckpointError, OptionError
from llava.model.adapter import Adapter, read_adapter, whole_tensors
from llava.model.branches import FIRST, LANGUAGE_MODEL, is_projector, part_of, source_field, tower_name
from llava.model.checkpoint_files import (
    WORD_PATTERNS,
    TensorLike,
    list_keys,
    main_dtype,
    read_json,
    read_tensor_file,
    read_tensors,
    resolve_folder,
)
from llava.model.checkpoint_layout import LORA_PREFIX, NON_LORA_FILE, KeyMap, stored_state_dict, strip_lora_prefix
from llava.model.configuration import LlavaConfig
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.base import PixelFormat, TowerSource
from llava.model.multimodal_encoder.builder import build_vision_tower, read_vision_tower, tower_class
from llava.model.multimodal_fusion.builder import fusion_class
from llava.systems import registry
from llava.systems.base import CheckpointFiles, CheckpointFormat, resolve

logger = logging.getLogger(__name__)

PROJECTOR_FILE = "mm_projector.bin"
"""Projectors alone, as LLaVA's trainer leaves them."""
SERVED = "served"
"""Field of the config of a model whose layers are elsewhere: where, and in which dtype."""
_BUFFERS = ("rotary_emb.inv_freq", "position_ids")
"""Stored by old versions of transformers; computed now."""
_TRAINED = {"tune_mm_mlp_adapter", "freeze_mm_mlp_adapter"}
"""Fields of a config that LLaVA's trainer wrote."""
_OBJECTS = (
    "vision_tower_config",
    "dino_tower_config",
    "extra_tower_configs",
    "token_source_configs",
    "mm_image_processor",
    "mm_fusion_config",
    "cpm_tokens",
)
"""Fields of the config that hold fields themselves."""


class _Plain:
    """A plain LLaVA's layout, whose names are the native ones."""

    key_map = KeyMap(())
    tower_types: Mapping[str, str] = {FIRST: "clip"}
    tower_variables: Mapping[str, str] = {}

    def infer_config(self, config: Mapping[str, Any], tensors: Mapping[str, TensorLike]) -> dict[str, Any]:
        """Returns the config with the one branch that there is."""
        return {"mm_fusion_type": FIRST, **config}

    def infer_tower(self, branch: str, tensors: Mapping[str, TensorLike]) -> dict[str, Any]:
        """Returns nothing: a plain LLaVA's tower tells all itself."""
        return {}


PLAIN: CheckpointFormat = _Plain()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's files, read lazily, by native names.

    Attributes:
        folder: Where config and weights lie.
        config: Contents of ``config.json``.
        tensors: All tensors, those that a LoRA folder brings beside its adapter included.
        tokenizer_folder: Where the tokenizer lies: the base's folder for a LoRA folder without one.
        layout: How the system's published files correspond to the native ones.
        system: Short name of the system that it belongs to; empty for a plain LLaVA.
        adapter: The LoRA folder's adapter, not yet added to the tensors, or None.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorLike]
    tokenizer_folder: Path
    layout: CheckpointFormat = PLAIN
    system: str = ""
    adapter: Adapter | None = None

    def with_update(self) -> "Checkpoint":
        """Returns the checkpoint with its adapter's update in the tensors, each computed in float32 when it is read.

        Raises:
            CheckpointError: The adapter does not fit, or holds NaN or infinity.
        """
        if self.adapter is None:
            return self
        is_tied = bool(self.config.get("tie_word_embeddings"))
        tensors = self.adapter.add_to(self.tensors, self.layout.key_map, is_tied=is_tied)
        return replace(self, tensors=tensors, adapter=None)


def open_checkpoint(
    model_path: str | os.PathLike[str],
    model_base: str | os.PathLike[str] | None = None,
    *,
    system: str | None = None,
    revision: str | None = None,
) -> Checkpoint:
    """Reads a checkpoint's config and lists its tensors, by native names; no weight is read.

    Args:
        model_path: Folder or hub id.
        model_base: Base model of a LoRA folder; default: the one that ``adapter_config.json`` names. For a whole model
            that lies without tokenizer and image processor, the model whose these are.
        system: Name of the system where the files do not tell it.
        revision: Branch, tag or commit of a hub id.

    Raises:
        CheckpointError: It is no checkpoint, or a LoRA folder lacks its base or a file.
    """
    files = registry.read_files(model_path, model_base, revision)
    folder = files.folder
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file, but a folder with config.json and weights is needed")
    if (folder / "adapter_config.json").is_file():
        return _open_lora(files, model_base, system)
    config = read_json(folder / "config.json")
    if config.get(SERVED):
        raise CheckpointError(
            f"{folder} is the client of a language model that is served elsewhere: it answers about images (forgery "
            "detect, forgery eval), and cannot be trained, merged or exported"
        )
    words = folder if is_projector_delta(folder) else _words_folder(folder, config, model_base)
    processor = config.get("mm_image_processor") or read_image_processor(folder) or read_image_processor(words)
    if processor is not None:
        config = {**config, "mm_image_processor": processor}
    name, layout = _system_of(files, system)
    if is_projector_delta(folder):
        return _open_projectors(files, model_base, system)
    tensors = read_tensors(folder)
    if not _is_native(config):
        tensors = layout.key_map.to_native(tensors)
    tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(_BUFFERS)}
    return Checkpoint(folder, config, tensors, words, layout, name)


def _words_folder(folder: Path, config: Mapping[str, Any], base: str | os.PathLike[str] | None) -> Path:
    """Returns where the tokenizer of a whole model lies: beside it, else in the base that is given or named.

    Raises:
        CheckpointError: A base is given that is not needed or not to be had, or the model names one without tokenizer.
    """
    if has_tokenizer(folder):
        if base is not None:
            raise CheckpointError(
                f"a base is given, but {folder} has a tokenizer and no adapter_config.json: it is no LoRA folder, "
                "and the base would do nothing"
            )
        return folder
    found = base or _named_start(folder, config)
    if not found:
        return folder
    words = resolve_folder(found, "base model", WORD_PATTERNS)
    if has_tokenizer(words):
        note_once(f"{folder} has no tokenizer; it and the image processor are those of {found}")
    return words


def _named_start(folder: Path, config: Mapping[str, Any]) -> str:
    """Returns the folder that a config says its model was made from, if that is here; a relative one counts from it."""
    named = config.get("_name_or_path")
    if not isinstance(named, str) or not named:
        return ""
    places = (Path(named).expanduser(), folder / named, folder.parent / named)
    return next((str(place) for place in places if place != folder and place.is_dir() and has_tokenizer(place)), "")


def read_image_processor(folder: Path) -> dict[str, Any] | None:
    """Returns the settings of the image processor that lies beside a model; None if there is none.

    Raises:
        CheckpointError: The file cannot be read, or is of another kind than CLIP's.
    """
    file, joint = folder / "preprocessor_config.json", folder / "processor_config.json"
    settings = read_json(file) if file.is_file() else None
    if settings is None and joint.is_file():
        settings = read_json(joint).get("image_processor")
    if settings is None:
        return None
    try:
        # Old files give sizes as plain numbers; the processor itself knows what they mean.
        known: dict[str, Any] = CLIPImageProcessorPil(**settings).to_dict()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: the image processor's settings are wrong: {error}") from error
    return {**known, "do_pad": True} if settings.get("do_pad") else known


def _open_lora(files: CheckpointFiles, model_base: str | os.PathLike[str] | None, system: str | None) -> Checkpoint:
    folder = files.folder
    base = registry.named_base(folder, model_base)
    if not base.path:
        raise CheckpointError(f"{folder} is a LoRA folder that does not name its base model; pass model_base")
    name, layout = _system_of(files, system)
    try:
        # The base may be a plain LLaVA, which by itself belongs to no system.
        opened = open_checkpoint(base.path, system=name or None, revision=base.revision)
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is a LoRA folder whose base model cannot be opened: {error}") from error
    opened = opened.with_update()  # the base may be a LoRA folder itself, whose training was gone on with
    adapter = read_adapter(folder)
    beside = layout.key_map.to_native(_trained_whole(folder, name, adapter))
    tokenizer_folder = folder if has_tokenizer(folder) else opened.tokenizer_folder
    own_config = read_json(folder / "config.json") if (folder / "config.json").is_file() else opened.config
    whole = whole_tensors(adapter, opened.tensors, layout.key_map)
    if set(whole) & set(beside):
        twice = list_keys(set(whole) & set(beside))
        raise CheckpointError(f"{folder} holds tensors twice, in its adapter and in {NON_LORA_FILE}: {twice}")
    objective = registry.component(name, "objective") if name else None
    parts = {part_of(key) for key in beside} | set(getattr(objective, "trained_whole", ()))
    _check_whole_parts(parts - {LANGUAGE_MODEL}, whole | beside, opened.tensors, folder)
    left = {part for part in map(part_of, opened.tensors) if is_projector(part)} - set(map(part_of, whole | beside))
    if left:
        note_once(f"{folder} brings no {' and no '.join(sorted(left))}: beside the adapter these are the base's")
    tensors = opened.tensors | whole | beside
    return Checkpoint(folder, own_config, tensors, tokenizer_folder, layout, name, adapter)


def is_projector_delta(folder: Path) -> bool:
    """Whether a folder holds projectors alone, as LLaVA's trainer leaves them, and no model."""
    weights = ("model.safetensors", "pytorch_model.bin")
    names = [name for weight in weights for name in (weight, f"{weight}.index.json")]
    return (folder / PROJECTOR_FILE).is_file() and not any((folder / name).is_file() for name in names)


def _open_projectors(
    files: CheckpointFiles, model_base: str | os.PathLike[str] | None, system: str | None
) -> Checkpoint:
    """Opens a folder of projectors over its base.

    Raises:
        CheckpointError: The base is not named, the file holds something else, or it changes nothing.
    """
    file = files.folder / PROJECTOR_FILE
    if model_base is None:
        raise CheckpointError(f"{files.folder} holds projectors alone ({PROJECTOR_FILE}); name their base: model_base")
    name, layout = _system_of(files, system)
    opened = open_checkpoint(model_base, system=name or None).with_update()
    stored = read_tensor_file(file)
    own = layout.key_map.to_native(strip_lora_prefix(stored))
    other = [key for key in own if not is_projector(part_of(key))]
    if other or not own:
        raise CheckpointError(f"{file} holds something else than projectors: {list_keys(other) or 'nothing'}")
    if all(key in opened.tensors and torch.equal(opened.tensors[key][...], own[key][...]) for key in own):
        raise CheckpointError(f"{file} changes nothing: its projectors are those of {opened.folder} already")
    if any(key.startswith(LORA_PREFIX) for key in stored):
        note_once(
            f"{files.folder} is an intermediate checkpoint of a training with LoRA: it holds the projectors alone, and "
            "the language model is the base's; the training's own folder has the adapter"
        )
    config = {**opened.config, **read_json(files.folder / "config.json")}
    return Checkpoint(files.folder, config, opened.tensors | own, opened.tokenizer_folder, layout, name)


def _trained_whole(folder: Path, system: str, adapter: Adapter) -> dict[str, TensorLike]:
    """What lies beside an adapter; PEFT's own folders have it within the adapter, if there is any.

    Raises:
        CheckpointError: The file is missing, though whoever trained the adapter wrote one.
    """
    file = folder / NON_LORA_FILE
    if file.is_file():
        return strip_lora_prefix(read_tensor_file(file))
    if adapter.whole:
        return {}
    own = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    # LLaVA's trainer and this project's note in the config what they trained, and always write the file.
    if not system or registry.component(system, "objective") is not None or _TRAINED & set(own) or _is_native(own):
        raise CheckpointError(
            f"{folder} lacks {NON_LORA_FILE}, which holds what was trained whole beside the adapter, such as the "
            "projectors; without it those would be the base's: get the file again"
        )
    return {}


def _check_whole_parts(
    parts: Set[str], given: Mapping[str, TensorLike], base: Mapping[str, TensorLike], folder: Path
) -> None:
    """Refuses parts that were trained whole but lack tensors, since those would silently be the base's.

    Raises:
        CheckpointError: A part lacks tensors; the message names them.
    """
    missing = [name for name in base if part_of(name) in parts and name not in given]
    if missing:
        raise CheckpointError(
            f"{folder / NON_LORA_FILE} lacks tensors of parts that were trained whole: {list_keys(missing)}; get the "
            "file again"
        )


def _system_of(files: CheckpointFiles, system: str | None) -> tuple[str, CheckpointFormat]:
    """The system that files belong to, and its layout; a plain LLaVA belongs to none."""
    try:
        spec = registry.find(files, system)
    except CheckpointError:
        if (
            system is None
            and files.config.get("model_type") == LlavaConfig.model_type
            and not files.config.get("system")
        ):
            return "", PLAIN
        raise
    layout = resolve(spec.checkpoint_format)
    if layout is None:
        raise CheckpointError(f"{files.folder}: {spec.title} is no model that load_pretrained_model opens")
    return spec.name, layout


def _is_native(config: Mapping[str, Any]) -> bool:
    return config.get("vision_tower_config") is not None


def complete_config(
    checkpoint: Checkpoint,
    towers: Mapping[str, str | os.PathLike[str] | None] | None = None,
    detector: str | os.PathLike[str] | None = None,
) -> tuple[Checkpoint, LlavaConfig]:
    """Finds the towers and writes into the config what only the tensors tell.

    A tower comes from ``towers``, else from complete tensors in the checkpoint, else from the path or hub id in the
    config (``mm_vision_tower``, ``mm_dino_tower``), else from the environment variable that the layout names.

    Args:
        checkpoint: What ``open_checkpoint`` returned.
        towers: Folder, file or hub id of branches' towers instead of the checkpoint's.
        detector: Folder or file of the detector whose token stands in the prompt, instead of the checkpoint's.

    Returns:
        The checkpoint with the towers' tensors, and the whole config.

    Raises:
        CheckpointError: A tower is nowhere to be found, or the config holds something that is not supported.
    """
    _check_supported(checkpoint.config, checkpoint.folder)
    own, found = with_sources(checkpoint.layout, checkpoint.config, checkpoint.tensors, detector)
    checkpoint = replace(checkpoint, config=own, tensors=found)
    values = checkpoint.layout.infer_config(checkpoint.config, checkpoint.tensors)
    values["system"] = checkpoint.system
    _normalise(values, checkpoint.folder)
    tensors = dict(checkpoint.tensors)
    for branch in dict.fromkeys((FIRST, *fusion_class(values["mm_fusion_type"]).branches)):
        source = _find_tower(checkpoint, values, branch, (towers or {}).get(branch))
        logger.info("tower of branch %s: %s from %s", branch, source.config["type"], source.origin)
        _set_tower_config(values, branch, source.config)
        if branch == FIRST and source.image_processor is not None:
            values["mm_image_processor"] = source.image_processor
        prefix = _tower_prefix(branch)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
        tensors |= {f"{prefix}{name}": tensor for name, tensor in source.tensors.items()}
    try:
        config = LlavaConfig.from_dict(values)
    except (StrictDataclassError, KeyError, TypeError, ValueError) as error:
        why = str(error.__cause__ or error).strip("\"'")
        raise CheckpointError(f"{checkpoint.folder}: config.json is wrong: {why}") from error
    return replace(checkpoint, tensors=_without_unused_towers(tensors, config)), config


def with_sources(
    layout: CheckpointFormat,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorLike],
    detector: str | os.PathLike[str] | None,
) -> tuple[dict[str, Any], dict[str, TensorLike]]:
    """Returns config and tensors with a detector that lies elsewhere, where the layout has a place for one.

    Raises:
        OptionError: A detector is given to a system that takes none.
        CheckpointError: There is none, or it does not fit.
    """
    find = getattr(layout, "with_sources", None)
    if find is None:
        if detector is not None:
            raise OptionError(f"a detector is given ({detector}), but this system takes none")
        return dict(config), dict(tensors)
    own, found = find(config, tensors, None if detector is None else os.fspath(detector))
    return own, found


def _check_supported(values: Mapping[str, Any], folder: Path) -> None:
    if values.get("mm_use_im_start_end") or values.get("mm_use_im_patch_token"):
        raise CheckpointError(f"{folder}: image start, end or patch tokens in the prompt are not supported")
    quantised = values.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, Mapping) else quantised
        raise CheckpointError(
            f"{folder}: the weights are quantised already (quantization_config: {method}), which is not supported; get "
            "the model in float32, bfloat16 or float16, and pass load_8bit or load_4bit"
        )
    odd = [name for name in _OBJECTS if not isinstance(values.get(name), Mapping | None)]
    if odd:
        raise CheckpointError(f"{folder}: config.json is wrong: {', '.join(odd)} must be an object or null")
    longest, side = values.get("tokenizer_model_max_length"), values.get("tokenizer_padding_side", "right")
    if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int) or longest < 1):
        raise CheckpointError(
            f"{folder}: tokenizer_model_max_length in config.json must be at least 1, not {longest!r}"
        )
    if side not in ("left", "right"):
        raise CheckpointError(f"{folder}: tokenizer_padding_side in config.json must be left or right, not {side!r}")
    if not isinstance(values.get("mm_fusion_type"), str | None):
        raise CheckpointError(f"{folder}: mm_fusion_type in config.json must be a name: {values['mm_fusion_type']!r}")
    if values.get("mm_patch_merge_type", "flat") != "flat":
        raise CheckpointError(f"{folder}: mm_patch_merge_type {values['mm_patch_merge_type']!r} is not supported")


def _normalise(values: dict[str, Any], folder: Path) -> None:
    """Gives fields that are written in several ways their one form.

    Raises:
        CheckpointError: One says something that does not exist.
    """
    for field in ("dtype", "torch_dtype"):
        name = values.get(field)
        if name is None:
            continue
        bare = str(name).removeprefix("torch.")
        if not isinstance(getattr(torch, bare, None), torch.dtype):
            raise CheckpointError(f"{folder}: config.json names an unknown {field} {name!r}")
        values[field] = bare
    for field in ("rope_scaling", "rope_parameters"):
        scaling = values.get(field)
        kind = (scaling.get("rope_type") or scaling.get("type")) if isinstance(scaling, Mapping) else None
        if kind not in (None, "default", *ROPE_INIT_FUNCTIONS):
            raise CheckpointError(f"{folder}: config.json asks for an unknown {field} {kind!r}")
        theta = scaling.get("rope_theta") if isinstance(scaling, Mapping) else None
        if theta is not None and (isinstance(theta, bool) or not isinstance(theta, int | float) or not theta > 0):
            raise CheckpointError(f"{folder}: rope_theta in config.json must be a number above 0, not {theta!r}")
    pad, size = values.get("pad_token_id"), values.get("vocab_size")
    if pad is not None and not (isinstance(pad, int) and isinstance(size, int) and 0 <= pad < size):
        values["pad_token_id"] = None  # padding is masked, so its embedding is never asked for
    values.pop("attn_implementation", None)  # who opens the model says how it attends
    values.pop("_attn_implementation", None)


def _tower_prefix(branch: str) -> str:
    return f"model.{tower_name(branch)}."


def _without_unused_towers(tensors: Mapping[str, TensorLike], config: LlavaConfig) -> dict[str, TensorLike]:
    """Leaves out towers of branches that the fusion does not use."""
    used = {FIRST, *fusion_class(config.mm_fusion_type).branches}
    unused = tuple(_tower_prefix(branch) for branch in {"dino", *config.tower_configs()} - used)
    return {name: tensor for name, tensor in tensors.items() if not (unused and name.startswith(unused))}


def _tower_config(values: Mapping[str, Any], branch: str) -> dict[str, Any] | None:
    field = f"{tower_name(branch)}_config"
    return values.get(field) or (values.get("extra_tower_configs") or {}).get(branch)


def _set_tower_config(values: dict[str, Any], branch: str, config: dict[str, Any]) -> None:
    if branch in (FIRST, "dino"):
        values[f"{tower_name(branch)}_config"] = config
    else:
        values["extra_tower_configs"] = {**(values.get("extra_tower_configs") or {}), branch: config}


def _find_tower(
    checkpoint: Checkpoint, values: Mapping[str, Any], branch: str, given: str | os.PathLike[str] | None
) -> TowerSource:
    prefix = _tower_prefix(branch)
    stored = {n.removeprefix(prefix): tensor for n, tensor in checkpoint.tensors.items() if n.startswith(prefix)}
    own = _tower_config(values, branch)
    facts = checkpoint.layout.infer_tower(branch, checkpoint.tensors)
    named = values.get(source_field(branch))
    if given is None and stored and own is not None:
        return TowerSource(own, stored, "the checkpoint")
    published_type = checkpoint.layout.tower_types.get(branch)
    if given is None and stored and published_type is not None:
        inferred = tower_class(published_type).infer(named, stored, facts)
        if inferred is not None and not _missing(inferred.config, stored):
            return inferred
    if given is not None:
        source = read_vision_tower(os.fspath(given))
    else:
        source = _read_named_tower(checkpoint, branch, named, in_part=bool(stored))
    if given is None and stored and not _missing(source.config, stored):
        source = replace(source, tensors=stored, origin="the checkpoint")
    if facts and source.config["type"] == published_type:
        source = replace(source, config={**source.config, **facts})
    if own is not None:
        kept: dict[str, Any] = {name: own[name] for name in ("pixel_mean", "pixel_std") if name in own}
        source = replace(source, config={**source.config, **kept})
    return source


def _read_named_tower(checkpoint: Checkpoint, branch: str, named: str | None, *, in_part: bool) -> TowerSource:
    """Reads a tower from where the config or the layout's environment variable says that it lies."""
    variable = checkpoint.layout.tower_variables.get(branch)
    place = named or (os.environ.get(variable) if variable else None)
    way = "vision_tower=<folder or hub id>" if branch == FIRST else "dino_weights=<dinov2_vitl14_pretrain.pth>"
    if not place:
        also = f" or set {variable}" if variable else ""
        what = f"holds the tower of its branch {branch!r}" + (" only in part" if in_part else "")
        problem = f"{what} and does not name it" if in_part else f"neither {what} nor names it"
        raise CheckpointError(f"{checkpoint.folder} {problem}; pass {way}{also}")
    try:
        return read_vision_tower(os.fspath(place))
    except CheckpointError as error:
        raise CheckpointError(f"{error}\nPass {way} to take it from elsewhere.") from error


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
    needed = stored_state_dict(_skeleton(config, checkpoint.folder))
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


def _skeleton(config: LlavaConfig, folder: Path) -> LlavaLlamaForCausalLM:
    """Builds a model without memory, which depends on nothing but the config's words and numbers."""
    try:
        with torch.device("meta"):
            return LlavaLlamaForCausalLM(config)
    except (StrictDataclassError, KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        why = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{folder}: no model can be built as config.json describes it: {why}") from error


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Returns the dtype of most of the language model's layers in the checkpoint.

    Raises:
        CheckpointError: There are no such layers.
    """
    layers = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith("model.layers.")}
    if layers:
        return main_dtype(layers)
    raise CheckpointError(f"{checkpoint.folder} holds no language model: no tensor is named model.layers.…")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
