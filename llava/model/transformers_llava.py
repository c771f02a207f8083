"""Transformers' LLaVA as files: what lies beside the weights, and the names of tensors in versions 4 and 5.

Both versions' names are read, and those of version 4 are written, which version 5 and serving engines read too.
"""

import json
from typing import Any

from llava.conversation import conv_templates
from llava.errors import CheckpointError
from llava.model.branches import FIRST
from llava.model.checkpoint_layout import KeyMap, Rename
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.clip_encoder import MODEL_FIELDS

IMAGE_TOKEN = "<image>"
_TOWER = "model.vision_tower.vision_tower.vision_model."
_PROJECTOR = "model.mm_projector."
KEY_MAP = KeyMap(
    (
        # Version 4, which is also what is written: the first rule that fits a native name writes it.
        Rename("vision_tower.vision_model.{rest*}", f"{_TOWER}{{rest*}}"),
        Rename("multi_modal_projector.linear_1.{p}", f"{_PROJECTOR}0.{{p}}"),
        Rename("multi_modal_projector.linear_2.{p}", f"{_PROJECTOR}2.{{p}}"),
        Rename("language_model.lm_head.{p}", "lm_head.{p}"),
        Rename("language_model.model.{rest*}", "model.{rest*}"),
        # Version 5.
        Rename("model.vision_tower.vision_model.{rest*}", f"{_TOWER}{{rest*}}"),
        *(
            Rename(f"model.vision_tower.{part}.{{rest*}}", f"{_TOWER}{part}.{{rest*}}")
            for part in ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")
        ),
        Rename("model.multi_modal_projector.linear_1.{p}", f"{_PROJECTOR}0.{{p}}"),
        Rename("model.multi_modal_projector.linear_2.{p}", f"{_PROJECTOR}2.{{p}}"),
        Rename("model.language_model.{rest*}", "model.{rest*}"),
    )
)
LANGUAGE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "bos_token_id",
    "eos_token_id",
)
SELECTED = {"default": "patch", "full": "cls_patch"}
"""LLaVA's names of the tower's features by transformers' names."""
_CHAT = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_RAW = (
    "{% for message in messages %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endfor %}"
)


def llava_files(model: LlavaLlamaForCausalLM) -> "dict[str, dict[str, Any] | str]":
    """Returns the files that transformers needs beside weights and tokenizer, by name: JSON values or text.

    Raises:
        CheckpointError: The tokenizer has no ``<image>``, or the model is not one that transformers' LLaVA can be.
    """
    config, tokenizer = model.config, model.tokenizer
    assert tokenizer is not None
    image_id = tokenizer.get_vocab().get(IMAGE_TOKEN)
    if image_id is None or image_id >= config.vocab_size:
        raise CheckpointError(
            f"transformers' LLaVA needs {IMAGE_TOKEN} among the model's {config.vocab_size} words; start the "
            "training from a model, or with a tokenizer, that has it"
        )
    reason = describe_unlike(model)
    if reason:
        raise CheckpointError(f"{reason}: write another layout")
    return {
        "config.json": _transformers_config(model, image_id),
        "preprocessor_config.json": _processor_settings(config),
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE_TOKEN,
            "patch_size": _clip_config(model).patch_size,
            "vision_feature_select_strategy": _strategy(config),
            "num_additional_image_tokens": 1,
        },
        "chat_template.jinja": _chat_template(config.conv_mode),
        "generation_config.json": {
            name: getattr(model.generation_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        },
    }


def describe_unlike(model: LlavaLlamaForCausalLM) -> str:
    """Returns why transformers' LLaVA cannot be a model; nothing if it can."""
    config = model.config
    parts = (str(config.tower_configs().get(FIRST, {}).get("type")), config.mm_fusion_type, config.mm_projector_type)
    if parts != ("clip", FIRST, "mlp2x_gelu"):
        return (
            f"transformers' LLaVA cannot hold a tower, a fusion and a projector of the types {', '.join(parts)}; "
            "it needs clip, clip and mlp2x_gelu"
        )
    if config.token_source_configs or config.mm_native_crops:
        return "transformers' LLaVA takes nothing beside the image's tokens in a prompt, and no crops beside the image"
    return ""


def _chat_template(style: str) -> str:
    """A prompt style as a template: a message of the system takes the place of the style's own system sentence."""
    if style == "raw":
        return _RAW
    if style not in conv_templates:
        known = ", ".join(("raw", *conv_templates))
        raise CheckpointError(f"the config's conv_mode {style!r} is no prompt style; known: {known}")
    system = conv_templates[style].system
    if not system:
        return _CHAT
    return f"{{% if messages[0]['role'] != 'system' %}}{{{{ {json.dumps(system + ' ')} }}}}{{% endif %}}{_CHAT}"


def _strategy(config: Any) -> str:
    return next(name for name, own in SELECTED.items() if own == config.mm_vision_select_feature)


def _clip_config(model: LlavaLlamaForCausalLM) -> Any:
    """Config of the tower as it is built, defaults included."""
    tower = model.get_vision_tower()
    assert tower is not None
    return tower.vision_tower.config


def _transformers_config(model: LlavaLlamaForCausalLM, image_id: int) -> dict[str, Any]:
    config = model.config
    language = {name: getattr(config, name) for name in LANGUAGE_FIELDS if getattr(config, name, None) is not None}
    tower = _clip_config(model)
    rope = language.pop("rope_parameters", None) or {}
    # Version 4 knows the rotary base alone; whatever else there is, version 5 reads.
    rope_fields = {"rope_theta": rope.get("rope_theta", 10000.0)}
    if rope.get("rope_type", "default") != "default":
        rope_fields["rope_parameters"] = rope
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": image_id,
        "image_seq_length": (tower.image_size // tower.patch_size) ** 2,
        "pad_token_id": model.generation_config.pad_token_id,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        "vision_feature_layer": config.mm_vision_select_layer,
        "vision_feature_select_strategy": _strategy(config),
        "text_config": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **language, **rope_fields},
        "vision_config": {"model_type": "clip_vision_model", **{name: getattr(tower, name) for name in MODEL_FIELDS}},
        # Not transformers': how the model is asked here, and what it was trained as.
        "system": config.system,
        "conv_mode": config.conv_mode,
        "image_aspect_ratio": config.image_aspect_ratio,
        "tokenizer_model_max_length": config.tokenizer_model_max_length,
        "notice": config.notice,
    }


def _processor_settings(config: Any) -> dict[str, Any]:
    """Settings of an image processor that makes the same pixels: padding is one of LLaVA's own."""
    settings = {**config.mm_image_processor, "processor_class": "LlavaProcessor"}
    if config.image_aspect_ratio != "pad":
        return {**settings, "image_processor_type": "CLIPImageProcessor"}
    return {**settings, "image_processor_type": "LlavaImageProcessor", "do_pad": True}
