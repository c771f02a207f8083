"""Loads what training starts from: a checkpoint, perhaps with new parts, or a new model from a config."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.integrations import deepspeed as deepspeed_integration

from llava.conversation import conv_templates
from llava.data.lengths import default_length
from llava.errors import CheckpointError, OptionError
from llava.model.branches import FIRST, part_path, source_field, tower_name
from llava.model.builder import (
    DEFAULT_CONTEXT_LENGTH,
    load_tokenizer,
    materialize,
    quantization,
    resolve_attention,
    set_generation_defaults,
)
from llava.model.checkpoint import PLAIN, check_keys, complete_config, open_checkpoint, with_sources
from llava.model.checkpoint_files import TensorLike, read_json
from llava.model.checkpoint_layout import stored_state_dict
from llava.model.configuration import LlavaConfig
from llava.model.language_contrast import language_contrast
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.base import TowerSource
from llava.model.multimodal_encoder.builder import read_vision_tower
from llava.systems import registry
from llava.systems.base import AnswerFormat
from llava.train.arguments import DataArguments, ModelArguments, new_parts, read_contrast

logger = logging.getLogger(__name__)

TRAINED_FURTHER = "Trained further from a model that said: "
"""Stands before the notice of the model that a training started from, unless another notice is given."""


@dataclass(frozen=True)
class StartingPoint:
    """What training starts from, before any weight is read.

    Attributes:
        config: The model's whole config, with the run's options written into it.
        tokenizer: Its tokenizer.
        placeholder_tokens: How many tokens each placeholder id becomes.
        placeholders: What stands for each in a prompt's text, and its id.
        tensors: Weights by their stored names; the language model's are missing for a new model.
        new: Parts that get random weights.
        folder: Where the checkpoint is; None for a new model.
    """

    config: LlavaConfig
    tokenizer: PreTrainedTokenizerBase
    placeholder_tokens: dict[int, int]
    placeholders: dict[str, int]
    tensors: dict[str, TensorLike]
    new: frozenset[str]
    folder: Path | None

    @property
    def max_length(self) -> int:
        """Longest sequence, image positions included."""
        return int(self.config.tokenizer_model_max_length or DEFAULT_CONTEXT_LENGTH)


def load_start(model: ModelArguments, data: DataArguments) -> StartingPoint:
    """Opens what the options name.

    Raises:
        CheckpointError: It cannot be opened, or something is missing that is not named as new.
        OptionError: Options do not fit the checkpoint.
    """
    if data.version not in conv_templates:
        raise OptionError(f"--version {data.version}: no such prompt template; known: {', '.join(conv_templates)}")
    if model.model_config is not None:
        return _open_new(model, data)
    assert model.model_name_or_path is not None
    checkpoint = open_checkpoint(model.model_name_or_path, system=model.system)
    if not checkpoint.system:
        # A plain LLaVA, which is trained to become one.
        checkpoint = open_checkpoint(model.model_name_or_path, system=registry.DEFAULT)
    # Training goes on from the base with a LoRA folder's update in it, which float32 holds whole.
    checkpoint = checkpoint.with_update()
    values = dict(checkpoint.config)
    if model.mm_fusion_type is not None:
        values["mm_fusion_type"] = model.mm_fusion_type
    elif "fusion" in new_parts(model) and "mm_fusion_type" not in values:
        values["mm_fusion_type"] = LlavaConfig().mm_fusion_type
    _check_other(model, values)
    checkpoint, config = complete_config(replace(checkpoint, config=values), _towers(model), model.detector)
    new = frozenset(new_parts(model))
    config = _with_options(config, model, data)
    _say_how_it_is_used(config, model)
    if getattr(checkpoint.layout, "asks_as_trained", False):
        config.conv_mode = data.version
    skeleton = _skeleton(config)
    prefixes = tuple(f"model.{_path(skeleton, part)}." for part in new)
    kept = {name: tensor for name, tensor in checkpoint.tensors.items() if not (prefixes and name.startswith(prefixes))}
    filled = {n: t for n, t in stored_state_dict(skeleton).items() if prefixes and n.startswith(prefixes)}
    if len(new) != sum(any(name.startswith(prefix) for name in filled) for prefix in prefixes):
        raise OptionError(f"--init {model.init}: the fusion {config.mm_fusion_type!r} has no such part")
    try:
        check_keys(config, replace(checkpoint, tensors={**kept, **filled}))
    except CheckpointError as error:
        hint = "parts that a checkpoint lacks are made new only if --init names them, as in --init fusion"
        if "missing" not in str(error):
            hint = "do the towers of --vision_tower and --dino_weights belong to it?"
            if model.mm_fusion_type is not None:
                hint = f"the fusion {model.mm_fusion_type!r} has no such parts; start from a checkpoint without them"
        raise CheckpointError(f"{error}\n  {hint}") from None
    tokenizer = load_tokenizer(checkpoint.tokenizer_folder)
    return StartingPoint(config, tokenizer, *_placeholders(skeleton), tensors=kept, new=new, folder=checkpoint.folder)


def _path(skeleton: LlavaLlamaForCausalLM, part: str) -> str:
    """Where a part lies within ``model``."""
    return part_path(part, (path for path, _ in skeleton.get_model().named_modules()))


def _placeholders(skeleton: LlavaLlamaForCausalLM) -> tuple[dict[int, int], dict[str, int]]:
    core = skeleton.get_model()
    return core.placeholder_tokens(), core.placeholders()


def _towers(model: ModelArguments) -> dict[str, str | None]:
    """Towers that the options name, by branch."""
    return {"clip": model.vision_tower, "dino": model.dino_weights}


def _open_new(model: ModelArguments, data: DataArguments) -> StartingPoint:
    assert model.model_config is not None and model.tokenizer is not None
    values = read_json(Path(model.model_config))
    tokenizer = load_tokenizer(Path(model.tokenizer))
    tensors: dict[str, TensorLike] = {}
    for branch, source in _towers(model).items():
        if source is None:
            continue
        tower: TowerSource = read_vision_tower(source)
        values[f"{tower_name(branch)}_config"] = tower.config
        if tower.image_processor is not None and branch == FIRST:
            values["mm_image_processor"] = tower.image_processor
        tensors |= {f"model.{tower_name(branch)}.{name}": tensor for name, tensor in tower.tensors.items()}
    values |= {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        # A new model is asked as it was trained.
        "conv_mode": data.version,
    }
    if model.mm_fusion_type is not None:
        values["mm_fusion_type"] = model.mm_fusion_type
    system = {"system": model.system or values.get("system") or registry.DEFAULT}
    layout = registry.component(system["system"], "checkpoint_format") or PLAIN
    if model.detector is not None or hasattr(layout, "with_sources"):
        values, tensors = with_sources(layout, values, tensors, model.detector)
        values = layout.infer_config(values, tensors)
    try:
        config = LlavaConfig.from_dict({"cpm_search": "labels", **values, **system})
        config = _with_options(config, model, data)
        config.notice = config.notice if model.notice is None else model.notice
        config.default_score = model.default_score or config.default_score
        skeleton = _skeleton(config)
    except (TypeError, KeyError, StrictDataclassError) as error:
        why = error.__cause__ or error
        raise OptionError(f"--model_config {model.model_config} describes no model: {why}") from error
    unknown = set(tensors) - set(stored_state_dict(skeleton))
    if unknown:
        raise CheckpointError(f"the towers hold tensors that the model does not have, such as {sorted(unknown)[0]}")
    return StartingPoint(config, tokenizer, *_placeholders(skeleton), tensors=tensors, new=frozenset(), folder=None)


def _check_other(model: ModelArguments, values: Mapping[str, Any]) -> None:
    """Checks options that would change what a checkpoint is."""
    for name, default in (("mm_projector_type", "mlp2x_gelu"), ("mm_vision_select_layer", -2)):
        wanted, own = getattr(model, name), values.get(name, default)
        if wanted is not None and wanted != own:
            raise OptionError(f"--{name} is {wanted}, but the checkpoint's is {own}, and it cannot be changed")


def _with_options(config: LlavaConfig, model: ModelArguments, data: DataArguments) -> LlavaConfig:
    config.cpm_search = model.cpm_search
    config.cpm_weight = model.cpm_weight
    if model.cpm_temperature is not None:
        config.cpm_temperature = model.cpm_temperature
    if model.contrast is not None:
        config.contrast = read_contrast(model)
    if config.contrast is not None:
        language_contrast(config.contrast)  # said before any weight is read
    config.verdict_only_share = data.verdict_only_share
    config.tokenizer_model_max_length = data.model_max_length or default_length(config.to_dict())
    config.tokenizer_padding_side = "right"
    if data.image_aspect_ratio is not None:
        config.image_aspect_ratio = data.image_aspect_ratio
    for branch, source in _towers(model).items():
        if source is not None:
            setattr(config, source_field(branch), str(Path(source).absolute()) if Path(source).exists() else source)
    return config


def _say_how_it_is_used(config: LlavaConfig, model: ModelArguments) -> None:
    """Makes what a checkpoint says of its use fit what it is trained on now."""
    if model.notice is not None:
        config.notice = model.notice
    elif config.notice and not config.notice.startswith(TRAINED_FURTHER):
        config.notice = f"{TRAINED_FURTHER}{config.notice}"
        logger.warning("the model's notice is now: %s\n--notice TEXT says what is true of it", config.notice)
    if model.default_score is not None:
        config.default_score = model.default_score
    elif config.default_score == "prompt" and not config.verdict_only_share:
        config.default_score = "answer"
        logger.warning(
            "reports will give P(fake) after the answer, since no training answer is only its CONCLUSION "
            "(--verdict_only_share 0); --default_score prompt keeps the score without an answer"
        )


def _skeleton(config: LlavaConfig) -> LlavaLlamaForCausalLM:
    with torch.device("meta"):
        return LlavaLlamaForCausalLM(config)


def answer_format(config: LlavaConfig) -> AnswerFormat:
    """Returns the words of the system that is trained.

    Raises:
        OptionError: It has no answers, so there is nothing to train a language model on.
    """
    found = registry.answer_format(config.system)
    if found is None:
        raise OptionError(f"the system {config.system!r} has no answers, so no language model can be trained on them")
    return found


def build_model(
    opened: StartingPoint, *, dtype: torch.dtype, device: torch.device, bits: int, attn_implementation: str
) -> LlavaLlamaForCausalLM:
    """Reads the weights.

    Args:
        opened: What to build.
        dtype: Of all weights.
        device: Where the model will compute; only a quantised one is put there now.
        bits: 16, or 8 or 4 for a quantised language model.
        attn_implementation: As for ``load_pretrained_model``.
    """
    tensors = dict(opened.tensors)
    if opened.folder is None:
        tensors = {**stored_state_dict(LlavaLlamaForCausalLM(opened.config)), **tensors}
    skeleton = _skeleton(opened.config)
    for part in sorted(opened.new):
        path = _path(skeleton, part)
        tensors |= {f"model.{path}.{name}": value for name, value in random_part(skeleton, path).items()}
    with without_sharded_loading():
        model = materialize(
            opened.config,
            tensors,
            dtype=dtype,
            device_map={"": device if bits != 16 else torch.device("cpu")},
            quantization_config=quantization(opened.config, bits == 8, bits == 4, dtype),
            attn_implementation=resolve_attention(attn_implementation, device, dtype),
        )
    set_generation_defaults(model, opened.folder, opened.tokenizer)
    model.get_model().freeze_towers()
    model.set_tokenizer(opened.tokenizer)
    return model


def random_part(skeleton: LlavaLlamaForCausalLM, part: str) -> dict[str, Tensor]:
    """Returns new weights for a part, each layer as torch initialises it."""
    module: nn.Module = skeleton.get_model().get_submodule(part).to_empty(device="cpu")
    layers: list[Any] = list(module.modules())
    for layer in layers:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    return dict(module.state_dict())


@contextmanager
def without_sharded_loading() -> Iterator[None]:
    """Keeps transformers from splitting weights over processes while it loads them.

    The engine splits them itself when training begins; read from memory-mapped files, they cost little until then.
    """
    config = deepspeed_integration._hf_deepspeed_config_weak_ref
    deepspeed_integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed_integration._hf_deepspeed_config_weak_ref = config
