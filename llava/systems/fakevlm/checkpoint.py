"""FakeVLM's files: transformers' LLaVA layout of versions 4 and 5, both ways.

Versions 4 and 5 differ in the names of tensors; both are read, and those of version 4 are written, which version 5 and
serving engines read too. The image processor's settings are in ``preprocessor_config.json`` or, since version 5, within
``processor_config.json``.
"""

import json
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import LlavaConfig as TransformersConfig

from llava.conversation import conv_templates
from llava.errors import CheckpointError
from llava.model.branches import FIRST
from llava.model.checkpoint_files import TensorLike
from llava.model.checkpoint_layout import KeyMap, Rename
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.systems.base import CheckpointFormat

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
_LANGUAGE_FIELDS = (
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
_TOWER_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)
_SELECTED = {"default": "patch", "full": "cls_patch"}
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


class _Format:
    """Transformers' LLaVA layout as a ``CheckpointFormat``."""

    key_map = KEY_MAP
    asks_as_trained = True
    tower_types: Mapping[str, str] = {FIRST: "clip"}
    tower_variables: Mapping[str, str] = {}

    def infer_config(self, config: Mapping[str, Any], tensors: Mapping[str, TensorLike]) -> dict[str, Any]:
        """Returns our config for transformers' one; ours as it is.

        Raises:
            CheckpointError: The config is not one of a LLaVA with a Llama and a CLIP tower.
        """
        if config.get("model_type") != "llava":
            return {"mm_fusion_type": FIRST, **config}
        try:
            theirs = TransformersConfig.from_dict(dict(config))
        except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
            raise CheckpointError(f"config.json is no LLaVA's: {error.__cause__ or error}") from error
        language, vision = theirs.text_config.to_dict(), theirs.vision_config.to_dict()
        _check_kind(language, vision)
        length = config.get("tokenizer_model_max_length") or language["max_position_embeddings"]
        select = config.get("vision_feature_select_strategy", "default")
        if select not in _SELECTED:
            raise CheckpointError(f"config.json: unknown vision_feature_select_strategy {select!r}")
        return {
            **{name: language[name] for name in _LANGUAGE_FIELDS if name in language},
            "pad_token_id": theirs.pad_token_id,
            "tie_word_embeddings": theirs.tie_word_embeddings,
            "mm_fusion_type": FIRST,
            "mm_projector_type": "mlp2x_gelu",
            "vision_tower_config": {
                "type": "clip",
                **{name: vision[name] for name in _TOWER_FIELDS},
                "select_layer": theirs.vision_feature_layer,
                "select_feature": _SELECTED[select],
            },
            "mm_vision_select_layer": theirs.vision_feature_layer,
            "mm_vision_select_feature": _SELECTED[select],
            "mm_image_processor": config.get("mm_image_processor"),
            "image_aspect_ratio": _image_mode(config),
            "tokenizer_model_max_length": length,
            "conv_mode": config.get("conv_mode", "raw"),
            "notice": config.get("notice", ""),
        }

    def infer_tower(self, branch: str, tensors: Mapping[str, TensorLike]) -> dict[str, Any]:
        """Returns nothing: the config tells all of the tower."""
        return {}

    def published_files(self, model: LlavaLlamaForCausalLM) -> dict[str, "dict[str, Any] | str"]:
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
        parts = (str(config.tower_configs()[FIRST].get("type")), config.mm_fusion_type, config.mm_projector_type)
        if parts != ("clip", FIRST, "mlp2x_gelu"):
            raise CheckpointError(
                f"transformers' LLaVA cannot hold a tower, a fusion and a projector of the types {', '.join(parts)}; "
                "it needs clip, clip and mlp2x_gelu: write another layout"
            )
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
                name: getattr(model.generation_config, name)
                for name in ("bos_token_id", "eos_token_id", "pad_token_id")
            },
        }


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


def _check_kind(language: Mapping[str, Any], vision: Mapping[str, Any]) -> None:
    if language.get("model_type") != "llama" or vision.get("model_type") != "clip_vision_model":
        raise CheckpointError(
            f"a LLaVA of a {language.get('model_type')} and a {vision.get('model_type')} is not supported; "
            "FakeVLM is one of a llama and a clip_vision_model"
        )


def _image_mode(config: Mapping[str, Any]) -> str:
    """``pad`` or ``crop``: as our own field says, else as the image processor does."""
    own = config.get("image_aspect_ratio")
    processor = config.get("mm_image_processor") or {}
    return own or ("pad" if processor.get("do_pad") else "crop")


def _strategy(config: Any) -> str:
    return next(name for name, own in _SELECTED.items() if own == config.mm_vision_select_feature)


def _clip_config(model: LlavaLlamaForCausalLM) -> Any:
    """Config of the tower as it is built, defaults included."""
    tower = model.get_vision_tower()
    assert tower is not None
    return tower.vision_tower.config


def _transformers_config(model: LlavaLlamaForCausalLM, image_id: int) -> dict[str, Any]:
    config = model.config
    language = {name: getattr(config, name) for name in _LANGUAGE_FIELDS if getattr(config, name, None) is not None}
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
        "vision_config": {"model_type": "clip_vision_model", **{name: getattr(tower, name) for name in _TOWER_FIELDS}},
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


FORMAT: CheckpointFormat = _Format()
